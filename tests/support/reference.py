"""DRSL and Smooth-AP as slow loops over their definitions, in plain Python on float64 scalars: the tests' oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def indicator(x: Tensor, temperature: float) -> Tensor:
    small = torch.exp(-abs(x) / temperature)
    return 1 / (1 + small) if x > 0 else small / (1 + small)


def log2_bound(x: Tensor, temperature: float) -> Tensor:
    return (torch.log1p(torch.exp(-abs(x) / temperature)) + max(x, 0 * x) / temperature) / math.log(2)


def euclidean(x: Tensor, y: Tensor) -> Tensor:
    return (x / x.norm() - y / y.norm()).norm()


def raw_euclidean(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).norm()


def negative_cosine(x: Tensor, y: Tensor) -> Tensor:
    return -(x @ y) / (x.norm() * y.norm())


def dissimilarity(x: Tensor, y: Tensor) -> Tensor:
    return (1 - (x @ y) / (x.norm() * y.norm())) / 2


def pairs_from_labels(labels: Sequence[int], ref_labels: Sequence[int] | None) -> tuple[set, set]:
    positives, negatives = set(), set()
    for q, label in enumerate(labels):
        for c, other in enumerate(labels if ref_labels is None else ref_labels):
            if label != other:
                negatives.add((q, c))
            elif ref_labels is not None or q != c:
                positives.add((q, c))
    return positives, negatives


def drsl(
    embeddings: Tensor,
    positives: set,
    negatives: set,
    ref_emb: Tensor | None = None,
    *,
    temperature: float,
    sort_weight: float,
    margin: float = 0.0,
    distance=euclidean,
    bound_power: float | None = None,
) -> Tensor:
    """The loss of a batch, from sets of (query, candidate) index pairs; NaN where no query has a term."""
    refs = embeddings if ref_emb is None else ref_emb
    queries = []
    for q in range(len(embeddings)):
        P = sorted(c for a, c in positives if a == q)
        N = sorted(c for a, c in negatives if a == q)
        if not P or not N:
            continue
        d = {c: distance(embeddings[q], refs[c]) for c in P + N}
        u = {c: dissimilarity(embeddings[q], refs[c]) for c in P}
        errors = []
        for i in P:
            ahead = {j: indicator(d[i] - d[j], temperature) for j in P if j != i}
            rank_pos = 1 + sum(ahead.values())
            counts = indicator if bound_power is None else log2_bound
            false_pos = sum(counts(d[i] - d[n] + margin, temperature) for n in N)
            odds = false_pos / rank_pos
            retrieval = odds / (1 + odds) if bound_power is None else torch.log(1 + odds**bound_power) / bound_power
            sort = (u[i] + sum(ahead[j] * u[j] for j in ahead)) / rank_pos
            errors.append(retrieval + sort_weight * sort)
        queries.append(sum(errors) / len(errors))
    return sum(queries) / len(queries) if queries else torch.tensor(math.nan)


def smooth_ap(embeddings: Tensor, labels: Sequence[int], temperature: float) -> Tensor:
    """1 - Smooth-AP as its authors define it (Brown et al., ECCV 2020, eq. 6): the query is one of its positives."""
    total = torch.zeros((), dtype=embeddings.dtype)
    for q in range(len(labels)):
        sims = [-negative_cosine(embeddings[q], x) for x in embeddings]
        same = [c for c in range(len(labels)) if labels[c] == labels[q]]
        precision = torch.zeros((), dtype=embeddings.dtype)
        for i in same:
            before = [indicator(sims[j] - sims[i], temperature) for j in range(len(labels))]
            rank_pos = 1 + sum(before[j] for j in same if j != i)
            rank_all = rank_pos + sum(before[j] for j in range(len(labels)) if j not in same)
            precision = precision + rank_pos / rank_all
        total = total + 1 - precision / len(same)
    return total / len(labels)
