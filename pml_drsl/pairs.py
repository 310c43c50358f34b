"""Who is a positive and who a negative of each query, from labels or from the indices of a miner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor

from pml_drsl.checks import InputError
from pml_drsl.functional import Candidates

IndicesTuple = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Pairs:
    """The pairs of a batch.

    Attributes:
        query: query of each (query, positive) pair, shape (E,), ascending; only queries that have a negative.
        positive: candidate of each pair, shape (E,); no pair twice.
        negatives: the negatives of each query.
    """

    query: Tensor
    positive: Tensor
    negatives: Candidates

    def rows(self, rows: slice) -> Pairs:
        """Those of a range of queries, which then count from 0."""
        of_rows = Candidates(self.query, self.positive, True).rows(rows)
        return Pairs(of_rows.query, of_rows.candidate, self.negatives.rows(rows))


def pairs_from_labels(labels: Tensor, ref_labels: Tensor) -> Pairs:
    """The pairs of ``lmu.get_all_pairs_indices(labels, ref_labels)``, without its N^2 indices.

    Args:
        labels: of the queries, shape (Q,), integer.
        ref_labels: of the candidates, shape (M,); where it is ``labels`` itself, no query is its own candidate.
    """
    of_queries, of_refs = labels.long().contiguous(), ref_labels.long()
    of_refs, order = of_refs.sort(stable=True)
    first = torch.searchsorted(of_refs, of_queries)
    counts = torch.searchsorted(of_refs, of_queries, right=True) - first
    query = torch.repeat_interleave(counts)
    place = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts - first)[query]
    same = order[place]
    is_pair = (counts < len(ref_labels))[query]
    if ref_labels is labels:
        is_pair &= query != same
    return Pairs(query[is_pair], same[is_pair], Candidates(query, same, listed=False))


def pairs_from_indices(indices_tuple: IndicesTuple, num_queries: int, num_refs: int, device: torch.device) -> Pairs:
    """The pairs of a miner: 3 tensors (anchors, positives, negatives) or 4 (anchors, positives, anchors, negatives).

    Raises:
        InputError: for anything else, indices out of range, or a pair that is both positive and negative.
    """
    a1, p, a2, n = _check_indices(indices_tuple, num_queries, num_refs, device)
    positives, negatives = _ascending(a1.long() * num_refs + p), _ascending(a2.long() * num_refs + n)
    if len(positives) and len(negatives):
        nearest = negatives[torch.searchsorted(negatives, positives).clamp_(max=len(negatives) - 1)]
        if bool((nearest == positives).any()):
            pair = divmod(int(positives[nearest == positives][0]), num_refs)
            raise InputError(f"indices_tuple has the pair {pair} both as a positive and as a negative")
    has_negative = torch.zeros(num_queries, dtype=torch.bool, device=device)
    has_negative[a2] = True
    query = positives // max(1, num_refs)
    positives, query = positives[has_negative[query]], query[has_negative[query]]
    of_negatives = negatives // max(1, num_refs)
    return Pairs(
        query, positives - query * num_refs, Candidates(of_negatives, negatives - of_negatives * num_refs, listed=True)
    )


def _ascending(codes: Tensor) -> Tensor:
    """Sorted and each once; most miners give them so already."""
    return codes if bool((codes[1:] > codes[:-1]).all()) else torch.unique(codes)


def _check_indices(
    indices_tuple: IndicesTuple, num_queries: int, num_refs: int, device: torch.device
) -> tuple[Tensor, ...]:
    if len(indices_tuple) not in (3, 4):
        raise InputError(
            f"indices_tuple must have 3 tensors (anchors, positives, negatives) or 4 (anchors, positives, anchors, "
            f"negatives), got {len(indices_tuple)}"
        )
    indices = tuple(index.to(device) for index in lmu.convert_to_pairs(indices_tuple, None))
    for (anchor, other), name in ((indices[:2], "positive"), (indices[2:], "negative")):
        if anchor.shape != other.shape or anchor.ndim != 1:
            raise InputError(
                f"indices_tuple needs 1-D anchors and {name}s of one length, got shapes {tuple(anchor.shape)} and "
                f"{tuple(other.shape)}"
            )
        for index, size, what in ((anchor, num_queries, "anchor"), (other, num_refs, name)):
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise InputError(
                    f"indices_tuple has {what} indices from {int(index.min())} to {int(index.max())}, outside the "
                    f"{size} embeddings they point into"
                )
    return tuple(index.long() for index in indices)
