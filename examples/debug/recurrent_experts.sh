#!/usr/bin/env bash
# Ten steps of `recurrent_experts`: each expert is a recurrent block of its own.
# Further flags are passed on: bash examples/debug/recurrent_experts.sh --train-iters 50
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

pretrain_recurrent recurrent_experts "$@"
