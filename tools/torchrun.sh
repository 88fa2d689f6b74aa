#!/usr/bin/env bash
# Start SCRIPT in GPUS processes on this machine; used by dist_train.sh and dist_test.sh.
#   bash tools/torchrun.sh GPUS SCRIPT [arguments]
# Several machines: run it on each, with equal NNODES, MASTER_ADDR and PORT, and a different NODE_RANK (from 0).
# Several runs on one machine: give each a different PORT.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500] bash $0 GPUS SCRIPT [arguments]" >&2
    exit 2
fi
gpus=$1
script=$2
shift 2

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$gpus" \
    "$script" "$@"
