"""Long Range Arena: the classifier, its configurations, and a training."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, error_lines, run

pytest.importorskip("transformers")
pytest.importorskip("mmengine")

from long_range import CONFIGS, NYSTROMFORMER, PROJECT, SMALL, SPLITS
from long_range_arena import generate as generator
from long_range_arena import grammar, registry  # noqa: F401
from long_range_arena.metric import SequenceAccuracy
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement

import condattn
import condattn.registry
from condattn.openmmlab.errors import UserError
from condattn.openmmlab.models.wrapping import compiled_part
from condattn.openmmlab.runner.launch import build_model, load_config


def write(folder, seed=0, **numbers):
    return generator.write_listops(folder, numbers or dict(train=60, val=8, test=8), SMALL, seed)


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


def test_the_encoder_is_compiled():
    model = classifier("pc")
    inputs, data_samples = batch()
    want = model(inputs, data_samples, mode="loss")["loss"]
    compiled_part(model).compile(backend="eager")
    assert compiled_part(model) is model.encoder
    torch.testing.assert_close(model(inputs, data_samples, mode="loss")["loss"], want)


def test_what_does_not_fit_the_model():
    model, (inputs, _) = classifier(), batch()
    with pytest.raises(UserError, match="expected 1 sequences of 12 tokens .* got 1 of 10; give data sets and model"):
        model(inputs[..., :10])
    with pytest.raises(UserError, match="got 2 of 12"):
        model(batch(2)[0])
    with pytest.raises(UserError, match="tokens with numbers up to 99, and the encoder is for 20 numbers.*vocab_size"):
        model(inputs.clamp_min(99))
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
    parts = (
        "no data at nowhere/",
        ARCHIVES[task],
        "data_root",
        "takes the folder from the environment variable LRA_DATA",
    )
    refuse("train", PROJECT / "configs" / f"{task}.py", parts=parts)


def test_a_missing_folder_is_named_as_the_configuration_has_it(refuse, call):
    """By an environment variable only if its value is where the folder is looked for."""
    config = PROJECT / "configs" / "listops_small.py"
    refuse("train", config, parts=("no data at data/listops_small/", "long_range_arena.generate", "LISTOPS_SMALL"))
    options = [f"{split}_dataloader.dataset.data_root=elsewhere" for split in SPLITS]
    status, _, errors = call("train", config, "--cfg-options", *options)
    (line,) = error_lines(errors)
    assert status == 2 and "no data at elsewhere/" in line and "environment variable" not in line


def test_too_long_expressions(refuse, monkeypatch, tmp_path):
    write(tmp_path / "listops")
    monkeypatch.setenv("LISTOPS_SMALL", str(tmp_path / "listops"))
    options = [f"{split}_dataloader.dataset.length=20" for split in SPLITS]
    config = PROJECT / "configs" / "listops_small.py"
    refuse("train", config, "--cfg-options", *options, parts=("basic_train.tsv, line ", "the data set's length is 20"))


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
    commands = [command for command in blocks() if command[0] == "python"]
    assert {command[1] for command in commands} == {"-m", "tools/train.py", "tools/test.py", "tools/study.py"}
    named = {ROOT / part for command in commands for part in command if part.startswith("projects/")}
    assert named == set(CONFIGS)
    text = (PROJECT / "README.md").read_text()
    archives = set(re.findall(r"\(https:\S+/(\S+gz)\)", text))
    folder, *unpacked = [command for command in blocks() if command[0] != "python"]
    assert folder == ["mkdir", "-p", "data"]
    assert sorted(unpacked) == sorted(["tar", "xzf", name, "-C", "data"] for name in archives) and len(archives) == 3


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
    assert status == 2 and "with conditioning='pc'" in error_lines(errors)[0]


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["none", "pc"])
def test_the_small_listops_is_learnt(conditioning, tmp_path, call, monkeypatch):
    """With shorter expressions and fewer iterations than the README's: better than always the commonest value."""
    monkeypatch.setenv("LISTOPS_SMALL", str(tmp_path / "listops"))
    limits = grammar.Limits(max_depth=3, max_args=5, min_length=20, max_length=60)
    generator.write_listops(tmp_path / "listops", dict(train=8000, val=1000, test=1000), limits, 0)
    options = ["train_cfg.max_iters=400", "train_cfg.val_interval=400", "param_scheduler.1.T_max=400"]
    options += [f"{split}_dataloader.dataset.length=64" for split in SPLITS]
    options += ["model.encoder.module.length=64", f"model.encoder.conditioning={conditioning}"]
    status, output, errors = call("train", PROJECT / "configs" / "listops_small.py", "--cfg-options", *options)
    assert not status, errors
    (accuracy,) = re.findall(r"accuracy/top1: ([\d.]+)", output + errors)
    values = [line.split("\t")[1] for line in (tmp_path / "listops" / "basic_val.tsv").read_text().splitlines()[1:]]
    commonest = 100 * max(map(values.count, values)) / len(values)
    assert float(accuracy) > commonest + 5


def test_the_generator_says_what_is_wrong(tmp_path):
    result = run(sys.executable, "-m", "long_range_arena.generate", tmp_path, cwd=tmp_path, status=2)
    assert result.stderr.startswith("error: ") and "exists already" in result.stderr and not list(tmp_path.iterdir())
