#!/usr/bin/env bash
# From a pretrained checkpoint to answers: bAbI, arithmetic and algebra with weights 0.4, 0.3, 0.3, loss on answers.
#
#   bash examples/reasoning/finetune.sh quickstart/checkpoint reasoning
#   LR=1e-3 bash examples/reasoning/finetune.sh quickstart/checkpoint reasoning --train-iters 400
#
# Its second argument is the folder of prepare.sh, into which the checkpoint goes as well; further ones are flags. The
# model is that of `make quickstart`: for another checkpoint change MODEL_ARGS.
set -euo pipefail

FROM=${1:?name a checkpoint, as in quickstart/checkpoint}
FOLDER=${2:?name the folder of prepare.sh}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# What repeats, and how often, comes from the checkpoint.
MODEL_ARGS=(
    --num-layers 2
    --hidden-size 128
    --num-attention-heads 4
    --ffn-hidden-size 256
    --num-experts 8
    --moe-router-topk 1
    --moe-aux-loss-coeff 0.001
    --moe-z-loss-coeff 0.001
    --seq-length "${SEQ_LENGTH:-256}"
)

BLEND=(0.4 babi 0.3 arithmetic 0.3 algebra)
TRAIN=() VALID=()
for ((index = 0; index < ${#BLEND[@]}; index += 2)); do
    TRAIN+=("${BLEND[index]}" "$FOLDER/${BLEND[index + 1]}_train_document")
    VALID+=("${BLEND[index]}" "$FOLDER/${BLEND[index + 1]}_test_document")
done
DATA_ARGS=(
    --train-data-path "${TRAIN[@]}"
    --valid-data-path "${VALID[@]}"
    --data-cache-path "$FOLDER/cache"
    --tokenizer-type "${TOKENIZER_TYPE:-SentencePieceTokenizer}"
    --tokenizer-model "${TOKENIZER:-quickstart/data/tokenizer.model}"
)

TRAINING_ARGS=(
    --loss-on-answers
    --micro-batch-size 8
    --global-batch-size 16
    --train-iters 200
    --lr "${LR:-5e-5}"
    --min-lr 0
    --lr-decay-style cosine
    --lr-warmup-fraction 0.05
    --weight-decay 0.01
    --adam-beta2 0.95
    --clip-grad 1.0
    --attention-dropout 0
    --hidden-dropout 0
)

LOGGING_ARGS=(
    --recurrence-eval-depths 1 2 4
    --eval-interval 100
    --eval-iters 8
    --log-interval 20
    --save-interval 200
    --tensorboard-dir "$FOLDER/tensorboard"
)

torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node "${NPROC:-2}" pretrain_more.py \
    --load "$FROM" --finetune --save "$FOLDER/checkpoint" \
    "${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${TRAINING_ARGS[@]}" "${LOGGING_ARGS[@]}" "${@:3}"
