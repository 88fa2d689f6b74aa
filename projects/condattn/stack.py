"""The supported sets of packages, which must not be mixed in one environment."""

from importlib import metadata

DEFAULT_STACK = ("onedl-mmengine", "onedl-mmcv", "onedl-mmdetection", "onedl-mmsegmentation", "onedl-mmpretrain")
STOCK_STACK = ("mmengine", "mmcv", "mmdet", "mmsegmentation", "mmpretrain")


def check_stack() -> None:
    """Raise a ``RuntimeError`` if packages of the maintained forks and of the stock releases are mixed.

    Both provide the modules ``mmengine``, ``mmcv``, ``mmdet``, ``mmseg`` and ``mmpretrain`` and overwrite each other's
    files, so imports then fail in confusing ways.
    """
    forks, stock = (_installed(names) for names in (DEFAULT_STACK, STOCK_STACK))
    if forks and stock:
        raise RuntimeError(
            f"this environment mixes two stacks: {', '.join(forks)} and {', '.join(stock)} install the same modules; "
            f"start from a fresh environment, or uninstall both sets and install one of them again"
        )


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
