"""Looks images up in a gallery with a trained network, and tells what was found as text, as JSON and for the page."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pml_drsl.checks import InputError, is_whole
from torchreid_ext.evaluation.page import UNITS, Box, Found, Picture, Ranking, shown_distance
from torchreid_ext.images import Row, named, pattern
from torchreid_ext.runtime.files import locked
from torchreid_ext.search.gallery import Gallery, Match
from torchreid_ext.search.model import ImageLike, Preprocessing, as_list, load_model
from torchreid_ext.search.sources import DEFAULT_NAMES, resolved, shown

_WORDS = {"right": "same", "wrong": "other", "": ""}


class Searcher:
    """A trained network and a gallery to search. All methods may be called from several threads.

    >>> searcher = Searcher("log/demo/model/model-best.pth.tar")             # doctest: +SKIP
    >>> searcher.add(["photos/anna/hall_1.jpg", "photos/ben/door_1.jpg"])    # doctest: +SKIP
    >>> ((match,),) = searcher.search("query.jpg", top=1)                    # doctest: +SKIP
    >>> match.name                                                           # doctest: +SKIP
    '/home/me/photos/anna/hall_1.jpg'

    Args:
        checkpoint: a checkpoint of this package or the folder of its run; any other needs ``model`` or ``config_file``.
        model: name of the network, for weights of torchreid's zoo: see :func:`torchreid_ext.search.model.load_model`.
        config_file: YAML configuration of the network, for a checkpoint that holds none.
        index: a file that :meth:`save` or ``drsl-search --index`` wrote; None for an empty gallery.
        device: where to compute; None takes the GPU where there is one.
        batch_size: images in a batch, 1 or more; None for ``test.batch_size`` of the configuration.
        names: how names of images carry identities and cameras: ``"market"`` (``0002_c1s1_000451_03.jpg``),
            ``"folder"`` (``anna/hall_1.jpg``) or another one of :func:`torchreid_ext.images.pattern`.

    An InputError says why an argument cannot be used.

    Attributes:
        model: the network, its configuration and its fingerprint.
        gallery: the images added so far, with the index of their features.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        *,
        model: str | None = None,
        config_file: str | os.PathLike[str] | None = None,
        index: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
        names: str = DEFAULT_NAMES,
    ) -> None:
        if batch_size is not None and not (is_whole(batch_size) and batch_size >= 1):
            raise InputError(f"batch_size {batch_size}: give a whole number, 1 or more")
        self.names = pattern(names, "names")
        self.model = load_model(checkpoint, config_file, device, model)
        self.batch_size = batch_size or int(self.model.config.test.batch_size)
        self.preprocessing = Preprocessing(self.model.config)
        self.gallery = Gallery(self.model) if index is None else Gallery.load(index, self.model)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.gallery)

    def extract(self, images: ImageLike | Sequence[ImageLike], crop: Box | None = None) -> Tensor:
        """The features of images, [N, D] on the CPU, not normalised; InputError for none, or one that cannot be used.

        Args:
            images: one image or several: paths, PIL images, [H, W, 3] uint8 arrays in RGB order, or tensors [3, H, W]
                of uint8 or of floating values in [0, 1]. They are resized and normalised here.
            crop: left, top, right and bottom in pixels of the part of each image to use.
        """
        given, parts = as_list(images), list[Tensor]()
        if not given:
            raise InputError("there are no images to extract features from")
        for start in range(0, len(given), self.batch_size):
            batch = [self.preprocessing(image, crop) for image in given[start : start + self.batch_size]]
            parts.append(self.model.features(torch.stack(batch)))
        return torch.cat(parts)

    def add(self, images: ImageLike | Sequence[ImageLike], names: Sequence[str] | None = None) -> None:
        """Adds images, as for :meth:`extract`, to the gallery.

        Their ``names`` may carry identities and cameras. An image that is a path has its absolute path for a name.
        An InputError refuses images without names, names that are in the gallery already, and images that cannot be
        used. Nothing is added then."""
        given = as_list(images)
        if names is None:
            if not all(isinstance(image, (str, os.PathLike)) for image in given):
                raise InputError("images that are not paths need names: give as many names as images")
            paths = [os.fspath(image) for image in given]  # type: ignore[arg-type]
            entries = [named(os.path.abspath(path), self.names)._replace(path=resolved(path)) for path in paths]
        else:
            entries = [named(name, self.names) for name in ([names] if isinstance(names, str) else names)]
        if len(entries) != len(given):
            raise InputError(f"{len(given)} images need as many names, got {len(entries)}")
        features = self.extract(given)
        with self._lock:
            self.gallery.add(entries, features)

    def remove(self, names: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> int:
        """Removes images by one or several names, paths or patterns, and returns how many; see ``Gallery.remove``."""
        given = [names] if isinstance(names, (str, os.PathLike)) else names
        with self._lock:
            return len(self.gallery.remove([os.fspath(name) for name in given]))

    def prune(self) -> int:
        """Removes the images whose files are no longer there, and returns how many."""
        with self._lock:
            return len(self.gallery.prune())

    def search(
        self, queries: ImageLike | Sequence[ImageLike], top: int = 10, rerank: bool = False, crop: Box | None = None
    ) -> list[list[Match]]:
        """At most ``top`` images of the gallery that are nearest to each of Q queries, nearest first.

        ``queries`` and ``crop``, the part of each to use, are as for :meth:`extract`. ``rerank`` re-ranks the gallery
        by k-reciprocal neighbours first: slower, often better. An InputError refuses an empty gallery, ``top`` below 1,
        and queries that cannot be used."""
        return self.search_features(self.extract(queries, crop), top, rerank)

    def search_features(self, features: Tensor, top: int = 10, rerank: bool = False) -> list[list[Match]]:
        """The same as :meth:`search` for queries by their features, [Q, D]."""
        with self._lock:
            return self.gallery.nearest(features, top, rerank)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the gallery to a file, as ``Gallery.save`` does, and waits while another process writes the file."""
        with locked(path), self._lock:  # While it waits for the file, others may search.
            self.gallery.save(path)


def others(queries: Sequence[Row], found: Sequence[Sequence[Match]], top: int) -> list[list[Match]]:
    """At most ``top`` of the matches that a search found for each query, without the query's own image, which the
    gallery may hold."""

    def file(path: str) -> object:
        try:
            about = os.stat(path)  # One of the two may be a link to the other, or be written in other case on a Mac.
        except OSError:
            return os.path.realpath(path)
        return about.st_dev, about.st_ino

    own = [file(query.path) for query in queries]
    kept = [[match for match in row if file(match.name) != path] for path, row in zip(own, found, strict=True)]
    return [[replace(match, rank=rank) for rank, match in enumerate(row[:top], 1)] for row in kept]


def rankings(queries: Sequence[Row], crop: Box | None, found: Sequence[Sequence[Match]]) -> list[Ranking]:
    """The queries, of which the part ``crop`` was used, with the matches that a search found for each, for the page. A
    match is marked right or wrong only where the identities of the query and of the match are both known."""

    def marked(query: Row, match: Match) -> Found:
        known = bool(query.identity and match.identity)
        mark = ("right" if query.identity == match.identity else "wrong") if known else ""
        return Found(Picture(match.name, match.identity, match.camera), match.distance, mark, match.rank)

    return [
        Ranking(Picture(query.path, query.identity, query.camera, crop), [marked(query, match) for match in matches])
        for query, matches in zip(queries, found, strict=True)
    ]


def caption(searcher: Searcher, rerank: bool) -> str:
    """What was searched and by which distance, in a sentence."""
    ranked = " after re-ranking by k-reciprocal neighbours" if rerank else ""
    return f"{len(searcher):,} gallery images, ranked by {UNITS[searcher.model.metric]}{ranked}"


def as_text(rows: Sequence[Ranking]) -> str:
    """A table for each query: rank, distance, and, where they are known, identity and camera."""
    blocks = []
    for row in rows:
        about = ", ".join(filter(None, _about(row.query)))
        lines = [f"query {shown(row.query.path)}" + (f" ({about})" if about else "")]
        cells = [
            [str(found.rank), shown_distance(found.distance), _WORDS[found.mark], *_about(found.picture)]
            for found in row.matches
        ]
        cells = [[cell.replace("\n", "\\n") for cell in line] for line in cells]  # A name may hold the end of a line.
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for found, line in zip(row.matches, cells, strict=True):
            columns = [cell.rjust(width) for cell, width in zip(line, widths, strict=True) if width]
            lines.append("  ".join(["", *columns, shown(found.picture.path)]))
        blocks.append("\n".join(line.replace("\n", "\\n") for line in lines))
    return "\n\n".join(blocks)


def as_dict(searcher: Searcher, rows: Sequence[Ranking], rerank: bool) -> dict[str, Any]:
    """The same as plain values; ``same_identity`` is null where the identity of one of the two is unknown."""

    def plain(picture: Picture, **others: Any) -> dict[str, Any]:
        return {"path": picture.path, "identity": picture.identity, "camera": picture.camera, **others}

    def match(found: Found) -> dict[str, Any]:
        same = {"right": True, "wrong": False}.get(found.mark)
        return {"rank": found.rank, **plain(found.picture, distance=found.distance, same_identity=same)}

    return {
        "checkpoint": os.path.abspath(searcher.model.path),
        "model_fingerprint": searcher.model.fingerprint,
        "metric": searcher.model.metric,
        "reranked": rerank,
        "gallery": len(searcher),
        "queries": [plain(row.query, crop=row.query.crop, matches=[*map(match, row.matches)]) for row in rows],
    }


def _about(picture: Picture) -> list[str]:
    return [picture.identity and f"identity {picture.identity}", picture.camera and f"camera {picture.camera}"]
