"""Losses, miners and options that do not fit together are refused before training, at any depth of wrappers."""

import pytest
import torch
import torchreid
from pytorch_metric_learning import losses, miners
from shared_training import FEATURES as SIZE
from shared_training import Network
from torch import nn
from toy_data import make_image_manager

from pml_drsl import DRSLoss
from pml_drsl.checks import InputError
from pml_drsl.wrappers import CrossBatchMemory, DistributedLossWrapper
from torchreid_ext.engine import criteria, engines
from torchreid_ext.engine.criteria import PerFeature

REFUSED = r"indices of images of the batch, and the CrossBatchMemory .*CrossBatchMemory\(\.\.\., miner=\.\.\.\)"


class Wrapper(nn.Module):
    """A user's own loss around another one."""

    def __init__(self, loss):
        super().__init__()
        self.inside = nn.ModuleDict({"loss": loss})

    def forward(self, *arguments):
        return self.inside["loss"](*arguments)


def make_engine(folder, criterion, **kwargs):
    model = Network(torch.float32)
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)
    manager = kwargs.pop("manager", None) or make_image_manager(folder)
    return engines.ImagePMLEngine(manager, model, optimizer, criterion, use_gpu=False, **kwargs)


WRAPPERS = {
    "alone": lambda loss: loss,
    "several": lambda loss: losses.MultipleLosses([losses.ContrastiveLoss(), loss]),
    "several by name": lambda loss: losses.MultipleLosses({"one": losses.ContrastiveLoss(), "other": loss}),
    "each feature": lambda loss: PerFeature([losses.ContrastiveLoss(), loss]),
    "own": lambda loss: Wrapper(losses.MultipleLosses([loss])),
}
MEMORIES = {
    "ours": lambda: CrossBatchMemory(DRSLoss(), SIZE, 32),
    "of pytorch-metric-learning": lambda: losses.CrossBatchMemory(losses.ContrastiveLoss(), SIZE, 32),
    "of all processes": lambda: DistributedLossWrapper(CrossBatchMemory(DRSLoss(), SIZE, 32)),
}


@pytest.mark.parametrize(("wrapped", "memory"), [*zip(WRAPPERS, [*MEMORIES, *MEMORIES], strict=False)])
def test_a_miner_beside_a_memory_is_refused(tmp_path, wrapped, memory):
    criterion = WRAPPERS[wrapped](MEMORIES[memory]())
    with pytest.raises(ValueError, match=REFUSED):
        make_engine(tmp_path, criterion, miner=miners.MultiSimilarityMiner())


def test_a_loss_that_gathers_the_batch_once_more_is_refused_in_several_processes(tmp_path, monkeypatch):
    loss = Wrapper(DistributedLossWrapper(DRSLoss()))
    make_engine(tmp_path, loss)  # In one process it does nothing.
    monkeypatch.setattr(criteria.distributed, "size", lambda: 2)
    monkeypatch.setattr("torchreid_ext.engine.base.list_as_first", lambda _: None)  # There is no other process to ask.
    with pytest.raises(InputError, match=r"gathers the batch of all processes, .* give the engine the loss inside"):
        make_engine(tmp_path, loss)


def test_a_miner_of_several_losses_for_a_memory_is_refused(tmp_path):
    parts = [CrossBatchMemory(DRSLoss(), SIZE, 32), losses.ContrastiveLoss()]
    mined = losses.MultipleLosses(parts, miners=[miners.MultiSimilarityMiner(), None])
    with pytest.raises(ValueError, match=REFUSED):
        make_engine(tmp_path, mined)
    named = losses.MultipleLosses(dict(zip("ab", parts, strict=True)), miners={"a": miners.MultiSimilarityMiner()})
    with pytest.raises(ValueError, match=REFUSED):
        make_engine(tmp_path, Wrapper(named))
    # A miner of the other loss is right.
    named = losses.MultipleLosses(dict(zip("ab", parts, strict=True)), miners={"b": miners.BatchHardMiner()})
    make_engine(tmp_path, named)


def test_the_memorys_own_miner_is_right(tmp_path):
    memory = CrossBatchMemory(losses.ContrastiveLoss(), SIZE, 32, miner=miners.MultiSimilarityMiner())
    engine = make_engine(tmp_path, memory)
    engine.set_model_mode("train")
    seen = []
    memory.loss.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    for data in engine.train_loader:
        engine.forward_backward(data)
    for _, labels, (a, p, b, n), _, memory_labels in seen:
        assert bool((labels[a] == memory_labels[p]).all()) and bool((labels[b] != memory_labels[n]).all())


def test_a_network_of_ones_own_may_have_an_attribute_of_the_name_loss(tmp_path):
    engine = make_engine(tmp_path, DRSLoss())
    for loss in ("arcface", nn.CrossEntropyLoss(), ["softmax", "triplet"]):
        model = Network(torch.float32)
        model.loss = loss
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = engines.ImagePMLEngine(engine.datamanager, model, optimizer, DRSLoss(), use_gpu=False)
        assert "loss_m" in engine.forward_backward(next(iter(engine.train_loader)))


@pytest.mark.parametrize("wrapped", WRAPPERS)
def test_cross_camera_with_a_loss_that_takes_no_pairs_is_refused(tmp_path, wrapped):
    for loss, reason in (
        (losses.FastAPLoss, "FastAPLoss takes no pairs; turn cross_camera off"),
        (lambda: losses.ArcFaceLoss(6, SIZE), "ArcFaceLoss takes no pairs"),
        (MEMORIES["ours"], "CrossBatchMemory does not know the cameras in its memory"),
    ):
        with pytest.raises(ValueError, match=reason):
            make_engine(tmp_path, WRAPPERS[wrapped](loss()), cross_camera=True)


@pytest.mark.parametrize("options", [{"miner": miners.BatchHardMiner()}, {"cross_camera": True}])
def test_several_losses_with_miners_take_no_other_pairs(tmp_path, options):
    mined = losses.MultipleLosses([losses.ContrastiveLoss()], miners=[miners.BatchHardMiner()])
    make_engine(tmp_path, Wrapper(mined))
    with pytest.raises(ValueError, match="MultipleLosses has miners of its own"):
        make_engine(tmp_path, Wrapper(mined), **options)


@pytest.mark.parametrize("options", [{"miner": miners.BatchHardMiner()}, {"cross_camera": True}])
def test_the_triplet_loss_of_torchreid_takes_no_pairs(tmp_path, options):
    make_engine(tmp_path, torchreid.losses.TripletLoss())
    with pytest.raises(InputError, match="TripletLoss takes no pairs: give the engine neither miner nor cross_camera"):
        make_engine(tmp_path, PerFeature([torchreid.losses.TripletLoss()]), **options)


def test_rare_positives_matter_to_any_part_that_compares_images(tmp_path):
    manager = make_image_manager(tmp_path, train_sampler="RandomSampler")
    arcface = losses.ArcFaceLoss(6, SIZE)
    with pytest.warns(UserWarning, match="DRSLoss needs several images"):
        make_engine(tmp_path, losses.MultipleLosses([arcface, DRSLoss()]), manager=manager)
