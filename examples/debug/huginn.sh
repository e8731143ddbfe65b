#!/usr/bin/env bash
# Ten steps of `huginn`: prelude, core and coda of a layer each, the core repeated from a random state.
# With experts: bash examples/debug/huginn.sh --num-experts 8 --moe-router-topk 2
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Dense unless it is given experts.
MOE_ARGS=()
MODEL_PARALLEL_ARGS=()

pretrain_recurrent huginn --num-layers 3 "$@"
