"""``drsl-benchmark speed --step``: measures the share of the loss in a training step of a network."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from tqdm import tqdm

from pml_drsl.benchmark.timing import measure
from pml_drsl.benchmark.timing import table as speed_report
from pml_drsl.benchmark.timing.measure import LOSSES, PER_IDENTITY
from pml_drsl.checks import InputError

HEIGHT, WIDTH = 256, 128


@dataclass(frozen=True)
class Row:
    """One loss in the step of one network.

    Attributes:
        loss: the loss's name in ``LOSSES``.
        network: name of a torchreid network.
        size: number of images in the batch, each of 256 x 128 pixels.
        dim: number of dimensions of the network's features.
        seconds: median time of the loss, forward and backward.
        step_seconds: median time of the network, forward, backward and optimizer step.
        share: the loss's time divided by the time of loss and network together, in [0, 1], median over the rounds.
        rounds: number of measured rounds.
    """

    loss: str
    network: str
    size: int
    dim: int
    seconds: float
    step_seconds: float
    share: float
    rounds: int


def run(
    network: str,
    sizes: Sequence[int],
    losses: Sequence[str],
    seconds: float,
    threads: int,
    device: str,
    half: bool = False,
) -> list[Row]:
    """Measures, and prints a line for each loss and size.

    Args:
        network: name of a network of torchreid.
        sizes: numbers of images in a batch.
        losses: names of losses in ``LOSSES``.
        seconds: time for the rounds of each size.
        threads: number of torch's threads, for the heading.
        device: ``"cpu"`` or ``"cuda"``.
        half: run the network's forward pass under autocast in float16.

    Raises:
        ModuleNotFoundError: if torchreid is not installed.
        InputError: if torchreid has no such network.
    """
    model, optimizer = build(network, device)
    print(f"{speed_report.machine(device, threads)}\n{network}, {HEIGHT} x {WIDTH} pixels\n")
    print(f"{'':16}{'images':>8}{'loss':>12}{'network':>12}{'share of both':>15}")
    rows = []
    for size in tqdm(sizes, desc="step", unit="size"):
        images = torch.randn(size, 3, HEIGHT, WIDTH, device=device)
        forward = partial(_features, model, images, half)
        with torch.no_grad():
            features = forward()
        steps: dict[str, Callable[[], None]] = {
            name: measure.step_of(LOSSES[name](), features.detach().clone()) for name in losses
        }
        steps[network] = partial(_step, forward, optimizer, torch.randn_like(features))
        times = measure.take_turns(steps, seconds, device)
        for name in losses:
            pairs = list(zip(times[name], times[network], strict=True))
            share = median(loss / (loss + rest) for loss, rest in pairs)
            row = Row(
                name, network, size, features.shape[1], median(times[name]), median(times[network]), share, len(pairs)
            )
            tqdm.write(
                f"{name:16}{size:>8}{speed_report.time_text(row.seconds):>12}"
                f"{speed_report.time_text(row.step_seconds):>12}{share:>15.2%}"
            )
            rows.append(row)
    return rows


def build(network: str, device: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A network of torchreid that returns class scores and features, and an optimizer that barely changes its weights.

    Raises:
        ModuleNotFoundError: if torchreid is not installed.
        InputError: if torchreid has no such network.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Cython evaluation")  # It is not used here.
        models = importlib.import_module("torchreid").models  # Only this function needs torchreid.
    try:
        model = models.build_model(network, num_classes=PER_IDENTITY, loss="triplet", pretrained=False)
    except KeyError as error:
        raise InputError(f"--step {network}: not a network of torchreid ({error})") from error
    model = model.to(device).train()
    return model, torch.optim.SGD(model.parameters(), lr=1e-9)


def _features(model: torch.nn.Module, images: torch.Tensor, half: bool) -> torch.Tensor:
    """The features in float32, which the loss gets; ``half`` runs the network under autocast in float16."""
    with torch.autocast(images.device.type, torch.float16, enabled=half):
        features: torch.Tensor = model(images)[1]
    return features.float()


def _step(forward: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, gradient: torch.Tensor) -> None:
    """A network's step, given the gradient of a loss with respect to the network's features."""
    optimizer.zero_grad()
    torch.autograd.backward(forward(), gradient)
    optimizer.step()
