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
Junk: TypeAlias = Sequence[int | str]


def label_array(labels: Labels) -> np.ndarray[Any, Any]:
    """Labels as an array of numbers or of text. Bytes become text."""
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    return np.char.decode(array, "latin-1") if array.dtype.kind == "S" else array


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
        array = label_array(labels)
        if array.shape != (count,):
            raise InputError(f"{side}_{name} have shape {list(array.shape)}: give one for each of {count} features")
        if array.dtype.kind not in "iubU":
            raise InputError(f"{side}_{name} are {array.dtype}: give integers or strings")
        sides.append(array)
    together = np.concatenate(sides) if (sides[0].dtype.kind == "U") == (sides[1].dtype.kind == "U") else None
    # Signed and unsigned integers of 64 bits have no common type but float64, which cannot tell large ones apart.
    if together is None or together.dtype.kind == "f":
        raise InputError(f"query_{name} are {sides[0].dtype} and gallery_{name} {sides[1].dtype}: give the same kind")
    _, indices = np.unique(together, return_inverse=True)
    numbers = torch.from_numpy(indices.astype(np.int64).reshape(-1))
    return numbers[:num_query], numbers[num_query:]


def number_identities(
    query: Labels, gallery: Labels, num_query: int, num_gallery: int, junk: Junk, name: str = "ids"
) -> tuple[Tensor, Tensor]:
    """Numbers identities as ``shared_labels`` does. Junk identities get -1.

    Args:
        query, gallery, num_query, num_gallery, name: see ``shared_labels``.
        junk: junk identities, integers or strings. The string "-1" stands for the integer -1, and -1 for "-1".

    Raises:
        InputError: as ``shared_labels``, or if a junk identity is a name, and the identities are integers.
    """
    numbers = shared_labels(query, gallery, num_query, num_gallery, name)
    sides = []
    for labels, of_side in zip((query, gallery), numbers, strict=True):
        is_junk = torch.from_numpy(np.isin(label_array(labels), _junk_like(label_array(labels), junk)))
        sides.append(of_side.masked_fill(is_junk, -1))
    return sides[0], sides[1]


def _junk_like(labels: np.ndarray[Any, Any], junk: Junk) -> list[int] | list[str]:
    """The junk identities in the type of the labels."""
    if isinstance(junk, str):
        raise InputError(f"junk={junk!r}: give a list of identities, such as [{junk!r}]")
    if labels.dtype.kind == "U":
        return [str(identity) for identity in junk]
    try:
        return [int(identity) for identity in junk]
    except (TypeError, ValueError) as error:
        raise InputError(f"junk={list(junk)!r}: the identities are integers, so give integers") from error


class Identities:
    """The gallery grouped by identity: ``order[starts[i] : starts[i] + counts[i]]`` are the entries of identity i.

    Args:
        gallery_ids: identities of the gallery as numbers from 0, shape (M,); -1 for an entry that is in no group.
        num_identities: number of identities.
    """

    def __init__(self, gallery_ids: Tensor, num_identities: int) -> None:
        self.order = gallery_ids.argsort(stable=True)
        self.counts = torch.bincount(gallery_ids[gallery_ids >= 0], minlength=num_identities)
        self.starts = self.counts.cumsum(0) - self.counts + (gallery_ids < 0).sum()

    def members(self, identities: Tensor) -> tuple[Tensor, Tensor]:
        """The gallery entries of some identities, padded to one length.

        Args:
            identities: identities, shape (q,); -1 has no entries.

        Returns:
            Gallery entries, shape (q, C), with C at least 1, and a bool tensor of the same shape. It is False where
            an entry is padding. Padding repeats the identity's first entry.
        """
        counts = torch.where(identities < 0, 0, self.counts[identities])[:, None]
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
