#!/usr/bin/env bash
# Stage 1 or stage 2 on the GPUs of several nodes that run at the same time:
#
#     sbatch pipelines/slurm/torchrun.sh cache-teacher pipeline.yaml
#     sbatch pipelines/slurm/torchrun.sh train-student pipeline.yaml
#SBATCH --job-name=logitcache
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
##SBATCH --gpus-per-node=8
##SBATCH --cpus-per-task=64
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

exec srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${PROCESSES:-8}" --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d --rdzv-endpoint "${RENDEZVOUS:-$first:29500}" -m logitcache.cli "$@"
