"""Describes data sets to the benchmark: by a YAML file of several, or by the options of the command line for one."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pml_drsl.benchmark.training import images, sources
from pml_drsl.benchmark.training.images import Data
from pml_drsl.benchmark.training.networks import STRENGTHS, Recipe
from pml_drsl.benchmark.training.sources import Source
from pml_drsl.checks import InputError


@dataclass(frozen=True)
class BenchmarkSet:
    """A data set with the recipe by which networks are trained on it.

    Attributes:
        name: what the results file and the tables call the set.
        weights: file of the starting weights; None for a random start.
        seeds: runs on the test identities.
    """

    name: str
    data: Data
    recipe: Recipe
    weights: Path | None = None
    seeds: int = 3

    @property
    def score(self) -> str:
        """Name of the score that ranks losses on this set."""
        return "mAP" if self.data.has_cameras else "MAP@R"

    def described(self) -> dict[str, Any]:
        """What the first line of this set in a results file says: results of two sets that differ do not mix."""
        train, test = self.data.split(images.TEST)
        return {
            "name": self.name,
            "digest": images.digest(self.data),
            "score": self.score,
            "folds": self.data.folds,
            "size": list(train.pixels.shape[1:]),
            "training": [train.identities, len(train)],
            "test": [test.identities, len(test)],
            "drawn": bool(self.data.drawn),
            "recipe": dataclasses.asdict(self.recipe),
        }


def from_yaml(path: Path, root: Path, weights: Path | None, only: Iterable[str] = ()) -> list[BenchmarkSet]:
    """The sets of a file: ``NAME: {images: fields of Source, training: fields of Recipe}``.

    ``training.weights: true`` asks for ``--weights``.

    Raises:
        InputError: for a file that cannot be read, an unknown field or set, or images that cannot be had.
    """
    import yaml

    try:
        described = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--sets {path} cannot be read: {error}") from None
    if not isinstance(described, Mapping) or not all(isinstance(value, Mapping) for value in described.values()):
        raise InputError(f"--sets {path}: give NAME: {{images: ..., training: ...}} for every set")
    names = list(only) or list(described)
    for name in names:
        if name not in described:
            raise InputError(f"--only {name}: {path} has the sets {', '.join(described)}")
    return [_of_mapping(name, described[name], root, weights) for name in names]


def _of_mapping(name: str, described: Mapping[str, Any], root: Path, weights: Path | None) -> BenchmarkSet:
    _check_keys(name, described, ("images", "training"))
    source = Source(**_fields(f"{name}.images", described.get("images") or {}, Source))
    training = dict(described.get("training") or {})
    wants_weights = bool(training.pop("weights", False))
    recipe = Recipe(**_fields(f"{name}.training", training, Recipe))
    if wants_weights and weights is None:
        raise InputError(f"{name} starts from trained weights; give their file with --weights")
    return make_set(name, source, recipe, root, weights if wants_weights else None)


def _check_keys(where: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise InputError(f"{where}.{key} is not an option; did you mean {near}? Known: {', '.join(known)}")


def _fields(where: str, given: Mapping[str, Any], kind: type[Source] | type[Recipe]) -> dict[str, Any]:
    """Values of the fields of a dataclass, of the types that its defaults have."""
    defaults = dataclasses.asdict(kind())
    _check_keys(where, given, defaults)
    values = {}
    for key, value in given.items():
        default = defaults[key]
        if isinstance(default, tuple):
            value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            if key != "size":
                value = tuple(map(str, value))
        elif isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not type(default):
            raise InputError(f"{where}.{key}: {value!r} must be of the kind of {default!r}")
        values[key] = value
    return values


def make_set(name: str, source: Source, recipe: Recipe, root: Path, weights: Path | None = None) -> BenchmarkSet:
    """Reads the images of a set. Raises InputError for a value out of range, or images that cannot be had."""
    if len(source.size) != 2 or not all(isinstance(side, int) and side >= 16 for side in source.size):
        raise InputError(f"{name}: size {source.size}: the network halves images four times; give two of 16 or more")
    for key in ("folds", "seeds"):
        least = 2 if key == "folds" else 1
        if getattr(source, key) < least:
            raise InputError(f"{name}: {key} {getattr(source, key)}: give {least} or more")
    check_recipe(name, recipe)
    return finished(name, sources.read(name, source, root), recipe, source.seeds, weights)


def finished(name: str, data: Data, recipe: Recipe, seeds: int, weights: Path | None) -> BenchmarkSet:
    """The set of images that are read; its recipe names the weights by a hash of their file."""
    images.check(name, data)
    if weights is not None:
        if not weights.is_file():
            raise InputError(f"--weights {weights} is not a file")
        recipe = recipe.but(weights=hashlib.sha256(weights.read_bytes()).hexdigest()[:8])
    return BenchmarkSet(name, data, recipe, weights, seeds)


def check_recipe(name: str, recipe: Recipe) -> None:
    if recipe.identities < 2 or recipe.instances * recipe.views < 2:
        raise InputError(
            f"{name}: a batch of {recipe.identities} x {recipe.instances}: a query needs a positive and a negative; "
            "give 2 or more"
        )
    for key in ("dim", "epochs", "views", "instances"):
        if getattr(recipe, key) < 1:
            raise InputError(f"{name}: {key} must be 1 or more, got {getattr(recipe, key)}")
    if recipe.augmentation not in STRENGTHS:
        raise InputError(f"{name}: augmentation {recipe.augmentation}: give one of {', '.join(STRENGTHS)}")
