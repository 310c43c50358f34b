"""Tests a network on its target data sets during training, without any effect on the training."""

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
    """The part of ``BaseEngine`` that tests the network."""

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
        """Tests on every target, prints the results as torchreid does, and writes ``save_dir/metrics.json``.

        The random number generators are restored afterwards, so that training does not depend on the number of tests.
        The processes of a distributed run share the work, and the result is equal to the result of one process. Only
        the first process prints and writes.

        Args:
            dist_metric: ``"euclidean"`` or ``"cosine"``.
            normalize_feature: scale every feature to unit norm first.
            visrank: draw the ranking of every query.
            visrank_topk: number of gallery entries to draw for each query.
            save_dir: folder for the results. If it is empty, nothing is written.
            use_metric_cuhk03: use the single-gallery-shot protocol of CUHK03.
            ranks: CMC ranks to print.
            rerank: re-rank the results by k-reciprocal neighbours.
            picture: number of queries to draw on one page, ``save_dir/ranking_TARGET.png``; 0 draws no page.

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
            # The queries are spread evenly over the query set, so that the page shows many identities.
            indices = np.linspace(0, len(query) - 1, min(picture, len(query))).astype(int).tolist()
            page = Path(save_dir, f"ranking_{target}.png")
            evaluation.draw_page(search, paths, indices, topk, page, f"{target}: ranked gallery")
            print(f'Picture of ranked results saved to "{page}"')
        if visrank:
            index = evaluation.draw_all(search, paths, topk, Path(save_dir, f"visrank_{target}"), f"Rankings: {target}")
            print(f'Rankings of {len(query)} queries saved; open "{index}" in a browser')


def write_metrics(results: dict[str, RetrievalResult], save_dir: str) -> None:
    """Writes the results of each target to ``save_dir/metrics.json``."""
    text = json.dumps({target: result.to_dict() for target, result in results.items()}, indent=2) + "\n"
    with checkpoint.replacing(Path(save_dir, "metrics.json")) as file:
        file.write(text.encode())
