#!/usr/bin/env bash
# MoEUT with 44 million parameters: a group of 2 layers that runs 8 times. Further flags are passed on.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=profile.sh
source "$(dirname "${BASH_SOURCE[0]}")/profile.sh"

export PROFILE=44m WARMUP=0 CLIP=0.1
MODEL_ARGS=(
    --num-layers 2
    --recurrence-steps 8
    --hidden-size 412
    --num-attention-heads 4
    --kv-channels 82
    # 40 of the 82 channels of a head, an even half, are rotated.
    --rotary-percent 0.49
    --num-experts 155
    --moe-ffn-hidden-size 128
    --moe-router-topk 12
    --switchhead-num-experts 8
    --switchhead-topk 2
)

pretrain "$@"
