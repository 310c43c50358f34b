"""One process that goes through the exchange of several: by NCCL on a GPU, and by gloo as a rehearsal of that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import DEVICES
from torch import Tensor
from torch import distributed as dist

from pml_drsl import distributed
from pml_drsl.checks import InputError
from pml_drsl.losses import DRSLoss
from pml_drsl.wrappers import DistributedLossWrapper


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[torch.device]:
    device = torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")
    backend, options = ("nccl", {"device_id": device}) if device.type == "cuda" else ("gloo", {})
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1, **options)
    yield device
    dist.destroy_process_group()


def loss_and_gradient(loss_fn: Callable[..., Tensor], x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    loss = loss_fn(x, labels)
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def test_exchanged_loss_and_gradient(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise the wrapper would leave the exchange out.
    monkeypatch.setattr(distributed, "is_single_process", lambda: False)
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(64, 32, generator=generator).to(device), torch.arange(64, device=device) // 4
    expected = loss_and_gradient(DRSLoss(), x, labels)
    for efficient in (False, True):
        wrapper: Any = DistributedLossWrapper(DRSLoss(), efficient)
        torch.testing.assert_close(loss_and_gradient(wrapper, x, labels), expected, rtol=1e-3, atol=1e-6)
        wrapper.loss.fused = False
        with pytest.raises(InputError, match="several processes can be differentiated once"):
            y = x.clone().requires_grad_()
            torch.autograd.grad(wrapper(y, labels), y, create_graph=True)
        with pytest.raises(InputError, match="ref_labels without ref_emb"):
            wrapper(x, labels, ref_labels=labels)
