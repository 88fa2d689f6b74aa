#!/usr/bin/env bash
# Start SCRIPT on a Slurm cluster, one task for each GPU; used by slurm_train.sh and slurm_test.sh.
#   bash tools/srun.sh PARTITION JOB_NAME SCRIPT [arguments]
# Environment variables and their defaults: GPUS in total (8), GPUS_PER_NODE (8), CPUS_PER_TASK (5), PORT (29500), and
# SRUN_ARGS with further options of srun (none).
set -euo pipefail

if [[ $# -lt 3 ]]; then
    echo "usage: [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 PORT=29500 SRUN_ARGS=...]" \
        "bash $0 PARTITION JOB_NAME SCRIPT [arguments]" >&2
    exit 2
fi
partition=$1
job_name=$2
shift 2
gpus=${GPUS:-8}
gpus_per_node=${GPUS_PER_NODE:-8}
if ((gpus < gpus_per_node)); then
    gpus_per_node=$gpus
fi
read -r -a srun_args <<<"${SRUN_ARGS:-}"

export MASTER_PORT=${PORT:-29500}
exec srun \
    --partition="$partition" \
    --job-name="$job_name" \
    --ntasks="$gpus" \
    --ntasks-per-node="$gpus_per_node" \
    --gres="gpu:$gpus_per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    ${srun_args[@]+"${srun_args[@]}"} \
    "${PYTHON:-python}" -u "$@"
