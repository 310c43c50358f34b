"""``drsl-benchmark gpu``: tests and measures everything that needs a GPU, in less than 8 minutes.

Run it first whenever a CUDA machine is at hand. It runs the CUDA tests, trains the demo in fp16 and with the neck,
evaluates on the GPU, goes through NCCL with one process, and times the loss alone and in a step of OSNet. It writes
one Markdown table for docs/performance.md. Each part has a time limit and a process of its own, so that a part that
fails does not stop the others. The command needs a clone of the repository, installed with
pip install -e '.[reid,benchmark,test]'.

The exit status is 0 if every part passed, 1 if a part failed, and 2 if there is no CUDA device.

Examples:
  drsl-benchmark gpu --output docs/performance-gpu.md
  drsl-benchmark gpu --parts loss step
  drsl-benchmark gpu --device cpu --quick        a rehearsal on a machine without a GPU
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate
from tqdm import tqdm

from pml_drsl.benchmark.timing.gpu_parts import PARTS
from pml_drsl.benchmark.timing.gpu_row import Row
from pml_drsl.checks import InputError

MODULE = "pml_drsl.benchmark.timing.gpu_parts"
# A rehearsal may take this many times as long, because a CPU may be slow and busy.
CPU_PATIENCE = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the table here, and FILE.log beside it")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run (all)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu is for a rehearsal (cuda)")
    parser.add_argument("--quick", action="store_true", help="small sizes and short training, to see the command work")


def run(args: argparse.Namespace) -> int:
    """Runs the parts one after the other, and prints and writes the table.

    Returns:
        The exit status: 0 if every part passed, 1 if a part failed.

    Raises:
        InputError: if there is no CUDA device, ``--device cpu`` is given without ``--quick``, or the folder of
            ``--output`` does not exist.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"torch {torch.__version__} finds no CUDA device here. Run this command on a machine with an NVIDIA GPU, "
            f"or rehearse it with --device cpu --quick"
        )
    if args.device == "cpu" and not args.quick:
        raise InputError("--device cpu is only for a rehearsal in small: add --quick")
    if args.output is not None and (args.output.is_dir() or not args.output.absolute().parent.is_dir()):
        raise InputError(f"--output {args.output}: not a file in a folder that exists")
    found: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in (bar := tqdm(args.parts, desc="gpu", unit="part", file=sys.stderr)):
            bar.set_postfix_str(part)
            log = folder / f"{part}.log"
            limit = PARTS[part].seconds * (1 if args.device == "cuda" else CPU_PATIENCE)
            found[part] = run_part(part, args.device, args.quick, folder, log, limit)
            failed = not all(row.passed for row in found[part])
            if failed:
                tqdm.write(f"{part} failed; the end of its output:\n{tail(log, 20)}", file=sys.stderr)
            if args.output is not None:  # after every part, so that an interrupted command leaves a table too
                args.output.write_text(page(found, args.device, args.quick), encoding="utf-8")
                logs = (f"=== {one}\n{tail(folder / f'{one}.log')}\n" for one in found)
                args.output.with_suffix(".log").write_text("".join(logs), encoding="utf-8")
    print(page(found, args.device, args.quick))
    return 0 if all(row.passed for rows in found.values() for row in rows) else 1


def run_part(part: str, device: str, quick: bool, folder: Path, log: Path, seconds: float) -> list[Row]:
    """Runs one part in a process of its own.

    Args:
        part: a key of ``PARTS``.
        device: ``"cuda"`` or ``"cpu"``.
        quick: whether to run the part in small.
        folder: an existing folder that all parts share.
        log: the file that gets everything that the part prints.
        seconds: the time limit. The processes of a part that takes longer are killed.

    Returns:
        The rows that the part finished; after a failure one more row says what happened.
    """
    results = folder / f"{part}.jsonl"
    results.touch()
    command = [sys.executable, "-m", MODULE, part, device, str(folder), str(results), *(["--quick"] if quick else [])]
    with open(log, "wb") as output:
        # A session of its own has a process group, so that the part's own child processes can be killed too.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _kill(process)
    rows = [Row(**json.loads(line)) for line in results.read_text(encoding="utf-8").splitlines()]
    if status is None:
        rows.append(Row("time limit", f"stopped after {seconds:.0f} s", False))
    elif status != 0:
        rows.append(Row("error", f"`{tail(log, 1)[:200]}` (status {status})", False))
    elif not rows:
        rows.append(Row("error", "the part gave no result", False))
    return rows


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and, where the system can, the processes that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def tail(log: Path, lines: int | None = None) -> str:
    """The last lines of a log that are not empty; all of them for None."""
    # A progress bar rewrites its line after a carriage return.
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    kept = [line for line in text.splitlines() if line.strip()]
    return "\n".join(kept if lines is None else kept[-lines:])


def page(found: dict[str, list[Row]], device: str, quick: bool) -> str:
    """The results as Markdown: a line about the machine, a warning for a rehearsal, and one table."""
    rehearsal = []
    if device == "cpu":
        rehearsal = ["**Rehearsal on the CPU, in small: no figure below was measured on a GPU.**"]
    elif quick:
        rehearsal = ["**Quick run: sizes and training are small.**"]
    rows: list[Sequence[str]] = [
        (
            PARTS[part].title if number == 0 else "",
            row.measurement,
            row.figure,
            "passed" if row.passed else "**failed**",
        )
        for part, rows in found.items()
        for number, row in enumerate(rows)
    ]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    table = tabulate(cells, headers=("part", "measurement", "figure", "outcome"), tablefmt="github")
    return "\n\n".join([_machine(device), *rehearsal, table]) + "\n"


def _machine(device: str) -> str:
    """A sentence that says when, on which machine and on which commit the command ran."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    where = "a CPU"
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        where = (
            f"{torch.cuda.device_count()} x {gpu.name} ({gpu.total_memory / 2**30:.0f} GiB, compute capability "
            f"{gpu.major}.{gpu.minor}), CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        )
    return f"`drsl-benchmark gpu` on {today}, commit {_commit()}: {where}, torch {torch.__version__}."


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
