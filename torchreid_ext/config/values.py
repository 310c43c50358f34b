"""The values of a configuration: read from YAML, and turned into the types of their keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from pml_drsl.checks import InputError, is_real
from torchreid_ext.config.keys import KEYS, OPTIONS


def is_text(key: str, value: Any) -> bool:
    """Whether a word is a string as it stands, although Python reads ``value``: the folder 2024_01, say."""
    if key not in KEYS or isinstance(value, str):
        return False
    default = KEYS[key].default
    many = isinstance(default, list) and not isinstance(value, (list, tuple))
    return isinstance(default[0] if many else default, str)


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


# Without dates: 2024-05-01 is text, the name of a folder, say.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag != "tag:yaml.org,2002:timestamp"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


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
        raise InputError(f"config file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"config file {path} is not text in UTF-8: {error}; save it in this encoding") from error
    values = load_yaml(text, f"config file {path}")
    if not isinstance(values, dict):
        raise InputError(f"config file {path} must hold keys and values, got {values!r}")
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of dotted key and value. The options of a class or of a data set (``datasets.NAME``) are one value."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and prefix != "datasets." and name not in OPTIONS:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def nested(key: str, value: Any) -> dict[str, Any]:
    """A dotted key and its value as mappings in mappings."""
    first, *rest = key.split(".", 1)
    return {first: nested(rest[0], value) if rest else value}


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
    is wanted, ``"1e-3"`` a number, ``60.0`` a whole number, and a single value a list."""
    entry = KEYS[key]
    default = entry.default
    if value is None and entry.kind is not None:
        return None
    if value is False and default == "off":  # YAML reads the word off as False.
        return "off"
    if default == "auto" and _to_bool(value) is not None:
        return _to_bool(value)
    is_list = isinstance(default, list)
    convert, wanted = _KINDS[type(default[0]) if is_list else entry.kind or type(default)]
    found = []
    for each in value if is_list and isinstance(value, (list, tuple)) else [value]:
        own = None
        with suppress(ValueError, OverflowError):
            own = convert(each)
        if own is None:
            takes = f"{'a list in which every entry is ' * is_list}{wanted}{' or None' * (entry.kind is not None)}"
            raise InputError(f"config key {key!r} takes {takes}, such as {default!r}, got {each!r} in {source}")
        found.append(own)
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
    return str(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else None


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
