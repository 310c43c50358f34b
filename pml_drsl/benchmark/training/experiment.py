"""What the experiments that train have in common: their arguments, their data, and the file their results go to."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pml_drsl.benchmark.training import images
from pml_drsl.benchmark.training.candidates import CANDIDATES, TRIALS
from pml_drsl.benchmark.training.images import Data
from pml_drsl.benchmark.training.results import Machine, Protocol, Results, run_all
from pml_drsl.benchmark.training.trial import PRECISIONS, Trial, make_network
from pml_drsl.checks import InputError
from pml_drsl.machine import available_cores

QUICK = ("DRSL", "MultiSimilarity", "Circle")
QUICK_SETTINGS = 2


@dataclass(frozen=True)
class Experiment:
    """Data, file and machine of an experiment.

    Attributes:
        losses: which ones.
        seeds: how often each trial on the test identities runs.
    """

    data: Data
    results: Results
    machine: Machine
    protocol: Protocol
    losses: tuple[str, ...]
    seeds: int

    def run(self, trials: list[Trial], title: str, seeds: int = 1) -> None:
        """Each trial with the seeds from 0, but for those whose results are in the file."""
        # All trials with the first seed come first: an interrupted run has something of everything.
        repeated = [trial.but(seed=seed) for seed in range(seeds) for trial in trials]
        run_all(repeated, self.data, self.results, self.machine, title)


def add_arguments(parser: argparse.ArgumentParser, losses: bool = True) -> None:
    """Those of every experiment; ``losses``: whether to ask which ones."""
    images.add_arguments(parser)
    training = parser.add_argument_group("training")
    training.add_argument("--network", default="conv4", help="conv4, or a torchreid model (%(default)s)")
    training.add_argument("--dim", type=int, default=128, help="size of conv4's embedding (%(default)s)")
    training.add_argument("--epochs", type=int, default=40, help="of every run (%(default)s)")
    training.add_argument("--seeds", type=int, default=3, help="runs of what is reported (%(default)s)")
    training.add_argument("--tuning-seeds", type=int, default=3, help="runs of the best that was tried (%(default)s)")
    training.add_argument(
        "--batch", type=int, nargs=2, metavar=("IDENTITIES", "IMAGES"), default=[16, 4], help="of a batch (16 4)"
    )
    training.add_argument("--lr", type=float, default=2e-3, help="learning rate of Adam (%(default)s)")
    training.add_argument("--mirror", action="store_true", help="mirror half of the training images")
    training.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="of the network; the loss has float32 (%(default)s)"
    )
    if losses:
        training.add_argument(
            "--losses",
            nargs="+",
            choices=list(CANDIDATES),
            metavar="LOSS",
            help=f"which of {', '.join(map(shlex.quote, CANDIDATES))} (all; with --quick {', '.join(QUICK)})",
        )
    training.add_argument(
        "--quick",
        action="store_true",
        help="2 settings, 2 epochs and 2 seeds (1 to try settings) whatever else is asked for, and 3 losses: to see it "
        "work, in less than five minutes on two cores",
    )
    running = parser.add_argument_group("running")
    running.add_argument(
        "--results",
        type=Path,
        default=Path("benchmark.jsonl"),
        help="file that results are added to, and taken from when they are there (%(default)s)",
    )
    running.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    running.add_argument("--workers", type=int, help="runs at once (one per core; one on a GPU)")
    running.add_argument("--threads", type=int, default=1, help="of each run (%(default)s)")


@contextmanager
def prepare(args: argparse.Namespace) -> Iterator[Experiment]:
    """The experiment of the arguments; its results file is this process's own until the end of the context.

    Raises:
        InputError: for arguments out of range, images that cannot be had, a results file that is none or cannot be
            written, or a network that does not exist.
    """
    for name in ("dim", "epochs", "seeds", "tuning_seeds", "threads"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}")
    identities, instances = args.batch
    if identities < 2 or instances < 2:
        raise InputError(f"--batch {identities} {instances}: a query needs a positive and a negative; give 2 or more")
    if args.workers is not None and args.workers < 1:
        raise InputError(f"--workers must be 1 or more, got {args.workers}")
    if args.device not in ("cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--device {args.device}: give cpu, or cuda where there is a CUDA device")
    if not args.results.absolute().parent.is_dir():
        raise InputError(f"--results {args.results}: its folder does not exist")
    losses = tuple(getattr(args, "losses", None) or (QUICK if args.quick else CANDIDATES))
    epochs, seeds, tuning_seeds, tried = args.epochs, args.seeds, args.tuning_seeds, TRIALS
    if args.quick:
        epochs, seeds, tuning_seeds, tried = 2, 2, 1, QUICK_SETTINGS
    data = images.load(args)
    base = Trial(
        data.name,
        "test",
        "DRSL",
        identities=identities,
        instances=instances,
        epochs=epochs,
        lr=args.lr,
        network=args.network,
        dim=args.dim,
        mirror=args.mirror,
        precision=args.precision,
    )
    machine = Machine(args.device, args.workers or (1 if args.device == "cuda" else available_cores()), args.threads)
    protocol = Protocol(base, tuning_seeds, tried)
    try:  # known before the first run, not in it
        channels, height, width = data.train.pixels.shape[1:]
        make_network(base, channels, height, width, data.train.identities)
    except KeyError as error:
        raise InputError(f"--network {args.network}: {error.args[0]}") from None
    with Results.opened(args.results) as results:
        results.agree(protocol)
        yield Experiment(data, results, machine, protocol, losses, seeds)
