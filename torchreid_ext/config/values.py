"""Converts a value to the type of its config key where the meaning is plain, and refuses it otherwise."""

from __future__ import annotations

import datetime
from typing import Any

import yaml

from pml_drsl.checks import InputError, is_real
from torchreid_ext.config.derived import Key

KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string", list: "a list"}
"""The types of values, in words."""


def converted(key: str, entry: Key, value: Any, source: str) -> Any:
    """``value`` as the type of a config key.

    A whole number becomes a string where a string is wanted, ``"1e-3"`` a number, ``60.0`` a whole number, and a
    single value a list. The entries of a list become the type of the entries of its default.

    Args:
        key: name of the key, for messages.
        entry: its default and type.
        value: from a YAML file, or from a decoded word of the command line.
        source: where the value was given, for messages.

    Raises:
        InputError: for a value whose meaning is not plain.
    """
    if value is None and entry.kind is not None:
        return None
    kind = entry.kind or type(entry.default)
    if kind is list:
        entries = list(value) if isinstance(value, (list, tuple)) else [value]
        kind = type(entry.default[0])
        wanted = f"a list in which every entry is {KINDS[kind]}"
        return [_single(kind, each, wanted, key, entry, source) for each in entries]
    if value is False and entry.default == "off":
        # YAML reads the word off as False.
        return "off"
    if entry.default == "auto" and _to_bool(value) is not None:
        return _to_bool(value)
    return _single(kind, value, KINDS[kind], key, entry, source)


def _single(kind: type, value: Any, wanted: str, key: str, entry: Key, source: str) -> Any:
    found = _CONVERSIONS[kind](value)
    if found is None:
        none = " or None" if entry.kind is not None else ""
        raise InputError(
            f"config key {key!r} takes {wanted}{none}, such as {entry.default!r}, got {value!r} in {source}"
        )
    return found


def _to_bool(value: Any) -> bool | None:
    if isinstance(value, str):
        # YAML knows true, yes and on.
        value = yaml.safe_load(value) if value.isalpha() else None
    return value if isinstance(value, bool) else None


def _to_float(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            # YAML takes 1e-3 for a string.
            value = float(value)
        except ValueError:
            return None
    return float(value) if is_real(value) else None


def _to_int(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _to_float(value)
    return int(number) if number is not None and number.is_integer() else None


def _to_str(value: Any) -> str | None:
    plain = isinstance(value, (int, float, datetime.date)) and not isinstance(value, (bool, datetime.datetime))
    return str(value) if plain or isinstance(value, str) else None


_CONVERSIONS = {bool: _to_bool, float: _to_float, int: _to_int, str: _to_str}
