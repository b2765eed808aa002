#!/usr/bin/env bash
# Stage 1 as a job array: one job for each shard. From a folder that every node sees:
#
#     sbatch pipelines/slurm/shards.sh pipeline.yaml
#
# SHARDS stays the same for the whole cache. Run a failed shard again with `sbatch --array=3 ...`; it resumes.
#SBATCH --job-name=cache-teacher
#SBATCH --array=0-7
#SBATCH --output=%x-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
##SBATCH --gpus=1
##SBATCH --cpus-per-task=8
##SBATCH --time=24:00:00
set -euo pipefail
SHARDS=${SHARDS:-8}

exec logitcache cache-teacher --shard "$SLURM_ARRAY_TASK_ID/$SHARDS" "$@"
