"""Bad weight files: each is refused with a one-line error, nothing in it is executed, and the model is unchanged."""

import hashlib
import io
import os
import pickle
import sys
import zipfile
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from runs import Malice
from torch import nn

import condattn
from condattn.weights.atomic import write_atomically
from condattn.weights.files import BadFileError, describe_wrong_hash, read_file
from condattn.weights.load import ConversionError, load_pretrained

timm = pytest.importorskip("timm")
SETTINGS = dict(img_size=32, depth=3, embed_dim=24, num_heads=3, num_classes=5)


def vit(name="vit_tiny_patch16_224", **settings):
    return timm.create_model(name, **{**SETTINGS, **settings})


def saved(content, **settings):
    buffer = io.BytesIO()
    torch.save(content, buffer, **settings)
    return buffer.getvalue()


def safetensors(weights):
    from safetensors.torch import save

    return save({name: value.contiguous() for name, value in weights.items()})


def cut(content, share):
    return content[: int(len(content) * share)]


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def with_value(name, value):
    weights = vit().state_dict()
    weights[name] = weights[name].clone()
    weights[name].view(-1)[0] = value
    return saved(weights)


def torn(content):
    """A file of full length whose zip directory, at its end, is partly zeros."""
    return content[:-400] + bytes(300) + content[-100:]


def no_shape(weights):
    return {name: value.reshape(-1) for name, value in weights.items()}


WHOLE = saved(vit().state_dict())
OLD = saved(vit().state_dict(), _use_new_zipfile_serialization=False)
# Name of the file -> its content, and a part of the error message.
FILES = {
    "empty.pth": (b"", "is empty"),
    "empty.safetensors": (b"", "is empty"),
    "cut after a byte.pth": (WHOLE[:1], "no file of weights, or cut short"),
    "cut after the head.pth": (WHOLE[:64], "no file of weights, or cut short"),
    "cut at a quarter.pth": (cut(WHOLE, 0.25), "no file of weights, or cut short"),
    "cut in the middle.pth": (cut(WHOLE, 0.5), "no file of weights, or cut short"),
    "cut near the end.pth": (WHOLE[:-30], "no file of weights, or cut short"),
    "old and cut.pth": (cut(OLD, 0.5), "no file of weights, or cut short"),
    "old and cut early.pth": (OLD[:40], "no file of weights, or cut short"),
    "torn.pth": (torn(WHOLE), "no file of weights, or cut short"),
    "text.pth": (b"<html>404 Not Found</html>", "no file of weights, or cut short"),
    "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\n", "no file of weights"),
    "noise.pth": (bytes(range(256)) * 40, "no file of weights, or cut short"),
    "picture.pth": (b"\x89PNG\r\n\x1a\n" + bytes(64), "no file of weights, or cut short"),
    "archive.pth": (zipped(a="b"), "no file of weights, or cut short"),
    "cut.safetensors": (cut(safetensors(vit().state_dict()), 0.5), "no safetensors file, or cut short"),
    "torch.safetensors": (WHOLE, "no safetensors file, or cut short"),
    "number.pth": (saved(3), "holds a int; expected a dictionary of weights"),
    "list.pth": (saved([torch.ones(1)]), "holds a list; expected a dictionary of weights"),
    "no weights.pth": (saved({"epoch": 3, "state_dict": {}}), "holds no weights"),
    "nothing.pth": (saved({}), "holds no weights; its entries are nothing"),
    "plain pickle.pth": (pickle.dumps({"a": [1]}), "no file of weights, or cut short|holds no weights"),
    "another network.pth": (saved(nn.Linear(2, 2).state_dict()), "no weight .* has a place in the model"),
    "swin.pth": (
        saved({"layers.0.blocks.0.norm1.weight": torch.ones(24)}),
        "no weight .* has a place in the model: .* layers.0.blocks.0.norm1.weight",
    ),
    "shallower.pth": (saved(vit(depth=2).state_dict()), "it has no blocks.2.norm1.weight"),
    "deeper.pth": (saved(vit(depth=4).state_dict()), "the model has no blocks.3.norm1.weight"),
    "wider.pth": (saved(vit(embed_dim=36).state_dict()), "is 1 x 1 x 36 there, 1 x 1 x 24 in the model"),
    "other patches.pth": (saved(vit(patch_size=8).state_dict()), "patch_embed.proj.weight is 24 x 3 x 8 x 8 there"),
    "other mlp.pth": (saved(vit(mlp_ratio=2).state_dict()), "mlp.fc1.weight is 48 x 24 there, 96 x 24 in the model"),
    "flat.pth": (saved(no_shape(vit().state_dict())), "of another model: cls_token is 24 there, 1 x 1 x 24"),
    "NaN.pth": (with_value("blocks.1.mlp.fc1.weight", float("nan")), "damaged: blocks.1.mlp.fc1.weight .*not finite"),
    "infinite.pth": (with_value("norm.bias", float("inf")), "damaged: norm.bias has values that are not finite"),
    "overflown half.pth": (
        saved({name: (value * 1e6).half() for name, value in vit().state_dict().items()}),
        "damaged: .* has values that are not finite",
    ),
}


def check_refused(path, message, kind=ValueError):
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((BadFileError, ConversionError), match=message) as caught:
        load_pretrained(model, path)
    assert "\n" not in str(caught.value) and isinstance(caught.value, kind)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", FILES)
def test_bad_files(name, tmp_path):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    check_refused(tmp_path / name, message)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == content


def test_no_file(tmp_path):
    check_refused(tmp_path / "nowhere.pth", "there is no file .*nowhere.pth", kind=FileNotFoundError)
    check_refused(tmp_path, "is a folder; expected a file", kind=IsADirectoryError)
    (tmp_path / "dangling.pth").symlink_to("nowhere")
    check_refused(tmp_path / "dangling.pth", "there is no file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    (tmp_path / "secret.pth").write_bytes(WHOLE)
    (tmp_path / "secret.pth").chmod(0)
    check_refused(tmp_path / "secret.pth", "may not be read")


def test_a_refused_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "secret.pth").write_bytes(WHOLE)

    def deny(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", deny)
    check_refused(tmp_path / "secret.pth", "may not be read: Permission denied", kind=PermissionError)


@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("where", ["beside", "inside"])
def test_code_is_not_executed(where, zip_format, tmp_path):
    malice = Malice(tmp_path / "executed")
    content = {"state_dict": vit().state_dict(), "x": malice} if where == "beside" else {"state_dict": malice}
    (tmp_path / "evil.pth").write_bytes(saved(content, _use_new_zipfile_serialization=zip_format))
    check_refused(tmp_path / "evil.pth", r"holds more than weights \(.*mkdir.*\), .*unsafe=True")
    assert not (tmp_path / "executed").exists()
    read_file(tmp_path / "evil.pth", unsafe=True)
    assert (tmp_path / "executed").is_dir()


class Reach:
    """An object whose pickle accesses an attribute that leads to torch's list of allowed globals."""

    def __reduce__(self):
        return getattr, (torch._utils._rebuild_tensor_v2, "__globals__")


def test_the_statistics_of_a_log_are_all_that_can_be_reached(tmp_path):
    pytest.importorskip("mmengine")
    from mmengine.logging import HistoryBuffer

    torch.save({"state_dict": vit().state_dict(), "x": Reach()}, tmp_path / "evil.pth")
    check_refused(tmp_path / "evil.pth", "holds more than weights .*unsafe=True")
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({"state_dict": vit().state_dict(), "x": buffer, "mean": HistoryBuffer.mean}, tmp_path / "good.pth")
    content = read_file(tmp_path / "good.pth")
    assert content["x"].mean() == 1.5 and content["mean"] is HistoryBuffer.mean


def test_addresses_are_cached_apart(tmp_path, monkeypatch):
    def download(address, path):
        torch.save({"weight": torch.full((1,), float(address.split("/")[3]))}, path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for number in (1, 2, 1):
        content = read_file(f"https://example.org/{number}/model.pth?download=true")
        assert content["weight"] == number


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_page_that_was_downloaded_in_place_of_weights_is_not_kept(name, tmp_path, monkeypatch):
    pytest.importorskip("safetensors")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda address, path: Path(path).write_text("<html>log in</html>" * 9)
    )
    check_refused(f"https://example.org/{name}", "or cut short: copy or download it again")
    assert [path.suffix for path in (tmp_path / "checkpoints").iterdir()] == [".lock"]


def test_what_cannot_be_downloaded_is_an_os_error(tmp_path, monkeypatch):
    def offline(address, path):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    check_refused("https://example.org/model.pth", "cannot be downloaded; is there a network", kind=OSError)


HASH = hashlib.sha256(b"weights").hexdigest()


@pytest.mark.parametrize(
    "name, wrong",
    [
        (f"swin-{HASH[:8]}.pth", False),
        (f"swin_20210526-{HASH[:8]}.pth", False),
        (f"swin-{HASH}.safetensors", False),
        ("swin-0a1b2c3d.pth", True),
        ("swin_20210526_132952-0a1b2c3d.pth", True),
        (f"swin-{HASH[:-1]}x.pth", False),
        ("swin-20210526.pth", False),
        ("swin-20210526132952.pth", False),
        ("swin-20219926.pth", True),
        ("swin-0a1b2c.pth", False),
        ("swin.pth", False),
        ("0a1b2c3d.pth", False),
    ],
)
def test_the_hash_in_a_name(name, wrong, tmp_path):
    (tmp_path / name).write_bytes(b"weights")
    told = describe_wrong_hash(tmp_path / name)
    assert bool(told) == wrong
    if wrong:
        assert f"its SHA-256 starts with {HASH[:8]}, not with {name.split('-')[-1][:8]}" in told


def test_a_whole_model_is_more_than_weights(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "model.pth")
    check_refused(tmp_path / "model.pth", "holds more than weights .*Linear.*unsafe=True")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_good_files(suffix, tmp_path):
    weights = vit().state_dict()
    content = safetensors(weights) if suffix == ".safetensors" else saved(weights)
    (tmp_path / f"good{suffix}").write_bytes(content)
    (tmp_path / "old.pth").write_bytes(saved(weights, _use_new_zipfile_serialization=False))
    for name in (f"good{suffix}", "old.pth"):
        target = vit()
        report = load_pretrained(target, tmp_path / name)
        assert (report.missing, report.left_out) == ([], [])
        assert all(torch.equal(value, weights[key]) for key, value in target.state_dict().items())


def test_tensors_beside_the_weights(tmp_path):
    """As PyTorch's example of a training saves the best accuracy."""
    source, target = vit(), vit()
    torch.save({"epoch": 1, "best_acc1": torch.tensor(1.0), "state_dict": source.state_dict()}, tmp_path / "a.pth")
    report = load_pretrained(target, tmp_path / "a.pth")
    assert (report.missing, report.left_out) == ([], []) and "(state_dict)" in report.path


def test_corrections_that_are_not_fixed_yet(tmp_path):
    """A file that was saved before the first forward has NaN in their place."""
    source, target = vit(), vit()
    for model in (source, target):
        condattn.condition(model, "sc(relative=True)")
    torch.save(source.state_dict(), tmp_path / "a.pth")
    assert any(value.isnan().any() for value in source.state_dict().values())
    load_pretrained(target, tmp_path / "a.pth")
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(source(x), target(x))


@pytest.mark.parametrize("name", ["a" * 251 + ".pth", "\u00e4" * 125 + ".pth"])
def test_a_name_as_long_as_file_systems_allow(name, tmp_path):
    write_atomically(tmp_path / name, lambda part: part.write_bytes(b"one"))
    assert (tmp_path / name).read_bytes() == b"one" and len(list(tmp_path.iterdir())) == 1


def test_what_is_written_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.pth"
    write_atomically(path, lambda part: part.write_bytes(b"one"))
    assert path.read_bytes() == b"one" and path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(FileExistsError, match="exists already"):
        write_atomically(path, lambda part: part.write_bytes(b"two"))

    def fail(part):
        part.write_bytes(b"half")
        raise RuntimeError("[enforce fail] . PytorchStreamWriter failed writing file")

    with pytest.raises(OSError, match="could not be written: .*PytorchStreamWriter"):
        write_atomically(path, fail, overwrite=True)
    assert path.read_bytes() == b"one" and len(list(tmp_path.iterdir())) == 1


def _umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_safetensors_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes(b"x")
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BadFileError, match="needs the package safetensors: pip install safetensors"):
        read_file(tmp_path / "a.safetensors")
