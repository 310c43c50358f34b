"""The positives and negatives of each query, from labels or from the indices of a miner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from pml_drsl.checks import InputError

IndicesTuple = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class SparseMask:
    """Mask of the listed (query, candidate) pairs (``included``), or of all others but the query's ``own``. Pairs are
    listed once, ascending by query. A dense mask would need an extra pass over the distances."""

    query: Tensor
    candidate: Tensor
    included: bool
    own: Tensor | None = None

    def part(self, pairs: slice, rows: slice) -> SparseMask:
        """The mask of a range of queries, whose pairs are a range of the listed pairs."""
        own = None if self.own is None else self.own[rows]
        return SparseMask(self.query[pairs] - rows.start, self.candidate[pairs], self.included, own)

    def mask_excluded(self, y: Tensor) -> Tensor:
        """Sets excluded candidates of ``y``, shape (Q, M), to +inf, perhaps in place: they are never ranked ahead."""
        if self.included:
            kept = y[self.query, self.candidate]
            return torch.full_like(y, torch.inf).index_put_((self.query, self.candidate), kept)
        if self.own is not None:
            y.scatter_(1, self.own[:, None], torch.inf)
        return y.index_put_((self.query, self.candidate), y.new_full((), torch.inf))


@dataclass(frozen=True)
class Pairs:
    """The positives and negatives of a batch. Queries without a negative have no positives listed.

    Attributes:
        query, positive: the (query, positive) pairs, shape (E,), integer, each once, ascending by query.
        column: place of each pair among the pairs of its query, shape (E,), integer, from 0.
        counts, width: number of listed positives of each query, shape (Q,), and the largest of them.
        num_queries: number of queries that have a positive and a negative.
        negatives: the negatives of each query.
    """

    query: Tensor
    positive: Tensor
    column: Tensor
    counts: Tensor
    width: int
    num_queries: int
    negatives: SparseMask

    def split(self, sizes: int | Sequence[int]) -> list[Pairs]:
        """The pairs of consecutive ranges of queries, each numbered from 0, as ``torch.split`` divides the queries."""
        total = len(self.counts)
        ends = [*range(sizes, total, sizes), total] if isinstance(sizes, int) else list(accumulate(sizes))
        edges = torch.tensor([0, *ends], device=self.query.device)
        with_pair = torch.cat([edges[:1], (self.counts > 0).cumsum(0)])[edges]
        listed = [torch.searchsorted(query, edges) for query in (self.query, self.negatives.query)]
        bounds = torch.stack([edges, *listed, with_pair], 1).tolist()  # one wait for the device
        return [
            Pairs(
                self.query[pair:next_pair] - first,
                self.positive[pair:next_pair],
                self.column[pair:next_pair],
                self.counts[first:last],
                self.width,
                after - before,
                self.negatives.part(slice(negative, next_negative), slice(first, last)),
            )
            for (first, pair, negative, before), (last, next_pair, next_negative, after) in pairwise(bounds)
        ]


def pairs_from_labels(labels: Tensor, ref_labels: Tensor, same: bool) -> Pairs:
    """The pairs of ``lmu.get_all_pairs_indices``, without its N^2 indices, of integer labels, shapes (Q,) and (M,).
    ``same``: the candidates are the queries, none its own candidate."""
    of_refs, order = ref_labels.long().sort(stable=True)
    of_queries = labels.long().contiguous()
    first = torch.searchsorted(of_refs, of_queries)
    counts = torch.searchsorted(of_refs, of_queries, right=True) - first
    has_negative = counts < len(ref_labels)
    own = torch.arange(len(labels), device=labels.device) if same else None
    counts = (counts - 1 if same else counts) * has_negative
    total, width, num_queries = _totals(counts)
    query = torch.repeat_interleave(counts, output_size=total)
    column = _columns(query, counts)
    place = first[query] + column
    if own is not None:  # The sorted candidates of an identity contain the query itself, which is left out.
        own_place = torch.empty_like(order).scatter_(0, order, own)
        place = place + (place >= own_place[query])
    positive = order[place]
    return Pairs(query, positive, column, counts, width, num_queries, SparseMask(query, positive, False, own))


def pairs_from_indices(indices_tuple: IndicesTuple, num_queries: int, num_refs: int, device: torch.device) -> Pairs:
    """The pairs of a miner: 3 tensors (anchors, positives, negatives) or 4 (anchors, positives, anchors, negatives). An
    InputError for another number of tensors, indices out of range, or a pair both positive and negative."""
    a1, p, a2, n = _check_indices(indices_tuple, num_queries, num_refs, device)
    codes = a1 * num_refs + p, a2 * num_refs + n
    # Most miners return the pairs ascending, and each once.
    ascending = torch.stack([(part[1:] > part[:-1]).all() for part in codes]).tolist()
    positives, negatives = (part if fine else part.unique() for part, fine in zip(codes, ascending, strict=True))
    if len(positives) and len(negatives):
        nearest = negatives[torch.searchsorted(negatives, positives).clamp_(max=len(negatives) - 1)]
        if bool((both := nearest == positives).any()):
            given = f"the pair {divmod(int(positives[both][0]), num_refs)} both as a positive and as a negative"
            raise InputError(f"indices_tuple has {given}; give every pair one role")
    has_negative = torch.zeros(num_queries, dtype=torch.bool, device=device).index_fill_(0, a2, True)
    positives = positives[has_negative[positives // max(1, num_refs)]]
    query = positives // max(1, num_refs)
    counts = torch.zeros(num_queries, dtype=torch.long, device=device).index_add_(0, query, torch.ones_like(query))
    _, width, number = _totals(counts)
    of_negatives = negatives // max(1, num_refs)
    mask = SparseMask(of_negatives, negatives - of_negatives * num_refs, included=True)
    return Pairs(query, positives - query * num_refs, _columns(query, counts), counts, width, number, mask)


def _totals(counts: Tensor) -> list[int]:
    """The sum, the maximum, and the number of counts above 0. The device is synchronised once for all three."""
    return torch.stack([counts.sum(), counts.max(), (counts > 0).sum()]).tolist() if len(counts) else [0, 0, 0]


def _columns(query: Tensor, counts: Tensor) -> Tensor:
    """Place of each pair among the pairs of its query, from the number of pairs of each query."""
    return torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]


def _check_indices(
    indices_tuple: IndicesTuple, num_queries: int, num_refs: int, device: torch.device
) -> tuple[Tensor, ...]:
    if len(indices_tuple) not in (3, 4):
        wanted = "3 tensors (anchors, positives, negatives) or 4 (anchors, positives, anchors, negatives)"
        raise InputError(f"indices_tuple must have {wanted}, got {len(indices_tuple)}")
    indices = tuple(torch.as_tensor(index, device=device).long() for index in lmu.convert_to_pairs(indices_tuple, None))
    for (anchor, other), name in ((indices[:2], "positive"), (indices[2:], "negative")):
        if anchor.shape != other.shape or anchor.ndim != 1:
            shapes = f"{tuple(anchor.shape)} and {tuple(other.shape)}"
            raise InputError(f"indices_tuple needs 1-D anchors and {name}s of one length, got shapes {shapes}")
    names, sizes = ("anchor", "positive", "anchor", "negative"), (num_queries, num_refs) * 2
    zero = torch.zeros((), dtype=torch.long, device=device)
    ends = [torch.stack([*index.aminmax()] if len(index) else [zero, zero]) for index in indices]
    for index, size, name, (low, high) in zip(indices, sizes, names, torch.stack(ends).tolist(), strict=True):
        if len(index) and not 0 <= low <= high < size:
            outside = f"outside the {size} embeddings they point into"
            raise InputError(f"indices_tuple has {name} indices from {low} to {high}, {outside}")
    return indices
