"""What a configuration can name: keys, networks, losses, miners and data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torchreid

from pml_drsl.checks import InputError
from torchreid_ext.config import KEYS
from torchreid_ext.engine.criteria import NOT_TRAINED, TABLES, parameters


def listed(what: str, word: str = "") -> str:
    """The entries of a list, of which only those with ``word`` in them, in any case.

    Raises:
        InputError: for an unknown list, or a word that no entry has.
    """
    if what not in LISTS:
        raise InputError(f"--list takes one of {', '.join(LISTS)}, got {what!r}")
    found = [entry for entry in LISTS[what]() if word.lower() in entry.lower()]
    if not found:
        raise InputError(f"none of the {what} has {word!r} in its name or text")
    return "\n".join(found)


def _keys() -> Iterable[str]:
    return (f"{key} ({entry.default!r})\n    {entry.text}" for key, entry in KEYS.items())


def _models() -> Iterable[str]:
    return sorted(vars(torchreid.models)["__model_factory"])


def _classes(table: Mapping[str, type]) -> Iterable[str]:
    return (f"{name}({', '.join(parameters(kind))})" for name, kind in sorted(table.items()) if name not in NOT_TRAINED)


def _datasets() -> Iterable[str]:
    for kind in ("image", "video"):
        for name in sorted(vars(torchreid.data.datasets)[f"__{kind}_datasets"]):
            yield f"{name} ({kind})"


LISTS: dict[str, Callable[[], Iterable[str]]] = {
    "keys": _keys,
    "models": _models,
    "losses": lambda: _classes(TABLES["loss"]),
    "miners": lambda: _classes(TABLES["miner"]),
    "datasets": _datasets,
}
