"""Every config key, with its default and what it is for."""

from __future__ import annotations

import inspect
from typing import Any

import torchreid

from pml_drsl.losses import DRSLoss
from torchreid_ext.config.derived import Key, keys_of_arguments, keys_of_options
from torchreid_ext.engine.options import RunOptions

Entry = tuple[Any, str]
"""A default and an explanation."""


def _metric_loss(section: str, name: str) -> dict[str, Entry]:
    """Keys that ``loss.drsl`` and ``loss.pml`` share."""
    return {
        f"loss.{section}.miner": (
            {},
            "miner of pytorch_metric_learning or pml_drsl: its name, or {name: CLASS, ARGUMENT: VALUE}",
        ),
        f"loss.{section}.reducer": (
            {},
            f"reducer, which turns the errors into one number, described like a miner; {{}}: the reducer of {name}",
        ),
        f"loss.{section}.distance": (
            {},
            f"distance between features, described like a miner; {{}}: the distance of {name}",
        ),
        f"loss.{section}.memory_size": (
            0,
            "number of features of past batches to compare with (cross-batch memory), for losses that can",
        ),
        f"loss.{section}.memory_start_epoch": (
            -1,
            "epochs at the start without the memory; -1: as many as train.warmup_epoch, and at least one",
        ),
        f"loss.{section}.weight_m": (1.0, f"weight of {name}"),
        f"loss.{section}.weight_x": (1.0, "weight of the identity cross-entropy"),
    }


# Keys of torchreid's own default_config.py, with its defaults.
TORCHREID: dict[str, Entry] = {
    "use_gpu": (True, "use CUDA where there is a device"),
    # model
    "model.name": ("resnet50", "network, a name of torchreid's model zoo"),
    "model.pretrained": (True, "load ImageNet weights (needs a network connection the first time)"),
    "model.load_weights": (
        "",
        "file of weights to start from; layers that do not fit are listed and left out",
    ),
    "model.resume": ("", "checkpoint to resume training from; auto: the newest in data.save_dir, if there is one"),
    # data
    "data.type": ("image", "image or video"),
    "data.root": ("reid-data", "folder that holds the data sets (also --root)"),
    "data.sources": (["market1501"], "data sets to train on (also -s)"),
    "data.targets": (["market1501"], "data sets to test on (also -t)"),
    "data.workers": (4, "loading processes of each training process, at most one for each core; -1: one for each core"),
    "data.split_id": (0, "split, for data sets that have several"),
    "data.height": (256, "image height in pixels"),
    "data.width": (128, "image width in pixels"),
    "data.combineall": (False, "train on train, query and gallery together"),
    "data.transforms": (
        ["random_flip"],
        "augmentations (also --transforms): random_flip, random_crop, random_patch, color_jitter, random_erase",
    ),
    "data.k_tfm": (1, "augmented views of each image, all in one batch, which has as many times more images"),
    "data.norm_mean": ([0.485, 0.456, 0.406], "mean of each channel"),
    "data.norm_std": ([0.229, 0.224, 0.225], "standard deviation of each channel"),
    "data.load_train_targets": (False, "also load the training images of the targets"),
    # single data sets
    "market1501.use_500k_distractors": (False, "add the 500,000 distractors to the gallery"),
    "cuhk03.labeled_images": (False, "use the labeled images, not the detected ones"),
    "cuhk03.classic_split": (False, "use the split of Li et al., CVPR 2014"),
    # sampler
    "sampler.train_sampler": (
        "RandomSampler",
        "RandomIdentitySampler or MPerClassSampler (for ranking losses), RandomSampler, SequentialSampler, "
        "RandomDomainSampler or RandomDatasetSampler",
    ),
    "sampler.train_sampler_t": ("RandomSampler", "sampler of the targets' training images"),
    "sampler.num_instances": (4, "images of an identity in a batch, for RandomIdentitySampler and MPerClassSampler"),
    "sampler.num_cams": (1, "cameras in a batch, for RandomDomainSampler"),
    "sampler.num_datasets": (1, "data sets in a batch, for RandomDatasetSampler"),
    # video
    "video.seq_len": (15, "images sampled of a tracklet"),
    "video.sample_method": ("evenly", "evenly, random or all"),
    "video.pooling_method": ("avg", "avg or max: how the features of a tracklet's images become one feature"),
    # training
    "train.optim": ("adam", "adam, amsgrad, sgd, rmsprop or radam"),
    "train.lr": (0.0003, "learning rate"),
    "train.weight_decay": (5e-4, "weight decay"),
    "train.batch_size": (32, "images (or tracklets) in a batch, of all processes together"),
    "train.staged_lr": (False, "give layers other than new_layers a smaller learning rate"),
    "train.new_layers": (["classifier"], "layers that keep the full learning rate with staged_lr"),
    "train.base_lr_mult": (0.1, "factor on the learning rate of the other layers with staged_lr"),
    "train.lr_scheduler": ("single_step", "single_step, multi_step, cosine or none"),
    "train.stepsize": ([20], "epochs at which the learning rate falls"),
    "train.gamma": (0.1, "factor by which it falls"),
    "train.seed": (1, "seed of every random number generator"),
    "sgd.momentum": (0.9, "momentum of sgd and rmsprop"),
    "sgd.dampening": (0.0, "dampening of the momentum"),
    "sgd.nesterov": (False, "Nesterov momentum"),
    "rmsprop.alpha": (0.99, "smoothing constant"),
    "adam.beta1": (0.9, "decay rate of the first moment"),
    "adam.beta2": (0.999, "decay rate of the second moment"),
    # loss
    "loss.name": ("softmax", "softmax, triplet, drsl or pml"),
    "loss.softmax.label_smooth": (True, "smooth the labels of the identity cross-entropy (of every loss)"),
    "loss.triplet.margin": (0.3, "distance margin"),
    "loss.triplet.weight_t": (1.0, "weight of the triplet loss"),
    "loss.triplet.weight_x": (0.0, "weight of the identity cross-entropy"),
    # test
    "test.batch_size": (100, "images (or tracklets) in a batch"),
}

OURS: dict[str, Entry] = {
    "model.bnneck": (
        False,
        "batch normalisation neck: metric loss before it, cross-entropy and retrieval after it (Luo et al., TMM 2019)",
    ),
    "model.last_stride": (2, "stride of the last stage, for networks with a layer4; 1 keeps its resolution"),
    "data.validation": (
        0.0,
        "share of the training identities, in (0, 1), that is taken out of training and tested on instead of the "
        "targets; 0: none",
    ),
    "data.validation_seed": (0, "seed of the draw of the validation identities"),
    "data.identities": (0, "number of training identities to draw before the validation identities; 0: all"),
    "data.allow_overlap": (
        False,
        "allow images that are in two sources, or both in training and in the test",
    ),
    "datasets": ({}, "data sets of your own, by name: see torchreid_ext.data.datasets.register_datasets"),
    "train.warmup_epoch": (0, "epochs at the start over which the learning rate rises linearly to its full value"),
    "train.sync_batchnorm": (False, "several GPUs: batch normalisation over the whole batch, not over each share"),
    "train.timeout": (1800, "seconds after which a process that waits for another process gives up"),
    "loss.cross_camera": (
        False,
        "drsl and pml: leave pairs of one identity and one camera out of positives and negatives, as evaluation does",
    ),
    **_metric_loss("drsl", "DRSL"),
    "loss.pml.loss": ("TripletMarginLoss", "class of pytorch_metric_learning.losses, or package.module.Class"),
    "loss.pml.kwargs": ({}, "arguments of the loss; num_classes and embedding_size are filled in"),
    "loss.pml.lr": (0.0, "learning rate of the weights that the loss has, if any; 0 takes train.lr"),
    **_metric_loss("pml", "the loss"),
    "test.untrained": (False, "test before training too, and print both results side by side"),
}

_RUN = keys_of_options(RunOptions)
DRSL_ARGUMENTS = keys_of_arguments("loss.drsl", DRSLoss)
"""The keys that are arguments of ``DRSLoss``, with its defaults."""


def _by_section(keys: dict[str, Key]) -> dict[str, Key]:
    """The keys of each section together, sections in the order of their first key."""
    folders, sections = ([*dict.fromkeys(map(name, keys))] for name in (_folder, _section))
    order = {key: (folders.index(_folder(key)), sections.index(_section(key))) for key in keys}
    return {key: keys[key] for key in sorted(keys, key=lambda key: order[key])}


def _folder(key: str) -> str:
    return key.partition(".")[0]


def _section(key: str) -> str:
    return key.rpartition(".")[0]


KEYS: dict[str, Key] = _by_section(
    {key: Key(*entry) for key, entry in TORCHREID.items()}
    | DRSL_ARGUMENTS
    | {key: Key(*entry) for key, entry in OURS.items()}
    | _RUN
)
"""Every config key."""

_OF_TORCHREID = inspect.signature(torchreid.engine.Engine.run).parameters
ADDED = {
    key: KEYS[key]
    for key in KEYS
    if key in OURS or key in DRSL_ARGUMENTS or (key in _RUN and _RUN[key].name not in _OF_TORCHREID)
}
"""The keys that torchreid does not have."""

OPTIONS = {key for key, entry in KEYS.items() if entry.default == {} and key != "datasets"}
"""Keys whose value is a mapping of free form."""


def describe() -> str:
    """All keys, two lines for each, for --help."""
    return "\n".join(f"  {key} ({entry.default!r})\n      {entry.text}" for key, entry in KEYS.items())
