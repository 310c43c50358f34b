"""What a command does before it imports torch: streams that print every name, its version, and missing packages."""

from __future__ import annotations

import importlib.metadata
import io
import sys

EXTRA = "pip install 'pml-drsl[reid]'"
"""Installs what training and search need."""


def safe_streams() -> None:
    r"""Makes stdout and stderr print what their encoding does not have as an escape, such as ``\u5f20``.

    Without it, a path in another encoding than the terminal's would end a command while it prints.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not so where a notebook or a test has replaced it
            stream.reconfigure(errors="backslashreplace")


def version() -> str:
    """The version of the installed distribution, or ``"unknown"`` where none is installed."""
    try:
        return importlib.metadata.version("pml-drsl")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def missing_package(error: ModuleNotFoundError) -> str:
    """One line about a package that is not installed.

    Raises:
        ModuleNotFoundError: the error itself, for a module of these packages, which is a defect of the program.
    """
    if (error.name or "").partition(".")[0] in ("", "pml_drsl", "torchreid_ext"):
        raise error
    return f"the package {error.name} is not installed: {EXTRA}"
