"""projects/pretraining: mmpretrain's recipes with conditioned attention, and weights that start detectors."""

import gzip
import re
import shlex
import shutil
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from runs import DEMO, ROOT, error_lines

pytest.importorskip("mmpretrain")
pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("timm")

import mmpretrain
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmpretrain.structures import DataSample

import condattn
import condattn.registry
from condattn.openmmlab.datasets.image_folders import class_names
from condattn.openmmlab.errors import UserError
from condattn.openmmlab.models.loading import check_start, record_of
from condattn.openmmlab.runner.launch import add_config_arguments, load_config

PROJECT = ROOT / "projects" / "pretraining"
CONFIGS = PROJECT / "configs"
README = (PROJECT / "README.md").read_text()
FASHION = CONFIGS / "swin_fashion_mnist.py"
FOLDER = CONFIGS / "swin_image_folder.py"
IMAGENET = {
    "vit-b_in1k": ("vision_transformer/vit-base-p16_64xb64_in1k.py", 12),
    "deit-b_in1k": ("deit/deit-base_16xb64_in1k.py", 12),
    "swin-b_in1k": ("swin_transformer/swin-base_16xb64_in1k.py", 24),
    "xcit-m_in1k": ("xcit/xcit-medium-24-p16_8xb128_in1k.py", 26),
    "davit-b_in1k": ("davit/davit-base_4xb256_in1k.py", 24),
}
"""Config -> the published config that it inherits, and how many attention modules the model has."""
VIT = dict(arch=dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=96))
STAGES = dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
SMALL = {
    "vit-b_in1k": (VIT, 48),
    "deit-b_in1k": (VIT, 48),
    "swin-b_in1k": (dict(arch=STAGES), 128),
    "xcit-m_in1k": (dict(embed_dims=48, depth=2, num_heads=3), 48),
    "davit-b_in1k": (dict(arch=STAGES), 128),
}
"""Config -> settings of a small backbone, and its channels."""
ATTENTION = {"pc": ["RowPreconditioner"], "sc": ["SpectralCorrection"], "ct": [], "ci": ["ConditionedInitialization"]}
IMAGES = torch.linspace(0, 255, 2 * 3 * 224 * 224).frac().mul(255).to(torch.uint8).reshape(2, 3, 224, 224)
TINY = [
    *("train_cfg.max_iters=2", "train_cfg.val_interval=2", "default_hooks.logger.interval=1"),
    *("train_dataloader.batch_size=4", "val_dataloader.batch_size=4", "test_dataloader.batch_size=4"),
]


def without_scope(node):
    """`node` without the scopes that inheritance from another package leaves."""
    if isinstance(node, dict):
        return {key: without_scope(value) for key, value in node.items() if key != "_scope_"}
    return [without_scope(child) for child in node] if isinstance(node, (list, tuple)) else node


def load(name, conditioning="pc", small=True):
    cfg = Config.fromfile(CONFIGS / f"{name}.py")
    cfg.model.backbone.conditioning = conditioning
    if small:
        settings, channels = SMALL[name]
        cfg.model.backbone.module.update(settings)
        cfg.model.head.in_channels = channels
    return cfg


def build(cfg):
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return MODELS.build({"data_preprocessor": cfg.get("data_preprocessor"), **cfg.model})


@pytest.mark.parametrize("name", IMAGENET)
def test_is_the_published_config_but_for_the_conditioning(name):
    path, _ = IMAGENET[name]
    ours, published = load(name, small=False), Config.fromfile(Path(mmpretrain.__file__).parent / ".mim/configs" / path)
    assert f"mmpretrain's {path}" in ours.text
    assert ours.model.backbone.type == "Conditioned"
    ours.model.backbone = ours.model.backbone.module
    assert published.keys() == ours.keys() - {"custom_imports"}
    for key in published:
        assert without_scope(ours[key]) == without_scope(published[key]), key


@pytest.mark.parametrize("name", IMAGENET)
def test_every_attention_module_is_conditioned(name):
    sites = condattn.conditioning_of(build(load(name, small=False)))
    assert len(sites) == IMAGENET[name][1]
    assert all([method["type"] for method in methods] == ["RowPreconditioner"] for methods in sites.values())


@pytest.mark.parametrize("name", IMAGENET)
def test_none_is_mmpretrains_own_model(name):
    cfg = load(name, "none")
    ours = build(cfg).eval()
    cfg.model.backbone = cfg.model.backbone.module
    own = build(cfg).eval()
    assert [(n, type(m)) for n, m in ours.named_modules()] == [(n, type(m)) for n, m in own.named_modules()]
    own.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(IMAGES.float()), own(IMAGES.float()))


@pytest.mark.parametrize("method", ["pc", "sc", "ct", "ci", "ci+pc", "sc(strength=10.0)"])
@pytest.mark.parametrize("name", IMAGENET)
def test_methods(name, method):
    """Each initialises and trains a step, by the one switch, and every attention module has it."""
    model = build(load(name, method))
    model.init_weights()
    sites = condattn.conditioning_of(model)
    expected = sorted(cls for part in method.split("(")[0].split("+") for cls in ATTENTION[part])
    inputs = [site for site, methods in sites.items() if [m["type"] for m in methods] == ["EmbeddedTokens"]]
    assert len(inputs) == ("ct" in method)
    for site in sites.keys() - set(inputs):
        assert sorted(m["type"] for m in sites[site]) == expected
    values = [site.v.weight for site in condattn.find_sites(model)] if method == "ci" else []
    for value in values:
        torch.testing.assert_close(value, torch.eye(*value.shape))
    weights = {n: p for n, p in model.named_parameters() if "qkv.weight" in n}
    before = {n: p.detach().clone() for n, p in weights.items()}
    samples = [DataSample().set_gt_label(label) for label in (3, 7)]
    optimizer = build_optim_wrapper(model, dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3)))
    losses = model.train().train_step(dict(inputs=list(IMAGES), data_samples=samples), optimizer)
    assert losses["loss"].isfinite()
    assert before
    assert [n for n, p in weights.items() if torch.equal(p, before[n])] == []


def commands(*parts):
    """The command lines of the README that have all of ``parts``, as lists of words, with paths of this repository."""
    lines = re.findall(r"^    ((?:\w+=\S+ )?(?:python|bash) tools/.*)$", README, re.MULTILINE)
    chosen = [line for line in lines if all(part in line for part in parts)]
    assert chosen
    return [[re.sub(r"^(projects|configs)/", rf"{ROOT}/\1/", word) for word in shlex.split(line)] for line in chosen]


def run_readme(call, command, options):
    """Run a line of the README, with ``options`` besides; return its status, output and errors."""
    command = command[1 if "=" in command[0] else 0 :]
    tool = re.fullmatch(r"tools/(\w+)\.py", command[1])[1]
    switch = [] if "--cfg-options" in command else ["--cfg-options"]
    return call(tool, *(word.replace("iter_400", "iter_2") for word in command[2:]), *switch, *options)


SMALL_TIMM = dict(embed_dim=48, depth=2, num_heads=3)
TARGETS = {
    "swin-b_in1k": ("mask_rcnn_swin-b_pc_3x", dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])),
    "xcit-m_in1k": ("mask_rcnn_xcit-m_pc_3x", dict(**SMALL_TIMM, out_indices=[1])),
    "davit-b_in1k": (
        "mask_rcnn_davit-t_pc_3x",
        dict(embed_dims=(16, 32, 64, 128), depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)),
    ),
    "deit-b_in1k": ("mask_rcnn_deit-s_pc_3x", dict(**SMALL_TIMM, mlp_ratio=2)),
    "vit-b_in1k": ("upernet_vit_pc", dict(embed_dims=48, num_layers=2, num_heads=3, mlp_ratio=2, out_indices=[1])),
}
"""Config of a classifier -> the one that the README fine-tunes it with, and settings that fit SMALL's backbone."""
UNUSED = {"xcit-m_in1k": "cls_token|ca_layers|norm", "davit-b_in1k": "norm3", "deit-b_in1k": "ln1"}
"""Parts of classifiers that features do without: the class attention of XCiT, and norms behind the last block."""


@pytest.mark.parametrize("name", TARGETS)
def test_every_pretrained_model_starts_a_detector_or_a_segmenter(name, tmp_path):
    """Its weights are in the backbone that the line of the README builds, bit for bit."""
    classifier = build(load(name))
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter)
    path = tmp_path / "epoch_300.pth"
    torch.save(dict(state_dict=classifier.state_dict(), meta=dict(conditioning=record_of(classifier))), path)
    config, small = TARGETS[name]
    (line,) = commands(f"work_dirs/{name}/epoch_300.pth", "configs/" + config)
    parser = ArgumentParser()
    add_config_arguments(parser)
    args = parser.parse_args([word.replace(f"work_dirs/{name}/epoch_300.pth", str(path)) for word in line[2:]])
    cfg = load_config(args.config, args.cfg_options)
    cfg.model.backbone.update(small)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        backbone = MODELS.build(cfg.model.backbone)
    backbone.init_weights()
    there = {parameter.detach().numpy().tobytes() for parameter in backbone.parameters()}
    parameters = {key: value for key, value in classifier.named_parameters() if key.startswith("backbone.")}
    absent = {key for key, value in parameters.items() if value.detach().numpy().tobytes() not in there}
    allowed = rf"backbone\.(pos_embed$|({UNUSED.get(name, '$')})\b)"  # position embeddings are interpolated
    assert len(parameters) > 20 and all(re.match(allowed, key) for key in absent), absent


def test_the_readme_names_every_config_and_its_lines_load():
    configs = set()
    for line in commands("in1k"):
        cfg = Config.fromfile(line[2])
        cfg.merge_from_dict(dict(word.split("=", 1) for word in line if re.match(r"model\.", word)))
        configs.add(Path(line[2]).stem)
    assert configs == {"vit-b_in1k", "swin-b_in1k", "xcit-m_in1k", *(config for config, _ in TARGETS.values())}
    assert all(f"[{name}.py](configs/{name}.py) | `{path[:-3]}`" in README for name, (path, _) in IMAGENET.items())


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """A folder with the four files of Fashion-MNIST, of a few images."""
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    for part, count in (("train", 20), ("t10k", 8)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(folder, part, images, (np.arange(count) % 10).astype(np.uint8))
    return folder


def write_idx(folder, part, images, labels):
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        with gzip.open(folder / f"{part}-{kind}-ubyte.gz", "wb") as file:
            file.write(header + array.tobytes())


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder for checkpoints, so that each is trained once."""
    return tmp_path_factory.mktemp("pretrained")


@pytest.fixture
def pretrain(call, fashion, kept, monkeypatch):
    """Train the demo as the README does, by two iterations; returns the checkpoint that its other lines name."""
    monkeypatch.setenv("FASHION_MNIST", str(fashion))

    def pretrain(conditioning="pc"):
        checkpoint = Path("work_dirs/swin_fashion_mnist/iter_2.pth").absolute()
        if not (kept / conditioning).exists():
            (line,) = commands("train.py", "configs/swin_fashion_mnist.py")
            status, _, errors = run_readme(call, line, [*TINY, f"model.backbone.conditioning={conditioning}"])
            assert not status, errors
            shutil.copy(checkpoint, kept / conditioning)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(kept / conditioning, checkpoint)
        return checkpoint

    return pretrain


def test_the_demo_is_evaluated(call, pretrain):
    pretrain()
    (line,) = commands("test.py", "configs/swin_fashion_mnist.py")
    status, output, errors = run_readme(call, line, TINY)
    assert not status, errors
    assert "test: IdxImages, 8 samples" in output
    assert "accuracy/top1" in output + errors


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["none", "pc"])
def test_the_demo_learns(conditioning, call, tmp_path, monkeypatch):
    """On scikit-learn's handwritten digits in the format of Fashion-MNIST, with fewer iterations than the README's."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = np.pad((digits.images * 15).astype(np.uint8).repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2)))
    for part, chosen in (("train", slice(None, 1400)), ("t10k", slice(1400, None))):
        write_idx(tmp_path, part, images[chosen], digits.target[chosen].astype(np.uint8))
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    options = ["train_cfg.max_iters=150", "train_cfg.val_interval=150", "param_scheduler.1.T_max=150"]
    options += ["train_dataloader.batch_size=32", f"model.backbone.conditioning={conditioning}"]
    status, output, errors = call("train", FASHION, "--cfg-options", *options)
    assert not status, errors
    (accuracy,) = re.findall(r"accuracy/top1: ([\d.]+)", output + errors)
    assert float(accuracy) > 40  # chance: 10


def options_of(words):
    return [word for word in words if re.match(r"model\.", word)]


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_fine_tuning_starts_from_the_pretrained_weights(task, call, pretrain, request):
    """With a learning rate of 0 the weights of the fine-tuned backbone are those of the checkpoint, bit for bit."""
    checkpoint = pretrain()
    config = {"detection": "mask_rcnn_swin_pc", "segmentation": "upernet_swin_pc"}[task]
    (line,) = commands(config, "swin_fashion_mnist")
    options = [*request.getfixturevalue(f"{task}_options"), "optim_wrapper.optimizer.lr=0"]
    status, output, errors = run_readme(call, line, options)
    assert not status, errors
    (said,) = set(re.findall(r"pretrained weights (.*)", output + errors))
    source = torch.load(checkpoint, weights_only=False)["state_dict"]
    theirs = {name: value for name, value in source.items() if re.match(r"backbone\.(?!.*index)", name)}
    assert f"{len(theirs)} weights loaded" in said and "not in the file" in said and "norm0" in said
    trained = Path("work_dirs/finetune", config.partition("_swin")[0], "last_checkpoint").read_text()
    weights = torch.load(trained, weights_only=False)["state_dict"]
    assert theirs and all(torch.equal(weights[name], value) for name, value in theirs.items())
    missing = {name for name in weights if name.startswith("backbone.")} - theirs.keys()
    assert {name for name in missing if "index" not in name} == {
        f"backbone.norm{i}.{p}" for i in (0, 1) for p in ("weight", "bias")
    }


@pytest.mark.parametrize("conditioning", ["pc", "none"])
def test_the_features_are_those_of_the_classifier(conditioning, pretrain):
    """Of the detector's backbone; weights that were trained without conditioning may start it as well."""
    checkpoint = pretrain(conditioning)
    classifier = build(Config.fromfile(FASHION))
    classifier.load_state_dict(dict(torch.load(checkpoint, weights_only=False)["state_dict"]))  # without its record
    settings = Config.fromfile(DEMO / "mask_rcnn_swin_pc.py").model.backbone
    with DefaultScope.overwrite_default_scope("mmdet"):
        backbone = MODELS.build({**settings, "init_cfg": dict(type="Pretrained", checkpoint=str(checkpoint))})
    backbone.init_weights()
    for size in ((48, 48), (96, 96), (40, 100)):
        image = torch.randn(2, 3, *size)
        with torch.no_grad():
            wanted, found = classifier.eval().backbone(image)[-1], backbone.eval()(image)[-1]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_another_conditioning_is_refused(pretrain, refuse):
    checkpoint = pretrain("sc")
    for config in ("mask_rcnn_swin_pc", "upernet_swin_pc"):
        (line,) = commands(config, "swin_fashion_mnist")
        options = [option.replace("iter_400", "iter_2") for option in options_of(line)]
        parts = (str(checkpoint.name), "conditioning='sc'", "conditioning='pc'", "6 of 6 places")
        refuse("train", DEMO / f"{config}.py", "--cfg-options", *options, parts=parts)


OTHERS = {
    "ViT": (
        dict(type="VisionTransformer", **VIT),
        ("vit_tiny_patch16_224", dict(embed_dim=48, depth=2, num_heads=3, mlp_ratio=2)),
    ),
    "XCiT": (
        dict(type="XCiT", patch_size=16, embed_dims=48, depth=2, num_heads=3, mlp_ratio=4, layer_scale_init_value=1.0),
        ("xcit_tiny_12_p16_224", dict(embed_dim=48, depth=2, num_heads=3)),
    ),
    "DaViT": (
        dict(type="DaViT", arch=STAGES),
        ("davit_tiny", dict(depths=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128), num_heads=(1, 2, 4, 8))),
    ),
    "Swin": (
        dict(type="SwinTransformer", arch=STAGES),
        ("swin_tiny_patch4_window7_224", dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))),
    ),
}


@pytest.mark.parametrize("conditioning", ["pc", "ct+pc"])
@pytest.mark.parametrize("family", OTHERS)
def test_the_conditioning_is_known_under_other_names(family, conditioning, tmp_path):
    """mmpretrain's checkpoint in timm's network: the same conditioning is taken, another one is refused."""
    module, (name, settings) = OTHERS[family]
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        source = MODELS.build(dict(type="Conditioned", module=module, conditioning=conditioning))
    classifier = torch.nn.ModuleDict(dict(backbone=source))
    path = tmp_path / "pretrained.pth"
    torch.save(dict(state_dict=classifier.state_dict(), meta=dict(conditioning=record_of(classifier))), path)
    backbone = dict(type="ConditionedTimmBackbone", model_name=name, checkpoint_path=str(path), **settings)
    MODELS.build({**backbone, "conditioning": conditioning}).init_weights()
    for other in ("sc", "none", "pc" if "ct" in conditioning else "ct+pc"):
        with pytest.raises(ValueError, match="of a model with conditioning="):
            MODELS.build({**backbone, "conditioning": other}).init_weights()


def test_a_record_of_an_unknown_naming_is_compared_as_it_is():
    model = torch.nn.ModuleDict(dict(block=torch.nn.MultiheadAttention(8, 2)))
    condattn.condition(model, "pc")
    checkpoint = dict(state_dict=model.state_dict(), meta=dict(conditioning=record_of(model)))
    check_start(checkpoint, "same.pth", model, "raw")
    condattn.remove(model)
    with pytest.raises(ValueError, match="is of a model with conditioning='pc'"):
        check_start(checkpoint, "other.pth", model, "raw")


def write_images(folder, classes):
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, names in classes.items():
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 256, (50, 120, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def test_a_folder_of_images(call, tmp_path, monkeypatch):
    line, test = commands("IMAGE_FOLDER=")
    variable, folder = line[0].split("=")
    assert str(write_images(tmp_path / "data" / "images", dict.fromkeys(("train", "val"), "abc"))).endswith(folder)
    monkeypatch.setenv(variable, folder)
    status, output, errors = run_readme(call, line, TINY)
    assert not status, errors
    assert "train: CustomDataset, 9 samples" in output
    weights = torch.load("work_dirs/swin_image_folder/iter_2.pth", weights_only=False)["state_dict"]
    assert weights["head.fc.weight"].shape == (3, 128)
    status, output, errors = run_readme(call, test, TINY)
    assert not status and "accuracy/top1" in output, errors


def test_folders_that_do_not_fit_are_refused(tmp_path, refuse, monkeypatch):
    assert class_names(write_images(tmp_path / "good", dict(train="ba", val="ab")), "x") == ["a", "b"]
    (tmp_path / "good" / "train" / "note.txt").touch()
    assert class_names(tmp_path / "good", "x") == ["a", "b"]
    for name, classes, message in (
        ("one", dict(train="a", val="a"), "at least two classes, found ['a']"),
        ("other", dict(train="ab", val="ac"), "not in both of train and val: b, c"),
        ("split", dict(train="ab"), "there is no folder"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            class_names(write_images(tmp_path / name, classes), "x")
    for path in (tmp_path / "good" / "val" / "a").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(UserError, match="without one in .*val: a"):
        class_names(tmp_path / "good", "x")
    monkeypatch.setenv("IMAGE_FOLDER", "nowhere")
    refuse("train", FOLDER, parts=("IMAGE_FOLDER names nowhere", "no folder nowhere/train", "name another"))


def test_missing_data_are_refused_before_anything_is_written(call, tmp_path, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST", "nowhere")
    status, _, errors = call("train", FASHION)
    (line,) = error_lines(errors)  # one for both, which are read from the same files
    assert status == 2 and line.startswith("error: train, val: ") and "in nowhere" in line
    assert "dataset-fashion-mnist" in line and line.endswith("from the environment variable FASHION_MNIST")
    status, _, errors = call("train", CONFIGS / "vit-b_in1k.py")
    assert status == 2
    for split, line in zip(("train", "val"), error_lines(errors), strict=True):
        assert f"data/imagenet/{split}" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content, message",
    [
        (b"\0\0\x0d\x01" + bytes(8), "expected an IDX file of bytes with 1 dimensions"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 8]) + bytes(7), "expected 8 values, got 7"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 7]) + bytes(7), "8 images and 7 labels of test"),
    ],
)
def test_idx_files_that_are_wrong(fashion, tmp_path, content, message):
    folder = shutil.copytree(fashion, tmp_path / "data")
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
    dataset = dict(type="IdxImages", data_root=str(folder), split="test")
    with pytest.raises(ValueError, match=message):
        DATASETS.build(dataset)
    with pytest.raises(ValueError, match="split: expected one of training, test, got 'train'"):
        DATASETS.build(dict(dataset, split="train"))
