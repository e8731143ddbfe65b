#!/usr/bin/env bash
# Ten steps of `recurrent_moe`: the MoE sub-layer iterated, with a routing decision in every step.
# Further flags are passed on: bash examples/debug/recurrent_moe.sh --train-iters 50
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

pretrain --more-variant recurrent_moe "${RECURRENCE_ARGS[@]}" "$@"
