"""What every command shares: a quick --help, one line for what stops it, and output that no terminal refuses."""

import errno
import importlib
import io
import os
import pty
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pml_drsl import console
from pml_drsl.checks import InputError
from torchreid_ext.cli.console import parser

ROOT = Path(__file__).parents[3]

HELP = """
import sys
from torchreid_ext.cli import evaluate, export, extract, search
for command in (evaluate, export, extract, search):
    try:
        command.main(["--help"])
    except SystemExit as end:
        assert end.code == 0
print(sorted({"torch", "torchreid", "numpy", "PIL"} & set(sys.modules)))
"""


def test_help_does_not_load_torch():
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.endswith("\n[]\n"), done.stdout[-500:] + done.stderr
    assert done.stdout.count("130 for Ctrl-C") == 4


def test_processes_that_read_images_do_not_import_torch_each(monkeypatch):
    """Since Python 3.14 a server on Linux starts them. It imports what it is asked for, if that exists."""
    asked = []
    monkeypatch.setattr("multiprocessing.set_forkserver_preload", asked.extend)
    parser("drsl-search", "", "")
    assert [importlib.import_module(name).__name__ for name in asked] == ["torchreid_ext.search.features"]


def test_a_reader_that_stops_early_is_no_error():
    code = "from pml_drsl.console import guarded\nraise SystemExit(guarded('name', lambda: print('text\\n' * 99_999)))"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert child.wait(100) == 141 and child.stderr.read() == b""


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_every_command_runs_as_a_module_and_says_its_version(capsys, monkeypatch):
    for name in ("train", "search", "extract", "export", "evaluate", "benchmark"):
        monkeypatch.setattr(sys, "argv", [name, "--version"])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(f"torchreid_ext.cli.{name}", run_name="__main__")
        assert end.value.code == 0 and console.version() in capsys.readouterr().out, name


def failing(error):
    def work():
        raise error

    return work


WORKER = "DataLoader worker (pid"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (InputError("a  name\n of two lines\n"), 2, "name: a  name of two lines\n"),
        (FileNotFoundError(2, "No such file", "x\x1b[0m"), 2, r"name: [Errno 2] No such file: 'x\x1b[0m'"),
        # As a full disk of stdout, of TensorBoard's log or of temporary files answers.
        (OSError(errno.ENOSPC, "No space left"), 2, "name: [Errno 28] No space left: the disk of the output, the log"),
        (ModuleNotFoundError("No module named 'faiss.x'", name="faiss.x"), 2, "package faiss.x is not installed"),
        (KeyboardInterrupt(), 130, "name: interrupted; nothing was written\n"),
        # As torch says what Docker's small /dev/shm leads to, and what the end of the memory.
        (
            RuntimeError(f"{WORKER} 7) is killed by signal: Bus error. It is"),
            2,
            f"{WORKER} 7) is killed by signal: Bus",
        ),
        (RuntimeError(f"{WORKER}(s) 7, 8) exited unexpectedly"), 2, "8) exited unexpectedly: memory, or shared memory"),
        (
            RuntimeError(
                f"Caught RuntimeError in {WORKER[:17]} process 0.\nRuntimeError: unable to allocate shared memory(shm)"
            ),
            2,
            "name: unable to allocate shared memory(shm): memory, or",
        ),
    ],
)
def test_what_stops_a_command_is_said_in_one_line(capsys, error, status, words):
    assert console.guarded("name", failing(error)) == status
    err = capsys.readouterr().err
    assert words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a defect"),
        RuntimeError("a defect"),
        ModuleNotFoundError("x", name="torchreid_ext.nothing"),
        ModuleNotFoundError("x"),
    ],
)
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error)) as caught:
        console.guarded("name", failing(error))
    assert caught.value is error


def test_of_several_processes_the_first_speaks_for_all_and_the_others_give_their_number(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, told in (("0", "name: a value\nname: stopped\n"), ("1", "name: process 1: a value\n")):
        monkeypatch.setenv("RANK", rank)
        assert console.guarded("name", failing(InputError("a value"))) == 2
        assert console.guarded("name", failing(KeyboardInterrupt()), stopped="stopped") == 130
        assert capsys.readouterr().err == told


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    (tmp_path / "link.npz").symlink_to(tmp_path / "locked" / "f.npz")
    # The owner of a system may write everywhere, whatever the modes of a folder say.
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or Path(path).name != "locked")
    console.check_outputs({"--output": str(tmp_path / "f.npz")}, [])
    for path in (tmp_path / "locked" / "f.npz", tmp_path / "link.npz"):
        with pytest.raises(InputError, match=r"--output .*: the folder '.*locked' cannot be written: give another"):
            console.check_outputs({"--output": str(path)}, [])


def test_any_text_can_be_printed_in_any_encoding(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert console.guarded("name", lambda: console.say("gällery \udcff \x9b2J 人")) == 0
    stream.flush()
    assert stream.buffer.getvalue() == rb"g\xe4llery \udcff \x9b2J \u4eba" + b"\n"


def test_a_command_runs_without_stdout_and_stderr(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # as python does where they were closed (>&-)
    assert console.guarded("name", lambda: sys.stdout.write("text") - 4 + sys.stderr.isatty()) == 0
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert console.guarded("name", failing(InputError("a value"))) == 2


def test_a_terminal_that_was_closed_changes_no_status():
    code = """
import signal, time
from pml_drsl.console import guarded
class Stopped(KeyboardInterrupt):
    signal = signal.SIGHUP
def work():
    noted = []
    signal.signal(signal.SIGHUP, lambda *_: noted.append(1))
    print("ready", flush=True)
    while not noted:
        time.sleep(0.01)
    raise Stopped("stopped by SIGHUP")
raise SystemExit(guarded("drsl-train", work))
"""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", code])
    text = b""
    while not text.endswith(b"\n"):
        text += os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP
