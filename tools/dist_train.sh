#!/usr/bin/env bash
# Train with several processes, one for each GPU (without GPUs: on the CPU, over gloo); see torchrun.sh.
#   bash tools/dist_train.sh CONFIG GPUS [options of train.py]
set -euo pipefail

if [[ $# -lt 2 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500] bash $0 CONFIG GPUS [options of train.py]" >&2
    exit 2
fi
tools=$(dirname "${BASH_SOURCE[0]}")
exec bash "$tools/torchrun.sh" "$2" "$tools/train.py" "$1" --launcher pytorch "${@:3}"
