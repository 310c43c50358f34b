"""The values of a configuration: read from YAML and from words, and turned into the types of their keys."""

from __future__ import annotations

import os
import re
from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from pml_drsl.checks import InputError, is_real
from torchreid_ext.config.keys import KEYS, OPTIONS, SET_KEYS
from torchreid_ext.runtime.options import Key

_PATHS = ("data.root", "data.save_dir", "model.load_weights", "model.resume")  # in which ~ is the user's folder


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a section, of which YAML would silently lose the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# A name stays as it is written: 2024-05-01 is no date, and a whole number is only what Python prints so. YAML 1.1 reads
# 0010 as 8, 2024_05 as 202405 and 1:30 as 90; here they are text, from which a key that takes a number reads it. The
# arguments of a class have no types here, so that they keep the text.
_INT = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in ("tag:yaml.org,2002:timestamp", _INT)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile("(?:0|-?[1-9][0-9]*)$"), [*"-0123456789"])


class _Dumper(yaml.SafeDumper):
    """Quotes what ``_Loader`` would not read as text."""


for _side in (_Loader, _Dumper):  # The documentation and --list keys write None, as Python does.
    _side.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("None$"), ["N"])


def dumped(values: Mapping[str, Any]) -> str:
    """The YAML text of plain values, from which ``load_yaml`` reads them again."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def load_yaml(text: str, what: str) -> Any:
    """What a YAML text says. Raises InputError if it is not YAML, or if a key stands twice in a section."""
    try:
        return yaml.load(text, _Loader)
    except Exception as error:
        # yaml's constructors raise errors of many kinds: "!!int ''" an IndexError, "!!int a" a ValueError.
        raise InputError(f"{what} is not YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file. Raises InputError for a file that is missing or holds something else."""
    if not path.is_file():
        fault = "is a folder: give a YAML file" if path.is_dir() else "does not exist"
        raise InputError(f"config file {path} {fault}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"config file {path} is not text in UTF-8: {error}; save it in this encoding") from error
    values = load_yaml(text, f"config file {path}")
    if not isinstance(values, dict):
        raise InputError(f"config file {path} must hold keys and values, got {str(values)[:60]!r}")
    return values


def decoded(key: str, word: str) -> Any:
    """The value of a word on the command line, in the syntax of Python or YAML. Where the key takes text, the word is
    text as it stands, although Python reads a number: the folder 2024_01, say. Raises InputError for wrong YAML."""
    value: Any = None if word == "null" else word
    with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = literal_eval(word)
    entry, opening = _entry(key), "{["
    kind, many = _kind(entry) if entry else (None, False)
    if entry and kind is str:
        names = value if many and isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(each, str) for each in names) and (value is not None or entry.kind is None):
            value = word
        opening = "[" if many else ""
    # YAML allows names without quotes in a mapping or a list. Python does not.
    in_yaml = isinstance(value, str) and value.startswith((*opening,))
    return load_yaml(value, f"config key {key!r}: {value}") if in_yaml else value


def _entry(key: str) -> Key | None:
    return KEYS.get(key) or SET_KEYS.get(re.sub(r"^datasets\.[^.]+", "datasets.NAME", key))


def _kind(entry: Key) -> tuple[type, bool]:
    """The type of a key's values, or of the entries of its list, and whether it takes a list."""
    kind = entry.kind or type(entry.default)
    return (type(entry.default[0]) if entry.default else str, True) if kind is list else (kind, False)


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of dotted key and value, from keys that are nested or dotted. The options of a class or of a data set
    (``datasets.NAME``) are one value."""
    for key, value in values.items():
        first, *rest = str(key).split(".")
        name = f"{prefix}{first}"
        for part in reversed(rest):
            value = {part: value}
        if isinstance(value, Mapping) and prefix != "datasets." and name not in OPTIONS:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def with_numbers(value: Any) -> Any:
    """The arguments of a class with 1e-3 as a number, which YAML takes for a string."""
    if isinstance(value, Mapping):
        return {key: with_numbers(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(with_numbers(entry) for entry in value)
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value)
    return float(value) if is_number else value


def converted(key: str, value: Any, source: str) -> Any:
    """``value`` as the type of a config key, where its meaning is plain: a whole number becomes a string where a string
    is wanted, ``"1e-3"`` a number, ``60.0`` a whole number, ``~`` the user's folder, and ``"(1, 2)"`` or a single value
    a list. An unknown option of a data set stays as it is: ``make_options`` refuses it. Raises InputError for another
    value."""
    entry = _entry(key)
    if entry is None:
        return value
    default = entry.default
    if value is None and entry.kind is not None:
        return None
    if value is False and default == "off":  # YAML reads the word off as False.
        return "off"
    if default == "auto" and _to_bool(value) is not None:
        return _to_bool(value)
    kind, is_list = _kind(entry)
    # YAML takes (20, 40) for a string. Among names, [ab] is a pattern.
    if is_list and isinstance(value, str) and value[:1] + value[-1:] in ("()", *["[]"] * (kind is not str)):
        value = decoded(key, value)
    convert, wanted = _KINDS[kind]
    found = []
    for each in value if is_list and isinstance(value, (list, tuple)) else [value]:
        own = None
        with suppress(ValueError, OverflowError):
            own = convert(each)
        if own is None:
            takes = f"{'None or ' * (entry.kind is not None)}{'a list in which every entry is ' * is_list}{wanted}"
            takes += f", such as {default!r}" * (default is not None)
            # YAML reads 1.10 as 1.1, no as False and ~ as None, so that the name is lost.
            cure = "; write it in quotes" * (convert is _to_str and isinstance(each, (bool, float, type(None))))
            raise InputError(f"config key {key!r} takes {takes}, got {each!r} in {source}{cure}")
        found.append(os.path.expanduser(own) if key in _PATHS else own)
    return found if is_list else found[0]


def _to_bool(value: Any) -> bool | None:
    if isinstance(value, str):
        value = yaml.safe_load(value) if value.isalpha() else None  # YAML knows true, yes and on.
    return value if isinstance(value, bool) else None


def _to_float(value: Any) -> float | None:
    value = float(value) if isinstance(value, str) else value  # YAML takes 1e-3 for a string.
    return float(value) if is_real(value) else None


def _to_int(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _to_float(value)
    return int(number) if number is not None and number.is_integer() else None


def _to_str(value: Any) -> str | None:
    return str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else None


_KINDS: dict[type, tuple[Callable[[Any], Any], str]] = {
    bool: (_to_bool, "True or False"),
    int: (_to_int, "a whole number"),
    float: (_to_float, "a number"),
    str: (_to_str, "a string"),
}


def plain(value: Any) -> Any:
    """A configuration, or a part of it, as plain dictionaries and lists, for YAML and checkpoints."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
