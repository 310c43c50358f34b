"""DRSL, and any loss of pytorch-metric-learning, for torchreid.

Importing this package registers ``ImageDRSLEngine`` and ``VideoDRSLEngine`` on ``torchreid.engine`` and the data set
``synthetic_pedestrians`` with torchreid's data managers.
"""

import warnings

# This package evaluates by pml_drsl.accuracy, so that torchreid's missing Cython code costs nothing.
warnings.filterwarnings("ignore", message="Cython evaluation")

import torchreid  # noqa: E402

from torchreid_ext.config import build_engine, get_default_config  # noqa: E402
from torchreid_ext.engines import ImageDRSLEngine, VideoDRSLEngine  # noqa: E402

torchreid.engine.ImageDRSLEngine = ImageDRSLEngine
torchreid.engine.VideoDRSLEngine = VideoDRSLEngine

__all__ = ["ImageDRSLEngine", "VideoDRSLEngine", "build_engine", "get_default_config"]
