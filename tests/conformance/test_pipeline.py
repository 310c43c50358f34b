"""DRSLoss in pytorch-metric-learning's pipeline: trainers, testers and combinations of losses."""

import numpy as np
import pytest
import torch
from batches import make_loss
from pytorch_metric_learning import miners, samplers, testers, trainers
from pytorch_metric_learning.losses import ContrastiveLoss, MultipleLosses
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.common_functions import EmbeddingDataset

from pml_drsl.miners import RankViolationMiner


def make_data(size=96):
    """Points whose class is in a subspace that noise hides."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % 8
    centres = torch.randn(8, 3, generator=generator)
    x = torch.cat([centres[labels], 3 * torch.randn(size, 9, generator=generator)], dim=1)
    return EmbeddingDataset(x + 0.2 * torch.randn(size, 12, generator=generator), labels)


def make_networks():
    torch.manual_seed(0)
    return torch.nn.Linear(12, 6), torch.nn.Linear(6, 8)


def train(trainer_class, loss, miner=None, **others):
    data, (trunk, classifier) = make_data(), make_networks()
    before = make_loss(0.05)(trunk(data.embeddings), data.labels).item()
    models = {"trunk": trunk, **({"classifier": classifier} if others else {})}
    optimizers = {f"{name}_optimizer": torch.optim.Adam(model.parameters(), 0.02) for name, model in models.items()}
    torch.manual_seed(0)
    np.random.seed(0)
    trainer = trainer_class(
        models=models,
        optimizers=optimizers,
        batch_size=32,
        loss_funcs={"metric_loss": loss, **others},
        dataset=data,
        mining_funcs={} if miner is None else {"tuple_miner": miner},
        sampler=samplers.MPerClassSampler(data.labels, m=4, length_before_new_iter=len(data)),
        data_device=torch.device("cpu"),
        iterations_per_epoch=40,
        dataloader_num_workers=0,
    )
    trainer.train(num_epochs=1)
    return trainer, before, make_loss(0.05)(trunk(data.embeddings), data.labels).item()


def test_metric_loss_only_trains():
    trainer, before, after = train(trainers.MetricLossOnly, make_loss(0.05))
    assert after < 0.8 * before
    assert trainer.losses["metric_loss"] == pytest.approx(trainer.losses["total_loss"])


@pytest.mark.parametrize("miner", [RankViolationMiner(0.1), miners.BatchHardMiner()])
def test_metric_loss_only_trains_with_a_miner(miner):
    _, before, after = train(trainers.MetricLossOnly, make_loss(0.05), miner)
    assert after < 0.8 * before


def test_train_with_classifier_trains():
    trainer, before, after = train(
        trainers.TrainWithClassifier, make_loss(0.05), classifier_loss=torch.nn.CrossEntropyLoss()
    )
    assert after < 0.8 * before
    assert set(trainer.losses) >= {"metric_loss", "classifier_loss", "total_loss"}


def test_testers_see_what_was_learned():
    pytest.importorskip("faiss")
    data, (untrained, _) = make_data(), make_networks()
    trainer, *_ = train(trainers.MetricLossOnly, make_loss(0.05))
    calculator = AccuracyCalculator(include=("precision_at_1",), k=1)
    tester = testers.GlobalEmbeddingSpaceTester(
        accuracy_calculator=calculator, dataloader_num_workers=0, data_device=torch.device("cpu")
    )
    scores = [
        tester.test({"train": data}, 0, model)["train"]["precision_at_1_level0"]
        for model in (untrained, trainer.models["trunk"])
    ]
    assert scores[1] > scores[0] + 0.2


def test_multiple_losses_is_the_weighted_sum():
    x, labels = torch.randn(12, 4, requires_grad=True), torch.arange(12) // 3
    parts = {"ours": make_loss(0.1), "theirs": ContrastiveLoss()}
    miner = RankViolationMiner(0.2)
    both = MultipleLosses(parts, miners={"ours": miner}, weights={"ours": 2, "theirs": 0.5})
    wanted = 2 * make_loss(0.1)(x, labels, miner(x, labels)) + 0.5 * ContrastiveLoss()(x, labels)
    torch.testing.assert_close(both(x, labels), wanted)
    listed = MultipleLosses([make_loss(0.1), make_loss(0.2)])
    torch.testing.assert_close(listed(x, labels), make_loss(0.1)(x, labels) + make_loss(0.2)(x, labels))


def test_records_name_settings_and_stats():
    x, labels = torch.randn(12, 4), torch.arange(12) // 3
    loss_fn = make_loss(0.1, collect_stats=True)
    loss_fn(x, labels)
    assert loss_fn._record_these == ["temperature", "sort_weight", "margin"]
    assert make_loss(0.1, bound_power=0.5)._record_these == [*loss_fn._record_these, "bound_power"]
    assert loss_fn._record_these_stats == ["retrieval_error", "sort_error", "num_queries"]
    assert loss_fn.num_queries == 12
    assert not hasattr(make_loss(0.1, collect_stats=False), "_record_these_stats")
    without_sort = make_loss(0.1, sort_weight=0, collect_stats=True)
    without_sort(x, labels)
    assert without_sort._record_these_stats == loss_fn._record_these_stats
    assert without_sort.sort_error == 0
