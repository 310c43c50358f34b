"""Keeps the images of a gallery together with the index of their features, in memory and in one file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, astuple
from fnmatch import fnmatchcase

import numpy as np
from torch import Tensor

from pml_drsl.checks import InputError
from pml_drsl.evaluation import reranking
from torchreid_ext.runtime.files import replacing
from torchreid_ext.search.feature_file import load_arrays
from torchreid_ext.search.index import EXACT_BELOW, FeatureIndex, Recall
from torchreid_ext.search.model import TrainedModel
from torchreid_ext.search.sources import Entry

_ARRAYS = ("settings", "entries", "numbers", "index")


class Gallery:
    """Images and the index of their features. It is empty at first.

    Args:
        model: the model that makes the features; those of another model are refused.
        exact_below: number of images from which the search is approximate.
    """

    def __init__(self, model: TrainedModel, exact_below: int = EXACT_BELOW) -> None:
        self.model, self.exact_below = model, exact_below
        self._index: FeatureIndex | None = None
        self._entries: dict[int, Entry] = {}
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, path: str) -> bool:
        return path in self._numbers

    @property
    def entries(self) -> list[Entry]:
        """The images, in the order in which they were added."""
        return list(self._entries.values())

    @property
    def recall(self) -> Recall | None:
        """How much the search finds, where it is approximate; None where it is exact."""
        return None if self._index is None else self._index.recall

    def add(self, entries: Sequence[Entry], features: Tensor) -> None:
        """Adds images with their features.

        Args:
            entries: N images; none of their paths is in the gallery.
            features: [N, D].

        Raises:
            InputError: for a path that is in the gallery or given twice, features of another number of dimensions, or
                features that are not finite. Nothing is added then.
        """
        new: set[str] = set()
        for entry in entries:
            if entry.path in self or entry.path in new:
                raise InputError(f"{entry.path!r} is in the gallery already: remove it first, or use another name")
            new.add(entry.path)
        if features.ndim != 2 or len(features) != len(entries):
            raise InputError(f"{len(entries)} images need as many features, got shape {list(features.shape)}")
        if self._index is None:
            self._index = FeatureIndex(features.shape[1], self.model.metric, self.exact_below)
        if features.shape[1] != self._index.dim:
            raise InputError(f"features have {features.shape[1]} dimensions, and the gallery's have {self._index.dim}")
        first = max(self._entries, default=-1) + 1
        numbers = np.arange(first, first + len(entries), dtype=np.int64)
        if len(entries):
            self._index.add(features, numbers)
        self._note(zip(numbers.tolist(), entries, strict=True))

    def remove(self, patterns: Sequence[str]) -> list[Entry]:
        """Removes images and returns them.

        Args:
            patterns: paths; ``*``, ``?`` and ``[]`` stand for characters, slashes too.

        Raises:
            InputError: for a pattern that no image matches. Nothing is removed then.
        """
        found: dict[int, Entry] = {}
        for pattern in patterns:
            here = {number: entry for number, entry in self._entries.items() if fnmatchcase(entry.path, pattern)}
            if pattern in self:
                here[self._numbers[pattern]] = self._entries[self._numbers[pattern]]
            if not here:
                raise InputError(f"no image of the gallery matches {pattern!r}")
            found |= here
        if self._index is not None and found:
            self._index.remove(np.array(list(found), dtype=np.int64))
        for number, entry in found.items():
            del self._entries[number], self._numbers[entry.path]
        return list(found.values())

    def nearest(self, queries: Tensor, top: int, rerank: bool = False) -> list[list[tuple[Entry, float]]]:
        """The nearest images of each query with their distances, nearest first.

        Args:
            queries: [Q, D] features.
            top: how many images, >= 1.
            rerank: re-rank all images by k-reciprocal neighbours; distances then lie in [0, 1].

        Raises:
            InputError: for an empty gallery, ``top`` below 1, or queries of another number of dimensions.
        """
        if self._index is None or not len(self):
            raise InputError("the gallery is empty: add images to it first")
        if top < 1:
            raise InputError(f"top {top}: give 1 or more")
        if queries.shape[1] != self._index.dim:
            raise InputError(f"queries have {queries.shape[1]} dimensions, and the gallery has {self._index.dim}")
        if rerank:
            held = np.array(list(self._entries), dtype=np.int64)
            features = self._index.features(held)
            ranked = reranking.rerank(queries.float(), features, metric=self.model.metric)  # type: ignore[arg-type]
            distances, places = ranked.rows(0, len(queries)).topk(min(top, len(self)), largest=False)
            numbers, found = held[places.numpy()], distances.numpy()
        else:
            numbers, found = self._index.search(queries, top)
        return [
            [(self._entries[number], float(distance)) for number, distance in zip(*row, strict=True) if number >= 0]
            for row in zip(numbers.tolist(), found.tolist(), strict=True)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the gallery to a file, whole or not at all.

        Raises:
            InputError: for a gallery to which nothing was ever added.
        """
        if self._index is None:
            raise InputError("the gallery is empty: there is no index to write")
        settings = {"fingerprint": self.model.fingerprint, "dim": self._index.dim, "metric": self._index.metric}
        settings["recall"] = None if self.recall is None else asdict(self.recall)
        texts = {"settings": settings, "entries": [astuple(entry) for entry in self._entries.values()]}
        arrays = {name: np.frombuffer(json.dumps(value).encode(), np.uint8) for name, value in texts.items()}
        numbers = np.array(list(self._entries), dtype=np.int64)
        with replacing(path) as file:
            np.savez(file, allow_pickle=False, **arrays, numbers=numbers, index=self._index.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: TrainedModel, exact_below: int = EXACT_BELOW) -> Gallery:
        """The gallery that :meth:`save` wrote.

        Raises:
            InputError: for a file that is missing, cut short, damaged or no index, or an index of another model.
        """
        arrays = load_arrays(path)
        if set(arrays) != set(_ARRAYS):
            raise InputError(f"{os.fspath(path)!r} is not an index of drsl-search")
        settings, entries = (json.loads(arrays[name].tobytes()) for name in ("settings", "entries"))
        if settings["fingerprint"] != model.fingerprint or settings["metric"] != model.metric:
            raise InputError(
                f"{os.fspath(path)!r} is the index of another model than {model.path!r}, and features of two models "
                f"cannot be compared: give the checkpoint that made it, or make a new index"
            )
        gallery = cls(model, exact_below)
        gallery._index = FeatureIndex.from_bytes(arrays["index"], settings["dim"], settings["metric"], exact_below)
        gallery._index.recall = settings["recall"] and Recall(**settings["recall"])
        gallery._note(zip(arrays["numbers"].tolist(), (Entry(*entry) for entry in entries), strict=True))
        return gallery

    def _note(self, numbered: Iterable[tuple[int, Entry]]) -> None:
        for number, entry in numbered:
            self._entries[number] = entry
            self._numbers[entry.path] = number
