"""The Long Range Arena: grammar and generator of ListOps, readers of the five tasks, the classifier, and a training."""

import csv
import json
import pickle
import random
import re
import shlex
import statistics
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ROOT, Malice, error_lines, run

pytest.importorskip("transformers")
pytest.importorskip("mmengine")

from long_range_arena import generate as generator
from long_range_arena import grammar, registry  # noqa: F401
from long_range_arena.datasets.aan import AanPairs
from long_range_arena.datasets.cifar import GreyCifar10
from long_range_arena.datasets.imdb import ImdbReviews
from long_range_arena.datasets.listops import NUMBERS, ListOps
from long_range_arena.datasets.pathfinder import Pathfinder32
from long_range_arena.errors import DataError
from long_range_arena.grammar import Limits, evaluate, from_source, generate, to_source
from long_range_arena.metric import SequenceAccuracy
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement
from PIL import Image

import condattn
import condattn.registry
from condattn.openmmlab.errors import UserError
from condattn.openmmlab.runner.launch import build_model, load_config

PROJECT = ROOT / "projects" / "long_range_arena"
CONFIGS = sorted((PROJECT / "configs").glob("*.py"))
SPLITS = ("train", "val", "test")
SMALL = Limits(max_depth=4, max_args=5, min_length=3, max_length=40)
NYSTROMFORMER = dict(
    type="Nystromformer",
    length=12,
    num_landmarks=4,
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=8,
    conv_kernel_size=3,
)


def draw(number, limits=SMALL, seed=0):
    drawn = generate(random.Random(seed), limits, set())
    return [next(drawn) for _ in range(number)]


# The language


def by_python(source):
    """The value of an expression as Python sees it, translated to calls of functions."""
    names = dict(
        MIN=lambda *values: min(values),
        MAX=lambda *values: max(values),
        MED=lambda *values: int(statistics.median(values)),
        SM=lambda *values: sum(values) % 10,
    )
    plain = source.replace("( ", "").replace(" )", "")
    calls = re.sub(r"\[(\w+) ", r"\1(", plain).replace(" ]", ")").replace(" ", ",")
    return eval(calls, {"__builtins__": {}}, names)


def by_pairs(source):
    """The value of an expression by the pairs in parentheses of the benchmark, each of two parts."""
    calls = re.sub(r"[^() ]+", lambda match: repr(match[0]), source).replace("( ", "(").replace(" )", ")")
    functions = {"[MIN": min, "[MAX": max, "[MED": lambda v: int(np.median(v)), "[SM": lambda v: sum(v) % 10}

    def value(node):
        if isinstance(node, str):
            return int(node) if node.isdecimal() else (node, [])
        left, right = node
        operator, values = value(left)
        return functions[operator](values) if right == "]" else (operator, [*values, value(right)])

    return value(eval(calls.replace(" ", ",")))


def test_the_evaluator_against_python():
    expressions = draw(10_000)
    values = [evaluate(tokens) for tokens in expressions]
    assert values == [by_python(to_source(tokens)) for tokens in expressions]
    assert values == [by_pairs(to_source(tokens)) for tokens in expressions]
    assert set(values) == set(range(10))


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("[MED 3 8 9 5 ]", 6), ("[MED 1 2 ]", 1), ("[SM 9 9 [MAX 1 0 ] ]", 9), ("[MIN 4 [SM 5 5 ] ]", 0)],
)
def test_values(text, value):
    assert evaluate(text.split()) == value


@pytest.mark.parametrize("text", ["", "1 2", "[MAX 1 2", "]", "[MAX ]", "[MAX 1 ] ]", "[FIRST 1 2 ]", "10"])
def test_what_is_no_expression(text):
    with pytest.raises(ValueError, match="expected"):
        evaluate(text.split())


def test_the_layout_of_the_benchmark():
    tokens = ["[MAX", "2", "[MIN", "4", "7", "]", "0", "]"]
    source = "( ( ( ( [MAX 2 ) ( ( ( [MIN 4 ) 7 ) ] ) ) 0 ) ] )"
    assert to_source(tokens) == source and from_source(source) == tokens
    assert all(from_source(to_source(drawn)) == drawn for drawn in draw(200))


def test_expressions_are_within_the_limits():
    expressions = draw(3_000)
    lengths = [len(tokens) for tokens in expressions]
    assert min(lengths) == SMALL.min_length + 1 and max(lengths) == SMALL.max_length - 1
    depths, arguments = set(), set()
    for tokens in expressions:
        counts, depth = [0], 0
        for token in tokens:
            if token == grammar.END:
                arguments.add(counts.pop())
                continue
            counts[-1] += 1
            depth = max(depth, len(counts))
            if token in grammar.OPERATORS:
                counts.append(0)
        depths.add(depth)
    assert max(depths) == SMALL.max_depth and arguments == set(range(2, SMALL.max_args + 1))
    assert len({tuple(tokens) for tokens in expressions}) == len(expressions)
    assert {token for tokens in expressions for token in tokens} == set(grammar.TOKENS)


def test_the_defaults_are_the_benchmarks():
    assert Limits() == Limits(max_depth=10, max_args=10, min_length=500, max_length=2000)
    (tokens,) = draw(1, Limits())
    assert 500 < len(tokens) < 2000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_depth=1), "depth and a number of arguments of 2 or more"),
        (dict(max_depth=3, max_args=3), "has more than 17 tokens, and more than 500 are asked for"),
        (dict(max_length=501), "larger than 500 and smaller than 501"),
        (dict(max_depth=5000), "at most 100"),
    ],
)
def test_impossible_limits(settings, message):
    with pytest.raises(UserError, match=message):
        Limits(**settings)


# The generator


def rows(path):
    with path.open(newline="") as file:
        return list(csv.reader(file, delimiter="\t"))


def write(folder, seed=0, **numbers):
    return generator.write_listops(folder, numbers or dict(train=60, val=8, test=8), SMALL, seed)


def test_files_of_the_generator(tmp_path):
    answers = write(tmp_path / "a")
    write(tmp_path / "b")
    write(tmp_path / "c", seed=1)
    seen = []
    for split, number in dict(train=60, val=8, test=8).items():
        name = f"basic_{split}.tsv"
        header, *content = rows(tmp_path / "a" / name)
        assert header == ["Source", "Target"] and len(content) == number == answers[split].total()
        assert [int(target) for _, target in content] == [by_python(source) for source, _ in content]
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()
        seen += [source for source, _ in content]
    assert len(set(seen)) == len(seen)


def test_nothing_is_left_of_a_generation_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(grammar, "PATIENCE", 2000)
    few = Limits(max_depth=2, max_args=2, min_length=3, max_length=5)  # 4 operators, 100 pairs of digits
    with pytest.raises(UserError, match=r"no new expression of more than 3 and fewer than 5 tokens"):
        generator.write_listops(tmp_path / "data", dict(train=401), few)
    with pytest.raises(UserError, match="positive number of expressions to val, got 0"):
        write(tmp_path / "data", train=1, val=0)
    assert not list(tmp_path.iterdir())
    generator.write_listops(tmp_path / "data", dict(train=400), few)
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path / "data")


# The readers


def samples(dataset):
    return [dataset[i] for i in range(len(dataset))]


def identifiers(dataset):
    return {dataset.get_data_info(i)["sample_id"] for i in range(len(dataset))}


def check_splits(build, number):
    """Every sample is in one split."""
    parts = [identifiers(build(split)) for split in SPLITS]
    assert all(parts) and len(set().union(*parts)) == sum(map(len, parts)) == number


def test_listops(tmp_path):
    write(tmp_path / "listops")
    check_splits(lambda split: ListOps(str(tmp_path / "listops"), split, 40), 76)
    for sample, (source, target) in zip(
        samples(ListOps(str(tmp_path / "listops"), "val", 40)),
        rows(tmp_path / "listops/basic_val.tsv")[1:],
        strict=True,
    ):
        tokens = from_source(source)
        assert sample["inputs"].shape == (1, 40) and sample["inputs"].dtype == torch.int64
        assert sample["inputs"][0, : len(tokens)].tolist() == [NUMBERS[token] for token in tokens]
        assert not sample["inputs"][0, len(tokens) :].any() and 0 not in NUMBERS.values()
        assert sample["data_samples"].gt_label == int(target)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Source,Target\n", "expected the columns Source and Target, separated by a tab, in line 1"),
        ("", "in line 1"),
        ("Source\tTarget\n( ( [MAX 1 ) ] )\n", "line 2: expected an expression, a tab and its value from 0 to 9"),
        ("Source\tTarget\n1\t1\n2\t10\n", "line 3: expected an expression, a tab and its value"),
        ("Source\tTarget\n( ( [LAST 1 ) ] )\t1\n", r"line 2: expected the tokens .*, found '\[LAST'"),
        ("Source\tTarget\n( ( ( [MAX 1 ) 2 ) ] )\t2\n", "line 2: an expression of 4 tokens, and the model has 3 pos"),
    ],
)
def test_listops_that_cannot_be_read(tmp_path, content, message):
    (tmp_path / "basic_train.tsv").write_text(content)
    with pytest.raises(DataError, match=message):
        ListOps(str(tmp_path), "train", 3)


def write_reviews(root, number=20):
    for part in ("train", "test"):
        for name in ("neg", "pos"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(number):
                (folder / f"{i}_1.txt").write_bytes(f"{part} {name} {i}\xe9".encode("latin1"))


def test_text(tmp_path):
    write_reviews(tmp_path)
    check_splits(lambda split: ImdbReviews(str(tmp_path), split, 64), 80)
    assert len(ImdbReviews(str(tmp_path), "val", 64)) == 4
    dataset = ImdbReviews(str(tmp_path), "test", 8)
    sample, info = dataset[25], dataset.get_data_info(25)
    content = Path(info["path"]).read_bytes()
    assert info["gt_label"] == 1 and "/pos/" in info["path"] and len(content) > 8
    assert sample["inputs"][0].tolist() == [byte + 1 for byte in content[:8]]
    assert 0xE9 + 1 in ImdbReviews(str(tmp_path), "test", 64)[25]["inputs"]
    for path in (tmp_path / "train" / "neg").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="expected reviews, as files"):
        ImdbReviews(str(tmp_path), "train", 64)


def test_retrieval(tmp_path):
    lines = dict(
        train=['1.0\ta\tb\tfirst "text\tsecond\n', "0\tc\td\tthird\tfourth"],
        eval=["0\ta\tb\tx\ty\n"],
        test=["1\te\tf\tz\tw\n"],
    )
    for part, content in lines.items():
        (tmp_path / f"new_aan_pairs.{part}.tsv").write_text("".join(content))
    check_splits(lambda split: AanPairs(str(tmp_path), split, 8), 4)
    one, other = samples(AanPairs(str(tmp_path), "train", 8))
    assert [bytes(row[row > 0].sub(1).tolist()) for row in one["inputs"]] == [b'first "t', b"second"]
    assert [bytes(row[row > 0].sub(1).tolist()) for row in other["inputs"]] == [b"third", b"fourth"]
    assert (one["data_samples"].gt_label, other["data_samples"].gt_label) == (1, 0)
    (tmp_path / "new_aan_pairs.eval.tsv").write_text("0\ta\tb\tx\ty\n2\ta\tb\tx\ty\n")
    with pytest.raises(DataError, match="line 2: expected a label .* found 5 fields that begin with b'2'"):
        AanPairs(str(tmp_path), "val", 8)


class Python2Pickler(pickle._Pickler):
    """Writes texts and bytes as Python 2 does, which has one type for both."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_text(self, text):
        content = text if isinstance(text, bytes) else text.encode()
        self.write(b"T" + struct.pack("<i", len(content)) + content)

    dispatch[bytes] = dispatch[str] = save_text


def write_cifar(root, number=4, python2=True):
    rng = np.random.default_rng(0)
    images = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        images[name] = rng.integers(0, 256, (number, 3072), dtype=np.uint8)
        content = {b"data": images[name], b"labels": [i % 10 for i in range(number)], b"batch_label": b"x"}
        with (root / name).open("wb") as file:
            (Python2Pickler(file, 2) if python2 else pickle.Pickler(file, 4)).dump(content)
    return images


@pytest.mark.parametrize("python2", [True, False])
def test_image(tmp_path, python2):
    images = write_cifar(tmp_path, python2=python2)
    check_splits(lambda split: GreyCifar10(str(tmp_path), split), 24)
    assert [len(GreyCifar10(str(tmp_path), split)) for split in SPLITS] == [18, 2, 4]
    sample = GreyCifar10(str(tmp_path), "test")[3]
    for pixel in (0, 31, 500, 1023):
        red, green, blue = (int(images["test_batch"][3, 1024 * channel + pixel]) for channel in range(3))
        assert abs(sample["inputs"][0, pixel].item() - 1 - (0.2989 * red + 0.587 * green + 0.114 * blue)) <= 0.5
    assert sample["inputs"].shape == (1, 1024) and sample["data_samples"].gt_label == 3
    with pytest.raises(DataError, match="images have 1024 pixels, got 512"):
        GreyCifar10(str(tmp_path), "test", 512)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no pickle", "expected a pickle of NumPy arrays"),
        (b"", "expected a pickle of NumPy arrays"),
        (pickle.dumps([1]), "expected data, "),
        (pickle.dumps({b"data": 1, b"labels": [1]}), "expected data, "),
        (pickle.dumps({b"data": [1], b"labels": [1], b"x": statistics.mean}), "it names statistics.mean"),
    ],
)
def test_images_that_cannot_be_read(tmp_path, content, message):
    write_cifar(tmp_path)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=message):
        GreyCifar10(str(tmp_path), "test")


def test_code_in_a_pickle_is_not_run(tmp_path):
    write_cifar(tmp_path)
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Malice(tmp_path / "harm"), b"labels": []}))
    with pytest.raises(DataError, match="it names posix.mkdir"):
        GreyCifar10(str(tmp_path), "test")
    assert not (tmp_path / "harm").exists()


def write_curves(root, number=20, difficulty="curv_contour_length_14"):
    """Images whose first pixel is their number, in two lists; the third one is an empty file."""
    folder = root / difficulty
    (folder / "metadata").mkdir(parents=True)
    lists = ([], [])
    for i in range(number):
        part = f"imgs/{i % 2}"
        (folder / part).mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((32, 32), np.uint8)
        pixels[0, 0] = i
        Image.fromarray(pixels).save(folder / part / f"sample_{i}.png")
        lists[i % 2].append(f"{part} sample_{i}.png 0 {i % 3 % 2} 1.8 a b\n")
    (folder / "imgs/0/sample_2.png").write_bytes(b"")
    for i, lines in enumerate(lists):
        (folder / "metadata" / f"{i}.npy").write_text("".join(lines))
    return folder


def test_pathfinder(tmp_path):
    folder = write_curves(tmp_path, 22)
    check_splits(lambda split: Pathfinder32(str(tmp_path), split), 21)
    assert [len(Pathfinder32(str(tmp_path), split)) for split in SPLITS] == [16, 2, 3]
    dataset = Pathfinder32(str(tmp_path), "train")
    labels = []
    for sample in samples(dataset):
        number = int(sample["data_samples"].sample_id.partition("sample_")[2].removesuffix(".png"))
        assert sample["inputs"][0].tolist() == [number + 1] + [1] * 1023
        assert sample["data_samples"].gt_label == number % 3 % 2
        labels.append(number % 3 % 2)
    assert set(labels) == {0, 1}
    with pytest.raises(DataError, match="difficulty: expected one of curv_baseline"):
        Pathfinder32(str(tmp_path), "train", difficulty="hard")
    Image.new("L", (16, 32)).save(dataset.get_data_info(0)["path"])
    with pytest.raises(DataError, match="expected 32 x 32 pixels, found 16 x 32"):
        dataset[0]
    Path(dataset.get_data_info(0)["path"]).unlink()
    with pytest.raises(DataError, match=r"metadata/\d.npy, line \d+: there is no image"):
        Pathfinder32(str(tmp_path), "val")
    (folder / "metadata" / "0.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="0.npy: expected a text, a line for each image"):
        Pathfinder32(str(tmp_path), "val")
    (folder / "metadata" / "0.npy").write_text("imgs/0 sample_0.png\n")
    with pytest.raises(DataError, match="0.npy, line 1: expected folder and name of an image"):
        Pathfinder32(str(tmp_path), "val")


def test_a_split_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match="split: expected one of train, val, test, got 'training'"):
        ListOps(str(tmp_path), "training", 40)


# The model


def classifier(conditioning="none", **settings):
    torch.manual_seed(0)
    encoder = dict(type="Conditioned", conditioning=conditioning, module=NYSTROMFORMER)
    return MODELS.build(
        dict(type="SequenceClassifier", encoder=encoder, num_classes=3, hidden_channels=6, **settings)
    ).eval()


def batch(sequences=1):
    inputs = torch.randint(1, 20, (4, sequences, 12))
    inputs[1, :, 7:] = 0
    return inputs, [BaseDataElement(gt_label=torch.tensor(i % 3)) for i in range(4)]


def test_the_padding_mask_reaches_the_encoder():
    """And the mean leaves padding out."""
    model, (inputs, _) = classifier(), batch()
    seen = {}
    model.encoder.register_forward_hook(lambda m, args, kwargs, out: seen.update(kwargs, out=out[0]), with_kwargs=True)
    model.head.register_forward_pre_hook(lambda module, args: seen.update(vectors=args[0]))
    model(inputs)
    assert torch.equal(seen["attention_mask"], (inputs[:, 0] > 0).long())
    torch.testing.assert_close(seen["vectors"][1], seen["out"][1, :7].mean(0))
    torch.testing.assert_close(seen["vectors"][0], seen["out"][0].mean(0))
    inputs[2] = 0
    assert model(inputs).isfinite().all()


def test_padding_is_no_key():
    """With exact attention and no convolution nothing of it reaches the other tokens."""
    exact = dict(NYSTROMFORMER, num_landmarks=12, conv_kernel_size=None)
    for conditioning in ("none", "pc", "sc", "ct"):
        torch.manual_seed(0)
        model = MODELS.build(dict(type="Conditioned", conditioning=conditioning, module=exact)).eval()
        tokens = torch.randint(1, 20, (2, 12))
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, 7:] = 0
        other = tokens.where(mask == 1, 3)
        one, two = (model(input_ids=x, attention_mask=mask).last_hidden_state for x in (tokens, other))
        torch.testing.assert_close(one[1, :7], two[1, :7])
        assert not torch.allclose(one[1, 7:], two[1, 7:])


def test_conditioned_tokens_leave_padding_out():
    """By landmarks as well: what enters the first block at other tokens does not depend on padding, which stays."""
    torch.manual_seed(0)
    model = MODELS.build(dict(type="Conditioned", conditioning="ct", module=NYSTROMFORMER)).eval()
    tokens = torch.randint(1, 20, (2, 12))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    seen = []
    model.encoder.layer[0].attention.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    for x in (tokens, tokens.where(mask == 1, 3)):
        model(input_ids=x, attention_mask=mask)
        embedded = model.embeddings(x)
        assert torch.equal(seen[-1][1, 7:], embedded[1, 7:])
        u, s, vh = torch.linalg.svd(embedded[1, :7], full_matrices=False)
        torch.testing.assert_close(seen[-1][1, :7], embedded[1, :7] + s[0] * u @ vh, rtol=1e-4, atol=1e-5)


def test_pairs():
    model, (inputs, _) = classifier(pairs=True), batch(2)
    seen = []
    model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(inputs)
    model(inputs.flip(1))
    first, second = seen[0][:, :8], seen[0][:, 8:16]
    torch.testing.assert_close(seen[0], torch.cat([first, second, first * second, first - second], -1))
    torch.testing.assert_close(seen[1], torch.cat([second, first, first * second, second - first], -1))
    assert not torch.allclose(first, second)


def test_loss_and_predictions():
    model, (inputs, data_samples) = classifier(), batch()
    scores = model(inputs)
    loss = model(inputs, data_samples, mode="loss")["loss"]
    expected = -scores.log_softmax(-1)[torch.arange(4), torch.tensor([0, 1, 2, 0])].mean()
    torch.testing.assert_close(loss, expected)
    predicted = model(inputs, data_samples, mode="predict")
    assert [sample.pred_label.item() for sample in predicted] == scores.argmax(-1).tolist()
    metric = SequenceAccuracy()
    metric.process({}, [sample.to_dict() for sample in predicted])
    right = sum(sample.pred_label == sample.gt_label for sample in predicted)
    assert metric.evaluate(4) == {"accuracy/top1": 25.0 * right}
    with pytest.raises(ValueError, match="mode: expected 'tensor', 'loss' or 'predict', got 'losses'"):
        model(inputs, mode="losses")


def test_what_does_not_fit_the_model():
    model, (inputs, _) = classifier(), batch()
    with pytest.raises(UserError, match="expected 1 sequences of 12 tokens .* got 1 of 10; give data sets and model"):
        model(inputs[..., :10])
    with pytest.raises(UserError, match="got 2 of 12"):
        model(batch(2)[0])
    with pytest.raises(ValueError, match="a multiple of num_landmarks, got 12 and 5"):
        MODELS.build(dict(NYSTROMFORMER, num_landmarks=5))


@pytest.mark.parametrize("conditioning", ["pc", "sc", "ct", "ci", "sc(strength=10.0)", "sc+pc"])
def test_conditioning(conditioning):
    """By every method; weights of the encoder that a method does not set are those of the unconditioned one."""
    plain, model = classifier(), classifier(conditioning)
    for one in (plain, model):
        one.init_weights()
    assert any(condattn.conditioning_of(model).values()) and not any(condattn.conditioning_of(plain).values())
    assert plain.state_dict().keys() == model.state_dict().keys()
    before, after = plain.encoder.state_dict(), model.encoder.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    attention = re.compile(r"encoder\.layer\.\d\.attention\.self\.(query|key|value)\.weight")
    assert bool(changed) == (conditioning == "ci") and all(map(attention.fullmatch, changed))
    inputs, data_samples = batch()
    assert not torch.allclose(plain(inputs), model(inputs))
    model.train()(inputs, data_samples, mode="loss")["loss"].backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


# Configurations, tools and the README


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations(path):
    """They build a conditioned model whose length is that of the data, and one switch takes the conditioning away."""
    for options, conditioned in ((None, path.stem != "listops_small"), ({"model.encoder.conditioning": "none"}, False)):
        cfg = load_config(str(path), options)
        model = build_model(cfg)
        records = condattn.conditioning_of(model).values()
        assert len(condattn.find_sites(model)) == 2 and all(map(bool, records)) == conditioned
        lengths = {cfg[f"{split}_dataloader"].dataset.length for split in SPLITS}
        assert lengths == {model.encoder.config.segment_means_seq_len}
        assert [cfg[f"{split}_dataloader"].dataset.split for split in SPLITS] == list(SPLITS)
        assert cfg.train_cfg.max_iters % cfg.train_cfg.val_interval == 0
    last = cfg.param_scheduler[-1]
    assert cfg.train_cfg.max_iters == last.get("end", last.get("T_max"))


def test_the_configurations_have_the_settings_of_the_authors():
    for path in CONFIGS:
        cfg = Config.fromfile(path)
        module = cfg.model.encoder.module
        assert (module.hidden_size, module.num_hidden_layers, module.num_attention_heads) == (64, 2, 2), path
        assert (module.intermediate_size, cfg.model.hidden_channels) == (128, 128), path


ARCHIVES = dict(
    listops="lra_release.gz", text="aclImdb_v1", retrieval="lra_release.gz", image="cifar-10-python", pathfinder="lra_"
)


@pytest.mark.parametrize("task", ARCHIVES)
def test_missing_archives(task, refuse, monkeypatch, tmp_path):
    """One line, before anything is written; a study says the same."""
    monkeypatch.setenv("LRA_DATA", "nowhere")
    refuse("train", PROJECT / "configs" / f"{task}.py", parts=("no data at nowhere/", ARCHIVES[task], "data_root"))


def test_too_long_expressions(refuse, monkeypatch, tmp_path):
    write(tmp_path / "listops")
    monkeypatch.setenv("LISTOPS_SMALL", str(tmp_path / "listops"))
    options = [f"{split}_dataloader.dataset.length=20" for split in SPLITS]
    config = PROJECT / "configs" / "listops_small.py"
    refuse("train", config, "--cfg-options", *options, parts=("basic_train.tsv, line ", "the model has 20 positions"))


def test_data_without_samples_or_with_wrong_settings(refuse, monkeypatch, tmp_path):
    """Of a configuration of mmengine's scope, whose data sets are loaded before the run."""
    (tmp_path / "basic_train.tsv").write_text("Source\tTarget\n")
    (tmp_path / "basic_val.tsv").write_text("Source\tTarget\n1\t1\n")
    monkeypatch.setenv("LISTOPS_SMALL", str(tmp_path))
    config = PROJECT / "configs" / "listops_small.py"
    refuse("train", config, parts=("no samples for split 'train'", "long_range_arena.generate"))
    (tmp_path / "basic_train.tsv").write_text("Source\tTarget\n1\t1\n")
    options = ("--cfg-options", "train_dataloader.dataset.lenght=128")
    refuse("train", config, *options, parts=("train: the data set ListOps cannot be loaded", "'lenght'"))


def blocks():
    """The commands of the README, without comments."""
    text = (PROJECT / "README.md").read_text()
    lines = re.findall(r"^    (\w.*?)(?:  +#.*)?$", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_the_commands_of_the_readme():
    """Every one is run, here or below, or its configuration is one of those that are built above."""
    tools = [command[1] for command in blocks()]
    assert set(tools) == {"-m", "tools/train.py", "tools/test.py", "tools/study.py"}
    named = {ROOT / part for command in blocks() for part in command if part.startswith("projects/")}
    assert named == set(CONFIGS)
    assert all(command[0] == "python" for command in blocks())


def test_a_training(tmp_path, call):
    """The commands of the README for the small ListOps, with a few expressions and iterations."""
    commands = [command for command in blocks() if "listops_small" in " ".join(command)]
    (generation,) = (command for command in commands if command[1] == "-m")
    few = ["--train", 64, "--val", 40, "--test", 40]
    result = run(sys.executable, *generation[1:], *few, cwd=tmp_path)
    assert "basic_test.tsv: 40 expressions" in result.stdout
    (training,) = (command for command in commands if command[1] == "tools/train.py")
    options = ["train_cfg.max_iters=4", "train_cfg.val_interval=2", "default_hooks.checkpoint.interval=2"]
    options += ["train_dataloader.batch_size=4", "default_hooks.logger.interval=1", "model.encoder.conditioning=pc"]
    run(ROOT / training[1], ROOT / training[2], "--cfg-options", *options, cwd=tmp_path)
    (testing,) = (command for command in commands if command[1] == "tools/test.py")
    checkpoint = Path(testing[-1]).with_name("iter_4.pth")  # in the folder that the README names
    command = ("test", ROOT / testing[2], checkpoint, "--work-dir", "test", "--cfg-options")
    status, _, errors = call(*command, "model.encoder.conditioning=pc")
    assert not status, errors
    (scores,) = (tmp_path / "test").glob("*/*.json")
    assert 0 <= json.loads(scores.read_text())["accuracy/top1"] <= 100
    status, _, errors = call(*command, "model.encoder.conditioning=none")
    assert status == 2 and "with conditioning=dict(type='RowPreconditioner'" in error_lines(errors)[0]


def test_the_generator_says_what_is_wrong(tmp_path):
    result = run(sys.executable, "-m", "long_range_arena.generate", tmp_path, cwd=tmp_path, status=2)
    assert result.stderr.startswith("error: ") and "exists already" in result.stderr and not list(tmp_path.iterdir())
