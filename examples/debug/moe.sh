#!/usr/bin/env bash
# Ten steps of `moe`: Megatron's mixture of experts, the baseline.
# Further flags are passed on: bash examples/debug/moe.sh --train-iters 50
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

pretrain --more-variant moe "$@"
