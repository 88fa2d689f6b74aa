"""The same training in several processes, on several machines, with accumulation, compiled, and in less memory."""

import os
import subprocess
import sys

import pytest
import timm
import torch
import torch.distributed.fsdp
from runs import DEMO, TOOLS, first_iteration, forwarded, free_port, run
from torch import nn

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.registry import MODELS

import condattn.registry  # noqa: F401
from condattn.openmmlab import processes
from condattn.openmmlab.errors import UserError
from condattn.openmmlab.runner.sharding import FSDP2Strategy, check_shardable, transformer_blocks

# No warm-up, a loss that is the mean over samples, and a learning rate that does not amplify rounding errors.
PLAIN = """
model = dict(decode_head=dict(loss_decode=dict(class_weight=None)))
randomness = dict(seed=0)
custom_hooks = []
train_dataloader = dict(sampler=dict(type='InfiniteSampler'))
param_scheduler = []
optim_wrapper = dict(_delete_=True, type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
default_hooks = dict(logger=dict(interval=1))
"""
DISTRIBUTED = (TOOLS / "train.py", "--launcher", "pytorch")
OFTEN = "default_hooks.checkpoint.interval=1"
CLIPPED = "optim_wrapper.clip_grad.max_norm=1.0"
SHARDED = ("runner_type=FlexibleRunner", "strategy.type=FSDP2Strategy")
SLIDING = "dict(test_cfg=dict(mode='slide', crop_size=(9, 9), stride=(9, 9)))"
# With a validation, and thus a best checkpoint, before the last iteration.
HALVES = ("train_dataloader.batch_size=2", CLIPPED, OFTEN, "train_cfg.val_interval=2", *SHARDED)
sharding = pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="this torch has no FSDP2")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Start runs on the CPU, on any machine: each process would need a GPU of its own."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def plain(small, tmp_path):
    """The command of a short, plain training of the demo segmenter; and the weights that it ends with."""
    (tmp_path / "plain.py").write_text(f"_base_ = {str(DEMO / 'upernet_swin_pc.py')!r}\n{PLAIN}")

    def train(name, *options, iterations=2, script=(TOOLS / "train.py",), flags=(), environments=({},)):
        settings = [
            *small,
            f"train_cfg.max_iters={iterations}",
            f"train_cfg.val_interval={iterations}",
            f"default_hooks.checkpoint.interval={iterations}",
            "default_hooks.checkpoint.max_keep_ckpts=-1",
            *options,
        ]
        start, *rest = script
        command = [
            start,
            tmp_path / "plain.py",
            *rest,
            "--work-dir",
            tmp_path / name,
            *flags,
            "--cfg-options",
            *settings,
        ]
        if len(environments) == 1:
            run(*command, cwd=tmp_path, **environments[0])
        else:
            together([sys.executable, *command], tmp_path, environments)
        return torch.load(tmp_path / name / f"iter_{iterations}.pth", weights_only=False)["state_dict"]

    return train


def together(command, folder, environments):
    """Run a command once for each environment, at the same time; all must succeed."""
    base = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
    processes = [
        subprocess.Popen([str(part) for part in command], env={**base, **env}, **pipes) for env in environments
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=500)
            assert process.returncode == 0, output[-3000:]
    finally:
        for process in processes:
            process.kill()


def two_processes():
    """Environment variables that a launcher sets for two processes on this machine."""
    address = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    return [dict(RANK=str(rank), LOCAL_RANK=str(rank), **address) for rank in range(2)]


def forget(folder, iteration):
    """Remove the last checkpoint of a run, as if the run had been stopped before it."""
    (folder / f"iter_{iteration}.pth").unlink()
    (folder / "last_checkpoint").write_text(str(folder / f"iter_{iteration - 1}.pth"))


def check_close(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_processes_train_as_one_with_both_batches(plain, tmp_path):
    one = plain("one", "train_dataloader.batch_size=4", OFTEN)
    before = torch.load(tmp_path / "one" / "iter_1.pth", weights_only=False)["state_dict"]
    moved = [name for name in one if not torch.allclose(one[name], before[name], rtol=1e-4, atol=1e-5)]
    assert len(moved) > len(one) // 2
    two = plain(
        "two",
        "train_dataloader.batch_size=2",
        script=DISTRIBUTED,
        environments=two_processes(),
    )
    check_close(two, one)


@forwarded
@pytest.mark.slow
def test_two_processes_resume_exactly(plain, tmp_path):
    """Each process has its own random numbers."""
    options = ("model.backbone.drop_path_rate=0.5", OFTEN)
    whole = plain("run", *options, iterations=3, script=DISTRIBUTED, environments=two_processes())
    forget(tmp_path / "run", 3)
    resume = dict(iterations=3, script=DISTRIBUTED, flags=("--resume",))
    resumed = plain("run", *options, environments=two_processes(), **resume)
    assert first_iteration(tmp_path / "run") > 1
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_two_machines_train_together(plain, tmp_path):
    """Two torchrun nodes on loopback addresses, one process each."""
    one = plain("one", "train_dataloader.batch_size=4")
    launcher = tmp_path / "node.py"
    launcher.write_text(
        "import subprocess, sys\n"
        f"sys.exit(subprocess.call(['bash', {str(TOOLS / 'dist_train.sh')!r}, sys.argv[1], '1', *sys.argv[2:]]))\n"
    )
    port = free_port()
    nodes = [dict(NNODES="2", NODE_RANK=str(rank), MASTER_ADDR="127.0.0.1", PORT=port) for rank in range(2)]
    two = plain("nodes", "train_dataloader.batch_size=2", script=(launcher,), environments=nodes)
    check_close(two, one)


@sharding
def test_a_sharded_training(plain, tmp_path):
    """A sharded training gives the same weights, and writes the same files."""
    one = plain("one", "train_dataloader.batch_size=4", CLIPPED, iterations=3)
    sharded = plain("sharded", *HALVES, iterations=3, script=DISTRIBUTED, environments=two_processes())
    check_close(sharded, one)
    files = list((tmp_path / "sharded").glob("*iter_*.pth"))
    assert len(files) >= 4  # including the best checkpoint
    for file in files:
        assert torch.load(file, weights_only=False)["meta"]["iter"] == int(file.stem.rpartition("_")[2])


@sharding
@pytest.mark.slow
def test_a_sharded_training_is_resumed(plain, tmp_path):
    """Resumed with sharding, the weights are equal bit for bit; resumed without, they are close."""
    sharded = plain("run", *HALVES, iterations=3, script=DISTRIBUTED, environments=two_processes())
    forget(tmp_path / "run", 3)
    resume = dict(iterations=3, flags=("--resume",))
    resumed = plain("run", *HALVES, script=DISTRIBUTED, environments=two_processes(), **resume)
    assert first_iteration(tmp_path / "run") > 1
    assert all(torch.equal(resumed[name], sharded[name]) for name in sharded)
    forget(tmp_path / "run", 3)
    check_close(plain("run", "train_dataloader.batch_size=4", CLIPPED, OFTEN, **resume), sharded)


def test_the_blocks_of_a_model():
    swin = MODELS.build(dict(type="mmdet.SwinTransformer", depths=(1, 1, 2, 1)))
    names = {module: name for name, module in swin.named_modules()}
    blocks = [names[block] for block in transformer_blocks(swin)]
    assert blocks == [f"stages.{stage}.blocks.{block}" for stage, block in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))]
    vit = timm.create_model("test_vit")
    assert transformer_blocks(vit) == list(vit.blocks)
    assert transformer_blocks(nn.MultiheadAttention(4, 2)) == []
    levit = timm.create_model("levit_128s", num_classes=0)  # has nested blocks
    names = [name for block in transformer_blocks(levit) for name, module in levit.named_modules() if module is block]
    assert names.index("stages.1.blocks.0") < names.index("stages.1")
    coat = timm.create_model("coat_lite_tiny")  # its blocks share parameters
    assert transformer_blocks(coat) == []


@pytest.fixture
def group(monkeypatch):
    """A distributed run of one process."""
    for name, value in dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port()).items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.destroy_process_group()


@sharding
@pytest.mark.parametrize("settings", [{}, dict(strength=1.0, relative=True), dict(form="svd")])
def test_corrected_weights_are_sharded_and_loaded(group, tmp_path, settings):
    conditioning = dict(type="SpectralCorrection", **settings)
    build = lambda seed: (  # noqa: E731
        torch.manual_seed(seed),
        MODELS.build(dict(type="ConditionedTimmBackbone", model_name="test_vit", conditioning=conditioning)),
    )[1].eval()
    plain, x = build(0), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = plain(x)[0]
        for weights in (plain.state_dict(), {k: v for k, v in plain.state_dict().items() if "correction" not in k}):
            strategy = FSDP2Strategy(work_dir=str(tmp_path))
            strategy.model = strategy._wrap_model(build(1))
            strategy.load_model_state_dict(weights)
            assert all(hasattr(parameter, "full_tensor") for parameter in strategy.model.parameters())
            torch.testing.assert_close(strategy.model(x)[0], want)
            saved = strategy.model_state_dict()
            assert all(torch.equal(value, saved[name]) for name, value in plain.state_dict().items())


@sharding
@pytest.mark.parametrize(
    "settings, options, part",
    [
        ("custom_hooks = [dict(type='CalibrationHook')]", SHARDED, "calibrate.py"),
        ("custom_hooks = [dict(type='SpectraHook')]", SHARDED, "tools/analysis/spectra.py"),
        ("find_unused_parameters = True", SHARDED, "find_unused_parameters"),
        (f"model = {SLIDING}", SHARDED, "model.test_cfg.mode='slide'"),
        (f"model = dict(_delete_=True, type='Conditioned', module={SLIDING})", SHARDED, "model.module.test_cfg.mode"),
        (f"model = dict(type='Conditioned', module='EncoderDecoder', {SLIDING[5:]}", SHARDED, "model.test_cfg.mode"),
        ("", SHARDED[1:], "FlexibleRunner"),
    ],
)
def test_what_a_sharded_training_cannot_have(refuse, tmp_path, settings, options, part):
    base = f"_base_ = {str(DEMO / 'upernet_swin_pc.py')!r}\ncustom_hooks = []"
    (tmp_path / "config.py").write_text(f"{base}\n{settings}\n")
    parts = ("FSDP2Strategy", part)
    refuse("train", "config.py", "--launcher", "pytorch", "--cfg-options", *options, parts=parts)


def test_moving_averages_need_another_runner(refuse):
    options = ["runner_type=FlexibleRunner", "default_hooks.average.type=EMAHook"]
    parts = ("FlexibleRunner loads checkpoints before EMAHook has its copy",)
    refuse("train", DEMO / "upernet_swin_pc.py", "--cfg-options", *options, parts=parts)


@sharding
def test_a_sharded_model_is_not_tested_with_augmentation(refuse):
    command = ["test", DEMO / "upernet_swin_pc.py", "x.pth", "--tta", "--launcher", "pytorch", "--cfg-options"]
    refuse(*command, *SHARDED, "custom_hooks=[]", parts=("--tta expects a model that is not sharded",))


@sharding
def test_blocks_may_stay_gathered(group, tmp_path, monkeypatch):
    asked, shard = [], torch.distributed.fsdp.fully_shard

    def record(module, **settings):
        asked.append(settings)
        return shard(module, **settings)

    monkeypatch.setattr(torch.distributed.fsdp, "fully_shard", record)
    model = timm.create_model("test_vit")
    FSDP2Strategy(work_dir=str(tmp_path), reshard_after_forward=False)._wrap_model(model)
    assert asked == [dict(reshard_after_forward=False)] * len(model.blocks) + [{}]


@pytest.mark.parametrize("device, message", [("cuda", "shows 1 GPUs, but 2 or more"), ("cpu", "set MASTER_ADDR to")])
def test_processes_that_cannot_be_joined(device, message, monkeypatch):
    for name, value in dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(processes, "get_device", lambda: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=message):
        processes.start_processes(Config(dict(launcher="pytorch")))


def test_single_numbers_cannot_be_sharded():
    model = nn.Sequential(nn.Linear(2, 2), nn.Module())
    model[1].scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UserError, match=r"1\.scale"):
        check_shardable(model)
    check_shardable(model[0])


@pytest.mark.slow
def test_gradients_are_accumulated(plain):
    one = plain("one", "train_dataloader.batch_size=4", iterations=1)
    steps = plain("steps", "train_dataloader.batch_size=2", "optim_wrapper.accumulative_counts=2", iterations=2)
    check_close(steps, one)


@pytest.mark.slow
def test_activations_are_recomputed(plain):
    check_close(plain("less", "model.backbone.with_cp=True"), plain("all"))


@pytest.mark.slow
def test_a_compiled_backbone(plain):
    check_close(plain("compiled", flags=("--compile", "eager")), plain("eager"))


@pytest.mark.slow
def test_the_learning_rate_follows_the_batch_size(plain):
    """With half of the 8 images that the configured rate is for, the rate is halved."""
    half = plain("half", "train_dataloader.batch_size=4", "optim_wrapper.optimizer.lr=0.005")
    check_close(plain("scaled", "train_dataloader.batch_size=4", flags=("--auto-scale-lr",)), half)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision(dtype, call, segmentation_options, monkeypatch):
    """The runner gets the settings of mixed precision, on a machine that seems to have a GPU."""
    from condattn.openmmlab.runner import launch

    asked = []
    monkeypatch.setattr("mmengine.device.get_device", lambda: "cuda")
    monkeypatch.setattr(launch, "build_runner", lambda cfg, *_: asked.append(cfg.optim_wrapper) or sys.exit(7))
    command = ["train", DEMO / "upernet_swin_pc.py", "--amp", dtype, "--cfg-options", *segmentation_options]
    assert call(*command)[0] == 7
    assert (asked[0].type, asked[0].dtype) == ("AmpOptimWrapper", dtype)


def test_a_backend_that_is_not_there(refuse):
    refuse("train", DEMO / "upernet_swin_pc.py", "--compile", "abacus", parts=("--compile", "abacus", "inductor"))


LOSS = """
import os, sys, types
import torch
from condattn.openmmlab.errors import UserError
from condattn.openmmlab.hooks.finite_loss import FiniteLossHook

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return {"loss_mask": self.attention(x, x, x)[0].mean(), "loss_box": x.mean()}

torch.distributed.init_process_group("gloo")
model = Model()
if os.environ["RANK"] == "1":
    model.attention.in_proj_weight.data[0, 0] = torch.nan
hook = FiniteLossHook()
hook.before_train(types.SimpleNamespace(model=model, work_dir=".", iter=4))
try:
    model(torch.randn(2, 4, 8))
except UserError as error:
    told = "loss_mask is not finite in iteration 5; weights that are not finite at attention;" in str(error)
    torch.distributed.barrier()
    os._exit(not told)  # whose threads would else be ended in the middle
os._exit(3)
"""


def test_processes_stop_together(tmp_path):
    """One process has a non-finite loss; both stop and print the reason."""
    (tmp_path / "loss.py").write_text(LOSS)
    together([sys.executable, tmp_path / "loss.py"], tmp_path, two_processes())


PLAIN_TORCH = """
import os

import timm
import torch
from torch import distributed, nn

import condattn

distributed.init_process_group("gloo")
rank = distributed.get_rank()
for conditioning in ("sc(relative=True)+pc", "ct+pc", "ci+sc"):
    for name in ("vit_tiny_patch16_224", "beit_base_patch16_224"):  # BEiT reads the weights of its layers itself
        for broadcast in (True, False):
            torch.manual_seed(0)
            model = timm.create_model(name, img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=5)
            condattn.condition(model, conditioning)
            parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast)
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            torch.manual_seed(1 + rank)
            for _ in range(2):
                optimizer.zero_grad()
                parallel(torch.randn(2, 3, 32, 32)).square().mean().backward()
                optimizer.step()
            own = torch.cat([value.float().flatten() for value in model.state_dict().values()])
            first = own.clone()
            distributed.broadcast(first, 0)
            assert own.isfinite().all() and torch.equal(own, first), (conditioning, name, broadcast)
distributed.barrier()
os._exit(0)  # whose threads would else be ended in the middle
"""


@pytest.mark.slow
def test_two_processes_of_plain_torch_stay_equal(tmp_path):
    """Weights, and the corrections that are computed from them, with and without a broadcast of buffers."""
    pytest.importorskip("timm")
    (tmp_path / "plain_torch.py").write_text(PLAIN_TORCH)
    together([sys.executable, tmp_path / "plain_torch.py"], tmp_path, two_processes())
