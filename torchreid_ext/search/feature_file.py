"""Reads and writes files of extracted features, in the format that ``drsl-evaluate`` reads."""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pml_drsl.checks import InputError
from torchreid_ext.runtime.files import replacing
from torchreid_ext.search.model import TrainedModel
from torchreid_ext.search.sources import Entry

# Beside the arrays of drsl-evaluate, which ignores these.
_FINGERPRINT, _PATHS = "model_fingerprint", "{}_paths"


@dataclass(frozen=True)
class ExtractedSet:
    """Images of a query set or a gallery, and their features.

    Attributes:
        entries: the N images.
        features: [N, D] their features.
    """

    entries: list[Entry]
    features: Tensor


def write_features(
    path: str | os.PathLike[str], model: TrainedModel, sets: dict[str, ExtractedSet], labelled: bool
) -> None:
    """Writes features, whole or not at all.

    Args:
        path: the .npz file.
        model: the model that they are of.
        sets: ``"query"`` and ``"gallery"``, or one of them.
        labelled: write the identities and the cameras too, which ``drsl-evaluate`` needs.
    """
    arrays: dict[str, Any] = {_FINGERPRINT: np.array(model.fingerprint)}
    for name, extracted in sets.items():
        arrays[name] = extracted.features.numpy()
        arrays[_PATHS.format(name)] = np.array([os.path.abspath(entry.path) for entry in extracted.entries])
        if labelled:
            arrays[f"{name}_ids"] = np.array([entry.identity for entry in extracted.entries])
            arrays[f"{name}_cams"] = np.array([entry.camera for entry in extracted.entries])
    with replacing(path) as file:
        np.savez(file, **arrays)


def read_gallery(path: str | os.PathLike[str], model: TrainedModel) -> ExtractedSet:
    """The gallery of a file that :func:`write_features` wrote.

    Raises:
        InputError: for a file that is missing, damaged, of another format, without a gallery or of another model.
    """
    arrays = load_arrays(path)
    missing = [name for name in (_FINGERPRINT, "gallery", _PATHS.format("gallery")) if name not in arrays]
    if missing:
        raise InputError(f"{os.fspath(path)!r} lacks {', '.join(missing)}: give a file of a gallery from drsl-extract")
    if str(arrays[_FINGERPRINT]) != model.fingerprint:
        raise InputError(
            f"{os.fspath(path)!r} holds features of another model than {model.path!r}, and features of two models "
            f"cannot be compared: extract them again with this checkpoint"
        )
    paths = arrays[_PATHS.format("gallery")]
    empty = np.full(len(paths), "")
    identities, cameras = (arrays.get(f"gallery_{name}", empty) for name in ("ids", "cams"))
    entries = [Entry(*map(str, row)) for row in zip(paths, identities, cameras, strict=True)]
    return ExtractedSet(entries, torch.from_numpy(arrays["gallery"]))


def load_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray[Any, Any]]:
    """All arrays of an .npz file; pickles in it are refused.

    Raises:
        InputError: for a file that is missing, cut short, damaged or of another format.
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no file {os.fspath(path)!r}")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it holds a single array")
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{os.fspath(path)!r} is damaged, or not an .npz file of plain arrays: {error}") from error
