"""The command line, in whose second epoch and second batch, at its first start, something happens.

    torchrun --nproc_per_node 2 tests/support/dying.py WHAT WORDS OF DRSL-TRAIN

WHAT is "killed": the last process gets SIGKILL; "asked": torchrun gets SIGTERM, which it passes on to all; or "stuck":
the last process does nothing any more.
"""

import os
import signal
import sys
import time

from torchreid_ext import distributed
from torchreid_ext.__main__ import main
from torchreid_ext.base_engine import BaseEngine


def happen(what):
    last = distributed.rank() == distributed.size() - 1
    if what == "killed" and last:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "asked" and distributed.is_first():
        os.kill(os.getppid(), signal.SIGTERM)
        # Until it has been passed on.
        time.sleep(1)
    if what == "stuck" and last:
        time.sleep(1000)


if __name__ == "__main__":
    step = BaseEngine.step

    def eventful(engine, loss):
        if (engine.epoch, engine.batch_idx, distributed.restarts()) == (1, 1, 0):
            happen(sys.argv[1])
        step(engine, loss)

    BaseEngine.step = eventful
    sys.exit(main(sys.argv[2:]))
