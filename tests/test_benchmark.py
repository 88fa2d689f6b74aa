"""The benchmark tool, on images so small that its numbers mean nothing; no number is tested."""

import json

import pytest
from runs import TOOLS, error_lines, run

pytest.importorskip("mmdet")


def benchmark(folder, *arguments, status=0, **env):
    command = [TOOLS / "analysis" / "benchmark.py", *arguments, "--repeats", "2", "--device", "cpu"]
    return run(*command, cwd=folder, status=status, **env)


def test_figures_of_every_kind(tmp_path):
    models = ("upstream", "sc:folded")
    settings = ("--models", ",".join(models), "--mode", "infer", "--size", "32x64", "--out", "figures.json")
    output = benchmark(tmp_path, *settings).stdout
    assert "2 interleaved rounds" in output and "32 x 64" in output
    found = json.loads((tmp_path / "figures.json").read_text())
    assert [one["model"] for one in found["figures"]] == list(models)
    first = found["figures"][0]
    assert first["ratio"] == first["memory_ratio"] == 1.0 and first["size"] == [32, 64]
    for one in found["figures"]:
        assert one["parameters"] == first["parameters"] > 27e6 and one["flops"] == first["flops"] > 0
        assert one["median_ms"] > 0 and one["peak_mib"] > one["beyond_imports_mib"] > 0
        assert one["matmul_floor_ms"] > 0 and one["traffic_floor_ms"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("network", ["vit-b", "mask-rcnn", "attention", "demo"])
@pytest.mark.parametrize("mode", ["train", "infer"])
def test_other_networks(tmp_path, network, mode):
    if network == "vit-b":
        pytest.importorskip("timm")
    models = "upstream,pc:torchvision" if network == "mask-rcnn" else "upstream,pc"
    settings = ("--models", models, "--network", network, "--mode", mode, "--size", "64")
    assert f"{models.partition(',')[2]} " in benchmark(tmp_path, *settings).stdout


@pytest.mark.slow
def test_a_sweep(tmp_path):
    settings = ("--models", "pc", "--network", "attention", "--sweep", "--size", "512")
    output = benchmark(tmp_path, *settings, "--out", "sweep.json").stdout
    assert "256 x 256" in output and "512 x 512" in output
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_bad_input(refuse, tmp_path):
    tool = "analysis/benchmark"
    refuse(tool, "--repeats", "1", parts=("--repeats", "2 or more"))
    refuse(tool, "--size", "big", parts=("--size", "HEIGHTxWIDTH", "big"))
    refuse(tool, "--sweep", "--size", "64", parts=("--sweep --size", "256 or more", "64"))
    refuse(
        tool, "--models", "pc:fast", "--size", "32", "--device", "cpu", parts=("':plain', ':folded' or ':torchvision'",)
    )
    for out, reason in (("nowhere/figures.json", "No such file"), (".", "Is a directory")):
        refuse(tool, "--out", out, parts=(f"--out: {out} cannot be written ({reason}", "choose another file"))
    (line,) = error_lines(benchmark(tmp_path, "--models", "colour", "--size", "32", status=2).stderr)
    assert "unknown conditioning 'colour'" in line


@pytest.mark.slow
def test_what_cannot_be_compiled_is_one_line(tmp_path):
    settings = ("--models", "pc", "--network", "attention", "--size", "64", "--compile")
    (line,) = error_lines(benchmark(tmp_path, *settings, status=2, CXX="false").stderr)
    assert "torch.compile failed on 'pc'" in line
