"""Exports a trained network to ONNX, and compares what was written with the network."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Comparison:
    """The largest ``difference`` of a feature value that a file gives for some images, and the ``largest`` value."""

    images: int
    difference: float
    largest: float

    def __str__(self) -> str:
        over = f"over {self.images} images, as a batch and one by one"
        return f"largest difference from torch {over}: {self.difference:.2g} (of features up to {self.largest:.2g})"


class ExportedNetwork(nn.Module):
    """What is exported: a network, with ``normalise`` after the normalisation of its images, which lie in [0, 1]."""

    # torch 2.6 calls the result of a mean in the network "mean" too, and does not tell the two apart.
    norm_mean: Tensor
    norm_std: Tensor

    def __init__(self, model: TrainedModel, normalise: bool) -> None:
        super().__init__()
        self.network, self.normalise = model.network, normalise
        for name in ("norm_mean", "norm_std"):
            self.register_buffer(name, torch.tensor(model.config.data[name]).reshape(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[N, D] features of [N, 3, height, width] images."""
        return self.network((images - self.norm_mean) / self.norm_std if self.normalise else images)


def export(
    model: TrainedModel, path: str | os.PathLike[str], normalise: bool = True, images: Sequence[ImageLike] | None = None
) -> Comparison:
    """Writes a network to a file that other programs load, and checks the file before it takes its place.

    The file takes any number of images, [N, 3, height, width] in RGB order, and gives [N, D] features. Its metadata are
    those of :func:`settings`.

    Args:
        model: the model, on the CPU.
        path: the file to write; its name ends in ``.onnx``.
        normalise: include the normalisation, so that the file takes images in [0, 1].
        images: two different images or more to compare with; None draws eight pedestrians.

    An InputError refuses another ending, too few or too similar images, a network that ONNX cannot express, a missing
    package, and a file whose features differ from torch's. Nothing is written then."""
    if Path(path).suffix != ".onnx":
        raise InputError(f"{os.fspath(path)!r}: the name of the file must end in .onnx")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"ONNX needs the package {package}: pip install {package}")
    shown = drawn_images() if images is None else list(images)
    alike = f"{len(shown)} images to compare with are too few or too similar to notice a mistake in the exported file"
    cure = "give two images or more that look different"
    prepare = Preprocessing(model.config)
    read = [prepare.resized(image) for image in shown]
    if len(read) < 2:
        raise InputError(f"{alike}: {cure}")
    resized = torch.stack(read)
    expected = model.features(prepare.normalised(resized)).numpy()
    largest = float(np.abs(expected).max())
    if np.ptp(expected, axis=0).max() <= 10 * TOLERANCE * largest:
        raise InputError(f"{alike}: {cure}")
    fed = (resized if normalise else prepare.normalised(resized)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, "model.onnx")
        _write(model, temporary, normalise, resized)
        differences: list[float] = []
        try:
            runtime = importlib.import_module("onnxruntime")
            session = runtime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
            for part in (slice(None), slice(0, 1), slice(1, 2)):
                (found,) = session.run(["features"], {"images": fed[part]})
                same = found.shape == expected[part].shape  # An exported batch size gives another shape.
                differences.append(np.abs(found - expected[part]).max() if same else np.inf)
        except Exception as error:  # onnxruntime has errors of its own
            raise _refusal(model, f"the file cannot be run with {len(fed)} images and with one", error) from error
        comparison = Comparison(len(shown), float(np.max(differences)), largest)
        if not comparison.difference <= TOLERANCE * largest:
            raise InputError(f"the exported file is wrong and was not written: {comparison}")
        with replacing(path) as file:
            file.write(temporary.read_bytes())
    return comparison


def settings(model: TrainedModel, normalise: bool) -> dict[str, str]:
    """What a user of an exported file must know, as text: its input, its distance and the model's fingerprint."""
    data = model.config.data
    return {
        "input": "RGB in [0, 1]" if normalise else "RGB in [0, 1], minus mean, divided by std",
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
    network, example = ExportedNetwork(model, normalise).eval(), images[:2]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # They speak of the exporter's own future, not of this network.
            sizes = {"images": {0: torch.export.Dim("batch")}}
            program = torch.export.export(network, (example,), dynamic_shapes=sizes)
            written: Any = torch.onnx.export(
                program, (example,), dynamo=True, verbose=False, input_names=["images"], output_names=["features"]
            )
            written.model.metadata_props.update(settings(model, normalise))
            written.save(path, external_data=False)
    except Exception as error:  # the exporter's own, or any that the network's code raises
        raise _refusal(model, "the network cannot be expressed", error) from error


def _refusal(model: TrainedModel, what: str, error: Exception) -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return InputError(f"{model.config.model.name} cannot be exported to ONNX: {what}: {reason}")
