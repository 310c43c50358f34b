"""Extracts the features of a test set, in one process or divided among several, with the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    features, pids, camids = [], [], []
    # disable=None shows the bar only on a terminal.
    for data in tqdm(loader, desc="features", leave=False, disable=None):
        images, batch_pids, batch_camids = engine.parse_data_for_eval(data)
        features.append(engine.extract_features(images.to(device)).cpu())
        pids.append(np.asarray(batch_pids))
        camids.append(np.asarray(batch_camids))
        engine.stop.check()
    return Samples(torch.cat(features), np.concatenate(pids), np.concatenate(camids))


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


class _Report(NamedTuple):
    """What a process tells the others after its part of the extraction.

    Attributes:
        failed: whether the extraction failed or was interrupted.
        signum: the signal that interrupted it, or None.
        is_of_input: whether the failure is an InputError or an OSError.
        message: the message of the error.
        shape: shape of the features, or None if this process had no images.
        dtype: type of the features.
        pids: identities, shape (N,).
        camids: cameras, shape (N,).
    """

    failed: bool = False
    signum: int | None = None
    is_of_input: bool = False
    message: str = ""
    shape: torch.Size | None = None
    dtype: torch.dtype = torch.float32
    pids: Any = None
    camids: Any = None


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
    own, error = None, None
    try:
        own = extract()
    except (Exception, Interrupted) as caught:  # the other processes must be told, because they would wait
        error = caught
    report = _Report()
    if error is not None:
        signum, is_of_input = getattr(error, "signal", None), isinstance(error, (InputError, OSError))
        report = _Report(failed=True, signum=signum, is_of_input=is_of_input, message=str(error))
    elif own is not None:
        report = _Report(shape=own.features.shape, dtype=own.features.dtype, pids=own.pids, camids=own.camids)
    reports: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, report, group)
    if error is not None:
        raise error
    for rank, other in enumerate(reports):
        if other.failed and other.signum is not None:
            raise Interrupted(other.signum, other.message)
        if other.failed:
            kind = InputError if other.is_of_input else RuntimeError
            raise kind(f"process {rank} could not test: {other.message}")

    features, pids, camids = [], [], []
    for rank, other in enumerate(reports):
        if other.shape is None:
            continue
        if own is not None and rank == dist.get_rank(group):
            part = own.features.to(device)
        else:
            part = torch.empty(other.shape, dtype=other.dtype, device=device)
        # Shares differ in size, and all_gather would pad every share to the largest. So there is a broadcast for each.
        dist.broadcast(part, src=dist.get_global_rank(group, rank), group=group)
        features.append(part.cpu())
        pids.append(other.pids)
        camids.append(other.camids)
    if not features:
        raise InputError("none of the processes has an image whose features it could extract")
    return Samples(torch.cat(features), np.concatenate(pids), np.concatenate(camids))
