#!/usr/bin/env bash
# Ten steps of `sequential_experts`: each expert is a feed-forward network, whose output a gated LSTM cell refines.
# Further flags are passed on: bash examples/debug/sequential_experts.sh --train-iters 50
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

pretrain_recurrent sequential_experts "$@"
