#!/usr/bin/env bash
# The reference configuration on several nodes: run once on each of them. Under SLURM the addresses come from there:
#
#   srun --nodes 2 --ntasks-per-node 1 --gpus-per-node 8 bash examples/wikitext103/multi_node.sh
#
# Elsewhere name them:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash examples/wikitext103/multi_node.sh
set -euo pipefail

NNODES=${NNODES:-${SLURM_NNODES:?set NNODES, NODE_RANK and MASTER_ADDR, or start with srun}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK, from 0 to NNODES - 1}}
if [[ -z ${MASTER_ADDR:-} ]]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi

# shellcheck source-path=SCRIPTDIR source=reference.sh
source "$(dirname "${BASH_SOURCE[0]}")/reference.sh"

LAUNCHER_ARGS=(
    --nnodes "$NNODES"
    --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR"
    --master-port "${MASTER_PORT:-29500}"
)

pretrain "${LAUNCHER_ARGS[@]}" -- "$@"
