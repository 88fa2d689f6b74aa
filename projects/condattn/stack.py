"""Check that the installed packages are one of the supported sets, and describe which operators mmcv uses.

``python -m condattn.stack`` checks this environment and prints the packages in it.
"""

from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from importlib.util import find_spec

DEFAULT_STACK = ("onedl-mmengine", "onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation", "onedl-mmpretrain")
STOCK_STACK = ("mmengine", "mmcv", "mmcv-lite", "mmdet", "mmsegmentation", "mmpretrain")
OPERATORS = "condattn-mmcv-ext"
"""Name of the distribution that is built from projects/mmcv_ext."""


def check_stack() -> None:
    """Raise a ``RuntimeError`` if installed packages exclude each other.

    The maintained forks and the stock releases both provide the modules ``mmengine``, ``mmcv``, ``mmdet``, ``mmseg``
    and ``mmpretrain``. Among the stock releases, mmcv and mmcv-lite provide the same module. Such packages overwrite
    each other's files, and imports then fail in confusing ways. Imports also fail if condattn's operators remain after
    mmcv was uninstalled, because Python then takes their folder for a package.
    """
    forks, stock = (_installed(names) for names in (DEFAULT_STACK, STOCK_STACK))
    if forks and stock:
        raise RuntimeError(
            f"this environment mixes two stacks: {', '.join(forks)} and {', '.join(stock)} install the same modules; "
            f"start from a fresh environment, or uninstall both sets and install one of them again"
        )
    mmcv = _installed(("onedl-mmcv", "mmcv", "mmcv-lite"))
    if len(mmcv) > 1:
        raise RuntimeError(
            f"this environment has {' and '.join(mmcv)}, which install the same modules; uninstall both and install "
            "one of them again"
        )
    if not mmcv and _installed((OPERATORS,)):
        raise RuntimeError(
            f"{OPERATORS} is left in this environment without an mmcv, and makes Python find an empty mmcv; remove it "
            f"(pip uninstall {OPERATORS}), or install mmcv again"
        )


def describe_operators() -> str:
    """Describe which operators mmcv uses here: compiled ones, condattn's on torchvision, or none."""
    package = find_spec("mmcv")
    if package is None or package.origin is None:
        return "no mmcv"
    extension = PathFinder.find_spec("mmcv._ext", package.submodule_search_locations)
    if extension is None:
        return "none: install projects/mmcv_ext for those of condattn on torchvision, or compile them (make operators)"
    if extension.origin.endswith(tuple(EXTENSION_SUFFIXES)):
        return "compiled"
    return f"condattn's, on torchvision {metadata.version('torchvision')}"


def _installed(names: tuple[str, ...]) -> list[str]:
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    try:
        check_stack()
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from None
    print(", ".join(_installed(("torch", "torchvision", *DEFAULT_STACK, *STOCK_STACK))))
    print(f"mmcv's operators: {describe_operators()}")
