# shellcheck shell=bash
# Sourced by the scripts beside it: a model of every system's parts, ten steps on mock data, on a laptop.

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

MODEL_ARGS=(
    --num-layers 2
    --hidden-size 64
    --num-attention-heads 4
    --ffn-hidden-size 128
    --seq-length 64
)

MOE_ARGS=(
    --num-experts 8
    --moe-router-topk 2
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.001
    --moe-z-loss-coeff 0.001
)

DATA_ARGS=(
    --mock-data
    --tokenizer-type NullTokenizer
    --vocab-size 1023
    --split "90,5,5"
)

TRAINING_ARGS=(
    --micro-batch-size 2
    --global-batch-size 8
    --train-iters 10
    --lr 1e-3
    --lr-decay-style constant
    --clip-grad 1.0
    --attention-dropout 0
    --hidden-dropout 0
)

# Of the systems that have a recurrence.
RECURRENCE_ARGS=(
    --recurrence-sampling uniform
    --recurrence-min-steps 2
    --recurrence-max-steps 4
    --recurrence-backprop-steps 2
    --recurrence-eval-steps 4
)

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --expert-model-parallel-size 2
)

LOGGING_ARGS=(
    --log-interval 1
    --eval-interval 10
    --eval-iters 2
)

# Usage: pretrain FLAGS..., where later flags take precedence over earlier ones.
pretrain() {
    torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node "${NPROC:-2}" pretrain_more.py \
        "${MODEL_ARGS[@]}" \
        "${MOE_ARGS[@]}" \
        "${DATA_ARGS[@]}" \
        "${TRAINING_ARGS[@]}" \
        "${MODEL_PARALLEL_ARGS[@]}" \
        "${LOGGING_ARGS[@]}" \
        "$@"
}

# Usage: pretrain_recurrent SYSTEM FLAGS...
pretrain_recurrent() {
    pretrain --more-variant "$1" "${RECURRENCE_ARGS[@]}" "${@:2}"
}
