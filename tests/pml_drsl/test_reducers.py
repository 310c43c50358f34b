import pytest
import torch
from pytorch_metric_learning.losses import SupConLoss, TripletMarginLoss
from pytorch_metric_learning.reducers import AvgNonZeroReducer, PerAnchorReducer, SumReducer

from pml_drsl.reducers import PerQueryReducer


def info(losses, indices, kind):
    return {"loss": {"losses": losses, "indices": indices, "reduction_type": kind}}


@pytest.mark.parametrize("kind", ["pos_pair", "neg_pair", "triplet", "element"])
def test_averages_by_query_then_over_queries_with_a_loss(kind):
    losses = torch.tensor([1.0, 3.0, 10.0, 4.0], requires_grad=True)
    query = torch.tensor([4, 4, 2, 4])
    other = torch.tensor([100, 200, 300, 400])  # references may outnumber the batch
    indices = query if kind == "element" else (query, *[other] * (2 if kind == "triplet" else 1))
    reduced = PerQueryReducer()(info(losses, indices, kind), torch.randn(5, 2), None)
    assert reduced.item() == pytest.approx(((1 + 3 + 4) / 3 + 10) / 2)
    reduced.backward()
    torch.testing.assert_close(losses.grad, torch.tensor([1 / 6, 1 / 6, 1 / 2, 1 / 6]))


def test_an_inner_reducer_sees_one_element_a_query():
    pairs = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 2, 0, 2])
    losses = info(torch.tensor([0.0, 0.0, 6.0, 2.0]), pairs, "pos_pair")
    embeddings = torch.randn(3, 2)
    assert PerQueryReducer(AvgNonZeroReducer())(losses, embeddings, None).item() == 4
    assert PerQueryReducer(SumReducer())(losses, embeddings, None).item() == 4


def test_equals_pml_per_anchor_reducer_where_every_query_has_pairs():
    query, other = torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4)
    losses = info(torch.rand(12), (query, other), "pos_pair")
    embeddings = torch.randn(4, 2)
    wanted = PerAnchorReducer()(losses, embeddings, None)
    torch.testing.assert_close(PerQueryReducer()(losses, embeddings, None), wanted)


@pytest.mark.parametrize("losses", [0, torch.zeros(0)])
def test_no_loss_at_all_is_a_zero_that_goes_backward(losses):
    embeddings = torch.randn(3, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    reduced = PerQueryReducer()(info(losses, (none, none), "pos_pair"), embeddings, None)
    reduced.backward()
    assert reduced.item() == 0
    assert (embeddings.grad == 0).all()


def test_serves_the_losses_of_pml():
    x, labels = torch.randn(12, 4), torch.arange(12) // 3
    for loss_fn in (TripletMarginLoss(reducer=PerQueryReducer()), SupConLoss(reducer=PerQueryReducer())):
        assert torch.isfinite(loss_fn(x, labels))
