"""Extracts the features of a test set, in one process or divided among several, with the same result."""

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


def extract(engine: Any, loader: Any, group: dist.ProcessGroup | None = None) -> Samples:
    """Extracts the features of all images of a loader with the model of the engine. The features are on the CPU.

    With a ``group``, each process of the group extracts its share, and every process gets all features. They are equal,
    bit for bit, to the features that one process extracts with the same number of threads.

    Raises:
        Interrupted: if a signal asks the run to stop.
        InputError, RuntimeError: on every process of a group, if one of them fails.
    """
    if group is None:
        return _extract(engine, loader)
    shard = shard_of_loader(loader, group)
    device = next(engine.model.parameters()).device
    try:
        with first_process_model(engine, group):
            return gather_samples(lambda: _extract(engine, shard) if len(shard) else None, device, group)
    except Interrupted as stop:  # perhaps only another process received the signal
        engine.stop.signum = stop.signal
        raise


@torch.no_grad()
def _extract(engine: Any, loader: Any) -> Samples:
    device = next(engine.model.parameters()).device
    parts = []
    # disable=None shows the bar only on a terminal.
    for data in tqdm(loader, desc="features", leave=False, disable=None):
        images, pids, camids = engine.parse_data_for_eval(data)
        features = engine.extract_features(images.to(device)).cpu()
        parts.append(Samples(features, np.asarray(pids), np.asarray(camids)))
        engine.stop.check()
    return _joined(parts)


def _joined(parts: list[Samples]) -> Samples:
    pids, camids = (np.concatenate([getattr(part, name) for part in parts]) for name in ("pids", "camids"))
    return Samples(torch.cat([part.features for part in parts]), pids, camids)


@contextmanager
def first_process_model(engine: Any, group: dist.ProcessGroup) -> Iterator[None]:
    """Context: every process uses the model of the first process, without its ``DistributedDataParallel``.

    The models differ in their buffers, because each process collects its own statistics of batch normalisation in
    training. At the end of the block each process gets its own buffers back.
    """
    model = engine.model
    # The forward pass of DistributedDataParallel waits for the other processes, which may have fewer batches.
    engine.model = distributed.unwrapped(model)
    restore_buffers = states.keep_buffers([engine.model])
    try:
        for buffer in engine.model.buffers():
            dist.broadcast(buffer, src=dist.get_global_rank(group, 0), group=group)
        yield
    finally:
        restore_buffers()
        engine.model = model


def shard_of_loader(loader: DataLoader[Any], group: dist.ProcessGroup) -> DataLoader[Any]:
    """Returns a loader with this process's share of the batches of ``loader``, in their order.

    With ``video.sample_method: random`` the first process gets all batches, because each process would draw other
    frames.

    Raises:
        InputError: if the loader does not make batches.
    """
    if loader.batch_sampler is None:
        raise InputError("the test loader must make batches, to be shared: give it a batch_size or a batch_sampler")
    batches = list(loader.batch_sampler)
    if getattr(loader.dataset, "sample_method", None) == "random":
        batches = batches if dist.get_rank(group) == 0 else []
    else:
        batches = batches[share(len(batches), group)]
    return rebuilt(loader, loader.dataset, batch_sampler=batches)


def gather_samples(extract: Callable[[], Samples | None], device: torch.device, group: dist.ProcessGroup) -> Samples:
    """Calls ``extract`` on each process, and returns the samples of all processes, in the order of their ranks.

    ``extract`` returns None if the process has no images. Every process gets the same result.

    Args:
        extract: extracts this process's share.
        device: the device of the model, from which the group's backend can send.
        group: the processes.

    Raises:
        Interrupted: if any process received a signal to stop.
        InputError: if ``extract`` raised an InputError or an OSError on another process, or no process has an image.
        RuntimeError: if ``extract`` raised any other error on another process.
    """
    own: Samples | None = None
    failed: BaseException | None = None
    failure: tuple[Any, ...] | None = None
    try:
        own = extract()
    except (Exception, Interrupted) as error:  # the other processes must be told, because they would wait
        failed, failure = error, (RuntimeError, f"process {dist.get_rank(group)} could not test: {error}")
        if isinstance(error, (InputError, OSError)):
            failure = InputError, failure[1]
        elif isinstance(error, Interrupted):
            failure = Interrupted, error.signal, str(error)
    about = None if own is None else (own.features.shape, own.features.dtype, own.pids, own.camids)
    reports: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, (failure, about), group)
    if failed is not None:
        raise failed
    for other, _ in reports:
        if other is not None:
            kind, *arguments = other
            raise kind(*arguments)

    parts = []
    for rank, (_, about) in enumerate(reports):
        if about is None:
            continue
        shape, dtype, pids, camids = about
        if own is not None and rank == dist.get_rank(group):
            features = own.features.to(device)
        else:
            features = torch.empty(shape, dtype=dtype, device=device)
        # Shares differ in size, and all_gather would pad every share to the largest. So there is a broadcast for each.
        dist.broadcast(features, src=dist.get_global_rank(group, rank), group=group)
        parts.append(Samples(features.cpu(), pids, camids))
    if not parts:
        raise InputError("none of the processes has an image whose features it could extract")
    return _joined(parts)
