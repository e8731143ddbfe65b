#!/usr/bin/env bash
# Ten steps of `shared_block_ffn`: light experts, then one recurrent block over the sequence.
# Further flags are passed on: bash examples/debug/shared_block_ffn.sh --train-iters 50
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

pretrain_recurrent shared_block_ffn "$@"
