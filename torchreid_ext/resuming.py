"""What becomes of a run that is resumed with another configuration."""

from __future__ import annotations

from typing import Any

# What the checkpoint was trained as: with another value its weights, or its optimizer's state, mean something else.
FIXED = {
    "model.name", "data.type", "data.sources", "data.split_id", "data.combineall", "cuhk03.labeled_images",
    "cuhk03.classic_split", "model.bnneck", "model.last_stride", "loss.name", "loss.pml.loss", "train.optim",
    "train.lr_scheduler", "train.warmup_epoch",
}  # fmt: skip

# What the optimizer's, the scheduler's or the generators' state holds, so that a new value does nothing.
KEPT = {
    "train.lr", "train.weight_decay", "train.staged_lr", "train.new_layers", "train.base_lr_mult", "train.stepsize",
    "train.gamma", "train.seed", "loss.pml.lr", "sgd.momentum", "sgd.dampening", "sgd.nesterov", "rmsprop.alpha",
    "adam.beta1", "adam.beta2",
}  # fmt: skip

# What says where a run starts from, or how it is shown, and is no part of the training.
FREE = {"model.resume", "model.load_weights", "data.save_dir", "train.print_freq", "test.evaluate"}


def compare(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """A line for each key whose value differs between the configurations of a checkpoint and of this run.

    Args:
        saved: of the checkpoint, flat: dotted key and value.
        current: of this run.

    Raises:
        ValueError: naming those that cannot change.
    """
    fixed = FIXED | {f"datasets.{name}" for name in saved.get("data.sources", [])}
    if saved.get("train.lr_scheduler") == "cosine":
        # Beyond the epoch it was made for, the cosine would rise again.
        fixed.add("train.max_epoch")
    lines, refused = [], []
    for key in sorted(saved.keys() | current.keys()):
        before, now = saved.get(key), current.get(key)
        if before == now or key in FREE:
            continue
        line = f"{key}: {before!r} -> {now!r}"
        if key in fixed:
            refused.append(line)
        else:
            lines.append(line + (" (the checkpoint's is kept)" if key in KEPT else ""))
    if refused:
        raise ValueError(
            f"cannot resume with another {'; '.join(refused)}. Set it back, or start anew in another data.save_dir, "
            f"from these weights with model.load_weights"
        )
    return lines
