"""The configuration object: merges keys from files and from the command line, and refuses wrong keys and values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from pml_drsl.checks import InputError, nearest
from torchreid_ext import networks
from torchreid_ext.config.keys import KEYS, OPTIONS
from torchreid_ext.config.values import converted, decoded, flatten, plain, read_yaml, with_numbers
from torchreid_ext.data.samplers import SAMPLERS, check_groups
from torchreid_ext.engine import criteria
from torchreid_ext.engine.options import RunOptions
from torchreid_ext.runtime import distributed

TRANSFORMS = ("random_flip", "random_crop", "random_patch", "color_jitter", "random_erase")
"""Augmentations that torchreid knows, in any case. It ignores any other name silently."""


class Config(CfgNode):
    """A yacs node that refuses an unknown key and names the nearest known key.

    A YAML file may name a base file with ``base: FILE``, a path relative to the YAML file. The values of the YAML file
    override the values of the base file.

    Keys below ``datasets`` and ``keys.OPTIONS`` have any names, and their values are added to those that are set
    already, at every depth. A value that names a class replaces them.
    """

    @property
    def _given(self) -> set[str]:
        """The keys that were merged, rather than left at their defaults."""
        return self.__dict__.setdefault("given", set())

    def merge_from_file(self, cfg_filename: str | Path) -> None:
        """Merges a YAML file. Raises InputError for a file that is missing or no YAML mapping, a key that stands twice
        in a section, base files in a circle, an unknown key, or a wrong type of value."""
        self._merge_file(Path(cfg_filename), [])
        self._fit_images()

    def _merge_file(self, path: Path, above: list[Path]) -> None:
        if path.resolve() in above:
            raise InputError(f"config file {path}: base leads back to this file; remove one base of the circle")
        values = read_yaml(path)
        base = values.pop("base", None)
        if base is not None:
            if not isinstance(base, str):
                raise InputError(f"config file {path}: base takes the name of one file, got {base!r}")
            self._merge_file(path.parent / base, [*above, path.resolve()])
        self._merge(values, str(path))

    def merge_from_list(self, cfg_list: list[Any]) -> None:
        """Merges ``[key, value, key, value, ...]``. A value is an object, or a string in the syntax of Python or YAML.
        A lone ``--`` is ignored: with many commands it separates the options from the other words. Raises InputError
        for an odd number of words, a file, an unknown key, or a wrong type of value."""
        words = [word for word in cfg_list if word != "--"]
        if words and str(words[0]).endswith((".yaml", ".yml")):
            raise InputError(f"{words[0]!r} is no config key: give a file with --config-file {words[0]}")
        if dashed := [key for key in words[::2] if str(key).startswith("-")]:
            raise InputError(f"{dashed[0]} stands after KEY VALUE pairs: options with a dash come before all of them")
        if len(words) % 2:
            raise InputError(f"options come as KEY VALUE pairs, got {len(words)} words: {' '.join(map(str, words))}")
        for key, value in zip(words[::2], words[1::2], strict=True):
            self._merge({key: decoded(key, value) if isinstance(value, str) else value}, "the command line")
        self._fit_images()

    def _fit_images(self) -> None:
        """Gives a network of timm images of its own size and normalisation, where nobody gave others."""
        keys = ("data.height", "data.width", "data.norm_mean", "data.norm_std")
        fitted = defaults = {key: KEYS[key].default for key in keys}
        if self.model.name.startswith(networks.TIMM):
            size, mean, std = networks.timm_images(self.model.name.removeprefix(networks.TIMM))
            fitted = dict(zip(keys, (*size, mean, std), strict=True))
        before = self.__dict__.get("fitted", defaults)
        self.__dict__["fitted"] = fitted
        for key, value in fitted.items():
            if self.data[key.removeprefix("data.")] != before[key]:  # It was assigned.
                self._given.add(key)
            if key not in self._given:
                _set(self, key, value)

    def _merge(self, values: Mapping[str, Any], source: str) -> None:
        known = dict(flatten(self))
        try:
            pairs = list(flatten(values))
        except RecursionError as error:
            raise InputError(f"a value in {source} holds itself; write it out") from error
        for key, value in pairs:
            inside = "datasets.NAME" if key == "datasets" else next((k for k in known if k.startswith(f"{key}.")), "")
            if not inside:
                self._given.add(key)
                known[key] = _coerce(key, value, known, source)
                _set(self, key, known[key])
            elif value is not None:  # Nothing is set where all keys of a section are commented out.
                wanted = f"is a section of keys, such as {inside}"
                raise InputError(f"config key {key!r} {wanted}, got {value!r} in {source}")


def _set(node: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, Config())
    node[last] = copy.deepcopy(value)


def _coerce(key: str, value: Any, known: dict[str, Any], source: str) -> Any:
    if key.startswith("datasets."):
        options = {} if value is None else value  # all of them are commented out
        if not isinstance(options, Mapping) or any(isinstance(option, Mapping) for option in options.values()):
            takes = "takes the options of a data set, such as {folder: photos}"
            raise InputError(f"config key {key!r} {takes}, got {value!r} in {source}")
        own = {option: converted(f"{key}.{option}", given, source) for option, given in options.items()}
        return Config({**known.get(key, {}), **own})
    if key not in known:
        raise InputError(f"unknown config key {key!r} in {source}; did you mean {nearest(key, known)!r}?")
    return _options(key, value, known[key], source) if key in OPTIONS else converted(key, value, source)


def _options(key: str, value: Any, known: Config, source: str) -> Config:
    named = not key.endswith(".kwargs")
    if isinstance(value, str) and named:
        value = {"name": value} if value else None
    if value is None:
        return Config()
    if not isinstance(value, Mapping):
        takes = "a class's name, or {name: CLASS, ARGUMENT: VALUE}" if named else "{ARGUMENT: VALUE, ...}"
        raise InputError(f"config key {key!r} takes {takes}, got {value!r} in {source}")
    return Config(_added(known, with_numbers(value)))


def _added(known: Any, given: Any) -> Any:
    """The arguments of a class, with others added; so are those of a class among them. A name begins anew."""
    if not isinstance(given, Mapping) or "name" in given:
        return given
    if isinstance(known, str):  # the name of a class, without arguments
        known = {"name": known}
    before = known if isinstance(known, Mapping) else {}
    return {**before, **{key: _added(before.get(key), entry) for key, entry in given.items()}}


def flat(cfg: Config) -> dict[str, Any]:
    """A configuration as dotted keys and plain values."""
    return {key: plain(value) for key, value in flatten(cfg)}


def picked(section: Config, *names: str) -> dict[str, Any]:
    """Some values of a section by name, as arguments of the same name."""
    return {name: section[name] for name in names}


def get_default_config() -> Config:
    """A configuration with all keys (``torchreid_ext.config.keys``) at their defaults."""
    cfg = Config()
    for key, entry in KEYS.items():
        _set(cfg, key, Config() if entry.default == {} else entry.default)
    return cfg


def check(cfg: Config) -> None:
    """Raises InputError for values that are not allowed, and for values that exclude each other."""
    for key, value in flat(cfg).items():
        if key in KEYS:
            KEYS[key].check(key, value)
    _check_images(cfg)
    try:
        cfg.data.save_dir.encode()
    except UnicodeEncodeError as error:
        wrong = f"{cfg.data.save_dir!r} has bytes that are not UTF-8, which TensorBoard needs"
        raise InputError(f"data.save_dir {wrong}: choose another") from error
    if not -(2**63) <= cfg.train.seed < 2**64:
        raise InputError(f"train.seed takes a whole number of 64 bits, got {cfg.train.seed}")
    if not 0 <= cfg.data.validation < 1:
        raise InputError(f"data.validation must be at least 0 and less than 1, got {cfg.data.validation}")
    if cfg.data.type == "video":
        _check_video(cfg)
    networks.check_known(cfg.model.name)
    if not cfg.test.evaluate:
        for part, table in criteria.TABLES.items():
            if given := cfg.loss[cfg.loss.name].get(part):
                name = given if isinstance(given, str) else given.get("name")
                criteria.named(f"loss.{cfg.loss.name}.{part}", name, table)
        in_groups = cfg.sampler.train_sampler in SAMPLERS
        distributed.check_share(cfg.train.batch_size, cfg.sampler.num_instances if in_groups else 1)
        if in_groups:
            check_groups(cfg.train.batch_size, cfg.sampler.num_instances)


def _check_images(cfg: Config) -> None:
    for name in cfg.data.transforms:
        if name.lower() not in TRANSFORMS:
            raise InputError(f"data.transforms must be one of {', '.join(TRANSFORMS)}, got {name!r}")
    for key in ("norm_mean", "norm_std"):
        if len(cfg.data[key]) != 3:
            raise InputError(f"data.{key} takes a number for each of the 3 channels, got {cfg.data[key]}")
    if min(cfg.data.norm_std) <= 0:
        raise InputError(f"data.norm_std takes numbers above 0, by which pixels are divided, got {cfg.data.norm_std}")


def _check_video(cfg: Config) -> None:
    if cfg.data.k_tfm > 1:
        frames = f"whose tracklets have several frames already; got {cfg.data.k_tfm}"
        raise InputError(f"data.k_tfm must be 1 for video, {frames}")
    if own := [name for name in (*cfg.data.sources, *cfg.data.targets) if name in cfg.datasets]:
        cure = "register tracklets in a script with torchreid.data.register_video_dataset, or set data.type image"
        raise InputError(f"datasets.{own[0]} describes images, and data.type is video: {cure}")
    if cfg.train.chunk_size and cfg.train.sync_batchnorm and cfg.video.sample_method == "all":
        differ = "needs as many chunks in every process, but with video.sample_method all the numbers of images differ"
        raise InputError(f"train.sync_batchnorm {differ}; set it to False, or train.chunk_size to 0")


def run_options(cfg: Config) -> RunOptions:
    """The options of ``engine.run``. Raises InputError for a value that is not allowed."""
    values = flat(cfg)
    return RunOptions(**{entry.name: values[key] for key, entry in RunOptions.keys().items()})
