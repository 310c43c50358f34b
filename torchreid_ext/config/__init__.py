"""Configuration: the keys, their checks, and the objects that a configuration describes."""

from torchreid_ext.config.build import build_criterion, build_engine, build_model, build_optimizer, build_scheduler
from torchreid_ext.config.data import build_datamanager
from torchreid_ext.config.keys import KEYS
from torchreid_ext.config.node import Config, check, flat, get_default_config, run_options
from torchreid_ext.config.run import prepare, train
from torchreid_ext.config.values import plain

__all__ = [
    "KEYS", "Config", "build_criterion", "build_datamanager", "build_engine", "build_model", "build_optimizer",
    "build_scheduler", "check", "flat", "get_default_config", "plain", "prepare", "run_options", "train",
]  # fmt: skip
