"""The pages of docs/: links lead somewhere, tools accept commands, configs build, figures are those of the tables."""

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from runs import CONFIGS, DEMO, ROOT

import condattn

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
OWN_FILES = {"configs/own_data/mine.py": "coco.py", "configs/own_data/maps.py": "png_labels.py"}
"""Files that the reader copies -> the template."""
COMMAND = re.compile(r"^(?:    )?((?:[A-Z_]+=\S+ )*(?:python|bash|make|pip|cp) .*)$", re.MULTILINE)


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)


def commands():
    """Commands of blocks, and those in the text that name a tool; without comments and outlines of usage."""
    for page, text in {**PAGES, "README.md": (ROOT / "README.md").read_text()}.items():
        for command in [*COMMAND.findall(text), *re.findall(r"`((?:python|bash) (?:tools|docs)/[^`]*)`", text)]:
            if "[" not in command.split("--cfg-options")[0] and ">" not in command:
                yield pytest.param(command, id=f"{page}: {command[:60]}")


@functools.cache
def parsers():
    spec = importlib.util.spec_from_file_location("make_tools", DOCS / "make_tools.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def parser_of(tool):
    return parsers().parser_of(ROOT / tool)


def check_tool(tool, *arguments):
    """The parser of a tool accepts the arguments; configs and studies among them exist."""
    parser = parser_of(tool)
    if arguments in ((), ("--help",)):
        return
    parser.parse_args(arguments)
    for argument in arguments:
        if argument.startswith("configs/") and "NAME" not in argument:
            assert (ROOT / argument).exists() or argument in OWN_FILES, argument


def test_the_commands_are_found():
    """The expressions above find the commands of the README and of most pages."""
    pages = [parameter.id.partition(":")[0] for parameter in commands()]
    assert len(pages) > 60 and len(set(pages)) > 10 and pages.count("README.md") > 10


@pytest.mark.parametrize("command", commands())
def test_commands(command, tmp_path):
    words = shlex.split(command, comments=True)
    variables = [word for word in words if re.match("[A-Z_]+=", word)]
    program, *arguments = words[len(variables) :]
    if program == "python" and arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1])
    elif program == "python" and arguments[0].startswith("tools/"):
        pytest.importorskip("mmdet")
        check_tool(*arguments)
    elif program == "python":
        assert (ROOT / arguments[0]).exists()
    elif program == "bash":
        pytest.importorskip("mmdet")
        # The scripts end with a call of Python, by srun on a cluster; both are replaced by echo.
        (tmp_path / "srun").symlink_to(shutil.which("echo"))
        environment = {**os.environ, "PYTHON": "echo", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        environment |= dict(variable.split("=", 1) for variable in variables)
        run = subprocess.run(["bash", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        check_tool(*re.search(r"tools/(?:train|test)\.py.*", run.stdout)[0].split())
    elif program == "make":
        for target in arguments:
            assert "=" in target or re.search(rf"^{target}\b.*:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "cp":
        assert (ROOT / arguments[0]).name == OWN_FILES[arguments[1]]
    else:
        assert program == "pip" and arguments[0] in ("install", "uninstall")


def test_the_page_of_the_tools_is_up_to_date():
    pytest.importorskip("mmdet")
    assert parsers().page() + "\n" == PAGES["tools.md"], "run python docs/make_tools.py"


def markdown():
    """The Markdown files of the repository."""
    folders = [ROOT / name for name in ("docs", "configs", "projects", "results")]
    found = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def anchors(path):
    """Anchors of the headings of a file, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", markdown())
def test_links_lead_somewhere(file):
    """To files that exist, and to headings in them."""
    path = ROOT / file
    for link in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", path.read_text()):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_in_the_navigation():
    def names(entry):
        parts = entry.values() if isinstance(entry, dict) else entry
        return [entry] if isinstance(entry, str) else [name for part in parts for name in names(part)]

    assert sorted(names(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == sorted(PAGES)


def test_the_reference_has_every_public_name():
    listed = {name.split(".")[-1] for name in re.findall(r"^::: (.*)$", PAGES["api.md"], re.MULTILINE)}
    public = {*condattn.__all__, *condattn.methods.__all__, *condattn.spectra.__all__} - {"methods", "QUANTITIES"}
    assert public <= listed


def test_what_the_reference_names_exists():
    pytest.importorskip("mmdet")
    pytest.importorskip("timm")
    for name in re.findall(r"^::: (.*)$", PAGES["api.md"], re.MULTILINE):
        module, _, member = name.rpartition(".")
        assert hasattr(importlib.import_module(module), member), name


def test_the_figures_of_the_performance_page():
    """Each row of the table has the ratios of 'pc' in the table that it links to, and the command that made it."""
    pattern = r"^\| (.*) \| ([\d.]+) \| ([\d.]+) \| .*benchmark/(?!ct)([\w/]+).txt\) \| (.*) \|$"
    rows = re.findall(pattern, PAGES["performance.md"], re.MULTILINE)
    assert len(rows) == 12
    for what, time, memory, name, command in rows:
        text = (ROOT / "results" / "benchmark" / f"{name}.txt").read_text()
        size = re.search(r"\d+ x \d+", what)
        part = text[text.index(f"\n{size[0]}\n") :] if size else text
        columns = re.search(r"^pc .*$", part, re.MULTILINE)[0].split()
        assert (time, memory) == (columns[3], columns[7]), what
        if command != "the same":
            assert command.strip("`") in text.splitlines()[0]
            pytest.importorskip("mmdet")
            check_tool("tools/analysis/benchmark.py", *shlex.split(command.strip("`")))


def test_the_figures_of_conditioned_tokens():
    """Each row has the ratios of both forms in the table that it links to, and the command that made it."""
    pattern = r"^\| (.*) \| ([\d.]+) \| ([\d.]+) \| .*benchmark/(ct\w*).txt\) \| `(.*)` \|$"
    rows = re.findall(pattern, PAGES["performance.md"], re.MULTILINE)
    assert len(rows) == 3
    for what, *ratios, name, command in rows:
        first, *lines = (ROOT / "results" / "benchmark" / f"{name}.txt").read_text().splitlines()
        assert first.endswith(f"benchmark.py {command}") and re.search(r"\d+ x \d+", what)[0] in lines
        assert ratios == [line.split()[3] for line in lines if line.startswith("ct")], what


def load(text, folder):
    from mmengine.config import Config

    (folder / "config.py").write_text(text)
    return Config.fromfile(folder / "config.py")


def build(cfg, scope):
    from mmengine.registry import MODELS, DefaultScope

    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(cfg)


def test_the_configs_of_the_page_on_openmmlab(tmp_path):
    pytest.importorskip("mmdet")
    whole, change = blocks("getting_started/openmmlab.md")
    assert (CONFIGS / "mask_rcnn_swin_pc.py").read_text().endswith(whole)
    model = build(load(whole + change, tmp_path).model.backbone | dict(init_cfg=None), "mmdet")
    assert {one["type"] for (one,) in condattn.conditioning_of(model).values()} == {"SpectralCorrection"}


@pytest.mark.parametrize("index, template", enumerate(OWN_FILES.values()))
def test_the_configs_of_the_page_on_own_data(index, template):
    """What the page shows are lines of the template's first block."""
    pytest.importorskip("mmdet")
    text = blocks("getting_started/own_data.md")[index]
    found, template = {}, (CONFIGS / "own_data" / template).read_text()
    exec(text, found)
    first = {}
    exec(template[: template.index("# -----")], first)
    names = [name for name in found if name != "__builtins__"]
    assert len(names) >= 6
    assert {name: found[name] for name in names} == {name: first[name] for name in names}


def test_inference_with_the_toolboxes_of_the_page_on_own_data(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mmdet")
    import torch
    from mmengine.config import Config
    from PIL import Image

    cfg = Config.fromfile(DEMO / "mask_rcnn_swin_pc.py")
    text = blocks("getting_started/own_data.md")[2]
    config, checkpoint = re.search(r'config, checkpoint = "(.*)", "(.*)"', text).groups()
    # mmdet builds the data set, without reading it, for its colours; the demo's would write its images.
    cfg.test_dataloader.dataset = dict(type="CocoDataset", pipeline=cfg.test_dataloader.dataset.pipeline)
    monkeypatch.chdir(tmp_path)
    for path in (config, checkpoint):
        Path(path).parent.mkdir(parents=True)
    cfg.dump(config)
    model = build(cfg.model, "mmdet")
    torch.nn.init.constant_(model.roi_head.bbox_head.fc_cls.bias[-1:], 10.0)  # an untrained model sees background alone
    meta = dict(dataset_meta=dict(classes=[str(i) for i in range(10)]))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    Image.new("RGB", (96, 96)).save("photograph.jpg")
    exec(text, {})
    assert re.fullmatch(r"\d+ instances", capsys.readouterr().out.splitlines()[-1])


def test_the_configs_of_the_page_on_configs(tmp_path):
    pytest.importorskip("mmdet")
    pytest.importorskip("timm")
    backbone, whole, pyramid = blocks("configs.md")
    base = f"_base_ = {str(CONFIGS / 'mask_rcnn_swin_pc.py')!r}\n"
    model = build(load(base + backbone, tmp_path).model.backbone | dict(init_cfg=None), "mmdet")
    assert {len(methods) for methods in condattn.conditioning_of(model).values()} == {2}
    model = build(load(base + whole, tmp_path).model.backbone, "mmdet")
    assert {name.split(".")[1] for name, methods in condattn.conditioning_of(model).items() if methods} == set("123")
    cfg = load(base + pyramid, tmp_path).model
    build(cfg.backbone | dict(pretrained=False), "mmdet")
    build(cfg.neck, "mmdet")


def test_the_configs_of_the_other_pages(tmp_path):
    pytest.importorskip("mmdet")
    from mmengine.registry import HOOKS

    hook = load(blocks("measuring.md")[-1], tmp_path).custom_hooks[0]
    assert HOOKS.build(hook).__class__.__name__ == "SpectraHook"
    cfg = load(blocks("multi_gpu.md")[0], tmp_path)
    sharded = (CONFIGS / "mask_rcnn_swin-b_pc_3x_fsdp2.py").read_text()
    assert all(line in sharded for line in cfg.text.strip().splitlines()[-2:])


def test_python_of_the_other_pages_is_covered():
    """Every page with Python is run here or in test_guides.py."""
    from test_guides import GUIDES

    here = {"getting_started/openmmlab.md", "getting_started/own_data.md", "configs.md", "multi_gpu.md"}
    assert {page for page in PAGES if blocks(page)} == {*GUIDES, *here}
