"""Ranking across cameras: the pairs of one identity and one camera count for nothing."""

import pytest
import reference
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import LpDistance
from toy_data import make_image_manager, make_video_manager

from pml_drsl import DRSLoss
from pml_drsl.checks import InputError
from torchreid_ext import build_engine, config, get_default_config
from torchreid_ext.data.samplers import steps_per_epoch
from torchreid_ext.engine import criteria
from torchreid_ext.engine.criteria import cross_camera_pairs

PIDS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 3])
CAMIDS = torch.tensor([0, 0, 1, 2, 0, 1, 1, 0, 0, 1])

TAKING_PAIRS = sorted(
    name
    for name, kind in criteria.TABLES["loss"].items()
    # Without the two that take angles of embeddings instead of distances.
    if not issubclass(kind, (*criteria.WITHOUT_PAIRS, losses.AngularLoss, losses.ThresholdConsistentMarginLoss))
)


def pairs():
    """The positives and negatives that evaluation would count, as sets, by a loop."""
    positives, negatives = set(), set()
    for a in range(len(PIDS)):
        for b in range(len(PIDS)):
            if PIDS[a] != PIDS[b]:
                negatives.add((a, b))
            elif CAMIDS[a] != CAMIDS[b]:
                positives.add((a, b))
    return positives, negatives


def embeddings(dtype=torch.float64):
    return torch.randn(len(PIDS), 8, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_all_pairs():
    a1, p, a2, n = cross_camera_pairs(PIDS, CAMIDS)
    assert (set(zip(a1.tolist(), p.tolist(), strict=True)), set(zip(a2.tolist(), n.tolist(), strict=True))) == pairs()
    assert len(a1) == len(pairs()[0]) and len(a2) == len(pairs()[1])


def test_value_and_gradient_are_those_of_the_reduced_pairs():
    x, y = embeddings(), embeddings()
    criterion = DRSLoss(0.1, 0.3, bound_power=None, distance=LpDistance())
    loss = criterion(x, PIDS, cross_camera_pairs(PIDS, CAMIDS))
    wanted = reference.drsl(y, *pairs(), temperature=0.1, sort_weight=0.3)
    torch.testing.assert_close(loss, wanted, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(
        *(torch.autograd.grad(*pair)[0] for pair in ((loss, x), (wanted, y))), atol=1e-9, rtol=1e-9
    )


def distance_gradient(name, pairs):
    """Of a loss of some pairs, by the distances of all pairs of the batch, shape (10, 10)."""
    criterion = criteria.build("loss", {"name": name}, criteria.TABLES["loss"])
    matrices = []
    # DRSLoss computes a distance itself, unless the distance collects statistics.
    criterion.distance.collect_stats = True
    criterion.distance.register_forward_hook(lambda _, __, mat: mat.retain_grad() or matrices.append(mat))
    # Identities that are not apart yet: every pair has something to say.
    x = torch.randn(len(PIDS), 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    criterion(x, PIDS, pairs).backward()
    (matrix,) = matrices
    return matrix.grad


def test_the_gradient_of_a_same_camera_pair_is_zero():
    same_camera = (PIDS[:, None] == PIDS) & (CAMIDS[:, None] == CAMIDS)
    other_camera = (PIDS[:, None] == PIDS) & ~same_camera
    for name in TAKING_PAIRS:
        torch.manual_seed(0)
        gradient = distance_gradient(name, cross_camera_pairs(PIDS, CAMIDS))
        assert bool((gradient[same_camera] == 0).all()), name
        assert bool((gradient[other_camera] != 0).any()), name
        assert bool((gradient[PIDS[:, None] != PIDS] != 0).any()), name
        # What it would be otherwise.
        assert bool((distance_gradient(name, None)[same_camera] != 0).any()), name


def test_without_distances_a_same_camera_pair_is_not_drawn_together():
    pids, camids = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1])
    criterion = losses.ThresholdConsistentMarginLoss(lambda_minus=0)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    criterion(x, pids, cross_camera_pairs(pids, camids)).backward()
    assert bool((x.grad[:2] == 0).all()) and bool((x.grad[2:] != 0).all())


@pytest.mark.parametrize("name", ["ContrastiveLoss", "SupConLoss", "TripletMarginLoss", "DRSLoss"])
def test_a_batch_of_one_camera_has_no_gradient(name):
    criterion = criteria.build("loss", {"name": name}, criteria.TABLES["loss"])
    x = embeddings()
    loss = criterion(x, PIDS, cross_camera_pairs(PIDS, torch.zeros_like(PIDS)))
    (gradient,) = torch.autograd.grad(loss, x)
    if name == "ContrastiveLoss":
        # Its negatives need no positives: the same as with the negatives alone.
        a, n = (torch.tensor(column) for column in zip(*pairs()[1], strict=True))
        y = embeddings()
        alone = criterion(y, PIDS, (a[:0], n[:0], a, n))
        torch.testing.assert_close(gradient, torch.autograd.grad(alone, y)[0])
    else:
        assert bool((gradient == 0).all())


@pytest.mark.parametrize("miner", [miners.BatchHardMiner(), miners.MultiSimilarityMiner(), miners.TripletMarginMiner()])
def test_what_a_miner_chose_is_filtered(miner):
    x = embeddings()
    mined = miner(x, PIDS)
    kept = cross_camera_pairs(PIDS, CAMIDS, mined)
    assert len(kept) == len(mined)
    same = [(int(PIDS[a]), int(CAMIDS[a])) == (int(PIDS[b]), int(CAMIDS[b])) for a, b in zip(*mined[:2], strict=True)]
    assert any(same) and not all(same)
    wanted = [
        pair for pair, gone in zip(zip(*(t.tolist() for t in mined[:2]), strict=True), same, strict=True) if not gone
    ]
    assert list(zip(*(t.tolist() for t in kept[:2]), strict=True)) == wanted
    if len(mined) == 4:
        assert torch.equal(kept[2], mined[2]) and torch.equal(kept[3], mined[3])
    else:
        assert kept[2].tolist() == [int(n) for n, gone in zip(mined[2], same, strict=True) if not gone]


def configured(*words):
    cfg = get_default_config()
    cfg.merge_from_list(["model.name", "osnet_x0_25", "model.pretrained", "False", "use_gpu", "False"])
    cfg.merge_from_list(["data.height", 64, "data.width", 32, "loss.cross_camera", "True", *words])
    return cfg


def built(cfg, manager):
    model = config.build_model(cfg, manager.num_train_pids)
    criterion = config.build_criterion(cfg, model, manager.num_train_pids, steps_per_epoch(manager))
    return build_engine(cfg, manager, model, config.build_optimizer(cfg, model, criterion), None, criterion)


@pytest.mark.parametrize("data_type", ["image", "video"])
def test_an_engine_gives_the_cameras_of_its_images(tmp_path, data_type):
    manager = (make_image_manager if data_type == "image" else make_video_manager)(tmp_path)
    engine = built(configured("loss.name", "drsl", "data.type", data_type), manager)
    seen = []
    criterion = engine.criterion.forward
    engine.criterion.forward = lambda x, pids, indices: seen.append((pids, indices)) or criterion(x, pids, indices)
    data = next(iter(engine.train_loader))
    engine.set_model_mode("train")
    engine.forward_backward(data)
    ((pids, indices),) = seen
    # Each frame of a tracklet has its tracklet's identity and camera.
    frames = 1 if data_type == "image" else 3
    camids = [int(camid) for camid in data["camid"] for _ in range(frames)]
    assert pids.tolist() == [int(pid) for pid in data["pid"] for _ in range(frames)]
    wanted = {
        (a, b) for a in range(len(pids)) for b in range(len(pids)) if pids[a] == pids[b] and camids[a] != camids[b]
    }
    assert set(zip(*(t.tolist() for t in indices[:2]), strict=True)) == wanted


def test_one_camera_for_every_identity_is_refused(tmp_path):
    manager = make_image_manager(tmp_path)
    items = manager.train_loader.dataset.train
    items[:] = [(path, pid, pid % 2, *rest) for path, pid, _, *rest in items]
    with pytest.raises(InputError, match="every training identity has one camera"):
        built(configured("loss.name", "drsl"), manager)
    items[0] = (*items[0][:2], 7, *items[0][3:])
    built(configured("loss.name", "drsl"), manager)
