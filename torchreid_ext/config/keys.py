"""Every config key: its default and what it is for. Those of torchreid's own default_config.py keep its defaults."""

from __future__ import annotations

from typing import Any


def _metric_loss(section: str, called: str) -> dict[str, tuple[Any, str]]:
    """Keys that ``loss.drsl`` and ``loss.pml`` share."""
    keys: dict[str, tuple[Any, str]] = {
        "miner": ({}, "miner of pytorch_metric_learning or pml_drsl: its name, or {name: CLASS, ARGUMENT: VALUE}"),
        "reducer": ({}, f"likewise, how the errors become one number; {called} has its own"),
        "distance": ({}, f"likewise, between features; {called} has its own"),
        "memory_size": (0, "features of past batches to rank against (cross-batch memory), for losses that can"),
        "weight_m": (1.0, f"weight of {called}"),
        "weight_x": (1.0, "weight of the identity cross-entropy"),
    }
    return {f"loss.{section}.{key}": value for key, value in keys.items()}


KEYS: dict[str, tuple[Any, str]] = {
    "use_gpu": (True, "use CUDA where there is a device"),
    # model
    "model.name": ("resnet50", "network, a name of torchreid's model zoo"),
    "model.pretrained": (True, "load ImageNet weights (needs a network connection the first time)"),
    "model.load_weights": ("", "file of weights to start from; layers that do not fit are listed and left as they are"),
    "model.resume": ("", "checkpoint to resume training from; auto: the newest in data.save_dir, if there is one"),
    "model.bnneck": (
        False,
        "batch normalisation neck: metric loss before it, cross-entropy and retrieval after it (Luo et al., TMM 2019)",
    ),
    "model.last_stride": (2, "1: the last stage keeps its resolution (networks with a layer4); 2: as the network is"),
    # data
    "data.type": ("image", "image or video"),
    "data.root": ("reid-data", "folder that holds the data sets (also --root)"),
    "data.sources": (["market1501"], "data sets to train on (also -s)"),
    "data.targets": (["market1501"], "data sets to test on (also -t)"),
    "data.workers": (4, "loading processes of each training process, no more than it has cores; -1: as many as those"),
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
    "data.save_dir": ("log", "folder for checkpoints, logs and results"),
    "data.load_train_targets": (False, "also load the training images of the targets"),
    "datasets": ({}, "data sets of your own, by name: see torchreid_ext.data.datasets.register_datasets"),
    # single data sets
    "market1501.use_500k_distractors": (False, "add the 500,000 distractors to the gallery"),
    "cuhk03.labeled_images": (False, "use the labeled images, not the detected ones"),
    "cuhk03.classic_split": (False, "use the split of Li et al., CVPR 2014"),
    "cuhk03.use_metric_cuhk03": (False, "score by the single-gallery-shot protocol"),
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
    "video.pooling_method": ("avg", "avg or max: how a tracklet's features become one"),
    # training
    "train.optim": ("adam", "adam, amsgrad, sgd, rmsprop or radam"),
    "train.lr": (0.0003, "learning rate"),
    "train.weight_decay": (5e-4, "weight decay"),
    "train.max_epoch": (60, "epochs"),
    "train.start_epoch": (0, "epoch to start from"),
    "train.batch_size": (32, "images (or tracklets) in a batch, of all processes together"),
    "train.fixbase_epoch": (0, "epochs at the start that train only open_layers"),
    "train.open_layers": (["classifier"], "layers trained in the first fixbase_epoch epochs"),
    "train.staged_lr": (False, "give layers other than new_layers a smaller learning rate"),
    "train.new_layers": (["classifier"], "layers that keep the full learning rate with staged_lr"),
    "train.base_lr_mult": (0.1, "factor on the learning rate of the other layers with staged_lr"),
    "train.lr_scheduler": ("single_step", "single_step, multi_step, cosine or none"),
    "train.stepsize": ([20], "epochs at which the learning rate falls"),
    "train.gamma": (0.1, "factor by which it falls"),
    "train.warmup_epoch": (0, "epochs at the start over which the learning rate rises linearly to its full value"),
    "train.print_freq": (20, "batches between two lines of the log"),
    "train.seed": (1, "seed of every random number generator"),
    "train.amp": ("off", "precision of the network in training: off, bf16 or fp16 (with scaled gradients)"),
    "train.compile": (False, "compile the network for training with torch.compile"),
    "train.channels_last": (False, "keep images and weights in channels_last memory format, faster on GPUs with amp"),
    "train.sync_batchnorm": (False, "several GPUs: batch normalisation over the whole batch, not over each share"),
    "train.timeout": (1800, "seconds after which a process that waits for another one gives up"),
    "train.skip_nonfinite": (False, "leave out a step whose loss is NaN or infinite, instead of stopping"),
    "train.accumulate": (1, "1 alone: a ranking needs its whole batch at once; see loss.*.memory_size for more"),
    "train.checkpoint_freq": (1, "epochs between checkpoints"),
    "train.keep_checkpoints": (3, "checkpoints to keep, besides the last and the best; 0 keeps all"),
    "sgd.momentum": (0.9, "momentum of sgd and rmsprop"),
    "sgd.dampening": (0.0, "dampening of the momentum"),
    "sgd.nesterov": (False, "Nesterov momentum"),
    "rmsprop.alpha": (0.99, "smoothing constant"),
    "adam.beta1": (0.9, "decay rate of the first moment"),
    "adam.beta2": (0.999, "decay rate of the second moment"),
    # loss
    "loss.name": ("softmax", "softmax, triplet, drsl or pml"),
    "loss.cross_camera": (
        False,
        "drsl and pml: leave pairs of one identity and one camera out of positives and negatives, as evaluation does",
    ),
    "loss.softmax.label_smooth": (True, "smooth the labels of the identity cross-entropy (of every loss)"),
    "loss.triplet.margin": (0.3, "distance margin"),
    "loss.triplet.weight_t": (1.0, "weight of the triplet loss"),
    "loss.triplet.weight_x": (0.0, "weight of the identity cross-entropy"),
    "loss.drsl.temperature": (0.01, "softness of the ranks, in units of distance; above 0"),
    "loss.drsl.sort_weight": (0.3, "weight of the sort error; 0 or more"),
    "loss.drsl.margin": (0.0, "distance by which negatives must follow positives"),
    "loss.drsl.bound": (False, "train an upper bound of the retrieval error, for ranks that are hard to get right"),
    **_metric_loss("drsl", "DRSL"),
    "loss.pml.loss": ("TripletMarginLoss", "class of pytorch_metric_learning.losses"),
    "loss.pml.kwargs": ({}, "its arguments; num_classes and embedding_size are found out"),
    "loss.pml.lr": (0.0, "learning rate of the weights that the loss has, if any; 0 takes train.lr"),
    **_metric_loss("pml", "the loss"),
    # test
    "test.batch_size": (100, "images (or tracklets) in a batch"),
    "test.dist_metric": ("euclidean", "euclidean or cosine"),
    "test.normalize_feature": (False, "give features unit norm first"),
    "test.ranks": ([1, 5, 10, 20], "CMC ranks to print"),
    "test.evaluate": (False, "only test"),
    "test.eval_freq": (-1, "epochs between tests; -1 tests at the end alone"),
    "test.start_eval": (0, "first epoch to test after"),
    "test.rerank": (False, "re-rank by k-reciprocal neighbours in the last test"),
    "test.visrank": (False, "draw the ranking of every query after the last test, and an index.html to browse them"),
    "test.visrank_topk": (10, "gallery entries in a drawn ranking"),
    "test.untrained": (False, "test before training too, and print both results side by side"),
    "test.picture": (0, "queries whose rankings are drawn on one page after the last test"),
}

OPTIONS = {key for key, (default, _) in KEYS.items() if default == {} and key != "datasets"}
"""Keys whose value is a mapping of free form."""


def describe() -> str:
    """All keys, a line or two each, for --help."""
    return "\n".join(f"  {key} ({default!r})\n      {text}" for key, (default, text) in KEYS.items())
