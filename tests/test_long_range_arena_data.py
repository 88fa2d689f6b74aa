"""Long Range Arena: the readers of the five tasks."""

import csv
import pickle
import shutil
import statistics
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import Malice

pytest.importorskip("transformers")
pytest.importorskip("mmengine")

from long_range import PROJECT, SMALL, SPLITS
from long_range_arena import generate as generator
from long_range_arena import grammar, registry  # noqa: F401
from long_range_arena.datasets.aan import AanPairs
from long_range_arena.datasets.cifar import GreyCifar10
from long_range_arena.datasets.imdb import ImdbReviews
from long_range_arena.datasets.listops import NUMBERS, ListOps
from long_range_arena.datasets.pathfinder import Pathfinder32
from long_range_arena.errors import DataError
from long_range_arena.grammar import from_source
from mmengine.config import Config
from mmengine.registry import DATASETS
from PIL import Image


def rows(path):
    with path.open(newline="") as file:
        return list(csv.reader(file, delimiter="\t"))


def write(folder, seed=0, **numbers):
    return generator.write_listops(folder, numbers or dict(train=60, val=8, test=8), SMALL, seed)


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
        (
            "Source\tTarget\n( ( ( [MAX 1 ) 2 ) ] )\t2\n",
            "line 2: an expression of 4 tokens, and the data set's len",
        ),
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
    (tmp_path / "new_aan_pairs.eval.tsv").write_text("0\ta\tb\tx\n")
    with pytest.raises(DataError, match="line 1: expected a label .* two texts, .* found 4 fields"):
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
    Path(dataset.get_data_info(0)["path"]).write_text("no image")
    with pytest.raises(DataError, match=r"sample_\d+.png: expected an image, and it was not read"):
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


def test_the_folders_of_the_archive(tmp_path, monkeypatch):
    """The archive has the folder lra_release twice; the configurations find the data in either."""
    monkeypatch.setenv("LRA_DATA", str(tmp_path))
    datasets = {
        name: Config.fromfile(PROJECT / "configs" / f"{name}.py").test_dataloader.dataset
        for name in ("listops", "retrieval", "pathfinder")
    }
    for outer in ("lra_release", "lra_release/lra_release"):
        release = tmp_path / outer
        write(release / "listops-1000")
        (release / "tsv_data").mkdir()
        (release / "tsv_data" / "new_aan_pairs.test.tsv").write_text("1\te\tf\tz\tw\n")
        write_curves(release / "pathfinder32")
        for dataset in datasets.values():
            assert Path(DATASETS.build(dataset).data_root).parent == release
        for name in ("listops-1000", "tsv_data", "pathfinder32"):
            shutil.rmtree(release / name)
    with pytest.raises(DataError, match=r"no data at .*lra_release/tsv_data/new_aan.*: tar xzf lra_release.gz -C data"):
        DATASETS.build(datasets["retrieval"])


def test_a_split_that_does_not_exist(tmp_path):
    with pytest.raises(DataError, match="split: expected one of train, val, test, got 'training'"):
        ListOps(str(tmp_path), "training", 40)


# The model
