"""Finds the nearest features of a gallery with faiss: exactly, or in a part of the lists of a large gallery."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pml_drsl.checks import InputError

EXACT_BELOW = 1_000_000
"""Galleries with fewer features are searched exactly."""

TARGET_RECALL = 0.95
"""A large gallery is searched in as many lists as it takes to find this share of the nearest ten of a sample."""

SAMPLE, NEAREST = 200, 10
LISTS_PER_ROOT, IMAGES_PER_LIST = 4, 64

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Recall:
    """How much an approximate search finds, measured on features of its own gallery.

    Attributes:
        recall: the share of the exact ``NEAREST`` nearest features that is found.
        read: lists that a search reads.
        lists: lists that there are.
    """

    recall: float
    read: int
    lists: int

    def __str__(self) -> str:
        return (
            f"approximate search reads {self.read} of {self.lists} lists and finds {self.recall:.1%} of the nearest "
            f"{NEAREST} of {SAMPLE} sampled entries"
        )


class FeatureIndex:
    """Features under whole numbers, searched exactly below ``exact_below`` features and by inverted lists above.

    Distances are those of ``pml_drsl.evaluation``: squared Euclidean, or 1 - cosine similarity. Several threads may
    search at once, but only while no other thread adds or removes.

    Args:
        dim: dimensions of a feature.
        metric: ``"euclidean"`` or ``"cosine"``.
        exact_below: number of features from which the search is approximate.

    Attributes:
        recall: of the approximate search, measured after every change; None while the search is exact.
    """

    def __init__(self, dim: int, metric: str, exact_below: int = EXACT_BELOW) -> None:
        faiss = _faiss()
        self.dim, self.metric, self.exact_below = dim, metric, exact_below
        self.recall: Recall | None = None
        # Features of unit norm have twice the cosine distance as squared Euclidean distance.
        self._index = faiss.IndexIDMap2(faiss.IndexFlatL2(dim))

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def exact(self) -> bool:
        """Whether the search is exact."""
        return not hasattr(self._index, "nprobe")

    def add(self, features: Tensor, numbers: Array) -> None:
        """Adds [N, D] features under [N] numbers that are not in use."""
        vectors = self._vectors(features)
        total = len(self) + len(vectors)
        if self.exact and total >= self.exact_below:
            self._make_lists(vectors, numbers)
        else:
            self._index.add_with_ids(vectors, numbers)
        if not self.exact:
            self._measure()

    def remove(self, numbers: Array) -> None:
        """Removes the features of these numbers."""
        # faiss turns an array into a selector that its hash table of numbers does not work with.
        self._index.remove_ids(numbers if self.exact else _faiss().IDSelectorArray(numbers))
        if not self.exact and len(self):
            self._measure()

    def features(self, numbers: Array) -> Tensor:
        """[N, D] features of these numbers; of unit norm where the metric is cosine."""
        return torch.from_numpy(self._index.reconstruct_batch(numbers))

    def search(self, queries: Tensor, top: int) -> tuple[Array, Array]:
        """The nearest features of each query, nearest first.

        Args:
            queries: [Q, D].
            top: how many; at most as many as there are are found.

        Returns:
            [Q, top] numbers, -1 where fewer were found, and [Q, top] distances.
        """
        found, numbers = self._index.search(self._vectors(queries), min(top, len(self)))
        return numbers, np.maximum(found, 0) / (2 if self.metric == "cosine" else 1)

    def to_bytes(self) -> Array:
        """The index as faiss writes it, an array of bytes."""
        return _faiss().serialize_index(self._index)

    @classmethod
    def from_bytes(cls, data: Array, dim: int, metric: str, exact_below: int = EXACT_BELOW) -> FeatureIndex:
        """The index that ``to_bytes`` wrote.

        Raises:
            InputError: for bytes that faiss cannot read, or an index of another number of dimensions.
        """
        index = cls(dim, metric, exact_below)
        try:
            index._index = _faiss().deserialize_index(data)
        except RuntimeError as error:
            raise InputError(f"faiss cannot read the index: {str(error).splitlines()[-1]}") from error
        if index._index.d != dim:
            raise InputError(f"the index has {index._index.d} dimensions, and the model's features have {dim}")
        return index

    def _vectors(self, features: Tensor) -> Array:
        vectors = F.normalize(features.float()) if self.metric == "cosine" else features.float()
        if not torch.isfinite(vectors).all():
            raise InputError("features must be finite, and some are NaN or infinite")
        return np.ascontiguousarray(vectors.numpy())

    def _make_lists(self, vectors: Array, numbers: Array) -> None:
        faiss = _faiss()
        if len(self):
            held = faiss.vector_to_array(self._index.id_map)
            vectors = np.concatenate([self._index.reconstruct_batch(held), vectors])
            numbers = np.concatenate([held, numbers])
        lists = max(1, min(int(LISTS_PER_ROOT * len(vectors) ** 0.5), len(vectors) // IMAGES_PER_LIST))
        index = faiss.IndexIVFFlat(faiss.IndexFlatL2(self.dim), self.dim, lists)
        index.cp.max_points_per_centroid = IMAGES_PER_LIST
        index.train(vectors)
        # The hash table finds a feature by its number, to remove it and to give it back.
        index.set_direct_map_type(faiss.DirectMap.Hashtable)
        index.add_with_ids(vectors, numbers)
        self._index = index

    def _measure(self) -> None:
        """Finds how many lists to read for the recall to be high enough, within a sixteenth, and notes the recall."""
        index, held = self._index, self._sampled()
        queries = index.reconstruct_batch(held)
        index.nprobe = index.nlist  # all lists: exact
        _, truth = index.search(queries, NEAREST + 1)
        others = max(1, int((truth != held[:, None]).sum()))

        def share(read: int) -> float:
            index.nprobe = read
            _, found = index.search(queries, NEAREST + 1)
            rows = zip(found, truth, held, strict=True)
            return sum(len(np.intersect1d(mine, exact[exact != own])) for mine, exact, own in rows) / others

        enough, few = 1, 0
        while (found := share(enough)) < TARGET_RECALL and enough < index.nlist:
            few, enough = enough, min(2 * enough, index.nlist)
        while enough - few > max(1, enough // 16):
            middle = (few + enough) // 2
            if (more := share(middle)) < TARGET_RECALL:
                few = middle
            else:
                found, enough = more, middle
        index.nprobe = enough
        self.recall = Recall(found, enough, index.nlist)

    def _sampled(self) -> Array:
        """The numbers of some features, the same whenever the index is the same."""
        lists = self._index.invlists
        ends = np.cumsum([lists.list_size(number) for number in range(lists.nlist)])
        places = np.sort(np.random.default_rng(0).choice(len(self), min(SAMPLE, len(self)), replace=False))
        chosen = np.searchsorted(ends, places, side="right")
        ids = [
            _faiss().rev_swig_ptr(lists.get_ids(int(number)), lists.list_size(int(number)))[place - ends[number]]
            for number, place in zip(chosen, places, strict=True)
        ]
        return np.array(ids, dtype=np.int64)


def _faiss() -> Any:
    # Not imported with the package: torch and faiss each bring a copy of OpenMP, and the two copies collide on macOS.
    return importlib.import_module("faiss")
