"""What every engine here adds to torchreid's: training that can be interrupted, resumed and depended on."""

from __future__ import annotations

import datetime
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torchreid
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from pml_drsl.checks import InputError
from pml_drsl.evaluation.accuracy import RetrievalResult
from torchreid_ext.checkpointing import resume as resuming
from torchreid_ext.checkpointing import state as states
from torchreid_ext.checkpointing.folder import History
from torchreid_ext.data.loading import readable
from torchreid_ext.data.samplers import check_trains, whole_batches
from torchreid_ext.data.seeding import repeatable
from torchreid_ext.engine.batch import Batch, for_each_view, views_as_images
from torchreid_ext.engine.freezing import Layers
from torchreid_ext.engine.logs import EpochLog
from torchreid_ext.engine.options import RunOptions
from torchreid_ext.engine.stepper import Stepper
from torchreid_ext.evaluation.tester import Tester
from torchreid_ext.runtime import distributed
from torchreid_ext.runtime.signals import Interrupted, StopRequest


class BaseEngine(Tester, torchreid.engine.Engine):
    """An ``Engine`` of torchreid that can be depended on; mixes into the host's engines too.

    In each process of a run that torchrun started, inside ``distributed.joined``, it trains on a share of every batch.

    Attributes:
        results: of the last test, by target.
        rank1: of the last test, on its last target.
        best: mean mAP over the targets of the best test so far, and the epoch after which it was; -1 before any.
        config: flat configuration of the run (dotted key, plain value), saved with it and compared on resuming.
        options: options of the present run.
        skipped: steps left out because their loss was not finite.
        stepper: steps the optimizers in the precision asked for.
        stop: whether a signal asked the run to stop.

    Raises:
        InputError: at construction, if the training loader cannot fill one batch, knows one identity alone, or draws
            identities (torchreid's ``RandomIdentitySampler``, replaced by ours) of which no batch holds two.
    """

    def __init__(self, datamanager: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(datamanager, *args, **kwargs)
        self.results: dict[str, RetrievalResult] = {}
        self.best: dict[str, float] = {"mAP": -1.0, "epoch": -1}
        self.config: dict[str, Any] = {}
        self.skipped = self.batch_idx = self.max_epoch = 0
        self.stop = StopRequest()
        self.rank1 = 0.0
        self.options = RunOptions()
        self.stepper = Stepper()
        self._history: History | None = None
        self._start: dict[str, Any] | None = None
        self._resumed: dict[str, Any] = {}
        self._resumed_from: Path | None = None
        self._layers: dict[nn.Module, Layers] = {}
        check_trains(datamanager)
        self.train_loader = repeatable(readable(whole_batches(datamanager.train_loader)))
        self.test_loader = {
            target: {split: readable(loader) for split, loader in splits.items()}
            for target, splits in datamanager.test_loader.items()
        }

    def run(self, save_dir: str = "log", **options: Any) -> dict[str, RetrievalResult]:
        """Trains, tests and saves, as torchreid's pipeline does; returns the last test's results by target.

        On SIGTERM or SIGINT it stops after the batch at hand, with the state in which the epoch began saved: resumed,
        it repeats that epoch, exactly.

        Args:
            save_dir: folder for checkpoints, the TensorBoard log, metrics and pictures.
            **options: the other fields of ``RunOptions``; torchreid's arguments keep their names and defaults.

        Raises:
            InputError: for an unknown option, or a value out of its range.
            FloatingPointError: for a loss, or weights, that are not finite.
            Interrupted: when a signal asked to stop; everything is saved.
        """
        self.options = chosen = RunOptions.of({"save_dir": save_dir, **options})
        for module in (*self._models.values(), *states.losses_of(self).values()):
            distributed.same_as_first(module)
        if chosen.test_only:
            return self.test(**chosen.last_test())
        self._layers = {self.model: Layers(self.model)}
        if chosen.fixbase_epoch > 0:
            self._layers[self.model].check(_names(chosen.open_layers))
        self._history = History(self._folder(save_dir), chosen.keep_checkpoints)
        self._history.newest = self._resumed_from
        self.stepper = Stepper(chosen.amp, chosen.compiled, self._device().type, chosen.channels_last)
        self.start_epoch, self.max_epoch = start_epoch, max_epoch = chosen.start_epoch, chosen.max_epoch
        started = time.monotonic()
        # What an interrupted epoch wrote to the TensorBoard log is dropped when the epoch is repeated.
        purge_step = start_epoch * len(self.train_loader) if self._resumed else None
        self.writer = SummaryWriter(log_dir=save_dir, purge_step=purge_step) if distributed.is_first() else None
        try:
            with self.stop:
                states.restore_randomness(self, self._resumed)
                self._resumed = {}
                print("=> Start training" if start_epoch < max_epoch else f"=> Trained {start_epoch} epochs already")
                for self.epoch in range(start_epoch, max_epoch):
                    # What is on the disk need not be kept in memory, nor by a process that does not save.
                    kept = self._history.saved_epoch == self.epoch or not distributed.is_first()
                    self._start = None if kept else states.copied(states.of_engine(self, self.epoch))
                    self.train(chosen.print_freq, chosen.fixbase_epoch, chosen.open_layers)
                    done = self.epoch + 1
                    tested, is_best = done == max_epoch, False
                    if tested:
                        print("=> Final test")
                        is_best = self._test_or_save(chosen.last_test())
                    elif chosen.tests_after(done):
                        tested, is_best = True, self._test_or_save(chosen.test_between())
                    if tested or done % chosen.checkpoint_freq == 0:
                        self._save(is_best)
                if start_epoch >= max_epoch > 0:
                    if distributed.is_first():
                        # It may have been killed between its last checkpoint and this.
                        self._history.tidy(start_epoch)
                    self.epoch = max_epoch - 1
                    if self._is_best(self.test(**chosen.last_test())):
                        self._save(True)
        except (Interrupted, RuntimeError) as error:
            # A worker of the loader may have got the signal too, and died of it; or another process alone got it.
            signum = getattr(error, "signal", self.stop.signum)
            if signum is None:
                raise
            raise Interrupted(signum, self._save_start_of_epoch(signum)) from error
        finally:
            if self.writer is not None:
                self.writer.close()
            self._layers.pop(self.model).open_all()
            self._start, self.stop = None, StopRequest()
        if self.skipped:
            print(f"Skipped {self.skipped} steps whose loss was not finite")
        print(f"Elapsed {datetime.timedelta(seconds=round(time.monotonic() - started))}")
        return self.results

    def train(self, print_freq: int = 10, fixbase_epoch: int = 0, open_layers: str | list[str] | None = None) -> None:
        """Trains one epoch.

        Raises:
            FloatingPointError: if a loss is not finite; with ``skip_nonfinite``, if the loss of every batch is not.
            InputError: if the training loader gives no batch.
            Interrupted: if a signal asked the run to stop.
        """
        self.set_model_mode("train")
        self.two_stepped_transfer_learning(self.epoch, fixbase_epoch, open_layers)
        self.num_batches = len(self.train_loader)
        log = EpochLog(self.epoch, self.max_epoch, self.num_batches, print_freq, self.writer)
        steps, skipped_before = 0, self.skipped
        for index, data in enumerate(log.batches(self.train_loader)):
            self.batch_idx, skipped = index, self.skipped
            steps += 1
            # All processes must stop after the same batch, or some would wait for ever. A signal that comes later is
            # noticed after the next batch.
            summary, signum = distributed.agreed(self.forward_backward(data), self.stop.signum)
            if self.skipped == skipped:
                log.add(index, summary, self.get_current_lr())
            if signum is not None:
                self.stop.signum = signum
                self.stop.check()
        if steps == 0:
            raise InputError(
                f"no batch came in epoch {self.epoch + 1}, where the loader's length is {self.num_batches}: its "
                f"sampler must draw as many samples as its __len__ says"
            )
        if self.skipped - skipped_before == steps:
            raise FloatingPointError(
                f"the loss of every batch of epoch {self.epoch + 1} is not finite{self._last_good()}"
            )
        log.finish(self.get_current_lr())
        for model in self._models.values():
            distributed.average_buffers(model)
        self.update_lr()

    def forward_backward(self, data: dict[str, Any]) -> dict[str, float]:
        """Takes one training step on a batch of the loader, and returns the values to log by name."""
        batch = self.training_batch(data)
        loss, summary = self.compute_losses(self.forward(batch.images), batch)
        self.step(loss)
        return summary

    def training_batch(self, data: dict[str, Any]) -> Batch:
        """The images, identities and cameras of a batch of the loader, on the model's device."""
        images, pids = self.parse_data_for_train(data)
        camids = self.parse_cameras(data) if "camid" in data else None
        return Batch(images, pids, camids).to(self._device())

    def parse_data_for_train(self, data: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The images and identities of a batch of the loader; every augmented view is an image of its own."""
        return views_as_images(data["img"]), for_each_view(data["pid"], data["img"])

    def parse_cameras(self, data: dict[str, Any]) -> Tensor:
        """The camera of each of the images, shape (N,)."""
        return for_each_view(data["camid"], data["img"])

    def compute_losses(self, output: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, a scalar, and the values to log by name.

        Args:
            output: what the model returned for ``batch.images`` in training.
            batch: this process's share of the batch.
        """
        raise NotImplementedError

    def local_mean_scale(self, pids: Tensor) -> float:
        """The factor that makes the mean over the processes of a local mean equal to the mean over all samples."""
        return 1.0

    def forward(self, images: Tensor) -> Any:
        """What the model returns in training, in ``amp``'s precision inside and in float32 outside."""
        if self.options.skip_nonfinite:
            self._put_back = states.keep_buffers([self.model, *states.losses_of(self).values()])
        return self.stepper.forward(self.model, images)

    def step(self, loss: Tensor) -> None:
        """Steps the optimizers of every registered model on a loss, of several processes the mean of theirs.

        Raises:
            FloatingPointError: if the loss is not finite, unless such steps are skipped.
        """
        value = distributed.mean(loss)
        if self.options.skip_nonfinite and not torch.isfinite(value):
            self._put_back()
            self.skipped += 1
            print(f"Skipped epoch {self.epoch + 1}, batch {self.batch_idx + 1}: the loss is {value.item()}")
            return
        self.check_finite(value)
        self.stepper.step(loss, [optimizer for optimizer in self._optims.values() if optimizer is not None])

    def check_finite(self, loss: Tensor) -> None:
        """Raises FloatingPointError for a loss that is NaN or infinite, before it spoils the weights."""
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} in epoch {self.epoch + 1}, batch {self.batch_idx + 1}: "
                f"try a smaller learning rate, now {self.get_current_lr()}{self._last_good()}"
            )

    def two_stepped_transfer_learning(
        self, epoch: int, fixbase_epoch: int, open_layers: str | list[str] | None, model: nn.Module | None = None
    ) -> None:
        """Opens all layers, or ``open_layers`` alone in the first epochs; what the user froze stays frozen."""
        model = self.model if model is None else model
        layers = self._layers.setdefault(model, Layers(model))
        if epoch < fixbase_epoch and open_layers is not None:
            print(f"* Only train {open_layers} (epoch: {epoch + 1}/{fixbase_epoch})")
            layers.open_only(_names(open_layers))
        else:
            layers.open_all()

    def save_model(self, epoch: int, rank1: float, save_dir: str, is_best: bool = False) -> None:
        """Writes ``save_dir/model/model.pth.tar-EPOCH``, EPOCH counted from 1, as torchreid does."""
        self.rank1 = float(rank1)
        if distributed.is_first():
            History(self._folder(save_dir)).save(states.of_engine(self, epoch + 1), epoch + 1, is_best)

    def resume(self, path: str, save_dir: str = "log", since: float = 0, test_only: bool = False) -> int:
        """Loads a checkpoint to go on from and returns its epoch, ``run``'s ``start_epoch``.

        Args:
            path: a checkpoint, ours or torchreid's, or ``"auto"``: the newest in ``save_dir`` that can be read.
            save_dir: of the run, for ``"auto"``.
            since: of the checkpoints there, those written at this time or later, in seconds since 1970.
            test_only: whatever number of processes trained it.

        Raises:
            InputError: if there is nothing to load, it does not fit, or ``config`` differs in what cannot change.
        """
        found = distributed.from_first(lambda: resuming.find(path, self._folder(save_dir), since))
        if found is None:
            print(f"model.resume auto: there is no checkpoint in '{self._folder(save_dir)}'; starting anew")
            return 0
        path, state = found
        resuming.check_fits(path, state, self.datamanager.num_train_pids, self.config, test_only)
        states.restore_engine(self, state, path)
        self._resumed, self._resumed_from = state, Path(path)
        print(f"Resuming from '{path}' after epoch {state['epoch']}")
        return int(state["epoch"])

    def _folder(self, save_dir: str) -> Path:
        return Path(save_dir, self.get_model_names()[0])

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _is_best(self, results: dict[str, RetrievalResult]) -> bool:
        if not results:
            return False
        mean_ap = sum(result.mAP for result in results.values()) / len(results)
        self.rank1 = float(list(results.values())[-1].rank(1))
        if mean_ap <= self.best["mAP"]:
            return False
        self.best = {"mAP": mean_ap, "epoch": self.epoch + 1}
        return True

    def _test_or_save(self, arguments: dict[str, Any]) -> bool:
        """Whether a test is the best so far; if it fails (on a damaged image, say), what was trained is saved first."""
        try:
            return self._is_best(self.test(**arguments))
        except Exception:
            if self.stop.signum is None:
                self._save(False)
            raise

    def _save(self, is_best: bool) -> None:
        assert self._history is not None
        for model in self._models.values():
            for name, weights in model.state_dict().items():
                if not torch.isfinite(weights).all():
                    raise FloatingPointError(f"{name} is not finite after epoch {self.epoch + 1}{self._last_good()}")
        history, done = self._history, self.epoch + 1
        path = distributed.from_first(lambda: history.save(states.of_engine(self, done), done, is_best))
        history.newest, history.saved_epoch = path, done
        print(f'Checkpoint saved to "{path}"' + (f" (best so far: mAP {self.best['mAP']:.1%})" if is_best else ""))

    def _save_start_of_epoch(self, signum: int) -> str:
        """Saves the state in which the epoch began, unless it is saved; returns what to tell the user."""
        assert self._history is not None
        if self._start is not None:
            self._history.save(self._start, self.epoch)
        return (
            f"stopped by {signal.Signals(signum).name} in epoch {self.epoch + 1}; model.resume auto begins it again "
            f"from '{self._history.newest}'"
        )

    def _last_good(self) -> str:
        newest = self._history.newest if self._history else None
        return f"; the last good checkpoint is '{newest}'" if newest else "; no checkpoint was saved"


def _names(layers: str | list[str] | None) -> list[str]:
    return [layers] if isinstance(layers, str) else layers or []
