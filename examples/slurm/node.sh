#!/usr/bin/env bash
# One node's part of a run: srun starts it once on each node, and it starts a rank on each GPU.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
# shellcheck source-path=SCRIPTDIR source=common.sh
source examples/slurm/common.sh
# shellcheck source-path=SCRIPTDIR source=run.sh
source examples/slurm/run.sh

# Set here and not in the batch script: what an image sets takes precedence over what enters a container.
#
# Kernels start in the order in which they are issued, so that a collective starts before the matrix product it is
# overlapped with. Megatron asserts it under tensor parallelism up to Hopper.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# The rows of an expert and the depth differ from step to step; segments that grow do not fragment.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# NVLink SHARP would take GPU memory for each communicator, and there are many.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
# NCCL says what failed and on which interface.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A rank's work is on its GPU; torchrun would set the same with a warning.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Packages in ~/.local would come before those of the environment, PyPI's unrelated apex for one.
export PYTHONNOUSERSITE=1
# Compiled kernels stay on the node: in a shared home folder all ranks would write the same files.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$SLURM_JOB_ID}

LAUNCHER_ARGS=(
    --nnodes "$SLURM_NNODES"
    --node-rank "$SLURM_NODEID"
    --nproc-per-node "$GPUS_PER_NODE"
    --master-addr "$MASTER_ADDR"
    --master-port "$MASTER_PORT"
    # All but SIGTERM, at which torchrun would give its ranks 30 seconds: too few to save a large model.
    --signals-to-handle "SIGINT,SIGHUP,SIGQUIT"
)

# SLURM signals this script, or every process of the step, depending on its configuration. In both cases torchrun must
# go on and the ranks must learn of it; they save after the iteration that is under way (--exit-signal-handler).
tell_ranks() {
    interrupted=1
    local ranks=()
    read -ra ranks < "/proc/$launcher/task/$launcher/children" || true
    if ((${#ranks[@]} > 0)); then
        kill -TERM "${ranks[@]}" || true
    fi
}

(
    trap '' TERM
    exec torchrun "${LAUNCHER_ARGS[@]}" pretrain_more.py \
        "${MODEL_ARGS[@]}" \
        "${MOE_ARGS[@]}" \
        "${RECURRENCE_ARGS[@]}" \
        "${DATA_ARGS[@]}" \
        "${TRAINING_ARGS[@]}" \
        "${PRECISION_ARGS[@]}" \
        "${MODEL_PARALLEL_ARGS[@]}" \
        "${CHECKPOINT_ARGS[@]}" \
        "${LOGGING_ARGS[@]}" \
        "$@"
) &
launcher=$!
trap tell_ranks TERM
wait_through_signals "$launcher"
