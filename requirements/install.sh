#!/usr/bin/env bash
# Install a stack and condattn into a virtual environment; safe to run again after an interruption.
# usage: install.sh VENV [default|stock]      PYTHON chooses the interpreter, 3.10 or newer
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: install.sh VENV [default|stock]}
case ${2:-default} in
    default) torch=torch.txt packages=default mmcv=onedl-mmcv other=mmcv ;;
    stock) torch=stock-torch.txt packages=stock mmcv=mmcv other=onedl-mmcv ;;
    *) echo "error: unknown stack '$2'; expected default or stock" >&2 && exit 2 ;;
esac
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $("$python" --version 2>&1) found, Python 3.10 or newer needed; set PYTHON=python3.11, say" >&2
    exit 1
}
command -v c++ >/dev/null || {
    echo "error: no C++ compiler (c++) found; mmcv compiles its operators. Install g++ or clang" >&2
    exit 1
}
"$python" -c 'import pathlib, sys, sysconfig; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' || {
    echo "error: no Python.h for $python found, which mmcv compiles against; install python3-dev" >&2
    exit 1
}
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"
if "$venv/bin/python" -m pip show -q "$other" 2>/dev/null; then
    echo "error: $venv has the other stack ($other); start with another folder, or remove $venv" >&2
    exit 1
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

echo "[1/3] torch (several GB the first time)"
"${pip[@]}" install -q --upgrade pip
"${pip[@]}" install -r "requirements/$torch"

echo "[2/3] OpenMMLab; mmcv compiles once, 15 to 20 minutes on two cores"
log=$venv/mmcv-build.log
version=$(grep -x "$mmcv==.*" "requirements/$packages.txt")
if ! "${pip[@]}" install -v --no-build-isolation "$version" $(grep '^numpy' "requirements/$torch") 2>&1 | tee "$log" |
    { grep --line-buffered -oE '^ *\[[0-9]+/[0-9]+\]' || true; } | sed -u 's/^ */  compiling mmcv /'; then
    echo "error: mmcv did not install; the log is $log, its end:" >&2
    tail -n 20 "$log" >&2
    exit 1
fi
"${pip[@]}" install -q --no-build-isolation -c "requirements/$torch" -r "requirements/$packages.txt" -r "requirements/$packages-test.txt"

echo "[3/3] condattn"
"${pip[@]}" install -q --no-build-isolation -c "requirements/$torch" -e '.[data,openmmlab,test]'

# The dependencies bring opencv-python, which needs a desktop's libGL; the headless build is the same module without it.
opencv=$("${pip[@]}" show opencv-python 2>/dev/null | sed -n 's/^Version: //p')
if [ -n "$opencv" ]; then
    "${pip[@]}" uninstall -q -y opencv-python
    "${pip[@]}" install -q --force-reinstall --no-deps "opencv-python-headless==$opencv"
fi

"$venv/bin/python" -m condattn.stack
"$venv/bin/python" -c 'import mmcv.ops, mmdet, mmseg'
