"""What an evaluation is given: files of strangers (.npz, .npy, CSV), read without pickles, and labels of any kind."""

from __future__ import annotations

import csv
import difflib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pml_drsl.checks import InputError

REQUIRED, CAMERAS = ("query", "gallery", "query_ids", "gallery_ids"), ("query_cams", "gallery_cams")
PATHS = ("query_paths", "gallery_paths")  # of images, which drsl-extract writes
COLUMNS = ("set", "id", "camera")

NumpyArray: TypeAlias = np.ndarray[Any, Any]
Array: TypeAlias = Tensor | NumpyArray
Labels: TypeAlias = Array | Sequence[int] | Sequence[str]
Junk: TypeAlias = Sequence[int | str]


def load_arrays(path: str | os.PathLike[str]) -> dict[str, NumpyArray]:
    """All arrays of an .npz file, in the byte order of this machine. Damaged files, other formats, and pickled objects,
    which could run code, are an InputError."""
    loaded = _load(path)
    if isinstance(loaded, np.ndarray):
        raise InputError(f"{os.fspath(path)} holds a single array: give an .npz file, which names its arrays")
    return loaded


def _load(path: str | os.PathLike[str]) -> NumpyArray | dict[str, NumpyArray]:
    with open(path, "rb") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Of headers that Python 2 wrote.
                loaded = np.load(file, allow_pickle=False)
                if isinstance(loaded, np.ndarray):
                    return _native(loaded)
                with loaded:
                    return {name: _native(loaded[name]) for name in loaded.files}
        except Exception as error:  # numpy and zipfile parse headers by means that raise almost any error.
            # numpy's message about pickles advises to allow them. An unknown format gives this message too.
            why = "" if "pickle" in str(error) else f" ({str(error).strip() or type(error).__name__})"
            fault = f"{os.fspath(path)} is not a readable .npz or .npy file of plain arrays{why}"
            raise InputError(f"{fault}: write it again with numpy.savez or numpy.save") from error


def _native(array: Any) -> NumpyArray:
    if not isinstance(array, np.ndarray):
        raise ValueError("an archive may hold arrays only")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def read_npz(path: str, cameras: bool = True) -> dict[str, Any]:
    """The arguments of ``evaluate`` from an .npz file. Without ``cameras``, or where the file has none, the paths of
    images stand in their place, so that no image is a match of itself. Other arrays are ignored. An InputError as
    ``load_arrays``, or if an array is missing or that of the cameras misspelt."""
    loaded, known = load_arrays(path), (*REQUIRED, *CAMERAS)
    if missing := [name for name in REQUIRED if name not in loaded]:
        needs = f"it needs {', '.join(REQUIRED)}, and {' and '.join(CAMERAS)} if there are cameras"
        raise InputError(f"{path} lacks {', '.join(missing)}: {needs}; it holds {', '.join(loaded) or 'nothing'}")
    for name in set(loaded) - {*known, *PATHS}:  # Ignoring a misspelt array would silently ignore the cameras.
        if near := difflib.get_close_matches(name, [camera for camera in CAMERAS if camera not in loaded], n=1):
            raise InputError(f"{path} has an unknown array {name!r}: did you mean {near[0]!r}?")
    found = {name: loaded[name] for name in known if name in loaded and (cameras or name not in CAMERAS)}
    if found.keys().isdisjoint(CAMERAS) and loaded.keys() >= set(PATHS):
        found |= {camera: loaded[name] for camera, name in zip(CAMERAS, PATHS, strict=True)}
    return found


def read_npy(paths: Sequence[str], ids: str | None) -> dict[str, Any]:
    """The arguments of ``evaluate`` from two .npy files, query and gallery, and the CSV file of their identities. An
    InputError as ``load_arrays``, or if the CSV file does not match the arrays."""
    if len(paths) != 2:
        raise InputError(f"{len(paths)} feature files given: give one .npz, or two .npy (query, gallery) with --ids")
    if ids is None:
        raise InputError("two feature files need --ids IDS.csv, with columns set,id,camera (see --help)")
    data: dict[str, Any] = {}
    for side, path in zip(("query", "gallery"), paths, strict=True):
        data[side] = _load(path)
        if not isinstance(data[side], np.ndarray):
            raise InputError(f"{path} is an .npz file, which names its arrays: give an .npy file")
        if data[side].ndim != 2 or len(data[side]) == 0:
            raise InputError(f"{path} has shape {list(data[side].shape)}: give [images, dimensions]")
    for side, rows in _read_csv(ids).items():
        if len(rows) != len(data[side]):
            raise InputError(f"{ids} has {len(rows)} {side} lines for {len(data[side])} {side} features")
        data |= zip((f"{side}_ids", f"{side}_cams"), np.array(rows, dtype=str).T, strict=False)
    return data


def _read_csv(path: str) -> dict[str, list[list[str]]]:
    """The identity, and the camera if there is one, of each line of the two sets. UTF-8 may have a byte order mark."""
    content = Path(path).read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
        raise InputError(f"{path}, line 1: the file is UTF-16, or not text: save it as CSV in UTF-8")
    labels: dict[str, list[list[str]]] = {"query": [], "gallery": []}
    columns: list[str] = []
    try:
        reader = csv.reader(content.decode("utf-8-sig").splitlines(keepends=True), strict=True)
        for values in reader:
            values = [value.strip() for value in values]
            where, row = f"{path}, line {reader.line_num}", dict(zip(columns, values, strict=False))
            if not any(values):
                continue
            if not columns:
                columns = _checked_header(where, values)
            elif len(values) != len(columns) or "" in values or row["set"] not in labels:
                fault = f"{','.join(values)!r} is not {','.join(columns)} with set query or gallery"
                raise InputError(f"{where}: {fault}: correct the line")
            else:
                labels[row["set"]].append([row[name] for name in COLUMNS[1:] if name in row])
    except UnicodeDecodeError as error:
        line, byte = content[: error.start].count(b"\n") + 1, content[error.start]
        cure = "save the file as CSV in UTF-8, or convert it (iconv -f latin1 -t utf-8)"
        raise InputError(f"{path}, line {line}: the byte 0x{byte:02x} is not UTF-8: {cure}") from error
    except csv.Error as error:
        cure = "write plain values, without quotes and line breaks"
        raise InputError(f"{path}, line {reader.line_num}: {error}: {cure}") from error
    if not columns:
        raise InputError(f"{path} is empty: line 1 must be set,id,camera")
    return labels


def _checked_header(where: str, columns: list[str]) -> list[str]:
    known, header = (sorted(COLUMNS), sorted(COLUMNS[:2])), ",".join(columns)
    if sorted(columns) in known:
        return columns
    cure = "it needs set,id,camera, or set,id without cameras"
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if separator in header:
            cure = f"it has {name} between its columns: save the file with commas"
    if sorted(map(str.lower, columns)) in known:
        cure = f"write it in small letters, {header.lower()}"
    raise InputError(f"{where}: the header is {header!r}: {cure}")


def label_array(labels: Labels) -> NumpyArray:
    """Labels as an array of numbers or of text. Bytes become text, and columns of pandas what they hold."""
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.dtype.kind == "O" and len({type(label) for label in array.flat} & {str, int}) == 1:
        array = np.array(array.tolist())
    return np.char.decode(array, "latin-1") if array.dtype.kind == "S" else array


def shared_labels(query: Labels, gallery: Labels, num_query: int, num_gallery: int, name: str) -> tuple[Tensor, Tensor]:
    """Numbers the labels of the queries and of the gallery from 0, equal ones equally: two int64 tensors on the CPU. An
    InputError if there is not one label for each feature, or the labels are not integers or strings."""
    sides: list[NumpyArray] = []
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
    numbers = torch.from_numpy(np.unique(together, return_inverse=True)[1].astype(np.int64).reshape(-1))
    return numbers[:num_query], numbers[num_query:]


def number_identities(
    query: Labels, gallery: Labels, num_query: int, num_gallery: int, junk: Junk, name: str = "ids"
) -> tuple[Tensor, Tensor]:
    """Numbers identities as ``shared_labels`` does. Junk identities get -1; "-1" stands for -1 too, and -1 for "-1". An
    InputError as ``shared_labels``, or if a junk identity is a name, and the identities are integers."""
    numbers = shared_labels(query, gallery, num_query, num_gallery, name)
    if isinstance(junk, str):
        raise InputError(f"junk={junk!r}: give a list of identities, such as [{junk!r}]")
    for array, of_side in zip(map(label_array, (query, gallery)), numbers, strict=True):
        try:
            alike = [str(each) if array.dtype.kind == "U" else int(each) for each in junk]
        except (TypeError, ValueError) as error:
            raise InputError(f"junk={list(junk)!r}: the identities are integers, so give integers") from error
        of_side[torch.from_numpy(np.isin(array, alike))] = -1
    return numbers
