"""The configuration object: it merges keys from files and from the command line, and refuses wrong ones."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from pml_drsl.checks import InputError, is_real, nearest
from torchreid_ext.config.keys import KEYS, OPTIONS
from torchreid_ext.runtime.options import Key


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
            InputError: for a file that is missing or is not a YAML mapping, a key that stands twice in a section, base
                files in a circle, an unknown key, or a wrong type of value.
        """
        self._merge_file(Path(cfg_filename), [])

    def _merge_file(self, path: Path, above: list[Path]) -> None:
        if path.resolve() in above:
            raise InputError(f"config file {path}: base leads back to this file; remove one base of the circle")
        values = _read_yaml(path)
        base = values.pop("base", None)
        if base is not None:
            if not isinstance(base, str):
                raise InputError(f"config file {path}: base takes the name of one file, got {base!r}")
            self._merge_file(path.parent / base, [*above, path.resolve()])
        self._merge(values, str(path))

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
        try:
            value = self._decode_cfg_value(word)
        except (TypeError, MemoryError, RecursionError):
            value = word
        if _is_text(key, word, value):
            return word
        if not isinstance(value, str) or value[:1] not in ("{", "["):
            return value
        # YAML allows names without quotes in a mapping or a list. Python does not.
        return _load_yaml(value, f"config key {key!r}: {value}")

    def _merge(self, values: Mapping[str, Any], source: str) -> None:
        known = dict(_flatten(self))
        try:
            pairs = list(_flatten(values))
        except RecursionError as error:
            raise InputError(f"a value in {source} holds itself; write it out") from error
        for key, value in pairs:
            section = next((name for name in known if name.startswith(f"{key}.")), "")
            if section or key == "datasets":
                # Nothing is set where all keys of a section are commented out.
                if value is not None:
                    example = section or "datasets.NAME"
                    raise InputError(
                        f"config key {key!r} is a section of keys, such as {example}, got {value!r} in {source}"
                    )
                continue
            _set(self, key, _coerce(key, value, known, source))


def _is_text(key: str, word: Any, value: Any) -> bool:
    """Whether a word is a string as it stands, although Python reads something else: the folder 2024_01, say."""
    if key not in KEYS or not isinstance(word, str) or isinstance(value, str):
        return False
    default = KEYS[key].default
    if isinstance(default, list):
        return isinstance(default[0], str) and not isinstance(value, (list, tuple))
    return isinstance(default, str)


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


def _load_yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except Exception as error:
        # yaml's constructors raise errors of many kinds: "!!int ''" an IndexError, 2024-99-99 a ValueError.
        raise InputError(f"{what} is not YAML: {' '.join(str(error).split())}") from error


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"config file {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"config file {path} is not text in UTF-8: {error}; save it in this encoding") from error
    values = _load_yaml(text, f"config file {path}")
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
        if not isinstance(value, Mapping) or key.count(".") > 1:
            raise InputError(f"config key {key!r} takes the options of a data set, got {value!r} in {source}")
        return Config({**known.get(key, {}), **value})
    if key not in known:
        raise InputError(f"unknown config key {key!r} in {source}; did you mean {nearest(key, known)!r}?")
    if key in OPTIONS:
        return _options(key, value, known[key], source)
    return _converted(key, KEYS[key], value, source)


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


def _converted(key: str, entry: Key, value: Any, source: str) -> Any:
    """``value`` as the type of a config key, where its meaning is plain.

    A whole number becomes a string where a string is wanted, ``"1e-3"`` a number, ``60.0`` a whole number, and a
    single value a list. The entries of a list become the type of the entries of its default.
    """
    if value is None and entry.kind is not None:
        return None
    kind = entry.kind or type(entry.default)
    if kind is list:
        entries = list(value) if isinstance(value, (list, tuple)) else [value]
        kind = type(entry.default[0])
        wanted = f"a list in which every entry is {_KINDS[kind]}"
        return [_single(kind, each, wanted, key, entry, source) for each in entries]
    if value is False and entry.default == "off":
        # YAML reads the word off as False.
        return "off"
    if entry.default == "auto" and _to_bool(value) is not None:
        return _to_bool(value)
    return _single(kind, value, _KINDS[kind], key, entry, source)


def _single(kind: type, value: Any, wanted: str, key: str, entry: Key, source: str) -> Any:
    try:
        found = _CONVERSIONS[kind](value)
    except (ValueError, OverflowError):
        found = None
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
    # YAML takes 1e-3 for a string.
    value = float(value) if isinstance(value, str) else value
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
_KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}


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
