"""Training that can be interrupted, resumed and depended on, with small networks and real data managers."""

import contextlib
import errno
import gc
import inspect
import io
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torchreid
from killing import differing
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning.samplers import MPerClassSampler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler
from toy_data import make_image_manager

from pml_drsl import DRSLoss
from pml_drsl.checks import InputError
from pml_drsl.wrappers import CrossBatchMemory
from torchreid_ext.checkpoint import checkpoint, states
from torchreid_ext.data.loading import SeededBatches
from torchreid_ext.engine import engines
from torchreid_ext.engine.epoch import EpochLog
from torchreid_ext.engine.options import RunOptions
from torchreid_ext.engine.step import Stepper
from torchreid_ext.evaluation import extraction
from torchreid_ext.runtime import distributed
from torchreid_ext.runtime.generators import seed_everything
from torchreid_ext.runtime.signals import Interrupted, StopRequest

SUPPORT = Path(__file__).parents[2] / "support"


class Network(nn.Module):
    """Small, with dropout, which draws from the generators, and batch normalisation, which remembers."""

    def __init__(self, num_classes=6):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4)
        self.body = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3))
        self.classifier = nn.Linear(32, num_classes)

    def forward(self, images):
        features = self.body(self.stem(images))
        return (self.classifier(features), features) if self.training else features


def make_engine(folder, workers=0, criterion=None, scheduled=True, lr=0.01, **kwargs):
    manager = make_image_manager(folder, workers=workers, transforms=["random_flip", "random_patch"])
    model = Network()
    weights = [] if criterion is None else list(criterion.parameters())
    optimizer = torch.optim.SGD([*model.parameters(), *weights], lr=lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], 0.5) if scheduled else None
    return engines.ImageDRSLEngine(manager, model, optimizer, criterion, scheduler=scheduler, **kwargs)


def memory():
    # 20 entries for batches of 8: full, and begun anew, in the middle of an epoch.
    return pml_losses.CrossBatchMemory(pml_losses.ContrastiveLoss(), 32, 20)


def late():
    # Three steps in an epoch: the memory starts in the third.
    return CrossBatchMemory(DRSLoss(), 32, 20, warmup=7)


def final_state(engine, epochs):
    return states.copied(states.of_engine(engine, epochs))


def signal_in(engine, epoch, batch, signum=signal.SIGTERM):
    step = engine.step

    def step_and_signal(loss):
        step(loss)
        if (engine.epoch, engine.batch_idx) == (epoch, batch):
            if signum is None:
                raise MemoryError("CUDA out of memory")
            os.kill(os.getpid(), signum)

    engine.step = step_and_signal


# Interruption and resumption.


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_no_bit(tmp_path):
    command = [sys.executable, "-W", "ignore", str(SUPPORT / "killing.py"), str(tmp_path), "--kills", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(part.split(": ") for part in done.stdout.strip().split(", "))
    assert counts["kills"] == "4" and int(counts["inside a save"]) > 0 and counts["tensors that differ"] == "0"


@pytest.mark.parametrize(
    ("signum", "workers", "criterion"), [(signal.SIGTERM, 0, late), (signal.SIGINT, 1, memory), (None, 0, memory)]
)
def test_a_signal_or_an_error_saves_and_the_run_goes_on_as_it_would_have(
    tmp_path, monkeypatch, capsys, signum, workers, criterion
):
    # A loader that ends with a reference cycle waits so many seconds for each of its workers.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)

    def fresh():
        seed_everything(3)
        return make_engine(tmp_path, workers, criterion())

    whole = fresh()
    whole.run(str(tmp_path / "whole"), max_epoch=4, checkpoint_freq=10)
    stopped = fresh()
    signal_in(stopped, epoch=2, batch=1, signum=signum)
    before = signal.getsignal(signum or signal.SIGTERM)
    with pytest.raises((Interrupted, MemoryError)) as caught:
        stopped.run(str(tmp_path / "cut"), max_epoch=4, checkpoint_freq=10)
    where = "in epoch 3; model.resume auto begins it again from .*tar-2"
    if signum is None:
        assert caught.type is MemoryError and re.search(f"The run failed {where}", capsys.readouterr().out)
    else:
        assert re.search(f"stopped by {signum.name} {where}", str(caught.value))
    del stopped.step, caught
    gc.collect()
    assert signal.getsignal(signum or signal.SIGTERM) is before
    resumed = fresh()
    seed_everything(99)
    start = resumed.resume("auto", str(tmp_path / "cut"))
    assert start == 2
    resumed.run(str(tmp_path / "cut"), max_epoch=4, start_epoch=start, checkpoint_freq=10)
    assert differing(final_state(whole, 4), final_state(resumed, 4)) == 0
    assert differing(final_state(whole, 4), final_state(stopped, 4)) > 0


class Rotated(Sampler):
    """Begins every epoch one image later."""

    def __init__(self, dataset):
        self.size, self.first = len(dataset), 0

    def __iter__(self):
        self.first += 1
        return iter([(self.first + index) % self.size for index in range(self.size)])

    def __len__(self):
        return self.size

    def state_dict(self):
        return {"first": self.first}

    def load_state_dict(self, state):
        self.first = state["first"]


def drawn_by_its_own_generator(dataset):
    return RandomSampler(dataset, generator=torch.Generator().manual_seed(5))


def of_each_class(dataset):
    return MPerClassSampler([item[1] for item in dataset.train], 4, 8, len(dataset))


class RotatedBatches(Rotated):
    sampler = None  # as in torch's BatchSampler

    def __iter__(self):
        order = [*super().__iter__()]
        return iter([order[start : start + 8] for start in range(0, self.size - 7, 8)])

    def __len__(self):
        return self.size // 8


class DrawnBatches(BatchSampler):
    def __init__(self, dataset):
        super().__init__(range(len(dataset)), 8, True)
        self.generator = torch.Generator().manual_seed(5)

    def __iter__(self):
        return iter(torch.randperm(len(self.sampler), generator=self.generator)[:16].view(2, 8).tolist())

    def __len__(self):
        return 2


@pytest.mark.parametrize("sampler", [Rotated, drawn_by_its_own_generator, of_each_class, RotatedBatches, DrawnBatches])
def test_a_sampler_with_a_state_of_its_own_goes_on(tmp_path, sampler):
    ends = []
    for stops in ((2,), (1, 2)):
        for stop in stops:
            seed_everything(3)
            engine, log = make_engine(tmp_path), str(tmp_path / str(stops))
            engine.test = lambda **_: {}
            dataset = engine.datamanager.train_loader.dataset
            if "Batches" in sampler.__name__:
                engine.train_loader = DataLoader(dataset, batch_sampler=sampler(dataset))
            else:
                engine.train_loader = DataLoader(dataset, 8, sampler=sampler(dataset), drop_last=True)
            engine.run(log, start_epoch=engine.resume("auto", log), max_epoch=stop, eval_freq=1)
        ends.append(final_state(engine, 2))
    assert differing(*ends) == 0


@pytest.mark.parametrize(
    ("message", "raised"),
    [
        ("CUDA out of memory", RuntimeError),
        ("Caught RuntimeError in DataLoader worker process 0.", RuntimeError),
        ("DataLoader worker (pid 12) is killed by signal: Terminated. ", Interrupted),
    ],
)
def test_an_error_after_a_signal_is_raised_unless_the_signal_explains_it(tmp_path, message, raised):
    engine = make_engine(tmp_path)

    def fail(loss):
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError(message)

    engine.step = fail
    with pytest.raises(raised, match=r"out of memory|Caught|stopped by SIGTERM") as caught:
        engine.run(str(tmp_path / "log"), max_epoch=1)
    assert type(caught.value) is raised


# After the test of the last epoch nothing is lost, and yet a script must not go on with its next run.
@pytest.mark.parametrize(
    ("method", "stopped"),
    [("extract_features", " in the test after epoch 1; model"), ("_is_best", "; the run was done, and everything")],
)
def test_a_signal_in_a_test(tmp_path, method, stopped):
    engine = make_engine(tmp_path)
    called = getattr(engine, method)

    def call_and_signal(given):
        os.kill(os.getpid(), signal.SIGTERM)
        return called(given)

    setattr(engine, method, call_and_signal)
    with pytest.raises(Interrupted, match=f"^stopped by SIGTERM{stopped}") as caught:
        engine.run(str(tmp_path / "log"), max_epoch=1)
    assert caught.value.signal == signal.SIGTERM
    assert checkpoint.load(tmp_path / "log" / "model" / "model-last.pth.tar")["epoch"] == 1
    # The request is answered: the engine tests again.
    setattr(engine, method, called)
    assert engine.test()


def test_a_signal_to_another_process_in_a_test(tmp_path, monkeypatch):
    engine = make_engine(tmp_path)

    def told(**kwargs):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(engine, "test", told)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM in the test after epoch 1; model.resume auto begins it"):
        engine.run(str(tmp_path / "log"), max_epoch=1)
    assert checkpoint.load(tmp_path / "log" / "model" / "model-last.pth.tar")["epoch"] == 1


@pytest.mark.parametrize("epoch", [2, 4])
def test_a_test_that_was_stopped_is_repeated(tmp_path, epoch):
    """The best weights are those after epoch 2, by the test that is stopped or by the one before it."""

    def run(log, stops=None):
        seed_everything(3)
        engine = make_engine(tmp_path)
        test, start = engine.test, engine.resume("auto", str(tmp_path / log))

        def scored(**kwargs):
            if engine.epoch + 1 == stops:
                os.kill(os.getpid(), signal.SIGTERM)
            toy = test(**kwargs)["toy"]
            return {"toy": replace(toy, means=toy.means | {"mAP": 1 / (engine.epoch + 1)})}

        engine.test = scored
        options = {"max_epoch": 4, "eval_freq": 2, "checkpoint_freq": 9, "keep_checkpoints": 0}
        with pytest.raises(Interrupted) if stops else contextlib.nullcontext():
            engine.run(str(tmp_path / log), start_epoch=start, **options)
        return start, {path.name: checkpoint.load(path) for path in (tmp_path / log / "model").iterdir()}

    (_, whole), (_, stopped), (start, resumed) = run("whole"), run("cut", epoch), run("cut")
    assert start == epoch == stopped["model-last.pth.tar"]["epoch"]
    assert whole["model-best.pth.tar"]["epoch"] == 2 and differing(whole, resumed) == 0


def test_a_second_signal_ends_at_once():
    with StopRequest() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Interrupted) as caught:
            stop.check()
        assert caught.value.signal is signal.SIGINT
        with pytest.raises(KeyboardInterrupt, match="at once"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_terminal_that_closes_asks_to_stop_unless_nohup_ignores_it():
    missed = []
    before = signal.signal(signal.SIGHUP, lambda *_: missed.append("the handler of before"))
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signum == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signum is None and not missed
    finally:
        signal.signal(signal.SIGHUP, before)


def test_last_best_and_retention(tmp_path, monkeypatch):
    engine = make_engine(tmp_path)
    scores = iter([0.2, 0.5, 0.5, 0.3])
    test = engine.test

    def scored(**kwargs):
        results = test(**kwargs)
        # The mean over the targets decides.
        value = next(scores)
        toy = results["toy"]
        one, other = (replace(toy, means=toy.means | {"mAP": value + sign * 0.1}) for sign in (-1, 1))
        return {"one": one, "other": other}

    monkeypatch.setattr(engine, "test", scored)
    engine.run(str(tmp_path / "log"), max_epoch=4, eval_freq=1, keep_checkpoints=2)
    folder = tmp_path / "log" / "model"
    assert sorted(path.name for path in folder.iterdir()) == [
        "model-best.pth.tar", "model-last.pth.tar", "model.pth.tar-3", "model.pth.tar-4",
    ]  # fmt: skip
    assert checkpoint.load(folder / "model-best.pth.tar")["epoch"] == 2
    assert engine.best == {"mAP": pytest.approx(0.5), "epoch": 2}
    resumed = make_engine(tmp_path)
    resumed.resume("auto", str(tmp_path / "log"))
    assert resumed.best == engine.best


def test_a_run_re_ranks_only_where_it_trains_nothing(tmp_path):
    engine, log = make_engine(tmp_path), str(tmp_path / "log")
    # Features by which not every match is first.
    engine.extract_features = lambda images: (1000 * images.flatten(1)[:, :8]).sin()
    plain = engine.test()["toy"].mAP
    assert engine.run(log, max_epoch=1, rerank=True)["toy"].mAP == engine.best["mAP"] == plain
    again = engine.run(log, test_only=True, rerank=True)["toy"].mAP
    assert again == engine.test(rerank=True)["toy"].mAP != pytest.approx(plain)


def test_the_best_of_another_folder_or_by_another_measure_is_not_beaten(tmp_path):
    engine = make_engine(tmp_path)
    engine.config = {"test.dist_metric": "euclidean", "data.height": 8, "data.targets": ["toy"]}
    engine.config |= {"datasets.toy": {"folder": "toy"}, "data.sources": ["others"]}
    engine.run(str(tmp_path / "log"), max_epoch=2, eval_freq=1)
    last, first_best = (tmp_path / "log" / "model" / f"model-{name}.pth.tar" for name in ("last", "best"))
    assert checkpoint.load(first_best)["epoch"] == 1
    other = make_engine(tmp_path)
    start = other.resume(str(last), str(tmp_path / "other"))
    other.best = other.best if other.best["epoch"] < 0 else {"mAP": 1.0, "epoch": 2}  # which none would beat
    other.run(str(tmp_path / "other"), max_epoch=3, start_epoch=start)
    assert checkpoint.load(tmp_path / "other" / "model" / "model-best.pth.tar")["epoch"] == 3
    before = engine.config
    changes = ({}, engine.best), ({"data.height": 4}, states.NO_BEST), ({"datasets.toy": {}}, states.NO_BEST)
    for change, best in (*changes, ({"test.dist_metric": "cosine"}, states.NO_BEST)):
        again = make_engine(tmp_path)
        again.config = before | change
        start = again.resume("auto", str(tmp_path / "log"))
        assert again.best == best
    again.run(str(tmp_path / "log"), max_epoch=2, start_epoch=start)  # by the other measure
    assert checkpoint.load(first_best)["epoch"] == 1


@pytest.mark.parametrize(("kept", "epochs", "best"), [(True, 3, 0.5), (True, 2, 0.5), (False, 3, 0.3)])
def test_a_run_that_goes_back_has_the_best_weights_of_its_own_past(tmp_path, kept, epochs, best):
    folder = tmp_path / "log" / "model"

    def run(scores, max_epoch=3, **options):
        test, scores = engine.test, iter(scores)

        def scored(**kwargs):
            toy = test(**kwargs)["toy"]
            return {"toy": replace(toy, means=toy.means | {"mAP": next(scores)})}

        engine.test = scored
        engine.run(str(tmp_path / "log"), max_epoch=max_epoch, eval_freq=1, keep_checkpoints=0, **options)
        return checkpoint.load(folder / "model-best.pth.tar")["training"]["best"]

    engine = make_engine(tmp_path)
    assert run([0.5, 0.1, 0.9]) == {"mAP": 0.9, "epoch": 3}
    if not kept:
        (folder / "model.pth.tar-1").unlink()
    engine = make_engine(tmp_path)
    start = engine.resume(str(folder / "model.pth.tar-2"), str(tmp_path / "log"))
    assert run([0.3], epochs, start_epoch=start) == engine.best == {"mAP": best, "epoch": 1 if kept else 3}


def test_a_second_run_of_an_engine_has_a_best_checkpoint_of_its_own(tmp_path):
    engine = make_engine(tmp_path)
    for _ in range(2):
        engine.run(str(tmp_path / "log"), max_epoch=1)
        assert checkpoint.load(tmp_path / "log" / "model" / "model-best.pth.tar")["epoch"] == engine.best["epoch"] == 1
        engine.best["mAP"] = 2.0  # which none would beat


def test_checkpoints_every_n_epochs_and_after_every_test(tmp_path):
    options = {"checkpoint_freq": 2, "keep_checkpoints": 0, "eval_freq": 1, "start_eval": 3}
    make_engine(tmp_path).run(str(tmp_path / "log"), max_epoch=5, **options)
    epochs = {path.name.rpartition("-")[2] for path in (tmp_path / "log" / "model").glob("model.pth.tar-*")}
    assert epochs == {"2", "3", "4", "5"}


def test_a_run_that_is_done_is_tested_again(tmp_path):
    engine = make_engine(tmp_path)
    results = engine.run(str(tmp_path / "log"), max_epoch=1)
    assert not any(module.training for module in engine.model.modules())
    engine = make_engine(tmp_path)
    start = engine.resume(str(tmp_path / "log" / "model" / "model.pth.tar-1"))
    again = engine.run(str(tmp_path / "log"), max_epoch=1, start_epoch=start)
    assert again["toy"].mAP == results["toy"].mAP


def test_a_run_goes_on_where_it_was_resumed_and_the_next_one_begins_anew(tmp_path):
    log = str(tmp_path / "log")
    make_engine(tmp_path).run(log, max_epoch=1)
    engine = make_engine(tmp_path)
    start = engine.resume("auto", log)
    with pytest.raises(InputError, match="resume returned 1, and start_epoch is 0: give start_epoch=1"):
        engine.run(log, max_epoch=1)
    engine.run(log, max_epoch=1, start_epoch=start)
    spoil(engine, {0})
    with pytest.raises(FloatingPointError, match="no checkpoint was saved"):
        engine.run(str(tmp_path / "next"), max_epoch=1)
    # A run that was stopped in its first epoch begins where it was asked to.
    engine = make_engine(tmp_path, scheduled=False)
    engine.save_model(-1, 0, str(tmp_path / "first"))
    assert engine.resume("auto", str(tmp_path / "first")) == 0
    engine.run(str(tmp_path / "first"), max_epoch=1, start_epoch=1)


def test_a_resumed_run_that_is_longer_than_asked_keeps_its_checkpoints(tmp_path):
    make_engine(tmp_path, scheduled=False).run(str(tmp_path / "log"), max_epoch=3)
    folder = tmp_path / "log" / "model"
    before = {path.name: checkpoint.load(path)["epoch"] for path in folder.iterdir()}
    engine = make_engine(tmp_path, scheduled=False)
    start = engine.resume("auto", str(tmp_path / "log"))
    engine.best = {"mAP": -0.5, "epoch": 1}  # so that it is saved again
    engine.run(str(tmp_path / "log"), max_epoch=2, start_epoch=start)
    after = {path.name: checkpoint.load(path)["epoch"] for path in folder.iterdir()}
    assert after == before | {"model-best.pth.tar": 3}


def test_a_terminal_that_closes_loses_no_epoch(tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    engine = make_engine(tmp_path)
    step, before = engine.forward_backward, signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it

    def hang_up(data):
        monkeypatch.setattr(sys, "stdout", Closed())
        signal.raise_signal(signal.SIGHUP)
        return step(data)

    engine.forward_backward = hang_up
    try:
        with pytest.raises(Interrupted, match="stopped by SIGHUP in epoch 1"):
            engine.run(str(tmp_path / "log"), max_epoch=1, print_freq=1)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert checkpoint.load(tmp_path / "log" / "model" / "model-last.pth.tar")["epoch"] == 0
    # Without a signal, an error of a disk stays what it is.
    monkeypatch.undo()
    engine = make_engine(tmp_path)
    engine.forward_backward = lambda data: Closed().write("")
    with pytest.raises(OSError, match="Input/output error"):
        engine.run(str(tmp_path / "other"), max_epoch=1)


def test_the_best_of_an_earlier_run_in_the_folder_is_not_left(tmp_path):
    make_engine(tmp_path).run(str(tmp_path / "log"), max_epoch=1)
    best = tmp_path / "log" / "model" / "model-best.pth.tar"
    assert best.exists()
    engine = make_engine(tmp_path)
    engine.options = RunOptions(save_dir=str(tmp_path / "log"))
    engine._prepare()
    assert best.exists()  # until there is a checkpoint of the new run
    engine = make_engine(tmp_path)
    signal_in(engine, 0, 0)
    with pytest.raises(Interrupted):
        engine.run(str(tmp_path / "log"), max_epoch=2)
    assert not best.exists()


def test_other_training_images_are_refused(tmp_path, capsys):
    engine = make_engine(tmp_path)
    engine.run(str(tmp_path / "log"), max_epoch=1)
    items = engine.datamanager.train_loader.dataset.train
    swapped = make_engine(tmp_path)
    other = {0: 1, 1: 0}
    changed = [(path, other.get(pid, pid), *rest) for path, pid, *rest in items]
    swapped.datamanager.train_loader.dataset.train = changed
    with pytest.raises(InputError, match="was trained on other images, or gave identities other numbers"):
        swapped.resume("auto", str(tmp_path / "log"))
    swapped.resume("auto", str(tmp_path / "log"), test_only=True)
    assert "this test may show people that it was trained on" in capsys.readouterr().out
    # The same images in another order, and in another place, are the same.
    moved = [(path.replace(str(tmp_path), "/elsewhere"), *rest) for path, *rest in reversed(items)]
    assert states.digest(moved) == states.digest(items) != states.digest(changed)


def test_a_run_that_was_killed_before_it_removed_what_it_need_not_keep(tmp_path):
    make_engine(tmp_path).run(str(tmp_path / "log"), max_epoch=3, keep_checkpoints=2)
    folder = tmp_path / "log" / "model"
    kept = sorted(path.name for path in folder.iterdir())
    for name in ("model.pth.tar-1", ".model-best.pth.tar.0123456789abcdef.tmp"):
        (folder / name).write_bytes((folder / "model.pth.tar-2").read_bytes())
        os.utime(folder / name, (0, 0))
    engine = make_engine(tmp_path)
    start = engine.resume("auto", str(tmp_path / "log"))
    engine.run(str(tmp_path / "log"), max_epoch=3, start_epoch=start, keep_checkpoints=2)
    assert sorted(path.name for path in folder.iterdir()) == kept


def test_a_script_may_save_its_engine(tmp_path):
    one, other = (make_engine(tmp_path, criterion=pml_losses.ArcFaceLoss(6, 32), scheduled=False) for _ in range(2))
    one.save_model(0, 0.5, str(tmp_path / "log"))
    assert other.resume("auto", str(tmp_path / "log")) == 1 and other.rank1 == 0.5
    assert torch.equal(one.criterion.W, other.criterion.W)
    assert all(map(torch.equal, one.model.state_dict().values(), other.model.state_dict().values()))


def test_another_number_of_identities_or_another_loss_is_refused_and_of_processes_told(tmp_path, capsys):
    make_engine(tmp_path).run(str(tmp_path / "log"), max_epoch=1)
    state = checkpoint.load(tmp_path / "log" / "model" / "model.pth.tar-1")
    state["training"]["processes"] = 2
    checkpoint.save(state, tmp_path / "of_two.pth")
    for test_only in (False, True):
        assert make_engine(tmp_path).resume(str(tmp_path / "of_two.pth"), test_only=test_only) == 1
        counts = "was trained by 2 processes, and this run has 1: training goes on, but not exactly as before\n"
        assert (counts in capsys.readouterr().out) != test_only
    engine = make_engine(tmp_path, criterion=pml_losses.ArcFaceLoss(6, 32))
    with pytest.raises(ValueError, match="does not fit this run's optimizer"):
        engine.resume("auto", str(tmp_path / "log"))
    engine = make_engine(tmp_path)
    engine.datamanager._num_train_pids = 5
    for test_only, cure in ((False, "give the data.sources of that run, or start a new"), (True, "give model.load_w")):
        with pytest.raises(ValueError, match=f"was trained on 6 identities, and the sources have 5: .*{cure}"):
            engine.resume("auto", str(tmp_path / "log"), test_only=test_only)


def test_what_a_checkpoint_may_hold_is_refused_in_one_line(tmp_path):
    make_engine(tmp_path, criterion=memory()).run(str(tmp_path / "log"), max_epoch=1)
    whole = tmp_path / "log" / "model" / "model.pth.tar-1"
    top = [("epoch", "one"), ("epoch", 1.5), ("rank1", []), ("training", 3), ("state_dict", [1]), ("optimizer", {})]
    top += [("optimizer", {"param_groups": [], "state": {}}), ("scheduler", [1, 2])]
    inside = [(name, 3) for name in ("losses", "memories", "sampler", "generators", "best")]
    inside += [("skipped", "x"), ("generators", {"python": 1}), ("memories", {"criterion": {}}), ("best", {"mAP": 1})]
    for part, wrong in (("top", top), ("training", inside)):
        for name, value in wrong:
            state = checkpoint.load(whole)
            (state if part == "top" else state["training"])[name] = value
            torch.save(state, tmp_path / "crafted.pth")
            engine = make_engine(tmp_path, criterion=memory())
            with pytest.raises(InputError, match=re.escape(f"checkpoint '{tmp_path / 'crafted.pth'}'")) as caught:
                start = engine.resume(str(tmp_path / "crafted.pth"))
                engine.run(str(tmp_path / "other"), max_epoch=2, start_epoch=start)
            assert len(str(caught.value).splitlines()) == 1


def test_torchreids_checkpoint_is_resumed_from(tmp_path, capsys):
    engine = make_engine(tmp_path)
    state = {"state_dict": engine.model.state_dict(), "epoch": 3, "rank1": 0.5}
    state |= {"optimizer": engine.optimizer.state_dict(), "scheduler": engine.scheduler.state_dict()}
    torch.save(state, tmp_path / "host.pth")
    assert make_engine(tmp_path).resume(str(tmp_path / "host.pth")) == 3
    assert "has no random state" in capsys.readouterr().out
    # In torchreid's own folder, its checkpoints stay, also when the run stops and goes on.
    folder = tmp_path / "log" / "model"
    folder.mkdir(parents=True)
    for epoch in (1, 2, 3):
        torch.save(state | {"epoch": epoch}, folder / f"model.pth.tar-{epoch}")
    for path, epochs in ((str(folder / "model.pth.tar-3"), 5), ("auto", 7)):
        engine = make_engine(tmp_path)
        start = engine.resume(path, str(tmp_path / "log"))
        engine.run(str(tmp_path / "log"), start_epoch=start, max_epoch=epochs, keep_checkpoints=1)
    assert {path.name.rpartition("-")[2] for path in folder.glob("*.tar-*")} == {"1", "2", "3", "7"}
    # Nor does a script that reads the checkpoint by itself lose those before it.
    make_engine(tmp_path).run(str(tmp_path / "log"), start_epoch=3, max_epoch=6, keep_checkpoints=1)
    assert {path.name.rpartition("-")[2] for path in folder.glob("*.tar-*")} == {"1", "2", "3", "6", "7"}


class HoldsAnother(torch.optim.lr_scheduler.LRScheduler):
    """As the usual GradualWarmupScheduler, it has the scheduler of later epochs in its state."""

    def __init__(self, optimizer):
        self.after_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        super().__init__(optimizer)

    def get_lr(self):
        return self.base_lrs


def test_a_scheduler_that_no_checkpoint_can_hold_is_refused_before_the_first_step(tmp_path):
    engine = make_engine(tmp_path)
    engine.scheduler = engine._scheds["model"] = HoldsAnother(engine.optimizer)
    before = engine.model.stem.weight.clone()
    with pytest.raises(InputError, match=r"the state of the scheduler holds .*StepLR.*: give it a .*SequentialLR"):
        engine.run(str(tmp_path / "log"), max_epoch=1)
    assert torch.equal(engine.model.stem.weight, before)


# Steps.


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_the_network_is_in_half_precision_and_the_loss_in_single(tmp_path, amp):
    engine = make_engine(tmp_path)
    seen = set()
    engine.model.stem.register_forward_hook(lambda module, args, out: seen.add((module.training, out.dtype)))
    engine.criterion.register_forward_pre_hook(lambda module, args: seen.add(("loss", args[0].dtype)))
    before = engine.model.stem.weight.clone()
    engine.run(str(tmp_path / "log"), max_epoch=2, amp=amp)
    inside = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    assert seen == {(True, inside), ("loss", torch.float32), (False, torch.float32)}
    assert engine.model.stem.weight.dtype == torch.float32 and not torch.equal(engine.model.stem.weight, before)
    scale = checkpoint.load(tmp_path / "log" / "model" / "model-last.pth.tar")["training"]["scaler"].get("scale")
    assert (scale is not None) == (amp == "fp16")


class Output(NamedTuple):
    logits: torch.Tensor
    others: dict


def test_single_precision_leaves_the_kind_of_output_as_it_is():
    class Named(nn.Linear):
        def forward(self, images):
            logits = super().forward(images)
            assert logits.dtype == torch.bfloat16
            return Output(logits, {"features": [logits, None]})

    logits, others = output = Stepper("bf16").forward(Named(3, 2), torch.ones(1, 3))
    assert type(output) is Output and logits.dtype == others["features"][0].dtype == torch.float32
    assert list(others) == ["features"] and others["features"][1:] == [None]


def test_double_precision_stays():
    assert Stepper().forward(nn.Linear(3, 2).double(), torch.ones(1, 3).double()).dtype == torch.float64


def test_scaled_gradients_step_as_unscaled_ones():
    weights = []
    for amp in ("fp16", "off"):
        torch.manual_seed(0)
        model, loss_weight = nn.Linear(3, 2), nn.Parameter(torch.ones(()))
        optimizers = [torch.optim.SGD(model.parameters(), lr=1), torch.optim.SGD([loss_weight], lr=1)]
        # And one that nothing reaches.
        optimizers.append(torch.optim.SGD([nn.Parameter(torch.ones(()))], lr=1))
        stepper = Stepper(amp)
        stepper.step((model(torch.ones(1, 3)) * loss_weight).square().sum(), optimizers)
        weights.append(torch.cat([p.detach().flatten() for p in (*model.parameters(), loss_weight)]))
        # Of three further steps, the scale of fp16 makes the gradient of one infinite.
        for factor in (1, 1e35, 1):
            stepper.step(loss_weight * factor, optimizers[1:2])
        assert [stepper.overflows(), stepper.overflows()] == [amp == "fp16", 0]
    torch.testing.assert_close(*weights)


def test_compiled(tmp_path, monkeypatch):
    compiled = []

    def compile_(model):
        compiled.append(model)
        return model

    monkeypatch.setattr(torch, "compile", compile_)
    engine = make_engine(tmp_path)
    engine.run(str(tmp_path / "log"), max_epoch=1, compiled=True)
    assert compiled == [engine.model]


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_sets_the_memory_format_that_was_asked_for(tmp_path, asked):
    engine = make_engine(tmp_path)
    engine.run(str(tmp_path / "log"), max_epoch=1, channels_last=asked)
    assert engine.model.stem.weight.is_contiguous(memory_format=torch.channels_last) == asked


def spoil(engine, batches, model=None):
    """Makes the loss of some batches NaN, by their number in the run."""
    model = model or engine.model
    forward, calls = model.forward, iter(range(1000))

    def spoiled(images):
        return forward(images * float("nan") if model.training and next(calls) in batches else images)

    model.forward = spoiled


@pytest.mark.parametrize("every", [1, 9])
def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(tmp_path, every):
    engine = make_engine(tmp_path)
    spoil(engine, {4})
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan in epoch 2, batch 2.*last good .*model\.pth\.tar-1'"
    ):
        engine.run(str(tmp_path / "log"), max_epoch=3, checkpoint_freq=every)
    assert checkpoint.load(tmp_path / "log" / "model" / "model-last.pth.tar")["epoch"] == 1
    first = make_engine(tmp_path)
    spoil(first, {0})
    with pytest.raises(FloatingPointError, match=r"epoch 1, batch 1.*no checkpoint was saved"):
        first.run(str(tmp_path / "new"), max_epoch=3)
    assert not (tmp_path / "new" / "model").exists()


@pytest.mark.parametrize(("scale", "epoch"), [(2**16, 2), (2, 1)])
def test_a_gradient_that_is_never_finite_in_fp16_stops_the_run(tmp_path, monkeypatch, capsys, scale, epoch):
    """Three steps in an epoch; a scale of 65536 may be too high for each of the first, one of 0.25 is not."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=float(scale)))
    engine = make_engine(tmp_path)
    forward = engine.model.forward

    def spoiled(images):
        if not engine.model.training:
            return forward(images)
        logits, features = forward(images)
        return logits + 0 * (logits - logits.detach()).sqrt(), features  # The slope of a root at 0 is infinite.

    engine.model.forward = spoiled
    none = f"epoch {epoch} had no step with finite gradients in fp16, of 3: try train.amp bf16"
    with pytest.raises(FloatingPointError, match=none):
        engine.run(str(tmp_path / "log"), max_epoch=3, amp="fp16", start_eval=9)
    out = capsys.readouterr().out
    assert out.count("fp16 left out 3 of 3 steps, whose scaled gradients were not finite") == epoch


def test_steps_that_are_not_finite_are_left_out(tmp_path, capsys):
    engine = make_engine(tmp_path, criterion=memory())
    spoil(engine, {1, 4})
    engine.run(str(tmp_path / "log"), max_epoch=2, skip_nonfinite=True)
    assert engine.skipped == 2
    out = capsys.readouterr().out
    assert "Skipped epoch 1, batch 2: the loss is nan" in out and "Skipped 2 steps" in out
    # Neither the statistics of the network nor the memory of the loss keep anything of it.
    assert all(torch.isfinite(value).all() for value in engine.model.state_dict().values())
    assert torch.isfinite(engine.criterion.embedding_memory).all()
    # 2 epochs of 3 batches of 8, less 2, in a memory of 20.
    assert engine.criterion.queue_idx == (2 * 3 - 2) * 8 % 20


def test_an_epoch_of_skipped_steps_stops_the_run(tmp_path):
    engine = make_engine(tmp_path)
    spoil(engine, set(range(3)))
    with pytest.raises(FloatingPointError, match="epoch 1 had no batch with a finite loss, of 3 that"):
        engine.run(str(tmp_path / "log"), max_epoch=2, skip_nonfinite=True)


def test_spoiled_weights_are_not_saved(tmp_path):
    engine = make_engine(tmp_path)
    engine.model.body[0].running_mean[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"body\.0\.running_mean is not finite after epoch 0"):
        engine.run(str(tmp_path / "log"), max_epoch=2, checkpoint_freq=1, start_eval=9)
    assert not list((tmp_path / "log").rglob("*.pth.tar*"))


def test_spoiled_weights_of_a_loss_are_noticed_before_they_are_saved_or_named(tmp_path):
    """With ``skip_nonfinite`` every later step would be skipped, and the checkpoint of NaN called the last good one."""
    engine = make_engine(tmp_path, criterion=pml_losses.ArcFaceLoss(6, 32))
    step = engine.step

    def spoil_weight(loss):
        step(loss)
        if (engine.epoch, engine.batch_idx) == (1, 2):
            with torch.no_grad():
                engine.criterion.W[0, 0] = math.nan

    engine.step = spoil_weight
    with pytest.raises(FloatingPointError, match=r"criterion\.W is not finite after epoch 2; .* '.*tar-1'"):
        engine.run(str(tmp_path / "log"), max_epoch=4, skip_nonfinite=True)
    # Nor does a checkpoint of such weights come back.
    state = checkpoint.load(tmp_path / "log" / "model" / "model.pth.tar-1")
    state["training"]["losses"]["criterion"]["W"][0, 0] = math.inf
    checkpoint.save(state, tmp_path / "spoiled.pth")
    engine = make_engine(tmp_path, criterion=pml_losses.ArcFaceLoss(6, 32))
    with pytest.raises(InputError, match=r"spoiled\.pth': criterion\.W is not finite; resume from an earlier"):
        engine.resume(str(tmp_path / "spoiled.pth"))


class Pair(engines.ImageDRSLEngine):
    """Trains another network of the same architecture with the first."""

    def compute_losses(self, output, batch):
        loss, summary = super().compute_losses(output, batch)
        return loss + nn.functional.cross_entropy(self.other(batch.images)[0], batch.pids), summary


def make_pair(folder):
    engine = make_engine(folder)
    engine.__class__, engine.other = Pair, Network()
    engine.register_model("other", engine.other, torch.optim.SGD(engine.other.parameters(), lr=0.01), None)
    return engine


def test_a_skipped_step_leaves_nothing_in_the_statistics_of_another_model(tmp_path):
    engine = make_pair(tmp_path)
    spoil(engine, {1}, engine.other)
    engine.run(str(tmp_path / "log"), max_epoch=1, skip_nonfinite=True)
    assert engine.skipped == 1
    assert all(torch.isfinite(value).all() for value in engine.other.state_dict().values())


def test_two_models_are_saved_resumed_and_checked(tmp_path):
    log, engine = str(tmp_path / "log"), make_pair(tmp_path)
    before = engine.other.stem.weight.clone()
    engine.run(log, max_epoch=1)
    assert not torch.equal(engine.other.stem.weight, before)
    for name in ("model", "other"):
        twin = make_pair(tmp_path)
        start = twin.resume("auto", log)
        for either in ("model", "other"):
            assert torch.equal(getattr(twin, either).stem.weight, getattr(engine, either).stem.weight)
        getattr(twin, name).body[0].running_mean[0] = math.nan
        with pytest.raises(FloatingPointError, match=r"body\.0\.running_mean is not finite after epoch 1"):
            twin.run(log, max_epoch=2, start_epoch=start)
    twin.model = None
    with pytest.raises(InputError, match=r"Pair has no registered self\.model: set self\.model"):
        twin.run(log, max_epoch=2, start_epoch=start)


def test_two_models_are_resumed_from_torchreids_checkpoints(tmp_path, monkeypatch):
    engine = make_pair(tmp_path)
    for name, optimizer in engine._optims.items():
        state = {"state_dict": engine._models[name].state_dict(), "epoch": 3, "optimizer": optimizer.state_dict()}
        state["scheduler"] = {} if engine._scheds[name] is None else engine._scheds[name].state_dict()
        torchreid.utils.save_checkpoint(state, str(tmp_path / "log" / name))
    monkeypatch.chdir(tmp_path / "log" / "model")
    for path in ("auto", "model.pth.tar-3"):
        twin = make_pair(tmp_path)
        assert twin.resume(path, str(tmp_path / "log")) == 3
        for name in ("model", "other"):
            assert torch.equal(getattr(twin, name).stem.weight, getattr(engine, name).stem.weight)
    (tmp_path / "log" / "other" / "model.pth.tar-3").unlink()
    with pytest.raises(InputError, match=r"one model: '.*other/model\.pth\.tar-3', which holds 'other', is missing"):
        twin.resume("auto", str(tmp_path / "log"))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 4}])
def test_layers_that_no_gradient_reaches_are_refused(tmp_path, options):
    engine = make_engine(tmp_path, weight_x=0)
    with pytest.raises(InputError, match=r"no gradient in any weight that trains: open other layers \(open_layers\)"):
        engine.run(str(tmp_path / "log"), max_epoch=2, fixbase_epoch=1, open_layers="classifier", **options)


class OwnStep(engines.ImageDRSLEngine):
    """Steps by itself, as every engine of torchreid does."""

    own_forward = True

    def forward_backward(self, data):
        images, pids = self.parse_data_for_train(data)
        forward = self.model if self.own_forward else self.forward
        loss = nn.functional.cross_entropy(forward(images)[0], pids)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}

    def two_stepped_transfer_learning(self, epoch, fixbase_epoch, open_layers, model=None):
        super().two_stepped_transfer_learning(epoch, fixbase_epoch, open_layers, model)
        self.opened = epoch


@pytest.mark.parametrize("options", [{}, {"amp": "bf16"}, {"chunk_size": 4}])
def test_a_step_of_ones_own_trains_but_takes_no_options_that_it_would_leave_out(tmp_path, monkeypatch, options):
    engine = make_engine(tmp_path)
    engine.__class__ = OwnStep
    before = engine.model.stem.weight.clone()
    if not options:
        engine.run(str(tmp_path / "log"), max_epoch=2)
        assert engine.opened == 1 and not torch.equal(engine.model.stem.weight, before)
        monkeypatch.setattr(distributed, "size", lambda: 2)
    engine.own_forward = "chunk_size" not in options  # The other half is its own all the same.
    left_out = "OwnStep.forward_backward steps by itself, which leaves out {}: call self.forward and self.step"
    with pytest.raises(InputError, match=left_out.format(next(iter(options), "several processes"))):
        engine.run(str(tmp_path / "log"), max_epoch=1, **options) if options else engine.check_stepper()


def test_a_forward_pass_of_ones_own_cannot_skip_a_loss_that_is_not_finite(tmp_path):
    engine = make_engine(tmp_path)

    def forward_backward(data):
        engine.step(engine.model(data["img"])[0].mean() * math.nan)
        return {}

    engine.forward_backward = forward_backward
    with pytest.raises(InputError, match="forward_backward steps by itself, which leaves out skip_nonfinite"):
        engine.run(str(tmp_path / "log"), max_epoch=1, skip_nonfinite=True)


def test_a_loader_may_be_replaced(tmp_path):
    engine = make_engine(tmp_path)
    dataset = engine.datamanager.train_loader.dataset
    engine.train_loader = DataLoader(dataset, 8, shuffle=True, drop_last=True)
    # Each of several processes gets its share of a batch, and images that cannot be read are refused.
    assert isinstance(engine.train_loader.batch_sampler, SeededBatches)
    assert engine.run(str(tmp_path / "log"), max_epoch=1)

    class Prefetching(DataLoader):
        def __iter__(self):
            return super().__iter__()

    for loader in (Prefetching(dataset, 8), [{"img": torch.zeros(8, 3, 4, 4)}]):
        with pytest.raises(InputError, match=rf"{type(loader).__name__} makes its batches in a way of its own"):
            engine.train_loader = loader
        manager = make_image_manager(tmp_path)
        manager.train_loader = loader
        with pytest.raises(InputError, match=rf"{type(loader).__name__} makes its batches in a way of its own"):
            engines.ImageDRSLEngine(manager, engine.model, engine.optimizer)


# Layers.


def test_fixed_base_then_all_but_what_was_frozen(tmp_path, capsys):
    engine = make_engine(tmp_path)
    engine.model.stem.bias.requires_grad = False
    seen = []
    step = engine.step

    def watched(loss):
        seen.append((engine.epoch, [name for name, p in engine.model.named_parameters() if p.requires_grad]))
        step(loss)

    engine.step = watched
    before = {name: p.clone() for name, p in engine.model.named_parameters()}
    engine.run(str(tmp_path / "log"), max_epoch=2, fixbase_epoch=1, open_layers="classifier")
    everything = [name for name in before if name != "stem.bias"]
    assert all(names == (["classifier.weight", "classifier.bias"], everything)[epoch] for epoch, names in seen)
    assert torch.equal(before["stem.bias"], engine.model.stem.bias)
    assert not torch.equal(before["stem.weight"], engine.model.stem.weight)
    assert "Only train classifier (epoch: 1/1)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the model has no layer head; its layers are stem, body, classifier"):
        engine.run(str(tmp_path / "log"), max_epoch=1, fixbase_epoch=1, open_layers=["head"])
    # A run that stops while a few layers train leaves the network as a whole.
    spoil(engine, {0})
    with pytest.raises(FloatingPointError):
        engine.run(str(tmp_path / "next"), max_epoch=1, fixbase_epoch=1, open_layers="classifier")
    assert [name for name, p in engine.model.named_parameters() if p.requires_grad] == everything
    assert all(module.training for module in engine.model.modules())


class FrozenStatistics(Network):
    def train(self, mode=True):
        super().train(mode)
        self.body[0].eval()
        return self


def test_a_network_may_keep_its_batch_normalisation_in_evaluation_mode(tmp_path):
    engine = make_engine(tmp_path)
    engine.model.__class__ = FrozenStatistics
    engine.run(str(tmp_path / "log"), max_epoch=2, fixbase_epoch=1, open_layers="classifier")
    assert engine.model.body[0].num_batches_tracked == 0


# Logs.


def test_lines_and_scalars(tmp_path, capsys):
    engine = make_engine(tmp_path)
    engine.run(str(tmp_path / "log"), max_epoch=2, print_freq=2, eval_freq=1)
    out, err = capsys.readouterr()
    lines = [line.split("\t") for line in out.splitlines() if line.startswith("epoch: ")]
    # Every second batch, and the last one of each epoch.
    assert [line[0] for line in lines] == [f"epoch: [{epoch}/2][{batch}/3]" for epoch in (1, 2) for batch in (2, 3)]
    assert [part.split()[0] for part in lines[0]] == [
        "epoch:", "time", "data", "eta", "loss_m", "retrieval_error", "sort_error", "num_queries", "loss_x",
        "acc", "lr",
    ]  # fmt: skip
    assert [line[-1] for line in lines] == ["lr 0.010000"] * 2 + ["lr 0.005000"] * 2
    # No progress bar into a file.
    assert "it/s" not in out + err and "%|" not in out + err
    events = EventAccumulator(str(tmp_path / "log")).Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {"Train/loss_m", "Train/loss_x", "Train/retrieval_error", "Train/lr"}
    assert tags >= {"Test/toy/mAP", "Test/toy/rank1"}
    pictures = events.Images("Test/toy/ranking")
    assert [picture.step for picture in pictures] == [0, 1] and pictures[0].height > 3 * 192
    # The share of errors, where the loss is the sum of its bound and of the error of sorting.
    errors, terms = ([event.value for event in events.Scalars(f"Train/{n}")] for n in ("retrieval_error", "loss_m"))
    assert all(0 <= error <= 1 for error in errors) and not set(errors) & set(terms)
    assert [event.step for event in events.Scalars("Train/lr")] == list(range(6))
    assert [event.value for event in events.Scalars("Train/lr")] == pytest.approx([0.01] * 3 + [0.005] * 3)


def test_a_test_after_a_run_does_not_open_its_log_again(tmp_path):
    engine = make_engine(tmp_path)
    engine.run(str(tmp_path / "log"), max_epoch=1)
    logs = list((tmp_path / "log").glob("events.*"))
    engine.test()
    assert len(logs) == 1 and list((tmp_path / "log").glob("events.*")) == logs


def test_a_data_manager_that_lists_no_test_images_has_scores_and_no_pictures(tmp_path):
    engine = make_engine(tmp_path)
    del engine.datamanager.test_dataset
    for options in ({"picture": 1}, {"visrank": True}):
        with pytest.raises(InputError, match="need the test images, and ImageDataManager lists none"):
            engine.run(str(tmp_path / "log"), max_epoch=1, **options)
    assert not (tmp_path / "log").exists()
    assert 0 < engine.run(str(tmp_path / "log"), max_epoch=1)["toy"].mAP <= 1
    engine = make_engine(tmp_path)
    # Sets that the data manager does not list, of which the second is none of torchreid's.
    toy = engine.test_loader["toy"]
    engine.test_loader["more"] = toy
    engine.test_loader["own"] = {part: DataLoader(list(loader.dataset), 8) for part, loader in toy.items()}
    results = engine.run(str(tmp_path / "more"), max_epoch=1)
    assert results["more"].to_dict() == results["own"].to_dict() == results["toy"].to_dict()
    tags = EventAccumulator(str(tmp_path / "log")).Reload().Tags()
    assert "Test/toy/mAP" in tags["scalars"] and not tags["images"]


class Keyed(torchreid.data.ImageDataset):
    """Reads no image files: its entries are other files, and two kinds of keys."""

    def __getitem__(self, index):
        key, pid, camid, _ = self.data[index]
        return {"img": torch.full((3, 64, 32), pid / 10), "pid": pid, "camid": camid, "impath": str(key)}


def test_a_data_set_without_image_files_trains_and_has_no_pictures(tmp_path):
    def fresh():
        engine = make_engine(tmp_path)
        for loader in (engine.train_loader, *engine.test_loader["toy"].values()):
            loader.dataset.dataset.__class__ = Keyed
            rows = [(path, number, *rest) for number, (path, *rest) in enumerate(loader.dataset.data)]
            loader.dataset.data[:] = [((f"{p}.npy", Path(p).name, n)[n % 3], *rest) for p, n, *rest in rows]
        return engine

    log = str(tmp_path / "log")
    with pytest.raises(InputError, match=r"picture draw image files, and .* of toy is none: leave them out"):
        fresh().run(log, max_epoch=1, picture=1)
    fresh().run(log, max_epoch=1)
    tags = EventAccumulator(log).Reload().Tags()
    assert "Test/toy/mAP" in tags["scalars"] and not tags["images"]
    assert fresh().resume("auto", log) == 1


def test_images_of_nobody_are_counted(tmp_path, capsys):
    engine = make_engine(tmp_path)
    parse = engine.parse_data_for_eval
    engine.parse_data_for_eval = lambda data: parse(data | {"pid": data["pid"].masked_fill(data["pid"] == 6, -1)})
    engine.test()
    # Two queries and two of the gallery, of the toy set's seventh identity.
    assert "\n4 images of identity -1 left out\n" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_on_a_terminal_alone(monkeypatch, terminal):
    stderr = io.StringIO()
    stderr.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    log = EpochLog(epoch=1, max_epoch=4, num_batches=3, print_freq=1, writer=None)
    assert list(log.batches("abc")) == list("abc")
    assert ("epoch 2/4:" in stderr.getvalue()) == terminal == bool(stderr.getvalue())
    # The time that has passed, and the time that is left.
    assert ("/3 [00:00<" in stderr.getvalue()) == terminal


def test_no_progress_bar_but_on_the_first_process(tmp_path, monkeypatch):
    stderr = io.StringIO()
    stderr.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert list(EpochLog(epoch=0, max_epoch=1, num_batches=3, print_freq=1, writer=None).batches("abc")) == list("abc")
    engine = make_engine(tmp_path)
    engine.model.eval()
    extraction.extract(engine, engine.test_loader["toy"]["query"])
    assert not stderr.getvalue()


@pytest.mark.parametrize("skipped", [(), (2,), (1, 2)])
def test_the_last_batch_of_every_epoch_is_printed(tmp_path, capsys, skipped):
    engine = make_engine(tmp_path)
    spoil(engine, set(skipped))
    engine.run(str(tmp_path / "log"), max_epoch=2, print_freq=1000, skip_nonfinite=True)
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if line.startswith("epoch: ")]
    assert [line[0] for line in lines] == ["epoch: [1/2][3/3]", "epoch: [2/2][3/3]"]
    # The averages are over the steps that were taken.
    assert all(math.isfinite(float(part.split()[1])) for line in lines for part in line if part.startswith("loss_m"))


@pytest.mark.parametrize("wrong", [{"checkpoint_freq": 0}, {"print_freq": 0}, {"max_epochs": 1}])
def test_wrong_options_of_a_run_are_refused_before_it_writes(tmp_path, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        make_engine(tmp_path).run(str(tmp_path / "log"), **wrong)
    assert not (tmp_path / "log").exists()


def test_run_takes_the_arguments_of_torchreid_with_their_defaults():
    """A script that was written for torchreid's engines must run unchanged."""
    of_torchreid = inspect.signature(torchreid.engine.Engine.run).parameters
    ours = RunOptions().arguments()
    for name, parameter in of_torchreid.items():
        if name != "self":
            assert ours[name] == parameter.default, name
