"""Exports a trained network to ONNX, and compares what was written with the network."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pml_drsl.checks import InputError
from pml_drsl.console import replacing
from torchreid_ext.data.drawing import CAMERAS, draw_image, draw_scene, make_person
from torchreid_ext.search.model import ImageLike, Preprocessing, TrainedModel

TOLERANCE = 1e-4  # the largest difference that an exported network may have, as a share of the largest feature value


def export(
    model: TrainedModel, path: str | os.PathLike[str], normalise: bool = True, images: Sequence[ImageLike] | None = None
) -> str:
    """Writes a network to a file that other programs load, and checks the file before it takes its place.

    The file takes any number of images, [N, 3, height, width] in RGB order, and gives [N, D] features. Its metadata are
    those of :func:`settings`.

    Args:
        model: the model, on the CPU.
        path: the file to write; its name ends in ``.onnx``.
        normalise: include the normalisation, so that the file takes images in [0, 1].
        images: two different images or more to compare with; None draws eight pedestrians.

    Returns a sentence on how far its features are from torch's. An InputError refuses another ending, too few or too
    similar images, a network that ONNX cannot express, and a file whose features differ from torch's. Nothing is
    written then."""
    if Path(path).suffix != ".onnx":
        raise InputError(f"{os.fspath(path)!r}: the name of the file must end in .onnx")
    # A missing package is named here: below, every error of the exporter is taken for the network's.
    runtime, *_ = [importlib.import_module(package) for package in ("onnxruntime", "onnx", "onnxscript")]
    shown = drawn_images() if images is None else list(images)
    alike = f"{len(shown)} images to compare with are too few or too similar to notice a mistake in the exported file: "
    alike += "give two images or more that look different"
    if len(shown) < 2:
        raise InputError(alike)
    prepare = Preprocessing(model.config)
    resized = torch.stack([prepare.resized(image) for image in shown])
    expected = model.features(prepare.normalised(resized)).numpy()
    largest = float(np.abs(expected).max())
    if np.ptp(expected, axis=0).max() <= 10 * TOLERANCE * largest:
        raise InputError(alike)
    fed = (resized if normalise else prepare.normalised(resized)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, "model.onnx")
        _write(model, temporary, normalise, resized)
        differences: list[float] = []
        try:
            session = runtime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
            for part in (slice(None), slice(0, 1), slice(1, 2)):
                (found,) = session.run(["features"], {"images": fed[part]})
                same = found.shape == expected[part].shape  # An exported batch size gives another shape.
                differences.append(np.abs(found - expected[part]).max() if same else np.inf)
        except Exception as error:  # onnxruntime has errors of its own
            raise _refusal(model, f"the file cannot be run with {len(fed)} images and with one", error) from error
        difference, over = np.max(differences), f"over {len(shown)} images, as a batch and one by one"
        compared = f"largest difference from torch {over}: {difference:.2g} (of features up to {largest:.2g})"
        if not difference <= TOLERANCE * largest:
            raise InputError(f"the exported file is wrong and was not written: {compared}")
        with replacing(path) as file:
            file.write(temporary.read_bytes())
    return compared


def settings(model: TrainedModel, normalise: bool) -> dict[str, str]:
    """What a user of an exported file must know, as text: its input, its distance and the model's fingerprint."""
    data = model.config.data
    return {
        "input": "RGB in [0, 1]" if normalise else "RGB in [0, 1], minus mean, divided by std",
        "resize": "bilinear with antialiasing (Pillow's BILINEAR) of the upright photo",
        "height": str(data.height),
        "width": str(data.width),
        "mean": json.dumps(data.norm_mean),
        "std": json.dumps(data.norm_std),
        "distance": model.metric,
        "network": str(model.config.model.name),
        "model_fingerprint": model.fingerprint,
    }


def drawn_images(number: int = 8) -> list[Image.Image]:
    """Pedestrians, each another one before another camera, drawn as ``synthetic_pedestrians`` draws them."""
    cameras = [(np.random.default_rng([2024, index]), CAMERAS[index % len(CAMERAS)]) for index in range(number)]
    return [draw_image(rng, make_person(rng), camera, draw_scene(rng, camera)) for rng, camera in cameras]


def _write(model: TrainedModel, path: Path, normalise: bool, images: Tensor) -> None:
    # A batch normalisation with these statistics is the normalisation of images in [0, 1]. The network is a part of a
    # larger one in any case, which lengthens the names of its weights: torch 2.6 takes a weight "mean" for a mean.
    first, example = nn.BatchNorm2d(3, eps=0.0), images[:2]
    mean, std = (torch.tensor(model.config.data[name]) for name in ("norm_mean", "norm_std"))
    first.load_state_dict({"running_mean": mean, "running_var": std.square()}, strict=False)
    network = nn.Sequential(first if normalise else nn.Identity(), model.network).eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # They speak of the exporter's own future, not of this network.
            sizes = ({0: torch.export.Dim("batch")},)
            program = torch.export.export(network, (example,), dynamic_shapes=sizes)
            written: Any = torch.onnx.export(
                program, (example,), dynamo=True, verbose=False, input_names=["images"], output_names=["features"]
            )
            written.model.metadata_props.update(settings(model, normalise))
            written.save(path, external_data=False)
    except Exception as error:  # the exporter's own, or any that the network's code raises
        if isinstance(error, OSError) and error.errno:  # The disk of temporary files may be full.
            raise
        raise _refusal(model, "the network cannot be expressed", error) from error


def _refusal(model: TrainedModel, what: str, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return InputError(f"{model.config.model.name} cannot be exported to ONNX: {what}: {reason}")
