"""Dataclasses of options: every field has a config key, a default, an explanation and a range."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from pml_drsl.checks import InputError

T = TypeVar("T", bound="Options")


def option(
    key: str,
    default: Any,
    text: str,
    *,
    least: int | None = None,
    choices: Collection[Any] | None = None,
    config_default: Any = None,
) -> Any:
    """A field of an ``Options`` dataclass.

    Args:
        key: config key that sets the option; empty for an option that a config cannot set.
        default: value of the option where it is not given.
        text: explanation, for ``--help`` and the docs.
        least: smallest allowed value of an integer, or of every integer in a list.
        choices: allowed values of a string.
        config_default: default of the config key, where torchreid's config has another default than its functions.
    """
    metadata = {
        "key": key,
        "text": text,
        "least": least,
        "choices": choices,
        "config_default": default if config_default is None else config_default,
    }
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of options: checks their ranges, and refuses unknown names.

    Raises:
        InputError: for a value out of its range, or a name that is not an option.
    """

    def __post_init__(self) -> None:
        for each in fields(self):
            check(each.metadata["key"] or each.name, getattr(self, each.name), **_limits(each.metadata))

    @classmethod
    def of(cls: type[T], given: Mapping[str, Any]) -> T:
        """Options from their values by name; an unknown name is refused with the nearest known name."""
        known = [each.name for each in fields(cls)]
        for name in given:
            if name not in known:
                nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise InputError(f"there is no option {name!r}; did you mean {nearest!r}? Known: {', '.join(known)}")
        return cls(**given)

    def arguments(self, of: type[Options] | None = None) -> dict[str, Any]:
        """The values by name, of all options or of the options of a base class."""
        return {each.name: getattr(self, each.name) for each in fields(of or self)}


def _limits(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: metadata[name] for name in ("least", "choices")}


def check(key: str, value: Any, least: int | None = None, choices: Collection[Any] | None = None) -> None:
    """Raises InputError for an integer (or one in a list) below ``least``, or a value that is not a choice."""
    if choices is not None and value not in choices:
        raise InputError(f"{key} must be one of {', '.join(map(str, choices))}, got {value!r}")
    if least is None:
        return
    for each in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(each, int) or isinstance(each, bool) or each < least:
            raise InputError(f"{key} takes whole numbers of {least} or more, got {each!r}")


def documented(cls: type[T]) -> type[T]:
    """Decorator: adds the options of a dataclass, with their keys and explanations, to its docstring."""
    lines: Iterable[str] = (
        f"    {each.name}: {each.metadata['text']}" + (f" (``{each.metadata['key']}``)" if each.metadata["key"] else "")
        for each in fields(cls)
    )
    cls.__doc__ = f"{cls.__doc__}\n\nAttributes:\n" + "\n".join(lines)
    return cls
