"""The command line; in its second epoch and second batch it is killed and then, started again, asked to stop.

    torchrun --nproc_per_node 2 --max-restarts 1 tests/support/dying.py WORDS OF DRSL-TRAIN

First the last process gets SIGKILL. After the restart torchrun gets SIGTERM, which it passes on to all.
"""

import os
import signal
import sys
import time

from torchreid_ext.cli.train import main
from torchreid_ext.engine.base import BaseEngine
from torchreid_ext.runtime import distributed


def happen():
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if restarts == 0 and distributed.rank() == distributed.size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if restarts == 1 and distributed.is_first():
        os.kill(os.getppid(), signal.SIGTERM)
        # Until it has been passed on.
        time.sleep(1)


if __name__ == "__main__":
    step = BaseEngine.step

    def eventful(engine, loss):
        if (engine.epoch, engine.batch_idx) == (1, 1):
            happen()
        step(engine, loss)

    BaseEngine.step = eventful
    sys.exit(main(sys.argv[1:]))
