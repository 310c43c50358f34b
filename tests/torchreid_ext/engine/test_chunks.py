"""``train.chunk_size``: the network takes a batch in chunks, and is trained as by the whole batch."""

import shutil
from functools import partial

import pytest
import shared_training
import torch
from killing import differing
from torch import nn
from toy_data import make_image_manager

from pml_drsl.checks import InputError
from torchreid_ext import get_default_config
from torchreid_ext.checkpoint import states
from torchreid_ext.config import check
from torchreid_ext.engine.engines import ImageDRSLEngine
from torchreid_ext.engine.step import Stepper
from torchreid_ext.networks import add_neck
from torchreid_ext.runtime.generators import seed_everything


def trained(folder, name, chunk_size, epochs=2, **changed):
    """The engine after some epochs, with a batch of 12 images."""
    case = shared_training.CASES[name] | changed
    engine = shared_training.make_engine(folder, name, **case)
    engine.test = lambda **_: {}
    seed_everything(7)
    run = {"max_epoch": epochs, "start_eval": 9} | case.get("run", {})
    engine.run(str(folder / f"log {chunk_size}"), chunk_size=chunk_size, **run)
    return engine


# Two views have a memory, too.
@pytest.mark.parametrize("name", [
    "drsl", "drsl without cross-entropy", "fixed base", "a loss that is not finite", "softmax",
    "two views of each image", "tracklets of different lengths",
])  # fmt: skip
def test_every_engine_trains_as_on_the_whole_batch(tmp_path, name):
    plain, chunked = (states.copied(states.of_engine(trained(tmp_path, name, size), 2)) for size in (0, 5))
    assert chunked["training"]["skipped"] == (name == "a loss that is not finite")
    for part in ("losses", "memories"):
        torch.testing.assert_close(chunked["training"][part], plain["training"][part], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(chunked["state_dict"], plain["state_dict"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "amp"), [("weights", "off"), ("softmax", "bf16")])
def test_a_resumed_run_ends_as_a_whole_one_bit_for_bit(tmp_path, name, amp):
    (tmp_path / "data").mkdir()
    found = shared_training.resume(tmp_path / "data", name, torch.float32, chunk_size=5, amp=amp)
    assert differing(*found["ends"]) == 0 and torch.equal(*found["drawn"])
    # Each of four epochs has two batches, of three chunks.
    assert found["ends"][0]["state_dict"]["norm.num_batches_tracked"] == 4 * 2 * 3


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_in_both_passes(amp):
    found = []
    for chunk_size in (0, 5):
        torch.manual_seed(0)
        model, precisions = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)), []
        model[0].register_forward_hook(lambda layer, given, output, into=precisions: into.append(output.dtype))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        stepper = Stepper(amp, chunk_size=chunk_size)
        output = stepper.forward(model, torch.linspace(-1, 1, 36).view(12, 3))
        assert output.dtype == torch.float32
        # So small that the scaled gradients are within half precision.
        stepper.step(0.1 * output.square().mean(), [optimizer])
        assert set(precisions) == {stepper.dtype} and len(precisions) == (6 if chunk_size else 1)
        found.append([parameter.grad for parameter in model.parameters()])
        found[-1] += [parameter.detach() for parameter in model.parameters()]
    torch.testing.assert_close(*found, rtol=2**-6, atol=2**-12)


def test_the_neck_s_batch_normalisation_sees_chunks_and_counts_every_image_once(tmp_path):
    model = shared_training.Network(torch.float32)
    model.loss = "triplet"
    add_neck(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = ImageDRSLEngine(make_image_manager(tmp_path), model, optimizer=optimizer, use_gpu=False)
    engine.run(str(tmp_path / "log"), max_epoch=2, chunk_size=5)
    (norm,) = (layer for layer in model.modules() if isinstance(layer, nn.BatchNorm1d))
    # Eight images are two chunks of four.
    assert norm.num_batches_tracked == 2 * 2 * len(engine.train_loader)


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
inductor = pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])


@pytest.mark.parametrize("backend", ["aot_eager", inductor])
def test_a_compiled_network_in_chunks_trains_as_the_plain_one(tmp_path, monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    found = []
    for compiled in (False, True):
        run = {"compiled": compiled, "channels_last": "auto" if backend == "inductor" else False}
        found.append(trained(tmp_path, "drsl", 5, 1, dtype=torch.float32, run=run).model.state_dict())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_bad_values_are_refused(tmp_path):
    engine = shared_training.make_engine(tmp_path, "drsl")
    for chunk_size in (-1, 2.5):
        with pytest.raises(InputError, match=f"train.chunk_size.*got {chunk_size}"):
            engine.run(str(tmp_path / "log"), max_epoch=1, chunk_size=chunk_size)
    cfg = get_default_config()
    cfg.train.chunk_size, cfg.train.sync_batchnorm = 8, True
    cfg.data.type, cfg.video.sample_method = "video", "evenly"
    check(cfg)
    cfg.video.sample_method = "all"
    with pytest.raises(InputError, match="needs as many chunks in every process"):
        check(cfg)
