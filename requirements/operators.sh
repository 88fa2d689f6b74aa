#!/usr/bin/env bash
# Compile mmcv's operators in an installed environment, against its torch; this takes 15 to 20 minutes on two cores.
# usage: operators.sh VENV      FORCE_CUDA=1 also builds the operators for GPUs on a machine without a GPU
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: operators.sh VENV}
[ -x "$venv/bin/python" ] || {
    echo "error: no environment $venv; requirements/install.sh $venv makes one" >&2
    exit 1
}
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
if "${pip[@]}" show -q onedl-mmengine 2>/dev/null; then
    version=$(grep -x 'onedl-mmcv==.*' requirements/mmcv.txt)
elif "${pip[@]}" show -q mmengine 2>/dev/null; then
    version=$(sed -n 's/^mmcv-lite==/mmcv==/p' requirements/stock-mmcv.txt)
else
    echo "error: $venv has neither onedl-mmengine nor mmengine; install a stack first: requirements/install.sh $venv" >&2
    exit 1
fi
command -v c++ >/dev/null || {
    echo "error: no C++ compiler (c++) found, which mmcv's operators need; install g++ or clang" >&2
    exit 1
}
"$venv/bin/python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' || {
    echo "error: no Python.h for $venv/bin/python found, which mmcv's operators need; install python3-dev" >&2
    exit 1
}
"${pip[@]}" install -q 'setuptools>=77,<81' wheel packaging ninja psutil
log=$venv/mmcv-build.log wheels=$venv/mmcv-wheel
rm -rf "$wheels"
# No build isolation, so that the build finds torch; no cache, which may have a wheel for another torch.
if ! "${pip[@]}" wheel -v --no-build-isolation --no-cache-dir --no-deps -w "$wheels" "$version" 2>&1 | tee "$log" |
    { grep --line-buffered -oE '^ *\[[0-9]+/[0-9]+\]' || true; } | sed -u 's/^ */  compiling mmcv /'; then
    echo "error: mmcv was not built, and $venv is as it was; the log is $log, its end:" >&2
    tail -n 20 "$log" >&2
    exit 1
fi
"${pip[@]}" uninstall -q -y mmcv-lite
"${pip[@]}" install -q --no-deps --force-reinstall "$wheels"/*.whl
rm -r "$wheels"
"$venv/bin/python" -m condattn.stack
