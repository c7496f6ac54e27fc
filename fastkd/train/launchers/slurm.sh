#!/usr/bin/env bash
# sbatch slurm.sh: distil on two nodes of eight GPUs each. Student and teacher are sharded over all sixteen.
# Output folder and cache must be where both nodes see them. Five minutes before the time is over Slurm sends a signal, at
# which the run saves and stops. It goes on from the last checkpoint when the job is submitted again, or when Slurm itself
# starts it again because a node has failed.
#SBATCH --job-name=distil
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail

out=${OUT:-runs/miniend-e}
resume=()
if compgen -G "$out/checkpoint-*" > /dev/null; then resume=(--resume_from_checkpoint last); fi
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

export OMP_NUM_THREADS=8
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=280  # seconds that torchrun grants after a signal, for the step and the checkpoint
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 \
  --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
  -m fastkd.train.cli --config miniend-e --teacher google/flan-t5-xxl --train_file corpus.jsonl.gz \
  --bf16 --teacher_dtype bfloat16 --fsdp --per_device_train_batch_size 4 \
  --output_dir "$out" "${resume[@]}"
