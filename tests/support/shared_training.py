"""Trains small networks in several ways and saves what they end with; alone, or in several processes.

The network has no batch normalisation, which sees the share of a process and not the whole batch; and no dropout,
but where a run is resumed.
"""

import torch
import torchreid
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import CosineSimilarity
from torch import nn
from toy_data import make_image_manager, make_video_manager

from pml_drsl.losses import DRSLoss
from pml_drsl.miners import RankViolationMiner
from pml_drsl.wrappers import CrossBatchMemory
from torchreid_ext.checkpoint import states
from torchreid_ext.engine import engines
from torchreid_ext.engine.epoch import EpochLog
from torchreid_ext.runtime import distributed
from torchreid_ext.runtime.generators import seed_everything

BATCH, CLASSES, FEATURES = 12, 6, 16


class Network(nn.Module):
    def __init__(self, dtype, returns="both", dropout=0):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(FEATURES, dtype=dtype) if dropout else nn.Identity()
        self.returns = returns
        self.stem = nn.Conv2d(3, 4, 5, stride=4, dtype=dtype)
        self.body = nn.Sequential(nn.GroupNorm(2, 4, dtype=dtype), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.classifier = nn.Linear(FEATURES, CLASSES, dtype=dtype)

    def forward(self, images):
        features = self.norm(self.dropout(self.body(self.stem(images.to(self.stem.weight.dtype)))))
        if not self.training:
            return features
        logits = self.classifier(features)
        return logits if self.returns == "logits" else (logits, features)


CASES = {
    "drsl": {},
    "float32": {"dtype": torch.float32},
    "drsl without cross-entropy": {"weight_x": 0},
    "miner and cameras": {"miner": RankViolationMiner(0.3), "cross_camera": True},
    "random miner": {"criterion": lambda: losses.TripletMarginLoss(), "miner": miners.DistanceWeightedMiner()},
    "weights": {"criterion": lambda: losses.ArcFaceLoss(CLASSES, FEATURES)},
    "proxies": {"criterion": lambda: losses.ProxyAnchorLoss(CLASSES, FEATURES), "weight_x": 0},
    "memory that starts later": {"criterion": lambda: CrossBatchMemory(DRSLoss(), FEATURES, 20, warmup=1)},
    "several losses": {"criterion": lambda: losses.MultipleLosses([losses.SupConLoss(), losses.ContrastiveLoss()])},
    "fixed base": {"run": {"fixbase_epoch": 1, "open_layers": "classifier"}},
    "a loss that is not finite": {"run": {"skip_nonfinite": True}},
    "two views of each image": {
        # Two equal views have a Euclidean distance of 0, which rounding makes 1e-8.
        "criterion": lambda: CrossBatchMemory(DRSLoss(distance=CosineSimilarity()), FEATURES, 40),
        "views": 2,
    },
    "chunks": {"miner": RankViolationMiner(0.3), "run": {"chunk_size": 3}},
    "chunks without cross-entropy": {"weight_x": 0, "run": {"chunk_size": 1}},
    "chunks and weights": {"criterion": lambda: losses.ArcFaceLoss(CLASSES, FEATURES), "run": {"chunk_size": 3}},
    "chunks of tracklets": {"engine": engines.VideoDRSLEngine, "run": {"chunk_size": 3}},
    "softmax": {"engine": engines.ImagePMLEngine, "weight_m": 0},
    "triplet": {"engine": engines.ImagePMLEngine, "criterion": torchreid.losses.TripletLoss, "weight_x": 0.5},
    "triplet without cross-entropy": {
        "engine": engines.ImagePMLEngine,
        "criterion": torchreid.losses.TripletLoss,
        "weight_x": 0,
    },
    "tracklets of different lengths": {"engine": engines.VideoDRSLEngine},
}
"""Arguments of the engine by name."""


def make_engine(
    folder, name, run=None, engine=engines.ImageDRSLEngine, dtype=torch.float64, dropout=0, views=1, **kwargs
):
    # Another seed for each process, to be made equal by the run.
    seed_everything(5 + distributed.rank())
    model = Network(dtype, "logits" if name == "softmax" else "both", dropout)
    criterion = kwargs.pop("criterion")().to(dtype) if "criterion" in kwargs else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    if criterion is not None:
        if any(True for _ in criterion.parameters()):
            optimizer.add_param_group({"params": list(criterion.parameters())})
        kwargs["criterion"] = criterion
    settings = {"batch_size_train": BATCH, "num_instances": 2, "transforms": ["random_flip", "random_crop"]}
    if engine is engines.VideoDRSLEngine:
        manager = make_video_manager(folder, **settings | {"sample_method": "all"})
        tracklets = manager.train_loader.dataset.train
        # So that no two processes have as many frames, of three identities each.
        tracklets[:] = [(paths[: 1 + pid % 2], pid, *rest) for paths, pid, *rest in tracklets]
    else:
        manager = make_image_manager(folder, k_tfm=views, **settings)
    trained = engine(manager, model, optimizer=optimizer, use_gpu=False, **kwargs)
    if name == "a loss that is not finite":
        spoil(trained)
    return trained


def spoil(engine):
    """One process alone, or the only one, has no finite loss in the second batch."""
    forward = engine.forward

    def spoiled(images):
        logits, features = forward(images)
        last = distributed.rank() == distributed.size() - 1
        return logits * (float("nan") if last and (engine.epoch, engine.batch_idx) == (0, 1) else 1), features

    engine.forward = spoiled


def train_all(folder):
    """By case: the summary of every step, and the state at the end."""
    found = {}
    add = EpochLog.add
    try:
        for name, case in CASES.items():
            summaries = []
            EpochLog.add = lambda log, index, summary, lr, into=summaries: into.append(summary)
            engine = make_engine(folder, name, **case)
            engine.test = lambda **_: {}
            # From here on they draw alike.
            seed_everything(7)
            for start in range(2):
                run = {"start_epoch": start, "max_epoch": start + 1, "start_eval": 9} | case.get("run", {})
                engine.run(str(folder / "log" / name), **run)
            state = states.copied(states.of_engine(engine, 2))
            training = state.pop("training")
            # Proxies and the like are in "losses", and so is a memory.
            kept = {part: training[part] for part in ("losses", "memories", "skipped")}
            found[name] = {"summaries": summaries, "state": state | kept}
    finally:
        EpochLog.add = add
    return found


def resume(folder, name="weights", dtype=torch.float64, **options):
    """The states of a run of four epochs, one that went on after two, and the random numbers of a step of each."""
    ends, drawn = [], []
    for stops in ((4,), (2, 4)):
        for stop in stops:
            engine = make_engine(folder, name, dtype=dtype, dropout=0.5, **CASES[name])
            log = str(folder.parent / str(stops))
            start = engine.resume("auto", log) if stop > stops[0] else 0
            engine.run(log, max_epoch=stop, start_epoch=start, eval_freq=2, **options)
        ends.append(states.copied(states.of_engine(engine, 4)))
        drawn.append(torch.rand(5))
    return {"ends": ends, "drawn": drawn}


def train_and_resume(folder):
    """What each of torchrun's processes does."""
    with distributed.joined(use_gpu=False, timeout=60):
        # Each writes the images it reads.
        own = folder / str(distributed.rank())
        own.mkdir()
        torch.save({"cases": train_all(own), "resumed": resume(own)}, folder / f"found{distributed.rank()}")
