"""Testing a network on its targets, as torchreid's engines do, but leaving no trace in the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pml_drsl.evaluation.accuracy import RetrievalResult
from torchreid_ext.checkpointing import file as checkpoint
from torchreid_ext.evaluation import search as evaluation
from torchreid_ext.runtime import distributed
from torchreid_ext.runtime import random as generators


class Tester:
    """The part of an engine that tests; see ``BaseEngine``."""

    test_loader: dict[str, dict[str, Any]]
    datamanager: Any
    writer: Any
    epoch: int
    results: dict[str, RetrievalResult]
    set_model_mode: Any

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
        The processes of a distributed run share the work, with the result of one process; the first alone prints and
        writes.

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
        group, first = distributed.group(), distributed.is_first()
        with generators.untouched():
            for target, loaders in self.test_loader.items():
                domain = "source" if target in self.datamanager.sources else "target"
                if first:
                    print(f"##### Evaluating {target} ({domain}) #####")
                query, gallery = (evaluation.extract(self, loaders[split], group) for split in ("query", "gallery"))
                search = evaluation.Search(query, gallery, dist_metric, normalize_feature, rerank)
                result = search.evaluate(use_metric_cuhk03, max_rank=max(50, *ranks), group=group)
                self.results[target] = result
                if not first:
                    continue
                evaluation.print_result(result, ranks)
                if picture or visrank:
                    self._draw(target, search, picture, visrank, visrank_topk, save_dir)
                if self.writer is not None:
                    self.writer.add_scalar(f"Test/{target}/rank1", result.rank(1), self.epoch)
                    self.writer.add_scalar(f"Test/{target}/mAP", result.mAP, self.epoch)
        if save_dir and first:
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


def write_metrics(results: dict[str, RetrievalResult], save_dir: str) -> None:
    """Writes the results, by target, to ``save_dir/metrics.json``."""
    text = json.dumps({target: result.to_dict() for target, result in results.items()}, indent=2) + "\n"
    with checkpoint.replacing(Path(save_dir, "metrics.json")) as file:
        file.write(text.encode())
