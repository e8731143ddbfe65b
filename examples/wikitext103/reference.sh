# shellcheck shell=bash
# Sourced by the scripts beside it: the reference configuration, the same for every system.
#
# VARIANT             system, a name from the systems table of README.md
# GPUS_PER_NODE       ranks on each node
# TP, PP, EP          tensor-, pipeline- and expert-parallel sizes
# CHECKPOINTS         folder that a run saves to and continues from

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

VARIANT=${VARIANT:-recurrent_moe}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
NNODES=${NNODES:-1}
TP=${TP:-1}
PP=${PP:-1}
EP=${EP:-$GPUS_PER_NODE}
CHECKPOINTS=${CHECKPOINTS:-checkpoints/wikitext103_$VARIANT}
GLOBAL_BATCH_SIZE=48

# Print the largest micro-batch, up to the reference's 8, that divides the share of each data-parallel rank.
micro_batch_size() {
    local share=$((GLOBAL_BATCH_SIZE * TP * PP / (NNODES * GPUS_PER_NODE)))
    local size=8
    while ((size > 1 && share % size)); do
        size=$((size - 1))
    done
    echo "$size"
}

MODEL_ARGS=(
    --num-layers 12
    --hidden-size 512
    --num-attention-heads 8
    # Two matrices of 4 d, spread over the three of SwiGLU.
    --ffn-hidden-size 1344
    --seq-length 512
    --attention-dropout 0.1
    --hidden-dropout 0.1
)

MOE_ARGS=(
    --num-experts 8
    --moe-router-topk 1
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.001
    --moe-z-loss-coeff 0.001
)
# Tokens beyond an expert's capacity are dropped, which is not causal in training: only on request, as CAPACITY=1.0.
if [[ -n ${CAPACITY:-} ]]; then
    MOE_ARGS+=(--moe-expert-capacity-factor "$CAPACITY")
fi

DEPTH_ARGS=(
    --recurrence-sampling uniform
    --recurrence-min-steps 2
    --recurrence-max-steps 4
    --recurrence-eval-steps 4
)
RECURRENCE_ARGS=(--more-variant "$VARIANT")
case $VARIANT in
    moe | parallel_experts) ;; # no recurrence in depth
    # Each position stops by itself.
    universal) RECURRENCE_ARGS+=(--recurrence-max-steps 4 --recurrence-eval-steps 4) ;;
    recurrent_moe) RECURRENCE_ARGS+=("${DEPTH_ARGS[@]}" --router-min-entropy 0.8 --router-logit-ema 0.9) ;;
    *) RECURRENCE_ARGS+=("${DEPTH_ARGS[@]}") ;;
esac

DATA_ARGS=(
    --train-data-path data/wikitext103_train_text_document
    --valid-data-path data/wikitext103_validation_text_document
    --test-data-path data/wikitext103_test_text_document
    --data-cache-path data/cache
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model data/wikitext103_tokenizer.model
)

TRAINING_ARGS=(
    --micro-batch-size "$(micro_batch_size)"
    --global-batch-size "$GLOBAL_BATCH_SIZE"
    --train-iters 30000
    --lr 2e-4
    --min-lr 1e-5
    --lr-decay-style cosine
    --lr-warmup-iters 500
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay 0.1
    --clip-grad 1.0
)

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --expert-model-parallel-size "$EP"
)

LOGGING_ARGS=(
    --log-interval 100
    --log-throughput
    --eval-interval 1000
    --eval-iters 50
    --save "$CHECKPOINTS"
    --load "$CHECKPOINTS"
    --save-interval 1000
    --tensorboard-dir "$CHECKPOINTS/tensorboard"
)

# Usage: pretrain LAUNCHER_FLAGS... -- FLAGS..., where later flags take precedence over earlier ones.
pretrain() {
    local launcher=()
    while [[ $1 != -- ]]; do
        launcher+=("$1")
        shift
    done
    shift
    torchrun "${launcher[@]}" --nproc-per-node "$GPUS_PER_NODE" pretrain_more.py \
        "${MODEL_ARGS[@]}" \
        "${MOE_ARGS[@]}" \
        "${RECURRENCE_ARGS[@]}" \
        "${DATA_ARGS[@]}" \
        "${TRAINING_ARGS[@]}" \
        "${MODEL_PARALLEL_ARGS[@]}" \
        "${LOGGING_ARGS[@]}" \
        "$@"
}
