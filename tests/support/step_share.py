"""Prints the share of a training step spent outside the network: loading, transfer, loss and logging.

    python tests/support/step_share.py

OSNet x0.25 with DRSL at batch 64, 256 x 128 pixels, on the CPU. The network's part is its forward pass, its backward
pass from the moment the loss's gradient reaches its outputs, and the optimizer's step.
"""

import sys
import tempfile
import time

import torch

from torchreid_ext.cli.train import main
from torchreid_ext.engine import base
from torchreid_ext.engine.step import Stepper

OPTIONS = {
    "use_gpu": False, "model.name": "osnet_x0_25", "model.pretrained": False, "data.workers": 1, "loss.name": "drsl",
    "sampler.train_sampler": "RandomIdentitySampler", "train.batch_size": 64, "train.max_epoch": 2,
}  # fmt: skip


class Clock(Stepper):
    network = reached = 0.0

    def forward(self, model, images):
        started = time.perf_counter()
        logits, features = super().forward(model, images)
        Clock.network += time.perf_counter() - started
        return _Passage.apply(logits, features)

    def step(self, loss, optimizers):
        super().step(loss, optimizers)
        Clock.network += time.perf_counter() - Clock.reached


class _Passage(torch.autograd.Function):
    """Notes when the gradient comes by."""

    @staticmethod
    def forward(ctx, *outputs):
        return tuple(output.view_as(output) for output in outputs)

    @staticmethod
    def backward(ctx, *gradients):
        Clock.reached = time.perf_counter()
        return gradients


if __name__ == "__main__":
    train = base.BaseEngine.train

    def timed(self, **kwargs):
        # The first epoch starts the workers and decodes every image once more, to check it; the last counts.
        Clock.network, started = 0.0, time.perf_counter()
        train(self, **kwargs)
        whole = time.perf_counter() - started
        print(f"{1 - Clock.network / whole:.1%} of a step of {whole / self.num_batches:.2f} s is outside the network")

    base.BaseEngine.train = timed
    base.Stepper = Clock
    with tempfile.TemporaryDirectory() as folder:
        words = [str(word) for item in (OPTIONS | {"data.save_dir": folder}).items() for word in item]
        sources = ["-s", "synthetic_pedestrians", "-t", "synthetic_pedestrians"]
        sys.exit(main([*sources, "--root", folder, *words]))
