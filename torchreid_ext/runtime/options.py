"""What is known of a setting, and dataclasses of options, each of which is a setting too."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from pml_drsl.checks import InputError, is_real, is_whole, nearest

T = TypeVar("T", bound="Options")


@dataclass(frozen=True)
class Key:
    """A setting, which a config key or an argument of a function sets.

    ``on_resume`` is what a resumed run does with another value. ``"fixed"``: it refuses the value, because the weights
    or the state of the optimizer would not fit. ``"kept"``: the value has no effect, because the state of the
    optimizer, the scheduler or the generators holds it. ``"free"``: it says nothing, because the value has no effect on
    the training. Empty: it prints the change.
    """

    default: Any
    text: str  # what it is for
    least: int | None = None  # smallest allowed number, also of the entries of a list; whole, but for a float default
    choices: Collection[Any] | None = None  # allowed values, also of the entries of a list
    on_resume: str = ""
    features: bool = False  # whether another value gives other features from the same weights and images
    scores: bool = True  # whether another value may give other scores in the last test of a run
    may_be_empty: bool = False  # whether a list may have no entry
    kind: type | None = None  # of its values, if they may be None; otherwise the type of the default is meant
    name: str = ""  # of the option or argument that it sets, if the key is derived from one

    def check(self, key: str, value: Any) -> None:
        """Raises InputError for a value that is not allowed; ``key`` names the setting in the message."""
        values = value if isinstance(value, (list, tuple, range)) else [value]
        if not values and not self.may_be_empty:
            raise InputError(f"{key} takes a list of one or more entries, got {value!r}")
        for each in values:
            if self.choices is not None and each not in self.choices:
                raise InputError(f"{key} must be one of {', '.join(map(str, self.choices))}, got {each!r}")
            fits, numbers = (is_real, "numbers") if isinstance(self.default, float) else (is_whole, "whole numbers")
            if self.least is not None and each is not None and not (fits(each) and each >= self.least):
                raise InputError(f"{key} takes {numbers} of {self.least} or more, got {each!r}")


def option(key: str, default: Any, text: str, *, config_default: Any = None, **others: Any) -> Any:
    """A field of an ``Options`` dataclass, which the config key sets; an empty key is of an option that a config cannot
    set. ``config_default`` is the key's default, where torchreid's config has another one than its functions. The text
    is for ``drsl-train --list keys`` and the docs, and ``others`` are attributes of ``Key``."""
    setting = Key(default if config_default is None else config_default, text, **others)
    given: dict[str, Any] = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**given, metadata={"key": key, "setting": setting})


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base class of options. Raises InputError for a value that is not allowed, or a name that is not an option."""

    def __post_init__(self) -> None:
        for each in fields(self):
            each.metadata["setting"].check(each.metadata["key"] or each.name, getattr(self, each.name))

    @classmethod
    def of(cls: type[T], given: Mapping[str, Any]) -> T:
        """Options from their values by name; an unknown name is refused with the nearest known name."""
        known = [each.name for each in fields(cls)]
        if unknown := [name for name in given if name not in known]:
            near = nearest(unknown[0], known)
            raise InputError(f"there is no option {unknown[0]!r}; did you mean {near!r}? Known: {', '.join(known)}")
        return cls(**given)

    @classmethod
    def keys(cls) -> dict[str, Key]:
        """The config keys of the options; an option without a key is left out."""
        metadata = {each.name: each.metadata for each in fields(cls)}
        return {data["key"]: replace(data["setting"], name=name) for name, data in metadata.items() if data["key"]}

    def arguments(self, of: type[Options] | None = None) -> dict[str, Any]:
        """The values by name, of all options or of the options of a base class."""
        return {each.name: getattr(self, each.name) for each in fields(of or self)}


def documented(cls: type[T]) -> type[T]:
    """Decorator: adds the options of a dataclass, with their keys and explanations, to its docstring."""
    cls.__doc__ = f"{cls.__doc__}\n\nAttributes:"
    for each in fields(cls):
        key = each.metadata["key"]
        cls.__doc__ += f"\n    {each.name}: {each.metadata['setting'].text}" + (f" (``{key}``)" if key else "")
    return cls
