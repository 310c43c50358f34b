"""The configuration itself: keys merged from files and the command line, and what is said of a wrong one."""

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


class Config(CfgNode):
    """A yacs node whose unknown keys are answered with the nearest known one.

    A YAML file may name another with ``base: FILE`` (relative to itself), whose values it then overrides.
    Keys below ``datasets`` and ``keys.OPTIONS`` are free; such a value adds to the options there are, unless it names
    a class, which then has these options alone.
    """

    def merge_from_file(self, cfg_filename: str | Path) -> None:
        """Raises InputError for a file that is missing, is no YAML mapping, or has an unknown key or wrong type."""
        values = _read_yaml(Path(cfg_filename))
        base = values.pop("base", None)
        if base:
            self.merge_from_file(Path(cfg_filename).parent / base)
        self._merge(values, str(cfg_filename))

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        """Merges ``[key, value, key, value, ...]``, values as objects or as strings of python or YAML.

        Raises:
            InputError: for an odd number of words, an unknown key, or a value of the wrong type.
        """
        # A lone "--" is how many commands separate options from the rest.
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

    def _decoded(self, key: str, value: Any) -> Any:
        value = self._decode_cfg_value(value)
        if not isinstance(value, str) or value[:1] not in ("{", "["):
            return value
        # A mapping or a list as a YAML file has it, names without quotes.
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"config key {key!r}: {value} is not YAML: {error}") from error

    def _merge(self, values: Mapping[str, Any], source: str) -> None:
        known = dict(_flatten(self))
        for key, value in _flatten(values):
            _set(self, key, _coerce(key, value, known, source))


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
    """Pairs of dotted key and value; options, and a data set of one's own (``datasets.NAME``), are one value."""
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
    default = known[key]
    if key in OPTIONS:
        return _options(key, value, default, source)
    if (KEYS[key].kind or type(default)) is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, list):
        return list(value) if isinstance(value, (list, tuple)) else [value]
    if value is False and KEYS[key].default == "off":
        # What YAML makes of the word.
        return "off"
    kind = KEYS[key].kind or type(default)
    if value is None and KEYS[key].kind is not None:
        return None
    if type(value) is not kind:
        raise InputError(f"config key {key!r} takes a {kind.__name__} such as {default!r}, got {value!r} in {source}")
    return value


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
    """A configuration, or a part of one, in dictionaries and lists, as YAML and checkpoints hold it."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def flat(cfg: Config) -> dict[str, Any]:
    """A configuration as dotted keys and plain values."""
    return {key: plain(value) for key, value in _flatten(cfg)}


def get_default_config() -> Config:
    """Every key of torchreid's ``default_config.py`` with its default, and ours (``torchreid_ext.config.keys``)."""
    cfg = Config()
    for key, entry in KEYS.items():
        _set(cfg, key, Config() if entry.default == {} else entry.default)
    return cfg
