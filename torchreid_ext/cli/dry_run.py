"""Shows what a configuration would train on and how long it would take, without training."""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from torchreid_ext.config import Config, prepare, run_options
from torchreid_ext.data.samplers import steps_per_epoch

COLUMNS, STEPS = 8, 3


class _EnoughError(Exception):
    """As many steps as a dry run takes."""


def dry_run(cfg: Config) -> None:
    """Prints the data sets and the size of the network, draws a batch and estimates the time of an epoch.

    torchreid prints the data sets. The batch is written to ``batch.png`` in ``data.save_dir``; nothing else is kept.

    Raises:
        InputError: for whatever a run would refuse.
    """
    engine = prepare(cfg)
    steps = steps_per_epoch(engine.datamanager)
    batches, times = _try(cfg, engine, min(STEPS, steps))
    path = Path(cfg.data.save_dir, "batch.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    images = engine.training_batch(batches[0]).images.reshape(-1, 3, cfg.data.height, cfg.data.width)
    contact_sheet(images, cfg.data.norm_mean, cfg.data.norm_std).save(path)
    print(f"A batch of {len(images)} images, as the network gets them, is drawn in {path}")
    # The first steps are slower than the others.
    seconds = steps * times[-1]
    print(
        f"An epoch of {steps} steps takes about {seconds:.0f} s; {cfg.train.max_epoch} epochs, without tests, about "
        f"{cfg.train.max_epoch * seconds / 60:.0f} min"
    )


def _try(cfg: Config, engine: Any, steps: int) -> tuple[list[Any], list[float]]:
    """The first batches, and the seconds of a step on each of them with its wait for the batch."""
    batches: list[Any] = []
    moments = [time.perf_counter()]
    step = engine.forward_backward

    def watched(batch: Any) -> Any:
        batches.append(batch)
        # The values to log are numbers, so that a GPU has finished the step.
        summary = step(batch)
        moments.append(time.perf_counter())
        if len(batches) == steps:
            raise _EnoughError
        return summary

    engine.forward_backward = watched
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(_EnoughError),
    ):
        engine.run(**run_options(cfg).arguments() | {"save_dir": folder, "start_epoch": 0, "max_epoch": 1})
    return batches, [end - start for start, end in itertools.pairwise(moments)]


def contact_sheet(images: Tensor, mean: list[float], std: list[float]) -> Image.Image:
    """The images of a batch in rows of 8, with normalisation undone.

    Args:
        images: [N, 3, height, width] normalised images.
        mean: of each channel.
        std: of each channel.
    """
    colours = images.cpu() * images.new_tensor(std, device="cpu").view(3, 1, 1)
    colours += images.new_tensor(mean, device="cpu").view(3, 1, 1)
    pixels = (colours.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    height, width = pixels.shape[1:3]
    sheet = Image.new("RGB", (min(len(pixels), COLUMNS) * width, -(-len(pixels) // COLUMNS) * height))
    for number, image in enumerate(pixels):
        sheet.paste(Image.fromarray(image), (number % COLUMNS * width, number // COLUMNS * height))
    return sheet
