"""Kills a training run with SIGKILL again and again, resumes it each time, and compares what it ends with.

    python tests/support/killing.py FOLDER --kills 100

One process imports everything; the runs are its children, so that each starts at once.
"""

import argparse
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from toy_data import register_toys
from trained import OPTIONS

from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.cli.train import main

EPOCHS = 4
# The child's fsync takes this long more, so that a part of the kills falls inside a save.
SLOW_SAVE = 0.1


def train(folder: Path, save_dir: Path) -> int:
    """A child's whole life: the command line, to its end or until it is killed."""
    fsync = os.fsync
    os.fsync = lambda handle: (time.sleep(SLOW_SAVE), fsync(handle))
    options = OPTIONS | {
        "model.resume": "auto", "data.workers": 1, "data.save_dir": save_dir, "train.max_epoch": EPOCHS,
        "train.lr_scheduler": "cosine", "test.eval_freq": 2,
    }  # fmt: skip
    words = [word for item in options.items() for word in map(str, item)]
    transforms = ["random_flip", "random_crop", "random_patch", "color_jitter", "random_erase"]
    return main(["-s", "toy", "-t", "toy", "--transforms", *transforms, "--root", str(folder), *words])


def start(folder: Path, save_dir: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with open(folder / "output.txt", "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = train(folder, save_dir)
            sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def finish(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"a run ended with status {status}")


def run_with_kills(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Trains once without a kill and once with many; returns how many fell where, and how many tensors differ."""
    rng = random.Random(seed)
    started = time.monotonic()
    finish(start(folder, folder / "whole"))
    # A run is killed on average every second epoch or so, and in the end it gets somewhere.
    span = (time.monotonic() - started) / 2
    counts = {"kills": 0, "inside a save": 0, "runs that ended first": 0}
    while counts["kills"] < kills:
        child = start(folder, folder / "killed")
        deadline = time.monotonic() + rng.uniform(0, span)
        saving = rng.random() < 0.4
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            inside = next((folder / "killed").glob("model/.*.tmp"), None) is not None
            if (inside and saving) or time.monotonic() > deadline + saving * span:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                counts["kills"] += 1
                counts["inside a save"] += inside
                for left in (folder / "killed").glob("model/.*.tmp"):
                    left.unlink()  # A later run does so after a day; until then it would look like a save.
                break
            time.sleep(0.001)
        else:
            counts["runs that ended first"] += 1
            # Nothing is left to kill: once more from the start, over the same folder.
            for path in (folder / "killed" / "model").iterdir():
                path.unlink()
    finish(start(folder, folder / "killed"))
    counts["tensors that differ"] = 0
    names = [sorted(path.name for path in (folder / run / "model").iterdir()) for run in ("whole", "killed")]
    assert names[0] == names[1], names
    for name in names[0]:
        whole, killed = (checkpoint.load(folder / run / "model" / name) for run in ("whole", "killed"))
        counts["tensors that differ"] += differing(whole, killed)
    return counts


def differing(one: object, other: object) -> int:
    """How many tensors and numbers of two states differ, in a bit."""
    if isinstance(one, torch.Tensor):
        return 1 - torch.equal(one, other)
    if isinstance(one, dict):
        one.pop("config", None), other.pop("config", None)
        assert one.keys() == other.keys()
        return sum(differing(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        return sum(map(differing, one, other))
    return int(one != other)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    register_toys()
    counts = run_with_kills(args.folder, args.kills, args.seed)
    print(", ".join(f"{name}: {number}" for name, number in counts.items()))
    sys.exit(counts["tensors that differ"] > 0)
