"""Checkpoints: written whole or not at all, and read without running what they hold."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pml_drsl.checks import InputError
from torchreid_ext.runtime import distributed

# How the name of a file ends that is being written; one that a killed run left is of no use.
TEMPORARY = ".tmp"

# torchreid stores its rank-1 as a numpy scalar; these are what one is made of, as numpy 1 and 2 name them.
_scalar = np.float64(0).__reduce__()[0]
_NUMPY_SCALAR: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
]

# The settings that tell kinds of optimizers apart; versions of torch differ in others.
_TELLING = {"betas", "amsgrad", "momentum", "dampening", "nesterov", "alpha", "centered", "rho", "lambd"}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write beside ``path``, which takes its place, on the disk itself, once it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def save(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint that is never seen half written: what ``path`` held before is there until it is whole.

    Raises:
        InputError: if the state holds something that ``load`` would refuse.
        OSError: if it cannot be written, because the disk is full, say.
    """
    try:
        with replacing(path) as file:
            torch.save(state, file)
            file.flush()
            refused = _refused(file.name)
            if refused:
                raise InputError(
                    f"a checkpoint must hold tensors, numbers and containers alone, not {', '.join(refused)}"
                )
    except (OSError, RuntimeError) as error:
        # torch hides what a failing write said behind its own surprise.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(
            f"cannot write checkpoint {os.fspath(path)!r}: {reason}; what was saved before is kept"
        ) from error


def link(path: Path, name: str) -> None:
    """Gives a file a second name in its folder, in place of whatever had that name; a copy where links are unknown."""
    temporary = path.with_name(f".{name}{TEMPORARY}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, path.with_name(name))
    # Of two names of one file, replacing one by the other leaves both.
    temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # A renamed file survives a power failure only once its folder is on the disk.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _refused(path: Any) -> list[str]:
    with torch.serialization.safe_globals(_NUMPY_SCALAR):
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint, ours or torchreid's, onto the CPU.

    Raises:
        InputError: for a missing or damaged file, or one that holds more than tensors, numbers and containers.
    """
    if not os.path.isfile(path):
        raise InputError(f"checkpoint {os.fspath(path)!r} does not exist")
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALAR):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = []
        with contextlib.suppress(Exception):
            # A file so damaged that torch does not know it for a checkpoint asks for nothing.
            refused = _refused(path)
        what = f"it asks for {', '.join(refused)}" if refused else f"it is damaged ({str(error).splitlines()[0]})"
        raise InputError(f"checkpoint {os.fspath(path)!r} is refused: {what}") from error
    except Exception as error:
        # Reading pickled data that are damaged may raise anything, as python's manual says.
        raise InputError(f"checkpoint {os.fspath(path)!r} is damaged: {error or type(error).__name__}") from error
    if not isinstance(state, dict):
        raise InputError(f"checkpoint {os.fspath(path)!r} holds a {type(state).__name__}, not a dictionary of weights")
    if "training" in state and zipfile.is_zipfile(path):
        # One of ours. torch takes its tensors as they are, and does not look at the checksums that it writes.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise InputError(f"checkpoint {os.fspath(path)!r} is damaged: the checksum of {damaged} is wrong")
    return state


@dataclass(frozen=True)
class Loaded:
    """What became of the weights of a file in a model; as a string, what to tell the user.

    Attributes:
        path: the file.
        fitting: names of the weights that the model has from the file.
        unused: names of the file's that the model lacks, or has in another shape.
        untouched: names of the model's that are as they were.
    """

    path: str
    fitting: list[str]
    unused: list[str]
    untouched: list[str]

    def __str__(self) -> str:
        lines = [f"Loaded {len(self.fitting)} of the model's {len(self.fitting) + len(self.untouched)} weights from "]
        lines[0] += f"'{self.path}'"
        for names, what in ((self.untouched, "left as they were"), (self.unused, "of the file, not used")):
            if names:
                lines.append(f"{len(names)} {what}: {_some(names)}")
        return "; ".join(lines)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> Loaded:
    """Loads the weights of a checkpoint that fit the model, and says which did and which did not.

    Raises:
        InputError: if none fits.
    """
    state = load(path)
    target = distributed.unwrapped(model)
    own = target.state_dict()
    held = state.get("state_dict", state)
    if not isinstance(held, dict):
        raise InputError(f"checkpoint {os.fspath(path)!r} holds a {type(held).__name__}, not a dictionary of weights")
    given = {str(name).removeprefix("module."): value for name, value in held.items() if isinstance(value, Tensor)}
    fitting = {name: value for name, value in given.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise InputError(
            f"no weight in {os.fspath(path)!r} fits the model: it has {_some(list(given))}, the model "
            f"{_some(list(own))}; check model.name"
        )
    target.load_state_dict(own | fitting)
    unused, untouched = given.keys() - fitting.keys(), own.keys() - fitting.keys()
    return Loaded(os.fspath(path), list(fitting), sorted(unused), sorted(untouched))


def _some(names: list[str]) -> str:
    """The first few of names."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"


def resume(path: str | os.PathLike[str], model: nn.Module, optimizer: Any, scheduler: Any) -> int:
    """Loads model, optimizer and scheduler from a checkpoint, ours or torchreid's; returns the epoch to go on from.

    Raises:
        InputError: if the checkpoint lacks a part or does not fit the model.
    """
    state = load(path)
    restore(state, {"state_dict": model, "optimizer": optimizer, "scheduler": scheduler}, path)
    return int(state["epoch"])


def restore(state: dict[str, Any], parts: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Gives each part that is not None its state of that name; ``path`` is for the messages.

    Raises:
        InputError: if a part has no state, or one that does not fit it.
    """
    for name, part in parts.items():
        if part is None:
            continue
        if name not in state:
            raise InputError(
                f"checkpoint {os.fspath(path)!r} has no {name!r}; take its weights with model.load_weights"
            )
        if isinstance(part, nn.Module):
            part = distributed.unwrapped(part)
        try:
            part.load_state_dict(_fitted(state[name], part))
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"checkpoint {os.fspath(path)!r} does not fit this run's {name}: {error}") from error


def _fitted(state: dict[str, Any], part: Any) -> dict[str, Any]:
    """A state as ``part`` names its entries.

    Raises:
        InputError: for the state of an optimizer of another kind, which torch would load.
    """
    if isinstance(part, nn.Module):
        # DataParallel and DistributedDataParallel put this prefix before every name.
        return {name.removeprefix("module."): value for name, value in state.items()}
    if isinstance(part, Optimizer):
        given, own = (set(groups[0]) & _TELLING for groups in (state["param_groups"], part.param_groups))
        if given != own:
            raise InputError(f"it is of an optimizer with {', '.join(sorted(given))}, not {', '.join(sorted(own))}")
    return state
