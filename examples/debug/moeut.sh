#!/usr/bin/env bash
# Ten steps of `moeut`: a group of two layers repeated, with experts of heads and many small experts.
# Further flags are passed on: bash examples/debug/moeut.sh --switchhead-num-experts 1
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Balanced by entropy, not by Megatron's losses.
MOE_ARGS=(--num-experts 16 --moe-ffn-hidden-size 32 --moe-router-topk 4 --switchhead-num-experts 4)

pretrain_recurrent moeut "$@"
