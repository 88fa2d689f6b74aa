#!/usr/bin/env bash
# Install a stack and condattn into a virtual environment; safe to run again after an interruption.
# usage: install.sh VENV [default|stock|newest]      PYTHON chooses the interpreter, 3.10 or newer (stock: to 3.12)
# The stack "newest" is the default stack with the newest torch and torchvision that pip offers.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: install.sh VENV [default|stock|newest]}
prefix='' packages=default
case ${2:-default} in
    default | newest) others='mmcv mmcv-lite' ;;
    stock) others=onedl-mmcv prefix=stock- packages=stock ;;
    *) echo "error: unknown stack '$2'; expected default, stock or newest" >&2 && exit 2 ;;
esac
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $("$python" --version 2>&1) found, Python 3.10 or newer needed; set PYTHON=python3.11, say" >&2
    exit 1
}
if [ "$packages" = stock ]; then  # numpy below 2, which it needs, has no wheels for later versions of Python
    "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || {
        echo "error: $("$python" --version 2>&1) found, Python 3.10 to 3.12 needed for this stack; set PYTHON=python3.11" >&2
        exit 1
    }
fi
"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv "$venv"
for other in $others; do
    if "$venv/bin/python" -m pip show -q "$other" 2>/dev/null; then
        echo "error: $venv has the other stack ($other); start with another folder, or remove $venv" >&2
        exit 1
    fi
done
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

echo "[1/3] torch (several GB the first time)"
"${pip[@]}" install -q --upgrade pip
constraints=requirements/${prefix}torch.txt
if [ "${2:-default}" = newest ]; then
    "${pip[@]}" install --upgrade torch torchvision numpy
    constraints=$venv/torch.txt
    "$venv/bin/python" -c 'from importlib.metadata import version
for name in ("torch", "torchvision"): print(f"{name}=={version(name)}")' >"$constraints"
else
    "${pip[@]}" install -r "$constraints"
fi

echo "[2/3] OpenMMLab"
# A stock environment may have mmcv with compiled operators instead of mmcv-lite; keep it.
[ "$packages" = stock ] && "$venv/bin/python" -m pip show -q mmcv 2>/dev/null ||
    "${pip[@]}" install -q --no-cache-dir -c "$constraints" -r "requirements/${prefix}mmcv.txt"
"${pip[@]}" install -q -c "$constraints" -r "requirements/$packages.txt" -r "requirements/$packages-test.txt"

echo "[3/3] condattn"
"${pip[@]}" install -q -c "$constraints" -e '.[data,openmmlab,test]'

# The dependencies install opencv-python, which needs libGL; the headless build is the same module without it.
opencv=$("${pip[@]}" show opencv-python 2>/dev/null | sed -n 's/^Version: //p')
if [ -n "$opencv" ]; then
    "${pip[@]}" uninstall -q -y opencv-python
    "${pip[@]}" install -q --force-reinstall --no-deps "opencv-python-headless==$opencv"
fi

"$venv/bin/python" -m condattn.stack
"$venv/bin/python" -c 'import mmcv.ops, mmdet, mmseg' || {
    echo "error: $venv cannot import mmcv's operators. If they were compiled against another torch, compile them anew:" \
        "requirements/operators.sh $venv; or start with another folder" >&2
    exit 1
}
