"""Write docs/attention.md.

The script builds the models of the test suite, and needs timm, torchvision, mmpretrain and transformers.
"""

import contextlib
import importlib
import os
import sys
import warnings
from pathlib import Path

import torch

import condattn
from condattn import RowPreconditioner, SpectralCorrection
from condattn.attention.classes import qualified_name
from condattn.attention.rules import attending_exceptions, known_exceptions, known_hosts

ZOOS = {"zoo_timm": "NAMES", "zoo_openmmlab": "NAMES", "zoo_torchvision": "MODELS", "zoo_transformers": "MODELS"}
INTRODUCTION = """# Supported attention

The attention classes that `condattn.condition` can change; a subclass counts as its base class. *PC*: whether the head
outputs can be preconditioned. *SC*: the projections that spectral conditioning corrects. *Seen in*: a model in which
the tests compare the class with the unconditioned model. `python tools/analysis/sites.py MODEL` lists
the sites of any model; `condattn.register_rule` teaches another class. Written by `python docs/make_attention.py`,
checked by the tests.
"""


def walk() -> dict[str, tuple[str, str, str]]:
    """Qualified name of each attention class in the test models -> (PC support, SC support, first model with it)."""
    found = {}
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    for zoo, names in ZOOS.items():
        zoo = importlib.import_module(zoo)
        for name in getattr(zoo, names):
            for site in condattn.find_sites(zoo.build(name)[0]):
                found.setdefault(rule_of(type(site.module)), (can_pc(site), can_sc(site), name))
    return found


def rule_of(cls: type) -> str:
    """Qualified name of the class whose rule applies to ``cls``: the class itself or a base class."""
    hosts = set(known_hosts())
    return next(name for base in cls.__mro__ if (name := qualified_name(base)) in hosts)


def can_pc(site) -> str:
    """Table cell: whether ``site`` can be preconditioned."""
    try:
        RowPreconditioner().check(site)
    except ValueError:
        return f"no: {site.obstacle}"
    return "yes"


def can_sc(site) -> str:
    """Table cell: the projections of ``site`` to which spectral correction applies."""
    try:
        SpectralCorrection().check(site)
    except ValueError:
        return f"no: {site.obstacle}"
    return ", ".join(name for name in "qkv" if getattr(site, name) is not None)


def page() -> str:
    """Make the content of the page."""
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        found = walk()
    lines = [INTRODUCTION]
    for library in ("torch", "torchvision", "timm", "mmcv", "mmdet", "mmseg", "mmpretrain", "transformers"):
        lines += [f"## {library}", "", "| class | PC | SC | seen in |", "|---|---|---|---|"]
        for host in known_hosts():
            if host.split(".")[0] == library:
                pc, sc, model = found.get(host, ("", "", f"only in other versions of {library}"))
                lines.append(f"| `{host.removeprefix(library + '.')}` | {pc} | {sc} | {model} |")
        reasons = {n: r for n, r in known_exceptions().items() if n.split(".")[0] == library}
        for text, attends in (
            ("Attention that stays unconditioned, about which `condition` warns:", True),
            ("No attention between tokens, although the name says so; passed over without a warning:", False),
        ):
            chosen = {name: reason for name, reason in reasons.items() if (name in attending_exceptions()) == attends}
            if chosen:
                lines += ["", text, ""]
                lines += [f"- `{name.removeprefix(library + '.')}`: {reason}" for name, reason in chosen.items()]
        lines.append("")
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    Path(__file__).with_name("attention.md").write_text(page() + "\n")
