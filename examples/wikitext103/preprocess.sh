#!/usr/bin/env bash
# WikiText-103 to data/wikitext103_{train,validation,test}_text_document and a tokenizer of 32000 pieces.
#
#   bash examples/wikitext103/preprocess.sh              downloads the raw text
#   bash examples/wikitext103/preprocess.sh FOLDER       takes FOLDER/wiki.{train,valid,test}.*
#
# VOCAB_SIZE changes the size of the vocabulary.
set -euo pipefail

FOLDER=${1:+$(realpath "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
TOKENIZER=data/wikitext103_tokenizer.model

# The training split comes first: the tokenizer is trained on it and used for the others.
for SPLIT in train validation test; do
    if [[ -n $FOLDER ]]; then
        INPUT_ARGS=(--input "$FOLDER/wiki.${SPLIT/validation/valid}."*)
    else
        INPUT_ARGS=(--dataset wikitext-103-raw-v1 --dataset-split "$SPLIT")
    fi
    TOKENIZER_ARGS=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$TOKENIZER")
    if [[ $SPLIT == train ]]; then
        TOKENIZER_ARGS+=(--train-tokenizer --vocab-size "${VOCAB_SIZE:-32000}")
    fi
    python tools/preprocess_wikitext.py \
        "${INPUT_ARGS[@]}" \
        "${TOKENIZER_ARGS[@]}" \
        --output-prefix "data/wikitext103_$SPLIT"
done
