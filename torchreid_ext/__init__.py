"""DRSL, and any loss of pytorch-metric-learning, for torchreid.

Once this package is imported, torchreid has the engines ``ImageDRSLEngine``, ``VideoDRSLEngine``, ``ImagePMLEngine``
and ``VideoPMLEngine`` in ``torchreid.engine``, and the data sets ``synthetic_pedestrians`` and
``synthetic_tracklets``. The import itself is quick: torch and torchreid are imported when they are needed.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchreid_ext.config import build_engine, get_default_config
    from torchreid_ext.engine.engines import ImageDRSLEngine, ImagePMLEngine, VideoDRSLEngine, VideoPMLEngine
    from torchreid_ext.search.searcher import Searcher

    __version__: str

__all__ = [
    "ImageDRSLEngine", "ImagePMLEngine", "Searcher", "VideoDRSLEngine", "VideoPMLEngine",
    "build_engine", "get_default_config",
]  # fmt: skip

# This package evaluates by itself, without torchreid's Cython code.
warnings.filterwarnings("ignore", message="Cython evaluation")

_ENGINES = ("ImageDRSLEngine", "ImagePMLEngine", "VideoDRSLEngine", "VideoPMLEngine")
_HOMES = dict.fromkeys(_ENGINES, "torchreid_ext.engine.engines") | {
    "Searcher": "torchreid_ext.search.searcher",
    "build_engine": "torchreid_ext.config",
    "get_default_config": "torchreid_ext.config",
}


def _imported(name: str) -> Any:
    if name == "__version__":
        from pml_drsl.console import version

        return version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


if not TYPE_CHECKING:  # A type checker that sees this function allows every name.
    __getattr__ = _imported


def _register(torchreid: Any) -> None:
    """Gives torchreid the engines and the data sets, which are imported when they are first used."""

    def engine(name: str) -> Any:
        if name not in _ENGINES:
            raise AttributeError(f"module 'torchreid.engine' has no attribute {name!r}")
        return _imported(name)

    def dataset(name: str) -> Any:
        return lambda **options: getattr(importlib.import_module("torchreid_ext.data.synthetic"), name)(**options)

    torchreid.engine.__getattr__ = engine
    # If this module is reloaded, the data sets are already registered.
    with contextlib.suppress(ValueError):
        torchreid.data.register_image_dataset("synthetic_pedestrians", dataset("SyntheticPedestrians"))
        torchreid.data.register_video_dataset("synthetic_tracklets", dataset("SyntheticTracklets"))


class _AfterTorchreid:
    """Registers right after the import of torchreid."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "torchreid":
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec: Any = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register
        return spec


if "torchreid" in sys.modules:
    _register(sys.modules["torchreid"])
else:
    sys.meta_path.insert(0, _AfterTorchreid())
