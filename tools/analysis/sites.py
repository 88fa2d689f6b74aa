"""Print the attention sites of a model, and which methods can condition each of them."""

import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import condattn
from condattn.attention.rules import describe_unsupported, find_sites, find_unsupported
from condattn.attention.site import AttentionSite, HeadOutputs, Projection
from condattn.methods.base import registered_methods
from condattn.openmmlab.config_files import is_config
from condattn.openmmlab.errors import UserError, run_tool


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "model",
        help="a configuration file; a model name of timm (vit_base_patch16_224); or a class of "
        "Hugging Face transformers (ViTModel), in its default size",
    )
    return parser.parse_args()


def main() -> None:
    """Print the table of attention sites, and the attention modules that have no site."""
    name = parse_args().model
    model = build(name)
    sites, unsupported = find_sites(model), find_unsupported(model)
    if not sites:
        reasons = f"; {describe_unsupported(unsupported)}" if unsupported else ""
        raise UserError(f"{name} has no attention site that condattn knows{reasons}")
    console = Console()
    # Without a terminal, rich would fold the lines at its narrow default width.
    console = console if console.is_terminal else Console(width=200)
    console.print(table_of(name, sites))
    for line in elsewhere(model, sites):
        console.print(line, markup=False)
    if unsupported:
        console.print(f"Without a site: {describe_unsupported(unsupported)}", markup=False)


def build(name: str) -> nn.Module:
    """Build the model that ``name`` refers to, on the meta device where possible.

    Raises:
        UserError: If there is no such configuration, model or class.
    """
    if is_config(name):
        from condattn.openmmlab.runner.launch import build_model, load_config

        return build_model(load_config(name))
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _timm(name) or _transformers(name) or _refuse(name)


def _timm(name: str) -> nn.Module | None:
    try:
        import timm
    except ImportError:
        return None
    return timm.create_model(name) if timm.is_model(name) else None


def _transformers(name: str) -> nn.Module | None:
    try:
        import transformers
    except ImportError:
        return None
    cls = getattr(transformers, name, None)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        return None
    try:
        config = cls.config_class()
        if getattr(config, "use_pretrained_backbone", False):
            config.use_pretrained_backbone = False
        return cls(config)
    except Exception as error:  # a class without a default size may raise anything
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{name} of transformers has no default size ({type(error).__name__}: {reason}); expected a class that can "
            "be built from its default configuration, such as ViTModel"
        ) from error


def _refuse(name: str) -> nn.Module:
    hint = "expected a configuration file (.py), a model name of timm, or a class of transformers"
    if Path(name).exists():
        raise UserError(f"{name} is no configuration file; {hint}")
    raise UserError(f"no model {name}; {hint}, with that library installed")


def table_of(title: str, sites: list[AttentionSite]) -> Table:
    """Make a table with one row for each site."""
    table = Table(title=f"{title}: {len(sites)} attention sites", title_justify="left")
    for column in (
        "name",
        "class",
        "heads",
        "q",
        "k",
        "v",
        "out",
        *(cls.alias.upper() for cls in registered_methods() if cls.acts_at_sites()),
    ):
        table.add_column(column, overflow="fold")
    for site in sites:
        maps = [shape_of(projection) for projection in (site.q, site.k, site.v)]
        abilities = [ability(cls(), site) for cls in registered_methods() if cls.acts_at_sites()]
        cls = type(site.module).__name__
        table.add_row(site.name or "(itself)", cls, str(site.num_heads), *maps, shape_of_output(site.out), *abilities)
    return table


def elsewhere(model: nn.Module, sites: list[AttentionSite]) -> list[str]:
    """What each method that does not act at attention sites conditions instead, or the reason why it cannot."""
    lines = []
    for method in (cls() for cls in registered_methods() if not cls.acts_at_sites()):
        try:
            places = method.places(model, sites)
            for place in places:
                method.check(place)
            text = f"the input of {', '.join(place.name or 'the model' for place in places)}"
        except ValueError as error:
            text = str(error)
        lines.append(f"{method.alias.upper()}: {text}")
    return lines


def shape_of(projection: Projection | None) -> str:
    """Rows and columns of a projection's weight, as text."""
    return "-" if projection is None else " x ".join(map(str, projection.weight.shape))


def shape_of_output(out: HeadOutputs | None) -> str:
    """Rows and columns of the output projection, or the class of the module that receives the head outputs."""
    weight = getattr(out and out.projection, "weight", None)
    if weight is None or weight.ndim < 2:
        return "-" if out is None else type(out.owner).__name__
    return " x ".join(map(str, weight.flatten(1).shape))


def ability(method: condattn.Method, site: AttentionSite) -> str:
    """The parts of ``site`` that ``method`` conditions, or the reason why it cannot."""
    try:
        method.check(site)
    except ValueError as error:
        return site.obstacle or str(error)
    return method.parts(site)


if __name__ == "__main__":
    run_tool(main)
