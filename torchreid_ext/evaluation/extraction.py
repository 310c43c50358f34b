"""Features extracted by several processes together, those of one process bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader

from pml_drsl.checks import InputError
from pml_drsl.evaluation.ranking import share
from torchreid_ext.checkpointing import state as states
from torchreid_ext.data.loading import rebuilt
from torchreid_ext.runtime import distributed
from torchreid_ext.runtime.signals import Interrupted


@dataclass(frozen=True)
class Samples:
    """Features, shape (N, D), identities and cameras, shape (N,), of a query set or a gallery."""

    features: Tensor
    pids: np.ndarray[Any, Any]
    camids: np.ndarray[Any, Any]


@contextmanager
def model_of_first(engine: Any, group: dist.ProcessGroup) -> Iterator[None]:
    """Within, every process has the model of the first, out of its ``DistributedDataParallel``.

    In training each process gathers its own statistics of batch normalisation; they are put back on leaving.
    """
    model = engine.model
    # The forward pass of DistributedDataParallel waits for the other processes, which may have fewer batches.
    engine.model = distributed.unwrapped(model)
    put_back = states.keep_buffers([engine.model])
    try:
        for buffer in engine.model.buffers():
            dist.broadcast(buffer, src=dist.get_global_rank(group, 0), group=group)
        yield
    finally:
        put_back()
        engine.model = model


def batches_of(loader: DataLoader[Any], group: dist.ProcessGroup) -> DataLoader[Any]:
    """A loader of this process's share of the batches of ``loader``, whole and in order.

    Frames that ``video.sample_method: random`` draws would differ from process to process: they are left to the first.

    Raises:
        InputError: for a loader that does not make batches.
    """
    if loader.batch_sampler is None:
        raise InputError("the test loader must make batches to be shared: give it a batch_size or a batch_sampler")
    batches = list(loader.batch_sampler)
    if getattr(loader.dataset, "sample_method", None) == "random":
        batches = batches if dist.get_rank(group) == 0 else []
    else:
        batches = batches[share(len(batches), group)]
    return rebuilt(loader, loader.dataset, batch_sampler=batches)


def together(extract: Callable[[], Samples | None], device: torch.device, group: dist.ProcessGroup) -> Samples:
    """What ``extract`` gives on each process (None for nothing), in order of rank; the same on every process.

    Args:
        device: that the group's backend can send from: the model's.

    Raises:
        Interrupted: if any process was asked to stop.
        InputError, RuntimeError: where ``extract`` failed on another process, by InputError or OSError or otherwise.
    """
    mine, error = None, None
    try:
        mine = extract()
    except (Exception, Interrupted) as caught:  # to be told to the others, who would wait for this process
        error = caught
    told: Any = None
    if error is not None:
        told = getattr(error, "signal", None), isinstance(error, (InputError, OSError)), str(error)
    elif mine is not None:
        told = mine.features.shape, mine.features.dtype, mine.pids, mine.camids
    reports: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, (error is not None, told), group)
    if error is not None:
        raise error
    for rank, (failed, what) in enumerate(reports):
        if failed:
            signum, is_of_input, message = what
            if signum is not None:
                raise Interrupted(signum, message)
            raise (InputError if is_of_input else RuntimeError)(f"process {rank} could not test: {message}")

    features, pids, camids = [], [], []
    for rank, (_, what) in enumerate(reports):
        if what is None:
            continue
        shape, dtype, rank_pids, rank_camids = what
        if mine is not None and rank == dist.get_rank(group):
            part = mine.features.to(device)
        else:
            part = torch.empty(shape, dtype=dtype, device=device)
        # One broadcast for each: shares differ in size, and all_gather would pad every one to the largest.
        dist.broadcast(part, src=dist.get_global_rank(group, rank), group=group)
        features.append(part.cpu())
        pids.append(rank_pids)
        camids.append(rank_camids)
    if not features:
        raise InputError("none of the processes has an image whose features it could extract")
    return Samples(torch.cat(features), np.concatenate(pids), np.concatenate(camids))
