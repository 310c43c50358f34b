"""The configuration: torchreid's keys and defaults, ours, and what happens to mistakes."""

import contextlib
import copy
import itertools
import random
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import torchreid
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pytorch_metric_learning import miners
from pytorch_metric_learning.distances import LpDistance
from torchreid_keys import TORCHREID
from toy_data import make_image_manager, make_video_manager

from pml_drsl.checks import InputError
from torchreid_ext import build_engine, config, get_default_config
from torchreid_ext.config.build import check_takes
from torchreid_ext.config.data import input_errors
from torchreid_ext.config.values import dumped
from torchreid_ext.engine import engines
from torchreid_ext.engine.criteria import build_miner
from torchreid_ext.runtime.generators import seed_everything


def subset(actual, wanted):
    return {
        key: subset(actual[key], value) if isinstance(value, dict) else actual[key] for key, value in wanted.items()
    }


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_key_of_torchreid_has_its_default():
    assert subset(get_default_config(), TORCHREID) == TORCHREID


def test_a_file_overrides_its_base_and_words_override_the_file(tmp_path):
    write(tmp_path / "base.yaml", "train: {lr: 0.1, max_epoch: 3}\nloss: {name: drsl}")
    path = write(tmp_path / "child.yaml", "base: base.yaml\ntrain: {lr: 1, stepsize: 7}")
    cfg = get_default_config()
    cfg.merge_from_file(path)
    cfg.merge_from_list(["train.max_epoch", "5", "data.sources", "toy", "test.ranks", "[1, 3]"])
    assert (cfg.train.lr, cfg.train.max_epoch, cfg.train.stepsize, cfg.loss.name) == (1.0, 5, [7], "drsl")
    assert isinstance(cfg.train.lr, float)
    assert (cfg.data.sources, cfg.test.ranks) == (["toy"], [1, 3])


def test_data_sets_of_ones_own_are_free_keys(tmp_path):
    cfg = get_default_config()
    cfg.merge_from_file(write(tmp_path / "a.yaml", "datasets: {mine: {folder: here, query_cameras: ['1']}}"))
    cfg.merge_from_list(["datasets.mine.folder", "there"])
    assert cfg.datasets.mine == {"folder": ["there"], "query_cameras": ["1"]}
    # Names stay as they are written, and what is no name is a number, or none.
    words = "folder 2024_05 csv 1.10 pattern [a-z]+ train [2024_05,01,'x'] junk (1,2) seed 3 query_cameras None"
    cfg.merge_from_list([f"datasets.own.{w}" if i % 2 == 0 else w for i, w in enumerate(words.split())])
    assert cfg.datasets.own == {
        "folder": ["2024_05"], "csv": "1.10", "pattern": "[a-z]+", "train": ["2024_05", "01", "x"], "junk": ["(1,2)"],
        "seed": 3, "query_cameras": None,
    }  # fmt: skip


def test_the_users_folder_is_meant_by_its_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = get_default_config()
    cfg.merge_from_file(
        write(tmp_path / "a.yaml", "data: {root: ~/photos}\nmodel: {resume: ~/a.pth, load_weights: auto}")
    )
    cfg.merge_from_list(["data.save_dir", "~/log", "data.sources", "~"])
    assert (cfg.data.root, cfg.data.save_dir) == (f"{tmp_path}/photos", f"{tmp_path}/log")
    assert (cfg.model.resume, cfg.model.load_weights, cfg.data.sources) == (f"{tmp_path}/a.pth", "auto", ["~"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss: {drsl: {temprature: 1}}", "unknown config key 'loss.drsl.temprature'.*'loss.drsl.temperature'"),
        ("optim: adam", "unknown config key 'optim'.*did you mean"),
        ("train: {lr: fast}", "'train.lr' takes a number, such as 0.0003, got 'fast'"),
        ("train: {lr: .inf}", "'train.lr' takes a number, such as 0.0003, got inf"),
        ("train: {max_epoch: 1.5}", "'train.max_epoch' takes a whole number, such as 60, got 1.5"),
        ("train: {max_epoch: true}", "'train.max_epoch' takes a whole number, such as 60, got True"),
        ("test: {evaluate: 1}", "'test.evaluate' takes True or False"),
        ("data: {save_dir: [a]}", r"'data.save_dir' takes a string, such as 'log', got \['a'\]"),
        ("data: {save_dir: true}", "'data.save_dir' takes a string, such as 'log', got True"),
        ("data: {root: ~}", "'data.root' takes a string, such as 'reid-data', got None in .*; write it in quotes"),
        ("test: {ranks: [1, five]}", "'test.ranks' takes a list in which every entry is a whole number, .*got 'five'"),
        ("data: {sources: [market1501, {a: 1}]}", "every entry is a string, .*got {'a': 1}"),
        ("datasets: {mine: 3}", "'datasets.mine' takes the options of a data set, such as {folder: photos}, got 3"),
        ("data: {sources: [a, 2.50]}", "every entry is a string, .*got 2.5 in .*; write it in quotes"),
        ("- 1", "must hold keys and values"),
        (f"[{'1, ' * 99}]", r"must hold keys and values, got '\[1, .{0,57}'$"),
        ("base: .", "is a folder: give a YAML file"),
        ("a: [", "is not YAML"),
        ("base: nowhere.yaml", "nowhere.yaml does not exist"),
        ("base: [a.yaml, b.yaml]", r"base takes the name of one file, got \['a.yaml', 'b.yaml'\]"),
        ("train: {lr: 1}\ndata: {height: 9}\ntrain: {gamma: 1}", "'train' stands twice in .*line 3"),
        ("data: 5", "'data' is a section of keys, such as data.allow_overlap, got 5"),
        ("datasets: 5", "'datasets' is a section of keys, such as datasets.NAME, got 5"),
        ("datasets: {a.b: {folder: c}}", "'datasets.a' takes the options of a data set, .*got {'b': {'folder': 'c'}}"),
        ("data.: {root: a}", "unknown config key 'data..root'"),
        ("train: &a {b: *a}", "holds itself"),
        (f"train: {{lr: 1{'0' * 400}}}", "'train.lr' takes a number"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        get_default_config().merge_from_file(write(tmp_path / "wrong.yaml", text))


def test_base_files_in_a_circle_are_refused(tmp_path):
    write(tmp_path / "a.yaml", "base: b.yaml")
    with pytest.raises(ValueError, match=r"b\.yaml: base leads back to this file"):
        get_default_config().merge_from_file(write(tmp_path / "b.yaml", "base: a.yaml"))


def test_a_file_is_read_as_utf_8_whatever_the_system_thinks(tmp_path):
    cfg = get_default_config()
    cfg.merge_from_file(
        write(tmp_path / "a.yaml", "\ufeffdata:\n  save_dir: 张\n# An empty section sets nothing.\ntrain:\ntest:")
    )
    assert cfg.data.save_dir == "张"
    (tmp_path / "b.yaml").write_bytes("data: {save_dir: Müller}".encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.yaml is not text in UTF-8.*save it in this encoding"):
        cfg.merge_from_file(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("data: {save_dir: 2024}", "data.save_dir", "2024"),
        ("data: {save_dir: 2024-01-05}", "data.save_dir", "2024-01-05"),
        ("data: {save_dir: 2024-99-99}", "data.save_dir", "2024-99-99"),
        # YAML 1.1 reads 8, 202401, 90 and 10.
        ("data: {save_dir: 0010}", "data.save_dir", "0010"),
        ("data: {save_dir: 2024_01}", "data.save_dir", "2024_01"),
        ("data: {sources: [1:30, +10]}", "data.sources", ["1:30", "+10"]),
        (
            "datasets: {mine: {folder: 2024_05, train: [0001, 0x1]}}",
            "datasets.mine",
            {"folder": ["2024_05"], "train": ["0001", "0x1"]},
        ),
        (
            "datasets: {mine: {seed: 010, min_images: 2.0, test_fraction: 1e-1, test: 7, junk: [-1], train: }}",
            "datasets.mine",
            {"seed": 10, "min_images": 2, "test_fraction": 0.1, "test": ["7"], "junk": ["-1"], "train": None},
        ),
        ("data: {height: 064}", "data.height", 64),
        ("loss: {pml: {kwargs: {m: [10, -1, 0]}}}", "loss.pml.kwargs", {"m": [10, -1, 0]}),
        ("datasets.mine: {folder: x}\ndatasets.mine.seed: 3", "datasets.mine", {"folder": ["x"], "seed": 3}),
        ("datasets: {mine.folder: x, mine: }", "datasets.mine", {"folder": ["x"]}),
        ("datasets: {mine: }", "datasets.mine", {}),
        ("datasets: {mine: {folder: 2024-05-01}}", "datasets.mine", {"folder": ["2024-05-01"]}),
        ("loss: {pml: {kwargs: {m: [2024-01-01 10:00:00]}}}", "loss.pml.kwargs", {"m": ["2024-01-01 10:00:00"]}),
        ("data: {sources: [1, market1501]}", "data.sources", ["1", "market1501"]),
        ("data: {sources: 7}", "data.sources", ["7"]),
        ("data: {norm_mean: [0, 1, 0.5]}", "data.norm_mean", [0.0, 1.0, 0.5]),
        ("train: {lr: 1e-3}", "train.lr", 0.001),
        ("train: {lr: 1}", "train.lr", 1.0),
        ("train: {max_epoch: 60.0}", "train.max_epoch", 60),
        ("train: {stepsize: ['20', 40]}", "train.stepsize", [20, 40]),
        # As torchreid reads them.
        ("train:\n  stepsize: (20, 40)", "train.stepsize", [20, 40]),
        ("train: {stepsize: '[20, 40]'}", "train.stepsize", [20, 40]),
        ("data:\n  norm_mean: (0, 0.5, 1)", "data.norm_mean", [0.0, 0.5, 1.0]),
        ("data:\n  sources: ('a', 'b')", "data.sources", ["a", "b"]),
        (
            "datasets: {mine: {test: '[qg]', folder: '[2024]'}}",
            "datasets.mine",
            {"test": ["[qg]"], "folder": ["[2024]"]},
        ),
        ("datasets: {mine: {folder: '[2024] photos'}}", "datasets.mine", {"folder": ["[2024] photos"]}),
        ("train: {amp: off}", "train.amp", "off"),
        ("loss: {drsl: {bound_power: None}}", "loss.drsl.bound_power", None),
        ("loss: {pml: {kwargs: {a: [None, N]}}}", "loss.pml.kwargs", {"a": [None, "N"]}),
        ("datasets: {mine: {query_cameras: None, csv: None}}", "datasets.mine", {"query_cameras": None, "csv": None}),
        ("test: {evaluate: yes}", "test.evaluate", True),
        ("loss: {pml: {kwargs: {a: 'None', b: 'N'}}}", "loss.pml.kwargs", {"a": "None", "b": "N"}),
    ],
)
def test_a_value_is_converted_where_its_meaning_is_plain(tmp_path, text, key, value):
    cfg = get_default_config()
    cfg.merge_from_file(write(tmp_path / "plain.yaml", text))
    found = config.flat(cfg)[key]
    assert found == value and repr(found) == repr(value)
    # As a run writes config.yaml.
    again = get_default_config()
    again.merge_from_file(write(tmp_path / "config.yaml", dumped(config.plain(cfg))))
    assert config.flat(again) == config.flat(cfg)


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("data.save_dir", "2024", "2024"),
        ("data.save_dir", "2024_01", "2024_01"),
        ("data.save_dir", "1e3", "1e3"),
        ("data.save_dir", "'log'", "log"),
        ("data.sources", "2024_01", ["2024_01"]),
        ("data.sources", "[1]", ["1"]),
        ("data.sources", "[2024_01, 01]", ["2024_01", "01"]),
        ("data.save_dir", "[a]", "[a]"),
        ("loss.pml.kwargs", "{m: 2024-01-01}", {"m": "2024-01-01"}),
        ("data.sources", "('a', 'b')", ["a", "b"]),
        ("train.lr", "1e-3", 0.001),
        ("test.evaluate", "true", True),
        ("test.evaluate", "off", False),
        ("loss.drsl.query_chunk_size", "64.0", 64),
        ("loss.drsl.bound_power", "null", None),
        ("loss.pml.kwargs", "{a: None}", {"a": None}),
        ("data.save_dir", "null", "null"),
        ("train.stepsize", "20,40", [20, 40]),
    ],
)
def test_a_word_is_converted_where_its_meaning_is_plain(key, word, value):
    cfg = get_default_config()
    cfg.merge_from_list([key, word])
    found = config.flat(cfg)[key]
    assert found == value and repr(found) == repr(value)


def test_wrong_words_are_refused():
    with pytest.raises(ValueError, match=r"KEY VALUE pairs, got 1 words: train\.lr"):
        get_default_config().merge_from_list(["train.lr"])
    with pytest.raises(ValueError, match=r"'train.max_epochs' in the command line; did you mean 'train.max_epoch'"):
        get_default_config().merge_from_list(["train.max_epochs", "3"])
    for words in (["a.yaml"], ["a.yml", "--root", "b", "c"]):
        with pytest.raises(
            InputError, match=rf"'{words[0]}' is no config key: give a file with --config-file {words[0]}"
        ):
            get_default_config().merge_from_list(words)
    with pytest.raises(ValueError, match=r"-s stands after KEY VALUE pairs"):
        get_default_config().merge_from_list(["train.max_epoch", "3", "-s", "market1501"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data.transforms ['random_flipp']", r"data.transforms must be one of random_flip, .*, got 'random_flipp'"),
        ("train.amp fp8", "train.amp must be one of off, bf16, fp16, got 'fp8'"),
        ("data.height 0", r"data.height takes whole numbers of 1 or more, got 0"),
        ("data.norm_mean [0.5]", r"data.norm_mean takes a number for each of the 3 channels, got \[0.5\]"),
        ("data.norm_std [0,1,1]", r"data.norm_std takes numbers above 0, .*, got \[0.0, 1.0, 1.0\]"),
        ("train.gamma -0.1", r"train.gamma takes numbers of 0 or more, got -0.1"),
        ("data.workers -2", r"data.workers takes whole numbers of -1 or more, got -2"),
        ("data.sources []", r"data.sources takes a list of one or more entries, got \[\]"),
        ("model.name osnet_x025", "model.name 'osnet_x025' is unknown; the nearest is 'osnet_x0_25'"),
        ("loss.name pml loss.pml.loss CircleLos", "loss.pml.loss: there is no 'CircleLos'; did you mean 'CircleLoss'"),
        ("loss.name drsl loss.drsl.miner Hard", "loss.drsl.miner: there is no 'Hard'"),
        (
            "sampler.train_sampler RandomIdentitySampler sampler.num_instances 3 train.batch_size 16",
            "train.batch_size 16 is not a multiple of sampler.num_instances 3, .*: make it 15 or 18",
        ),
    ],
)
def test_values_that_a_test_would_refuse_are_refused_before_training(words, message):
    cfg = get_default_config()
    cfg.merge_from_list(words.split())
    with pytest.raises(ValueError, match=message):
        config.check(cfg)


def test_a_test_needs_no_loss_and_a_name_assigned_in_python_describes_a_class():
    """The photos of a run are listed where the user's own loss is not installed."""
    cfg = get_default_config()
    cfg.merge_from_list(["loss.name", "pml", "loss.pml.loss", "nowhere.Loss", "test.evaluate", "True"])
    config.check(cfg)
    cfg.loss.pml.loss, cfg.loss.pml.miner, cfg.test.evaluate = "TripletMarginLoss", "MultiSimilarityMiner", False
    config.check(cfg)
    assert isinstance(build_miner("loss.pml", cfg.loss.pml), miners.MultiSimilarityMiner)


def test_values_outside_the_range_of_their_key_are_refused():
    for words in (
        "train.lr_scheduler cos", "train.optim adamm", "test.dist_metric hamming", "data.type text",
        "sampler.train_sampler MySampler", "video.sample_method dense", "video.pooling_method mean",
        "model.last_stride 3", "data.k_tfm 0", "data.targets []", "test.ranks [1,0]", "test.ranks []",
        "test.batch_size 0", "train.stepsize [20,0]", "train.stepsize []", "train.open_layers []",
        "train.base_lr_mult -1", "train.warmup_epoch -1", "train.keep_checkpoints -1", "loss.triplet.weight_t -1",
        "loss.triplet.weight_x -1", "loss.drsl.weight_m -1", "loss.drsl.memory_size -1", "loss.pml.lr -1",
        "loss.pml.weight_x -0.5", "loss.pml.memory_start_epoch -2",
    ):  # fmt: skip
        cfg = get_default_config()
        cfg.merge_from_list(words.split())
        with pytest.raises(InputError, match=f"^{words.split()[0]} (takes|must be one of) "):
            config.check(cfg)


def test_every_transform_of_torchreid_is_known():
    cfg = get_default_config()
    cfg.data.transforms = ["Random_Flip", "random_crop", "random_patch", "color_jitter", "random_erase"]
    config.check(cfg)
    cfg.data.transforms = []
    config.check(cfg)


@pytest.mark.parametrize(
    ("data_type", "loss"), [("image", "softmax"), ("image", "pml"), ("video", "triplet"), ("video", "drsl")]
)
def test_build_engine(tmp_path, data_type, loss):
    cfg = get_default_config()
    cfg.merge_from_list(["data.type", data_type, "loss.name", loss, "model.name", "osnet_x0_25"])
    cfg.merge_from_list(["model.pretrained", "False", "loss.drsl.temperature", 0.5, "loss.drsl.weight_x", 0.25])
    cfg.merge_from_list(["video.pooling_method", "max", "loss.triplet.margin", 0.7, "use_gpu", False])
    cfg.merge_from_list(["loss.triplet.weight_t", 0.5, "loss.triplet.weight_x", 0.75])
    cfg.merge_from_list(["loss.softmax.label_smooth", loss == "pml"])
    manager = (make_image_manager if data_type == "image" else make_video_manager)(tmp_path)
    model = config.build_model(cfg, manager.num_train_pids)
    optimizer = config.build_optimizer(cfg, model)
    engine = build_engine(cfg, manager, model, optimizer, config.build_scheduler(cfg, optimizer))
    assert isinstance(engine, get_type_hints(build_engine)["return"])
    assert type(engine) is getattr(engines, f"{data_type.title()}{'DRSL' if loss == 'drsl' else 'PML'}Engine")
    if data_type == "video":
        assert engine.pooling_method == "max"
    if loss == "drsl":
        assert (engine.criterion.temperature, engine.weight_x) == (0.5, 0.25)
    assert engine.cross_entropy.label_smoothing == (0.1 if loss == "pml" else 0)
    if loss == "triplet":
        assert isinstance(engine.criterion, torchreid.losses.TripletLoss)
        assert (engine.criterion.margin, engine.weight_m, engine.weight_x) == (0.7, 0.5, 0.75)
    if loss == "softmax":
        assert (engine.criterion, engine.weight_m, engine.weight_x) == (None, 0, 1)


@pytest.mark.parametrize(("loss", "layers"), [("DRSLoss", None), ("ArcFaceLoss", ["classifier"])])
def test_what_trains_beside_a_classifier_without_a_loss_trains_in_the_first_epochs(tmp_path, loss, layers):
    cfg = get_default_config()
    cfg.merge_from_list(["model.name", "osnet_x0_25", "model.pretrained", "False", "use_gpu", "False"])
    cfg.merge_from_list(["loss.name", "pml", "loss.pml.loss", loss, "loss.pml.weight_x", 0, "train.fixbase_epoch", 1])
    cfg.train.open_layers = layers
    manager = make_image_manager(tmp_path)
    model = config.build_model(cfg, manager.num_train_pids)
    criterion = config.build_criterion(cfg, model, manager.num_train_pids)
    optimizer = config.build_optimizer(cfg, model, criterion)
    engine = build_engine(cfg, manager, model, optimizer, None, criterion)
    # The weights of ArcFace, or the first layer.
    weight, engine.max_epoch = optimizer.param_groups[0]["params"][0], 1
    before = weight.clone()
    engine.train(fixbase_epoch=1, open_layers=layers)
    assert not torch.equal(weight, before)


def test_weights_of_a_triplet_loss_that_train_nothing_are_refused(tmp_path):
    cfg = get_default_config()
    cfg.merge_from_list(["model.name", "osnet_x0_25", "model.pretrained", "False", "loss.name", "triplet"])
    cfg.merge_from_list(["loss.triplet.weight_t", 0, "loss.triplet.weight_x", 0, "use_gpu", "False"])
    manager = make_image_manager(tmp_path)
    model = config.build_model(cfg, manager.num_train_pids)
    with pytest.raises(InputError, match=r"loss\.triplet\.weight_x are both 0; raise one of them"):
        build_engine(cfg, manager, model, config.build_optimizer(cfg, model), None)


def test_new_layers_that_the_network_does_not_have_are_refused():
    cfg = get_default_config()
    cfg.merge_from_list(["model.name", "osnet_x0_25", "model.pretrained", "False", "use_gpu", "False"])
    cfg.merge_from_list(["train.staged_lr", True, "train.new_layers", "[clasifier]"])
    model = config.build_model(cfg, 3)
    with pytest.raises(InputError, match=r"train\.new_layers: the model has no layer clasifier; its layers are conv1"):
        config.build_optimizer(cfg, model)
    cfg.merge_from_list(["train.new_layers", "classifier"])
    assert len(config.build_optimizer(cfg, model).param_groups) == 2


def test_what_was_assigned_outlives_a_merge():
    cfg = get_default_config()
    cfg.data.height, cfg.data.norm_mean = 64, [0.5, 0.5, 0.5]
    cfg.merge_from_list(["train.max_epoch", 3])
    assert (cfg.data.height, cfg.data.width, cfg.data.norm_mean) == (64, 128, [0.5, 0.5, 0.5])
    cfg.data.norm_std[0] = 9
    assert get_default_config().data.norm_std[0] == 0.229


@pytest.mark.parametrize("key", ["loss.pml.kwargs", "loss.pml.miner", "loss.drsl.reducer"])
def test_numbers_of_any_form_are_numbers_in_arguments_too(tmp_path, key):
    given = "{name: A, a: 5e-2, b: [1E3, .5e+1, 1.e2], c: {d: -2e0}, e: 2e, f: e2, g: 1.2.3e4, h: ['0007', 064, 7]}"
    by_word, by_file = get_default_config(), get_default_config()
    by_word.merge_from_list([key, given])
    section, _, name = key.rpartition(".")
    first, _, second = section.partition(".")
    by_file.merge_from_file(write(tmp_path / "a.yaml", f"{first}: {{{second}: {{{name}: {given}}}}}"))
    for cfg in (by_word, by_file):
        found = cfg[first][second][name]
        assert (found["a"], found["b"], found["c"]) == (0.05, [1000.0, 5.0, 100.0], {"d": -2.0})
        assert (found["e"], found["f"], found["g"], found["h"]) == ("2e", "e2", "1.2.3e4", ["0007", "064", 7])


def test_dots_lead_into_the_arguments_of_a_class_at_any_depth(tmp_path):
    lines = [
        "loss.pml.miner.name: TripletMarginMiner",
        "loss.pml.miner.distance.name: LpDistance",
        "loss.pml.miner.distance.p: 1",
        "loss.pml.kwargs.a.b.c: 1",
        "loss.pml.kwargs.a.b.d: 2",
        "loss.pml.kwargs.e: LpDistance",
        "loss.pml.kwargs.e.p: 3",
        "loss.pml.kwargs.f: {name: LpDistance, p: 4}",
        "loss.pml.kwargs.f: {name: CosineSimilarity}",
    ]
    by_word, by_file, by_section = get_default_config(), get_default_config(), get_default_config()
    by_word.merge_from_list([word for line in lines for word in line.split(": ", 1)])
    *first, last = lines
    by_file.merge_from_file(write(tmp_path / "a.yaml", "\n".join(first)))
    nested = "\n".join(f"  {line.removeprefix('loss.')}" for line in first)
    by_section.merge_from_file(write(tmp_path / "b.yaml", f"loss:\n{nested}"))
    for cfg in (by_file, by_section):  # A key stands once in a file.
        cfg.merge_from_list(last.split(": ", 1))
    for cfg in (by_word, by_file, by_section):
        distance = build_miner("loss.pml", cfg.loss.pml).distance
        assert isinstance(distance, LpDistance) and distance.p == 1
        inner = {"e": {"name": "LpDistance", "p": 3}, "f": {"name": "CosineSimilarity"}}
        assert cfg.loss.pml.kwargs == {"a": {"b": {"c": 1, "d": 2}}, **inner}


def test_words_may_hold_yaml():
    cfg = get_default_config()
    cfg.merge_from_list(["loss.pml.kwargs", "{m: 0.4, gamma: 80}", "data.transforms", "[random_flip, random_erase]"])
    cfg.merge_from_list(["loss.pml.miner", "{name: MultiSimilarityMiner, epsilon: 0.2}"])
    assert cfg.loss.pml.kwargs == {"m": 0.4, "gamma": 80}
    assert cfg.loss.pml.miner == {"name": "MultiSimilarityMiner", "epsilon": 0.2}
    assert cfg.data.transforms == ["random_flip", "random_erase"]
    with pytest.raises(ValueError, match=r"'loss.pml.kwargs': \{m: 0.4 is not YAML"):
        cfg.merge_from_list(["loss.pml.kwargs", "{m: 0.4"])
    with pytest.raises(ValueError, match=r"'loss.pml.kwargs' takes \{ARGUMENT: VALUE, ...\}, got 5"):
        cfg.merge_from_list(["loss.pml.kwargs", "5"])


def test_only_what_goes_wrong_with_imagenet_weights_is_blamed_on_them(monkeypatch):
    build_model = torchreid.models.build_model

    def unreachable(pretrained, **others):
        if pretrained:
            raise OSError("no route to host")
        return build_model(pretrained=False, **others)

    def broken(**others):
        raise RuntimeError("a layer is wrong")

    cfg = get_default_config()
    cfg.merge_from_list(["model.name", "osnet_x0_25", "use_gpu", False])
    monkeypatch.setattr(torchreid.models, "build_model", unreachable)
    with pytest.raises(ValueError, match=r"osnet_x0_25: no route to host\. .*load_weights FILE\. .*pretrained False"):
        config.build_model(cfg, 5)
    cfg.model.load_weights = "weights.pth"  # which takes the place of ImageNet's
    assert config.build_model(cfg, 5)
    cfg.model.load_weights = ""
    monkeypatch.setattr(torchreid.models, "build_model", broken)
    with pytest.raises(RuntimeError, match="a layer is wrong"):
        config.build_model(cfg, 5)


PIECES = [
    "train", "lr", "loss", "pml", "kwargs", "datasets", "base", "x.yaml", ": ", "\n", "\n  ", "{", "}", "[", "]", ",",
    "&a ", "*a", "- ", "? ", "!!int ", "<<", "'", "1", "2024-13-01", "0x", "null", "=", "\t", "\ufeff", "\ud800",
]  # fmt: skip
KEYS_OF_THREE_KINDS = ["train.lr", "loss.pml.kwargs", "datasets.a"]


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12), key=st.sampled_from(KEYS_OF_THREE_KINDS))
def test_whatever_a_file_or_a_word_holds_only_bad_input_is_raised(tmp_path, pieces, key):
    text = "".join(pieces)
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    for merge, source in (("merge_from_file", tmp_path / "x.yaml"), ("merge_from_list", [key, text])):
        try:
            getattr(get_default_config(), merge)(source)
        except InputError as error:
            assert str(error)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # Chunks of 2, 2 and 1; below, of 3, 3 and 3, because chunks differ by one image at most.
        (["train.batch_size", 5, "train.chunk_size", 2], "cannot take 1 image of 64 x 32 pixels: Expected more than 1"),
        (["train.batch_size", 9, "train.chunk_size", 4], None),
        (["train.batch_size", 1], "cannot take 1 image of 64 x 32 pixels: Expected more than 1"),
        (["data.height", 8, "data.width", 8, "model.name", "hacnn"], "hacnn cannot take 2 images of 8 x 8 pixels"),
        (
            ["data.height", 8, "data.width", 8, "test.evaluate", True, "model.name", "squeezenet1_1"],
            "cannot take 1 image",
        ),
        (["train.batch_size", 8, "train.chunk_size", 4], None),
        (["train.batch_size", 1, "data.k_tfm", 2], None),
        (["train.batch_size", 1, "data.type", "video"], None),
        (["train.batch_size", 1, "test.evaluate", True], None),
    ],
)
def test_a_network_is_tried_on_the_fewest_images_that_it_will_get(words, message):
    cfg = get_default_config()
    cfg.merge_from_list(["model.name", "osnet_x0_25", "model.pretrained", False, "use_gpu", False])
    cfg.merge_from_list(["data.height", 64, "data.width", 32, *words])
    model = config.build_model(cfg, 3).train()
    before = copy.deepcopy(model.state_dict())
    drawn = torch.get_rng_state()
    with contextlib.nullcontext() if message is None else pytest.raises(InputError, match=message):
        check_takes(cfg, model)
    assert model.training and torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_network_that_only_asserts_its_size_is_refused_with_words():
    class Asserting(torch.nn.Linear):
        def forward(self, images):
            raise AssertionError  # as a bare assert does

    with pytest.raises(InputError, match="cannot take 2 images of 256 x 128 pixels: its layers need another size"):
        check_takes(get_default_config(), Asserting(1, 1))


def test_no_number_of_cameras_in_a_batch_stands_for_all(tmp_path):
    make_image_manager(tmp_path)
    cfg = get_default_config()
    cfg.merge_from_list(["data.root", str(tmp_path / "toy"), "data.sources", "toy", "data.targets", "toy"])
    cfg.merge_from_list(["sampler.train_sampler", "RandomDomainSampler", "sampler.num_cams", 0, "train.batch_size", 8])
    cfg.merge_from_list(["data.workers", 0, "use_gpu", False])
    for batch in config.build_datamanager(cfg).train_loader:
        assert batch["camid"].bincount().tolist() == [4, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("RandomDomainSampler train.batch_size 12", None),  # all images of a camera
        ("RandomDomainSampler train.batch_size 13", "num_cams 1 takes 1 cameras .*_size 13, .* have 2, .* with 12 tr"),
        ("RandomDomainSampler sampler.num_cams 3 train.batch_size 9", "num_cams 3 takes 3 cameras .* sources have 2"),
        ("RandomDomainSampler sampler.num_cams 2 train.batch_size 9", "num_cams 2 .* equal shares of .*_size 9, and"),
        ("RandomDatasetSampler sampler.num_datasets 2", "num_datasets 2 takes 2 data sets .* have 1, the .* with 24"),
        ("RandomSampler data.load_train_targets True", r"must not have overlap: data.sources \['toy'\].*targets True"),
    ],
)
def test_keys_that_cannot_go_together_are_named(tmp_path, words, message):
    make_image_manager(tmp_path)
    cfg = get_default_config()
    cfg.merge_from_list(["data.root", str(tmp_path / "toy"), "data.sources", "toy", "data.targets", "toy"])
    cfg.merge_from_list(["data.workers", 0, "use_gpu", False, "sampler.train_sampler", *words.split()])
    with contextlib.nullcontext() if message is None else pytest.raises(InputError, match=message) as caught:
        config.build_datamanager(cfg)
    assert message is None or "num_instances" not in str(caught.value)
    with pytest.raises(InputError, match=r"^an assertion of torchreid failed: data.sources "), input_errors(cfg):
        raise AssertionError


OPTIMIZERS = {
    "adam": {"betas": (0.71, 0.72), "amsgrad": False},
    "amsgrad": {"betas": (0.71, 0.72), "amsgrad": True},
    "radam": {"betas": (0.71, 0.72)},
    "rmsprop": {"momentum": 0.73, "alpha": 0.74},
    "sgd": {"momentum": 0.73, "dampening": 0.0, "nesterov": True},
}


@pytest.mark.parametrize(
    ("name", "words", "wanted"),
    [
        *((name, [], settings) for name, settings in OPTIMIZERS.items()),
        ("sgd", ["sgd.nesterov", "False", "sgd.dampening", 0.75], {"dampening": 0.75, "nesterov": False}),
    ],
)
def test_an_optimizer_has_its_settings(name, words, wanted):
    cfg = get_default_config()
    cfg.merge_from_list(["adam.beta1", 0.71, "adam.beta2", 0.72, "sgd.momentum", 0.73, "rmsprop.alpha", 0.74])
    cfg.merge_from_list(["train.optim", name, "train.lr", 0.76, "train.weight_decay", 0.77, "sgd.nesterov", "True"])
    cfg.merge_from_list(words)
    (found,) = config.build_optimizer(cfg, torch.nn.Linear(1, 1)).param_groups
    assert wanted | {"lr": 0.76, "weight_decay": 0.77} == {key: found[key] for key in [*wanted, "lr", "weight_decay"]}


def test_missing_data_are_refused_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = get_default_config()
    for root in (tmp_path / "nowhere", tmp_path, "~/nowhere"):
        cfg.data.root = str(root)
        with pytest.raises(ValueError, match=rf"cannot read market1501 below data.root '{root}'.*--root"):
            config.build_datamanager(cfg)
        assert not list(tmp_path.iterdir())


def test_an_unknown_model_is_refused():
    cfg = get_default_config()
    cfg.model.name = "resnet5"
    with pytest.raises(
        ValueError, match=r"model\.name 'resnet5' is unknown; the nearest is 'resnet50', and drsl-train"
    ):
        config.build_model(cfg, 3)


def test_the_splits_that_torchreid_draws_are_the_same_for_all_seeds(tmp_path):
    drawn = []
    for seed in (1, 2):
        for camera, number in itertools.product("ab", range(12)):
            path = tmp_path / str(seed) / "viper" / "VIPeR" / f"cam_{camera}" / f"{number:04}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 16)).save(path)
        cfg = get_default_config()
        words = (
            f"data.sources [viper] data.targets [viper] data.root {tmp_path / str(seed)} data.workers 0 use_gpu False"
        )
        cfg.merge_from_list(words.split())
        seed_everything(seed)
        before = random.getstate()
        manager = config.build_datamanager(cfg)
        assert random.getstate() == before
        drawn.append([Path(item[0]).name for item in manager.train_loader.dataset.train])
    assert drawn[0] == drawn[1] != sorted(drawn[0])


def test_identities_that_torchreid_numbers_as_a_set_of_names_are_numbered_by_their_images(tmp_path):
    """The order of such a set differs from process to process."""
    names = [f"cuhk02/Dataset/P{pair}/cam{camera}/{number:03}_1.png" for pair in (1, 2, 5) for camera in (1, 2)
             for number in range(6)]  # fmt: skip
    names += [f"cuhksysu/cropped_images/p{number}_s1_{shot}.jpg" for number in range(10, 18) for shot in range(2)]
    for name in names:
        Path(tmp_path, name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 16)).save(tmp_path / name)
    cfg = get_default_config()
    sets = "data.sources [cuhk02,cuhksysu] data.targets [cuhk02]"
    cfg.merge_from_list(f"{sets} data.root {tmp_path} data.workers 0 use_gpu False train.batch_size 4".split())
    train = sorted(config.build_datamanager(cfg).train_loader.dataset.train)
    pairs = [number for pair in (0, 6) for _ in range(2) for number in range(pair, pair + 6)]
    assert [item[1] for item in train] == [*pairs, *(number for number in range(12, 20) for _ in range(2))]
