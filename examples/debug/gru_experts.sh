#!/usr/bin/env bash
# Ten steps of `gru_experts`: each expert expands, iterates a GRU on its own state, and contracts.
# Further flags are passed on: bash examples/debug/gru_experts.sh --train-iters 50
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

pretrain_recurrent gru_experts "$@"
