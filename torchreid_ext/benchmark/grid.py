"""The grid of a benchmark (configuration files x losses x seeds), and the file of results that it fills."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from pml_drsl.checks import InputError, nearest
from torchreid_ext.config.keys import KEYS
from torchreid_ext.config.node import Config, check, flat, get_default_config
from torchreid_ext.config.values import flatten, load_yaml, plain
from torchreid_ext.runtime.files import locked

Snippet = Mapping[str, Any]
"""Config keys with values, nested as in YAML, or dotted."""

SETTINGS, TUNED = "settings", "-tuned"
PLACES = ("data.root", "model.load_weights")  # A path of the same name may hold other photos or weights.
DEFAULTS = {key: plain(entry.default) for key, entry in KEYS.items()}
LOSSES = "losses.yaml"  # beside the first configuration file, unless another file is given


@dataclass(frozen=True)
class Run:
    """One training run, with a test at its end."""

    config: Path  # the configuration file
    loss: str  # its name in the file of losses
    snippet: Snippet  # the keys that this loss sets
    changes: Mapping[str, str]  # keys that the user changes in all runs, with their values as words of the command line
    varied: Mapping[str, str]  # keys that have another value for each seed, likewise
    seed: int  # train.seed
    configuration: Mapping[str, Any]  # all keys, dotted, with their values

    def __str__(self) -> str:
        return f"{self.config.name}, {self.loss}, seed {self.seed}"

    def labels(self) -> dict[str, Any]:
        """What its line of the file of results says of it, beside the scores."""
        return {**vars(self), "config": self.config.name}


def recipe(line: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of the configuration file of a result, and the keys with an effect on scores that the user changed in
    all runs, with their values: of two spellings of a number, 1e-3 and 0.001, the value is one."""
    changed = {key: line["configuration"].get(key, word) for key, word in line["changes"].items()}
    return line["config"], scored(changed)


def same(mine: Mapping[str, Any], other: Mapping[str, Any], without: Iterable[str] = ()) -> bool:
    """Whether two flat configurations are equal, but for some keys and for keys that do not change a score. A key that
    one of them lacks counts as its default: a new key makes no result stale, and a new default does. A key that is gone
    had no effect that this version knows of."""
    left, right = comparable({**DEFAULTS, **mine}), comparable({**DEFAULTS, **other})
    return all(left[key] == right[key] for key in (left.keys() & right.keys()) - {*without})


def comparable(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a flat configuration that have an effect on scores: without those of losses that are not trained."""
    trained = {configuration["loss.name"], "softmax"}  # A cross-entropy stands beside every loss.
    idle = tuple(f"loss.{name}." for name in KEYS["loss.name"].choices or () if name not in trained)
    return scored({key: value for key, value in configuration.items() if not key.startswith(idle)})


def scored(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that have an effect on scores where their loss is trained. Weights are told by the name of their
    file."""
    kept = {key: value for key, value in values.items() if key not in KEYS or KEYS[key].scores}
    if kept.get("model.load_weights"):
        kept["model.load_weights"] = Path(kept["model.load_weights"]).name
    return kept


def fingerprint(configuration: Mapping[str, Any]) -> str:
    """A short hash of the keys that have an effect on scores, and of the places of data and weights."""
    values = comparable(configuration) | {key: configuration[key] for key in PLACES}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def read_losses(path: Path, names: Sequence[str] | None) -> tuple[dict[str, Snippet], dict[str, list[Snippet]]]:
    """The losses of a YAML file with these names, in this order (None: all), and the settings that tuning tries.

    A loss is a mapping of the config keys that it sets, nested or dotted. Its entry ``settings``, which it need not
    have, is a list of such mappings that are added to it. Raises InputError for a file that is missing or holds
    something else, or for a name that is not in it.
    """
    try:
        losses = load_yaml(path.read_text(encoding="utf-8"), f"file of losses {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the losses of {path}: {error}; give --losses-file FILE") from error
    if not losses or not isinstance(losses, dict) or not all(isinstance(snippet, dict) for snippet in losses.values()):
        raise InputError(f"{path} must hold config keys for each loss, as supcon: {{loss: {{name: pml, ...}}}}")
    if wrong := [name for name in losses if not isinstance(name, str)]:
        raise InputError(f"{path}: the name {wrong[0]!r} is no text: write it in quotes")
    for name in names or ():
        check_name(f"{path} has no loss", name, losses)
    # A copy of each: an alias of YAML makes one mapping stand under several names.
    chosen: dict[str, dict[str, Any]] = {name: dict(losses[name]) for name in (names or losses)}
    settings: dict[str, list[Snippet]] = {name: snippet.pop(SETTINGS, []) for name, snippet in chosen.items()}
    for name, listed in settings.items():
        if not isinstance(listed, list) or not all(isinstance(setting, dict) for setting in listed):
            raise InputError(f"{path}: {name}.{SETTINGS} must be a list of config keys with values, got {listed!r}")
    return {**chosen}, settings


def check_name(fault: str, name: str, known: Collection[str]) -> None:
    """Raises InputError, which begins with the fault, for the name of a loss that is not known."""
    if name not in known:
        there = ", ".join(sorted(known))
        raise InputError(f"{fault} {name!r}; did you mean {nearest(name, known)!r}? There are: {there}")


def added(loss: str, snippet: Snippet, setting: Snippet) -> dict[str, Any]:
    """The keys of a loss and of a setting that is added to it, dotted. As in a configuration, arguments are added to
    the arguments of a class, and a value that names a class replaces them. Raises InputError for a wrong key."""
    cfg = get_default_config()
    for each in (snippet, setting):
        _merge(cfg, loss, each)
    keys, values = [key for each in (snippet, setting) for key, _ in flatten(each)], flat(cfg)
    return {key: values[key] for key in keys if key in values}


def _merge(cfg: Config, loss: str, snippet: Snippet) -> None:
    try:
        cfg.merge_from_list([word for pair in snippet.items() for word in pair])
    except InputError as error:
        raise InputError(f"loss {loss}: {error}") from error


def _check_used(loss: str, snippet: Snippet, configuration: Mapping[str, Any]) -> None:
    """Raises InputError if a loss sets a key of another loss than that which is trained, and would be it in name
    only."""
    if idle := {key for key, _ in flatten(snippet) if key.startswith("loss.")} - comparable(configuration).keys():
        given, name = f"loss {loss} sets {min(idle)}", min(idle).split(".")[1]
        without = f"has no effect with loss.name {configuration['loss.name']!r}"
        raise InputError(f"{given}, which {without}: give it loss.name {name}, and leave loss.name out of the command")


def plan(
    files: Sequence[Path], losses: Mapping[str, Snippet], seeds: Sequence[int], words: Sequence[str] = (),
    varied: Sequence[Sequence[str]] = (), root: str | None = None,
) -> list[Run]:  # fmt: skip
    """All runs of a grid, seed by seed, so that a grid that is stopped early has whole seeds. All of them are checked.
    Raises InputError for a file, a key or a value that is wrong, or a key with more or fewer values than seeds.

    The keys of a loss override those of a file. The KEY VALUE pairs of ``words`` override both, and so do lists in
    ``varied`` of a key and a value of it for each seed. ``root`` is ``data.root``, if it is not that of the files.
    """
    if len(words) % 2:
        raise InputError(f"options come as KEY VALUE pairs, got {len(words)} words: {' '.join(words)}")
    for key, *values in varied:
        if len(values) != len(seeds):
            counts = f"{len(values)} values for {len(seeds)} seeds: {' '.join(values)}"
            raise InputError(f"--vary {key} has {counts}. Give one for each seed, and other options after them")
    fixed = dict(zip(words[::2], words[1::2], strict=True))
    if "train.seed" in {*fixed, *(key for key, *_ in varied)}:
        raise InputError("train.seed is set by --seeds N, to 0 to N - 1: leave it out")
    if len({file.name for file in files}) < len(files):
        names = ", ".join(map(str, files))
        raise InputError(f"two of {names} have the same name, by which the report tells files apart: rename one")
    runs, place = [], {"data.root": root} if root else {}
    for number, seed in enumerate(seeds):
        of_seed = {key: values[number] for key, *values in varied}
        for file in files:
            for loss, snippet in losses.items():
                cfg = get_default_config()
                cfg.merge_from_file(file)
                _merge(cfg, loss, snippet)
                given = place | fixed | of_seed | {"train.seed": str(seed)}
                cfg.merge_from_list([word for pair in given.items() for word in pair])
                check(cfg)
                if cfg.test.rerank:
                    raise InputError("test.rerank re-ranks in a test alone, and these runs train: leave it out")
                if not cfg.train.max_epoch:
                    cure = "give 1 or more; drsl-train tests model.load_weights FILE with test.evaluate True"
                    raise InputError(f"loss {loss}: train.max_epoch 0 trains nothing, so nothing is tested: {cure}")
                _check_used(loss, snippet, flat(cfg))
                runs.append(Run(file, loss, snippet, fixed, of_seed, seed, flat(cfg)))
    return runs


def commit() -> str:
    """What is measured: the commit, if this package is in a clone of its repository; otherwise its version."""
    here = Path(__file__)

    def git(*words: str) -> str:
        return subprocess.check_output(["git", *words], cwd=here.parent, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # The package may be installed inside another repository.
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude", "*")
    except (OSError, subprocess.CalledProcessError):
        return metadata.version("pml-drsl")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results of a file, which may be a .gz file, one for each line; an empty list for a file that is not there.
    Raises InputError for a line that is not a result, or a .gz file that is damaged. A last line that is cut off is
    left out with a warning."""
    if not path.exists():
        return []
    results: list[dict[str, Any]] = []
    content = path.read_bytes()
    try:
        lines = (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is cut off or damaged: {error}; copy it again") from error
    for number, line in enumerate(lines, 1):
        result = None
        with suppress(ValueError):  # Also for bytes that are not UTF-8.
            result = json.loads(line)
        if isinstance(result, dict) and "configuration" in result and "results" in result:
            results.append(result)
        elif result is None and number == len(lines) and line.startswith(b"{"):
            warnings.warn(f"{path}: the last line is cut off and left out", stacklevel=2)
        else:
            raise InputError(f"{path}, line {number}: this is not a result of drsl-benchmark; remove the line")
    return results


@contextmanager
def appending(path: Path) -> Iterator[IO[bytes]]:
    """Context: a file of results, open and locked, because several processes may append to it. It is created if it is
    not there. Raises InputError for a file that is compressed, and OSError for a file that cannot be written."""
    if path.suffix == ".gz":
        raise InputError(f"{path}: results are added to a file that is not compressed; unpack it with gunzip")
    with locked(path), open(path, "a+b") as file:
        yield file


def append_result(path: Path, result: Mapping[str, Any]) -> None:
    """Appends one line. A line that was cut off is removed first. Raises the errors of ``appending``."""
    with appending(path) as file:
        file.seek(0)
        content = file.read()
        start = content.rfind(b"\n") + 1
        try:
            json.loads(content[start:])
        except ValueError:
            file.truncate(start)
        else:
            file.write(b"\n")  # An editor may have removed the newline after the last result.
        file.write((json.dumps(result, separators=(",", ":")) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
