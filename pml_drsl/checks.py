"""Validators of hyper-parameters and of input tensors, and the type of error that bad input raises."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

import torch
from pytorch_metric_learning.distances import BaseDistance, BatchedDistance, LpDistance
from torch import Tensor


class InputError(ValueError):
    """The user gave a value that cannot be used; the message names the value and the fix."""


def is_real(value: object) -> bool:
    """Whether a value is a finite number (a bool is not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def nearest(name: object, known: Iterable[str]) -> str:
    """The known name that is most like ``name``, for the message that refuses an unknown name."""
    return difflib.get_close_matches(str(name), list(known), n=1, cutoff=0)[0]


def check_distance(distance: object) -> None:
    """Refuses a distance that DRSL cannot rank by, with an ``InputError`` that says why."""
    if isinstance(distance, BatchedDistance):
        raise InputError(
            f"distance must return the matrix of distances, and BatchedDistance returns none; give the distance inside "
            f"it, {distance.distance!r}, and query_chunk_size to save memory"
        )
    if not isinstance(distance, BaseDistance):
        raise InputError(
            f"distance must be a distance of pytorch_metric_learning.distances, such as LpDistance() or "
            f"CosineSimilarity(), got {distance!r}"
        )
    if distance.is_inverted and not (distance.power >= 1 and distance.power == int(distance.power)):
        raise InputError(
            f"distance has power={distance.power}, and that power of a negative similarity is not a number; give "
            f"power=1"
        )
    if distance.power < 1 or (isinstance(distance, LpDistance) and distance.p < 1):
        raise InputError(
            f"distance has p={distance.p} and power={distance.power}; below 1 the gradient of a distance of 0, or of "
            f"one difference of 0, is infinite; give 1 or more"
        )


def check_finite(mat: Tensor, distance: BaseDistance) -> None:
    """Refuses a distance matrix with infinite or NaN values, with an ``InputError``."""
    if not bool(torch.isfinite(mat).all()):
        raise InputError(
            f"distance {type(distance).__name__} gave infinite or NaN values; SNRDistance does so for an embedding "
            f"whose values are all equal; give another distance or other embeddings"
        )


def check_embeddings(name: str, x: Tensor, dim: int | None = None) -> None:
    """Refuses what is not a floating-point tensor of shape (batch, ``dim``), with an ``InputError``."""
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name} must be a floating-point tensor of shape (batch, dim), got {got}")
    if dim is not None and x.shape[1] != dim:
        raise InputError(f"{name} has {x.shape[1]} dimensions and embeddings {dim}; give both the same number")


def check_labels(name: str, labels: Tensor | None, size: int) -> None:
    """Refuses labels that are not an integer tensor of shape (``size``,), with an ``InputError``. None is accepted."""
    if labels is None:
        return
    is_tensor = isinstance(labels, Tensor)
    if not is_tensor or labels.is_floating_point() or labels.is_complex() or labels.shape != (size,):
        got = f"{labels.dtype} of shape {tuple(labels.shape)}" if is_tensor else type(labels).__name__
        raise InputError(f"{name} must be an integer tensor of shape ({size},), one for each embedding, got {got}")
