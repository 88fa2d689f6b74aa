"""Register everything with OpenMMLab: ``custom_imports = dict(imports=['condattn.registry'])`` in a config.

What needs a library is registered where that library is installed.
"""

from importlib import import_module
from importlib.util import find_spec

from .stack import check_stack

MODULES = (
    *("models.factory", "models.pyramid", "openmmlab.datasets.idx_images"),
    *("engine.progress", "engine.guard", "engine.calibration", "engine.schedule", "engine.warm_up"),
    *("engine.survival", "engine.sharding", "engine.spectra"),
)
LIBRARY_MODULES = {
    "timm": ("models.timm",),
    "mmdet": ("models.mmdet", "engine.datasets_mmdet"),
    "mmseg": ("models.mmseg", "engine.datasets_mmseg"),
}

check_stack()
for name in MODULES:
    import_module(f"condattn.{name}")
for library, names in LIBRARY_MODULES.items():
    if find_spec(library):
        for name in names:
            import_module(f"condattn.{name}")
