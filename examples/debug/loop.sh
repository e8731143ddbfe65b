#!/usr/bin/env bash
# Ten steps of `loop` with experts (looped MoE): one layer in front, then two that are repeated together.
# Further flags are passed on: bash examples/debug/loop.sh --recurrence-group-layers 1
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

pretrain_recurrent loop --num-layers 3 --recurrence-prelude-layers 1 "$@"
