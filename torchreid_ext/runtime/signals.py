"""Turns SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a closed terminal) into a request to stop, so that no work is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from torchreid_ext.runtime import distributed


class Interrupted(KeyboardInterrupt):
    """The run stops because a signal asked for it, which is the attribute ``signal``; ``where`` ends the message."""

    def __init__(self, signum: int, where: str = "") -> None:
        self.signal = signal.Signals(signum)
        super().__init__(f"stopped by {self.signal.name}{where}")


class StopRequest:
    """Context: records a signal, which would otherwise end the process, in ``signum``, and prints what it ``says``; a
    second one ends it. A SIGHUP that is ignored (nohup) stays so. Outside the main thread the context does nothing,
    because python allows signal handlers only there."""

    def __init__(self, says: str = "stopping as soon as possible") -> None:
        self.says = says
        self.signum: int | None = None
        self._handlers: dict[int, Any] = {}
        self._process = os.getpid()

    def __enter__(self) -> StopRequest:
        self.signum = None
        if threading.current_thread() is threading.main_thread():
            signums = [signal.SIGTERM, signal.SIGINT]
            hangup = getattr(signal, "SIGHUP", None)  # Windows has none.
            if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
                signums.append(hangup)
            for signum in signums:
                self._handlers[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def check(self) -> None:
        """Raises ``Interrupted`` if this process received a signal."""
        if self.signum is not None:
            raise Interrupted(self.signum)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # Ctrl-C also reaches the loader's workers, which their parent stops.
            return
        if self.signum is not None:
            raise KeyboardInterrupt("stopped at once by a second signal")
        self.signum = signum
        if distributed.is_first():
            # A terminal that was closed takes no text.
            with contextlib.suppress(OSError):
                print(f"\n{signal.Signals(signum).name}: {self.says}", file=sys.stderr)
