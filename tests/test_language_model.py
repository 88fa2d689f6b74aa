"""projects/language_model: data, masks, metric, causality, training and resuming, and the commands of its README."""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ROOT, error_lines, first_iteration, forwarded, run

pytest.importorskip("transformers")

from language_model.datasets import ByteSequences
from language_model.metrics import ByteLoss
from language_model.models import ByteModel
from language_model.text import builtin_text, part_of_text, read_text
from language_model.tokens import BEGIN, MASK, UNSCORED, VOCABULARY
from language_model.transforms import MaskedBytes, NextByte
from mmengine.registry import MODELS

from condattn.openmmlab.errors import UserError
from condattn.openmmlab.runner.launch import build_model, load_config
from condattn.openmmlab.study.check import check_study
from condattn.openmmlab.study.plan import load_study

PROJECT = ROOT / "projects" / "language_model"
CONFIGS = sorted((PROJECT / "configs").glob("*.py"))
COMMANDS = re.findall(r"^    ((?:\w+=\S+ )?python tools/.*)$", (PROJECT / "README.md").read_text(), re.MULTILINE)
DECODER = dict(type="GPT2Decoder", n_embd=16, n_layer=2, n_head=2, n_positions=32)
ENCODER = dict(
    type="BertEncoder",
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
)
SHORT = [
    *("train_cfg.max_iters=6", "train_cfg.val_interval=3", "param_scheduler.0.end=2", "param_scheduler.1.T_max=6"),
    *("default_hooks.checkpoint.interval=2", "default_hooks.checkpoint.max_keep_ckpts=-1"),
    "default_hooks.logger.interval=1",
    *(f"{loader}_dataloader.dataset.length=32" for loader in ("train", "val", "test")),
]
SMALL = {
    "gpt2": [f"model.network.module.{name}={DECODER[name]}" for name in ("n_embd", "n_layer", "n_head")],
    "bert": [f"model.network.module.{name}={value}" for name, value in ENCODER.items() if name != "type"],
}


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A text that the configurations read, with every byte but zero."""
    path = tmp_path / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(1, 256, 4003, np.uint8).tobytes())
    monkeypatch.setenv("LANGUAGE_MODEL_TEXT", str(path))
    return path


def build(network, conditioning="none"):
    model = dict(type="ByteModel", network=dict(type="Conditioned", conditioning=conditioning, module=network))
    return MODELS.build(model).eval()


# ---- data


@pytest.mark.parametrize("stride", [32, 8])
def test_parts_are_disjoint_and_the_bytes_of_the_text(text, stride):
    content, seen = text.read_bytes(), {}
    for part in ("train", "validation", "test"):
        dataset = ByteSequences(part, 32, stride, str(text))
        again = ByteSequences(part, 32, stride, str(text))
        seen[part] = set()
        for one, other in zip(dataset, again, strict=True):
            assert one["sample_id"] == other["sample_id"] and np.array_equal(one["tokens"], other["tokens"])
            begin, end = map(int, one["sample_id"].split("-"))
            assert end - begin == 32 and one["tokens"].tobytes() == content[begin:end]
            seen[part] |= set(range(begin, end))
    # 80, 10 and 10 % of 4003 bytes; no more than a rest shorter than a sequence is left out.
    for part, begin, end in (("train", 0, 3202), ("validation", 3202, 3602), ("test", 3602, 4003)):
        assert (min(seen[part]), max(seen[part]) < end) == (begin, True)
        assert end - begin - len(seen[part]) < 32
    assert not seen["train"] & seen["validation"] and not seen["validation"] & seen["test"]


def test_a_limited_number_of_sequences(text):
    whole = ByteSequences("train", 32, path=str(text))
    for limit in (1, 7, len(whole) - 1, len(whole), 1000):
        some = ByteSequences("train", 32, path=str(text), max_sequences=limit)
        steps = {later - earlier for earlier, later in pairwise(some.starts)}
        assert min(limit, len(whole)) / 2 < len(some) <= limit and len(steps) <= 1
        assert set(some.starts) <= set(whole.starts)


def test_parts_of_every_size_meet():
    for size in range(40):
        (a, b), (c, d), (e, f) = (part_of_text(size, part) for part in ("train", "validation", "test"))
        assert (a, b, d, f) == (0, c, e, size)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "b").mkdir()
    for name, content in (("c.txt", b"3"), ("b/z.txt", b"2"), ("a.txt", b"1"), ("other.md", b"x")):
        (tmp_path / name).write_bytes(content)
    assert read_text(str(tmp_path)) == b"123"


def test_the_builtin_text():
    text = builtin_text()
    assert read_text() == text and len(text) > 200_000 and 0 not in text
    paragraphs = [" ".join(one.split()) for one in text.decode().split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    parts = [slice(*part_of_text(len(text), part)) for part in ("train", "test")]
    train, test = ({line.strip() for line in text[part].splitlines() if len(line) > 40} for part in parts)
    assert len(train & test) < 0.02 * len(test)


def test_a_python_without_the_builtin_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(UserError, match=r"does not include the module pydoc_data.topics.*; use a text file"):
        builtin_text()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no text file or folder .*text.txt; correct the path .the environment variable LANGUAGE_MODEL_TEXT"),
        (b"", "text.txt is empty; expected text"),
        (b"MZ\x00\x01" * 500, "text.txt is not a text file: its byte 2 is zero.*convert it to UTF-8"),
        (b"short " * 50, "is too short: it has 300 bytes.*expected a text of at least 320 bytes"),
    ],
)
def test_bad_texts(text, refuse, content, message):
    """By the data set, and by the tool in one line, before anything is written."""
    text.unlink() if content is None else text.write_bytes(content)
    with pytest.raises(UserError, match=message):
        ByteSequences("validation", 32, path=str(text))
    refuse("train", PROJECT / "configs" / "gpt2.py", "--cfg-options", *SHORT, parts=(str(text),))


def test_bad_settings(text, tmp_path):
    (tmp_path / "folder").mkdir()
    for arguments, message in (
        (dict(part="valid"), "part: expected one of train, validation, test, got 'valid'"),
        (dict(length=0), "length: expected a whole number from 1 up, got 0"),
        (dict(stride=2.5), "stride: expected a whole number from 1 up, got 2.5"),
        (dict(max_sequences=0), "max_sequences: expected a whole number from 1 up, got 0"),
        (dict(path=str(tmp_path / "folder")), "no text in the folder .*folder: expected files whose names end in .txt"),
    ):
        with pytest.raises(UserError, match=message):
            ByteSequences(**{"part": "train", "length": 8, "path": str(text), **arguments})
    with pytest.raises(UserError, match="share above 0"):
        MaskedBytes(share=0)


# ---- what is predicted


def test_next_bytes():
    sample = NextByte()(dict(tokens=np.array([7, 255, 1], np.uint8)))
    assert sample["inputs"].tolist() == [BEGIN, 7, 255] and sample["data_samples"].tolist() == [7, 255, 1]


def test_masked_bytes():
    tokens = np.random.default_rng(0).integers(0, 256, 40_000).astype(np.uint8)
    sample = MaskedBytes(share=0.15, fixed=True)(dict(tokens=tokens, start=5))
    inputs, targets = (sample[name].numpy() for name in ("inputs", "data_samples"))
    drawn = targets != UNSCORED
    assert drawn.sum() == 6000 and np.array_equal(targets[drawn], tokens[drawn])
    assert np.array_equal(inputs[~drawn], tokens[~drawn])
    masked, kept = (inputs[drawn] == MASK).mean(), (inputs[drawn] == tokens[drawn]).mean()
    assert abs(masked - 0.8) < 0.02 and abs(kept - 0.1) < 0.02
    random = inputs[drawn & (inputs != MASK) & (inputs != tokens)]
    assert random.max() < 256 and len(np.unique(random)) > 200
    short = MaskedBytes()(dict(tokens=tokens[:1], start=0))
    assert short["data_samples"].tolist() == [tokens[0]]


def test_masks_of_evaluation_are_fixed_and_those_of_training_follow_the_seed():
    tokens = np.arange(1, 129, dtype=np.uint8)

    def mask(fixed, start=0):
        sample = MaskedBytes(fixed=fixed)(dict(tokens=tokens, start=start))
        return sample["inputs"].tolist(), sample["data_samples"].tolist()

    assert mask(True) == mask(True) != mask(True, start=128)
    np.random.seed(3)
    first, second = mask(False), mask(False)
    np.random.seed(3)
    assert first != second and (mask(False), mask(False)) == (first, second)


# ---- model and metric


def test_loss_and_metric_by_an_independent_formula():
    model = build(ENCODER)
    inputs = torch.randint(0, VOCABULARY, (3, 8))
    targets = torch.randint(0, 5, (3, 8))
    targets[0, :6] = UNSCORED
    targets[2, 1] = UNSCORED
    probabilities = model(inputs).detach().double().softmax(-1).numpy()
    nats, hits, scored = [], 0, []
    for i in range(3):
        for j in range(8):
            if targets[i, j] != UNSCORED:
                nats.append(-math.log(probabilities[i, j, targets[i, j]]))
                hits += probabilities[i, j].argmax() == targets[i, j].item()
                scored.append(targets[i, j].item())
    mean = sum(nats) / 17
    assert len(nats) == 17
    assert model(inputs, targets, mode="loss")["loss"].item() == pytest.approx(mean, rel=1e-5)

    metric = ByteLoss(prefix="masked_byte")
    for rows in (slice(0, 2), slice(2, 3)):  # batches of different sizes
        metric.process({}, model(inputs[rows], targets[rows], mode="predict"))
    found = metric.evaluate(3)
    frequencies = [scored.count(byte) / 17 for byte in set(scored)]
    expected = dict(
        nats_per_byte=mean,
        bits_per_byte=mean / math.log(2),
        accuracy=100 * hits / 17,
        unigram_bits_per_byte=-sum(p * math.log2(p) for p in frequencies),
    )
    assert found == pytest.approx({f"masked_byte/{name}": value for name, value in expected.items()}, rel=1e-5)


@pytest.mark.parametrize("conditioning", ["none", "pc", "sc", "sc+pc"])
def test_no_token_sees_the_future(conditioning):
    model = build(DECODER, conditioning)
    inputs = torch.randint(0, 256, (2, 12))
    logits = model(inputs)
    for position in (11, 5):
        changed = inputs.clone()
        changed[:, position] = (changed[:, position] + 1) % 256
        other = model(changed)
        torch.testing.assert_close(other[:, :position], logits[:, :position], rtol=0, atol=1e-6)
        assert ((other - logits)[:, position:].abs().amax(-1) > 1e-5).all()


def test_conditioned_tokens_are_for_the_encoder_alone(refuse, text):
    refuse(
        *("train", PROJECT / "configs" / "gpt2.py", "--cfg-options", *SHORT, "model.network.conditioning=ct"),
        parts=("cannot be built", "its embedded tokens cannot be conditioned: each token sees only those before it"),
    )
    inputs = torch.randint(0, 256, (2, 12))
    model, plain = build(ENCODER, "ct"), build(ENCODER)
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(model(inputs), plain(inputs), atol=1e-3)
    model(inputs, inputs, mode="loss")["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("conditioning", ["none", "pc", "sc", "ci"])
def test_every_config_builds(config, conditioning):
    cfg = load_config(str(config), {"model.network.conditioning": conditioning})
    model = build_model(cfg)
    model.init_weights()
    assert isinstance(model, ByteModel)
    inputs = torch.randint(0, VOCABULARY, (1, cfg.length))
    assert model(inputs).shape == (1, cfg.length, VOCABULARY)


@pytest.mark.parametrize(
    "option, message",
    [
        ("model.network.module.n_layers=2", "GPT2Config has no setting 'n_layers'"),
        ("model.network.module.vocab_size=99", "vocab_size is given by the bytes"),
        ("model.network.module.n_head=3", "divisible"),
    ],
)
def test_bad_networks(option, message):
    name, value = option.split("=")
    with pytest.raises(UserError, match=f"cannot be built: .*{message}"):
        build_model(load_config(str(PROJECT / "configs" / "gpt2.py"), {name: int(value)}))


def test_sequences_beyond_the_positions():
    with pytest.raises(UserError, match="have 33 tokens, and the network has 32 positions"):
        build(DECODER)(torch.zeros(1, 33, dtype=torch.long))


# ---- runs


def train(call, name, work_dir, *arguments):
    status, _, errors = call(
        *("train", PROJECT / "configs" / f"{name}.py", "--work-dir", work_dir, *arguments),
        *("--cfg-options", *SHORT, *SMALL[name]),
    )
    assert not status, errors


@forwarded
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_resumed_run_is_the_uninterrupted_one(call, text, tmp_path, name):
    train(call, name, tmp_path / "whole")
    stopped = tmp_path / "whole" / "iter_2.pth"
    train(call, name, tmp_path / "resumed", "--resume", stopped)
    assert first_iteration(tmp_path / "resumed") > 2
    whole, resumed, before = (
        torch.load(path, weights_only=False)["state_dict"]
        for path in (tmp_path / "whole" / "iter_6.pth", tmp_path / "resumed" / "iter_6.pth", stopped)
    )
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    assert any(not torch.equal(whole[key], value) for key, value in before.items())


def test_a_compiled_training(call, refuse, text, tmp_path, monkeypatch):
    """What the model has in place of a backbone is compiled; a model that has nothing of the kind is refused."""
    train(call, "gpt2", tmp_path / "eager")
    compiled, compile_module = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **to: compiled.append((m, to)) or compile_module(m, **to))
    train(call, "gpt2", tmp_path / "compiled", "--compile", "eager")
    ((network, settings),) = compiled
    assert type(network).__name__ == "GPT2LMHeadModel" and settings == dict(backend="eager")
    plain, other = (
        torch.load(tmp_path / name / "iter_6.pth", weights_only=False)["state_dict"] for name in ("eager", "compiled")
    )
    torch.testing.assert_close(other, plain, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("condattn.openmmlab.models.wrapping.COMPILED", ("backbone",))
    command = ("train", PROJECT / "configs" / "gpt2.py", "--compile", "eager", "--cfg-options", *SHORT, *SMALL["gpt2"])
    refuse(*command, parts=("--compile expects a model with one of backbone", "found a ByteModel with", "network"))


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["none", "pc"])
def test_the_builtin_text_is_learnt(call, tmp_path, monkeypatch, conditioning):
    """By a smaller model, in fewer iterations than the README's: better than any prediction without context."""
    monkeypatch.delenv("LANGUAGE_MODEL_TEXT", raising=False)
    options = ["train_cfg.max_iters=300", "train_cfg.val_interval=300", "param_scheduler.1.T_max=300"]
    options += ["model.network.module.n_embd=64", "model.network.module.n_layer=2"]
    options += [f"model.network.conditioning={conditioning}"]
    status, output, errors = call("train", PROJECT / "configs" / "gpt2.py", "--cfg-options", *options)
    assert not status, errors
    bits, unigram = (
        float(re.findall(rf"next_byte/{name}bits_per_byte: ([\d.]+)", output + errors)[-1]) for name in ("", "unigram_")
    )
    assert bits < unigram - 0.6


def test_commands_of_the_readme(text, call, tmp_path, monkeypatch):
    """Each is run from the root of the repository, small and with a text of the test."""
    monkeypatch.setenv("LANGUAGE_MODEL_TEXT", "nowhere.txt")
    done = []
    for command in COMMANDS:
        words = shlex.split(command)
        env = dict(word.split("=", 1) for word in words[: words.index("python")])
        tool, *arguments = words[words.index("python") + 1 :]
        done.append((tool, bool(env)))
        if tool == "tools/study.py":
            check_study(load_study(str(ROOT / arguments[0])), ROOT, ROOT)
            continue
        config = Path(arguments[0])
        assert (ROOT / config).is_file()
        for name in env:
            assert name == "LANGUAGE_MODEL_TEXT"
        monkeypatch.setenv("LANGUAGE_MODEL_TEXT", str(text))
        options = [*SHORT, *SMALL[config.stem]]
        if "--cfg-options" in arguments:
            options += arguments[arguments.index("--cfg-options") + 1 :]
            arguments = arguments[: arguments.index("--cfg-options")]
        # Where the training of this configuration, whose command stands above it, has left its checkpoint.
        arguments = [str(tmp_path / config.stem / "iter_6.pth") if a.endswith(".pth") else a for a in arguments[1:]]
        full = [ROOT / config, *arguments, "--work-dir", tmp_path / config.stem, "--cfg-options", *options]
        status, _, errors = call(Path(tool).stem, *full)
        assert not status, errors
        newest = max((tmp_path / config.stem).glob("*/*.log"), key=lambda path: path.stat().st_mtime_ns)
        values = re.findall(r"(?:next|masked)_byte/(nats|bits)_per_byte: ([\d.]+)", newest.read_text())[-2:]
        (_, nats), (_, bits) = values
        assert float(bits) == pytest.approx(float(nats) / math.log(2), rel=1e-3)
    assert sorted(done) == sorted(
        [("tools/train.py", False)] * 3
        + [("tools/test.py", False)] * 2
        + [("tools/train.py", True)]
        + [("tools/study.py", False)]
    )


def test_training_from_the_root_of_the_repository(text, tmp_path):
    """As a user does it, in a process of its own."""
    command = [*("tools/train.py", "projects/language_model/configs/gpt2.py", "--work-dir", tmp_path / "run")]
    result = run(*command, "--cfg-options", *SHORT, *SMALL["gpt2"], cwd=ROOT)
    assert not error_lines(result.stderr)
    assert (tmp_path / "run" / "iter_6.pth").is_file()


def test_an_editable_installation_has_the_package_and_a_wheel_has_not(tmp_path):
    """Installed with ``pip install -e .``, the folder ``projects`` is on Python's path."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in ("condattn", "language_model"):
        (tmp_path / "projects" / package).mkdir(parents=True)
        (tmp_path / "projects" / package / "__init__.py").touch()
    (tmp_path / "out").mkdir()
    files = {}
    for kind in ("editable", "wheel"):
        code = f"import setuptools.build_meta as build; print(build.build_{kind}('out'))"
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        with zipfile.ZipFile(tmp_path / "out" / result.stdout.split()[-1]) as archive:
            files[kind] = {name: archive.read(name).decode() for name in archive.namelist()}
    (path,) = (content for name, content in files["editable"].items() if name.endswith(".pth"))
    assert Path(path.strip()).resolve() == (tmp_path / "projects").resolve()
    assert not any("language_model" in name for name in files["wheel"])
    assert os.path.join("condattn", "__init__.py") in files["wheel"]
