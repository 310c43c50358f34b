"""Trains, saves and resumes combinations of loss, scheduler and precision, with whichever torchreid there is.

python tests/support/layouts.py FOLDER HALF

Each half, 0 or 1, holds every pair of a loss, a scheduler and a precision, and both together hold all combinations.
"""

import contextlib
import io
import itertools
import sys
from pathlib import Path

import torch
import torchreid
import trained
from killing import differing
from toy_data import register_toys

from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.cli.train import main

LOSSES, SCHEDULERS, AMPS = ("softmax", "triplet", "drsl", "pml"), ("multi_step", "none"), ("off", "bf16")
OPTIONS = trained.OPTIONS | {
    "train.batch_size": 12, "sampler.num_instances": 2, "train.stepsize": "[1]",
    # One that has weights of its own.
    "loss.pml.loss": "ArcFaceLoss",
}  # fmt: skip


def combinations(half: int) -> list[tuple[str, str, str]]:
    every = itertools.product(*(enumerate(values) for values in (LOSSES, SCHEDULERS, AMPS)))
    return [
        tuple(value for _, value in numbered) for numbered in every if sum(place for place, _ in numbered) % 2 == half
    ]


def train(folder: Path, **options) -> None:
    words = [str(word) for item in (OPTIONS | options).items() for word in item]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = main(["-s", "toy", "-t", "toy", "--root", str(folder), *words])
    assert status == 0, output.getvalue()


def check(folder: Path, loss: str, scheduler: str, amp: str) -> None:
    """Two epochs, and the second alone, resumed from the first, end with the same weights and the same rate."""
    options = {"loss.name": loss, "train.lr_scheduler": scheduler, "train.amp": amp, "train.max_epoch": 2}
    train(folder, **options, **{"data.save_dir": folder / "whole"})
    first = folder / "whole" / "model" / "model.pth.tar-1"
    train(folder, **options, **{"data.save_dir": folder / "resumed", "model.resume": first})
    one, other = (checkpoint.load(folder / run / "model" / "model.pth.tar-2") for run in ("whole", "resumed"))
    assert ("scheduler" in one) == (scheduler != "none")
    rates = [state["optimizer"]["param_groups"][0]["lr"] for state in (one, other)]
    assert rates[0] == rates[1] and (rates[0] < 3e-4) == (scheduler != "none"), rates
    before = checkpoint.load(first)["state_dict"]
    for key, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][key]), key
    assert not differing(one["training"]["losses"], other["training"]["losses"])
    assert any(not torch.equal(value, before[key]) for key, value in one["state_dict"].items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    register_toys()
    print(torchreid.models.__name__)
    for combination in combinations(int(sys.argv[2])):
        path = Path(sys.argv[1], "-".join(combination))
        path.mkdir(parents=True)
        check(path, *combination)
        print(*combination)
