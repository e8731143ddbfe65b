# shellcheck shell=bash
# Sourced by the scripts beside it: what the runs of MoEUT's paper (arXiv 2405.16039) have in common.
#
# GPUS_PER_NODE       ranks; all of them replicas, since the paper's numbers of experts have few divisors
# DATA                prefix of a dataset, its tokenizer a SentencePiece model of 8000 pieces
# CHECKPOINTS         folder that a run saves to and continues from
#
# A profile sets PROFILE, MODEL_ARGS (sizes), WARMUP and CLIP before it calls `pretrain`.

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

GPUS_PER_NODE=${GPUS_PER_NODE:-8}
DATA=${DATA:-data/c4}

# 64 sequences of 1024 tokens, 100,000 steps: 6.5 billion tokens.
TRAINING_ARGS=(
    --seq-length 1024
    --micro-batch-size "${MICRO_BATCH_SIZE:-8}"
    --global-batch-size 64
    --train-iters 100000
    --lr 2.5e-4
    --min-lr 2.5e-5
    --lr-decay-style cosine
    --adam-beta2 0.999
    --weight-decay 0.01
    --attention-dropout 0
    --hidden-dropout 0
)

BALANCE_ARGS=(
    --moeut-balance-coeff 0.01
    --switchhead-balance-coeff 0.001
)

DATA_ARGS=(
    --data-path "${DATA}_text_document"
    --data-cache-path data/cache
    --split "99,1,0"
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "${DATA}_tokenizer.model"
)

# Usage: pretrain FLAGS..., where later flags take precedence over earlier ones.
pretrain() {
    local checkpoints=${CHECKPOINTS:-checkpoints/moeut_$PROFILE}
    torchrun --standalone --nproc-per-node "$GPUS_PER_NODE" pretrain_more.py \
        --more-variant moeut \
        "${MODEL_ARGS[@]}" \
        "${BALANCE_ARGS[@]}" \
        "${TRAINING_ARGS[@]}" \
        --lr-warmup-iters "$WARMUP" \
        --clip-grad "$CLIP" \
        "${DATA_ARGS[@]}" \
        --log-interval 100 --log-throughput --eval-interval 1000 --eval-iters 50 \
        --save "$checkpoints" --load "$checkpoints" --save-interval 1000 \
        --tensorboard-dir "$checkpoints/tensorboard" \
        "$@"
}
