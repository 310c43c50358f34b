"""From a configuration to the options of a run and of a test."""

from __future__ import annotations

from functools import reduce
from operator import getitem

from torchreid_ext.config.derived import keys_of_options
from torchreid_ext.config.node import Config
from torchreid_ext.engine.options import RunOptions


def run_options(cfg: Config) -> RunOptions:
    """The options of ``engine.run``.

    Raises:
        InputError: for a value out of its range.
    """
    keys = keys_of_options(RunOptions)
    return RunOptions(**{entry.name: reduce(getitem, key.split("."), cfg) for key, entry in keys.items()})
