"""An exported network gives torch's features for every image and batch, or no file is written."""

import dataclasses
import errno

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchreid
import trained
from PIL import Image
from torchvision import transforms

from pml_drsl.checks import InputError
from torchreid_ext import Searcher
from torchreid_ext.cli import export as command
from torchreid_ext.search import export as exporting
from torchreid_ext.search.export import drawn_images, export
from torchreid_ext.search.model import load_model


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained.train(tmp_path_factory.mktemp("plain"), **trained.SMALL)


@pytest.fixture(scope="module")
def necked(tmp_path_factory):
    return trained.train(tmp_path_factory.mktemp("necked"), **trained.SMALL, **{"model.bnneck": True})


def as_input(images, normalise):
    """What a user feeds an exported file with, by torchvision."""
    steps = [transforms.Resize((64, 32)), transforms.ToTensor()]
    if not normalise:
        steps.append(transforms.Normalize([0.4, 0.5, 0.6], [0.229, 0.224, 0.225]))
    return torch.stack([transforms.Compose(steps)(image) for image in images])


@pytest.mark.parametrize("normalise", [True, False])
def test_onnx_gives_the_features_of_the_search(plain, necked, tmp_path, normalise, capsys):
    model = necked if normalise else plain
    words = [str(model), str(tmp_path / "a model.onnx")] + ([] if normalise else ["--without-normalisation"])
    assert command.main(words) == 0
    assert "largest difference from torch over 8 images" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "a model.onnx")
    pictures = drawn_images(5)[::-1]
    expected = Searcher(model, device="cpu").extract(pictures).numpy()
    for number in (5, 1, 3):  # a batch of any size
        (found,) = session.run(["features"], {"images": as_input(pictures[:number], normalise).numpy()})
        assert np.abs(found - expected[:number]).max() < 1e-5
    about = {entry.key: entry.value for entry in onnx.load(tmp_path / "a model.onnx").metadata_props}
    assert about["mean"] == "[0.4, 0.5, 0.6]" and about["height"] == "64" and about["distance"] == "cosine"
    assert ("minus mean" in about["input"]) != normalise and "antialiasing" in about["resize"]


class Twice(torch.nn.Module):
    """Normalises images that are normalised already."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network((images - 0.5) / 0.225)


class OfTheBatch(Twice):
    def forward(self, images):
        features = self.network(images)
        return 0 * features + features.mean(dim=0)


@pytest.mark.parametrize("mistake", [Twice, OfTheBatch])
def test_a_mistake_in_the_exported_network_is_found_and_nothing_is_written(
    plain, tmp_path, monkeypatch, mistake, capsys
):
    write = exporting._write

    def mistaken(model, *rest):
        write(dataclasses.replace(model, network=mistake(model.network)), *rest)

    monkeypatch.setattr(exporting, "_write", mistaken)
    assert command.main([str(plain), str(tmp_path / "model.onnx")]) == 2
    err = capsys.readouterr().err
    assert "is wrong and was not written: largest difference" in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_images_of_the_user(plain, tmp_path, capsys):
    folder = plain.parents[2] / "images"
    words = [str(plain), str(tmp_path / "model.onnx"), "--images"]
    assert command.main([*words, str(folder)]) == 0
    assert "over 16 images" in capsys.readouterr().out
    (tmp_path / "same").mkdir()
    for number in range(3):
        Image.new("RGB", (16, 32), (90, 90, 90)).save(tmp_path / "same" / f"{number}.png")
    assert command.main([str(plain), str(tmp_path / "other.onnx"), "--images", str(tmp_path / "same")]) == 2
    assert "images or more that look different" in capsys.readouterr().err and not (tmp_path / "other.onnx").exists()


@pytest.mark.parametrize(
    ("output", "words", "message"),
    [
        ("model.txt", [], "must end in .onnx"),
        ("model.onnx", ["--model", "nonsense"], "nonsense"),
        ("nowhere/model.onnx", [], "there is no folder"),
        ("model.onnx", ["--images", "nowhere"], "'nowhere' does not exist"),
    ],
)
def test_bad_input(plain, tmp_path, capsys, output, words, message):
    assert command.main([str(plain), str(tmp_path / output), *words]) == 2
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


class NotExportable(torch.nn.Module):
    def forward(self, images):
        # A decision by the values of the images, which a graph cannot make.
        return images.flatten(1) if images.mean() > 0 else -images.flatten(1)


def test_a_network_that_cannot_be_exported_is_refused_with_the_reason(plain, tmp_path):
    model = load_model(plain, device="cpu")
    model.__dict__["network"] = torch.nn.Sequential(NotExportable(), torch.nn.Linear(3 * 64 * 32, 4))
    with pytest.raises(InputError, match=r"squeezenet1_1 cannot be exported to ONNX: ."):
        export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_not_the_fault_of_the_network(plain, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.export.export", full)
    assert command.main([str(plain), str(tmp_path / "model.onnx")]) == 2
    assert capsys.readouterr().err.startswith("drsl-export: [Errno 28] No space left on device: ")


@pytest.mark.slow
def test_a_network_of_the_zoo_that_reshapes_its_batch(tmp_path):
    torch.manual_seed(0)
    network = torchreid.models.build_model("shufflenet_v2_x0_5", 7, pretrained=False, use_gpu=False)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    model = load_model(tmp_path / "weights.pth", device="cpu", model="shufflenet_v2_x0_5")
    # What differs from torch is refused.
    assert "over 3 images" in export(model, tmp_path / "model.onnx", images=drawn_images(3))
    assert (tmp_path / "model.onnx").is_file()


def test_the_checkpoint_and_the_images_are_not_overwritten(plain, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint.onnx"
    checkpoint.write_bytes(plain.read_bytes())
    assert command.main([str(checkpoint), str(checkpoint)]) == 2
    assert "would overwrite" in capsys.readouterr().err and checkpoint.read_bytes() == plain.read_bytes()
    Image.new("RGB", (16, 32)).save(tmp_path / "photo.png")
    (tmp_path / "link.onnx").symlink_to(tmp_path / "photo.png")
    assert command.main([str(checkpoint), str(tmp_path / "link.onnx"), "--images", str(tmp_path)]) == 2
    assert "has the name of an image" in capsys.readouterr().err
