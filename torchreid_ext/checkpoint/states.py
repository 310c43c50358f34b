"""Collects the state of a run for a checkpoint, checks that it fits another start of the run, and restores it."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_metric_learning.losses import CrossBatchMemory
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pml_drsl.checks import InputError
from pml_drsl.large_batch import copied_buffers, put_back_buffers
from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.data.loading import names_of
from torchreid_ext.runtime import distributed, generators

NO_BEST = {"mAP": -1.0, "epoch": -1}
# Keys of what is tested, and how: with another value, an earlier best score is no standard.
_MEASURE = (
    "cuhk03.use_metric_cuhk03", "data.height", "data.norm_mean", "data.norm_std", "data.targets", "data.width",
    "market1501.use_500k_distractors", "test.dist_metric", "test.normalize_feature", "video.pooling_method",
    "video.sample_method", "video.seq_len",
)  # fmt: skip
_NEW_RUN = "start a new run in another data.save_dir, from these weights with model.load_weights"


def of_engine(engine: Any, epoch: int) -> dict[str, Any]:
    """The state of an engine after ``epoch`` epochs, by torchreid's names where it has some; ``copied`` copies it."""
    first, *others = engine.get_model_names()
    return _of_parts(engine, first) | {
        "epoch": epoch,
        "rank1": engine.rank1,
        "training": {
            "others": {name: _of_parts(engine, name) for name in others},
            "losses": {name: loss.state_dict() for name, loss in losses_of(engine).items()},
            "memories": {name: _memory_fills(loss) for name, loss in losses_of(engine).items()},
            "scaler": engine.stepper.scaler.state_dict(),
            "sampler": _of_sampler(engine),
            "generators": generators.state(),
            "best": dict(engine.best),
            "skipped": engine.skipped,
            "host_epochs": engine.host_epochs,
            "num_train_pids": engine.datamanager.num_train_pids,
            "training_set": engine.training_set,
            "people": engine.people,
            "config": engine.config,
            "processes": distributed.size(),
        },
    }


def restore_engine(engine: Any, state: dict[str, Any], path: str) -> None:
    """Restores the state that ``of_engine`` returned, but for the part of ``restore_randomness``; of a checkpoint of
    torchreid, only weights, optimizer and scheduler, of further models from the files beside it. Raises InputError if a
    part is missing or does not fit; call it inside ``checkpoint.fitting``, as a checkpoint may hold anything."""
    first, *others = engine.get_model_names()
    checkpoint.restore(state, _parts(engine, first), path)
    engine.rank1 = float(state.get("rank1", 0))
    engine.people = sorted({*engine.people, *checkpoint.people_of(state)})
    if (training := state.get("training")) is None:
        engine.host_epochs = int(state["epoch"])
        for name in others:
            # torchreid saves every model in a folder of its own, below the same name.
            file = Path(path).absolute().parent.parent / name / Path(path).name
            saved = distributed.from_first(functools.partial(_of_torchreid, file, name, path))
            checkpoint.restore(saved, _parts(engine, name), file)
    else:
        for name in others:
            checkpoint.restore(training["others"].get(name, {}), _parts(engine, name), path)
        # What has no state need not be in the checkpoint: another version may have trained without it.
        losses = {name: loss for name, loss in losses_of(engine).items() if loss.state_dict()}
        checkpoint.restore(training["losses"], losses, path)
        for name, loss in losses.items():
            for part, memory in _memories(loss).items():
                vars(memory).update(training["memories"][name][part])
        best = training["best"]
        engine.best = {"mAP": float(best["mAP"]), "epoch": int(best["epoch"])}
        before, now = training["config"] or {}, engine.config
        measure = (*_MEASURE, *(f"datasets.{name}" for name in now.get("data.targets", ())))
        if any(before[key] != now[key] for key in measure if key in before and key in now):
            engine.best = dict(NO_BEST)
        engine.skipped = int(training["skipped"])
        engine.host_epochs = int(training.get("host_epochs", 0))  # older checkpoints do not have it
    if name := not_finite(engine):
        raise InputError(f"checkpoint {path!r}: {name} is not finite; resume from an earlier checkpoint")


def check_fits(engine: Any, state: dict[str, Any], path: str, test_only: bool) -> None:
    """Checks that a checkpoint fits this run, and prints the differences between their configurations. Raises
    InputError for another number of identities, as ``compare``, or (unless ``test_only``) for other training images."""
    training = state.get("training")
    if training is None:
        print(f"'{path}' was saved by torchreid and has no random state: training goes on, but not exactly as before")
        return
    before, now = training["num_train_pids"], engine.datamanager.num_train_pids
    if before != now:
        cure = f"give the data.sources of that run, or {_NEW_RUN}"
        if test_only:
            cure = "to test its weights on other data, give model.load_weights in place of model.resume"
        raise InputError(f"'{path}' was trained on {before} identities, and the sources have {now}: {cure}")
    images = training.get("training_set")  # older checkpoints do not have it
    if images and engine.training_set and images != engine.training_set:
        other = f"'{path}' was trained on other images, or gave identities other numbers"
        if not test_only:
            raise InputError(f"{other}: bring back the images it was trained on, or {_NEW_RUN}")
        print(f"{other}: this test may show people that it was trained on")
    # Older checkpoints, all from runs of one process, do not have this field.
    processes = training.get("processes", 1)
    if processes != distributed.size() and not test_only:
        counts = f"'{path}' was trained by {processes} processes, and this run has {distributed.size()}"
        print(f"{counts}: training goes on, but not exactly as before")
    if engine.config and training["config"]:
        for line in compare(training["config"], engine.config, engine.on_resume):
            print(f"Config differs from the checkpoint's: {line}")


def compare(saved: dict[str, Any], current: dict[str, Any], on_resume: dict[str, str]) -> list[str]:
    """A line for each dotted key whose value differs between the configurations of a checkpoint and of this run; for
    ``on_resume`` see ``torchreid_ext.runtime.options.Key``. Raises InputError if keys differ that cannot change."""
    on_resume = on_resume | {f"datasets.{name}": "fixed" for name in saved.get("data.sources", [])}
    if saved.get("train.lr_scheduler") == "cosine":
        # After its last epoch, the cosine would rise again.
        on_resume["train.max_epoch"] = "fixed"
    lines, refused = [], []
    for key in sorted(saved.keys() | current.keys()):
        before, now, effect = saved.get(key), current.get(key), on_resume.get(key)
        if before == now or effect == "free":
            continue
        line = f"{key}: {before!r} -> {now!r}"
        # A key that the checkpoint lacks is newer than the checkpoint; by default it changes nothing.
        if effect == "fixed" and key in saved:
            refused.append(line)
        else:
            lines.append(line + (" (the checkpoint's is kept)" if effect == "kept" else ""))
    if refused:
        raise InputError(f"cannot resume with another {'; '.join(refused)}. Set it back, or {_NEW_RUN}")
    return lines


def not_finite(engine: Any) -> str | None:
    """The name of a weight or buffer of a model, or a weight of a loss, that is NaN or infinite; None if all are
    finite."""
    # Models may have weights of the same names.
    tensors = [item for model in engine._models.values() for item in model.state_dict().items()]
    for loss_name, loss in losses_of(engine).items():
        tensors += [(f"{loss_name}.{name}", value) for name, value in loss.named_parameters()]
    return next((name for name, value in tensors if not torch.isfinite(value).all()), None)


def restore_randomness(engine: Any, state: dict[str, Any], path: str) -> None:
    """Restores the generators, the sampler and the gradient scaler, right before training goes on. Raises InputError if
    a part is missing or does not fit."""
    if (training := state.get("training")) is None:
        return
    with checkpoint.fitting(path):
        if training["scaler"] and engine.stepper.scaler.is_enabled():
            engine.stepper.scaler.load_state_dict(training["scaler"])
        (sampler, generator), saved = _sampler(engine), training["sampler"]
        if "state_dict" in saved and hasattr(sampler, "load_state_dict"):
            sampler.load_state_dict(saved["state_dict"])
        elif "generator" in saved and isinstance(generator, torch.Generator):
            generator.set_state(saved["generator"])
        generators.restore(training["generators"])


def losses_of(engine: Any) -> dict[str, nn.Module]:
    """The losses of an engine: all its modules except its models."""
    models = {id(model) for model in engine._models.values()}
    return {name: part for name, part in vars(engine).items() if isinstance(part, nn.Module) and id(part) not in models}


def keep_buffers(modules: list[nn.Module]) -> Callable[[], None]:
    """Copies the buffers that a forward pass changes (statistics, memories); returns a function that restores them."""
    kept = [(copied_buffers(each), _memory_fills(each)) for each in modules]

    def restore() -> None:
        for module, (buffers, fills) in zip(modules, kept, strict=True):
            put_back_buffers(module, buffers)
            for name, memory in _memories(module).items():
                vars(memory).update(fills[name])

    return restore


def copied(state: Any) -> Any:
    """A copy of a state on the CPU, which training does not change."""
    tensors = (part for part in tree_leaves(state) if isinstance(part, Tensor))
    # deepcopy takes these for copies that it has made already, and keeps the types of all dictionaries.
    return copy.deepcopy(state, {id(part): part.detach().to("cpu", copy=True) for part in tensors})


def digest(items: list[Any]) -> str:
    """A digest of training images, by their ``names_of``, and their identities, in any order."""
    lines = ["\0".join([str(item[1]), *name]) for item, name in zip(items, names_of(items), strict=True)]
    text = "\n".join(sorted(lines))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def _of_torchreid(file: Path, name: str, path: str) -> dict[str, Any]:
    """The checkpoint of another model of the engine, which torchreid saved beside that of the first one in ``path``."""
    if not file.is_file():
        one = f"'{path}' was saved by torchreid and holds one model"
        raise InputError(f"{one}: '{file}', which holds {name!r}, is missing; restore it")
    return checkpoint.load(file)


def _parts(engine: Any, name: str) -> dict[str, Any]:
    parts = {"state_dict": engine._models, "optimizer": engine._optims, "scheduler": engine._scheds}
    return {kind: named[name] for kind, named in parts.items() if named[name] is not None}


def _of_parts(engine: Any, name: str) -> dict[str, Any]:
    return {
        kind: (distributed.unwrapped(part) if isinstance(part, nn.Module) else part).state_dict()
        for kind, part in _parts(engine, name).items()
    }


def _memories(module: nn.Module) -> dict[str, CrossBatchMemory]:
    return {name: part for name, part in module.named_modules() if isinstance(part, CrossBatchMemory)}


def _memory_fills(module: nn.Module) -> dict[str, dict[str, Any]]:
    # None of these is a buffer, and PML's own memory does not have them in its state_dict. Only ours has a warm-up.
    names = ("queue_idx", "has_been_filled", "warmup_calls")
    return {
        part: {name: vars(memory)[name] for name in names if name in vars(memory)}
        for part, memory in _memories(module).items()
    }


def _of_sampler(engine: Any) -> dict[str, Any]:
    # Most samplers draw from the global generators and have no state.
    sampler, generator = _sampler(engine)
    if hasattr(sampler, "state_dict"):
        return {"state_dict": sampler.state_dict()}
    return {"generator": generator.get_state()} if isinstance(generator, torch.Generator) else {}


def _sampler(engine: Any) -> tuple[Any, Any]:
    """The sampler inside ``SeededBatches`` and, unless it has a state itself, torch's ``BatchSampler``, and its
    generator, if it has one."""
    batches = engine.train_loader.batch_sampler.batches
    has_state = hasattr(batches, "state_dict") or isinstance(getattr(batches, "generator", None), torch.Generator)
    sampler = batches if has_state else getattr(batches, "sampler", batches)
    return sampler, getattr(sampler, "generator", None)
