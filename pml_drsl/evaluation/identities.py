"""Identity labels of a search: their checks, the gallery grouped by identity, and single-shot galleries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pml_drsl.checks import InputError
from pml_drsl.evaluation.distances import Array

# The single-gallery-shot protocol draws this many galleries for each query, as torchreid does.
NUM_REPEATS = 10

Labels: TypeAlias = Array | Sequence[int] | Sequence[str]


def shared_labels(query: Labels, gallery: Labels, num_query: int, num_gallery: int, name: str) -> tuple[Tensor, Tensor]:
    """Numbers the labels of the queries and of the gallery from 0; equal labels get equal numbers.

    Args:
        query: labels of the queries, shape (Q,).
        gallery: labels of the gallery, shape (M,).
        num_query: number of query features, Q.
        num_gallery: number of gallery features, M.
        name: ``"ids"``, ``"cams"`` or ``"labels"``, for error messages.

    Returns:
        Two int64 tensors on the CPU, of shapes (Q,) and (M,).

    Raises:
        InputError: if there is not one label for each feature, or the labels are not integers or strings.
    """
    sides: list[np.ndarray[Any, Any]] = []
    for side, labels, count in (("query", query, num_query), ("gallery", gallery, num_gallery)):
        array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if array.shape != (count,):
            raise InputError(f"{side}_{name} have shape {list(array.shape)}: give one for each of {count} features")
        if array.dtype.kind not in "iubUS":
            raise InputError(f"{side}_{name} are {array.dtype}: give integers or strings")
        sides.append(array)
    if (sides[0].dtype.kind in "US") != (sides[1].dtype.kind in "US"):
        raise InputError(f"query_{name} are {sides[0].dtype} and gallery_{name} {sides[1].dtype}: give the same kind")
    _, indices = np.unique(np.concatenate(sides), return_inverse=True)
    together = torch.from_numpy(indices.astype(np.int64).reshape(-1))
    return together[:num_query], together[num_query:]


class Identities:
    """The gallery grouped by identity: ``order[starts[i] : starts[i] + counts[i]]`` are the entries of identity i.

    Args:
        gallery_ids: identities of the gallery as numbers from 0, shape (M,).
        num_identities: number of identities.
    """

    def __init__(self, gallery_ids: Tensor, num_identities: int) -> None:
        self.order = gallery_ids.argsort(stable=True)
        self.counts = torch.bincount(gallery_ids, minlength=num_identities)
        self.starts = self.counts.cumsum(0) - self.counts

    def members(self, identities: Tensor) -> tuple[Tensor, Tensor]:
        """The gallery entries of some identities, padded to one length.

        Args:
            identities: identities, shape (q,).

        Returns:
            Gallery entries, shape (q, C), with C at least 1, and a bool tensor of the same shape. It is False where
            an entry is padding. Padding repeats the identity's first entry.
        """
        counts = self.counts[identities][:, None]
        column = torch.arange(max(1, int(counts.max())))[None, :]
        valid = column < counts
        places = self.starts[identities][:, None] + torch.where(valid, column, 0)
        return self.order[places.clamp_(max=len(self.order) - 1)], valid


class SingleShots:
    """Galleries of CUHK03's single-gallery-shot protocol: new galleries for each query, with one entry per identity.

    Args:
        groups: the gallery grouped by identity.
        seed: seed of the draws.
    """

    def __init__(self, groups: Identities, seed: int) -> None:
        self.order = groups.order
        present = groups.counts > 0
        self.starts, self.counts = groups.starts[present], groups.counts[present]
        self.generator = np.random.default_rng(seed)
        self.draws_per_query = NUM_REPEATS * (len(self.counts) + 1)

    def skip(self, num_queries: int) -> None:
        """Moves the random generator on, as if ``num_queries`` queries had drawn their galleries."""
        self.generator.bit_generator.advance(num_queries * self.draws_per_query)  # type: ignore[attr-defined]

    def negatives_before(self, rows: Tensor, thresholds: Tensor, num_positives: Tensor) -> tuple[Tensor, Tensor]:
        """Counts the drawn negatives before the drawn positive of each query.

        Args:
            rows: distances of the negatives, shape (q, M); infinity at entries of the query's identity.
            thresholds: distances of the query's positives, shape (q, K), in the first ``num_positives`` columns.
            num_positives: number of positives of each query, shape (q,).

        Returns:
            Two int64 tensors of shape (q, ``NUM_REPEATS``): the number of negatives closer than the positive, and the
            number of negatives at the same distance.
        """
        # One stream of random numbers in the order of the queries makes results independent of the chunks.
        shape = (len(rows), NUM_REPEATS, len(self.counts) + 1)
        draws = torch.from_numpy(self.generator.random(shape))
        chosen = self.order[self.starts + (draws[..., :-1] * self.counts).long()].to(rows.device)
        negatives = rows.gather(1, chosen.flatten(1)).view(chosen.shape)
        which = (draws[..., -1].to(rows.device) * num_positives[:, None]).long()
        threshold = thresholds.gather(1, which)[:, :, None]
        return (negatives < threshold).sum(dim=2), (negatives == threshold).sum(dim=2)
