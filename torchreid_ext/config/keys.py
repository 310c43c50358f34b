"""Every config key: its default, what it is for, which values it takes, and what depends on it."""

from __future__ import annotations

from dataclasses import fields
from functools import partial

import torchreid

from torchreid_ext.data.samplers import SAMPLERS
from torchreid_ext.data.splits import SetOptions
from torchreid_ext.engine.options import RunOptions
from torchreid_ext.runtime.options import Key

# What a resumed run does with another value: see ``Key.on_resume``.
_fixed, _kept, _free = (partial(Key, on_resume=word) for word in ("fixed", "kept", "free"))


# Tables, which the formatter would pull apart.
# fmt: off
def _metric_loss(section: str, name: str, weight: float) -> dict[str, Key]:
    """Keys that ``loss.drsl`` and ``loss.pml`` share."""
    keys = {
        "miner": Key({}, "miner of pytorch_metric_learning or pml_drsl: its name, or {name: CLASS, ARGUMENT: VALUE}"),
        "reducer": Key({},
            f"reducer, which turns the errors into one number, described like a miner; {{}}: the reducer of {name}"),
        "distance": Key({}, f"distance between features, described like a miner; {{}}: the distance of {name}"),
        "memory_size": Key(0, least=0,
            text="number of features of past batches to compare with (cross-batch memory), where the loss supports it"),
        "memory_start_epoch": Key(-1, least=-1,
            text="epochs at the start without the memory; -1: as many as train.warmup_epoch, and at least one"),
        "weight_m": Key(weight, f"weight of {name}", least=0),
        "weight_x": Key(1.0, "weight of the identity cross-entropy", least=0),
    }
    return {f"loss.{section}.{argument}": key for argument, key in keys.items()}


_HOSTS = tuple(torchreid.data.sampler.AVAI_SAMPLERS)

# Keys of torchreid's own default_config.py, with its defaults.
TORCHREID: dict[str, Key] = {
    "use_gpu": Key(True, "use CUDA where there is a device"),
    "model.name": _fixed("resnet50", "network, a name of torchreid's model zoo", features=True),
    "model.pretrained": Key(True, "load ImageNet weights (needs a network connection the first time)"),
    "model.load_weights": _free("", "file of weights to start from; layers that do not fit are listed and left out"),
    "model.resume": _free(
        "", "checkpoint to resume training from; auto: the newest in data.save_dir, if there is one", scores=False),
    "data.type": _fixed("image", "image or video", choices=("image", "video")),
    "data.root": Key("reid-data", "folder that holds the data sets (also --root)", scores=False),
    "data.sources": _fixed(["market1501"], "data sets to train on (also -s)"),
    "data.targets": Key(["market1501"], "data sets to test on (also -t)"),
    "data.workers": Key(4, least=-1, scores=False,
        text="loading processes of each training process, at most one for each core; -1: one for each core"),
    "data.split_id": _fixed(0, "split, for data sets that have several", least=0),
    "data.height": Key(256, "image height in pixels", least=1, features=True),
    "data.width": Key(128, "image width in pixels", least=1, features=True),
    "data.combineall": _fixed(False, "train on train, query and gallery together"),
    "data.transforms": Key(["random_flip"], may_be_empty=True,
        text="augmentations (also --transforms): random_flip, random_crop, random_patch, color_jitter, random_erase"),
    "data.k_tfm": Key(
        1, "augmented views of each image, all in one batch, which grows by this factor", least=1),
    "data.norm_mean": Key([0.485, 0.456, 0.406], "mean of each channel", features=True),
    "data.norm_std": Key([0.229, 0.224, 0.225], "standard deviation of each channel", features=True),
    "data.load_train_targets": Key(False, "also load the training images of the targets"),
    "market1501.use_500k_distractors": Key(False, "add the 500,000 distractors to the gallery"),
    "cuhk03.labeled_images": _fixed(False, "use the labeled images, not the detected ones"),
    "cuhk03.classic_split": _fixed(False, "use the split of Li et al., CVPR 2014"),
    "sampler.train_sampler": Key("RandomSampler", choices=tuple(dict.fromkeys([*SAMPLERS, *_HOSTS])),
        text="RandomIdentitySampler or MPerClassSampler (for ranking losses), RandomSampler, SequentialSampler, "
        "RandomDomainSampler or RandomDatasetSampler"),
    "sampler.train_sampler_t": Key("RandomSampler", "sampler of the targets' training images", choices=_HOSTS),
    "sampler.num_instances": Key(
        4, "images of an identity in a batch, for RandomIdentitySampler and MPerClassSampler", least=1),
    "sampler.num_cams": Key(1, "cameras in a batch, for RandomDomainSampler; 0 or less: all"),
    "sampler.num_datasets": Key(1, "data sets in a batch, for RandomDatasetSampler; 0 or less: all"),
    "video.seq_len": Key(15, "images sampled of a tracklet", least=1),
    "video.sample_method": Key("evenly", "evenly, random or all", choices=("evenly", "random", "all")),
    "video.pooling_method": Key(
        "avg", "avg or max: how the features of a tracklet's images become one feature", choices=("avg", "max")),
    "train.optim": _fixed(
        "adam", "adam, amsgrad, sgd, rmsprop or radam", choices=("adam", "amsgrad", "sgd", "rmsprop", "radam")),
    "train.lr": _kept(0.0003, "learning rate"),
    "train.weight_decay": _kept(5e-4, "weight decay"),
    "train.batch_size": Key(32, "images (or tracklets) in a batch, of all processes together", least=1),
    "train.staged_lr": _kept(False, "give layers other than new_layers a smaller learning rate"),
    "train.new_layers": _kept(["classifier"], "layers that keep the full learning rate with staged_lr"),
    "train.base_lr_mult": _kept(0.1, "factor on the learning rate of the other layers with staged_lr", least=0),
    "train.lr_scheduler": _fixed("single_step", "single_step, multi_step, cosine or none",
        choices=("single_step", "multi_step", "cosine", "none")),
    "train.stepsize": _kept([20], least=1,
        text="epochs after which the learning rate falls (multi_step); with single_step, it falls every N epochs, N "
        "the last of the list"),
    "train.gamma": _kept(0.1, "factor by which the learning rate falls", least=0),
    "train.seed": _kept(1, "seed of every random number generator"),
    "sgd.momentum": _kept(0.9, "momentum of sgd and rmsprop"),
    "sgd.dampening": _kept(0.0, "dampening of the momentum"),
    "sgd.nesterov": _kept(False, "Nesterov momentum"),
    "rmsprop.alpha": _kept(0.99, "smoothing constant"),
    "adam.beta1": _kept(0.9, "decay rate of the first moment"),
    "adam.beta2": _kept(0.999, "decay rate of the second moment"),
    "loss.name": _fixed("softmax", "softmax, triplet, drsl or pml", choices=("softmax", "triplet", "drsl", "pml")),
    "loss.softmax.label_smooth": Key(True, "smooth the labels of the identity cross-entropy (of every loss)"),
    "loss.triplet.margin": Key(0.3, "distance margin"),
    "loss.triplet.weight_t": Key(1.0, "weight of the triplet loss", least=0),
    "loss.triplet.weight_x": Key(0.0, "weight of the identity cross-entropy", least=0),
    "test.batch_size": Key(100, "images (or tracklets) in a batch", least=1, scores=False),
}

DRSL_ARGUMENTS: dict[str, Key] = {
    "temperature": Key(0.05,
        "softness of the ranks, > 0, in units of the distance, which by default is minus the cosine, from -1 to 1"),
    "sort_weight": Key(1.0, "weight of the sort error, >= 0"),
    "margin": Key(0.0, "distance by which negatives must follow positives; any finite number"),
    "bound_power": Key(0.1, kind=float,
        text="the power p, in (0, 1], of the bound of the smoothed retrieval error, a softplus of its log odds, "
        "`log(1 + odds**p) / p`; None trains the error itself, which is the definition"),
    "query_chunk_size": Key(
        None, "queries whose distances are computed at once; bounds memory, changes no value", kind=int),
    "fused": Key(True,
        "the fast path, differentiable once; double backward, `torch.func.grad` (torch 2.7 or later) and a learnable "
        "temperature or margin (a tensor) need False"),
}
"""The arguments of ``DRSLoss`` that are keys, below ``loss.drsl``."""

OURS: dict[str, Key] = {
    "model.bnneck": _fixed(False, features=True, text="batch normalisation neck: metric loss before it, cross-entropy "
        "and retrieval after it (Luo et al., TMM 2019)"),
    "model.last_stride": _fixed(2, choices=(1, 2), features=True,
        text="stride of the last stage, for networks with a layer4; 1 keeps its resolution"),
    "data.validation": _fixed(0.0,
        "share of the training identities, in (0, 1), that is taken out of training and tested on instead of the "
        "targets; 0: none"),
    "data.validation_seed": _fixed(0, "seed of the draw of the validation identities", least=0),
    "data.identities": _fixed(
        0, "number of training identities to draw before the validation identities; 0: all", least=0),
    "data.allow_overlap": Key(
        False, "allow images that are in two sources, or both in training and in the test, and people in the test on "
        "whom the weights of model.load_weights were trained"),
    "datasets": Key({}, "data sets of your own, by name: see docs/data.md"),
    "train.warmup_epoch": _fixed(
        0, "epochs at the start over which the learning rate rises linearly to its full value", least=0),
    "train.sync_batchnorm": Key(False, "several GPUs: batch normalisation over the whole batch, not over each share"),
    "train.timeout": _free(
        1800, "seconds after which a process that waits for another process gives up", least=1, scores=False),
    "loss.cross_camera": Key(False,
        "drsl and pml: leave pairs of one identity and one camera out of positives and negatives, as evaluation does"),
    **{f"loss.drsl.{name}": entry for name, entry in DRSL_ARGUMENTS.items()},
    **_metric_loss("drsl", "DRSL", 0.3),
    "loss.pml.loss": _fixed("TripletMarginLoss", "class of pytorch_metric_learning.losses, or package.module.Class"),
    "loss.pml.kwargs": Key({}, "arguments of the loss; num_classes and embedding_size are filled in"),
    "loss.pml.lr": _kept(0.0, "learning rate of the weights that the loss has, if any; 0 takes train.lr", least=0),
    **_metric_loss("pml", "the loss", 1.0),
    "test.untrained": Key(False, "test before training too, and print both results side by side", scores=False),
}


# fmt: on


KEYS: dict[str, Key] = dict(sorted((TORCHREID | OURS | RunOptions.keys()).items()))
"""Every config key."""

SET_KEYS: dict[str, Key] = {f"datasets.NAME.{each.name}": each.metadata["setting"] for each in fields(SetOptions)}
"""The options of every data set, whose name takes the place of NAME."""

OPTIONS = {key for key, entry in KEYS.items() if entry.default == {} and key != "datasets"}
"""Keys whose value is a mapping of free form."""
