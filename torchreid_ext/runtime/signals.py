"""SIGTERM and SIGINT (Ctrl-C) as requests to stop where nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from torchreid_ext.runtime import distributed


class Interrupted(KeyboardInterrupt):
    """Raised where a run stops on request.

    Attributes:
        signal: the signal that asked for it.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal.Signals(signum)


class StopRequest:
    """While entered, SIGTERM and SIGINT are noted instead of ending the process; a second one ends it.

    Outside the main thread, where python allows no handlers, it does nothing.

    Attributes:
        signum: the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._handlers: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopRequest:
        self.signum = None
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._handlers[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def check(self) -> None:
        """Raises Interrupted if a signal came to this process."""
        if self.signum is not None:
            raise Interrupted(self.signum, f"stopped by {signal.Signals(self.signum).name}")

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # Ctrl-C reaches the loader's workers too; their parent decides for them.
        if os.getpid() != self._process:
            return
        if self.signum is not None:
            raise KeyboardInterrupt("stopped at once by a second signal")
        self.signum = signum
        if distributed.is_first():
            print(f"\n{signal.Signals(signum).name}: stopping after this batch", file=sys.stderr)
