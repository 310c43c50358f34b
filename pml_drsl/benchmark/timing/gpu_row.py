"""What a part of ``drsl-benchmark gpu`` gets and gives: its setting, and rows of the table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        measurement: what was tested or measured.
        figure: the result.
        passed: whether the result is right. A speed has no limit, so its row always passes.
    """

    measurement: str
    figure: str
    passed: bool = True


@dataclass(frozen=True)
class Setting:
    """How to run a part.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` for a rehearsal.
        quick: whether to run the part in small.
        folder: a folder for files, which all parts share.
    """

    device: str
    quick: bool
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"
