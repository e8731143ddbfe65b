#!/usr/bin/env bash
# Ten steps of `parallel_experts`: each expert mixes a feed-forward network and an LSTM along the tokens sent to it.
# Further flags are passed on: bash examples/debug/parallel_experts.sh --train-iters 50
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

pretrain --more-variant parallel_experts "$@"
