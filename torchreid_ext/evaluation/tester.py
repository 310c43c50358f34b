"""Tests a network on its target data sets during training, without any effect on the training."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pml_drsl.checks import InputError
from pml_drsl.console import replacing
from pml_drsl.evaluation.scores import RetrievalResult
from torchreid_ext.data.loading import readable
from torchreid_ext.evaluation import page, ranking
from torchreid_ext.evaluation.extraction import extract
from torchreid_ext.evaluation.page import Picture, ranking_picture
from torchreid_ext.runtime import distributed, generators
from torchreid_ext.runtime.options import Options, documented, option

LOGGED = 3  # queries whose ranked galleries TensorBoard gets after every test


@documented
@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Options):
    """Options of ``engine.test``."""

    save_dir: str = option("", "", "folder for results; an empty name writes none")
    dist_metric: str = option("test.dist_metric", "euclidean", "euclidean or cosine", choices=("euclidean", "cosine"))
    normalize_feature: bool = option("test.normalize_feature", False, "scale every feature to unit norm first")
    ranks: Sequence[int] = option("test.ranks", [1, 5, 10, 20], "CMC ranks to print", least=1, scores=False)
    use_metric_cuhk03: bool = option(
        "cuhk03.use_metric_cuhk03", False, "score by CUHK03's single-gallery-shot protocol"
    )
    rerank: bool = option("test.rerank", False, "re-rank by k-reciprocal neighbours; a run that trains does not")
    visrank: bool = option("test.visrank", False, "show all rankings after the last test on a web page", scores=False)
    visrank_topk: int = option("test.visrank_topk", 10, "gallery entries to draw for each query", least=1, scores=False)
    picture: int = option("test.picture", 0, "queries to draw on one page after the last test", least=0, scores=False)
    queries: bool = option(
        "test.queries",
        False,
        "write identity, camera, AP, INP, rank-1 of each query (queries_TARGET.csv)",
        scores=False,
    )


class Tester:
    """The part of ``BaseEngine`` that tests the network."""

    test_loader: dict[str, dict[str, Any]]
    datamanager: Any
    options: Any
    writer: Any
    epoch: int
    results: dict[str, RetrievalResult]
    set_model_mode: Any

    def test(self, **options: Any) -> dict[str, RetrievalResult]:
        """Returns the result of each target, printed as torchreid does, and writes ``save_dir/metrics.json``.

        With ``test_only``, in the folder of a run that trained, all that it writes is in ``save_dir/test`` instead.

        The options are the fields of ``EvaluationOptions``. The random number generators are restored afterwards, so
        that training does not depend on the number of tests. The processes of a distributed run share the work with the
        result of one; the first one prints and writes. Raises InputError for an unknown option, or one out of range."""
        chosen = EvaluationOptions.of(options)
        folder = Path(chosen.save_dir)
        of_run = [*folder.glob("config.yaml"), *folder.glob("*/model.pth.tar-*")] if chosen.save_dir else []
        if apart := bool(self.options.test_only and of_run):
            chosen = replace(chosen, save_dir=str(folder / "test"))
        self.check_pictures(chosen)
        self.set_model_mode("eval")
        self.results = {}
        group, first = distributed.group(), distributed.is_first()
        with generators.untouched():
            for target, loaders in self.test_loader.items():
                if first:
                    print(f"##### Evaluating {target} #####")
                query, gallery = (extract(self, loaders[split], group) for split in ("query", "gallery"))
                search = ranking.Search(query, gallery, chosen.dist_metric, chosen.normalize_feature, chosen.rerank)
                result = search.evaluate(chosen.use_metric_cuhk03, max_rank=max(50, *chosen.ranks), group=group)
                self.results[target] = result
                # An error of the first process ends the others too, which would otherwise wait for it.
                distributed.from_first(functools.partial(self._report, target, search, result, chosen))
        if chosen.save_dir:
            distributed.from_first(functools.partial(self._write_metrics, Path(chosen.save_dir, "metrics.json")))
        if apart and first:
            print(f'Results of this test saved to "{chosen.save_dir}"; those of the run in "{folder}" are as before')
        return self.results

    def check_pictures(self, options: EvaluationOptions) -> None:
        """Raises InputError if the options ask for files, and there is no folder for them, or for pictures, and the
        data manager does not list the test images, or they are no image files."""
        if (options.visrank or options.picture or options.queries) and not options.save_dir:
            written = "visrank, picture and queries write files"
            raise InputError(f"{written}, and save_dir is '': give a folder, or leave them out")
        if not (options.visrank or options.picture):
            return
        for target in self.test_loader:
            if (pictures := self._pictures(target)) is None:
                unlisted = f"visrank and picture need the test images, and {type(self.datamanager).__name__} lists none"
                cure = "give it the test_dataset of torchreid's data managers, or leave them out"
                raise InputError(f"{unlisted}: {cure}")
            if not self._drawable(target, pictures):
                other = f"visrank and picture draw image files, and {pictures[0][0].files!r} of {target} is none"
                raise InputError(f"{other}: leave them out")

    def _pictures(self, target: str) -> ranking.Pictures | None:
        """Query and gallery of a target; None for a data manager that does not list them."""
        try:
            query, gallery = self.datamanager.fetch_test_loaders(target)
        except (AttributeError, KeyError):
            return None
        return [Picture(items[0]) for items in query], [Picture(items[0]) for items in gallery]

    def _drawable(self, target: str, pictures: ranking.Pictures) -> bool:
        if not pictures[0]:
            return False
        dataset: Any = readable(self.test_loader[target]["query"]).dataset
        return bool(dataset.holds_images(pictures[0][0].files))

    def _report(self, target: str, search: ranking.Search, result: RetrievalResult, options: EvaluationOptions) -> None:
        """Prints, writes, draws and logs the result of a target."""
        nobody = sum(int((part.pids == -1).sum()) for part in (search.query, search.gallery))
        ranking.print_result(result, options.ranks, nobody)
        if options.queries:
            hits = result.ranked.hits(1)[:, 0]  # A line for each query; the scores are ``nan`` without a match.
            scores = result.ranked.average_precision, result.ranked.inverse_negative_penalty, hits
            lines = np.column_stack([search.query.pids, search.query.camids, *scores])
            head, form = "identity,camera,AP,INP,rank-1", ("%d", "%d", "%.6g", "%.6g", "%g")
            with replacing(Path(options.save_dir, f"queries_{target}.csv")) as file:
                np.savetxt(file, lines, form, delimiter=",", header=head, comments="")
        pictures = self._pictures(target) or ([], [])
        topk, title = options.visrank_topk, f"{target}: ranked gallery"
        if options.picture:
            picture = Path(options.save_dir, f"ranking_{target}.png")
            drawn_page = ranking_picture(ranking.some(search, pictures, options.picture, topk), title)
            with replacing(picture) as file:
                drawn_page.save(file, "PNG")
            print(f'Picture of ranked results saved to "{picture}"')
        if options.visrank:
            index = Path(options.save_dir, f"visrank_{target}", "index.html")
            # CUHK03's protocol has places in small galleries, and the page shows the whole gallery.
            ranked = search.evaluate().ranked if options.use_metric_cuhk03 else result.ranked
            rankings = ranking.hardest(search, ranked, pictures, topk)
            page.write_pages(index, rankings, f"{len(rankings)} queries, hardest first.", f"Rankings: {target}")
            print(f'Rankings of {len(rankings)} queries saved; open "{index}" in a browser')
        if self.writer is not None:
            if self._drawable(target, pictures):
                drawing = np.asarray(ranking_picture(ranking.some(search, pictures, LOGGED, topk), title))
                self.writer.add_image(f"Test/{target}/ranking", drawing, self.epoch, dataformats="HWC")
            for name, value in result.scores([1]).items():
                # torchreid writes rank1.
                self.writer.add_scalar(f"Test/{target}/{name.replace('-', '')}", value, self.epoch)

    def _write_metrics(self, path: Path) -> None:
        scores = {target: result.to_dict() for target, result in self.results.items()}
        with replacing(path) as file:
            file.write(f"{json.dumps(scores, indent=2)}\n".encode())
