"""CONTRIBUTING.md: its Python blocks run, and the files, targets and modules that it names exist."""

import copy
import importlib
import pickle
import re
from pathlib import Path

import pytest
import torch
from registrations import registrations_undone
from torch.nn import functional as F

import condattn
from condattn.attention import rules

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
NAME = "my_package.models"


@pytest.fixture
def guide():
    """The names that the Python blocks of the guide define."""
    names = {"__name__": NAME}
    blocks = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    with registrations_undone():
        for block in blocks:
            exec(compile(block, "CONTRIBUTING.md", "exec"), names)
        yield names


def test_the_rule(guide):
    """The rule finds the site of the new class, and the conditioned module computes the formula."""
    model = guide["MyAttention"](8, num_heads=2)
    (site,) = condattn.find_sites(model)
    assert (site.module, site.num_heads, site.out.owner) == (model, 2, model.proj)
    for i, part in enumerate((site.q, site.k, site.v)):
        assert torch.equal(part.weight, model.qkv.weight[8 * i : 8 * (i + 1)])

    x, heads = torch.randn(2, 5, 8), []
    model.proj.register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    model(x)
    rows = heads[0].unflatten(-1, (2, 4))
    want = F.linear((rows / rows.norm(dim=-1, keepdim=True)).flatten(-2), model.proj.weight, model.proj.bias)
    conditioned = copy.deepcopy(model)
    condattn.condition(conditioned, "pc")
    torch.testing.assert_close(conditioned(x), want)
    assert not torch.allclose(model(x), want)


def test_the_method(guide):
    """The method is found by name and alias, checks a site, computes what the guide says, and can be removed."""
    model = guide["MyAttention"](8, num_heads=2)
    x, heads = torch.randn(2, 5, 8), []
    model.proj.register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    before = model(x)
    conditioned = copy.deepcopy(model)
    assert str(condattn.condition(conditioned, dict(type="HeadScale", factor=0.25)).methods[0]) == "scale(factor=0.25)"
    torch.testing.assert_close(conditioned(x), F.linear(heads[0] / 4, model.proj.weight, model.proj.bias))
    with pytest.raises(ValueError, match="HeadScale is applied already"):
        condattn.condition(conditioned, "scale")
    with pytest.raises(ValueError, match="its head outputs are conditioned already, by scale"):
        condattn.condition(conditioned, "pc")
    assert condattn.remove(conditioned) == 1
    assert torch.equal(conditioned(x), before)


def test_the_method_prints_what_its_comment_says(guide):
    want = re.search(r"^print\(condattn.condition\(.*\)  # (.*)$", GUIDE, re.MULTILINE).group(1)
    assert str(condattn.condition(guide["MyAttention"](8, num_heads=2), "scale(factor=0.25)+sc")) == want


def test_registrations_are_undone():
    host = f"{NAME}.MyAttention"
    with registrations_undone():
        condattn.register_rule(host, dict)
        assert host in rules.known_hosts()
    assert host not in rules.known_hosts()
    assert "torch.nn.modules.activation.MultiheadAttention" in rules.known_hosts()


@pytest.mark.parametrize(
    "file",
    ["CONTRIBUTING.md", "docs/architecture.md", *(str(f.relative_to(ROOT)) for f in ROOT.glob(".github/**/*.*"))],
)
def test_what_documents_name_exists(file):
    """Documents name only targets of make, files and folders that exist."""
    text = (ROOT / file).read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|run: |^    )make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"\b(?:projects|tests|configs|docs|tools|requirements|results)/[\w./-]*[\w/]", text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", text):
        assert (ROOT / file).parent.joinpath(link).exists(), link


@pytest.mark.parametrize("file", ["docs/architecture.md", "CHANGELOG.md"])
def test_modules_that_documents_name_exist(file):
    """In the changelog, only the modules of the right column have to exist."""
    text = re.sub(r"^  \|.*?\|", "", (ROOT / file).read_text(), flags=re.MULTILINE)
    names = set(re.findall(r"`(condattn(?:\.\w+)+)`", text))
    assert len(names) > 8
    for name in names:
        path = ROOT / "projects" / name.replace(".", "/")
        module, _, member = name.rpartition(".")
        known = path.is_dir() or path.with_suffix(".py").exists()
        assert known or hasattr(importlib.import_module(module), member), name


def test_what_the_architecture_says_of_parametrizations():
    """Parametrizations rename parameters and prevent pickling; conditioned modules keep names and can be pickled."""

    class Plus(torch.nn.Module):
        def forward(self, weight):
            return weight + torch.eye(len(weight))

    layer = torch.nn.Linear(4, 4)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Plus())
    assert "parametrizations.weight.original" in layer.state_dict()
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(layer)
    model = torch.nn.MultiheadAttention(4, 2)
    names = list(model.state_dict())
    condattn.condition(model, "sc+pc")
    assert list(pickle.loads(pickle.dumps(model)).state_dict()) == names
