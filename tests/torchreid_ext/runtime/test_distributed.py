"""Several processes train as one process does, and a process that dies ends or restarts the job."""

import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import processes
import pytest
import shared_training
import torch
import trained
from killing import differing
from torch import distributed as dist

from pml_drsl.checks import InputError
from torchreid_ext import config, get_default_config
from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.cli.train import main
from torchreid_ext.config import data as data_config
from torchreid_ext.runtime import distributed
from torchreid_ext.runtime.signals import Interrupted

ROOT = Path(__file__).parents[3]
SUPPORT = ROOT / "tests" / "support"


def torchrun(*words):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = shared_training.train_all(tmp_path_factory.mktemp("alone"))
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The findings of each of three processes."""
    folder = tmp_path_factory.mktemp("together")
    processes.like_torchrun(shared_training.train_and_resume, (folder,), 3, folder / "printed")
    return [torch.load(folder / f"found{rank}", weights_only=True) for rank in range(3)]


@pytest.mark.slow
def test_several_processes_train_as_one_does(alone, together):
    for name, of_process in itertools.product(alone, together):
        wanted, found = alone[name], of_process["cases"][name]
        error = 1e-5 if name == "float32" else 1e-9
        close = partial(torch.testing.assert_close, rtol=error, atol=error, msg=lambda text, of=name: f"{of}: {text}")
        assert len(wanted["summaries"]) >= 2, name
        assert wanted["state"]["skipped"] == (name == "a loss that is not finite"), name
        for summary, expected in zip(found["summaries"], wanted["summaries"], strict=True):
            # torchreid gives the accuracy in percent and in float32.
            assert summary.pop("acc", 0) == pytest.approx(expected.get("acc", 0), abs=1e-4), name
            close(summary, {k: v for k, v in expected.items() if k != "acc"})
        close(found["state"]["state_dict"], wanted["state"]["state_dict"])
        if name != "float32":
            close(found["state"], wanted["state"])


@pytest.mark.slow
def test_a_resumed_run_of_several_processes_is_equal_to_a_run_without_a_stop(together):
    for of_process in together:
        whole, resumed = of_process["resumed"]["ends"]
        assert whole["training"]["processes"] == len(together)
        assert differing(whole, resumed) == 0
    weights = [of_process["resumed"]["ends"][0]["state_dict"] for of_process in together]
    assert differing(weights[0], weights[-1]) == 0
    # Dropout differs between processes, and is the same in every run.
    drawn = [torch.stack(of_process["resumed"]["drawn"]) for of_process in together]
    assert all(torch.equal(one[0], one[1]) for one in drawn)
    assert not torch.equal(drawn[0], drawn[1])


# The command line.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    trained.csv_data(folder)
    return folder


def words(data, log, **options):
    run = {"data.save_dir": data / log, "train.max_epoch": 3, "train.print_freq": 1}
    return trained.words(data, **run, **options)


@pytest.fixture(scope="module")
def whole(data):
    """A run without any interruption."""
    return processes.like_torchrun(main, (words(data, "whole"),), 2, data / "printed")


def last(data, log):
    return checkpoint.load(data / log / "model" / "model-last.pth.tar")


@pytest.mark.slow
def test_only_the_first_process_prints_and_saves(data, whole):
    assert [line.split("\t")[0] for line in whole.splitlines() if line.startswith("epoch: ")] == [
        f"epoch: [{epoch}/3][{batch}/3]" for epoch in (1, 2, 3) for batch in (1, 2, 3)
    ]
    assert whole.count("Checkpoint saved") == 3 and whole.count("** Results **") == 1
    for names in ("train.log-*", "events.out.tfevents.*", "metrics.json"):
        assert len(list((data / "whole").glob(names))) == 1, names


@pytest.mark.slow
def test_a_killed_process_is_restarted_and_a_signal_stops_all(data, whole):
    # The signal to torchrun also reaches the process group, from which the worker of each loader must be away.
    resume = words(data, "stopped", **{"model.resume": "auto", "data.workers": 1})
    stopped = torchrun("--nproc_per_node", 2, "--max-restarts", 1, SUPPORT / "dying.py", *resume)
    assert stopped.stdout.count("=> Start training") == 2
    assert stopped.stdout.count("Resuming from") == 1 and "after epoch 1" in stopped.stdout
    assert stopped.returncode != 0
    # torchrun also sends SIGTERM to the process whose peer was killed, and that process may see it before it misses the
    # peer. Only what follows the signal to torchrun itself counts.
    after = stopped.stderr.partition("Received 15 death signal")[2]
    assert after.count("stopped by SIGTERM in epoch 2; model.resume auto begins it again") == 1, stopped.stderr
    # The run stops after the batch in which the signal was received.
    assert "epoch: [2/3][2/3]" in stopped.stdout and "epoch: [2/3][3/3]" not in stopped.stdout
    assert last(data, "stopped")["epoch"] == 1
    resumed = processes.like_torchrun(main, (list(map(str, resume)),), 2, data / "printed by the resumed")
    assert resumed.count("Resuming from") == 1
    assert differing(last(data, "whole"), last(data, "stopped")) == 0


def test_a_signal_during_the_exchange_between_processes_is_not_lost(tmp_path, monkeypatch):
    engine = shared_training.make_engine(tmp_path, "drsl")
    agreed = distributed.agreed

    def agreed_and_then(summary, signum):
        result = agreed(summary, signum)
        if (engine.epoch, engine.batch_idx) == (1, 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(distributed, "agreed", agreed_and_then)
    with pytest.raises(Interrupted, match="stopped by SIGTERM in epoch 2"):
        engine.run(str(tmp_path / "log"), max_epoch=3)
    assert engine.batch_idx == 1


# Impossible settings are refused at the start.


def test_a_restart_does_not_see_the_addresses_of_the_start_before(monkeypatch):
    store = dist.TCPStore("localhost", 0, is_master=True)
    torchruns = {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "RANK": 0, "WORLD_SIZE": 1,
                 "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_MAX_RESTARTS": 3,
                 "GROUP_WORLD_SIZE": 1}  # fmt: skip
    for name, value in torchruns.items():
        monkeypatch.setenv(name, str(value))
    kept = []
    for start in range(3):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(start))
        with distributed.joined(use_gpu=False, timeout=20):
            kept.append(set(store.list_keys()))
    assert store.num_keys() and len(kept[0]) < len(kept[1]) < len(kept[2])
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match=r"--max-restarts on several machines .* TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        distributed.joined(use_gpu=False),
    ):
        pass


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "size", lambda: 3)
    distributed.check_share(12, 4)
    with pytest.raises(ValueError, match=r"train.batch_size 8 .* all 3 processes together.*make it a multiple of 3"):
        distributed.check_share(8)
    with pytest.raises(ValueError, match=r"complete groups of sampler.num_instances 4: make it a multiple of 12"):
        distributed.check_share(18, 4)
    with pytest.raises(ValueError, match=r"a batch of 5 .* drop_last=True"):
        distributed.own_share([0] * 5)
    cfg = get_default_config()
    with pytest.raises(ValueError, match=r"train.batch_size 32 is the batch of all 3 processes"):
        config.check(cfg)
    cfg.sampler.train_sampler, cfg.train.batch_size = "RandomIdentitySampler", 30
    with pytest.raises(ValueError, match=r"complete groups of sampler.num_instances 4: make it a multiple of 12"):
        config.check(cfg)
    cfg.test.evaluate = True
    config.check(cfg)


def test_synchronised_batch_normalisation_on_the_cpu(monkeypatch):
    cfg = get_default_config()
    cfg.merge_from_list([word for item in trained.OPTIONS.items() for word in item])
    cfg.train.sync_batchnorm = True
    config.build_model(cfg, 6)
    monkeypatch.setattr(distributed, "size", lambda: 2)
    with pytest.raises(ValueError, match=r"train.sync_batchnorm: torch has it only on GPUs"):
        config.build_model(cfg, 6)


def test_a_timeout_below_a_second_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ValueError, match=r"train.timeout must be 1 second or more, got 0"), distributed.joined(True, 0):
        pass


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_several_processes_that_torchrun_did_not_start_are_refused(monkeypatch, name):
    for number, expected in (
        ("4", pytest.raises(InputError, match=r"4 processes were started, .*: srun --ntasks-per-node 1 torch")),
        ("1", contextlib.nullcontext()),
        ("", contextlib.nullcontext()),
    ):
        for other in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
            monkeypatch.setenv(other, "")
        monkeypatch.setenv(name, number)
        with expected, distributed.joined(use_gpu=False):
            pass
    # A script may have connected them itself, and torchrun sets the number too.
    monkeypatch.setenv(name, "4")
    monkeypatch.setattr(distributed, "size", lambda: 4)
    with distributed.joined(use_gpu=False):
        pass


def two_of_gloo():
    """Connects two threads as torchrun would connect two processes."""
    store, wait = dist.HashStore(), timedelta(seconds=1)
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda rank: dist.ProcessGroupGloo(store, rank, 2, wait), range(2)))


@pytest.mark.parametrize(
    "ends, error, message",
    [(False, TimeoutError, "waited 1 seconds .* increase train.timeout"), (True, ConnectionError, "process ended")],
)
def test_waiting_processes_get_an_error_when_another_hangs_or_ends(monkeypatch, ends, error, message):
    monkeypatch.setattr(distributed, "launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    groups = two_of_gloo()
    with pytest.raises(error, match=message), distributed.joined(use_gpu=False, timeout=1):
        if ends:
            del groups[1]
        groups[0].allreduce([torch.ones(1)]).wait()


class Wire:
    """What two processes exchange, of which this process is first the first and then the second."""

    def __init__(self, monkeypatch):
        self.first, self.sent = True, []
        monkeypatch.setattr(distributed, "size", lambda: 2)
        monkeypatch.setattr(distributed, "is_first", lambda: self.first)
        monkeypatch.setattr(dist, "broadcast_object_list", self.broadcast)
        monkeypatch.setattr(dist, "all_gather_object", self.gather)

    def broadcast(self, objects):
        if self.first:
            self.sent = pickle.loads(pickle.dumps(objects))
        objects[:] = self.sent

    def gather(self, told, own):
        if self.first:
            self.sent = [own]
        told[:] = [self.sent[0], None]


class Unsendable(Exception):
    def __init__(self, one, two):
        super().__init__(one)
        self.lock = threading.Lock()


@pytest.mark.parametrize("error", [TypeError("wrong type"), Unsendable("a lock", 2), KeyboardInterrupt("stop")])
def test_no_process_waits_for_a_first_process_that_failed(monkeypatch, error):
    def fail():
        raise error

    wire = Wire(monkeypatch)
    with pytest.raises(type(error)):
        distributed.from_first(fail)
    wire.first = False
    with pytest.raises(ConnectionError, match=f"the first process stopped: {type(error).__name__}"):
        distributed.from_first(fail)

    wire.first = True
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(type(error)), distributed.one_first():
        fail()
    wire.first = False
    monkeypatch.setenv("LOCAL_RANK", "1")
    done = []
    with pytest.raises(ConnectionError, match=f"process 0 stopped: {type(error).__name__}"), distributed.one_first():
        done.append(True)
    assert not done


def test_bad_input_on_the_first_process_is_the_same_on_all(monkeypatch):
    def fail():
        raise InputError("give another value")

    wire = Wire(monkeypatch)
    for wire.first in (True, False):
        with pytest.raises(InputError, match="give another value"):
            distributed.from_first(fail)
    wire.first = True
    with distributed.one_first():
        pass
    assert wire.sent == [None] and distributed.from_first(lambda: 7) == 7


def test_cores_are_shared_by_the_processes_of_a_machine(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "on_this_machine", lambda: 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    assert data_config._workers(4) == data_config._workers(-1) == 2
    assert "there are 2 cores for each training process" in capsys.readouterr().out
