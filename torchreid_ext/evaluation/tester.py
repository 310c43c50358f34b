"""Tests a network on its target data sets during training, without any effect on the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pml_drsl.evaluation.scores import RankedQueries, RetrievalResult, summarize
from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.evaluation import ranking
from torchreid_ext.evaluation.options import EvaluationOptions
from torchreid_ext.runtime import distributed, generators


class Tester:
    """The part of ``BaseEngine`` that tests the network."""

    test_loader: dict[str, dict[str, Any]]
    datamanager: Any
    writer: Any
    epoch: int
    results: dict[str, RetrievalResult]
    set_model_mode: Any

    def test(self, **options: Any) -> dict[str, RetrievalResult]:
        """Tests on every target, prints the results as torchreid does, and writes ``save_dir/metrics.json``.

        The random number generators are restored afterwards, so that training does not depend on the number of tests.
        The processes of a distributed run share the work, and the result is equal to the result of one process. Only
        the first process prints and writes.

        Args:
            **options: fields of ``EvaluationOptions``.

        Returns:
            The result of each target.

        Raises:
            InputError: for an unknown option, or a value out of its range.
        """
        chosen = EvaluationOptions.of(options)
        self.set_model_mode("eval")
        self.results = {}
        group, first = distributed.group(), distributed.is_first()
        with generators.untouched():
            for target, loaders in self.test_loader.items():
                domain = "source" if target in self.datamanager.sources else "target"
                if first:
                    print(f"##### Evaluating {target} ({domain}) #####")
                query, gallery = (ranking.extract(self, loaders[split], group) for split in ("query", "gallery"))
                search = ranking.Search(query, gallery, chosen.dist_metric, chosen.normalize_feature, chosen.rerank)
                ranked = search.ranked(chosen.use_metric_cuhk03, group)
                result = summarize(ranked, max(50, *chosen.ranks))
                self.results[target] = result
                if not first:
                    continue
                ranking.print_result(result, chosen.ranks)
                if chosen.queries and chosen.save_dir:
                    write_queries(search, ranked, Path(chosen.save_dir, f"queries_{target}.csv"))
                if chosen.picture or chosen.visrank:
                    self._draw(target, search, chosen)
                if self.writer is not None:
                    self.writer.add_scalar(f"Test/{target}/rank1", result.rank(1), self.epoch)
                    self.writer.add_scalar(f"Test/{target}/mAP", result.mAP, self.epoch)
        if chosen.save_dir and first:
            write_metrics(self.results, chosen.save_dir)
        return self.results

    def _draw(self, target: str, search: ranking.Search, options: EvaluationOptions) -> None:
        query, gallery = self.datamanager.fetch_test_loaders(target)
        paths = [items[0] for items in query], [items[0] for items in gallery]
        topk, save_dir = options.visrank_topk, options.save_dir
        if options.picture:
            # The queries are spread evenly over the query set, so that the page shows many identities.
            indices = np.linspace(0, len(query) - 1, min(options.picture, len(query))).astype(int).tolist()
            page = Path(save_dir, f"ranking_{target}.png")
            ranking.draw_page(search, paths, indices, topk, page, f"{target}: ranked gallery")
            print(f'Picture of ranked results saved to "{page}"')
        if options.visrank:
            index = ranking.draw_all(search, paths, topk, Path(save_dir, f"visrank_{target}"), f"Rankings: {target}")
            print(f'Rankings of {len(query)} queries saved; open "{index}" in a browser')


def write_queries(search: ranking.Search, ranked: RankedQueries, path: Path) -> None:
    """Writes a line for each query: identity, camera, AP, INP and rank-1; the scores are ``nan`` without a match."""
    scores = ranked.average_precision, ranked.inverse_negative_penalty, ranked.hits(1)[:, 0]
    columns = [search.query.pids.tolist(), search.query.camids.tolist(), *(score.tolist() for score in scores)]
    lines = (
        f"{identity},{camera},{ap:.6g},{inp:.6g},{hit:g}"
        for identity, camera, ap, inp, hit in zip(*columns, strict=True)
    )
    with checkpoint.replacing(path) as file:
        file.write("\n".join(["identity,camera,AP,INP,rank-1", *lines, ""]).encode())


def write_metrics(results: dict[str, RetrievalResult], save_dir: str) -> None:
    """Writes the results of each target to ``save_dir/metrics.json``."""
    text = json.dumps({target: result.to_dict() for target, result in results.items()}, indent=2) + "\n"
    with checkpoint.replacing(Path(save_dir, "metrics.json")) as file:
        file.write(text.encode())
