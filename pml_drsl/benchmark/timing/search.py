"""``drsl-benchmark evaluation --index``: what approximate search saves in time, and what it costs in recall and mAP.

faiss finds the nearest ``--top`` gallery images of each query: by exact search, by inverted lists (IVF, which reads
``nprobe`` lists), and by a graph (HNSW, which keeps ``efSearch`` candidates). Gallery images that an index does not
find are tied at the last place of the ranking.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pml_drsl.evaluation.ranking import rank_queries

# The number of inverted lists is 4 times the root of the gallery size, as faiss recommends. faiss wants at least 39
# training images for each list.
LISTS_PER_ROOT, IMAGES_PER_LIST = 4, 39
NPROBE = [8, 32, 128]
LINKS, EF_SEARCH = 32, [64, 256]


@dataclass(frozen=True)
class Row:
    """One index with one setting.

    Attributes:
        index: ``"exact"``, ``"ivf"`` or ``"hnsw"``.
        setting: nprobe of IVF, efSearch of HNSW, or 0 for the exact search.
        build_seconds: time to train and fill the index.
        seconds: time to search for all queries.
        index_bytes: size of the index with its features.
        recall: share of the exact ``top`` nearest images that the index finds, in [0, 1].
        mAP: mean average precision of the ranking, in (0, 1].
        rank_1: rank-1 of the ranking, in [0, 1].
    """

    index: str
    setting: int
    build_seconds: float
    seconds: float
    index_bytes: int
    recall: float
    mAP: float
    rank_1: float


class FoundDistances:
    """``DistanceRows`` of the gallery entries that a search found. All other entries are tied behind them.

    Args:
        entries: entries that were found for each query, shape (Q, k); -1 for none.
        distances: distances of these entries, shape (Q, k).
        num_gallery: size of the gallery.
    """

    def __init__(self, entries: Tensor, distances: Tensor, num_gallery: int) -> None:
        self.entries, self.distances = entries, distances
        self.num_query, self.num_gallery = len(entries), num_gallery

    def rows(self, start: int, stop: int) -> Tensor:
        entries = self.entries[start:stop]
        # An extra column collects the entries -1.
        rows = torch.full((len(entries), self.num_gallery + 1), torch.finfo(torch.float32).max)
        rows.scatter_(1, torch.where(entries < 0, self.num_gallery, entries), self.distances[start:stop])
        return rows[:, :-1].contiguous()


def run(search: dict[str, Tensor], indices: Sequence[str], top: int, threads: int) -> list[Row]:
    """Measures each index, and prints a line for each setting.

    Args:
        search: features, identities and cameras, as arguments of ``pml_drsl.evaluation.scores.evaluate``.
        indices: ``"ivf"``, ``"hnsw"`` or both.
        top: number of nearest entries to find, at most the size of the gallery.
        threads: number of faiss's threads.

    Raises:
        ModuleNotFoundError: if faiss is not installed.
    """
    faiss = importlib.import_module("faiss")  # faiss belongs to an extra of this package.
    faiss.omp_set_num_threads(threads)
    query, gallery = search["query"].numpy(), search["gallery"].numpy()
    print(f"the nearest {top} of each query")
    heads = ("build, s", 10), ("ms/query", 10), ("/ exact", 9), ("GiB", 8), ("recall", 9), ("mAP", 9), ("rank-1", 9)
    print(f"{'':6}{'setting':>8}" + "".join(f"{head:>{width}}" for head, width in heads))
    rows: list[Row] = []
    truth: Any = None
    for name in tqdm(["exact", *indices], desc="search", unit="index"):
        started = time.perf_counter()
        index = _build(faiss, name, gallery)
        build = time.perf_counter() - started
        size = faiss.serialize_index(index).nbytes
        for setting in _settings(name, index):
            started = time.perf_counter()
            distances, entries = index.search(query, top)
            seconds = time.perf_counter() - started
            truth = entries if truth is None else truth
            found = FoundDistances(torch.from_numpy(entries), torch.from_numpy(distances), len(gallery))
            labels = (search[key] for key in ("query_ids", "gallery_ids", "query_cams", "gallery_cams"))
            ranked = rank_queries(found, *labels)
            scored = ranked.matched
            row = Row(
                name,
                setting,
                build,
                seconds,
                size,
                _recall(entries, truth),
                float(ranked.average_precision[scored].mean()),
                float(ranked.hits(1)[scored].mean()),
            )
            rows.append(row)
            tqdm.write(
                f"{name:6}{setting or '':>8}{build:>10.1f}{1e3 * seconds / len(query):>10.2f}"
                f"{seconds / rows[0].seconds:>9.3f}{size / 2**30:>8.2f}"
                f"{row.recall:>9.2%}{row.mAP:>9.2%}{row.rank_1:>9.2%}"
            )
    return rows


def _build(faiss: Any, name: str, gallery: np.ndarray[Any, Any]) -> Any:
    number, dim = gallery.shape
    index = faiss.IndexFlatL2(dim)
    if name == "ivf":
        lists = max(1, min(int(LISTS_PER_ROOT * number**0.5), number // IMAGES_PER_LIST))
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(dim), dim, lists)
        index.train(gallery)
    elif name == "hnsw":
        index = faiss.IndexHNSWFlat(dim, LINKS)
    index.add(gallery)
    return index


def _settings(name: str, index: Any) -> Iterator[int]:
    """Gives an index one setting after the other, and yields each setting."""
    if name == "ivf":
        for nprobe in [nprobe for nprobe in NPROBE if nprobe <= index.nlist] or [index.nlist]:
            index.nprobe = nprobe
            yield nprobe
    elif name == "hnsw":
        for ef_search in EF_SEARCH:
            index.hnsw.efSearch = ef_search
            yield ef_search
    else:
        yield 0


def _recall(entries: np.ndarray[Any, Any], truth: np.ndarray[Any, Any]) -> float:
    shared = [len(np.intersect1d(mine, exact)) for mine, exact in zip(entries, truth, strict=True)]
    return float(np.sum(shared)) / truth.size
