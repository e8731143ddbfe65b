#!/usr/bin/env bash
# Ten steps of `recurrent_moe`: the MoE sub-layer iterated, with a routing decision in every step.
# Further flags are passed on: bash examples/debug/recurrent_moe.sh --train-iters 50
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

pretrain_recurrent recurrent_moe "$@"
