#!/usr/bin/env bash
# MoEUT with a billion parameters: a group of 4 layers that runs 9 times. Further flags are passed on.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=profile.sh
source "$(dirname "${BASH_SOURCE[0]}")/profile.sh"

export PROFILE=1b WARMUP=4000 CLIP=0.25
MODEL_ARGS=(
    --num-layers 4
    --recurrence-steps 9
    --hidden-size 1536
    --num-attention-heads 6
    --kv-channels 128
    --num-experts 565
    --moe-ffn-hidden-size 128
    --moe-router-topk 24
    --switchhead-num-experts 12
    --switchhead-topk 2
)

pretrain "$@"
