#!/usr/bin/env bash
# MoEUT with 244 million parameters: a group of 2 layers that runs 9 times. Further flags are passed on.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=profile.sh
source "$(dirname "${BASH_SOURCE[0]}")/profile.sh"

export PROFILE=244m WARMUP=4000 CLIP=0.25
MODEL_ARGS=(
    --num-layers 2
    --recurrence-steps 9
    --hidden-size 1024
    --num-attention-heads 4
    --kv-channels 128
    --num-experts 387
    --moe-ffn-hidden-size 128
    --moe-router-topk 16
    --switchhead-num-experts 10
    --switchhead-topk 2
)

pretrain "$@"
