"""What all experiments share: their arguments, their data sets, and the file of their results."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pml_drsl.benchmark.training import sets, sources
from pml_drsl.benchmark.training.candidates import CANDIDATES
from pml_drsl.benchmark.training.networks import PRECISIONS, STRENGTHS, Recipe, make_network
from pml_drsl.benchmark.training.protocol import on_folds
from pml_drsl.benchmark.training.results import Results
from pml_drsl.benchmark.training.runner import Machine, run_all
from pml_drsl.benchmark.training.sets import BenchmarkSet
from pml_drsl.benchmark.training.sources import Source
from pml_drsl.benchmark.training.trial import Trial
from pml_drsl.checks import InputError
from pml_drsl.machine import available_cores

QUICK = ("DRSL", "MultiSimilarity", "Circle")
RECIPE = ("network", "dim", "epochs", "lr", "precision", "augmentation", "mirror")
"""Options of the command line that are fields of ``Recipe``."""
SOURCE = ("train", "test", "sources", "targets", "size", "color", "folds")


@dataclass(frozen=True)
class Experiment:
    """Data sets, file and machine of an experiment.

    Attributes:
        losses: names of the losses.
        seeds: runs of each trial on the test identities; None for what each set says.
        quick: whether to try few settings, to see the experiment work.
    """

    sets: dict[str, BenchmarkSet]
    results: Results
    machine: Machine
    losses: tuple[str, ...]
    seeds: int | None
    quick: bool

    def seeds_of(self, name: str) -> int:
        return self.seeds or self.sets[name].seeds

    def run(self, trials: list[Trial], title: str) -> None:
        """Runs the trials that have no result in the file yet."""
        run_all(trials, self.sets, self.results, self.machine, title)

    def validate(self, trials: list[Trial], title: str) -> None:
        """Each trial on every fold of its set's training identities."""
        self.run([fold for trial in trials for fold in on_folds(trial, self.sets[trial.set].data.folds)], title)

    def run_seeds(self, trials: list[Trial], title: str) -> None:
        """Each trial with all seeds of its set. The first seed of all trials comes first: an interrupted experiment
        has something of everything."""
        most = max((self.seeds_of(trial.set) for trial in trials), default=0)
        repeated = [trial.but(seed=seed) for seed in range(most) for trial in trials if seed < self.seeds_of(trial.set)]
        self.run(repeated, title)


def add_arguments(parser: argparse.ArgumentParser, of: Sequence[str] = tuple(CANDIDATES)) -> None:
    """Arguments of every experiment; ``of``: the losses that it knows. Of a single loss there is nothing to choose."""
    parser.set_defaults(of=of)
    several = parser.add_argument_group("several data sets at once")
    several.add_argument(
        "--sets", type=Path, metavar="FILE.yaml", help="their images and recipes (see docs/benchmark.md)"
    )
    several.add_argument("--only", nargs="+", default=[], metavar="SET", help="sets of that file (all)")
    one = parser.add_argument_group("or one data set (scikit-learn's digits where none is given)")
    one.add_argument(
        "--train", type=Path, nargs="+", metavar="FOLDER", help="folders of training images: FOLDER/.../identity/*.png"
    )
    one.add_argument(
        "--test",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="folders of test images, of other identities (half of the identities of --train, drawn by the seed)",
    )
    one.add_argument("-s", "--sources", nargs="+", metavar="SET", help="torchreid data sets to train on")
    one.add_argument("-t", "--targets", metavar="SET", help="torchreid data set to test on (the first source)")
    one.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of the images (28 28)")
    one.add_argument("--color", action="store_true", default=None, help="three channels; always so with -s")
    one.add_argument("--network", help="conv4, or a torchreid model (conv4)")
    one.add_argument("--dim", type=int, help="size of conv4's embedding (128)")
    one.add_argument("--epochs", type=int, help="of every run (40)")
    one.add_argument("--batch", type=int, nargs=2, metavar=("IDENTITIES", "IMAGES"), help="of a batch (16 4)")
    one.add_argument("--lr", type=float, help="learning rate of Adam (0.002)")
    one.add_argument("--augmentation", choices=STRENGTHS, help="of training images (strong)")
    one.add_argument("--mirror", action="store_true", default=None, help="mirror half of the training images")
    one.add_argument("--precision", choices=PRECISIONS, help="of the network; the loss has float32 (float32)")
    one.add_argument("--folds", type=int, help="parts of the training identities, each held out once (2)")
    both = parser.add_argument_group("both")
    both.add_argument("--root", type=Path, default=Path("reid-data"), help="folder of the data sets (%(default)s)")
    both.add_argument("--weights", type=Path, metavar="FILE", help="starting weights of the network (random)")
    both.add_argument("--seeds", type=int, help="runs of what is reported (3, or what the file of sets says)")
    if len(of) > 1:
        both.add_argument(
            "--losses",
            nargs="+",
            choices=of,
            metavar="LOSS",
            help=f"which of {', '.join(map(shlex.quote, of))} (all; with --quick {', '.join(_quick(of))})",
        )
    both.add_argument(
        "--quick",
        action="store_true",
        help="2 settings, 2 epochs and 2 seeds whatever else is asked for, and 3 losses: to see it work, in less than "
        "five minutes on two cores",
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


def _quick(losses: Sequence[str]) -> list[str]:
    return [loss for loss in losses if loss in QUICK]


@contextmanager
def prepare(
    args: argparse.Namespace, check: Callable[[BenchmarkSet], None] = lambda of_set: None
) -> Iterator[Experiment]:
    """The experiment of the arguments; its results file is this process's own until the end of the context.

    Args:
        args: what ``add_arguments`` describes.
        check: raises InputError for a set that the experiment cannot use, before the results file is made.

    Raises:
        InputError: for arguments out of range, images that cannot be had, a results file that is none or cannot be
            written, or a network that does not exist.
    """
    for name in ("seeds", "threads", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be 1 or more, got {value}")
    if args.device not in ("cpu", "cuda") or (args.device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--device {args.device}: give cpu, or cuda where there is a CUDA device")
    if not args.results.absolute().parent.is_dir():
        raise InputError(f"--results {args.results}: its folder does not exist")
    losses = tuple(getattr(args, "losses", None) or (_quick(args.of) if args.quick else args.of))
    found = _sets(args)
    if args.quick:
        found = [dataclasses.replace(one, recipe=one.recipe.but(epochs=2, warmup=0), seeds=2) for one in found]
    for one in found:  # known before the first run, not in it
        train = one.data.split("test")[0]
        channels, height, width = train.pixels.shape[1:]
        make_network(one.recipe, (channels, height, width), train.identities, one.weights)
        check(one)
    machine = Machine(args.device, args.workers or (1 if args.device == "cuda" else available_cores()), args.threads)
    with Results.opened(args.results) as results:
        for one in found:
            results.agree(one)
        yield Experiment({one.name: one for one in found}, results, machine, losses, args.seeds, args.quick)


def _sets(args: argparse.Namespace) -> list[BenchmarkSet]:
    if args.sets is None:
        if args.only:
            raise InputError("--only needs --sets")
        return [_one_set(args)]
    for option in (*SOURCE, *RECIPE, "batch"):
        if getattr(args, option) is not None:
            raise InputError(f"--{option} describes one data set: with --sets, write it into {args.sets}")
    return sets.from_yaml(args.sets, args.root, args.weights, args.only)


def _one_set(args: argparse.Namespace) -> BenchmarkSet:
    recipe = Recipe(**{key: value for key in RECIPE if (value := getattr(args, key)) is not None})
    if args.batch:
        recipe = recipe.but(identities=args.batch[0], instances=args.batch[1])
    given = {key: getattr(args, key) for key in ("color", "folds") if getattr(args, key) is not None}
    source = Source(size=tuple(args.size or (28, 28)), seeds=args.seeds or 3, **given)
    if args.sources or args.targets:
        if args.train or args.test:
            raise InputError("give folders (--train) or torchreid's data sets (-s), not both")
        names = tuple(args.sources or [args.targets])
        source = dataclasses.replace(source, torchreid=names, target=args.targets or "")
        name = "+".join(dict.fromkeys([*names, source.target or names[0]]))
    elif args.train:
        train, test = (tuple(str(one.absolute()) for one in side or ()) for side in (args.train, args.test))
        source, name = dataclasses.replace(source, train=train, test=test), args.train[0].absolute().name
    elif args.test:
        raise InputError("--test needs --train")
    else:
        name = sources.DIGITS
    return sets.make_set(name, source, recipe, args.root, args.weights)
