#!/usr/bin/env bash
# Tasks as problems and as datasets, for a tokenizer: bAbI 1, 2, 3 and 16, arithmetic, algebra, chains.
#
#   BABI=tasks_1-20_v1-2/en bash examples/reasoning/prepare.sh quickstart/data/tokenizer.model reasoning
#
# BABI is the folder of bAbI's text files; without it they come from the Hugging Face hub. TASKS are their numbers.
set -euo pipefail

TOKENIZER=${1:?name the tokenizer, as in quickstart/data/tokenizer.model}
FOLDER=${2:-reasoning}
TOKENIZER_ARGS=(--tokenizer-type "${TOKENIZER_TYPE:-SentencePieceTokenizer}" --tokenizer-model "$TOKENIZER")
read -ra TASKS <<<"${TASKS:-1 2 3 16}"

python tools/prepare_tasks.py babi ${BABI:+--input "$BABI"} --tasks "${TASKS[@]}" \
    --output-prefix "$FOLDER/babi" "${TOKENIZER_ARGS[@]}"
for name in arithmetic algebra chains; do
    python tools/prepare_tasks.py "$name" --output-prefix "$FOLDER/$name" "${TOKENIZER_ARGS[@]}"
done
