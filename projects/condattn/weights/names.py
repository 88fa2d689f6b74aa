"""The names of weights in the releases of Swin, ViT, XCiT and DaViT, and the conversion between naming schemes.

Each family has one common naming scheme, that of its own release or of timm. A :class:`Format` is a list of rules that
map another naming scheme to it. Names in rules are templates: ``{i}`` stands for a number, ``{i+1}`` for the number
after it, ``{p}`` for one part of a name, ``{rest}`` for everything to the end of the name.

Sources of the naming schemes: the state dicts of timm 1.0, mmdet 3, mmseg 1 and mmpretrain 1; the releases of
microsoft/Swin-Transformer, facebookresearch/xcit and dingmyu/davit as timm's and mmdet's own converters read them.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


def _same(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Corresponding names: ``theirs`` in a format, and ``common`` in the common naming scheme of the family.

    Attributes:
        theirs: One or more templates.
        common: One or more templates.
        to_common: Converts the tensors of ``theirs`` to those of ``common``.
        from_common: The inverse.
    """

    theirs: tuple[str, ...]
    common: tuple[str, ...]
    to_common: Callable[[Tensors], Tensors] = _same
    from_common: Callable[[Tensors], Tensors] = _same


@dataclass(frozen=True)
class Format:
    """One naming scheme of a family.

    Attributes:
        family: 'Swin', 'ViT', 'XCiT' or 'DaViT'.
        names: Libraries or releases that use it, for instance ``('mmdet', 'mmseg')``.
        rules: The rules, in the order in which they are tried.
        marks: Templates that each match at least one name in weights of this format.
        strangers: Templates that match no name in weights of this format.
        prefix: Prefix of all names in the files of its users.
    """

    family: str
    names: tuple[str, ...]
    rules: tuple[Rule, ...]
    marks: tuple[str, ...]
    strangers: tuple[str, ...] = ()
    prefix: str = ""

    def __str__(self) -> str:
        return f"{self.family} of {' and '.join(self.names)}"

    def describes(self, keys: Iterable[str]) -> bool:
        """Return whether weights with these names are in this format."""
        keys = list(keys)
        has = [any(_pattern(template).fullmatch(key) for key in keys) for template in self.marks + self.strangers]
        return all(has[: len(self.marks)]) and not any(has[len(self.marks) :])


def recognize(keys: Iterable[str]) -> Format | None:
    """Return the format of weights with these names, or None."""
    keys = list(keys)
    return next((format for format in FORMATS if format.describes(keys)), None)


def translate(weights: Mapping[str, Tensor], source: Format, target: Format) -> tuple[dict[str, Tensor], list[str]]:
    """Convert weights from one format to another format of the same family.

    Returns:
        The weights, and the names that have no counterpart in the other format (classifiers, decoders, and buffers that
        a model computes itself).
    """
    if source == target:
        return dict(weights), []
    common, left_out = _apply(weights, source.rules, forward=True)
    translated, rest = _apply(common, target.rules, forward=False)
    if rest:
        back, _ = _apply({name: common[name] for name in rest}, source.rules, forward=False)
        left_out += back
    return translated, left_out


def _apply(
    weights: Mapping[str, Tensor], rules: tuple[Rule, ...], forward: bool
) -> tuple[dict[str, Tensor], list[str]]:
    renamed, left_out, done = {}, [], set()
    for name in weights:
        if name in done:
            continue
        for rule in rules:
            before, after = (rule.theirs, rule.common) if forward else (rule.common, rule.theirs)
            found = next((match for template in before if (match := _pattern(template).fullmatch(name))), None)
            if not found:
                continue
            names = [_render(template, found) for template in before]
            if all(member in weights for member in names):
                change = rule.to_common if forward else rule.from_common
                tensors = change(tuple(weights[member] for member in names))
                renamed |= zip((_render(template, found) for template in after), tensors, strict=True)
                done |= set(names)
                break
        else:
            left_out.append(name)
    return renamed, left_out


_FIELD = re.compile(r"\{(\w+?)([+-]\d+)?\}")
_PARTS = {"p": r"[a-z_]+", "rest": r".+"}


@cache
def _pattern(template: str) -> re.Pattern:
    """Return a regular expression with a group for each field; that of ``{i+1}`` matches the number in the name."""
    pieces = _FIELD.split(template)
    pattern = re.escape(pieces[0])
    for name, offset, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
        group = name if not offset else f"{name}_{'plus' if offset[0] == '+' else 'minus'}_{offset[1:]}"
        pattern += f"(?P<{group}>{_PARTS.get(name, r'[0-9]+')}){re.escape(text)}"
    return re.compile(pattern)


def _render(template: str, found: re.Match) -> str:
    values: dict[str, str] = {}
    for group, value in found.groupdict().items():
        name, *offset = group.split("_")
        sign = {"plus": -1, "minus": 1}
        values[name] = str(int(value) + sign[offset[0]] * int(offset[1])) if offset else value

    def fill(field: re.Match) -> str:
        name, offset = field.groups()
        return str(int(values[name]) + int(offset)) if offset else values[name]

    return _FIELD.sub(fill, template)


def same(*templates: str) -> tuple[Rule, ...]:
    """Return rules for names that are the same in the common naming scheme."""
    return tuple(Rule((template,), (template,)) for template in templates)


def renamed(pairs: Mapping[str, str]) -> tuple[Rule, ...]:
    """Return rules for tensors that differ only in their names."""
    return tuple(Rule((theirs,), (common,)) for theirs, common in pairs.items())


def _official_order(tensors: Tensors) -> Tensors:
    """Reorder patch merging's neighbours from ``nn.Unfold`` (channel by channel, rows first) to Swin's own order."""
    return tuple(t.unflatten(-1, (-1, 2, 2)).transpose(-1, -2).movedim(-3, -1).flatten(-3) for t in tensors)


def _unfold_order(tensors: Tensors) -> Tensors:
    """Apply the inverse of :func:`_official_order`."""
    return tuple(t.unflatten(-1, (2, 2, -1)).movedim(-1, -3).transpose(-1, -2).flatten(-3) for t in tensors)


def _split(tensors: Tensors) -> Tensors:
    return tensors[0].chunk(3)


def _join(tensors: Tensors) -> Tensors:
    return (torch.cat(tensors),)


TABLE = "layers.{i}.blocks.{j}.attn.relative_position_bias_table"
FEED_FORWARD = {"ffn.layers.0.0.{p}": "mlp.fc1.{p}", "ffn.layers.1.{p}": "mlp.fc2.{p}"}
SWIN = same("patch_embed.{rest}", "absolute_pos_embed", "layers.{i}.blocks.{rest}", "norm.{p}")
MERGING = ("layers.{i}.downsample.reduction.weight", "layers.{i}.downsample.norm.{p}")

FORMATS = (
    Format(
        "Swin",
        ("official",),
        (*SWIN, *same(*MERGING, "head.{p}")),
        marks=(TABLE, "layers.0.downsample.reduction.weight"),
    ),
    Format(
        "Swin",
        ("timm",),
        (
            *SWIN,
            *renamed({"layers.{i+1}.downsample.{rest}": "layers.{i}.downsample.{rest}", "head.fc.{p}": "head.{p}"}),
        ),
        marks=(TABLE,),
        strangers=("layers.0.downsample.reduction.weight",),
    ),
    Format(
        "Swin",
        ("mmdet", "mmseg", "mmpretrain"),
        (
            *renamed(
                {
                    "patch_embed.projection.{p}": "patch_embed.proj.{p}",
                    "patch_embed.norm.{p}": "patch_embed.norm.{p}",
                    "absolute_pos_embed": "absolute_pos_embed",
                    "stages.{i}.blocks.{j}.norm{n}.{p}": "layers.{i}.blocks.{j}.norm{n}.{p}",
                    "stages.{i}.blocks.{j}.attn.w_msa.{rest}": "layers.{i}.blocks.{j}.attn.{rest}",
                    "stages.{i}.blocks.{j}.ffn.layers.0.0.{p}": "layers.{i}.blocks.{j}.mlp.fc1.{p}",
                    "stages.{i}.blocks.{j}.ffn.layers.1.{p}": "layers.{i}.blocks.{j}.mlp.fc2.{p}",
                }
            ),
            *(Rule((name.replace("layers", "stages"),), (name,), _official_order, _unfold_order) for name in MERGING),
        ),
        marks=("stages.{i}.blocks.{j}.attn.w_msa.relative_position_bias_table",),
        prefix="backbone.",
    ),
    Format(
        "XCiT",
        ("timm",),
        same(
            *("cls_token", "patch_embed.{rest}", "pos_embed.{rest}", "blocks.{rest}", "cls_attn_blocks.{rest}"),
            *("norm.{p}", "head.{p}"),
        ),
        marks=("blocks.{i}.local_mp.conv1.weight",),
        strangers=("pos_embeder.{rest}", "cls_attn_blocks.{i}.attn.qkv.weight"),
    ),
    Format(
        "XCiT",
        ("official",),
        (
            *renamed({"pos_embeder.{rest}": "pos_embed.{rest}"}),
            Rule(
                ("cls_attn_blocks.{i}.attn.qkv.{p}",),
                tuple(f"cls_attn_blocks.{{i}}.attn.{name}.{{p}}" for name in "qkv"),
                _split,
                _join,
            ),
            *same("cls_token", "patch_embed.{rest}", "blocks.{rest}", "cls_attn_blocks.{rest}", "norm.{p}", "head.{p}"),
        ),
        marks=("blocks.{i}.local_mp.conv1.weight",),
    ),
    Format(
        "XCiT",
        ("mmpretrain",),
        renamed(
            {
                "cls_token": "cls_token",
                **{
                    f"patch_embed.proj.{i}.{layer}.{{p}}": f"patch_embed.proj.{2 * i}.{place}.{{p}}"
                    for i in range(4)
                    for place, layer in enumerate(("conv", "bn"))
                },
                "pos_embed.token_projection.conv.{p}": "pos_embed.token_projection.{p}",
                "xca_layers.{i}.local_mp.conv{n}.conv.{p}": "blocks.{i}.local_mp.conv{n}.{p}",
                "xca_layers.{i}.local_mp.conv1.bn.{p}": "blocks.{i}.local_mp.bn.{p}",
                **{
                    f"{theirs}.{{i}}.{part}": f"{common}.{{i}}.{place}"
                    for theirs, common in (("xca_layers", "blocks"), ("ca_layers", "cls_attn_blocks"))
                    for part, place in {
                        "gamma{n}": "gamma{n}",
                        "norm{n}.{p}": "norm{n}.{p}",
                        **FEED_FORWARD,
                    }.items()
                },
                "xca_layers.{i}.attn.{rest}": "blocks.{i}.attn.{rest}",
                **{
                    f"ca_layers.{{i}}.attn.{name}.{{p}}": f"cls_attn_blocks.{{i}}.attn.{name}.{{p}}"
                    for name in ("q", "k", "v", "proj")
                },
                "norm.{p}": "norm.{p}",
            }
        ),
        marks=("xca_layers.{i}.local_mp.conv1.conv.weight",),
        prefix="backbone.",
    ),
    Format(
        "DaViT",
        ("timm",),
        same("stem.{rest}", "stages.{i}.downsample.{rest}", "stages.{i}.blocks.{rest}", "head.norm.{p}", "head.fc.{p}"),
        marks=("stages.{i}.blocks.{j}.{k}.cpe1.proj.weight",),
    ),
    Format(
        "DaViT",
        ("official",),
        renamed(
            {
                "patch_embeds.0.proj.{p}": "stem.conv.{p}",
                "patch_embeds.0.norm.{p}": "stem.norm.{p}",
                "patch_embeds.{i}.proj.{p}": "stages.{i}.downsample.conv.{p}",
                "patch_embeds.{i}.norm.{p}": "stages.{i}.downsample.norm.{p}",
                "main_blocks.{i}.{j}.{k}.cpe.0.{rest}": "stages.{i}.blocks.{j}.{k}.cpe1.{rest}",
                "main_blocks.{i}.{j}.{k}.cpe.1.{rest}": "stages.{i}.blocks.{j}.{k}.cpe2.{rest}",
                "main_blocks.{i}.{rest}": "stages.{i}.blocks.{rest}",
                "norms.{p}": "head.norm.{p}",
                "head.{p}": "head.fc.{p}",
            }
        ),
        marks=("main_blocks.{i}.{j}.{k}.cpe.0.proj.weight",),
    ),
    Format(
        "DaViT",
        ("mmpretrain",),
        renamed(
            {
                "patch_embed.projection.{p}": "stem.conv.{p}",
                "patch_embed.norm.{p}": "stem.norm.{p}",
                "stages.{i}.downsample.projection.{p}": "stages.{i+1}.downsample.conv.{p}",
                "stages.{i}.downsample.norm.{p}": "stages.{i+1}.downsample.norm.{p}",
                "stages.{i}.blocks.{j}.spatial_block.attn.w_msa.{rest}": "stages.{i}.blocks.{j}.0.attn.{rest}",
                "stages.{i}.blocks.{j}.channel_block.attn.{rest}": "stages.{i}.blocks.{j}.1.attn.{rest}",
                **{
                    f"stages.{{i}}.blocks.{{j}}.{block}.{part}": f"stages.{{i}}.blocks.{{j}}.{k}.{place}"
                    for k, block in enumerate(("spatial_block", "channel_block"))
                    for part, place in {
                        "cpe{n}.{rest}": "cpe{n}.{rest}",
                        "norm{n}.{p}": "norm{n}.{p}",
                        **FEED_FORWARD,
                    }.items()
                },
            }
        ),
        marks=("stages.{i}.blocks.{j}.spatial_block.cpe1.proj.weight",),
        prefix="backbone.",
    ),
    Format(
        "ViT",
        ("timm", "official"),
        same(
            *("cls_token", "dist_token", "pos_embed", "patch_embed.proj.{p}", "blocks.{i}.norm{n}.{p}"),
            *("blocks.{i}.attn.qkv.{p}", "blocks.{i}.attn.proj.{p}", "blocks.{i}.mlp.fc{n}.{p}", "norm.{p}"),
        ),
        marks=("blocks.{i}.attn.qkv.weight", "pos_embed", "patch_embed.proj.weight"),
    ),
    *(
        Format(
            "ViT",
            (name,),
            renamed(
                {
                    **{token: token for token in ("cls_token", "dist_token", "pos_embed")},
                    "patch_embed.projection.{p}": "patch_embed.proj.{p}",
                    "layers.{i}.ln{n}.{p}": "blocks.{i}.norm{n}.{p}",
                    **attention,
                    "layers.{i}.ffn.layers.0.0.{p}": "blocks.{i}.mlp.fc1.{p}",
                    "layers.{i}.ffn.layers.1.{p}": "blocks.{i}.mlp.fc2.{p}",
                    "ln1.{p}": "norm.{p}",
                }
            ),
            marks=(next(iter(attention)).replace("{p}", "weight"), "pos_embed", "patch_embed.projection.weight"),
        )
        for name, attention in {
            "mmseg": {
                "layers.{i}.attn.attn.in_proj_{p}": "blocks.{i}.attn.qkv.{p}",
                "layers.{i}.attn.attn.out_proj.{p}": "blocks.{i}.attn.proj.{p}",
            },
            "mmpretrain": {
                "layers.{i}.attn.qkv.{p}": "blocks.{i}.attn.qkv.{p}",
                "layers.{i}.attn.proj.{p}": "blocks.{i}.attn.proj.{p}",
            },
        }.items()
    ),
)
"""All formats; if several describe some weights, the first one is used."""
