"""CrossBatchMemory and SelfSupervisedLoss with DRSLoss."""

import copy
import pickle

import pytest
import torch
from batches import make_batch, make_loss
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning import miners as pml_miners
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from reference import drsl

from pml_drsl.checks import InputError
from pml_drsl.losses import DRSLoss
from pml_drsl.miners import NegativeBudgetMiner, RankViolationMiner
from pml_drsl.wrappers import CrossBatchMemory, SelfSupervisedLoss

TEMPERATURE = {"temperature": 0.1, "sort_weight": 0.3}


def batches(number, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(number)
    for _ in range(number):
        x = torch.randn(size, 4, generator=generator, dtype=torch.float64).to(dtype)
        yield x.requires_grad_(), torch.randint(0, 4, (size,), generator=generator)


@pytest.mark.parametrize("size", [1, 5, 12])
def test_memory_is_a_queue_of_references_without_the_query(size):
    memory = CrossBatchMemory(make_loss(**TEMPERATURE), 4, memory_size=12)
    queue = []  # (embedding, label), oldest first; the last `size` are the batch itself
    for x, labels in batches(9, size):
        loss = memory(x, labels)
        queue = (queue + list(zip(x.detach(), labels.tolist(), strict=True)))[-12:]
        refs = torch.stack([embedding for embedding, _ in queue])
        own = {q: len(queue) - size + q for q in range(size)}
        pairs = [(q, c) for q in range(size) for c in range(len(queue)) if c != own[q]]
        same = {(q, c) for q, c in pairs if queue[c][1] == labels[q]}
        wanted = drsl(x, same, set(pairs) - same, refs, **TEMPERATURE)
        if wanted.isnan():
            assert loss == 0
        else:
            torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-9)
            gradients = (torch.autograd.grad(value, x)[0] for value in (loss, wanted))
            torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("miner", [RankViolationMiner(0.4), NegativeBudgetMiner(1, "semihard")])
def test_memory_of_one_batch_mines_as_the_batch_does(miner):
    x, labels = make_batch(1)
    memory = CrossBatchMemory(make_loss(0.1), 5, memory_size=14, miner=miner)
    wanted = make_loss(0.1)(x, labels, miner(x, labels), x.detach().clone(), labels.clone())
    memory.queue_idx = 6  # the batch wraps around the end of the queue
    memory.has_been_filled = True
    torch.testing.assert_close(memory(x, labels), wanted)


@pytest.mark.parametrize(
    ("loss", "miner"),
    [
        (DRSLoss, None),
        (DRSLoss, pml_miners.TripletMarginMiner()),
        (DRSLoss, pml_miners.MultiSimilarityMiner()),
        (pml.TripletMarginLoss, pml_miners.TripletMarginMiner(1)),  # Some triplets have the query as its own positive.
    ],
)
def test_memory_agrees_with_pml_s(loss, miner):
    class Theirs(pml.CrossBatchMemory):
        @staticmethod
        def supported_losses():
            return ["DRSLoss", "TripletMarginLoss"]

    def memories():
        return [cls(loss(), 4, memory_size=9, miner=miner) for cls in (CrossBatchMemory, Theirs)]

    ours, theirs = memories()
    for x, labels in batches(5, 6):
        torch.testing.assert_close(ours(x, labels), theirs(x, labels))
    for given in (pml_miners.PairMarginMiner()(x, labels), pml_miners.TripletMarginMiner()(x, labels)):
        ours, theirs = memories()  # in its first batch the memory is the batch, which the given indices are of
        torch.testing.assert_close(ours(x, labels, given), theirs(x, labels, given))


class Watched(pml.ContrastiveLoss):
    """Remembers the pairs it is given, and their labels."""

    def compute_loss(self, embeddings, labels, indices_tuple, ref_emb, ref_labels):
        a1, p, a2, n = indices_tuple
        self.pairs = [(labels[a1], ref_labels[p], embeddings[a1], ref_emb[p]), (labels[a2], ref_labels[n])]
        return super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)


Watched.__name__ = "ContrastiveLoss"  # PML admits losses by name


@pytest.mark.parametrize("miner", [pml_miners.PairMarginMiner(), pml_miners.TripletMarginMiner(), RankViolationMiner()])
@pytest.mark.parametrize("of_memory", [None, RankViolationMiner(0.2)])
def test_indices_of_a_batch_are_looked_up_in_the_memory(miner, of_memory):
    memory = CrossBatchMemory(Watched(), 4, memory_size=20, miner=of_memory)
    for x, labels in batches(5, 6):
        indices = miner(x, labels)
        loss = memory(x, labels, indices)
        (query, positive, *embeddings), (other_query, negative) = memory.loss.pairs
        assert (query == positive).all() and (other_query != negative).all()
        given = lmu.convert_to_pairs(indices, labels)
        last = len(given[0])  # the given pairs come last
        torch.testing.assert_close(embeddings[0][len(query) - last :], x[given[0]])
        torch.testing.assert_close(embeddings[1][len(query) - last :], x[given[1]])
        assert torch.isfinite(loss)
        # PML's losses of pairs take lists too.
        listed = [index.tolist() for index in indices]
        assert torch.equal(make_memory_loss(x, labels, indices), make_memory_loss(x, labels, listed))


def make_memory_loss(x, labels, indices):
    memory = CrossBatchMemory(make_loss(0.1), 4, memory_size=20)
    for y, more in batches(3, 6):
        memory(y, more)
    return memory(x, labels, indices)


def test_indices_outside_the_batch_are_refused():
    memory = CrossBatchMemory(make_loss(), 4, memory_size=20)
    memory(*next(batches(1, 6)))
    index = torch.tensor([0, 1])
    with pytest.raises(InputError, match="indices from 6 to 7, outside the batch of 6 embeddings"):
        memory(*next(batches(1, 6)), (index, index + 6, index, index))


MINERS = {"none": lambda: None, "violations": lambda: RankViolationMiner(0.2), "pml": pml_miners.TripletMarginMiner}


@pytest.mark.parametrize(
    ("loss", "miner"),
    [*((make_loss, miner) for miner in MINERS), (pml.ContrastiveLoss, "none"), (pml.TripletMarginLoss, "pml")],
)
def test_during_the_warm_up_the_loss_is_that_of_the_batch(loss, miner):
    memory = CrossBatchMemory(loss(), 4, memory_size=12, miner=MINERS[miner](), warmup=2)
    later = CrossBatchMemory(loss(), 4, memory_size=12, miner=MINERS[miner]())
    for call, (x, labels) in enumerate(batches(5, 6)):
        value = memory(x, labels)
        if call < 2:
            wanted = loss()(x, labels, MINERS[miner]()(x, labels) if MINERS[miner]() else None)
            assert not memory.embedding_memory.any()
        else:
            wanted = later(x, labels)
        torch.testing.assert_close(value, wanted)
        gradients = (torch.autograd.grad(part, x, allow_unused=True)[0] for part in (value, wanted))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("warmup", [-1, 0.5, None])
def test_a_bad_warm_up_is_refused(warmup):
    with pytest.raises(InputError, match="warmup must be an integer of at least 0"):
        CrossBatchMemory(make_loss(), 4, warmup=warmup)


@pytest.mark.parametrize("warmup", [0, 1])
def test_memory_takes_a_mask_of_what_to_keep(warmup):
    x, labels = make_batch(3)
    memory = CrossBatchMemory(make_loss(0.1), 5, memory_size=14, warmup=warmup)
    keep = torch.arange(len(x)) < 8
    loss = memory(x, labels, enqueue_mask=keep)
    wanted = make_loss(0.1)(x[~keep], labels[~keep], ref_emb=x[keep].detach(), ref_labels=labels[keep])
    torch.testing.assert_close(loss, wanted)
    assert memory.embedding_memory.any() == (warmup == 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_memory_holds_embeddings_of_any_type_also_under_autocast(dtype):
    memory, under_autocast = (CrossBatchMemory(make_loss(), 4, memory_size=8) for _ in range(2))
    for x, labels in batches(3, 6, dtype):
        loss = memory(x, labels)
        loss.backward()
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.isfinite(x.grad).all()
        torch.set_autocast_enabled("cuda", True)  # Of autocast, PML looks at this flag alone.
        try:
            assert torch.equal(under_autocast(x, labels.int()), loss)
        finally:
            torch.set_autocast_enabled("cuda", False)
        assert memory.embedding_memory.dtype == under_autocast.embedding_memory.dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embeddings": torch.randn(4, 3)}, "embeddings has 3 dimensions and embedding_size 5"),
        ({"labels": torch.rand(4)}, "labels must be an integer tensor .* got torch.float32"),
        ({"labels": None}, "labels must be given"),
        ({"enqueue_mask": torch.tensor([1, 0, 1, 0])}, r"enqueue_mask must be a bool tensor of shape \(4,\).*int64"),
        ({"enqueue_mask": torch.tensor([True])}, r"enqueue_mask must be .* got torch.bool of shape \(1,\)"),
        ({"enqueue_mask": [True] * 4}, "enqueue_mask must be .* got list"),
        ({"enqueue_mask": torch.ones(4).bool(), "indices_tuple": (torch.arange(2),) * 4}, "exclude each other"),
    ],
)
def test_bad_input_of_a_memory_is_refused(arguments, message):
    for warmup in (0, 1):
        memory = CrossBatchMemory(make_loss(), 5, memory_size=8, warmup=warmup)
        with pytest.raises(InputError, match=message):
            memory(**{"embeddings": torch.randn(4, 5), "labels": torch.arange(4) // 2, **arguments})


@pytest.mark.parametrize("warmup", [0, 1])
def test_a_miner_that_takes_every_query_for_its_own_positive_is_refused(warmup):
    x, labels = make_batch(1)

    def memory(**options):
        return CrossBatchMemory(make_loss(0.1), 5, 14, pml_miners.BatchEasyHardMiner(**options), warmup)

    with pytest.raises(InputError, match='the easiest positive of a query is itself; give it pos_strategy="hard"'):
        memory()(x, labels)
    for options in ({"pos_strategy": "hard"}, {"allowed_pos_range": (1e-3, 2)}):
        assert memory(**options)(x, labels) > 0
    keep = torch.arange(14) < 8
    assert memory()(x, labels, enqueue_mask=keep) > 0


def test_memory_smaller_than_the_batch_is_refused():
    memory = CrossBatchMemory(make_loss(), 4, memory_size=5)
    with pytest.raises(ValueError, match="6 embeddings do not fit in a memory_size of 5"):
        memory(torch.randn(6, 4), torch.arange(6))
    with pytest.raises(ValueError, match="7 embeddings do not fit"):
        memory(torch.randn(8, 4), torch.arange(8), enqueue_mask=torch.arange(8) < 7)


@pytest.mark.parametrize(
    ("warmup", "before", "dtype"), [(0, 4, torch.float32), (2, 1, torch.float32), (2, 7, torch.float64)]
)
def test_a_restored_memory_goes_on_exactly(warmup, before, dtype):
    memory, fresh = (CrossBatchMemory(make_loss(0.1), 4, memory_size=12, warmup=warmup) for _ in range(2))
    for number, (x, labels) in enumerate(batches(11, 5, dtype)):
        if number == before:
            fresh.load_state_dict(memory.state_dict())
            copies = fresh, copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))
        wanted = memory(x, labels)
        if number >= before:
            assert all(torch.equal(each(x, labels), wanted) for each in copies)


@pytest.mark.parametrize("warmup", [0, 2])
def test_states_of_other_memories_can_be_loaded(warmup):
    """PML's, one with another warm-up, and one of a version that counted the calls in a buffer."""
    theirs, ours = pml.CrossBatchMemory(pml.SupConLoss(), 4, 8), CrossBatchMemory(make_loss(0.1), 4, 8, warmup=warmup)
    ((x, labels),) = batches(1, 5, torch.float32)
    theirs(x, labels)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.embedding_memory, theirs.embedding_memory) and ours.warmup_calls == 0
    other = CrossBatchMemory(make_loss(0.1), 4, 8, warmup=2 - warmup)
    other.load_state_dict(ours.state_dict())
    older = ours.state_dict() | {"warmup_calls": torch.tensor(1)}
    older["_extra_state"] = {"queue_idx": ours.queue_idx, "has_been_filled": ours.has_been_filled}
    other.load_state_dict(older)
    assert other.warmup_calls == 1
    # Scripts move and save the entries as tensors, as those of PML's memory are.
    assert all(isinstance(value, torch.Tensor) for value in ours.state_dict().values())


def test_a_memory_has_no_dictionaries_for_pml_s_record_keeper_but_pml_s_own():
    memories = CrossBatchMemory(make_loss(), 4), pml.CrossBatchMemory(pml.SupConLoss(), 4)
    ours, theirs = ({name for name, part in vars(each).items() if isinstance(part, dict) and part} for each in memories)
    assert ours == theirs


def test_storing_nothing_leaves_the_memory_empty():
    memory, fresh = (CrossBatchMemory(make_loss(0.1), 4, memory_size=12) for _ in range(2))
    ((x, labels),) = batches(1, 5)
    assert memory(x, labels, enqueue_mask=torch.zeros(5, dtype=torch.bool)) == 0
    assert memory(x[:0], labels[:0]) == 0
    assert torch.equal(memory(x, labels), fresh(x, labels))


@pytest.mark.parametrize("symmetric", [True, False])
def test_self_supervised_loss_pairs_each_image_with_its_twin(symmetric):
    x, _ = make_batch(4, size=6)
    twins = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    loss = SelfSupervisedLoss(make_loss(**TEMPERATURE), symmetric=symmetric)(x, twins)
    number = 12 if symmetric else 6
    same = {(q, (q + 6) % 12 if symmetric else q) for q in range(number)}
    pairs = {(q, c) for q in range(number) for c in range(number) if not symmetric or q != c}
    batch = torch.cat([x, twins]) if symmetric else x
    wanted = drsl(batch, same, pairs - same, None if symmetric else twins, **TEMPERATURE)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("wrapper", [CrossBatchMemory, SelfSupervisedLoss])
def test_what_pml_admits_and_refuses_stays_so(wrapper):
    arguments = {"embedding_size": 4} if wrapper is CrossBatchMemory else {}
    wrapper(pml.SupConLoss(), **arguments)
    with pytest.raises(Exception, match="not supported for SmoothAPLoss"):
        wrapper(pml.SmoothAPLoss(), **arguments)
