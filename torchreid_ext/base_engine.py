"""What every engine here adds to torchreid's: checkpoints that load, exact evaluation, and checks before training."""

from __future__ import annotations

import datetime
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchreid
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from pml_drsl.accuracy import RetrievalResult
from torchreid_ext import checkpoint, evaluation
from torchreid_ext.reading import readable


class BaseEngine(torchreid.engine.Engine):
    """An ``Engine`` of torchreid that can be depended on; mixes into the host's engines too.

    Attributes:
        results: of the last test, by target.

    Raises:
        ValueError: at construction, if the training loader cannot fill one batch.
    """

    def __init__(self, datamanager: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(datamanager, *args, **kwargs)
        self.results: dict[str, RetrievalResult] = {}
        self.train_loader = readable(datamanager.train_loader)
        self.test_loader = {
            target: {split: readable(loader) for split, loader in splits.items()}
            for target, splits in datamanager.test_loader.items()
        }
        check_fills_a_batch(self.train_loader)

    def run(
        self,
        save_dir: str = "log",
        max_epoch: int = 0,
        start_epoch: int = 0,
        print_freq: int = 10,
        fixbase_epoch: int = 0,
        open_layers: str | list[str] | None = None,
        start_eval: int = 0,
        eval_freq: int = -1,
        test_only: bool = False,
        visrank: bool = False,
        picture: int = 0,
        rerank: bool = False,
        **test_arguments: Any,
    ) -> dict[str, RetrievalResult]:
        """Trains, tests and saves, as torchreid's pipeline does; returns the last test's results by target.

        Args:
            save_dir: where checkpoints, the TensorBoard log, metrics and pictures go.
            max_epoch: epoch to train to.
            start_epoch: epoch to start from.
            print_freq: batches between two lines of the log.
            fixbase_epoch: epochs at the start that train only ``open_layers``.
            open_layers: names of those layers.
            start_eval: first epoch to test after.
            eval_freq: epochs between tests; -1 tests at the end alone.
            test_only: test, and do not train.
            visrank: draw the ranking of every query in the last test.
            picture: queries on the page of rankings drawn in the last test.
            rerank: re-rank in the last test.
            **test_arguments: of ``test``.
        """
        test_arguments["save_dir"] = save_dir
        last = {**test_arguments, "visrank": visrank, "picture": picture, "rerank": rerank}
        if test_only:
            return self.test(**last)
        started = time.monotonic()
        self.start_epoch, self.max_epoch = start_epoch, max_epoch
        self.writer = SummaryWriter(log_dir=save_dir)
        try:
            print("=> Start training")
            for self.epoch in range(start_epoch, max_epoch):
                self.train(print_freq=print_freq, fixbase_epoch=fixbase_epoch, open_layers=open_layers)
                done = self.epoch + 1
                if done == max_epoch:
                    print("=> Final test")
                    self.save_model(self.epoch, self.test(**last), save_dir)
                elif eval_freq > 0 and done >= start_eval and done % eval_freq == 0:
                    self.save_model(self.epoch, self.test(**test_arguments), save_dir)
        finally:
            self.writer.close()
        print(f"Elapsed {datetime.timedelta(seconds=round(time.monotonic() - started))}")
        return self.results

    def test(
        self,
        dist_metric: str = "euclidean",
        normalize_feature: bool = False,
        visrank: bool = False,
        visrank_topk: int = 10,
        save_dir: str = "",
        use_metric_cuhk03: bool = False,
        ranks: tuple[int, ...] | list[int] = (1, 5, 10, 20),
        rerank: bool = False,
        picture: int = 0,
    ) -> dict[str, RetrievalResult]:
        """Tests on every target, prints as torchreid does, and writes ``save_dir/metrics.json``.

        Leaves every random number generator as it was, so that training does not depend on how often it is tested.

        Args:
            dist_metric: ``"euclidean"`` or ``"cosine"``.
            normalize_feature: give features unit norm first.
            visrank: draw the ranking of every query, ``visrank_topk`` gallery entries each.
            save_dir: where results go; empty writes none.
            use_metric_cuhk03: CUHK03's single-gallery-shot protocol.
            ranks: CMC ranks to print.
            rerank: re-rank by k-reciprocal neighbours.
            picture: queries whose rankings are drawn on one page, ``save_dir/ranking_TARGET.png``.

        Returns:
            The result of each target.
        """
        self.set_model_mode("eval")
        self.results = {}
        with untouched_generators():
            for target, loaders in self.test_loader.items():
                domain = "source" if target in self.datamanager.sources else "target"
                print(f"##### Evaluating {target} ({domain}) #####")
                features = evaluation.extract(self, loaders["query"]), evaluation.extract(self, loaders["gallery"])
                search = evaluation.Search(*features, dist_metric, normalize_feature, rerank)
                result = search.evaluate(single_gallery_shot=use_metric_cuhk03)
                evaluation.print_result(result, ranks)
                self.results[target] = result
                if picture or visrank:
                    self._draw(target, search, picture, visrank, visrank_topk, save_dir)
                if self.writer is not None:
                    self.writer.add_scalar(f"Test/{target}/rank1", result.rank(1), self.epoch)
                    self.writer.add_scalar(f"Test/{target}/mAP", result.mAP, self.epoch)
        if save_dir:
            write_metrics(self.results, save_dir)
        return self.results

    def _draw(
        self, target: str, search: evaluation.Search, picture: int, visrank: bool, topk: int, save_dir: str
    ) -> None:
        query, gallery = self.datamanager.fetch_test_loaders(target)
        paths = [items[0] for items in query], [items[0] for items in gallery]
        if picture:
            # Evenly over the query set, so that the page shows many identities.
            indices = np.linspace(0, len(query) - 1, min(picture, len(query))).astype(int).tolist()
            page = Path(save_dir, f"ranking_{target}.png")
            evaluation.draw_page(search, paths, indices, topk, page, f"{target}: ranked gallery")
            print(f'Picture of ranked results saved to "{page}"')
        if visrank:
            index = evaluation.draw_all(search, paths, topk, Path(save_dir, f"visrank_{target}"), f"Rankings: {target}")
            print(f'Rankings of {len(query)} queries saved, to browse from "{index}"')

    def save_model(self, epoch: int, rank1: Any, save_dir: str, is_best: bool = False) -> None:
        """Writes ``save_dir/NAME/model.pth.tar-EPOCH`` for each registered model, as torchreid does, whole or not
        at all, loadable with ``weights_only=True``, and with a scheduler only where there is one."""
        results = rank1 if isinstance(rank1, dict) else {}
        for name in self.get_model_names():
            scheduler = self._scheds[name]
            state = {
                "state_dict": self._models[name].state_dict(),
                "epoch": epoch + 1,
                "rank1": list(results.values())[-1].rank(1) if results else float(rank1),
                "optimizer": self._optims[name].state_dict(),
            }
            if scheduler is not None:
                state["scheduler"] = scheduler.state_dict()
            path = Path(save_dir, name, f"model.pth.tar-{epoch + 1}")
            checkpoint.save(state, path)
            print(f'Checkpoint saved to "{path}"')
            if is_best:
                checkpoint.save(state, path.with_name("model-best.pth.tar"))

    def check_finite(self, loss: Tensor) -> None:
        """Raises FloatingPointError for a loss that is NaN or infinite, before it spoils the weights."""
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} in epoch {self.epoch + 1}, batch {self.batch_idx + 1}: "
                f"try a smaller learning rate, now {self.get_current_lr()}"
            )


def check_fills_a_batch(loader: Any) -> None:
    """Raises ValueError if the loader would train on nothing, as torchreid silently does."""
    with untouched_generators():
        drawn = sum(1 for _ in loader.sampler)
    if drawn < (loader.batch_size or 1):
        raise ValueError(
            f"a batch of {loader.batch_size} cannot be filled: {type(loader.sampler).__name__} draws {drawn} of the "
            f"{len(loader.dataset)} training samples an epoch; make train.batch_size smaller"
        )


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Restores the state of the global generators of python, numpy and torch (CUDA included) on leaving."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def write_metrics(results: dict[str, RetrievalResult], save_dir: str) -> None:
    """Writes the results, by target, to ``save_dir/metrics.json``."""
    path = Path(save_dir, "metrics.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({target: result.to_dict() for target, result in results.items()}, indent=2) + "\n")
