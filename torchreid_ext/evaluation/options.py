"""The options of a test, the single source of their config keys, defaults, help and documentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchreid_ext.runtime.options import Options, documented, option


@documented
@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Options):
    """Options of ``engine.test``."""

    save_dir: str = option("", "", "folder for results; an empty name writes none")
    dist_metric: str = option("test.dist_metric", "euclidean", "euclidean or cosine", choices=("euclidean", "cosine"))
    normalize_feature: bool = option("test.normalize_feature", False, "scale every feature to unit norm first")
    ranks: Sequence[int] = option("test.ranks", [1, 5, 10, 20], "CMC ranks to print", least=1, scores=False)
    use_metric_cuhk03: bool = option(
        "cuhk03.use_metric_cuhk03", False, "score by the single-gallery-shot protocol of CUHK03"
    )
    rerank: bool = option("test.rerank", False, "re-rank by k-reciprocal neighbours in the last test")
    visrank: bool = option(
        "test.visrank", False, "show the ranking of every query after the last test, on a web page", scores=False
    )
    visrank_topk: int = option("test.visrank_topk", 10, "gallery entries to draw for each query", least=1, scores=False)
    picture: int = option(
        "test.picture", 0, "number of queries to draw on one page after the last test", least=0, scores=False
    )
    queries: bool = option(
        "test.queries",
        False,
        "write queries_TARGET.csv: identity, camera, AP, INP and rank-1 of every query",
        scores=False,
    )
