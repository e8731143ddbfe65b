#!/usr/bin/env bash
# An exported model under lm-evaluation-harness (pip install lm_eval).
#
#   bash examples/evaluate_hf.sh DIR                       the usual tasks, which the harness downloads
#   bash examples/evaluate_hf.sh DIR wiki.test.tokens      perplexity of a text file; needs no network
#
# TASKS               comma-separated tasks in place of the usual ones
# NUM_STEPS           recurrence steps in place of the model's own
# DEVICE, BATCH_SIZE  where the model runs, and on how many sequences at a time
#
# Further flags are the harness's: bash examples/evaluate_hf.sh DIR wiki.test.tokens --output_path results
set -euo pipefail

MODEL=${1:?usage: evaluate_hf.sh DIR [TEXT_FILE] [FLAGS]}
shift

FOLDER=$(mktemp -d)
trap 'rm -rf "$FOLDER"' EXIT

MODEL_ARGS="pretrained=$MODEL,trust_remote_code=True"
if [[ -f $MODEL/tokenizer.model ]]; then
    # To SentencePiece in training, names of special tokens such as WikiText's <unk> were text.
    python -c "import sys, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True, split_special_tokens=True)
tokenizer.save_pretrained(sys.argv[2])" "$MODEL" "$FOLDER/tokenizer"
    MODEL_ARGS+=",tokenizer=$FOLDER/tokenizer"
fi
if [[ -n ${NUM_STEPS:-} ]]; then
    MODEL_ARGS+=",mean_recurrence=$NUM_STEPS"
fi

TASK_ARGS=(--tasks "${TASKS:-hellaswag,piqa,winogrande,arc_easy,arc_challenge,lambada_openai,wikitext}")
if [[ $# -gt 0 && $1 != -* ]]; then
    sed "s|TEXT_FILE|$(realpath "$1")|" "$(dirname "${BASH_SOURCE[0]}")/evaluate_hf.yaml" > "$FOLDER/more_text.yaml"
    TASK_ARGS=(--include_path "$FOLDER" --tasks more_text)
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_DATASETS_CACHE="$FOLDER/cache"
    shift
fi

lm_eval \
    --model hf \
    --model_args "$MODEL_ARGS" \
    "${TASK_ARGS[@]}" \
    --device "${DEVICE:-cpu}" \
    --batch_size "${BATCH_SIZE:-8}" \
    "$@"
