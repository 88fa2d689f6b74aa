"""Find where the embedded tokens of a model enter its first block, by rules, one for each class of models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .classes import check_qualified, look_up, qualified_name
from .site import Place

LAYOUTS = ("tokens", "channels_last", "channels_first")
_RULES: dict[str, Callable[[Any], Mapping[str, Any]]] = {}


@dataclass(frozen=True)
class TokenEntry(Place):
    """The first block of a model, whose first argument are the embedded tokens.

    Attributes:
        name: As of :class:`~.site.Place`.
        module: The first block.
        model: Name of the module that the rule is for, in the model that was searched.
        layout: 'tokens' for (batch, tokens, channels), 'channels_last' for (batch, height, width, channels),
            'channels_first' for (batch, channels, height, width).
        mask: Name of the argument of the block (its second, or a keyword) that masks padding tokens; '' if it has none.
            Two axes are (batch, tokens), true or 1 for tokens that take part; those of ``'attn_mask'`` are (queries,
            keys), as in PyTorch's attention. The last two of more axes are (queries, keys); such a mask is boolean, or
            it is what is added to the scores, 0 for tokens that take part.
        obstacle: Why tokens must not be mixed, as the end of a sentence "cannot be conditioned: ..."; '' if they may.
    """

    model: str = ""
    layout: str = "tokens"
    mask: str = ""
    obstacle: str = ""


def register_token_rule(class_name: str, describe: Callable[[Any], Mapping[str, Any]]) -> None:
    """Say where the embedded tokens of a class of models enter the first block.

    Args:
        class_name: Qualified name of the class, for instance ``'timm.models.vision_transformer.VisionTransformer'``.
            Subclasses have the rule as well.
        describe: Takes an instance and returns the fields of its :class:`TokenEntry` but ``name`` and ``model``;
            ``module`` is required.

    Raises:
        ValueError: If the class has a rule already, or is not named by its module and name.
    """
    check_qualified(class_name)
    if class_name in _RULES:
        raise ValueError(f"{class_name} has a rule for its tokens already; register each class once")
    _RULES[class_name] = describe


def find_token_entries(model: nn.Module) -> list[TokenEntry]:
    """The first blocks of all models in ``model`` that a rule describes.

    Raises:
        ValueError: If there is none, or a rule is wrong.
    """
    found: dict[int, TokenEntry] = {}
    names = {id(module): name for name, module in model.named_modules()}
    for module in model.modules():
        if describe := look_up(_RULES, type(module)):
            entry = _entry(module, describe, names)
            found.setdefault(id(entry.module), entry)
    if not found:
        raise ValueError(
            f"no rule says where the embedded tokens of {type(model).__name__} enter its first block; add one, but not "
            "for a causal model, because C mixes all tokens: condattn.register_token_rule('MODULE.CLASS', lambda m: "
            "dict(module=m.blocks[0])), with mask='ARGUMENT' as well if the block gets a mask of padding"
        )
    return list(found.values())


def _entry(model: nn.Module, describe: Callable[[Any], Mapping[str, Any]], names: Mapping[int, str]) -> TokenEntry:
    """Apply a rule to ``model``, and raise a ``ValueError`` that names its class if the rule is wrong."""
    try:
        fields = describe(model)
        block, layout = fields["module"], fields.get("layout", "tokens")
        if id(block) not in names or layout not in LAYOUTS:
            raise TypeError(
                f"expected a module in it, and a layout out of {', '.join(LAYOUTS)}, found a {type(block).__name__} "
                f"and {layout!r}"
            )
        return TokenEntry(name=names[id(block)], model=names[id(model)], **fields)
    except Exception as error:
        raise ValueError(
            f"the rule for the tokens of {qualified_name(type(model))} is wrong: {type(error).__name__}: {error}; "
            "expected a dictionary with module, and possibly layout, mask and obstacle"
        ) from error


def known_token_rules() -> list[str]:
    """Qualified names of the classes that have a rule, sorted."""
    return sorted(_RULES)
