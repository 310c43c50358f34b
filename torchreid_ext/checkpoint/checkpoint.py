"""Writes checkpoint files atomically, and reads them without executing code from the file."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pickle
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from pml_drsl.checks import InputError
from pml_drsl.console import replacing
from torchreid_ext.runtime import distributed

# torchreid stores its rank-1 as a numpy scalar. These types are needed to read one, by the names of numpy 1 and 2.
_scalar = np.float64(0).__reduce__()[0]
_NUMPY_SCALAR: list[Any] = [
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType),
]

# The settings that distinguish the types of optimizers. Other settings differ between versions of torch.
_TELLING = {"betas", "amsgrad", "momentum", "dampening", "nesterov", "alpha", "centered", "rho", "lambd"}


def save(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a checkpoint atomically: ``path`` keeps its old content until the new content is complete. Raises
    InputError as ``check_saves``; OSError if the file cannot be written."""
    check_saves(state)
    try:
        with replacing(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        # torch raises its own error, and keeps the error of the failed write as its context.
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"cannot write {_named(path)}: {reason}; what was saved before is kept") from error


def check_saves(state: Mapping[str, Any]) -> None:
    """Raises InputError for a state with a part that cannot be pickled, or holds an object that ``load`` would refuse;
    it names the part, also within ``state["training"]`` of ``states.of_engine``."""
    parts = {**state, **state.get("training", {})}
    parts.pop("training", None)
    for name, part in parts.items():
        file = io.BytesIO()
        try:
            # Tensors and parameters are always allowed, and may be large.
            torch.save(tree_map(lambda value: None if type(value) in (Tensor, nn.Parameter) else value, part), file)
            file.seek(0)
            refused = _refused(file)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            refused = [str(error)]
        if refused:
            cure = "give it a state_dict of numbers, tensors and containers"
            cure += ", or take torch's SequentialLR in its place" * (name == "scheduler")
            raise InputError(f"the state of the {name} holds what no checkpoint can hold, {_some(refused)}: {cure}")


def check_file(path: str | os.PathLike[str]) -> None:
    """Raises InputError if there is no file of this name."""
    if not os.path.isfile(path):
        fault = "is a folder" if os.path.isdir(path) else "does not exist"
        raise InputError(f"{_named(path)} {fault}; give a file, such as model/model-best.pth.tar of a run")


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint of this package or of torchreid onto the CPU. Raises InputError if the file is missing or
    damaged, or holds anything but tensors, numbers and containers; OSError if it cannot be read."""
    check_file(path)
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALAR):
            state = torch.load(path, map_location="cpu", weights_only=True)
        damaged = None
        if isinstance(state, dict) and "training" in state and zipfile.is_zipfile(path):
            # This package wrote the file. torch writes checksums, but does not check them when it reads.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # The disk or the network failed, and the file may be whole. A damaged file can lead to EINVAL.
        if (isinstance(error, MemoryError) or "allocate memory" in str(error)) and _whole(path):
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), os.fspath(path)) from error
        # Damaged pickled data may raise any exception, as python's manual says.
        refused = []
        if isinstance(error, pickle.UnpicklingError):
            with contextlib.suppress(Exception):
                # This fails if the file is so damaged that torch does not recognize it as a checkpoint.
                refused = _refused(path)
        if refused:
            risk = f"refused, because it holds objects ({_some(refused)}), which could run code"
            cure = "save the weights alone, torch.save(model.state_dict(), FILE)"
            raise InputError(f"{_named(path)} is {risk}: {cure}") from error
        # torch may advise to load the file unsafely.
        said = "" if "weights_only" in str(error) else _one_line(str(error).partition("\n")[0])
        fault = f"is damaged, or no checkpoint{f' ({said})' if said else ''}"
        raise InputError(f"{_named(path)} {fault}; give another, such as model/model-best.pth.tar of a run") from error
    if damaged:
        raise InputError(f"{_named(path)} is damaged: the checksum of {_one_line(damaged)} is wrong")
    if not isinstance(state, dict):
        raise InputError(f"{_named(path)} holds a {type(state).__name__}, not a dictionary of weights")
    return state


def _whole(path: str | os.PathLike[str]) -> bool:
    """Whether a file is as torch wrote it, with its checksums: a damaged one may also ask for any amount of memory."""
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        return archive.testzip() is None
    return False


def _refused(path: Any) -> list[str]:
    with torch.serialization.safe_globals(_NUMPY_SCALAR):
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)


def _named(path: str | os.PathLike[str]) -> str:
    return f"checkpoint {os.fspath(path)!r}"


def _one_line(text: str) -> str:
    """A text that may come from a damaged file, without line breaks and control characters, and not too long."""
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    return text if len(text) <= 300 else f"{text[:300]}..."


def _some(names: list[str]) -> str:
    return _one_line(", ".join(names[:5]) + (", ..." if len(names) > 5 else ""))


@dataclass(frozen=True)
class Loaded:
    """The names of weights, after loading those of ``path`` into a model; as a string, a message for the user."""

    path: str
    fitting: list[str]  # were loaded
    unused: list[str]  # the file has them, and the model does not, or in another shape
    untouched: list[str]  # the model has them, and the file does not

    @property
    def lacks_layers(self) -> bool:
        """Whether the file lacks layers besides the classifiers, which are made anew for the identities of a run."""
        return bool(_telling(self.untouched))

    def __str__(self) -> str:
        own = len(self.fitting) + len(self.untouched)
        text = f"Loaded {len(self.fitting)} of the model's {own} weights from '{self.path}'"
        for names, what in ((self.untouched, "left unchanged"), (self.unused, "of the file, not used")):
            text += f"; {len(names)} {what}: {_some(names)}" if names else ""
        return text


def _telling(names: Iterable[str]) -> list[str]:
    """The names of weights that tell one network from another: a classifier is as large as the number of identities,
    and every batch normalisation counts its batches."""
    return [name for name in names if not (name.startswith("classifier") or name.endswith("num_batches_tracked"))]


def people_of(state: Mapping[str, Any]) -> frozenset[str]:
    """The people of configured data sets on whom the weights of a checkpoint were trained, also those on whom the run
    trained from whose weights it began; none in a checkpoint of another program, or of an older version."""
    training = state.get("training")
    people = training.get("people") if isinstance(training, Mapping) else None
    return frozenset(map(str, people)) if isinstance(people, list) else frozenset()


def weights_of(state: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights by name in what ``load`` returned: a checkpoint of a run, or the weights themselves. Raises
    InputError if there is no tensor; it names ``path``."""
    held = state.get("state_dict", state)
    if not isinstance(held, Mapping):
        raise InputError(f"{_named(path)} holds a {type(held).__name__}, not a dictionary of weights")
    weights = {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    if not weights:
        raise InputError(f"{_named(path)} holds no weights: it needs a dictionary of tensors")
    return weights


def _with_names_of(target: nn.Module, state: Mapping[Any, Any]) -> dict[str, Any]:
    # DataParallel and DistributedDataParallel put this prefix before every name, and a network may have it in its own.
    own = target.state_dict()
    return {name if name in own else name.removeprefix("module."): value for name, value in state.items()}


def fit_weights(model: nn.Module, state: Mapping[str, Any], path: str | os.PathLike[str], complete: str = "") -> Loaded:
    """Loads the weights that fit a model, and returns which did and which did not. Raises InputError as ``weights_of``,
    and for the weights of another network, of which fewer than half fit, apart from the classifiers; with ``complete``,
    if any does not fit.

    Args:
        model: the model, which may be inside ``DataParallel``.
        state, path: what ``load`` or ``weights_of`` returned, and the file, for the messages.
        complete: name of the network, to refuse weights that are missing, too many or of another shape. Networks that
            torch saved before 0.4.1 lack the number of batches that their batch normalisation saw; it may be missing.
    """
    target = distributed.unwrapped(model)
    own, weights = target.state_dict(), _with_names_of(target, weights_of(state, path))
    fitting = {name: value for name, value in weights.items() if name in own and own[name].shape == value.shape}
    unused, untouched = sorted(weights.keys() - fitting.keys()), sorted(own.keys() - fitting.keys())
    wrong = sorted({*unused, *(name for name in untouched if not name.endswith("num_batches_tracked"))})
    if complete and wrong:
        what = f"{len(wrong)} weights are missing, too many or of another shape: {_some(wrong)}"
        cure = "Give the network that was trained: --model NAME, or model.name and model.bnneck in --config-file"
        raise InputError(f"{_named(path)} does not hold the weights of {complete!r}: {what}. {cure}")
    # The file may hold a part of the network, and the network may be a part of that in the file.
    fit, of_file, of_model = (len(_telling(names)) for names in (fitting, weights, own))
    if 2 * fit < max(1, min(of_file, of_model)):
        what = f"{fit} of its {of_file} weights fit the model's {of_model} by name and shape"
        others = ([f"{n} {list(w.shape)}" for n, w in part.items() if n not in fitting] for part in (weights, own))
        example = "it has {}, the model {}".format(*(_some(names[:1]) for names in others))
        raise InputError(f"{_named(path)} holds the weights of another network: {what}; {example}; check model.name")
    target.load_state_dict(own | fitting)
    return Loaded(os.fspath(path), list(fitting), unused, untouched)


@contextlib.contextmanager
def fitting(path: str | os.PathLike[str], part: str = "state") -> Iterator[None]:
    """Context: an error of the block becomes an InputError of one line; a readable checkpoint may hold anything."""
    try:
        yield
    except InputError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = _one_line(str(error) or type(error).__name__)
        raise InputError(f"{_named(path)} does not fit this run's {part}: {reason}") from error


def restore(state: dict[str, Any], parts: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Loads the state of each part. ``path`` is for the messages. Raises InputError if the checkpoint has no state for
    a part, or a state that does not fit."""
    for name, part in parts.items():
        if name not in state:
            raise InputError(f"{_named(path)} has no {name!r}; take its weights with model.load_weights")
        saved = state[name]
        with fitting(path, name):
            if isinstance(part, nn.Module):
                part = distributed.unwrapped(part)
                saved = _with_names_of(part, saved)
            elif isinstance(part, Optimizer):
                # torch would load the state of another type of optimizer.
                given, own = (set(groups[0]) & _TELLING for groups in (saved["param_groups"], part.param_groups))
                if given != own:
                    other = f"its optimizer has {', '.join(sorted(given))}, not {', '.join(sorted(own))}"
                    raise InputError(f"{_named(path)} does not fit this run's optimizer: {other}")
            part.load_state_dict(saved)
