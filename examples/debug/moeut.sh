#!/usr/bin/env bash
# Ten steps of `moeut`: two layers of SwitchHead attention and sigma-MoE, repeated.
# Further flags are passed on: bash examples/debug/moeut.sh --switchhead-num-experts 1
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# It has a balance of its own: the entropy of its routers.
MOE_ARGS=(--num-experts 8 --moe-router-topk 2)

pretrain_recurrent moeut --switchhead-num-experts 4 "$@"
