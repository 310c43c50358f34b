"""Starts the processes of a test from a server that has imported torch and torchreid, so that each starts at once."""

import contextlib
import multiprocessing
import os
import socket

import torch

multiprocessing.set_forkserver_preload(["torch", "pytorch_metric_learning.losses", "torchreid_ext.engine.engines"])


def start(work, arguments, count):
    """Runs ``work(rank, *arguments)`` in so many processes, and waits for their end; raises if one of them fails."""
    torch.multiprocessing.start_processes(work, arguments, nprocs=count, start_method="forkserver")


def like_torchrun(work, arguments, count, printed):
    """Runs ``work(*arguments)`` in so many processes that have the environment of torchrun's; returns what they print,
    which is in the file ``printed``."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    start(_launched, (count, port, printed, work, arguments), count)
    return printed.read_text()


def _launched(rank, count, port, printed, work, arguments):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    torch.set_num_threads(1)
    with open(printed, "a") as file, contextlib.redirect_stdout(file):
        status = work(*arguments)
    assert not status, f"exit status {status}"
