"""Searches a folder of photos with an exported network, by onnxruntime, NumPy and Pillow alone.

``drsl-export CHECKPOINT model.onnx`` writes the network. Then:
``python examples/onnx_search.py model.onnx photos street.jpg``
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("gallery", help="folder of photos")
parser.add_argument("query", help="photo to look for")
parser.add_argument("--top", type=int, default=5)
args = parser.parse_args()

session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
settings = session.get_modelmeta().custom_metadata_map  # size, normalisation and distance are in the file


def features(path: str | Path) -> np.ndarray:
    """The features of a photo, [D]."""
    photo = ImageOps.exif_transpose(Image.open(path))
    if photo.mode.startswith("I"):  # 16 bits
        photo = Image.fromarray((np.asarray(photo) / 257).round().astype(np.uint8))
    if photo.has_transparency_data:  # laid on white
        photo = photo.convert("RGBA")
        photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
    photo = photo.convert("RGB").resize((int(settings["width"]), int(settings["height"])), Image.Resampling.BILINEAR)
    pixels = np.asarray(photo, np.float32).transpose(2, 0, 1) / 255
    if "mean" in settings["input"]:  # drsl-export --without-normalisation
        mean, std = (np.array(json.loads(settings[name]), np.float32).reshape(3, 1, 1) for name in ("mean", "std"))
        pixels = (pixels - mean) / std
    vector = session.run(["features"], {"images": pixels[None]})[0][0]
    return vector / np.linalg.norm(vector) if settings["distance"] == "cosine" else vector


found = Path(args.gallery).rglob("[!.]*")  # without hidden files
paths = sorted(path for path in found if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
gallery, query = np.stack([features(path) for path in paths]), features(args.query)
distances = 1 - gallery @ query if settings["distance"] == "cosine" else ((gallery - query) ** 2).sum(1)
for rank, index in enumerate(np.argsort(distances, kind="stable")[: args.top], 1):
    print(f"{rank}  {distances[index]:.4f}  {paths[index]}")
