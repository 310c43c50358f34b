"""Helpers for a run of several processes, which torchrun starts; in a run of one process they change nothing.

Each process gets a share of every batch. The first process (rank 0) draws the batches, prints, logs and saves.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from pytorch_metric_learning.utils.distributed import is_distributed
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pml_drsl.checks import InputError

T = TypeVar("T")


@contextlib.contextmanager
def joined(use_gpu: bool = True, timeout: int = 1800) -> Iterator[None]:
    """Context: connects the processes that torchrun started. Only the first process prints to stdout.

    With ``use_gpu`` each process uses the GPU with the number of its local rank, if there are GPUs.

    Raises:
        InputError: for several processes that torchrun did not start, a timeout below 1, more processes than GPUs, or
            restarts on several machines with a store of torchrun that keeps the addresses of dead processes.
        TimeoutError: at the end, if gloo waited longer than ``timeout`` seconds for another process.
        ConnectionError: at the end, if gloo found that another process had ended.
    """
    if not launched():
        numbers = (os.environ.get(name, "") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
        count = max((int(number) for number in numbers if number.isdecimal()), default=1)
        if count > 1 and size() == 1:
            alone = f"{count} processes were started, and not by torchrun, so that each would do all of the work alone"
            cure = "start one torchrun on each machine: srun --ntasks-per-node 1 torchrun ... -m torchreid_ext ..."
            raise InputError(f"{alone}: {cure}")
        yield
        return
    if timeout < 1:
        raise InputError(f"train.timeout must be 1 second or more, got {timeout}")
    backend = "gloo"
    if use_gpu and torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            lacking = f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}"
            cure = "Start as many with torchrun --nproc_per_node gpu, or train on the CPU with use_gpu False"
            raise InputError(f"{lacking}. {cure}")
        torch.cuda.set_device(local)
        # Small tensors on the CPU do not have to wait for the GPU.
        backend = "cpu:gloo,cuda:nccl"
    wait = datetime.timedelta(seconds=timeout)
    dist.init_process_group(backend, **_place(wait), timeout=wait)
    with contextlib.ExitStack() as stack:
        if not is_first():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            yield
        except RuntimeError as error:
            # These are messages of gloo. nccl ends the process itself, with its own message.
            if "Timed out waiting" in str(error):
                why = f"waited {timeout} seconds for another process, which hangs or has much work to do alone"
                raise TimeoutError(f"{why}: if it only needs more time, increase train.timeout") from error
            if "Connection closed by peer" in str(error):
                why = "another process ended, so this process ends too"
                raise ConnectionError(f"{why}; the message of the other process says why") from error
            raise
    # torch joins gloo's threads while it holds Python's lock. A thread that still waits for the lock, because it frees
    # tensors of the last exchange, would never end.
    time.sleep(0.1)
    # This is not done after an error, because it could wait for processes that wait for this one.
    dist.destroy_process_group()


def _place(timeout: datetime.timedelta) -> dict[str, Any]:
    """The store where the processes find each other, and the rank of this process. torchrun may keep one store for all
    starts of a run, with the addresses of dead processes. Each start therefore has a prefix of its own there, on which
    several machines could not agree, because each counts its own starts."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:
        # Not every build of torch has these modules.
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        start = f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        return {"store": PrefixStore(start, store), "rank": rank, "world_size": world_size}
    if may_restart():
        why = "torchrun --max-restarts on several machines would connect new processes to dead ones"
        cure = "with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, or with --max-restarts 0"
        raise InputError(f"{why}: start torchrun on each {cure}")
    return {}


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def group() -> dist.ProcessGroup | None:
    """The group of all processes, or None in a run of one process."""
    return dist.group.WORLD if size() > 1 else None


def is_first() -> bool:
    """Whether this process prints, logs and saves."""
    return rank() == 0


def on_this_machine() -> int:
    """The number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_distributed() else 1


def may_restart() -> bool:
    """Whether torchrun starts the processes again if one dies."""
    return launched() and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def gathered(value: T) -> list[T]:
    """What each process gave."""
    values: list[Any] = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def check_share(batch_size: int, num_instances: int = 1) -> None:
    """Raises InputError if a batch has no equal shares for the processes, of complete groups of ``num_instances``."""
    if size() > 1 and batch_size % (size() * num_instances):
        groups = f" in complete groups of sampler.num_instances {num_instances}" if num_instances > 1 else ""
        whole = f"train.batch_size {batch_size} is the batch of all {size()} processes together"
        cure = f"make it a multiple of {size() * num_instances}"
        raise InputError(f"{whole}, and it cannot be divided equally{groups}: {cure}")


def own_share(batch: list[T]) -> list[T]:
    """This process's share of a batch. Raises InputError if the batch cannot be divided equally."""
    if len(batch) % size():
        cure = "if it is the last batch of an epoch, make the loader with drop_last=True"
        raise InputError(f"a batch of {len(batch)} cannot be divided equally among {size()} processes; {cure}")
    part = len(batch) // size()
    return batch[rank() * part : (rank() + 1) * part]


def from_first(function: Callable[[], T]) -> T:
    """Calls ``function`` on the first process; returns its result, or raises an error of it, on every process."""
    if size() == 1:
        return function()
    answer: list[Any] = [None, None]
    failed: BaseException | None = None
    if is_first():
        try:
            answer[0] = function()
        except BaseException as error:
            # Without an answer the other processes would wait. Not every error can be sent to them.
            failed = error
            sent = type(error) in (InputError, FileNotFoundError, PermissionError, OSError)
            answer[1] = error if sent else ConnectionError(f"the first process stopped: {error!r}")
    dist.broadcast_object_list(answer)
    if failed or answer[1]:
        raise failed or answer[1]
    return answer[0]


@contextlib.contextmanager
def one_first() -> Iterator[None]:
    """Context: one process of each machine runs the block before the others, which then find what it downloaded. If the
    block fails there, the other processes raise ConnectionError."""
    leads = int(os.environ.get("LOCAL_RANK", 0)) == 0
    failed: BaseException | None = None
    if leads:
        try:
            yield
        except BaseException as error:
            failed = error
    told = gathered(failed and repr(failed))
    if failed:
        raise failed
    for number, why in enumerate(told):
        if why:
            raise ConnectionError(f"process {number} stopped: {why}")
    if not leads:
        yield


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside ``DataParallel`` or ``DistributedDataParallel``, or the network itself."""
    return model.module if isinstance(model, (nn.DataParallel, DistributedDataParallel)) else model


@torch.no_grad()
def average(tensors: Iterable[Tensor | None]) -> None:
    """Replaces the values of tensors (gradients, statistics) by their means over the processes; None is left out."""
    for tensor in tensors:
        if size() > 1 and tensor is not None:
            dist.all_reduce(tensor)
            tensor /= size()


def local_mean_scale(number: int, device: torch.device) -> float:
    """Processes may have different numbers of samples, of which this one has ``number``. Multiply each process's mean
    by this factor; the mean over the processes is then the mean over all samples."""
    if size() == 1:
        return 1.0
    total = torch.tensor(number, device=device)
    dist.all_reduce(total)
    return number * size() / int(total)


def agreed(summary: dict[str, float], signum: int | None) -> tuple[dict[str, float], int | None]:
    """The mean of each value over the processes, which have the same names, and the signal that any received."""
    all_of_them = gathered((summary, signum))
    means = {name: sum(values[name] for values, _ in all_of_them) / size() for name in summary}
    return means, max((number for _, number in all_of_them if number is not None), default=None)


@torch.no_grad()
def same_as_first(module: nn.Module) -> None:
    """Copies the parameters and buffers of the first process to every process."""
    for tensor in (*module.parameters(), *module.buffers()):
        if size() > 1:
            # A broadcast needs contiguous tensors. Weights in another memory format are not contiguous.
            sent = tensor.contiguous()
            dist.broadcast(sent, 0)
            tensor.copy_(sent)
