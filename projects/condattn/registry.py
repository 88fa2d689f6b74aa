"""Register everything with OpenMMLab: ``custom_imports = dict(imports=['condattn.registry'])`` in a config.

What needs a toolbox is registered where that toolbox is installed.
"""

from importlib import import_module
from importlib.util import find_spec

from .stack import check_stack

MODULES = ("models.factory", "engine.progress")
TOOLBOX_MODULES = {
    "mmdet": ("models.mmdet", "engine.datasets_mmdet"),
    "mmseg": ("models.mmseg", "engine.datasets_mmseg"),
}

check_stack()
for name in MODULES:
    import_module(f"condattn.{name}")
for toolbox, names in TOOLBOX_MODULES.items():
    if find_spec(toolbox):
        for name in names:
            import_module(f"condattn.{name}")
