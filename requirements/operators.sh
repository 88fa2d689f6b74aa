#!/usr/bin/env bash
# Compile mmcv's operators in an environment that install.sh made, against its torch: 15 to 20 minutes on two cores.
# usage: operators.sh VENV      FORCE_CUDA=1 builds those for GPUs on a machine without one
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: operators.sh VENV}
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
command -v c++ >/dev/null || {
    echo "error: no C++ compiler (c++) found, which mmcv's operators need; install g++ or clang" >&2
    exit 1
}
"$venv/bin/python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' || {
    echo "error: no Python.h for $venv/bin/python found, which mmcv's operators need; install python3-dev" >&2
    exit 1
}
if "${pip[@]}" show -q onedl-mmcv 2>/dev/null; then
    version=$(grep -x 'onedl-mmcv==.*' requirements/mmcv.txt)
else
    version=$(sed -n 's/^mmcv-lite==/mmcv==/p' requirements/stock-mmcv.txt)
    "${pip[@]}" uninstall -q -y mmcv-lite 2>/dev/null
fi
"${pip[@]}" install -q 'setuptools>=77,<81' wheel packaging ninja psutil
log=$venv/mmcv-build.log
# Without isolation, so that the build sees torch; without the cache, whose wheel may belong to another torch.
if ! "${pip[@]}" install -v --no-build-isolation --no-cache-dir --no-deps --force-reinstall "$version" 2>&1 | tee "$log" |
    { grep --line-buffered -oE '^ *\[[0-9]+/[0-9]+\]' || true; } | sed -u 's/^ */  compiling mmcv /'; then
    echo "error: mmcv did not install; the log is $log, its end:" >&2
    tail -n 20 "$log" >&2
    exit 1
fi
"$venv/bin/python" -m condattn.stack
