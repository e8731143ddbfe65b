#!/usr/bin/env bash
# Ten steps of `recurrent_experts`: each expert is a recurrent block of its own.
# Further flags are passed on: bash examples/debug/recurrent_experts.sh --train-iters 50
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

RECURRENCE_ARGS=(
    --recurrence-sampling uniform
    --recurrence-min-steps 2
    --recurrence-max-steps 4
    --recurrence-backprop-steps 2
    --recurrence-eval-steps 4
)

pretrain --more-variant recurrent_experts "${RECURRENCE_ARGS[@]}" "$@"
