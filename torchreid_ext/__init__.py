"""DRSL, and any loss of pytorch-metric-learning, for torchreid.

Importing this package registers ``ImageDRSLEngine``, ``VideoDRSLEngine``, ``ImagePMLEngine`` and ``VideoPMLEngine`` on
``torchreid.engine`` and the data sets ``synthetic_pedestrians`` and ``synthetic_tracklets`` with torchreid's data
managers.
"""

import warnings

# This package evaluates by pml_drsl.evaluation.scores, so that torchreid's missing Cython code costs nothing.
warnings.filterwarnings("ignore", message="Cython evaluation")

import torchreid  # noqa: E402

from torchreid_ext.config.build import build_engine, get_default_config  # noqa: E402
from torchreid_ext.engine.engines import ImageDRSLEngine, ImagePMLEngine, VideoDRSLEngine, VideoPMLEngine  # noqa: E402
from torchreid_ext.search.searcher import Searcher  # noqa: E402

for _engine in (ImageDRSLEngine, ImagePMLEngine, VideoDRSLEngine, VideoPMLEngine):
    setattr(torchreid.engine, _engine.__name__, _engine)

__all__ = [
    "ImageDRSLEngine",
    "ImagePMLEngine",
    "Searcher",
    "VideoDRSLEngine",
    "VideoPMLEngine",
    "build_engine",
    "get_default_config",
]
