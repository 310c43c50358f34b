"""Reads the files of ``drsl-evaluate``: features in .npz or .npy files, and identities in a CSV file.

A stranger may have made the files. Pickles are never read, and every fault of a file is one line that names it.
"""

from __future__ import annotations

import csv
import difflib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pml_drsl.checks import InputError

REQUIRED = ("query", "gallery", "query_ids", "gallery_ids")
CAMERAS = ("query_cams", "gallery_cams")
COLUMNS = ("set", "id", "camera")

NumpyArray: TypeAlias = np.ndarray[Any, Any]


def load_arrays(path: str | os.PathLike[str]) -> dict[str, NumpyArray]:
    """All arrays of an .npz file, in the byte order of this machine.

    Raises:
        InputError: if the file is damaged or has another format, or an array holds pickled objects, which could run
            code.
        OSError: if the file cannot be opened.
    """
    loaded = _load(path)
    if isinstance(loaded, np.ndarray):
        raise InputError(f"{os.fspath(path)} holds a single array: give an .npz file, which names its arrays")
    return loaded


def load_array(path: str | os.PathLike[str]) -> NumpyArray:
    """The array of an .npy file, in the byte order of this machine.

    Raises:
        InputError, OSError: as ``load_arrays``.
    """
    loaded = _load(path)
    if not isinstance(loaded, np.ndarray):
        raise InputError(f"{os.fspath(path)} is an .npz file, which names its arrays: give an .npy file")
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
        # numpy and zipfile parse headers by means that raise almost any error: of syntax, types, memory, recursion.
        except Exception as error:
            # numpy's message about pickles advises to allow them. An unknown format gives this message too.
            why = "" if "pickle" in str(error) else f" ({str(error).strip() or type(error).__name__})"
            raise InputError(
                f"{os.fspath(path)} is not a readable .npz or .npy file of plain arrays{why}: write it again with "
                "numpy.savez or numpy.save"
            ) from error


def _native(array: Any) -> NumpyArray:
    """An array in the byte order of this machine, which torch needs.

    Raises:
        ValueError: if it is no array, which a file of an archive may be.
    """
    if not isinstance(array, np.ndarray):
        raise ValueError("an archive may hold arrays only")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def read_npz(path: str) -> dict[str, Any]:
    """The arguments of ``evaluate`` from an .npz file. Other arrays are ignored.

    Raises:
        InputError: if the file has another format, an array is missing, or the name of an array looks like a
            misspelt camera array.
        OSError: if the file cannot be read.
    """
    loaded = load_arrays(path)
    missing = [name for name in REQUIRED if name not in loaded]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)}: it needs {', '.join(REQUIRED)}, and {' and '.join(CAMERAS)} if there "
            f"are cameras; it holds {', '.join(loaded) or 'nothing'}"
        )
    known = (*REQUIRED, *CAMERAS)
    for name in set(loaded) - set(known):
        near = difflib.get_close_matches(name, [camera for camera in CAMERAS if camera not in loaded], n=1)
        if near:  # Ignoring this array would silently ignore the cameras.
            raise InputError(f"{path} has an unknown array {name!r}: did you mean {near[0]!r}?")
    return {name: loaded[name] for name in known if name in loaded}


def read_npy(paths: Sequence[str], ids: str | None) -> dict[str, Any]:
    """The arguments of ``evaluate`` from two .npy files, query and gallery, and the CSV file of their identities.

    Raises:
        InputError: if there are not two files, a file has another format, or the CSV file does not match the arrays.
        OSError: if a file cannot be read.
    """
    if len(paths) != 2:
        raise InputError(f"{len(paths)} feature files given: give one .npz, or two .npy (query, gallery) with --ids")
    if ids is None:
        raise InputError("two feature files need --ids IDS.csv, with columns set,id,camera (see --help)")
    data: dict[str, Any] = {}
    for name, path in zip(("query", "gallery"), paths, strict=True):
        data[name] = load_array(path)
        if data[name].ndim != 2:
            raise InputError(f"{path} has shape {list(data[name].shape)}: give [images, dimensions]")
    labels = _read_csv(ids)
    for side in ("query", "gallery"):
        if len(labels[side]) != len(data[side]):
            raise InputError(f"{ids} has {len(labels[side])} {side} lines for {len(data[side])} {side} features")
        data[f"{side}_ids"] = np.array([line[0] for line in labels[side]], dtype=str)
        if labels["columns"] == list(COLUMNS):
            data[f"{side}_cams"] = np.array([line[1] for line in labels[side]], dtype=str)
    return data


def _read_csv(path: str) -> dict[str, list[Any]]:
    """The (id, camera) pairs of the lines of each set, and the names of the columns under "columns".

    Raises:
        InputError: naming the file, the line and the cure.
        OSError: if the file cannot be opened.
    """
    labels: dict[str, list[Any]] = {"query": [], "gallery": []}
    reader = csv.reader(_lines(path), strict=True)
    columns: list[str] = []
    try:
        for values in reader:
            values = [value.strip() for value in values]
            if not any(values):  # The line is empty.
                continue
            if not columns:
                columns = values
                _check_header(path, reader.line_num, columns)
                continue
            row = dict(zip(columns, values, strict=False))
            if len(values) != len(columns) or "" in values or row["set"] not in labels:
                raise InputError(
                    f"{path}, line {reader.line_num}: {','.join(values)!r} is not {','.join(columns)} with set query "
                    f"or gallery: correct the line"
                )
            labels[row["set"]].append((row["id"], row.get("camera")))
    except csv.Error as error:
        raise InputError(
            f"{path}, line {reader.line_num}: {error}: write plain values, without quotes and line breaks"
        ) from error
    if not columns:
        raise InputError(f"{path} is empty: line 1 must be set,id,camera")
    labels["columns"] = [name for name in COLUMNS if name in columns]
    return labels


def _lines(path: str) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark."""
    content = Path(path).read_bytes()
    try:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content:
            raise InputError(f"{path}, line 1: the file is UTF-16, or not text: save it as CSV in UTF-8")
        return content.decode("utf-8-sig").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"{path}, line {line}: the byte 0x{content[error.start]:02x} is not UTF-8: save the file as CSV in UTF-8, "
            f"or convert it (iconv -f latin1 -t utf-8)"
        ) from error


def _check_header(path: str, line: int, columns: Sequence[str]) -> None:
    if sorted(columns) in (sorted(COLUMNS), sorted(COLUMNS[:2])):
        return
    header, cure = ",".join(columns), "it needs set,id,camera, or set,id without cameras"
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if separator in header:
            cure = f"it has {name} between its columns: save the file with commas"
    if sorted(map(str.lower, columns)) in (sorted(COLUMNS), sorted(COLUMNS[:2])):
        cure = f"write it in small letters, {header.lower()}"
    raise InputError(f"{path}, line {line}: the header is {header!r}: {cure}")
