"""Linear warm-up over torchreid's schedulers."""

import math

import pytest
import torch

from torchreid_ext import config, get_default_config

EPOCHS, WARMUP = 12, 4
ALONE = {
    "none": lambda epoch: 1.0,
    "single_step": lambda epoch: 0.1 ** (epoch // 6),
    "multi_step": lambda epoch: 0.1 ** ((epoch >= 6) + (epoch >= 9)),
    "cosine": lambda epoch: (1 + math.cos(math.pi * epoch / EPOCHS)) / 2,
}


def scheduled(name, warmup):
    cfg = get_default_config()
    cfg.merge_from_list(["train.lr_scheduler", name, "train.max_epoch", EPOCHS, "train.warmup_epoch", warmup])
    cfg.train.stepsize = [6, 9] if name == "multi_step" else [6]
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], "lr": 3.0}], lr=0.5)
    return optimizer, config.build_scheduler(cfg, optimizer)


def epochs(optimizer, scheduler, number):
    rates = []
    for _ in range(number):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, WARMUP])
@pytest.mark.parametrize("name", ALONE)
def test_the_rate_rises_linearly_and_then_follows_the_scheduler(name, warmup):
    rates = epochs(*scheduled(name, warmup), EPOCHS)
    for epoch, found in enumerate(rates):
        factor = ALONE[name](epoch) * min(1, (epoch + 1) / max(warmup, 1))
        assert found == pytest.approx([0.5 * factor, 3.0 * factor])


@pytest.mark.parametrize("name", ALONE)
def test_its_state_is_saved_and_resumed_safely(tmp_path, name):
    optimizer, scheduler = scheduled(name, WARMUP)
    wanted = epochs(optimizer, scheduler, EPOCHS)[6:]
    optimizer, scheduler = scheduled(name, WARMUP)
    epochs(optimizer, scheduler, 6)
    torch.save([optimizer.state_dict(), scheduler.state_dict()], tmp_path / "state")
    optimizer, scheduler = scheduled(name, WARMUP)
    states = torch.load(tmp_path / "state", weights_only=True)
    optimizer.load_state_dict(states[0])
    scheduler.load_state_dict(states[1])
    found = epochs(optimizer, scheduler, EPOCHS - 6)
    assert [rate for pair in found for rate in pair] == pytest.approx([rate for pair in wanted for rate in pair])


def test_a_negative_warm_up_is_refused():
    with pytest.raises(ValueError, match=r"train\.warmup_epoch must be 0 \(no warm-up\) or more, got -1"):
        scheduled("none", -1)
