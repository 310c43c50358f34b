"""Extracts the features of a test set, in one process or divided among several, with the same result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from pml_drsl.checks import InputError
from pml_drsl.evaluation.ranking import share
from torchreid_ext.checkpoint import states
from torchreid_ext.data.loading import rebuilt
from torchreid_ext.runtime import distributed
from torchreid_ext.runtime.signals import Interrupted


@dataclass(frozen=True)
class Samples:
    """A query set or a gallery: features of shape (N, D), identities and cameras of shape (N,)."""

    features: Tensor
    pids: np.ndarray[Any, Any]
    camids: np.ndarray[Any, Any]

    def at(self, indices: np.ndarray[Any, Any]) -> Samples:
        return Samples(self.features[indices], self.pids[indices], self.camids[indices])


def extract(engine: Any, loader: Any, group: dist.ProcessGroup | None = None) -> Samples:
    """Extracts the features, on the CPU, of all images of a loader with the model of the engine.

    Each process of a ``group`` extracts its share and gets all features, which are equal, bit for bit, to those that
    one process extracts with the same number of threads. Raises Interrupted if a signal asks the run to stop,
    InputError if the loader of a group does not make batches, and as ``gather_samples`` on every process if one of them
    fails."""
    if group is None:
        return _extract(engine, loader)
    if loader.batch_sampler is None:
        raise InputError("the test loader must make batches, to be shared: give it a batch_size or a batch_sampler")
    batches = list(loader.batch_sampler)
    batches = batches[share(len(batches), group)]
    shard = rebuilt(loader, loader.dataset, batch_sampler=batches)
    device, model = next(engine.model.parameters()).device, engine.model
    # The forward pass of DistributedDataParallel waits for the other processes, which may have fewer batches.
    engine.model = distributed.unwrapped(model)
    # Each process has its own statistics of batch normalisation. The test uses those of the first one.
    restore_buffers = states.keep_buffers([engine.model])
    try:
        for buffer in engine.model.buffers():
            dist.broadcast(buffer, src=dist.get_global_rank(group, 0), group=group)
        # A test set has images, and so one of the processes has samples.
        return cast(Samples, gather_samples(lambda: _extract(engine, shard) if batches else None, device, group))
    except Interrupted as stop:  # perhaps only another process received the signal
        engine.stop.signum = stop.signal
        raise
    finally:
        restore_buffers()
        engine.model = model


@torch.no_grad()
def _extract(engine: Any, loader: Any) -> Samples:
    device = next(engine.model.parameters()).device
    parts = []
    # The first process shows the bar, and disable=None only on a terminal.
    disable = None if distributed.is_first() else True
    for data in tqdm(loader, desc="features", leave=False, disable=disable):
        images, pids, camids = engine.parse_data_for_eval(data)
        features = engine.extract_features(images.to(device)).cpu()
        parts.append(Samples(features, np.asarray(pids), np.asarray(camids)))
        engine.stop.check()
    return _joined(parts)


def _joined(parts: list[Samples]) -> Samples:
    pids, camids = (np.concatenate([getattr(part, name) for part in parts]) for name in ("pids", "camids"))
    return Samples(torch.cat([part.features for part in parts]), pids, camids)


def gather_samples(
    extract: Callable[[], Samples | None], device: torch.device, group: dist.ProcessGroup
) -> Samples | None:
    """Calls ``extract`` on each process, and returns the samples of all processes, in the order of their ranks.

    ``extract`` returns None on a process without an image, and so does this function if no process has one. ``group``
    can send from ``device``, that of the model. Raises Interrupted if any process received a signal to stop, InputError
    if ``extract`` raised an InputError or an OSError on another process, and RuntimeError if it raised any other error
    there."""
    own: Samples | None = None
    failed: BaseException | None = None
    failure: tuple[Any, ...] | None = None
    try:
        own = extract()
    except (Exception, Interrupted) as error:  # the other processes must be told, because they would wait
        kind = InputError if isinstance(error, (InputError, OSError)) else RuntimeError
        failed, failure = error, (kind, f"process {dist.get_rank(group)} could not test: {error}")
        if isinstance(error, Interrupted):
            failure = Interrupted, error.signal
    about = None if own is None else (own.features.shape, own.features.dtype, own.pids, own.camids)
    reports: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, (failure, about), group)
    if failed is not None:
        raise failed
    parts = []
    if failures := [other for other, _ in reports if other is not None]:
        raise failures[0][0](*failures[0][1:])
    for rank, (_, about) in enumerate(reports):
        if about is None:
            continue
        shape, dtype, pids, camids = about
        mine = own if rank == dist.get_rank(group) else None
        features = torch.empty(shape, dtype=dtype, device=device) if mine is None else mine.features.to(device)
        # Shares differ in size, and all_gather would pad every share to the largest. So there is a broadcast for each.
        dist.broadcast(features, src=dist.get_global_rank(group, rank), group=group)
        parts.append(Samples(features.cpu(), pids, camids))
    return _joined(parts) if parts else None
