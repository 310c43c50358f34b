"""Config keys that are derived from the options of a run and from the arguments of a loss."""

from __future__ import annotations

import inspect
import re
import types
import typing
from dataclasses import fields
from typing import Any, NamedTuple

from torchreid_ext.runtime.options import Options

SCALARS = (bool, int, float, str)


class Key(NamedTuple):
    """A config key.

    Attributes:
        default: its value where a config does not set it.
        text: what it is for.
        name: name of the option or argument that it sets, if it is derived from one.
        kind: type of its values, if they may be None; otherwise the type of the default is meant.
    """

    default: Any
    text: str
    name: str = ""
    kind: type | None = None


def keys_of_options(options: type[Options]) -> dict[str, Key]:
    """The config keys of a dataclass of options; an option without a key is left out."""
    return {
        each.metadata["key"]: Key(each.metadata["config_default"], each.metadata["text"], each.name)
        for each in fields(options)
        if each.metadata["key"]
    }


def keys_of_arguments(section: str, kind: type) -> dict[str, Key]:
    """A config key ``SECTION.ARGUMENT`` for each argument of a class that is a number, a bool or a string.

    The default is the argument's. The explanation is the first sentence about it in the docstring's ``Args``.
    """
    hints = typing.get_type_hints(kind.__init__)  # type: ignore[misc]
    explained = _explained(inspect.getdoc(kind) or "")
    keys = {}
    for parameter in inspect.signature(kind).parameters.values():
        scalar = _scalar(hints.get(parameter.name))
        if parameter.default is not parameter.empty and scalar is not None:
            optional = scalar if type(None) in typing.get_args(hints[parameter.name]) else None
            text = explained.get(parameter.name, "")
            keys[f"{section}.{parameter.name}"] = Key(parameter.default, text, parameter.name, optional)
    return keys


def _scalar(hint: Any) -> type | None:
    """The type in SCALARS that a type hint names, alone or beside None."""
    parts = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
    found = [part for part in parts - {type(None)} if part in SCALARS]
    return found[0] if len(found) == 1 and len(parts - {type(None)}) == 1 else None


def _explained(docstring: str) -> dict[str, str]:
    """The first sentence about each argument in a docstring's ``Args``."""
    _, _, section = docstring.partition("Args:\n")
    section = re.split(r"\n(?=\S)", section)[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.M)
    return {name: _first_sentence(" ".join(text.split())) for name, text in found}


def _first_sentence(text: str) -> str:
    return re.split(r"\.(?:\s+(?=[A-Z`])|$)", text)[0].replace("``", "`")
