"""The base of every engine: training that can be interrupted and resumed exactly."""

from __future__ import annotations

import datetime
import errno
import functools
import operator
import re
import time
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from pml_drsl.checks import InputError
from pml_drsl.evaluation.scores import RetrievalResult
from torchreid_ext import networks
from torchreid_ext.checkpoint import checkpoint, states
from torchreid_ext.checkpoint.folder import BEST, History, RunCheckpoints
from torchreid_ext.data.loading import list_as_first, readable, repeatable
from torchreid_ext.data.samplers import check_trains, whole_batches
from torchreid_ext.engine.epoch import EpochLog, Layers
from torchreid_ext.engine.options import RunOptions
from torchreid_ext.engine.step import Stepper, TrainingStep
from torchreid_ext.evaluation.tester import Tester
from torchreid_ext.runtime import distributed
from torchreid_ext.runtime.signals import Interrupted, StopRequest


class BaseEngine(Tester, TrainingStep):
    """An engine of torchreid whose runs can be interrupted and resumed exactly.

    A subclass sets ``self.model`` and calls ``register_model``, also for further models that it trains, and implements
    ``compute_losses``. In a run of several processes, inside ``distributed.joined``, each process trains on its share
    of every batch. (torchreid's ``RandomIdentitySampler`` is replaced by ``IdentitySampler``.) Raises InputError as
    ``check_trains`` and ``list_as_first``.
    """

    def __init__(self, datamanager: Any, *args: Any, **kwargs: Any) -> None:
        check_trains(datamanager)
        list_as_first(datamanager)
        super().__init__(datamanager, *args, **kwargs)  # which sets train_loader
        self.results: dict[str, RetrievalResult] = {}  # of the latest test, by target
        self.rank1 = 0.0  # of the latest test, on its last target
        # The mean mAP over the targets of the best test so far, and the epoch after which it was.
        self.best: dict[str, float] = dict(states.NO_BEST)
        # Flat, saved with the run and compared when it is resumed; for ``on_resume`` see ``Key.on_resume``.
        self.config: dict[str, Any] = {}
        self.on_resume: dict[str, str] = {}
        self.skipped = self.batch_idx = self.max_epoch = 0
        self.people: list[str] = []  # of configured data sets that are trained on, by ``config.data.person``
        self.host_epochs = 0  # how many epochs torchreid trained, whose checkpoints are never removed
        self.stop = StopRequest()
        self.options = RunOptions()
        self.stepper = Stepper()
        self._checkpoints = RunCheckpoints(self, Path(), 0, None)  # of the present run
        self._resumed: dict[str, Any] = {}
        self._resumed_from: Path | None = None
        self._layers: dict[nn.Module, Layers] = {}
        self.test_loader = {
            target: {split: readable(loader) for split, loader in splits.items()}
            for target, splits in datamanager.test_loader.items()
        }

    @property
    def train_loader(self) -> DataLoader[Any]:
        return self._train_loader

    @train_loader.setter
    def train_loader(self, loader: DataLoader[Any]) -> None:
        self._train_loader = repeatable(whole_batches(loader))

    @functools.cached_property
    def training_set(self) -> str | None:
        """The digest of the training images and their identities; None for a data manager that does not list them."""
        items = getattr(self.datamanager.train_loader.dataset, "train", None)
        return states.digest(items) if isinstance(items, list) and items else None

    def run(self, save_dir: str = "log", **options: Any) -> dict[str, RetrievalResult]:
        """Trains, tests and saves, as torchreid's engines do; returns the results of the last test by target.

        The options are the fields of ``RunOptions``; torchreid's arguments keep their names and defaults. On SIGTERM,
        SIGINT (Ctrl-C) or SIGHUP (a closed terminal) the run stops after the present batch and saves the state in which
        the epoch, or the test after it, began. A resumed run repeats that epoch or test exactly. The state is also
        saved after an error, if the run has trained an epoch.

        Raises:
            InputError: for an unknown option, a value out of its range, or an option that does not fit the data manager
                or an own ``forward_backward``; for another ``start_epoch`` than ``resume`` returned, unless that was 0;
                and for a ``self.model`` that is not registered.
            FloatingPointError: for a loss or a weight that is not finite.
            Interrupted: if a signal asked the run to stop, also in its last test; everything is saved.
        """
        if self.model not in self._models.values():
            cure = "set self.model, which is trained and tested, and call self.register_model with it"
            raise InputError(f"{type(self).__name__} has no registered self.model: {cure}")
        self.options = chosen = RunOptions.of({"save_dir": save_dir, **options})
        self.check_pictures(chosen)
        for module in (*self._models.values(), *states.losses_of(self).values()):
            distributed.same_as_first(module)
        for model in self._models.values():
            height, width = getattr(self.datamanager, "height", 256), getattr(self.datamanager, "width", 128)
            networks.set_memory_format(model, chosen.channels_last, height, width, half=chosen.amp != "off")
        if chosen.test_only:
            return self.test(**chosen.last_test())
        started = time.monotonic()
        self._prepare()
        try:
            with self.stop:
                self._train_and_test()
        except (Exception, Interrupted) as error:
            # A signal may also have reached a process of the loader, which died of it, or only another process. A
            # terminal that was closed takes no text any more.
            dead = bool(re.search(r"DataLoader worker \(pid|Connection closed by peer", str(error)))
            dead |= getattr(error, "errno", None) == errno.EIO
            signum = getattr(error, "signal", self.stop.signum if dead else None)
            if signum is None:
                self._checkpoints.failed()
                raise
            raise Interrupted(signum, self._checkpoints.interrupted()) from error
        finally:
            if self.writer is not None:
                # A later test of this engine would otherwise open the log of the run again.
                self.writer.close()
                self.writer = None
            while self._layers:
                self._layers.popitem()[1].open()
            self.model.train(self.model.training)  # as a whole, because a few of its layers may have trained alone
            self._checkpoints.start = None
            stop, self.stop = self.stop, StopRequest()
        # A signal may reach one process alone. The others must not go on with another run: they would wait for it.
        _, signum = distributed.agreed({}, stop.signum)
        if signum is not None:
            raise Interrupted(signum, "; the run was done, and everything is saved")
        if self.skipped:
            print(f"Skipped {self.skipped} steps whose loss was not finite")
        print(f"Elapsed {datetime.timedelta(seconds=round(time.monotonic() - started))}")
        return self.results

    def _prepare(self) -> None:
        """Makes what a run needs, and refuses options that do not fit the model or what was resumed."""
        chosen = self.options
        if (done := self._resumed.get("epoch", 0)) and chosen.start_epoch != done:
            other = f"resume returned {done}, and start_epoch is {chosen.start_epoch}"
            raise InputError(f"{other}: give start_epoch={done}")
        self._layers = {self.model: Layers(self.model)}
        if chosen.fixbase_epoch > 0:
            self._layers[self.model].check(chosen.open_layers, "train.open_layers")
        folder = self._folder(chosen.save_dir)
        self._checkpoints = RunCheckpoints(self, folder, chosen.keep_checkpoints, self._resumed_from)
        self.stepper = Stepper(chosen.amp, chosen.compiled, self.device.type, chosen.chunk_size)
        self.stepped = False
        self.start_epoch, self.max_epoch, self.epoch = chosen.start_epoch, chosen.max_epoch, chosen.start_epoch - 1
        # A resumed run repeats the interrupted epoch, whose entries in the TensorBoard log are removed.
        purge_step = self.start_epoch * len(self.train_loader) if self._resumed else None

        def open_log() -> None:
            self.writer = SummaryWriter(log_dir=chosen.save_dir, purge_step=purge_step)

        distributed.from_first(open_log)

    def _train_and_test(self) -> None:
        chosen, checkpoints = self.options, self._checkpoints
        states.restore_randomness(self, self._resumed, str(self._resumed_from))
        best, begins = int(self.best["epoch"]), not (self._resumed or self.start_epoch)
        goes_on = best > 0 and self.max_epoch > 0 and not begins
        # A second run of the engine begins anew; one that goes back may have given up what was best.
        if begins or (goes_on and not distributed.from_first(lambda: checkpoints.put_back_best(best))):
            self.best = dict(states.NO_BEST)
        test_due = bool(self._resumed.get("test_due"))
        self._resumed, self._resumed_from = {}, None
        if self.start_epoch < self.max_epoch:
            distributed.from_first(lambda: checkpoint.check_saves(states.of_engine(self, self.start_epoch)))
            if test_due:
                print(f"=> The run was stopped in the test after epoch {self.start_epoch}")
                self._test_and_save()
            print("=> Start training")
            for self.epoch in range(chosen.start_epoch, chosen.max_epoch):
                checkpoints.begin(self.epoch)
                self.train(chosen.print_freq, chosen.fixbase_epoch, chosen.open_layers)
                self._test_and_save()
            return
        print(f"=> Trained {self.start_epoch} epochs already")
        if self.max_epoch > 0:
            # The run may have been killed between its last checkpoint and the removal of earlier checkpoints.
            distributed.from_first(lambda: checkpoints.tidy(self.start_epoch))
            # Without an earlier score by this measure, there is nothing that says which weights are better.
            comparable = self.best["epoch"] > 0 or not (checkpoints.folder / BEST).exists()
            is_best = self._is_best(self.test(**chosen.last_test())) and comparable
            if is_best or test_due:
                checkpoints.save_present(is_best)

    def _test_and_save(self) -> None:
        """Tests and saves after the present epoch, where the options say so."""
        chosen, done, is_best = self.options, self.epoch + 1, False
        last = done == self.max_epoch
        tested = last or (chosen.eval_freq > 0 and done >= chosen.start_eval and done % chosen.eval_freq == 0)
        if last:
            print("=> Final test, of the last weights")
        if tested:  # A test that fails or is stopped must not lose what was trained.
            self._checkpoints.begin(done, test_due=True)
            is_best = self._is_best(self.test(**(chosen.last_test() if last else chosen.test_between())))
        if tested or done % chosen.checkpoint_freq == 0:
            self._checkpoints.save_present(is_best)
        if last and not is_best and self.best["epoch"] > 0:
            print(f"The best weights are those of epoch {self.best['epoch']}, with a mAP of {self.best['mAP']:.1%}")

    def train(self, print_freq: int = 10, fixbase_epoch: int = 0, open_layers: str | list[str] | None = None) -> None:
        """Trains one epoch, of the first ``fixbase_epoch`` only ``open_layers``; raises as ``run``."""
        self.set_model_mode("train")
        self.two_stepped_transfer_learning(self.epoch, fixbase_epoch, open_layers)
        self.num_batches = len(self.train_loader)
        log = EpochLog(self.epoch, self.max_epoch, self.num_batches, print_freq, self.writer)
        steps, skipped_before = 0, self.skipped
        for index, data in enumerate(log.batches(self.train_loader)):
            self.batch_idx, skipped = index, self.skipped
            steps += 1
            # All processes must stop after the same batch, or some would wait for ever.
            summary, signum = distributed.agreed(self.forward_backward(data) or {}, self.stop.signum)
            if steps == 1:
                self.check_stepper()
            if self.skipped == skipped:
                log.add(index, summary, self.get_current_lr())
            if signum is not None:
                raise Interrupted(signum)
        number, skipped, overflows = self.epoch + 1, self.skipped - skipped_before, self.stepper.overflows()
        if skipped == steps:
            none = f"epoch {number} had no batch with a finite loss, of {steps} that the loader gave"
            raise FloatingPointError(f"{none}{self._checkpoints.last_good()}")
        if overflows:
            print(f"Epoch {number}: fp16 left out {overflows} of {steps} steps, whose scaled gradients were not finite")
        # The scale begins high, so that all steps of a short first epoch may be left out. One below 1 does not help.
        first = self.epoch == self.options.start_epoch
        if skipped + overflows == steps and not (first and self.stepper.scaler.get_scale() >= 1):
            none = f"epoch {number} had no step with finite gradients in fp16, of {steps}"
            raise FloatingPointError(f"{none}: try train.amp bf16{self._checkpoints.last_good()}")
        log.line(steps, self.get_current_lr())
        for model in self._models.values():
            distributed.average(buffer for buffer in model.buffers() if buffer.is_floating_point())
        self.update_lr()

    def two_stepped_transfer_learning(
        self, epoch: int, fixbase_epoch: int, open_layers: str | list[str] | None, model: nn.Module | None = None
    ) -> None:
        """Lets only ``open_layers`` of a model train in an epoch before ``fixbase_epoch``, and all layers afterwards.
        Layers that the user froze stay frozen."""
        model = self.model if model is None else model
        opened = open_layers if epoch < fixbase_epoch else None
        if opened is not None:
            print(f"* Only train {opened} (epoch: {epoch + 1}/{fixbase_epoch})")
        self._layers.setdefault(model, Layers(model)).open(opened)

    def save_model(self, epoch: int, rank1: float, save_dir: str, is_best: bool = False) -> None:
        """Writes ``save_dir/model/model.pth.tar-EPOCH``, where EPOCH is counted from 1, as torchreid does."""
        self.rank1 = float(rank1)
        history = History(self._folder(save_dir))
        distributed.from_first(lambda: history.save(states.of_engine(self, epoch + 1), epoch + 1, is_best))

    def resume(self, path: str, save_dir: str = "log", test_only: bool = False) -> int:
        """Loads a checkpoint; returns its epoch, which is the ``start_epoch`` for ``run``.

        ``path`` is a checkpoint of this package or of torchreid, or ``"auto"``: the newest in ``save_dir`` that can be
        read. Raises InputError if there is nothing to load, if the checkpoint does not fit, or if ``config`` differs
        from the checkpoint's in a key that cannot change.
        """
        folder = self._folder(save_dir)
        found = distributed.from_first(
            lambda: History(folder).load_newest() if path == "auto" else (Path(path), checkpoint.load(path))
        )
        if found is None:
            print(f"model.resume auto: there is no checkpoint in '{folder}'; starting anew")
            return 0
        path, state = str(found[0]), found[1]
        with checkpoint.fitting(path):
            states.check_fits(self, state, path, test_only)
            states.restore_engine(self, state, path)
            epoch = operator.index(state["epoch"])
        if found[0].parent.resolve() != folder.resolve():
            self.best = dict(states.NO_BEST)  # whose file stays in the other folder
        self._resumed, self._resumed_from = state, found[0]
        print(f"Resuming from '{path}' after epoch {epoch}")
        return epoch

    def _folder(self, save_dir: str) -> Path:
        return Path(save_dir, self.get_model_names()[0])

    def _is_best(self, results: dict[str, RetrievalResult]) -> bool:
        if not results:
            return False
        mean_ap = sum(result.mAP for result in results.values()) / len(results)
        self.rank1 = float(list(results.values())[-1].rank(1))
        if mean_ap <= self.best["mAP"]:
            return False
        self.best = {"mAP": mean_ap, "epoch": self.epoch + 1}
        return True
