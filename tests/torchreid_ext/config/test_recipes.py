"""The config files we ship, those of torchreid 1.4.0, and what a config of torchreid can ask for."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from toy_data import Manager, write_images

from torchreid_ext import config, get_default_config, networks
from torchreid_ext.cli.train import main
from torchreid_ext.engine import engines

CONFIGS = sorted(
    {*(Path(__file__).parents[3] / "configs").glob("*.yaml")}
    - {*(Path(__file__).parents[3] / "configs").glob("losses*.yaml")}
)


def read(path):
    cfg = get_default_config()
    cfg.merge_from_file(path)
    cfg.merge_from_list(["model.pretrained", "False", "use_gpu", "False"])
    return cfg


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_ours_builds_what_needs_no_data(path):
    assert path.read_text().startswith("# ")
    cfg = read(path)
    model = config.build_model(cfg, 8)
    criterion = config.build_criterion(cfg, model, 8)
    optimizer = config.build_optimizer(cfg, model, criterion)
    scheduler = config.build_scheduler(cfg, optimizer)
    engine = config.build_engine(cfg, Manager(8), model, optimizer, scheduler, criterion)
    assert type(engine) is getattr(
        engines, f"{cfg.data.type.title()}{'DRSL' if cfg.loss.name == 'drsl' else 'PML'}Engine"
    )
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, cfg.data.height, cfg.data.width)).shape[0] == 1


def test_viper_trains_once_its_images_are_in_place(tmp_path):
    """torchreid reads VIPeR by its name from the folders that the configuration describes, and downloads nothing."""
    generator = np.random.default_rng(0)
    for camera in ("cam_a", "cam_b"):
        folder = tmp_path / "viper" / "VIPeR" / camera
        folder.mkdir(parents=True)
        for person in range(16):
            pixels = generator.integers(0, 256, (12, 6, 3), dtype=np.uint8)
            # A PNG whose name ends in .bmp.
            Image.fromarray(pixels).save(folder / f"{person:03}.bmp", format="png")
    log = tmp_path / "log"
    words = ["train.max_epoch", "1", "train.batch_size", "8", "data.workers", "0", "data.split_id", "2"]
    config_file = str(CONFIGS[0].parent / "viper_mobilenetv2.yaml")
    assert main(["--config-file", config_file, "--root", str(tmp_path), *words, "data.save_dir", str(log)]) == 0
    assert json.loads((log / "metrics.json").read_text())["viper"]["num_query"] == 8
    assert len(json.loads((tmp_path / "viper" / "splits.json").read_text())) == 20


def test_the_base_is_the_strong_baseline_with_another_loss():
    """Luo et al., TMM 2019: the neck, smoothed labels, the warm-up, flip, crop and erase, and the triplet loss."""
    cfg = read(CONFIGS[0].parent / "base.yaml")
    assert cfg.model.bnneck and cfg.loss.softmax.label_smooth and cfg.train.warmup_epoch == 10
    assert (cfg.train.batch_size, cfg.sampler.num_instances) == (64, 4)
    assert (cfg.loss.triplet.margin, cfg.loss.triplet.weight_t, cfg.loss.triplet.weight_x) == (0.3, 1.0, 1.0)
    assert {"random_flip", "random_crop", "random_erase"} == set(cfg.data.transforms)
    assert isinstance(config.build_model(cfg, 8).classifier, networks.NeckClassifier)


# Of deep-person-reid 1.4.0, configs/im_*.yaml, the three that differ most: name, targets, transforms, save_dir,
# learning rate, epochs, batch size, fixbase epochs, open layers, scheduler, step size, test batch size, distance.
FLIP, FLIP_JITTER = ["random_flip"], ["random_flip", "color_jitter"]
HEAD = ["classifier"]
UPSTREAM = [
    ("osnet_ain_x1_0", ["market1501", "dukemtmcreid"], FLIP_JITTER, "log/osnet_ain_x1_0_market1501_softmax_cosinelr",
     0.0015, 100, 64, 10, HEAD, "cosine", None, 300, "cosine"),
    ("osnet_x0_25", ["market1501"], FLIP, "log/osnet_x0_25_market1501_softmax",
     0.003, 180, 128, 10, HEAD, "single_step", [80], 300, "euclidean"),
    ("resnet50_fc512", ["market1501"], FLIP, "log/resnet50_fc512_market1501_softmax",
     0.0003, 60, 32, 5, ["fc", "classifier"], "single_step", [20], 100, "euclidean"),
]  # fmt: skip


def upstream(row):
    """The keys and values of one of torchreid's files."""
    name, targets, transforms, save_dir, lr, epochs, batch, fixbase, layers, scheduler, step, test_batch, metric = row
    return {
        "model": {"name": name, "pretrained": True},
        "data": {
            "type": "image", "sources": ["market1501"], "targets": targets, "height": 256, "width": 128,
            "combineall": False, "transforms": transforms, "save_dir": save_dir,
        },
        "loss": {"name": "softmax", "softmax": {"label_smooth": True}},
        "train": {
            "optim": "amsgrad", "lr": lr, "max_epoch": epochs, "batch_size": batch, "fixbase_epoch": fixbase,
            "open_layers": layers, "lr_scheduler": scheduler, **({} if step is None else {"stepsize": step}),
        },
        "test": {
            "batch_size": test_batch, "dist_metric": metric, "normalize_feature": False, "evaluate": False,
            "eval_freq": -1, "rerank": False,
        },
    }  # fmt: skip


@pytest.mark.parametrize("row", UPSTREAM, ids=lambda row: row[3].removeprefix("log/"))
def test_torchreids_files_load_and_build(tmp_path, row):
    values = upstream(row)
    (tmp_path / "upstream.yaml").write_text(yaml.safe_dump(values))
    cfg = get_default_config()
    cfg.merge_from_file(tmp_path / "upstream.yaml")
    for section, keys in values.items():
        assert {key: cfg[section][key] for key in keys} == keys
    cfg.merge_from_list(["model.pretrained", "False", "use_gpu", "False"])
    model = config.build_model(cfg, 8)
    optimizer = config.build_optimizer(cfg, model)
    assert optimizer.param_groups[0]["amsgrad"]
    assert config.build_scheduler(cfg, optimizer).get_last_lr() == [row[4]]
    assert config.build_criterion(cfg, model, 8) is None
    assert all(hasattr(model, layer) for layer in cfg.train.open_layers)


@pytest.fixture
def toy(tmp_path):
    """A config file of two toy data sets, ``one`` and ``two``, and the words every run below ends with."""
    write_images(tmp_path / "images")
    options = {"folder": "images", "pattern": r"(?P<identity>\d+)_(?P<camera>\d)_\d\.png", "query_cameras": ["0"]}
    values = {
        "datasets": {"one": options, "two": {**options, "seed": 1}},
        "model": {"name": "osnet_x0_25", "pretrained": False},
        "data": {
            "sources": ["one"],
            "targets": ["one"],
            "height": 64,
            "width": 32,
            "workers": 0,
            # The two sets draw their splits from the same images.
            "allow_overlap": True,
        },
        "sampler": {"train_sampler": "RandomIdentitySampler"},
        "train": {"batch_size": 8, "max_epoch": 1},
        "loss": {"name": "drsl"},
        "use_gpu": False,
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(values))

    def run(*flags, words=()):
        log = tmp_path / "log"
        arguments = [*flags, "--config-file", str(tmp_path / "toy.yaml"), "--root", str(tmp_path)]
        status = main([*arguments, "data.save_dir", str(log), *map(str, words)])
        return status, json.loads((log / "metrics.json").read_text()) if status == 0 else None

    return run


@pytest.mark.parametrize("loss", ["softmax", "triplet"])
def test_several_sources_and_targets_transforms_and_words(toy, loss, capsys):
    flags = ("-s", "one", "two", "-t", "two", "one", "--transforms", "random_flip", "random_crop", "random_erase")
    status, metrics = toy(*flags, words=("loss.name", loss, "train.lr", 0.001, "model.bnneck", "True"))
    assert status == 0 and list(metrics) == ["two", "one"]
    printed = capsys.readouterr().out
    assert "random erase" in printed and "# source datasets : 2" in printed


@pytest.mark.parametrize(
    "words",
    [
        "data.combineall True train.staged_lr True train.new_layers classifier train.base_lr_mult 0.1",
        "data.load_train_targets True data.targets two loss.cross_camera True loss.drsl.miner MultiSimilarityMiner "
        "loss.drsl.bound_power 1 train.warmup_epoch 2 train.lr_scheduler none train.max_epoch 3 model.bnneck True "
        "train.fixbase_epoch 1 train.open_layers classifier",
    ],
    ids=lambda words: words.split()[0],
)
def test_what_a_config_can_ask_for(toy, words):
    status, metrics = toy(words=words.split())
    assert status == 0
    ((_, result),) = metrics.items()
    assert 0 < result["mAP"] <= 1


def test_weights_are_loaded_and_evaluated(toy, tmp_path, capsys):
    words = ("model.bnneck", "True", "test.dist_metric", "cosine")
    _, trained = toy(words=words)
    (saved,) = (tmp_path / "log" / "model").glob("model.pth.tar-1")
    status, tested = toy(words=(*words, "model.load_weights", saved, "test.evaluate", "True"))
    assert status == 0 and tested == trained
    # All of them.
    assert re.search(r"Loaded (\d+) of the model's \1 weights from", capsys.readouterr().out)
