"""A run of several processes, started by torchrun; in a run of one, every function here leaves things as they are.

Each process has a share of every batch. The first one (rank 0) draws the batches, prints, logs and saves.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from pml_drsl.checks import InputError

T = TypeVar("T")


@contextlib.contextmanager
def joined(use_gpu: bool = True, timeout: int = 1800) -> Iterator[None]:
    """Joins the processes that torchrun started, on the GPU of the local rank where there is one; the first one's
    stdout alone is kept.

    Args:
        use_gpu: train on GPUs where there are any.
        timeout: seconds after which a process that waits for another gives up, with an error.

    Raises:
        InputError: for a timeout below 1, more processes than GPUs, or restarts on several machines with a store of
            torchrun's that outlives them.
        TimeoutError: on leaving, where gloo waited longer than ``timeout`` for another process.
        ConnectionError: on leaving, where gloo found that another process had ended.
    """
    if not launched():
        yield
        return
    if timeout < 1:
        raise InputError(f"train.timeout must be 1 second or more, got {timeout}")
    backend = "gloo"
    if use_gpu and torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} of this machine has no GPU of its own: there are {torch.cuda.device_count()}. Start "
                f"as many with torchrun --nproc_per_node gpu, or train on the CPU with use_gpu False"
            )
        torch.cuda.set_device(local)
        # What is small and on the CPU need not wait for the GPU.
        backend = "cpu:gloo,cuda:nccl"
    wait = datetime.timedelta(seconds=timeout)
    dist.init_process_group(backend, **_place(wait), timeout=wait)
    with contextlib.ExitStack() as stack:
        if not is_first():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            yield
        except RuntimeError as error:
            # gloo's; nccl ends the process itself, with words of its own.
            if "Timed out waiting" in str(error):
                raise TimeoutError(
                    f"waited {timeout} seconds for another process, which hangs or has much to do alone: if it only "
                    f"needs longer, make train.timeout larger"
                ) from error
            if "Connection closed by peer" in str(error):
                raise ConnectionError(
                    "another process ended, and this one with it; its own message says why"
                ) from error
            raise
    # Not after an error: it could wait for processes that wait for this one.
    dist.destroy_process_group()


def _place(timeout: datetime.timedelta) -> dict[str, Any]:
    """The store where the processes find each other, and this one's place among them.

    torchrun may keep one store for all starts of a run, in which the addresses of processes that died stay: each start
    has names of its own there. Machines count starts each for itself, so of several none has a number that all know.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:
        # Imported here: not every build of torch has them.
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        return {"store": PrefixStore(f"start {restarts()}", store), "rank": rank, "world_size": world_size}
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise InputError(
            "torchrun --max-restarts on several machines would connect new processes to dead ones: start torchrun on "
            "each with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, or with --max-restarts 0"
        )
    return {}


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _joined() else 0


def group() -> dist.ProcessGroup | None:
    """All processes of a run of more than one, or None."""
    return dist.group.WORLD if size() > 1 else None


def is_first() -> bool:
    """Whether this process prints, logs and saves."""
    return rank() == 0


def on_this_machine() -> int:
    """The number of processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _joined() else 1


def restarts() -> int:
    """How often torchrun on this machine has started its processes again; another machine may have another number."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if launched() else 0


def largest(number: int) -> int:
    """The largest of the processes' numbers."""
    if size() == 1:
        return number
    told: list[Any] = [None] * size()
    dist.all_gather_object(told, number)
    return max(told)


def check_share(batch_size: int, num_instances: int = 1) -> None:
    """Raises InputError if the processes cannot have equal shares of a batch, in whole groups of ``num_instances``."""
    if size() > 1 and batch_size % (size() * num_instances):
        groups = f" in whole groups of sampler.num_instances {num_instances}" if num_instances > 1 else ""
        raise InputError(
            f"train.batch_size {batch_size} is that of all {size()} processes together, and they cannot share it "
            f"equally{groups}: make it a multiple of {size() * num_instances}"
        )


def share(batch: list[T]) -> list[T]:
    """This process's part of a batch.

    Raises:
        InputError: if there are no equal parts.
    """
    if len(batch) % size():
        raise InputError(
            f"a batch of {len(batch)} cannot be shared equally among {size()} processes; if it is the last of an "
            f"epoch, make the loader with drop_last=True"
        )
    part = len(batch) // size()
    return batch[rank() * part : (rank() + 1) * part]


def from_first(function: Callable[[], T]) -> T:
    """What ``function`` returns on the first process, on every process; an InputError or OSError is raised on all."""
    if size() == 1:
        return function()
    told: list[Any] = [None, None]
    if is_first():
        try:
            told[0] = function()
        except (InputError, OSError) as error:
            # The others would wait for this process.
            told[1] = error
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    result: T = told[0]
    return result


@contextlib.contextmanager
def one_first() -> Iterator[None]:
    """Lets one process of each machine go through before the others: what it downloads, they find."""
    leads = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if size() > 1 and not leads:
        dist.barrier()
    yield
    if size() > 1 and leads:
        dist.barrier()


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside ``DataParallel`` or ``DistributedDataParallel``, or the network itself."""
    return model.module if isinstance(model, (nn.DataParallel, DistributedDataParallel)) else model


def mean(value: Tensor) -> Tensor:
    """The mean of a scalar over the processes, without gradient; not finite where one of them is not."""
    if size() == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / size()


def local_mean_scale(number: int, device: torch.device) -> float:
    """The factor that makes the mean over the processes of a local mean equal to the mean over all samples.

    Multiply a mean over ``number`` samples of this process by this factor. The same holds for its gradients.
    """
    if size() == 1:
        return 1.0
    total = torch.tensor(number, device=device)
    dist.all_reduce(total)
    return number * size() / int(total)


def agreed(summary: dict[str, float], signum: int | None) -> tuple[dict[str, float], int | None]:
    """The mean of each value over the processes, and the signal that came to any of them.

    Args:
        summary: values by name, the same names on each process.
        signum: the signal that came to this process, if any.
    """
    if size() == 1:
        return summary, signum
    told: list[Any] = [None] * size()
    dist.all_gather_object(told, (summary, signum))
    means = {name: sum(values[name] for values, _ in told) / size() for name in summary}
    return means, max((number for _, number in told if number is not None), default=None)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gives every process the mean of the gradients; for what is not in ``DistributedDataParallel``."""
    for parameter in parameters:
        if size() > 1 and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= size()


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Gives every process the mean of what each gathered in training: statistics of batch normalisation."""
    for buffer in model.buffers():
        if size() > 1 and buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= size()


@torch.no_grad()
def same_as_first(module: nn.Module) -> None:
    """Gives every process the first one's parameters and buffers."""
    for tensor in (*module.parameters(), *module.buffers()):
        if size() > 1:
            # Weights in another memory format are not sent as they lie.
            sent = tensor.contiguous()
            dist.broadcast(sent, 0)
            tensor.copy_(sent)
