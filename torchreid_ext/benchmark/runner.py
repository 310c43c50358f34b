"""Makes the runs of a grid: each is a process of ``drsl-train`` with one thread, and its result is a line of JSON."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from torchreid_ext.benchmark.grid import Run, append_result, fingerprint, read_results, same

DRSL_TRAIN = (sys.executable, "-m", "torchreid_ext")
RANKS = (1, 5, 10)
STOP_SECONDS = 10.0
"""How long a process has to end after it was asked to."""


def run_all(runs: Sequence[Run], results: Path, workers: int, keep: Path | None = None) -> int:
    """Makes the runs that are not in the file of results yet, several at a time, and adds each as it ends.

    A run that fails is reported in one line, and does not stop the others.

    Args:
        runs: the runs, in the order in which they start.
        results: the file of results, a line for each run.
        workers: number of runs at the same time, at least 1.
        keep: a folder for the checkpoints and logs of the runs. By default they are in a temporary folder, which only
            stays if a run fails.

    Returns:
        The number of runs that failed.
    """
    found = read_results(results)
    there = [line["configuration"] for line in found]
    waiting = [run for run in runs if not any(same(run.configuration, configuration) for configuration in there)]
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are in {results} already", file=sys.stderr)
    if not waiting:
        return 0
    folder = keep or Path(tempfile.mkdtemp(prefix="drsl-benchmark-"))
    failed = 0
    # A log is no terminal: a line a minute is enough there.
    interval = 0.1 if sys.stderr.isatty() else 60.0
    bar = tqdm(total=len(waiting), unit="run", mininterval=interval)
    try:
        with bar, _running(waiting, workers, folder) as ended:
            for process in ended:
                if process.status == 0:
                    append_result(results, process.result())
                else:
                    failed += 1
                    tqdm.write(f"drsl-benchmark: {process.run} failed: {process.message()}", file=sys.stderr)
                bar.update()
    finally:
        if keep is None and not failed:
            shutil.rmtree(folder, ignore_errors=True)
    return failed


@dataclass
class Process:
    """A run in a process of its own.

    Attributes:
        run: what it runs.
        folder: ``data.save_dir``, with the configuration and the messages of the process beside it.
    """

    run: Run
    folder: Path
    started: float = field(default_factory=time.monotonic)
    status: int | None = None
    seconds: float = 0.0

    def start(self) -> None:
        """Starts ``drsl-train`` with one thread."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # The loss stands in a configuration file over the other: what drsl-train runs is what drsl-train can repeat.
        file = self.folder / "run.yaml"
        file.write_text(yaml.safe_dump({"base": str(self.run.config.resolve()), **self.run.snippet}, sort_keys=False))
        words = {
            # A run has one thread, which loads the images too, and there are as many runs as cores.
            "data.workers": "0",
            **self.run.changes,
            **self.run.varied,
            "data.root": str(self.run.configuration["data.root"]),
            "data.save_dir": str(self.folder),
            "train.seed": str(self.run.seed),
            "train.keep_checkpoints": "1",
            "test.queries": "True",
            "test.untrained": "False",
            "test.picture": "0",
            "test.visrank": "False",
        }
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        with open(self.folder / "errors.txt", "wb") as errors:
            self._popen = subprocess.Popen(
                [*DRSL_TRAIN, "--config-file", str(file), *(word for pair in words.items() for word in pair)],
                env=os.environ | threads,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                # Ctrl-C reaches this process alone, which then stops the runs.
                start_new_session=True,
            )
        self.started = time.monotonic()

    def poll(self) -> bool:
        """Whether the process has ended."""
        self.status = self._popen.poll()
        self.seconds = time.monotonic() - self.started
        return self.status is not None

    def stop(self, signum: int) -> None:
        """Sends a signal to the process and to its own processes."""
        if self._popen.poll() is None:
            os.killpg(self._popen.pid, signum)

    def wait(self, seconds: float) -> None:
        """Waits for the end, at most so long."""
        try:
            self._popen.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            self.stop(signal.SIGKILL)
            self._popen.wait()

    def message(self) -> str:
        """The last line that the process wrote to stderr."""
        lines = (self.folder / "errors.txt").read_text(errors="replace").strip().splitlines()
        last = lines[-1].removeprefix("drsl-train: ") if lines else f"it ended with status {self.status}"
        return f"{last} ({self.folder})"

    def result(self) -> dict[str, Any]:
        """The line of the file of results."""
        run = self.run
        metrics = json.loads((self.folder / "metrics.json").read_text())
        return {
            "config": run.config.name,
            "loss": run.loss,
            "seed": run.seed,
            "changes": dict(run.changes),
            "varied": dict(run.varied),
            "snippet": dict(run.snippet),
            "results": {target: self._scores(target, scores) for target, scores in metrics.items()},
            "seconds": round(self.seconds, 1),
            "commit": commit(),
            "torch": torch.__version__,
            "fingerprint": fingerprint(run.configuration),
            "configuration": dict(run.configuration),
        }

    def _scores(self, target: str, scores: dict[str, Any]) -> dict[str, Any]:
        with open(self.folder / f"queries_{target}.csv", newline="") as file:
            queries = list(csv.DictReader(file))
        cmc = {f"rank-{rank}": round(scores["cmc"][min(rank, len(scores["cmc"])) - 1], 5) for rank in RANKS}
        return {
            "mAP": round(scores["mAP"], 5),
            "mINP": round(scores["mINP"], 5),
            **cmc,
            "identity": [int(query["identity"]) for query in queries],
            "AP": [_short(query["AP"]) for query in queries],
            "INP": [_short(query["INP"]) for query in queries],
            "hit": [_short(query["rank-1"]) for query in queries],
        }


def _short(score: str) -> float | int | None:
    """A score with five digits; None for a query without a match."""
    value = float(score)
    if math.isnan(value):
        return None
    return int(value) if value.is_integer() else round(value, 5)


@contextmanager
def _running(runs: Sequence[Run], workers: int, folder: Path) -> Iterator[Iterator[Process]]:
    """Context: the processes of the runs, as they end; at its own end it stops those that still run."""
    running: list[Process] = []

    def ended() -> Iterator[Process]:
        waiting = [
            Process(run, folder / f"{run.config.stem}-{run.loss.replace('/', '_')}-{fingerprint(run.configuration)}")
            for run in runs
        ]
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(waiting.pop(0))
                running[-1].start()
            for process in [process for process in running if process.poll()]:
                running.remove(process)
                yield process
            time.sleep(0.1)

    # The default handler of SIGTERM would end this process alone, and the runs would go on.
    handler = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield ended()
    finally:
        for process in running:
            process.stop(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for process in running:
            process.wait(deadline - time.monotonic())
        signal.signal(signal.SIGTERM, handler)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def commit() -> str:
    """What was measured: the commit, if this package is in a clone of its repository; otherwise its version."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() if found.returncode == 0 else metadata.version("pml-drsl")
