#!/usr/bin/env bash
# Ten steps of `shared_block`: experts are projections around one recurrent block a layer.
# Further flags are passed on: bash examples/debug/shared_block.sh --train-iters 50
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

pretrain_recurrent shared_block "$@"
