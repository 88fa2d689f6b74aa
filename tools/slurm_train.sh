#!/usr/bin/env bash
# Train on a Slurm cluster, one task for each GPU; srun.sh lists the environment variables.
#   bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG [options of train.py]
set -euo pipefail

if [[ $# -lt 3 ]]; then
    echo "usage: [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 PORT=29500 SRUN_ARGS=...]" \
        "bash $0 PARTITION JOB_NAME CONFIG [options of train.py]" >&2
    exit 2
fi
tools=$(dirname "${BASH_SOURCE[0]}")
exec bash "$tools/srun.sh" "$1" "$2" "$tools/train.py" "$3" --launcher slurm "${@:4}"
