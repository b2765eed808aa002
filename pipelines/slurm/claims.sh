#!/usr/bin/env bash
# Stage 1 on nodes that come and go: any number of jobs, each of which claims blocks until the cache is complete.
# From a folder that every node sees:
#
#     sbatch --array=0-15 pipelines/slurm/claims.sh pipeline.yaml
#
# More jobs may be added at any time. A job that is preempted or fails is started again, or left away.
#SBATCH --job-name=cache-teacher
#SBATCH --array=0-3
#SBATCH --output=%x-%A-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
##SBATCH --partition=preemptible
##SBATCH --gpus=1
##SBATCH --cpus-per-task=8
set -euo pipefail

exec logitcache cache-teacher --engine claims "$@"
