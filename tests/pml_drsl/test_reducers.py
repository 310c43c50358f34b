import inspect

import pytest
import torch
from batches import make_batch, make_loss
from pytorch_metric_learning import losses as pml_losses
from pytorch_metric_learning import reducers as pml_reducers
from pytorch_metric_learning.reducers import AvgNonZeroReducer, DivisorReducer, PerAnchorReducer, SumReducer
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu

from pml_drsl.reducers import PerIdentityReducer, PerQueryReducer


def info(losses, indices, kind):
    return {"loss": {"losses": losses, "indices": indices, "reduction_type": kind}}


@pytest.mark.parametrize("kind", ["triplet", "element"])
def test_averages_by_query_then_over_queries_with_a_loss(kind):
    losses = torch.tensor([1.0, 3.0, 10.0, 4.0], requires_grad=True)
    query = torch.tensor([4, 4, 2, 4])
    other = torch.tensor([100, 200, 300, 400])  # references may outnumber the batch
    indices = query if kind == "element" else (query, other, other)
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
    assert PerQueryReducer(DivisorReducer())(losses, embeddings, None).item() == 2
    mean = pml_reducers.MeanReducer(collect_stats=True)
    assert PerQueryReducer(mean)(losses, embeddings, None).item() == 2
    assert mean.losses_size == 2


def test_what_is_no_reducer_is_refused():
    with pytest.raises(ValueError, match=r"reducer must be one of .*, got 'mean'"):
        PerQueryReducer("mean")


@pytest.mark.parametrize("losses", [0, torch.zeros(0)])
def test_no_loss_at_all_is_a_zero_that_goes_backward(losses):
    embeddings = torch.randn(3, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    reduced = PerQueryReducer()(info(losses, (none, none), "pos_pair"), embeddings, None)
    reduced.backward()
    assert reduced.item() == 0
    assert (embeddings.grad == 0).all()


PML_LOSSES = {
    "TripletMarginLoss": pml_losses.TripletMarginLoss,
    "ContrastiveLoss": pml_losses.ContrastiveLoss,
    "SupConLoss": pml_losses.SupConLoss,
    "LiftedStructureLoss": pml_losses.LiftedStructureLoss,
    "ProxyAnchorLoss of few classes": lambda reducer: pml_losses.ProxyAnchorLoss(4, 5, reducer=reducer),
    "ProxyAnchorLoss of more classes than images": lambda reducer: pml_losses.ProxyAnchorLoss(20, 5, reducer=reducer),
}


@pytest.mark.parametrize("name", PML_LOSSES)
def test_serves_the_losses_of_pml(name):
    x, labels = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)), torch.arange(12) // 3
    found = []
    # All queries and all identities have equally many losses, so that both reducers give one mean.
    kinds = [PerQueryReducer, PerIdentityReducer][: 1 if name.startswith("Proxy") else 2]
    for reducer in (pml_reducers.DoNothingReducer(), *(kind() for kind in kinds)):
        torch.manual_seed(1)  # of the proxies
        found.append(PML_LOSSES[name](reducer=reducer)(x, labels))
    wanted = 0.0
    for part in found[0].values():
        query = part["indices"] if part["reduction_type"] == "element" else part["indices"][0]
        by_query = {}
        for index, loss in zip(query.tolist(), part["losses"].flatten().tolist(), strict=True):
            by_query.setdefault(index, []).append(loss)
        wanted += sum(sum(each) / len(each) for each in by_query.values()) / len(by_query)
    assert wanted > 0
    assert [value.item() for value in found[1:]] == pytest.approx([wanted] * len(kinds), rel=1e-5)


@pytest.mark.parametrize("reducer", [PerQueryReducer(), PerQueryReducer(SumReducer()), PerIdentityReducer()])
def test_many_losses_in_half_precision_keep_their_number_and_their_sum(reducer):
    query, label = torch.zeros(3000, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    for kind, indices in (("element", query), ("pos_pair", (query, torch.arange(3000)))):
        losses = torch.ones(3000, dtype=torch.bfloat16, requires_grad=True)
        reduced = reducer(info(losses, indices, kind), torch.zeros(1, 2, dtype=losses.dtype), label)
        reduced.backward()
        assert reduced.item() == pytest.approx(1, abs=1e-5)
        torch.testing.assert_close(losses.grad, torch.full_like(losses, 1 / 3000))


@pytest.mark.parametrize("kind", ["pos_pair", "element"])
def test_every_identity_weighs_the_same(kind):
    losses = torch.tensor([1.0, 3.0, 10.0, 4.0, 7.0], requires_grad=True)
    query = torch.tensor([4, 4, 2, 0, 4])
    labels = torch.tensor([-5, 9, 9, 9, -5])  # queries 0 and 4 are of one identity, 2 of another
    indices = query if kind == "element" else (query, torch.arange(100, 105))
    reduced = PerIdentityReducer()(info(losses, indices, kind), torch.randn(5, 2), labels)
    assert reduced.item() == pytest.approx((((1 + 3 + 7) / 3 + 4) / 2 + 10) / 2)
    reduced.backward()
    torch.testing.assert_close(losses.grad, torch.tensor([1 / 12, 1 / 12, 1 / 2, 1 / 4, 1 / 12]))


def test_per_identity_without_labels_is_refused():
    x, labels = make_batch(1)
    with pytest.raises(ValueError, match="PerIdentityReducer needs labels"):
        make_loss(reducer=PerIdentityReducer())(x, None, lmu.get_all_pairs_indices(labels))


def test_per_identity_of_no_loss_is_zero():
    x = torch.randn(4, 3, requires_grad=True)
    loss = make_loss(reducer=PerIdentityReducer())(x, torch.arange(4))
    loss.backward()
    assert loss == 0


# PML's reducers: what each makes of the errors, computed by hand from the errors themselves.


def by_query(errors, query):
    return torch.stack([errors[query == q].mean() for q in query.unique()])


REDUCERS = {
    "AvgNonZeroReducer": (pml_reducers.AvgNonZeroReducer(), lambda e, q, y: e[e > 0].mean()),
    "ClassWeightedReducer": (
        pml_reducers.ClassWeightedReducer(torch.tensor([1.0, 5.0, 0.5])),
        lambda e, q, y: (e * torch.tensor([1.0, 5.0, 0.5])[y[q]]).mean(),
    ),
    "DivisorReducer": (pml_reducers.DivisorReducer(), lambda e, q, y: e.sum() / len(e)),
    "MeanReducer": (pml_reducers.MeanReducer(), lambda e, q, y: e.mean()),
    "MultipleReducers": (
        pml_reducers.MultipleReducers({}, default_reducer=SumReducer()),
        lambda e, q, y: e.sum(),
    ),
    # the queries without an error count too, as 0
    "PerAnchorReducer": (PerAnchorReducer(), lambda e, q, y: by_query(e, q).sum() / len(y)),
    "SumReducer": (SumReducer(), lambda e, q, y: e.sum()),
    "ThresholdReducer": (pml_reducers.ThresholdReducer(low=0.1, high=0.5), None),
    "DoNothingReducer": (pml_reducers.DoNothingReducer(), None),
}


def test_all_of_pml_s_reducers_are_tried():
    classes = {name for name, value in vars(pml_reducers).items() if inspect.isclass(value)}
    assert classes - {"BaseReducer"} == set(REDUCERS)


@pytest.mark.parametrize("name", REDUCERS)
def test_every_reducer_works_behind_drsl(name):
    reducer, by_hand = REDUCERS[name]
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 0, 2])
    raw = make_loss(0.1, reducer=pml_reducers.DoNothingReducer())(x, labels)
    assert list(raw) == ["retrieval_loss", "sort_loss"]
    reduced = make_loss(0.1, reducer=reducer)(x, labels)
    if name == "DoNothingReducer":
        return
    if name == "ThresholdReducer":
        errors = [sub["losses"] for sub in raw.values()]
        wanted = sum(e[(e > 0.1) & (e < 0.5)].mean() if ((e > 0.1) & (e < 0.5)).any() else 0 for e in errors)
    else:
        wanted = sum(by_hand(sub["losses"], sub["indices"][0], labels) for sub in raw.values())
    torch.testing.assert_close(reduced, wanted)
    reduced.backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().sum() > 0


def test_class_weights_belong_to_labels_of_any_integer_type():
    x, labels = torch.randn(8, 4), torch.tensor([1, 1, 3, 3, 5, 5, 7, 7])
    loss_fn = make_loss(reducer=PerQueryReducer(pml_reducers.ClassWeightedReducer(torch.arange(8.0))))
    assert torch.equal(loss_fn(x, labels.to(torch.uint8)), loss_fn(x, labels))


@pytest.mark.parametrize(
    ("reducer", "labels", "message"),
    [
        (PerAnchorReducer(), [0, 0, 1, 1], "PerAnchorReducer has no room for 6 references of 4 embeddings"),
        (pml_reducers.ClassWeightedReducer(torch.ones(1)), [0, 0, 1, 1], "weights for the labels 0 to 0.* from 0 to 1"),
        (pml_reducers.ClassWeightedReducer(torch.ones(2)), [0, 0, -1, -1], "from -1 to 0"),
        (pml_reducers.ClassWeightedReducer(torch.ones(2)), None, "ClassWeightedReducer needs labels"),
        (PerQueryReducer(pml_reducers.ClassWeightedReducer(torch.ones(1))), [0, 0, 1, 1], "labels 0 to 0"),
    ],
)
def test_what_would_fail_obscurely_is_refused(reducer, labels, message):
    x, ref = torch.randn(4, 3), torch.randn(6, 3)
    labels = None if labels is None else torch.tensor(labels)
    indices = lmu.get_all_pairs_indices(torch.tensor([0, 0, 1, 1]), torch.arange(6) // 3)
    with pytest.raises(ValueError, match=message):
        make_loss(reducer=reducer)(x, labels, indices, ref, torch.arange(6) // 3)
