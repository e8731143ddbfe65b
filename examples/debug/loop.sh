#!/usr/bin/env bash
# Ten steps of `loop`: groups of one layer, each repeated in place before the next begins.
# Looped MoE: bash examples/debug/loop.sh --num-experts 8 --moe-router-topk 2
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Dense unless it is given experts.
MOE_ARGS=()
MODEL_PARALLEL_ARGS=()

pretrain_recurrent loop --recurrence-group-layers 1 "$@"
