#!/usr/bin/env bash
# Evaluate a checkpoint on a Slurm cluster, one task for each GPU; srun.sh lists the environment variables.
#   bash tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]
set -euo pipefail

if [[ $# -lt 4 ]]; then
    echo "usage: [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 PORT=29500 SRUN_ARGS=...]" \
        "bash $0 PARTITION JOB_NAME CONFIG CHECKPOINT [options of test.py]" >&2
    exit 2
fi
tools=$(dirname "${BASH_SOURCE[0]}")
exec bash "$tools/srun.sh" "$1" "$2" "$tools/test.py" "$3" "$4" --launcher slurm "${@:5}"
