# shellcheck shell=bash disable=SC2034  # node.sh uses the arrays
# Sourced by node.sh: what is trained, and how it is laid out. Every variable below can be set in the environment of
# sbatch; single flags can follow the name of the script, and take precedence.
#
# SYSTEM             a name from the systems table of README.md
# SIZE               row of the table of sizes; default: the number of GPUs
# GPUS_PER_NODE      ranks on each node
# DATA_PREFIX        dataset that preprocess.sbatch made
# DATA_BLEND         several of them with their weights, in place of it: "0.7 data/web 0.3 data/code"
# TOKENIZER          its tokenizer
# CHECKPOINTS        folder that a run saves to and continues from, on a file system that all nodes see
# TRAIN_ITERS        length of training; a requeued job continues up to it
# SAVE_INTERVAL      iterations between checkpoints
# WANDB_PROJECT      project of Weights & Biases, which wants WANDB_API_KEY as well; WANDB_NAME names the run
# FP8_RECIPE         blockwise (Hopper), mxfp8 (Blackwell), tensorwise or delayed; default: bf16. See docs/fp8.md

GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
SYSTEM=${SYSTEM:-recurrent_moe}
SIZE=${SIZE:-$((SLURM_NNODES * GPUS_PER_NODE))}

# Huginn is dense and has few layers, of which those in the middle, on one stage, are passed 32 times on average.
if [[ $SYSTEM == huginn ]]; then
    : "${LAYERS:=8}" "${PP:=1}" "${EP:=1}" "${STAGE_LAYERS:=8}" "${RECOMPUTE:=full}"
    if ((SIZE == 512)); then
        : "${HIDDEN:=5120}" "${HEADS:=40}"
    fi
fi

# The sizes. docs/parallelism.md says why the layouts are as they are.
case $SIZE in
    8)
        : "${LAYERS:=16}" "${HIDDEN:=1024}" "${HEADS:=16}" "${SEQ_LENGTH:=2048}" "${EXPERTS:=8}"
        : "${TP:=1}" "${PP:=1}" "${EP:=8}" "${STAGE_LAYERS:=16}" "${GROUP_LAYERS:=4}" "${RECOMPUTE:=none}"
        : "${MICRO_BATCH:=2}" "${GLOBAL_BATCH:=256}" "${LR:=3e-4}"
        ;;
    64)
        : "${LAYERS:=24}" "${HIDDEN:=2048}" "${HEADS:=16}" "${SEQ_LENGTH:=4096}" "${EXPERTS:=32}"
        : "${TP:=2}" "${PP:=2}" "${EP:=8}" "${STAGE_LAYERS:=12}" "${GROUP_LAYERS:=4}" "${RECOMPUTE:=full}"
        : "${MICRO_BATCH:=2}" "${GLOBAL_BATCH:=512}" "${LR:=2e-4}"
        ;;
    512)
        : "${LAYERS:=48}" "${HIDDEN:=4096}" "${HEADS:=32}" "${SEQ_LENGTH:=4096}" "${EXPERTS:=32}"
        : "${TP:=4}" "${PP:=8}" "${EP:=16}" "${STAGE_LAYERS:=3}" "${GROUP_LAYERS:=3}" "${RECOMPUTE:=full}"
        : "${MICRO_BATCH:=1}" "${GLOBAL_BATCH:=1024}" "${LR:=1e-4}"
        ;;
    *)
        echo "run.sh: there is no size for $SIZE GPUs: set SIZE to 8, 64 or 512, and TP, PP and EP to fit the nodes" >&2
        exit 1
        ;;
esac

CHECKPOINTS=${CHECKPOINTS:-checkpoints/$SYSTEM-$SIZE}

MODEL_ARGS=(
    --num-layers "$LAYERS"
    --hidden-size "$HIDDEN"
    --num-attention-heads "$HEADS"
    --ffn-hidden-size $((2 * HIDDEN))
    --seq-length "$SEQ_LENGTH"
    --attention-dropout 0
    --hidden-dropout 0
)

MOE_ARGS=(
    --num-experts "$EXPERTS"
    --moe-router-topk 2
    --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.001
    --moe-z-loss-coeff 0.001
    # All local experts in one kernel, where experts are Megatron's; the recurrent ones always are.
    --moe-grouped-gemm
)

DEPTH_ARGS=(
    --recurrence-sampling uniform
    --recurrence-min-steps 2
    --recurrence-max-steps 6
    # Memory is that of two steps at any depth.
    --recurrence-backprop-steps 2
    --recurrence-eval-steps 4
)
RECURRENCE_ARGS=(--more-variant "$SYSTEM")
case $SYSTEM in
    moe | parallel_experts) ;; # no recurrence in depth
    # Each position stops by itself.
    universal) RECURRENCE_ARGS+=(--recurrence-max-steps 6 --recurrence-eval-steps 6) ;;
    huginn)
        MOE_ARGS=()
        MODEL_ARGS+=(--ffn-hidden-size $((7 * HIDDEN / 2)))
        RECURRENCE_ARGS+=(
            --recurrence-sampling poisson-lognormal
            --recurrence-steps 32
            --recurrence-backprop-steps 8
            --recurrence-eval-steps 32
        )
        ;;
    recurrent_moe) RECURRENCE_ARGS+=("${DEPTH_ARGS[@]}" --router-min-entropy 0.8 --router-logit-ema 0.9) ;;
    # With experts it is a looped MoE; a group lies on one stage.
    loop)
        RECURRENCE_ARGS+=(
            "${DEPTH_ARGS[@]}"
            --router-min-entropy 0.8
            --router-logit-ema 0.9
            --recurrence-group-layers "$GROUP_LAYERS"
        )
        ;;
    *) RECURRENCE_ARGS+=("${DEPTH_ARGS[@]}") ;;
esac

read -ra DATA <<< "${DATA_BLEND:-${DATA_PREFIX:-data/train_text_document}}"
DATA_ARGS=(
    --data-path "${DATA[@]}"
    --split "990,8,2"
    # Rank 0 builds the indices and all ranks read them: on a file system that all nodes see, and of this run alone.
    --data-cache-path "$CHECKPOINTS/data_cache"
    --tokenizer-type SentencePieceTokenizer
    --tokenizer-model "${TOKENIZER:-data/train_tokenizer.model}"
)

TRAINING_ARGS=(
    --micro-batch-size "$MICRO_BATCH"
    --global-batch-size "$GLOBAL_BATCH"
    --train-iters "${TRAIN_ITERS:-100000}"
    --lr "$LR"
    --min-lr 1e-5
    --lr-decay-style cosine
    --lr-warmup-iters "${WARMUP_ITERS:-1000}"
    --adam-beta1 0.9
    --adam-beta2 0.95
    --weight-decay 0.1
    --clip-grad 1.0
)
if [[ $RECOMPUTE == full ]]; then
    TRAINING_ARGS+=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
fi

PRECISION_ARGS=()
if [[ -n ${FP8_RECIPE:-} ]]; then
    PRECISION_ARGS+=(--fp8-format hybrid --fp8-recipe "$FP8_RECIPE")
fi

MODEL_PARALLEL_ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --expert-model-parallel-size "$EP"
    # Experts are whole: splitting them as well would cost a reduction in every recurrence step.
    --expert-tensor-parallel-size 1
    --overlap-grad-reduce
    --overlap-param-gather
)
# Several stages on each rank shorten the pipeline's bubble.
if ((STAGE_LAYERS * PP < LAYERS)); then
    MODEL_PARALLEL_ARGS+=(--num-layers-per-virtual-pipeline-stage "$STAGE_LAYERS")
fi

# The same command starts a run and continues it, after the end of a job's time and after a failure.
CHECKPOINT_ARGS=(
    --save "$CHECKPOINTS"
    --load "$CHECKPOINTS"
    --save-interval "${SAVE_INTERVAL:-1000}"
    # At a SIGTERM all ranks save after the same iteration, and leave.
    --exit-signal-handler
)

LOGGING_ARGS=(
    --log-interval "${LOG_INTERVAL:-10}"
    --log-throughput
    --eval-interval 1000
    --eval-iters "${EVAL_ITERS:-20}"
    --tensorboard-dir "$CHECKPOINTS/tensorboard"
)
if [[ -n ${WANDB_PROJECT:-} ]]; then
    LOGGING_ARGS+=(--wandb-project "$WANDB_PROJECT" --wandb-exp-name "${WANDB_NAME:-$SYSTEM-$SIZE}")
fi
