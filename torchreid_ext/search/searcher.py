"""Looks images up in a gallery with a trained network, from Python."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pml_drsl.checks import InputError
from torchreid_ext.images import Row
from torchreid_ext.runtime.files import locked
from torchreid_ext.search.gallery import EXACT, Gallery, absolute, resolved
from torchreid_ext.search.model import load_model
from torchreid_ext.search.preprocessing import Box, ImageLike, Preprocessing, as_list
from torchreid_ext.search.sources import NAMES, named


@dataclass(frozen=True)
class Match:
    """An image of the gallery that a search found.

    Attributes:
        rank: its place, from 1.
        name: its absolute path, or the name under which it was added.
        distance: from the query: squared Euclidean, or 1 - cosine similarity, as the model was tested; between 0 and 1
            after re-ranking.
        identity: whom it shows, as its name says; empty if unknown.
        camera: which camera took it, as its name says; empty if unknown.
    """

    rank: int
    name: str
    distance: float
    identity: str = ""
    camera: str = ""


class Searcher:
    """A trained network and a gallery to search. All methods may be called from several threads.

    >>> searcher = Searcher("log/demo/model/model-best.pth.tar")             # doctest: +SKIP
    >>> searcher.add(["photos/anna/hall_1.jpg", "photos/ben/door_1.jpg"])    # doctest: +SKIP
    >>> searcher.search("query.jpg", top=1)[0][0].name                       # doctest: +SKIP
    'photos/anna/hall_1.jpg'

    Args:
        checkpoint: a checkpoint of this package or the folder of its run, or any other checkpoint with ``model`` or
            ``config_file``.
        model: name of the network, for weights of torchreid's zoo: see :func:`torchreid_ext.search.model.load_model`.
        config_file: YAML configuration of the network, for a checkpoint that holds none.
        index: a file that :meth:`save` or ``drsl-search --index`` wrote; None for an empty gallery.
        index_type: kind of faiss's index, a string of ``faiss.index_factory`` such as ``"HNSW32"``, see
            :class:`torchreid_ext.search.gallery.FeatureIndex`; None for the kind of ``index``, which is exact unless
            another one was chosen.
        device: where to compute; None takes the GPU where there is one.
        batch_size: images in a batch; None for ``test.batch_size`` of the configuration.
        names: how names of images carry identities and cameras: ``"market"`` (``0002_c1s1_000451_03.jpg``),
            ``"folder"`` (``anna/hall_1.jpg``) or another one of :func:`torchreid_ext.images.pattern`.

    Attributes:
        model: the network, its configuration and its fingerprint.
        gallery: the images added so far, with the index of their features.

    Raises:
        InputError: for a checkpoint or an index that cannot be used, or a ``batch_size`` below 1.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike[str],
        *,
        model: str | None = None,
        config_file: str | os.PathLike[str] | None = None,
        index: str | os.PathLike[str] | None = None,
        index_type: str | None = None,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
        names: str = NAMES,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size {batch_size}: give 1 or more")
        self.names = names
        self.model = load_model(checkpoint, config_file, device, model)
        self.batch_size = batch_size or int(self.model.config.test.batch_size)
        self.preprocessing = Preprocessing(self.model)
        if index is None:
            self.gallery = Gallery(self.model, index_type or EXACT)
        else:
            self.gallery = Gallery.load(index, self.model, index_type)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.gallery)

    def extract(self, images: ImageLike | Sequence[ImageLike], crop: Box | None = None) -> Tensor:
        """The features of images.

        Args:
            images: one image or several: paths, PIL images, [H, W, 3] uint8 arrays in RGB order, or tensors [3, H, W]
                of uint8 or of floating values in [0, 1]. They are resized and normalised here.
            crop: left, top, right and bottom in pixels of the part of each image to use.

        Returns:
            [N, D] features on the CPU, not normalised.

        Raises:
            InputError: for no images, or an image that cannot be used; the message says why.
        """
        given = as_list(images)
        if not given:
            raise InputError("there are no images to extract features from")
        parts = []
        for start in range(0, len(given), self.batch_size):
            batch = [self.preprocessing(image, crop) for image in given[start : start + self.batch_size]]
            parts.append(self.model.features(torch.stack(batch)))
        return torch.cat(parts)

    def add(self, images: ImageLike | Sequence[ImageLike], names: Sequence[str] | None = None) -> None:
        """Adds images to the gallery.

        Args:
            images: as for :meth:`extract`.
            names: of the images, which may carry identities and cameras. An image that is a path has its absolute path
                for a name.

        Raises:
            InputError: for images without names, a name that is in the gallery already, or an image that cannot be
                used. Nothing is added then.
        """
        given = as_list(images)
        if names is None:
            if not all(isinstance(image, (str, os.PathLike)) for image in given):
                raise InputError("images that are not paths need names: give as many names as images")
            entries = [absolute(named(os.fspath(image), self.names)) for image in given]  # type: ignore[arg-type]
        else:
            entries = [named(name, self.names) for name in ([names] if isinstance(names, str) else names)]
        if len(entries) != len(given):
            raise InputError(f"{len(given)} images need as many names, got {len(entries)}")
        features = self.extract(given)
        with self._lock:
            self.gallery.add(entries, features)

    def add_features(self, entries: Sequence[Row], features: Tensor) -> None:
        """Adds images whose features, [N, D], were extracted with this model before; see :meth:`add`."""
        known = [absolute(entry) if os.path.isfile(entry.path) else entry for entry in entries]
        with self._lock:
            self.gallery.add(known, features)

    def remove(self, names: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> int:
        """Removes images from the gallery and returns how many.

        Args:
            names: one or several names and paths of images, or patterns, in which ``*``, ``?`` and ``[]`` stand for
                characters. Only ``"*"`` removes all images.

        Raises:
            InputError: for a name that is not in the gallery, or another pattern that matches all of it. Nothing is
                removed then.
        """
        given = [names] if isinstance(names, (str, os.PathLike)) else names
        with self._lock:
            return len(self.gallery.remove([os.fspath(name) for name in given]))

    def prune(self) -> int:
        """Removes the images whose files are no longer there, and returns how many."""
        with self._lock:
            return len(self.gallery.prune())

    def search(
        self,
        queries: ImageLike | Sequence[ImageLike],
        top: int = 10,
        rerank: bool = False,
        crop: Box | None = None,
    ) -> list[list[Match]]:
        """The images of the gallery that are nearest to each query, nearest first.

        Args:
            queries: Q images, as for :meth:`extract`.
            top: how many images to find, >= 1.
            rerank: re-rank the gallery by k-reciprocal neighbours first: slower, often better.
            crop: left, top, right and bottom in pixels of the part of each query to use.

        Returns:
            Q lists of at most ``top`` matches.

        Raises:
            InputError: for an empty gallery, ``top`` below 1, or a query that cannot be used.
        """
        return self.search_features(self.extract(queries, crop), top, rerank)

    def search_features(self, features: Tensor, top: int = 10, rerank: bool = False) -> list[list[Match]]:
        """The same as :meth:`search` for queries by their features, [Q, D]."""
        with self._lock:
            rows = self.gallery.nearest(features, top, rerank)
        return [
            [
                Match(rank, entry.path, distance, entry.identity, entry.camera)
                for rank, (entry, distance) in enumerate(row, 1)
            ]
            for row in rows
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the gallery and its index to a file, whole or not at all.

        It waits while another process writes the file.

        Raises:
            InputError: for a gallery to which nothing was ever added, or a file that another process has changed since
                this gallery was read from it.
        """
        with self._lock, locked(resolved(os.fspath(path))):
            self.gallery.save(path)
