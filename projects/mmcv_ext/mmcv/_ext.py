"""condattn's operators in the place of mmcv's extension; Python prefers a compiled ``_ext`` beside this file."""

try:
    from condattn.openmmlab.mmcv_ops import *  # noqa: F403
    from condattn.openmmlab.mmcv_ops import __getattr__  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        f"mmcv has no compiled operators, and condattn's cannot take their place: {error}; install {error.name}, or "
        "remove what is left of condattn with: pip uninstall condattn-mmcv-ext"
    ) from error
