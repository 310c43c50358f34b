"""Makes the runs of a grid, each a process of ``drsl-train`` whose result is a line of JSON, and tunes losses."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from tqdm import tqdm

from pml_drsl.checks import InputError
from pml_drsl.console import write_text
from torchreid_ext.benchmark.grid import (
    PLACES,
    TUNED,
    Run,
    Snippet,
    added,
    append_result,
    appending,
    commit,
    fingerprint,
    plan,
    read_results,
    recipe,
    same,
)
from torchreid_ext.checkpoint.folder import History
from torchreid_ext.config.values import dumped, flatten
from torchreid_ext.runtime.signals import StopRequest

DRSL_TRAIN = (sys.executable, "-m", "torchreid_ext")
STOP_SECONDS = 10.0  # how long a process has to end after it was asked to
WEIGHTS = (0.1, 0.3, 1.0, 3.0)
WEIGHT_KEYS = {"triplet": "loss.triplet.weight_t", "drsl": "loss.drsl.weight_m", "pml": "loss.pml.weight_m"}
"""The key with the weight of each ``loss.name``, beside a cross-entropy of weight 1. ``softmax`` has none."""


def run_all(runs: Sequence[Run], results: Path, workers: int, keep: Path | None = None) -> int:
    """Makes the runs that are not in the file of results yet, several at a time, and adds each as it ends.

    Returns the number of runs that failed. A failure is reported in one line, and does not stop the other runs. SIGTERM
    and SIGHUP stop them, as Ctrl-C does. Checkpoints and logs are in the folder ``keep``, or in a temporary folder,
    which only stays if a run fails, or if an error ends this function. Raises InputError or OSError, before the first
    run, for a file to which no result can be added, or that has results on data or weights of other places.
    """
    waiting = _missing(runs, results)
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are in {results} already", file=sys.stderr)
    if not waiting:
        return 0
    with appending(results):
        pass  # A file that takes no results is refused before a run is made in vain.
    folder = keep or Path(tempfile.mkdtemp(prefix="drsl-benchmark-"))
    running: list[Process] = []
    failed = 0
    try:
        # A log is no terminal: a line a minute is enough there.
        seconds = 0.1 if sys.stderr.isatty() else 60
        stop = StopRequest("stopping; the same command goes on")  # While a run starts, an exception would lose it.
        with stop, tqdm(total=len(waiting), unit="run", mininterval=seconds) as bar:
            while (waiting or running) and stop.signum is None:
                while waiting and len(running) < workers:
                    running.append(Process(waiting.pop(0), folder))
                for process in [process for process in running if process.poll() is not None]:
                    running.remove(process)
                    if process.returncode == 0:
                        append_result(results, process.result())
                    else:
                        failed += 1
                        tqdm.write(f"drsl-benchmark: {process.run} failed: {process.message()}", file=sys.stderr)
                    bar.update()
                time.sleep(0.1)
        stop.check()
    except Exception:
        # The disk may be full: the scores of a run that ended are still in its folder.
        keep = folder
        print(f"drsl-benchmark: the runs that ended are kept in {folder}", file=sys.stderr)
        raise
    finally:
        for process in running:
            process.terminate()
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            process.kill()
            process.wait()
        if keep is None and not failed:
            shutil.rmtree(folder, ignore_errors=True)
    return failed


def _missing(runs: Sequence[Run], results: Path) -> list[Run]:
    """The runs whose configurations are not in the file of results. The report goes by labels, such as the name of the
    loss, and by the last result that has them: of a run that is there under other labels, or before another run of its
    labels, the result is added once more, with the run's own. Raises InputError for a run that is there with other
    words for the place of its data or weights."""
    missing, there = list[Run](), read_results(results)
    for run in runs:
        own, labels = [line for line in there if same(run.configuration, line["configuration"])], run.labels()
        for line, key in product(own, PLACES):
            ours, theirs = (values.get(key) for values in (run.configuration, line["configuration"]))
            if ours != theirs:
                other = f"{run} is in {results} with {key} {theirs!r}, and not {ours!r}"
                raise InputError(f"{other}: give the same, or another file to --results")
        alike = [line for line in there if line["seed"] == run.seed and _labels(line) == _labels(labels)]
        if not own:
            missing.append(run)
        elif not alike or alike[-1] not in own:
            append_result(results, own[-1] | labels)
    return missing


def _labels(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return line["loss"], recipe(line), {*line.get("varied", ())}  # The values of varied keys are in the configuration.


class Process(subprocess.Popen[bytes]):
    """A run in a process of ``drsl-train`` with one thread, which starts at once. Its ``data.save_dir`` is a folder in
    the given folder."""

    def __init__(self, run: Run, folder: Path) -> None:
        loss = re.sub(r'[<>:"/\\|?*]', "_", run.loss)  # characters that a file of Windows may not have
        name = f"{run.config.stem}-{loss}-{fingerprint(run.configuration)}"
        self.run, self.folder = run, folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        # Of this run: the code may change while the grid runs, or before a stopped run goes on.
        with open(self.folder / "commits.txt", "a" if History(self.folder / "model").candidates() else "w") as commits:
            commits.write(f"{commit()}\n")
        # All keys, because the user may edit the files of the grid before this run of it starts.
        file = self.folder / "run.yaml"
        file.write_text(dumped(run.configuration))
        words = {
            # A run has one thread, which loads the images too, and there are as many runs as cores.
            "data.workers": "0",
            **run.changes,
            **run.varied,
            "data.root": str(run.configuration["data.root"]),
            "data.save_dir": str(self.folder),
            "train.seed": str(run.seed),
            "model.resume": "auto",  # where --keep has kept the run when it was stopped
            "train.keep_checkpoints": "1",
            "test.queries": "True",
            "test.untrained": "False",
            "test.picture": "0",
            "test.visrank": "False",
        }
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        with open(self.folder / "errors.txt", "wb") as errors:
            command = [*DRSL_TRAIN, "--config-file", str(file), *(word for pair in words.items() for word in pair)]
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": errors}
            # Ctrl-C reaches the benchmark alone, in a session of its own, which then stops the runs.
            super().__init__(command, env=os.environ | threads, start_new_session=True, **streams)

    def message(self) -> str:
        """The last line that the process wrote to stderr, or the signal that ended it."""
        lines = (self.folder / "errors.txt").read_text(errors="replace").strip().splitlines()
        last = lines[-1].removeprefix("drsl-train: ") if lines else f"it ended with status {self.returncode}"
        if self.returncode < 0:  # Its last line may be a warning, which is not the reason.
            full = "; the system does this where memory is full, of which fewer --workers need less"
            last = f"signal {-self.returncode} ended it{full * (self.returncode == -9)}"
        return f"{last} ({self.folder})"

    def result(self) -> dict[str, Any]:
        """The line of the file of results."""
        metrics = json.loads((self.folder / "metrics.json").read_text())
        return {
            **self.run.labels(),
            "results": {target: self._scores(target, scores) for target, scores in metrics.items()},
            "commit": "+".join(dict.fromkeys((self.folder / "commits.txt").read_text().splitlines())),
            "torch": metadata.version("torch"),
        }

    def _scores(self, target: str, scores: dict[str, Any]) -> dict[str, Any]:
        with open(self.folder / f"queries_{target}.csv", newline="") as file:
            queries = list(csv.DictReader(file))
        return {
            **{score: round(scores[score], 5) for score in ("mAP", "mINP")},
            "rank-1": round(scores["cmc"][0], 5),
            "identity": [int(query["identity"]) for query in queries],
            "AP": [_short(query["AP"]) for query in queries],
            "hit": [_short(query["rank-1"]) for query in queries],
        }


def _short(score: str) -> float | int | None:
    """A score with five digits; None for a query without a match."""
    value = float(score)
    if math.isnan(value):
        return None
    return int(value) if value.is_integer() else round(value, 5)


def tune(
    losses: Mapping[str, Snippet], settings: Mapping[str, Sequence[Snippet]], grid: Mapping[str, Any],
    results: Path, workers: int,
) -> tuple[dict[str, dict[str, Any]], dict[str, float], int]:  # fmt: skip
    """First tries the weights of each loss beside cross-entropy, then its settings with the best of these weights.

    Returns the best keys of each loss, the mean mAP of each trial over seeds and targets, and the number of failures.
    Raises InputError if the configuration tests on test identities, or every trial of a loss fails.

    Args:
        losses, settings: the keys that each loss sets, by its name, and further keys to try, by the name of the loss.
        grid: the other arguments of ``plan``, of which ``files`` holds one file.
        results, workers: as for ``run_all``; a trial that is in the file is not made again.
    """
    given = [*grid.get("words", ())[::2], *(key for key, *_ in grid.get("varied", ()))]
    given = [key for key, _ in flatten(dict.fromkeys(given))]  # loss.pml.kwargs.margin is an entry of loss.pml.kwargs
    trials: dict[str, Snippet] = {}
    names: dict[str, list[str]] = {}  # of the trials of each loss
    for loss, snippet in losses.items():
        (run,) = plan(**{**grid, "losses": {loss: snippet}, "seeds": grid["seeds"][:1], "varied": ()})
        if not run.configuration["data.validation"]:
            raise InputError("settings are chosen on validation identities: add data.validation 0.2 to the command")
        key = WEIGHT_KEYS.get(run.configuration["loss.name"])
        tried = {key, *(name for setting in settings.get(loss, ()) for name, _ in flatten(setting))}
        if again := [name for name in given if name in tried]:
            raise InputError(f"tune tries values of {again[0]} itself: leave it out of the command")
        own = {f"{loss}*{weight:g}": {**snippet, key: weight} for weight in WEIGHTS} if key else {loss: snippet}
        trials, names[loss] = trials | own, [*own]
    scores, failed = _try_all(trials, grid, results, workers)
    second: dict[str, Snippet] = {}
    for loss in losses:
        name = _best(loss, names[loss], scores)
        for number, setting in enumerate(settings.get(loss, ()), 1):
            names[loss].append(trial := f"{name}+{number}")
            second[trial] = added(trial, trials[name], setting)
    of_second, failed_too = _try_all(second, grid, results, workers)
    trials, scores = trials | second, scores | of_second
    best = {loss: dict(trials[_best(loss, names[loss], scores)]) for loss in losses}
    return best, scores, failed + failed_too


def _try_all(
    trials: Mapping[str, Snippet], grid: Mapping[str, Any], results: Path, workers: int
) -> tuple[dict[str, float], int]:
    """The mean mAP of each trial all of whose runs ended, and the number of runs that failed."""
    runs = plan(**grid, losses=trials)
    failed = run_all(runs, results, workers)
    lines = read_results(results)
    scores: dict[str, list[float]] = {}
    for run in runs:
        own = (line["results"] for line in reversed(lines) if same(run.configuration, line["configuration"]))
        if newest := next(own, None):
            scores.setdefault(run.loss, []).append(mean(of_target["mAP"] for of_target in newest.values()))
    return {name: mean(each) for name, each in scores.items() if len(each) == len(grid["seeds"])}, failed


def _best(loss: str, names: Sequence[str], scores: Mapping[str, float]) -> str:
    """The name with the best score of the trials of a loss; those that failed have none."""
    ended = [name for name in names if name in scores]
    if not ended:
        raise InputError(f"every trial of {loss} failed; the lines above say why")
    return max(ended, key=scores.__getitem__)


def write_tuned(path: Path, best: Mapping[str, Mapping[str, Any]], scores: Mapping[str, float]) -> None:
    """Writes the best settings as a file of losses, each as NAME-tuned, with the validation mAP of every trial."""
    head = "".join(f"#   {name}: {100 * score:.1f}\n" for name, score in scores.items())
    text = dumped({f"{loss}{TUNED}": dict(snippet) for loss, snippet in best.items()})
    write_text(str(path), f"# Chosen by drsl-benchmark tune. mAP on validation identities, in percent:\n{head}{text}")
