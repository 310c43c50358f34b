"""What an evaluation is given: files of other programs (.npz, .npy, CSV), read without pickles, and labels."""

from __future__ import annotations

import csv
import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pml_drsl.checks import InputError

REQUIRED, CAMERAS = ("query", "gallery", "query_ids", "gallery_ids"), ("query_cams", "gallery_cams")
PATHS = ("query_paths", "gallery_paths")  # of images, which drsl-extract writes
COLUMNS = ("set", "id", "camera")
ALONE = "a single array"

NumpyArray: TypeAlias = np.ndarray[Any, Any]
Array: TypeAlias = Tensor | NumpyArray
Labels: TypeAlias = Array | Sequence[int] | Sequence[str]
Junk: TypeAlias = Sequence[int | str]


def load_arrays(path: str | os.PathLike[str]) -> dict[str, NumpyArray]:
    """All arrays of an .npz file, or the array of an .npy file under the name ``ALONE``, in the byte order of this
    machine. Damaged files, other formats, and pickled objects, which could run code, are an InputError."""
    with open(path, "rb") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Of headers that Python 2 wrote.
                loaded = np.load(file, allow_pickle=False)
                arrays = {ALONE: loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
                return {name: array.astype(array.dtype.newbyteorder("="), copy=False) for name, array in arrays.items()}
        except Exception as error:  # numpy and zipfile parse headers by means that raise almost any error.
            # numpy's message about pickles advises to allow them. An unknown format gives this message too.
            why = "" if "pickle" in str(error) else f" ({str(error).strip() or type(error).__name__})"
            fault = f"{os.fspath(path)} is not a readable .npz or .npy file of plain arrays{why}"
            raise InputError(f"{fault}: write it again with numpy.savez or numpy.save") from error


def read_npz(path: str, cameras: bool = True) -> dict[str, Any]:
    """The arguments of ``evaluate`` from an .npz file. Without ``cameras``, or where the file has none, the paths of
    images stand in their place, so that no image is a match of itself. A ``metric``, which drsl-extract writes, is
    text. Other arrays are ignored. An InputError as ``load_arrays``, or if an array is missing or that of the cameras
    misspelt."""
    loaded, known = load_arrays(path), (*REQUIRED, *CAMERAS)
    if missing := [name for name in REQUIRED if name not in loaded]:
        needs = f"it needs {', '.join(REQUIRED)}, and {' and '.join(CAMERAS)} if there are cameras"
        raise InputError(f"{path} lacks {', '.join(missing)}: {needs}; it holds {', '.join(loaded) or 'nothing'}")
    for name in set(loaded) - {*known, *PATHS}:  # Ignoring a misspelt array would silently ignore the cameras.
        if near := get_close_matches(name, [camera for camera in CAMERAS if camera not in loaded], n=1):
            raise InputError(f"{path} has an unknown array {name!r}: did you mean {near[0]!r}?")
    found = {name: loaded[name] for name in known if name in loaded and (cameras or name not in CAMERAS)}
    if found.keys().isdisjoint(CAMERAS) and loaded.keys() >= set(PATHS):
        found |= {camera: loaded[name] for camera, name in zip(CAMERAS, PATHS, strict=True)}
    return found | ({"metric": str(loaded["metric"])} if "metric" in loaded else {})


def read_npy(paths: Sequence[str], ids: str | None) -> dict[str, Any]:
    """The arguments of ``evaluate`` from two .npy files, query and gallery, and the CSV file of their identities. An
    InputError as ``load_arrays``, or if the CSV file does not match the arrays."""
    if len(paths) != 2:
        raise InputError(f"{len(paths)} feature files given: give one .npz, or two .npy (query, gallery) with --ids")
    if ids is None:
        raise InputError("two feature files need --ids IDS.csv, with columns set,id,camera (see --help)")
    data: dict[str, Any] = {}
    for side, path in zip(("query", "gallery"), paths, strict=True):
        loaded = load_arrays(path)
        if ALONE not in loaded:
            raise InputError(f"{path} is an .npz file, which names its arrays: give an .npy file")
        data[side] = loaded[ALONE]
        if data[side].ndim != 2 or len(data[side]) == 0:
            raise InputError(f"{path} has shape {list(data[side].shape)}: give [images, dimensions]")
    for side, rows in _read_ids(ids).items():
        if len(rows) != len(data[side]):
            raise InputError(f"{ids} has {len(rows)} {side} lines for {len(data[side])} {side} features")
        data |= zip((f"{side}_ids", f"{side}_cams"), np.array(rows, dtype=str).T, strict=False)
    return data


def _read_ids(path: str) -> dict[str, list[list[str]]]:
    """The identity, and the camera if there is one, of each line of the two sets; InputError for any other line."""
    labels: dict[str, list[list[str]]] = {"query": [], "gallery": []}
    for at, row in csv_records(path, COLUMNS[:2], COLUMNS[2:], others=False):
        check_text(at, row.values())
        check_whole(at, [row["id"], row.get("camera", "")])
        if row["set"] not in labels:
            raise InputError(f"{at}: set={row['set']!r} must be query or gallery")
        if row.get("camera") == "":
            raise InputError(f"{at}: camera is empty")
        labels[row["set"]].append([row[name] for name in COLUMNS[1:] if name in row])
    return labels


_AS_UTF8 = "save it as UTF-8 (in a spreadsheet program: CSV UTF-8, comma delimited)"


def csv_records(
    path: str, needed: Sequence[str], optional: Sequence[str] = (), others: bool = True
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields the place of every line of a CSV file, for messages, and its values in the columns that are ``needed`` or
    ``optional``, stripped.

    The file is UTF-8 text, whose first line names the columns; commas, semicolons or tabs separate them. Lines without
    any value, and other columns, are left out. Names of files may hold bytes that are no UTF-8; :func:`check_text`
    refuses them elsewhere. Raises InputError if a needed column, or a value in it, is missing, an optional column seems
    to be misspelt (without ``others`` every other column is taken for it), or the file is written in another way. The
    message names the file, the line and the cure."""
    data = Path(path).read_bytes()
    if b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: the text has zero bytes, as UTF-16 has: {_AS_UTF8}")
    text = data.decode("utf-8-sig", "surrogateescape")
    # Excel separates by semicolons where the decimal separator of the language is the comma.
    separator = next((each for each in ",;\t" if each in text.partition("\n")[0]), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        head = [name.strip() for name in next(reader, [])]
        _check_head(f"{path}, line 1", head, needed, optional, others)
        for cells in reader:
            at = f"{path}, line {reader.line_num}"
            if any(cell.strip() for cell in cells[len(head) :]):
                counts = f"there are {len(cells)} values for {len(head)} columns"
                raise InputError(f"{at}: {counts}: put a value that has {separator!r} between double quotes")
            values = dict(zip(head, (cell.strip() for cell in cells), strict=False))
            if not any(values.values()):
                continue
            if empty := [name for name in needed if not values.get(name)]:
                raise InputError(f"{at}: {empty[0]} is empty")
            yield at, {name: values.get(name, "") for name in (*needed, *optional) if name in head}
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}: correct the quotes of this line") from error


def _check_head(at: str, head: Sequence[str], needed: Sequence[str], optional: Sequence[str], others: bool) -> None:
    if missing := [name for name in needed if name not in head]:
        wanted = ",".join(needed)
        cure = f"the first line must name {wanted}" + "".join(f", and may name {name}" for name in optional)
        if {name.lower() for name in head} >= set(needed):
            cure = f"write the names of the columns in lower case: {wanted}"
        raise InputError(f"{at}: the file has no column {missing[0]!r}: {cure}")
    for name in (*needed, *optional):
        if head.count(name) > 1:
            raise InputError(f"{at}: the file has two columns {name!r}: rename or remove one")
        # Ignoring a misspelt column would silently ignore the cameras.
        unknown = [other for other in head if other not in (*needed, *optional)]
        near = [each for each in unknown if not others or get_close_matches(each.lower(), {name, "camera"}, 1, 0.7)]
        if name not in head and near:
            raise InputError(f"{at}: the file has a column {near[0]!r} and no {name!r}: rename or remove it")


def check_text(at: str, values: Iterable[str]) -> None:
    """Raises InputError for a value of :func:`csv_records` that is not UTF-8."""
    for value in values:
        if any("\ud800" <= character <= "\udfff" for character in value):
            shown = value.encode("utf-8", "surrogateescape").decode("latin-1")
            raise InputError(f"{at}: {shown!r} is not UTF-8 but perhaps Latin-1: {_AS_UTF8}")


def check_whole(at: str, names: Sequence[str]) -> None:
    """Raises InputError for an identity or a camera such as -1.0, which would be no junk, or 7.0, which would not be 7.
    pandas writes a column of whole numbers so where a value is missing. Also raises as ``check_not_lost``."""
    if name := next((each for each in names if re.fullmatch(r"-?\d+\.0", each)), ""):
        raise InputError(f'{at}: {name} is no name: write {name[:-2]} (in pandas: astype("Int64") before to_csv)')
    check_not_lost(at, names)


def check_not_lost(at: str, names: Sequence[str]) -> None:
    """Raises InputError for text that NumPy, pandas or a spreadsheet has written for a missing identity or camera, or
    for a long number, so that different people would be one."""
    lost = r"nan|NaN|<NA>|None|NaT|#N/A|-?\d+([.,]\d+)?[eE]\+\d+"
    if name := next((each for each in names if re.fullmatch(lost, each)), ""):
        raise InputError(f"{at}: {name} stands for a missing value, or for a number that lost digits: write the name")


def label_array(labels: Labels) -> NumpyArray:
    """Labels as an array of numbers or of text. Bytes become text, and columns of pandas what they hold."""
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.dtype.kind == "U" and not hasattr(labels, "dtype"):
        array = np.array(labels, dtype=object)  # NumPy has made the text "nan" of a missing label.
    if array.dtype.kind == "O":
        same = (all(isinstance(label, kind) for label in array.flat) for kind in (str, (int, np.integer)))
        array = np.array(array.tolist()) if any(same) else array
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
            pairs = [*enumerate(array.tolist())]
            odd_ones = (pair for kind in ((str, int), str, ()) for pair in pairs if not isinstance(pair[1], kind))
            row, odd = next(odd_ones, (0, None))
            raise InputError(f"{side}_{name} are {array.dtype} (row {row}: {odd}): give integers or strings")
        sides.append(array)
    together = np.concatenate(sides) if (sides[0].dtype.kind == "U") == (sides[1].dtype.kind == "U") else None
    # Signed and unsigned integers of 64 bits have no common type but float64, which cannot tell large ones apart.
    if together is None or together.dtype.kind == "f":
        raise InputError(f"query_{name} are {sides[0].dtype} and gallery_{name} {sides[1].dtype}: give the same kind")
    names, inverse = np.unique(together, return_inverse=True)
    if names.dtype.kind == "U":
        check_not_lost(f"query_{name} and gallery_{name}", names.tolist())
        if not names[0]:
            raise InputError(f"query_{name} or gallery_{name} hold an empty name: write it, or leave the image out")
    numbers = torch.from_numpy(inverse.astype(np.int64).reshape(-1))
    return numbers[:num_query], numbers[num_query:]


def number_cameras(
    query: Labels | None, gallery: Labels | None, num_query: int, num_gallery: int
) -> tuple[Tensor, Tensor] | None:
    """Numbers cameras as ``shared_labels`` does; None without cameras. An InputError for those of one side alone."""
    if query is None and gallery is None:
        return None
    if query is None or gallery is None:
        given, missing = ("gallery", "query") if query is None else ("query", "gallery")
        raise InputError(f"{given}_cams without {missing}_cams: give both, or neither to ignore cameras")
    return shared_labels(query, gallery, num_query, num_gallery, "cams")


def number_identities(
    query: Labels, gallery: Labels, num_query: int, num_gallery: int, junk: Junk, name: str = "ids"
) -> tuple[Tensor, Tensor]:
    """Numbers identities as ``shared_labels`` does. Junk identities get -1; "-1" stands for -1 too, and -1 for "-1". An
    InputError as ``shared_labels``, if a junk identity is a name, and the identities are integers, or if all images of
    a side are junk."""
    numbers = shared_labels(query, gallery, num_query, num_gallery, name)
    if isinstance(junk, str):
        raise InputError(f"junk={junk!r}: give a list of identities, such as [{junk!r}]")
    for side, array, of_side in zip(("query", "gallery"), map(label_array, (query, gallery)), numbers, strict=True):
        try:
            alike = [str(each) if array.dtype.kind == "U" else int(each) for each in junk]
        except (TypeError, ValueError) as error:
            raise InputError(f"junk={list(junk)!r}: the identities are integers, so give integers") from error
        of_side[torch.from_numpy(np.isin(array, alike))] = -1
        if bool((of_side < 0).all()):
            cure = "see the argument junk (drsl-evaluate --junk)"
            raise InputError(f"all {side} images have a junk identity, which has no effect; {cure}")
    return numbers
