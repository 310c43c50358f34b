"""Writes checkpoint files atomically, and reads them without executing code from the file."""

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

# The suffix of files that are being written. A killed run may leave such a file; it is useless.
TEMPORARY = ".tmp"

# torchreid stores its rank-1 as a numpy scalar. These types are needed to read one, by the names of numpy 1 and 2.
_scalar = np.float64(0).__reduce__()[0]
_NUMPY_SCALAR: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
]

# The settings that distinguish the types of optimizers. Other settings differ between versions of torch.
_TELLING = {"betas", "amsgrad", "momentum", "dampening", "nesterov", "alpha", "centered", "rho", "lambd"}


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Context: opens a temporary file, which replaces ``path`` when it is complete and safely on the disk."""
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
    """Writes a checkpoint atomically: ``path`` keeps its old content until the new content is complete.

    Raises:
        InputError: if the state holds an object that ``load`` would refuse.
        OSError: if the file cannot be written, for example because the disk is full.
    """
    try:
        with replacing(path) as file:
            torch.save(state, file)
            file.flush()
            refused = _refused(file.name)
            if refused:
                raise InputError(
                    f"a checkpoint must hold only tensors, numbers and containers, not {', '.join(refused)}"
                )
    except (OSError, RuntimeError) as error:
        # torch raises its own error, and keeps the error of the failed write as its context.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(
            f"cannot write checkpoint {os.fspath(path)!r}: {reason}; what was saved before is kept"
        ) from error


def link(path: Path, name: str) -> None:
    """Gives a file a second name in its folder, and replaces the file that had this name.

    It makes a copy where the file system has no hard links.
    """
    temporary = path.with_name(f".{name}{TEMPORARY}")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, path.with_name(name))
    # If both names already belonged to one file, os.replace does nothing and leaves the temporary name.
    temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # A renamed file survives a power failure only when its folder is on the disk too.
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
    """Reads a checkpoint of this package or of torchreid onto the CPU.

    Raises:
        InputError: if the file is missing or damaged, or holds anything but tensors, numbers and containers.
    """
    if not os.path.isfile(path):
        raise InputError(f"checkpoint {os.fspath(path)!r} does not exist")
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALAR):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = []
        with contextlib.suppress(Exception):
            # This fails if the file is so damaged that torch does not recognize it as a checkpoint.
            refused = _refused(path)
        what = f"it asks for {', '.join(refused)}" if refused else f"it is damaged ({str(error).splitlines()[0]})"
        raise InputError(f"checkpoint {os.fspath(path)!r} is refused: {what}") from error
    except Exception as error:
        # Damaged pickled data may raise any exception, as python's manual says.
        raise InputError(f"checkpoint {os.fspath(path)!r} is damaged: {error or type(error).__name__}") from error
    if not isinstance(state, dict):
        raise InputError(f"checkpoint {os.fspath(path)!r} holds a {type(state).__name__}, not a dictionary of weights")
    if "training" in state and zipfile.is_zipfile(path):
        # This package wrote the file. torch writes checksums, but does not check them when it reads.
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
        except Exception as error:
            # torch does not read the names beside the parts, in which any byte may be damaged too.
            raise InputError(f"checkpoint {os.fspath(path)!r} is damaged: {error}") from error
        if damaged:
            raise InputError(f"checkpoint {os.fspath(path)!r} is damaged: the checksum of {damaged} is wrong")
    return state


@dataclass(frozen=True)
class Loaded:
    """The result of loading weights into a model. Converted to a string, it is a message for the user.

    Attributes:
        path: the file.
        fitting: names of the weights that were loaded.
        unused: names of the weights of the file that the model does not have, or has in another shape.
        untouched: names of the weights of the model that were not in the file.
    """

    path: str
    fitting: list[str]
    unused: list[str]
    untouched: list[str]

    def __str__(self) -> str:
        lines = [f"Loaded {len(self.fitting)} of the model's {len(self.fitting) + len(self.untouched)} weights from "]
        lines[0] += f"'{self.path}'"
        for names, what in ((self.untouched, "left unchanged"), (self.unused, "of the file, not used")):
            if names:
                lines.append(f"{len(names)} {what}: {_some(names)}")
        return "; ".join(lines)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> Loaded:
    """Loads the weights of a checkpoint that fit the model, and returns which did and which did not.

    Raises:
        InputError: if no weight fits.
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
    """Returns the first few names, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "none"


def resume(path: str | os.PathLike[str], model: nn.Module, optimizer: Any, scheduler: Any) -> int:
    """Loads model, optimizer and scheduler from a checkpoint, and returns the epoch to continue from.

    Raises:
        InputError: if the checkpoint lacks a part or does not fit the model.
    """
    state = load(path)
    restore(state, {"state_dict": model, "optimizer": optimizer, "scheduler": scheduler}, path)
    return int(state["epoch"])


def restore(state: dict[str, Any], parts: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Loads the state of each part that is not None. ``path`` is for the messages.

    Raises:
        InputError: if the checkpoint has no state for a part, or a state that does not fit.
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
    """Returns the state with the names that ``part`` uses.

    Raises:
        InputError: if the state is of another type of optimizer. torch would load such a state.
    """
    if isinstance(part, nn.Module):
        # DataParallel and DistributedDataParallel put this prefix before every name.
        return {name.removeprefix("module."): value for name, value in state.items()}
    if isinstance(part, Optimizer):
        given, own = (set(groups[0]) & _TELLING for groups in (state["param_groups"], part.param_groups))
        if given != own:
            raise InputError(f"its optimizer has {', '.join(sorted(given))}, not {', '.join(sorted(own))}")
    return state
