#!/usr/bin/env bash
# The reference configuration on one node; the same command again continues from the last checkpoint.
#
#   bash examples/wikitext103/single_node.sh
#   VARIANT=recurrent_experts GPUS_PER_NODE=4 bash examples/wikitext103/single_node.sh --train-iters 10000
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=reference.sh
source "$(dirname "${BASH_SOURCE[0]}")/reference.sh"

pretrain --standalone --local-addr 127.0.0.1 -- "$@"
