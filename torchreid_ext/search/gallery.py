"""A gallery: images with the index of their features, which is written to one file and read from it."""

from __future__ import annotations

import functools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pml_drsl.checks import InputError
from pml_drsl.console import file_stamp, replacing
from pml_drsl.evaluation import reranking
from pml_drsl.evaluation.arrays import load_arrays
from pml_drsl.evaluation.distances import as_features, rows_per_chunk
from pml_drsl.machine import full_precision
from torchreid_ext.images import Row, composed
from torchreid_ext.runtime.files import remove_unfinished
from torchreid_ext.search.model import TrainedModel
from torchreid_ext.search.sources import resolved, shown


@dataclass(frozen=True)
class Match:
    """An image of the gallery that a search found; what is unknown of it is empty. The distance from the query is
    squared Euclidean, or 1 - cosine similarity, as the model was tested; it is in [0, 1] after re-ranking."""

    rank: int  # from 1
    name: str  # its absolute path, or the name under which it was added
    distance: float
    identity: str = ""
    camera: str = ""


class Gallery:
    """Images and their features, by one model; those of another are refused. It is empty at first."""

    def __init__(self, model: TrainedModel) -> None:
        self.model = model
        # In the order in which they were added, by the absolute path of a file or the name that was given.
        self.entries: list[Row] = []
        self._names: set[str] = set()
        # The first are the features, on the CPU in float32, of unit norm where the metric is cosine; the others are
        # room for more. None before any were added.
        self._rows: Tensor | None = None
        self._stamps: dict[str, object] = {}  # of the files that hold it, when it last read or wrote them

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, path: str) -> bool:
        return path in self._names

    @torch.inference_mode(False)  # in which it may be called, and not the next time
    def add(self, entries: Sequence[Row], features: Tensor, normalised: bool = False) -> None:
        """Adds N images with their features, [N, D]; ``normalised`` ones have the metric's norm already. Raises
        InputError for a path that is in the gallery or given twice, and for features of another number of dimensions,
        or that are not finite. Nothing is added then."""
        new: set[str] = set()
        for entry in entries:
            if entry.path in self or entry.path in new:
                raise InputError(f"{entry.path!r} is in the gallery already: remove it first, or use another name")
            new.add(entry.path)
        if features.ndim != 2 or len(features) != len(entries):
            raise InputError(f"{len(entries)} images need as many features, got shape {list(features.shape)}")
        vectors = self._vectors(features, normalised)
        rows = vectors[:0] if self._rows is None else self._rows
        if vectors.shape[1] != rows.shape[1]:
            raise InputError(f"features have {vectors.shape[1]} dimensions, and the gallery's have {rows.shape[1]}")
        start, stop = len(self), len(self) + len(vectors)
        if stop > len(rows):  # Room for as many again, so that images that come one by one are not copied each time.
            rows = torch.cat([rows[:start], vectors.new_empty(max(stop, 2 * start) - start, rows.shape[1])])
        rows[start:stop] = vectors
        self._rows = rows
        self.entries += [Row(*entry[:3]) for entry in entries]
        self._names |= new

    def remove(self, patterns: Sequence[str]) -> list[Row]:
        """Removes images by their names or paths, absolute or from the current folder, and returns them. In any other
        word ``*``, ``?`` and ``[]`` stand for characters, slashes too, which stand for those of Windows as well. A
        bracket is itself first, as in ``*/anna [1]/*``. Accents may have any form of Unicode. Raises InputError for a
        pattern that no image matches, or that every image matches, unless it is ``"*"``. Nothing is removed then."""
        found, of_name = set[int](), defaultdict[str, set[int]](set)
        for row, entry in enumerate(self.entries):
            of_name[composed(entry.path)].add(row)
        written = functools.cache(lambda path: [_slashed(each) for each in (path, shown(path))])
        for pattern in patterns:
            here = of_name.get(composed(pattern), set()) | of_name.get(composed(resolved(pattern)), set())
            for word in (_slashed(pattern).replace("[", "[[]"), _slashed(pattern)):
                here = here or {
                    row
                    for row, entry in enumerate(self.entries)
                    if any(fnmatchcase(path, word) for path in written(entry.path))
                }
            if not here:
                cure = "give the path of an image as it is printed, or a pattern such as '*/anna/*'"
                raise InputError(f"no image of the gallery matches {pattern!r}: {cure}")
            if len(here) == len(self) > 1 and pattern != "*":
                raise InputError(f"{pattern!r} matches all {len(self):,} images of the gallery: for that, give '*'")
            found |= here
        return self._without(found)

    def prune(self) -> list[Row]:
        """Removes the images whose files are no longer there, and returns them. Images under names stay. Raises
        InputError if the files of all of several images are gone, as where a disk is not mounted."""
        files = {row: entry.path for row, entry in enumerate(self.entries) if os.path.isabs(entry.path)}
        gone = {row for row, path in files.items() if not os.path.isfile(path)}
        if len(gone) == len(files) > 1:
            cure = "is their disk there? To empty the index, give --remove '*'"
            raise InputError(f"the files of all {len(gone):,} images are gone: {cure}")
        return self._without(gone)

    def _without(self, rows: set[int]) -> list[Row]:
        gone = [entry for row, entry in enumerate(self.entries) if row in rows]
        kept = [row for row in range(len(self)) if row not in rows]
        if self._rows is not None and rows:
            self._rows = self._rows[kept]
        self.entries = [self.entries[row] for row in kept]
        self._names -= {entry.path for entry in gone}
        return gone

    def nearest(self, queries: Tensor, top: int, rerank: bool = False) -> list[list[Match]]:
        """The ``top`` nearest images of each query, [Q, D], nearest first. ``rerank`` re-ranks all images by
        k-reciprocal neighbours; distances then lie in [0, 1]. Raises InputError for an empty gallery, ``top`` below 1,
        or queries of another number of dimensions."""
        if self._rows is None or not len(self):
            raise InputError("the gallery is empty: add images to it first")
        if top < 1:
            raise InputError(f"top {top}: give 1 or more")
        queries, gallery = as_features(queries, "query"), self._rows[: len(self)]
        if queries.shape[1] != (dim := gallery.shape[1]):
            raise InputError(f"queries have {queries.shape[1]} dimensions, and the gallery has {dim}")
        if rerank:
            distances = reranking.rerank(queries.cpu().float(), gallery, metric=self.model.metric).rows
        else:
            distances = functools.partial(self._distances, self._vectors(queries), gallery)
        found, step = list[list[Match]](), rows_per_chunk(len(self))
        for start in range(0, len(queries), step):
            nearest = distances(start, min(start + step, len(queries))).topk(min(top, len(self)), largest=False)
            for values, places in zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True):
                rows = enumerate(zip((self.entries[place] for place in places), values, strict=True), 1)
                found.append([Match(rank, row.path, far, row.identity, row.camera) for rank, (row, far) in rows])
        return found

    def _distances(self, queries: Tensor, gallery: Tensor, start: int, stop: int) -> Tensor:
        queries = queries[start:stop]
        with full_precision("cpu"):
            if self.model.metric == "cosine":
                return (1 - queries @ gallery.T).clamp_(min=0)
            # |q|^2 - 2 qg + |g|^2, which is faster, would lose small distances far from the origin.
            return torch.cdist(queries, gallery, compute_mode="donot_use_mm_for_euclid_dist").square_()

    def _vectors(self, features: Tensor, normalised: bool = False) -> Tensor:
        as_given = normalised or self.model.metric != "cosine"
        vectors = features.float() if as_given else F.normalize(features.float())
        if not torch.isfinite(vectors).all():
            raise InputError("features must be finite, and some are NaN or infinite")
        return vectors.detach().cpu()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the gallery to a file, whole or not at all. Call it inside ``files.locked``. Paths below the folder of
        the file, or of the target of a link, are written relative to it, so that the folder may move. Raises InputError
        for a gallery to which nothing was ever added, or a file that another process has changed since this gallery was
        read from it."""
        if self._rows is None:
            raise InputError("the gallery is empty: there is no index to write")
        target = os.path.realpath(path)
        folder = os.path.join(os.path.dirname(target), "")
        about = {"fingerprint": self.model.fingerprint, "metric": self.model.metric}
        rows = [
            [row.path.removeprefix(folder).replace(os.sep, "/"), *row[1:3], True]
            if row.path.startswith(folder)
            else [*row[:3], False]
            for row in self.entries
        ]
        settings, entries = (np.frombuffer(json.dumps(value).encode(), np.uint8) for value in (about, rows))
        stamp = file_stamp(target)
        if self._stamps.get(target, stamp) != stamp:
            changed = f"{os.fspath(path)!r} was changed by another process since it was read"
            raise InputError(f"{changed}: read it again, and repeat the changes")
        remove_unfinished(Path(folder))
        with replacing(target) as file:
            np.savez(file, settings=settings, entries=entries, features=self._rows[: len(self)].numpy())
        self._stamps[target] = file_stamp(target)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: TrainedModel) -> Gallery:
        """The gallery that :meth:`save` wrote with this model. Raises InputError for a file that is cut short, damaged
        or no index, or an index of another model, and OSError for a file that cannot be opened."""
        target = os.path.realpath(path)
        stamp = file_stamp(target)
        try:
            arrays = load_arrays(path)
            settings, rows = (json.loads(arrays[name].tobytes()) for name in ("settings", "entries"))
            made_by = settings["fingerprint"], settings["metric"]
            features = arrays["features"]
            true_folder = functools.cache(os.path.realpath)  # Each folder is followed once.
            entries = [_entry(row, os.path.dirname(target), true_folder) for row in rows]
            if features.dtype != np.float32 or features.ndim != 2 or not 1 <= features.shape[1] < 2**20:
                raise ValueError("features")
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            wrong = "is damaged, of an older version, or not an index of drsl-search: make it anew"
            raise InputError(f"{os.fspath(path)!r} {wrong}") from error
        if made_by != (model.fingerprint, model.metric):
            other = f"{os.fspath(path)!r} is the index of another model than {model.path!r}, which cannot be compared"
            raise InputError(f"{other}: give the checkpoint that made it, or make a new index")
        gallery = cls(model)
        try:
            gallery.add(entries, torch.from_numpy(np.require(features, requirements="W")), normalised=True)
        except InputError as error:
            raise InputError(f"{os.fspath(path)!r} is damaged: {error}") from error
        gallery._stamps[target] = stamp
        return gallery


def _slashed(path: str) -> str:
    return composed(path).replace(os.sep, "/")


def _entry(row: Iterable[Any], folder: str, true_folder: Callable[[str], str]) -> Row:
    path, identity, camera, relative = row
    if not all(isinstance(text, str) for text in (path, identity, camera)):
        raise TypeError("the texts of an entry")
    if relative:
        path = os.path.join(folder, *path.split("/"))
    elif os.path.isabs(path):
        path = os.path.join(true_folder(os.path.dirname(path)), os.path.basename(path))
    return Row(path, composed(identity), composed(camera))
