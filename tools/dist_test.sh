#!/usr/bin/env bash
# Evaluate a checkpoint with several processes, one for each GPU (without GPUs: on the CPU, over gloo); see torchrun.sh.
#   bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [options of test.py]
set -euo pipefail

if [[ $# -lt 3 || ! $3 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500]" \
        "bash $0 CONFIG CHECKPOINT GPUS [options of test.py]" >&2
    exit 2
fi
tools=$(dirname "${BASH_SOURCE[0]}")
exec bash "$tools/torchrun.sh" "$3" "$tools/test.py" "$1" "$2" --launcher pytorch "${@:4}"
