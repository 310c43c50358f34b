"""Checkpoints: written whole or not at all, and read without running what they hold."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

# torchreid stores its rank-1 as a numpy scalar; these are what one is made of, as numpy 1 and 2 name them.
_scalar = np.float64(0).__reduce__()[0]
_NUMPY_SCALAR: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
]


def save(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint to a file beside ``path`` first, so that ``path`` is never half a checkpoint."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint, ours or torchreid's, onto the CPU.

    Raises:
        ValueError: for a missing or damaged file, or one that holds more than tensors, numbers and containers.
    """
    if not os.path.isfile(path):
        raise ValueError(f"checkpoint {os.fspath(path)!r} does not exist")
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALAR):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(path) if _is_archive(path) else []
        what = f"it asks for {', '.join(refused)}" if refused else f"it is damaged ({str(error).splitlines()[0]})"
        raise ValueError(f"checkpoint {os.fspath(path)!r} is refused: {what}") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"checkpoint {os.fspath(path)!r} is damaged: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {os.fspath(path)!r} holds a {type(state).__name__}, not a dictionary of weights")
    return state


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Loads the weights of a checkpoint that fit the model and returns the names of those that do not.

    Raises:
        ValueError: if none fits.
    """
    state = load(path)
    target = model.module if isinstance(model, nn.DataParallel) else model
    own = target.state_dict()
    given = {name.removeprefix("module."): value for name, value in state.get("state_dict", state).items()}
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise ValueError(
            f"no weight in {os.fspath(path)!r} fits the model: it has {', '.join(list(given)[:3])}, ..., the model "
            f"{', '.join(list(own)[:3])}, ...; check model.name"
        )
    target.load_state_dict(own | fitting)
    return sorted(given.keys() - fitting.keys())


def resume(path: str | os.PathLike[str], model: nn.Module, optimizer: Any, scheduler: Any) -> int:
    """Loads a training state and returns the epoch to go on from.

    Raises:
        ValueError: if the checkpoint lacks a part or does not fit the model.
    """
    state = load(path)
    parts = {"state_dict": model, "optimizer": optimizer, "scheduler": scheduler}
    for name, part in parts.items():
        if part is None:
            continue
        if name not in state:
            raise ValueError(
                f"checkpoint {os.fspath(path)!r} has no {name!r}; take its weights with model.load_weights"
            )
        try:
            part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(f"checkpoint {os.fspath(path)!r} does not fit this run's {name}: {error}") from error
    return int(state["epoch"])


def _is_archive(path: str | os.PathLike[str]) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"
