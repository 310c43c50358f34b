"""The configuration object, which merges keys from files and from the command line and refuses wrong ones."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from pml_drsl.checks import InputError
from torchreid_ext.config.keys import KEYS, OPTIONS
from torchreid_ext.config.values import converted


class Config(CfgNode):
    """A yacs node that refuses an unknown key and names the nearest known key.

    A YAML file may name a base file with ``base: FILE``, a path relative to the YAML file. The values of the YAML file
    override the values of the base file.

    Keys below ``datasets`` and below ``keys.OPTIONS`` have any names. Values there are added to the values that are
    set already. A value that names a class replaces them.
    """

    def merge_from_file(self, cfg_filename: str | Path) -> None:
        """Merges a YAML file.

        Raises:
            InputError: for a file that is missing or is not a YAML mapping, an unknown key, or a wrong type of value.
        """
        values = _read_yaml(Path(cfg_filename))
        base = values.pop("base", None)
        if base:
            self.merge_from_file(Path(cfg_filename).parent / base)
        self._merge(values, str(cfg_filename))

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        """Merges ``[key, value, key, value, ...]``. A value is an object, or a string in the syntax of Python or YAML.

        A lone ``--`` is ignored: with many commands it separates the options from the other words.

        Raises:
            InputError: for an odd number of words, an unknown key, or a wrong type of value.
        """
        cfg_list = [word for word in cfg_list if word != "--"]
        if len(cfg_list) % 2:
            raise InputError(
                f"options come as KEY VALUE pairs, got {len(cfg_list)} words: {' '.join(map(str, cfg_list))}"
            )
        flags = [key for key in cfg_list[::2] if str(key).startswith("-")]
        if flags:
            raise InputError(f"{flags[0]} stands after KEY VALUE pairs: options with a dash come before all of them")
        for key, value in zip(cfg_list[::2], cfg_list[1::2], strict=True):
            self._merge(_nested(key, self._decoded(key, value)), "the command line")

    def _decoded(self, key: str, word: Any) -> Any:
        value = self._decode_cfg_value(word)
        if _is_text(key, word, value):
            return word
        if not isinstance(value, str) or value[:1] not in ("{", "["):
            return value
        # YAML allows names without quotes in a mapping or a list. Python does not.
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"config key {key!r}: {value} is not YAML: {error}") from error

    def _merge(self, values: Mapping[str, Any], source: str) -> None:
        known = dict(_flatten(self))
        for key, value in _flatten(values):
            _set(self, key, _coerce(key, value, known, source))


def _is_text(key: str, word: Any, value: Any) -> bool:
    """Whether a word is a string as it stands, although Python reads something else: the folder 2024_01, say."""
    if key not in KEYS or not isinstance(word, str) or isinstance(value, str):
        return False
    default = KEYS[key].default
    if isinstance(default, list):
        return isinstance(default[0], str) and not isinstance(value, (list, tuple))
    return isinstance(default, str)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"config file {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"config file {path} must hold keys and values, got {values!r}")
    return values


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of dotted key and value. The options of a class or of a data set (``datasets.NAME``) are one value."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and prefix != "datasets." and name not in OPTIONS:
            yield from _flatten(value, f"{name}.")
        else:
            yield name, value


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, *rest = key.split(".", 1)
    return {first: _nested(rest[0], value) if rest else value}


def _set(node: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, Config())
    node[last] = copy.deepcopy(value)


def _coerce(key: str, value: Any, known: dict[str, Any], source: str) -> Any:
    if key.startswith("datasets."):
        if not isinstance(value, Mapping):
            raise InputError(f"config key {key!r} takes the options of a data set, got {value!r} in {source}")
        return Config({**known.get(key, {}), **value})
    if key not in known:
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)
        raise InputError(f"unknown config key {key!r} in {source}; did you mean {nearest[0]!r}?")
    if key in OPTIONS:
        return _options(key, value, known[key], source)
    return converted(key, KEYS[key], value, source)


def _options(key: str, value: Any, known: Config, source: str) -> Config:
    if isinstance(value, str) and not key.endswith(".kwargs"):
        value = {"name": value} if value else None
    if value is None:
        return Config()
    if not isinstance(value, Mapping):
        takes = (
            "{ARGUMENT: VALUE, ...}" if key.endswith(".kwargs") else "a class's name, or {name: CLASS, ARGUMENT: VALUE}"
        )
        raise InputError(f"config key {key!r} takes {takes}, got {value!r} in {source}")
    return Config(dict(value) if "name" in value else {**known, **value})


def plain(value: Any) -> Any:
    """A configuration, or a part of it, as plain dictionaries and lists, for YAML and checkpoints."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def flat(cfg: Config) -> dict[str, Any]:
    """A configuration as dotted keys and plain values."""
    return {key: plain(value) for key, value in _flatten(cfg)}


def get_default_config() -> Config:
    """A configuration with all keys (``torchreid_ext.config.keys``) at their defaults."""
    cfg = Config()
    for key, entry in KEYS.items():
        _set(cfg, key, Config() if entry.default == {} else entry.default)
    return cfg
