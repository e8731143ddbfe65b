#!/usr/bin/env bash
# Ten steps of `universal`: a group of two layers repeated, each position halting after at most four passes.
# Further flags are passed on: bash examples/debug/universal.sh --num-experts 8 --moe-router-topk 2
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Dense unless it is given experts.
MOE_ARGS=()
MODEL_PARALLEL_ARGS=()

pretrain --more-variant universal --recurrence-max-steps 4 --recurrence-eval-steps 4 "$@"
