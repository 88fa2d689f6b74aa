"""Register everything with OpenMMLab: ``custom_imports = dict(imports=['condattn.registry'])`` in a config.

Modules that need an optional library are registered only if that library is installed.
"""

from importlib import import_module
from importlib.util import find_spec

from .stack import check_stack

MODULES = (
    *("openmmlab.models.factory", "openmmlab.models.pyramid", "openmmlab.datasets.idx_images", "openmmlab.warm_up"),
    *("openmmlab.hooks.progress", "openmmlab.hooks.conditioning_guard", "openmmlab.hooks.calibration"),
    *("openmmlab.hooks.atomic_checkpoint", "openmmlab.hooks.exact_resume", "openmmlab.hooks.finite_loss"),
    *("openmmlab.hooks.schedule", "openmmlab.hooks.spectra", "openmmlab.hooks.empty_evaluation"),
    *("openmmlab.hooks.drawn_classes", "openmmlab.runner.sharding"),
)
LIBRARY_MODULES = {
    "timm": ("openmmlab.models.timm",),
    "mmdet": ("openmmlab.models.mmdet", "openmmlab.datasets.mmdet"),
    "mmseg": ("openmmlab.models.mmseg", "openmmlab.datasets.mmseg"),
}

check_stack()
for name in MODULES:
    import_module(f"condattn.{name}")
for library, names in LIBRARY_MODULES.items():
    if find_spec(library):
        for name in names:
            import_module(f"condattn.{name}")
