"""A resumed run continues with the learning rates of an uninterrupted run of its configuration."""

import itertools
import logging

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner import FlexibleRunner, Runner

from condattn.openmmlab.config_text import settings_of
from condattn.openmmlab.hooks import schedule
from condattn.openmmlab.hooks.atomic_checkpoint import AtomicCheckpointHook
from condattn.openmmlab.hooks.schedule import ScheduleHook
from condattn.openmmlab.runner.checkpoints import read_checkpoint, read_safely

NUMBERS = itertools.count()
# The results of epochs 3 and 5 are not in their checkpoints yet, and the next epoch has a better value.
METRICS = [5.0, 6.0, 4.9, 4.0, 3.9, 3.0, 3.5, 3.1, 3.2]


class Line(BaseModel):
    """A model of two linear layers with a loss."""

    def __init__(self, width=1):
        super().__init__()
        self.one, self.two = nn.Linear(2, width), nn.Linear(width, 1)

    def forward(self, *rows, mode):
        y = self.two(self.one(torch.stack(rows)))
        return {"loss": y.square().mean()} if mode == "loss" else [y.sum()]


class TwoLine(Line):
    """``Line`` with an optimizer for each layer."""

    def train_step(self, data, optim_wrapper):
        loss = self(*data, mode="loss")["loss"]
        loss.backward()
        for wrapper in optim_wrapper.optim_wrappers.values():
            wrapper.step()
            wrapper.zero_grad()
        return {"loss": loss.detach()}


class TwoOptimizers:
    """A constructor of several optimizers, as in mmengine's documentation."""

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        self.settings = optim_wrapper_cfg

    def __call__(self, model):
        return OptimWrapperDict(
            **{
                name: OptimWrapper(torch.optim.SGD(getattr(model, name).parameters(), lr=lr))
                for name, lr in self.settings["rates"].items()
            }
        )


OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=TwoOptimizers, force=True)


class Given(BaseMetric):
    """A validation metric with predefined values."""

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return {"error": METRICS[self.runner.epoch - 1 if self.runner.max_epochs > 1 else 0]}


class Record(Hook):
    """Record the learning rate and momentum of all parameter groups before each iteration."""

    def __init__(self):
        self.rates = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        wrappers = getattr(runner.optim_wrapper, "optim_wrappers", {"": runner.optim_wrapper})
        self.rates[runner.iter] = [
            [group.get(name) for name in ("lr", "momentum", "betas", "weight_decay")]
            for wrapper in wrappers.values()
            for group in wrapper.optimizer.param_groups
        ]


def run(folder, settings, resume=None, images=6, model=None, runner_type=Runner):
    """Train; return the learning rates, the runner and the lines with warnings."""
    settings = {
        "optim_wrapper": dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1, momentum=0.9)),
        "param_scheduler": None,
        **settings,
    }
    by_epoch = "max_epochs" in settings["train_cfg"]
    cfg = Config(
        dict(
            work_dir=str(folder),
            train_cfg=dict(by_epoch=by_epoch, val_interval=1 if by_epoch else 1000) | settings["train_cfg"],
            optim_wrapper=settings["optim_wrapper"],
            param_scheduler=settings["param_scheduler"],
            experiment_name=f"schedule {next(NUMBERS)}",
        )
    )
    record = Record()
    sampler = dict(type="DefaultSampler" if by_epoch else "InfiniteSampler", shuffle=False)
    loader = dict(batch_size=2, sampler=sampler)
    saving = AtomicCheckpointHook(interval=1, by_epoch=by_epoch)
    data = torch.linspace(-1, 1, 2 * images).view(images, 2)
    runner = runner_type(
        model=model or Line(),
        cfg=cfg,
        train_dataloader=dict(loader, dataset=data),
        val_dataloader=dict(loader, dataset=data[:2]) if by_epoch else None,
        val_cfg={} if by_epoch else None,
        val_evaluator=Evaluator(Given()) if by_epoch else None,
        default_hooks=dict(checkpoint=saving, logger=None),
        custom_hooks=[record, ScheduleHook()],
        load_from=resume and str(resume),
        resume=bool(resume),
        log_level="WARNING",
        **{key: cfg[key] for key in ("work_dir", "train_cfg", "optim_wrapper", "param_scheduler", "experiment_name")},
    )
    if by_epoch:
        runner.val_evaluator.metrics[0].runner = runner
    warnings = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda line: warnings.append(line.getMessage())
    runner.logger.addHandler(handler)
    runner.train()
    return record.rates, runner, [line for line in warnings if "the configuration's is used" in line]


def steps(length, **settings):
    return dict(train_cfg=dict(max_iters=length), param_scheduler=settings.pop("schedule"), **settings)


def epochs(length, **settings):
    return dict(train_cfg=dict(max_epochs=length), param_scheduler=settings.pop("schedule"), **settings)


def by_step(type, **settings):
    return dict(type=type, by_epoch=False, **settings)


def converted(type, **settings):
    return dict(type=type, by_epoch=True, convert_to_iter_based=True, **settings)


ADAM = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=0.01))


def sgd(**settings):
    return dict(type="OptimWrapper", optimizer=dict(type="SGD", **{"lr": 0.1, "momentum": 0.9, **settings}))


def warm(end, then):
    return [by_step("LinearLR", start_factor=0.01, begin=0, end=end), then]


# Name -> settings of the run that wrote the checkpoint, settings of the resumed run, position of the checkpoint.
LONGER = {
    "CosineAnnealingLR": (
        steps(8, schedule=by_step("CosineAnnealingLR", T_max=8)),
        steps(16, schedule=by_step("CosineAnnealingLR", T_max=16)),
    ),
    "CosineAnnealingLR without an end": (
        steps(8, schedule=by_step("CosineAnnealingLR", T_max=8, eta_min=0.01)),
        steps(16, schedule=by_step("CosineAnnealingLR", T_max=16, eta_min=0.01)),
    ),
    "LinearLR, PolyLR": (
        steps(8, schedule=warm(2, by_step("PolyLR", power=0.9, begin=2, end=8))),
        steps(16, schedule=warm(4, by_step("PolyLR", power=0.9, begin=4, end=16))),
    ),
    "PolyLR of the length of the run": (
        steps(8, schedule=by_step("PolyLR", eta_min=0.0)),
        steps(16, schedule=by_step("PolyLR", eta_min=0.0)),
    ),
    "LinearLR longer than the run": (
        steps(8, schedule=warm(20, by_step("CosineAnnealingLR", T_max=8))),
        steps(16, schedule=warm(12, by_step("CosineAnnealingLR", T_max=16))),
    ),
    "ExponentialLR": (
        steps(8, schedule=by_step("ExponentialLR", gamma=0.5)),
        steps(16, schedule=by_step("ExponentialLR", gamma=0.9)),
    ),
    "ConstantLR": (
        steps(8, schedule=by_step("ConstantLR", factor=0.1, end=20)),
        steps(16, schedule=by_step("ConstantLR", factor=0.5, end=12)),
    ),
    "StepLR": (
        steps(8, schedule=by_step("StepLR", step_size=3)),
        steps(16, schedule=by_step("StepLR", step_size=6)),
    ),
    "OneCycleLR": (
        steps(8, schedule=by_step("OneCycleLR", eta_max=0.3, total_steps=8)),
        steps(16, schedule=by_step("OneCycleLR", eta_max=0.3, total_steps=16)),
    ),
    "CosineRestartLR": (
        steps(8, schedule=by_step("CosineRestartLR", periods=[4, 4], restart_weights=[1, 0.5], eta_min=0)),
        steps(16, schedule=by_step("CosineRestartLR", periods=[6, 10], restart_weights=[1, 0.5], eta_min=0)),
    ),
    "another kind": (
        steps(8, schedule=by_step("CosineAnnealingLR", T_max=8)),
        steps(16, schedule=warm(4, by_step("StepLR", step_size=5))),
    ),
    "none any more": (steps(8, schedule=by_step("ExponentialLR", gamma=0.5)), steps(16, schedule=None)),
    "none before": (steps(8, schedule=None), steps(16, schedule=by_step("ExponentialLR", gamma=0.9))),
    "another rate": (
        steps(8, schedule=by_step("ExponentialLR", gamma=0.9), optim_wrapper=sgd()),
        steps(16, schedule=by_step("ExponentialLR", gamma=0.9), optim_wrapper=sgd(lr=0.3, weight_decay=0.1)),
    ),
    "another rate without a schedule": (
        steps(8, schedule=None, optim_wrapper=sgd()),
        steps(16, schedule=None, optim_wrapper=sgd(lr=0.3)),
    ),
    "a momentum": (
        steps(8, schedule=by_step("CosineAnnealingMomentum", T_max=8)),
        steps(16, schedule=by_step("CosineAnnealingMomentum", T_max=16)),
    ),
    "a momentum of Adam": (
        steps(8, schedule=[by_step("LinearMomentum", start_factor=0.5, end=8)], optim_wrapper=ADAM),
        steps(16, schedule=[by_step("LinearMomentum", start_factor=0.5, end=16)], optim_wrapper=ADAM),
    ),
    "a decay of one layer": (
        steps(8, schedule=by_step("PolyLR"), optim_wrapper=sgd() | dict(paramwise_cfg=dict(bias_lr_mult=2.0))),
        steps(16, schedule=by_step("PolyLR"), optim_wrapper=sgd() | dict(paramwise_cfg=dict(bias_lr_mult=3.0))),
    ),
    "several optimizers": (
        steps(
            8,
            schedule=by_step("PolyLR"),
            optim_wrapper=dict(constructor="TwoOptimizers", rates=dict(one=0.1, two=0.2)),
        ),
        steps(
            16,
            schedule=dict(one=by_step("PolyLR"), two=by_step("ExponentialLR", gamma=0.9)),
            optim_wrapper=dict(constructor="TwoOptimizers", rates=dict(one=0.1, two=0.4)),
        ),
    ),
    "epochs: MultiStepLR": (
        epochs(3, schedule=dict(type="MultiStepLR", milestones=[2], end=3)),
        epochs(9, schedule=dict(type="MultiStepLR", milestones=[3, 6, 8], end=9)),
    ),
    "epochs: LinearLR by steps, then MultiStepLR": (
        epochs(3, schedule=warm(4, dict(type="MultiStepLR", milestones=[1, 2], end=3))),
        epochs(9, schedule=warm(4, dict(type="MultiStepLR", milestones=[6, 8], end=9))),
    ),
    "epochs: all converted": (
        epochs(3, schedule=[converted("LinearLR", start_factor=0.01, end=1), converted("CosineAnnealingLR", T_max=3)]),
        epochs(9, schedule=[converted("LinearLR", start_factor=0.01, end=2), converted("CosineAnnealingLR", T_max=9)]),
    ),
    "epochs: ReduceOnPlateauLR": (
        epochs(5, schedule=dict(type="ReduceOnPlateauLR", monitor="error", patience=0, factor=0.5)),
        epochs(9, schedule=dict(type="ReduceOnPlateauLR", monitor="error", patience=0, factor=0.8)),
    ),
}


QUICK = ("CosineAnnealingLR", "OneCycleLR", "LinearLR, PolyLR", "a momentum of Adam", "several optimizers")


@pytest.mark.parametrize(
    "kind",
    [kind if kind in QUICK or "epochs" in kind else pytest.param(kind, marks=pytest.mark.slow) for kind in LONGER],
)
def test_a_longer_schedule_holds_from_the_position(kind, tmp_path):
    read_safely()
    old, new = LONGER[kind]
    by_epoch = "max_epochs" in old["train_cfg"]
    model = TwoLine if kind == "several optimizers" else Line
    rates, runner, _ = run(tmp_path / "old", old, model=model())
    wanted, _, _ = run(tmp_path / "whole", new, model=model())
    for position in (3, runner.epoch) if by_epoch else (5, 8):
        checkpoint = tmp_path / "old" / f"{'epoch' if by_epoch else 'iter'}_{position}.pth"
        found, _, (line,) = run(tmp_path / f"resumed{position}", new, resume=checkpoint, model=model())
        begin = position * 3 if by_epoch else position
        assert found == {step: rate for step, rate in wanted.items() if step >= begin}
        name = "max_epochs" if by_epoch else "max_iters"
        assert f"is used after {name[4:-1]} {position}: " in line.replace("iteration", "iter")
        assert f"train_cfg.{name} {old['train_cfg'][name]} -> {new['train_cfg'][name]}" in line
    assert any(wanted[step] != rate for step, rate in rates.items()), "the two schedules have to differ"


def test_a_flexible_runner_does_likewise(tmp_path):
    old, new = LONGER["epochs: all converted"]
    run(tmp_path / "old", old, runner_type=FlexibleRunner)
    wanted, _, _ = run(tmp_path / "whole", new, runner_type=FlexibleRunner)
    found, _, (line,) = run(tmp_path / "new", new, resume=tmp_path / "old/epoch_3.pth", runner_type=FlexibleRunner)
    assert found == {step: rate for step, rate in wanted.items() if step >= 9}
    assert "param_scheduler.0.end 1 -> 2" in line


@pytest.mark.parametrize("kind", ["LinearLR, PolyLR", "a momentum of Adam", "epochs: ReduceOnPlateauLR"])
def test_an_unchanged_configuration_goes_on_with_the_checkpoint_as_it_is(kind, tmp_path, monkeypatch):
    settings, _ = LONGER[kind]
    wanted, _, _ = run(tmp_path / "whole", settings)
    monkeypatch.setattr(schedule, "_step_to_position", None)
    unit, position = ("epoch", 3) if kind.startswith("epochs") else ("iter", 5)
    found, _, lines = run(tmp_path / "resumed", settings, resume=tmp_path / "whole" / f"{unit}_{position}.pth")
    assert found == {step: rate for step, rate in wanted.items() if step in found}
    assert not lines


def test_epochs_of_another_length(tmp_path):
    """The schedule is converted to the new number of steps; its units remain epochs."""
    settings = epochs(6, schedule=converted("CosineAnnealingLR", T_max=6))
    run(tmp_path / "old", settings)
    wanted, _, _ = run(tmp_path / "whole", settings, images=8)
    found, _, (line,) = run(tmp_path / "new", settings, resume=tmp_path / "old" / "epoch_2.pth", images=8)
    assert list(found.values()) == [wanted[step] for step in range(8, 24)]
    assert "after epoch 2: the length of an epoch" in line


@pytest.mark.parametrize(
    "changed, told, state",
    [
        (dict(optimizer=dict(type="AdamW", lr=0.1)), "optim_wrapper.optimizer.type 'SGD' -> 'AdamW'", False),
        (sgd(momentum=0), "optim_wrapper.optimizer.momentum 0.9 -> 0", False),
        (sgd(weight_decay=0.2), "optim_wrapper.optimizer.weight_decay 'unset' -> 0.2", True),
        (sgd() | dict(clip_grad=dict(max_norm=1.0)), "optim_wrapper.clip_grad.max_norm 'unset' -> 1.0", True),
        (sgd() | dict(paramwise_cfg=dict(bias_lr_mult=2.0)), "optim_wrapper.paramwise_cfg.bias_lr_mult", False),
    ],
)
def test_another_optimizer_is_named(changed, told, state, tmp_path):
    settings = steps(8, schedule=by_step("PolyLR"), optim_wrapper=sgd())
    run(tmp_path / "old", settings)
    checkpoint = tmp_path / "old" / "iter_5.pth"
    new = {**settings, "optim_wrapper": {"type": "OptimWrapper", **changed}}
    wanted, _, _ = run(tmp_path / "whole", new)
    found, _, (line,) = run(tmp_path / "new", new, resume=checkpoint)
    assert found == {step: wanted[step] for step in range(5, 8)}
    assert told in line and ("starts with an empty one" in line) == (not state)


def test_the_state_of_weights_of_another_shape_is_not_loaded(tmp_path):
    settings = steps(8, schedule=by_step("PolyLR"))
    run(tmp_path / "old", settings)
    found, _, (line,) = run(tmp_path / "new", settings, resume=tmp_path / "old" / "iter_5.pth", model=Line(width=3))
    assert list(found) == [5, 6, 7]
    assert "after iteration 5: the kind of the optimizer, or the parameters that it trains; the optimizer" in line


def test_another_optimizer_than_that_of_a_checkpoint_without_its_configuration(tmp_path):
    settings = steps(8, schedule=by_step("PolyLR"))
    run(tmp_path / "old", settings)
    checkpoint = read_checkpoint(str(tmp_path / "old" / "iter_5.pth"))
    del checkpoint["meta"]["cfg"]
    torch.save(checkpoint, tmp_path / "unknown.pth")
    new = settings | dict(optim_wrapper=ADAM)
    found, _, (line,) = run(tmp_path / "new", new, resume=tmp_path / "unknown.pth")
    assert [rate[0][0] for rate in found.values()] == pytest.approx([0.01 * (7 - step) / 7 for step in (5, 6, 7)])
    assert "starts with an empty one" in line


def test_settings_are_read_and_not_executed(tmp_path):
    text = Config(dict(a=dict(lr=1e-4, betas=(0.9, 0.99), keys={"x.y": dict(z=None)}, none={}), b=[1], c=2)).pretty_text
    wanted = {"a.lr": 1e-4, "a.betas.0": 0.9, "a.betas.1": 0.99, "a.keys.x.y.z": None, "a.none": {}, "b.0": 1}
    assert settings_of(text, "a", "b") == wanted
    path = tmp_path / "executed"
    assert settings_of(f"a = __import__('os').mkdir({str(path)!r})", "a") == {} and not path.exists()
    assert settings_of("a = dict(", "a") == {}
