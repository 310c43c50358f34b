"""The command line: one clear line and a status for what is wrong, and nothing lost."""

import contextlib
import errno
import io
import os
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torchreid
from PIL import Image
from trained import complaint, csv_data, launch, words

from pml_drsl.checks import InputError
from torchreid_ext import get_default_config
from torchreid_ext.checkpoint import checkpoint
from torchreid_ext.checkpoint.folder import alone
from torchreid_ext.cli.train import main
from torchreid_ext.config import run
from torchreid_ext.engine import engines
from torchreid_ext.engine.base import BaseEngine
from torchreid_ext.runtime import distributed


def made(monkeypatch):
    """The engines of the runs that are launched from here on, none of which trains or tests."""
    found = []
    monkeypatch.setattr(BaseEngine, "run", lambda self, **kwargs: found.append(self) or {})
    return found


def test_trains_resumes_and_reloads_its_configuration(tmp_path, capsys):
    # Identities with gaps, in words.
    csv_data(tmp_path, identity=lambda pid: f"id {3 * pid}")
    assert launch(tmp_path) == 0
    saved = get_default_config()
    saved.merge_from_file(tmp_path / "log" / "config.yaml")
    assert saved.datasets.listed == {"csv": "list.csv"} and saved.train.batch_size == 8 and saved.train.amp == "off"
    again = ["data.save_dir", str(tmp_path / "again")]
    assert main(["--config-file", str(tmp_path / "log" / "config.yaml"), "train.max_epoch", "2", *again]) == 0
    log = next((tmp_path / "again").glob("train.log-*")).read_text()
    assert "Model osnet_x0_25" in log and "mAP:" in log and "##### Evaluating listed #####\n" in log
    assert log.count("max_epoch: 2\n") == 1 and "max_epoch: " not in capsys.readouterr().out  # the configuration
    resumed = {"model.resume": "auto", "train.max_epoch": 3, "data.save_dir": tmp_path / "again"}
    assert launch(tmp_path, **resumed, **{"test.untrained": True}) == 0
    out = capsys.readouterr().out
    assert "Config differs from the checkpoint's: train.max_epoch: 2 -> 3" in out
    assert f"Resuming from '{tmp_path / 'again' / 'model' / 'model-last.pth.tar'}' after epoch 2" in out
    assert "Test before training" not in out
    # The configuration starts the whole run anew, not where this one went on.
    saved.merge_from_file(tmp_path / "again" / "config.yaml")
    assert saved.train.start_epoch == 0
    assert launch(tmp_path, **resumed, **{"model.name": "osnet_x0_5"}) == 2
    assert "cannot resume with another model.name: 'osnet_x0_25' -> 'osnet_x0_5'" in complaint(capsys)


@pytest.mark.parametrize(
    ("content", "words", "workers"),
    [(b"hello", "it is not an image", 0), (None, "it is damaged", 1)],
    ids=["no image", "cut"],
)
def test_an_unreadable_image(tmp_path, capsys, content, words, workers):
    csv_data(tmp_path)
    path = tmp_path / "images" / "3_0_1.png"
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    assert launch(tmp_path, **{"data.workers": workers}) == 2
    message = complaint(capsys)
    assert message.startswith(f"drsl-train: cannot read image '{path}': {words}")


def test_an_unreadable_image_of_the_gallery_loses_no_epoch(tmp_path, capsys):
    csv_data(tmp_path)
    path = tmp_path / "images" / "9_1_1.png"
    whole = path.read_bytes()
    path.write_bytes(b"")
    assert launch(tmp_path, **{"train.max_epoch": 2, "train.checkpoint_freq": 5}) == 2
    message = complaint(capsys)
    assert f"cannot read image '{path}'" in message
    (log,) = tmp_path.rglob("train.log-*")
    assert log.read_text().splitlines()[-1] == message
    path.write_bytes(whole)
    assert launch(tmp_path, **{"train.max_epoch": 2, "train.checkpoint_freq": 5, "model.resume": "auto"}) == 0
    out = capsys.readouterr().out
    assert "after epoch 2" in out and "=> Trained 2 epochs already" in out and "mAP:" in out


def test_an_unusable_list(tmp_path, capsys):
    csv_data(tmp_path, lambda rows: [row[:2] + row[3:] for row in rows])
    assert launch(tmp_path) == 2
    assert "has no column 'camid'" in complaint(capsys)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_defect_of_the_program_keeps_its_traceback(tmp_path, capsys, monkeypatch, kind):
    """Only bad input is answered with one line: the place of a defect must be found, in the log too."""
    csv_data(tmp_path)

    def defective(self, loss):
        raise kind("shapes do not match")

    monkeypatch.setattr(engines.ImageDRSLEngine, "step", defective)
    with pytest.raises(kind, match="shapes do not match"):
        launch(tmp_path)
    (log,) = tmp_path.rglob("train.log-*")
    text = log.read_text()
    assert "Traceback (most recent call last)" in text and "in defective" in text
    assert text.splitlines()[-1] == f"{kind.__name__}: shapes do not match"
    assert "drsl-train:" not in capsys.readouterr().err


def test_two_dashes_before_the_config_keys_are_ignored(tmp_path, capsys, monkeypatch):
    csv_data(tmp_path)
    made(monkeypatch)
    assert launch(tmp_path) == 0
    config = str(tmp_path / "log" / "config.yaml")
    other = ["data.save_dir", str(tmp_path / "other"), "test.ranks", "[1]"]
    assert main(["--config-file", config, "--", "train.max_epoch", "0", *other]) == 0
    assert main(["--config-file", config, "--", "train.max_epoch"]) == 2
    assert "KEY VALUE pairs, got 1 words: train.max_epoch" in complaint(capsys)


def test_a_test_of_a_run_that_has_no_checkpoint(tmp_path, capsys):
    csv_data(tmp_path)
    assert launch(tmp_path, **{"model.resume": "auto", "test.evaluate": True}) == 2
    assert "auto found no checkpoint of a finished epoch" in complaint(capsys)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal(tmp_path, capsys, monkeypatch, signum, status):
    csv_data(tmp_path)
    step = engines.ImageDRSLEngine.step

    def step_and_signal(self, loss):
        step(self, loss)
        os.kill(os.getpid(), signum)

    monkeypatch.setattr(engines.ImageDRSLEngine, "step", step_and_signal)
    assert launch(tmp_path) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert lines[0] == f"{signum.name}: stopping as soon as possible"
    assert lines[1].startswith(
        f"drsl-train: stopped by {signum.name} in epoch 1; model.resume auto begins it again from"
    )
    assert checkpoint.load(tmp_path / "log" / "model" / "model-last.pth.tar")["epoch"] == 0
    monkeypatch.undo()
    # Nothing was tested yet, and so nothing is the best. Nothing trains, and so the configuration stays.
    config = (tmp_path / "log" / "config.yaml").read_bytes()
    assert launch(tmp_path, **{"model.resume": "auto", "train.max_epoch": 0}) == 0
    assert not (tmp_path / "log" / "model" / "model-best.pth.tar").exists()
    assert (tmp_path / "log" / "config.yaml").read_bytes() == config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train.lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"train.lr": 1e30}, "the loss is"),
        ({"train.seed": 2**64}, "train.seed takes a whole number of 64 bits, got 18446744073709551616"),
        ({"sgd.nesterov": True, "train.optim": "sgd", "sgd.momentum": 0}, "Nesterov momentum requires a momentum"),
        ({"data.sources": "nobody"}, "Invalid dataset name"),
        ({"data.save_dir": "\udcd5\udcc5"}, "data.save_dir '\\udcd5\\udcc5' has bytes that are not UTF-8"),
        ({"train.chunk_size": 1}, "osnet_x0_25 cannot take 1 image of 32 x 16 pixels"),
        ({"train.batch_size": 28}, "cannot fill a batch: train.batch_size 28 with sampler.num_instances 4 needs 7 i"),
    ],
)
def test_wrong_options(tmp_path, capsys, options, words):
    csv_data(tmp_path)
    assert launch(tmp_path, **options) == 2
    assert words in complaint(capsys)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("-t a b data.save_dir log", "--targets takes the config key data.save_dir"),
        ("-s a use_gpu False", "--sources takes the config key use_gpu"),
        ("--transforms random_flip datasets.a.folder b", "--transforms takes the config key datasets.a.folder"),
        ("--transforms random_flip loss.pml.kwargs.m 1", "--transforms takes the config key loss.pml.kwargs.m"),
    ],
)
def test_a_config_key_among_names_is_told_where_it_belongs(capsys, words, option):
    assert main(words.split()) == 2
    assert f"{option} for a name: another option, such as --root FOLDER, must stand between" in complaint(capsys)


def test_the_root_may_be_below_the_users_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    lost = ["-s", "mine", "-t", "mine", "--root=~/nowhere", "datasets.mine.folder", "photos", "use_gpu", "False"]
    assert main([*lost, "data.save_dir", "~/log"]) == 2
    assert f"there is no folder {tmp_path}/nowhere/photos" in complaint(capsys)
    assert not [*tmp_path.iterdir()]  # No folder is made for a run that does not start.
    (tmp_path / "here").mkdir()
    csv_data(tmp_path / "here")
    assert main(words(Path("~/here"), **{"data.save_dir": "~/log", "train.max_epoch": 0})) == 0
    assert (tmp_path / "log").is_dir()


def test_the_seed_draws_the_weights(tmp_path, monkeypatch):
    csv_data(tmp_path)
    found = made(monkeypatch)
    for seed in (1, 1, 2):
        assert launch(tmp_path, **{"train.seed": seed}) == 0
    first, again, other = (engine.model.conv1.conv.weight for engine in found)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(("kind", "asked"), [("image", True), ("video", False)])
def test_a_gpu_tries_its_convolutions_on_images(monkeypatch, kind, asked):
    def stop(cfg):
        raise InputError("far enough")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(run, "build_datamanager", stop)
    cfg = get_default_config()
    cfg.data.type = kind
    for cfg.use_gpu in (False, True):
        with pytest.raises(InputError, match="far enough"):
            run.prepare(cfg)
        assert torch.backends.cudnn.benchmark == (cfg.use_gpu and asked)


def test_a_sampler_of_identities(tmp_path, recwarn, monkeypatch):
    csv_data(tmp_path)
    batches = []
    forward_backward = engines.ImageDRSLEngine.forward_backward

    def watched(self, data):
        batches.append(data["pid"].tolist())
        return forward_backward(self, data)

    monkeypatch.setattr(engines.ImageDRSLEngine, "forward_backward", watched)
    assert launch(tmp_path, **{"sampler.train_sampler": "MPerClassSampler", "data.workers": 1}) == 0
    assert [[batch.count(pid) for pid in set(batch)] for batch in batches] == [[4, 4]] * 3
    assert not chance_warnings(recwarn)


def chance_warnings(caught):
    return [str(warning.message) for warning in caught if "several images of an identity" in str(warning.message)]


@pytest.mark.parametrize("loss, name", [("drsl", "DRSLoss"), ("triplet", "TripletLoss"), ("softmax", None)])
def test_a_sampler_that_brings_positives_together_by_chance_is_told_once(tmp_path, recwarn, monkeypatch, loss, name):
    csv_data(tmp_path)
    made(monkeypatch)
    assert launch(tmp_path, **{"sampler.train_sampler": "RandomSampler", "loss.name": loss}) == 0
    told = chance_warnings(recwarn)
    assert [text.split(" needs")[0] for text in told] == ([name] if name else [])


@pytest.mark.parametrize(("wanted", "processes"), [(64, 3), (-1, 3), (2, 2)])
def test_no_more_workers_than_cores(tmp_path, capsys, monkeypatch, wanted, processes):
    csv_data(tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    found = made(monkeypatch)
    assert launch(tmp_path, **{"data.workers": wanted}) == 0
    assert found[0].train_loader.num_workers == processes and found[0].train_loader.persistent_workers
    assert ("data.workers 64: there are 3 cores" in capsys.readouterr().out) == (wanted == 64)


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["keys"], [
            "model.name ('resnet50')\n    network, a name of torchreid's model zoo\n",
            "train.warmup_epoch (0)\n    epochs at the start over which the learning rate rises linearly to its ",
            "loss.drsl.weight_x (1.0)\n    weight of the identity cross-entropy\n",
        ]),
        (["keys", "NECK"], ["model.bnneck (False)"]),
        (["keys", "junk"], ["datasets.NAME.junk (['-1'])\n    people whose images are left out everywhere"]),
        (["models", "osnet"], ["osnet_x0_25"]),
        (["losses", "circle"], ["CircleLoss(m, gamma"]),
        (["miners"], ["RankViolationMiner("]),
        (["datasets"], ["market1501 (image)", "mars (video)", "synthetic_tracklets (video)"]),
    ],
)  # fmt: skip
def test_lists(capsys, words, lines):
    assert main(["--list", *words]) == 0
    out = capsys.readouterr().out
    assert all(line in out for line in lines)
    assert ("resnet50" in out) == (words == ["keys"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nets"], "--list takes one of keys, models, .*, got 'nets'"),
        (["models", "gpt"], "none of the models has 'gpt'"),
    ],
)
def test_a_list_that_there_is_not(capsys, words, said):
    assert main(["--list", *words]) == 2
    assert re.search(said, complaint(capsys))


def test_a_resumed_run_needs_no_other_weights(tmp_path, capsys, monkeypatch):
    csv_data(tmp_path)
    assert launch(tmp_path) == 0
    made(monkeypatch)
    build_model = torchreid.models.build_model

    def offline(pretrained, **others):
        assert not pretrained
        return build_model(pretrained=False, **others)

    monkeypatch.setattr(torchreid.models, "build_model", offline)
    lost = {"model.pretrained": True, "model.load_weights": tmp_path / "lost.pth"}
    resumed = {"model.resume": "auto", "train.max_epoch": 2}
    tested = {"model.resume": tmp_path / "log" / "model" / "model.pth.tar-1", "test.evaluate": True}
    for options in (resumed, tested):
        assert launch(tmp_path, **options, **lost) == 0, capsys.readouterr().err
    # Without a checkpoint in its own folder, a run starts from them.
    (tmp_path / "log" / "model").rename(tmp_path / "log" / "model_old")
    capsys.readouterr()
    assert launch(tmp_path, **{"model.resume": "auto"} | lost) == 2 and "lost.pth' does not exist" in complaint(capsys)


@pytest.mark.parametrize(("left_out", "asked"), [("classifier", [False]), ("conv2", [False, True])])
def test_layers_that_a_file_of_weights_lacks_have_imagenets(tmp_path, monkeypatch, left_out, asked):
    csv_data(tmp_path)
    build_model, pretrained_, engines_ = torchreid.models.build_model, [], made(monkeypatch)

    def imagenet(pretrained, **others):
        pretrained_.append(pretrained)
        model = build_model(pretrained=False, **others)
        for parameter in model.parameters() if pretrained else ():
            torch.nn.init.constant_(parameter, 7)
        return model

    weights = build_model("osnet_x0_25", 6, loss="triplet", pretrained=False).state_dict()
    torch.save({name: value for name, value in weights.items() if not name.startswith(left_out)}, tmp_path / "part.pth")
    monkeypatch.setattr(torchreid.models, "build_model", imagenet)
    assert launch(tmp_path, **{"model.pretrained": True, "model.load_weights": tmp_path / "part.pth"}) == 0
    found = engines_[0].model.state_dict()
    assert pretrained_ == asked and torch.equal(found["conv1.conv.weight"], weights["conv1.conv.weight"])
    assert bool((found["conv2.0.conv1.conv.weight"] == 7).all()) == (left_out == "conv2")


def test_a_test_alone_leaves_the_results_of_the_run(tmp_path, capsys):
    csv_data(tmp_path)
    assert launch(tmp_path) == 0
    training = checkpoint.load(tmp_path / "log" / "model" / "model-last.pth.tar")["training"]
    assert training["people"] == [f"listed/{pid}" for pid in range(6)]
    names = "metrics.json", "queries_listed.csv", "ranking_listed.png", "visrank_listed/index.html"
    (tmp_path / "log" / "visrank_listed").mkdir()
    for name in names:
        (tmp_path / "log" / name).write_text("of the run")
    tested = {"test.evaluate": True, "test.queries": True, "test.picture": 1, "test.visrank": True}
    weights = {"model.load_weights": tmp_path / "log" / "model" / "model-last.pth.tar"}
    for start in ({"model.resume": "auto"}, weights):
        assert launch(tmp_path, **tested, **start) == 0
        assert {(tmp_path / "log" / name).read_text() for name in names} == {"of the run"}
        assert f'Results of this test saved to "{tmp_path / "log" / "test"}"; those' in capsys.readouterr().out
    assert launch(tmp_path, **tested, **weights, **{"data.save_dir": tmp_path / "tested"}) == 0
    for name in names:  # A folder without a run has them itself.
        found = [(folder / name).read_bytes() for folder in (tmp_path / "tested", tmp_path / "log" / "test")]
        assert found[0] == found[1] != b"of the run"


def test_a_test_of_people_on_whom_the_starting_weights_were_trained_is_refused(tmp_path, capsys, monkeypatch):
    csv_data(tmp_path)  # which trains on the people 0 to 5, and tests on 6 to 11
    found = made(monkeypatch)
    network = torchreid.models.build_model("osnet_x0_25", 4, loss="triplet", pretrained=False).state_dict()

    def start(people, **options):
        checkpoint.save({"state_dict": network, "training": {"people": people}}, tmp_path / "old.pth")
        return launch(tmp_path, **{"model.load_weights": tmp_path / "old.pth"} | options)

    before, now = ["listed/3", "listed/8", "listed/gone", "other/9"], [f"listed/{pid}" for pid in range(6)]
    validation = {"data.validation": 0.6}  # on four of the people 0 to 5
    for people, options, number in ((before, {}, 1), (before, {"test.evaluate": True}, 1), (now, validation, 4)):
        assert start(people, **options) == 2
        said = rf"{number} people of this test, such as 'listed/\d', are people that '.*old.pth' was trained on: test "
        assert re.search(f"{said}on other people .*; data.allow_overlap True allows it", complaint(capsys))
    assert not found and start(["listed/3"]) == 0
    assert start(before, **{"data.allow_overlap": True}) == 0
    people = sorted({*before, *now})
    assert found[-1].people == people
    # Whatever starts from these weights knows all of them, and so does the run when it goes on.
    found[-1].save_model(0, 0.5, str(tmp_path / "log"))
    assert launch(tmp_path, **{"model.resume": "auto", "data.allow_overlap": True}) == 0
    assert found[-1].people == people
    second = {"model.load_weights": tmp_path / "log" / "model" / "model.pth.tar-1", "data.save_dir": tmp_path / "b"}
    assert launch(tmp_path, **second) == 2 and "'listed/8'" in complaint(capsys)


@pytest.mark.parametrize("flags", [(), ("--dry-run",)])
def test_files_and_folders_that_cannot_serve_are_refused_before_the_data_are_read(tmp_path, capsys, monkeypatch, flags):
    csv_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for options, said in (
        ({"data.save_dir": "list.csv"}, "data.save_dir 'list.csv': 'list.csv' is no folder"),
        ({"data.save_dir": "list.csv/a/log"}, "data.save_dir 'list.csv/a/log': 'list.csv' is no folder"),
        ({"model.load_weights": "~/lost.pth"}, f"'{tmp_path}/lost.pth' does not exist"),
        ({"model.load_weights": "images"}, "'images' is a folder"),
        ({"model.resume": True}, "'True' does not exist"),
    ):
        assert launch(tmp_path, *flags, **options) == 2
        out, err = capsys.readouterr()
        assert not out and said in err and err.count("\n") == 1
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path or mode & os.W_OK == 0)
    assert launch(tmp_path, *flags) == 2
    out, err = capsys.readouterr()
    assert not out and f"'{tmp_path}' cannot be written; give another folder" in err
    assert not (tmp_path / "log").exists()


def test_a_first_epoch_that_was_asked_for_is_that_of_a_run_without_a_checkpoint(tmp_path):
    csv_data(tmp_path)
    assert launch(tmp_path, **{"model.resume": "auto", "train.start_epoch": 1, "train.max_epoch": 2}) == 0
    assert not (tmp_path / "log" / "model" / "model.pth.tar-1").exists()


def test_a_test_without_a_trained_network_is_refused_and_no_epoch_trains_none(tmp_path, capsys):
    csv_data(tmp_path)
    assert launch(tmp_path, **{"test.evaluate": True}) == 2
    assert "give its checkpoint with model.resume FILE or model.load_weights FILE" in complaint(capsys)
    assert launch(tmp_path, **{"train.max_epoch": 0, "test.untrained": True, "test.picture": 1}) == 0
    assert (tmp_path / "log" / "untrained" / "ranking_listed.png").is_file()
    out = capsys.readouterr().out
    assert "mAP:" in out and f'Written to "{tmp_path / "log"}": TensorBoard log\n' in out
    assert not re.search("untrained +trained", out)
    (tmp_path / "x.pth").touch()
    assert launch(tmp_path, "--dry-run", **{"test.evaluate": True, "model.load_weights": tmp_path / "x.pth"}) == 2
    assert "--dry-run shows what is trained; leave one out" in complaint(capsys)


def test_a_new_run_does_not_overwrite_another(tmp_path, capsys, monkeypatch):
    csv_data(tmp_path)
    assert launch(tmp_path) == 0
    shutil.copytree(tmp_path / "log", tmp_path / "other")

    def written():
        names = ("config.yaml", "metrics.json", "model/model.pth.tar-1", "model/model-best.pth.tar")
        return [(tmp_path / "log" / name).read_bytes() for name in names]

    kept = written()
    own, other = (tmp_path / name / "model" / "model-last.pth.tar" for name in ("log", "other"))
    capsys.readouterr()
    for options in ({}, {"train.max_epoch": 0, "test.untrained": True}, {"model.resume": other, "train.max_epoch": 2}):
        for flags in ((), ("--dry-run",)):
            assert launch(tmp_path, *flags, **options, **{"train.seed": 7}) == 2
            out, err = capsys.readouterr()
            assert not out and err.count("\n") == 1
            assert "log' holds a run that was trained for 1 epoch(s): model.resume auto goes on with it; for a" in err
            assert "give data.save_dir log/second" in err
    (log,) = (tmp_path / "log").glob("train.log-*")  # They may have started in the second in which the run did.
    assert written() == kept and "holds a run" not in log.read_text()
    with ThreadPoolExecutor() as pool:
        holds = alone(tmp_path / "log")
        pool.submit(holds.__enter__).result()
        assert launch(tmp_path, **{"model.resume": "auto", "train.max_epoch": 2}) == 2
        assert "another run is writing into" in complaint(capsys)
        pool.submit(holds.__exit__, None, None, None).result()
    assert written() == kept and [*(tmp_path / "log").glob("train.log-*")] == [log]
    # There is nothing to train, so the configuration of what was trained stays.
    assert launch(tmp_path, **{"model.resume": "auto", "train.seed": 7}) == 0
    for resume in ("auto", own):
        assert launch(tmp_path, "--dry-run", **{"model.resume": resume, "train.max_epoch": 2}) == 0
    out = capsys.readouterr().out
    assert out.count(f"Resuming from '{own}' after epoch 1") == 3 and out.count("; 1 epochs, without tests") == 2
    assert out.count("it starts from a checkpoint") == 3
    begun_later = {"train.start_epoch": 2, "train.max_epoch": 5, "data.save_dir": tmp_path / "later"}
    assert launch(tmp_path, "--dry-run", **begun_later) == 0
    assert "; 3 epochs, without tests" in capsys.readouterr().out
    assert written() == kept
    assert launch(tmp_path, "--dry-run", **{"model.resume": tmp_path / "lost.pth", "data.save_dir": tmp_path}) == 2
    assert "lost.pth' does not exist" in complaint(capsys)
    # As under torchrun --max-restarts 3: a restart with the same words would go back to this checkpoint.
    monkeypatch.setattr(distributed, "may_restart", lambda: True)
    assert launch(tmp_path, "--dry-run", **{"model.resume": own}) == 2
    assert "--max-restarts: give model.resume auto" in complaint(capsys)


@pytest.mark.parametrize("options", [{"data.k_tfm": 2}, {"loss.name": "softmax", "train.chunk_size": 4}])
def test_a_dry_run_shows_what_would_be_trained_and_writes_a_picture_alone(tmp_path, capsys, options):
    csv_data(tmp_path)
    assert launch(tmp_path, "--dry-run", **options, **{"data.transforms": "[]"}) == 0
    out = capsys.readouterr().out
    assert re.search(r"train +\| +6 \| +24 \| +2", out), out
    assert "parameters; it starts from random weights" in out and re.search(
        r"An epoch of 3 steps takes about \d+ s", out
    )
    (picture,) = (tmp_path / "log").iterdir()
    number = 8 * options.get("data.k_tfm", 1)
    assert f"A batch of {number} images" in out
    with Image.open(picture) as sheet:
        assert sheet.size == (8 * 16, number // 8 * 32)
        shown = np.asarray(sheet)[:32, :16].astype(float)
    images = [np.asarray(Image.open(path).resize((16, 32))) for path in (tmp_path / "images").glob("[0-5]_*.png")]
    assert min(np.abs(shown - image).max() for image in images) <= 1


def test_a_dry_run_on_a_full_disk_leaves_no_picture(tmp_path, capsys, monkeypatch):
    def fill(images, file, **options):
        with open(file, "wb") if isinstance(file, Path) else contextlib.nullcontext(file) as opened:
            opened.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    csv_data(tmp_path)
    monkeypatch.setattr(run, "save_image", fill)
    assert launch(tmp_path, "--dry-run") == 2
    assert "No space left on device: '" in complaint(capsys) and [*(tmp_path / "log").iterdir()] == []


def test_names_that_the_terminal_cannot_show(tmp_path, monkeypatch):
    """A folder of images named by the encoding GBK, and a terminal that knows Latin-1 alone."""
    folder = os.fsdecode(os.path.join(os.fsencode(tmp_path), "张".encode("gbk")))
    os.mkdir(folder)
    csv_data(Path(folder), lambda rows: [rows[0], *([os.path.relpath(row[0], folder), *row[1:]] for row in rows[1:])])
    log_folder = tmp_path / "日志"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    monkeypatch.chdir(tmp_path)
    assert launch(Path(folder), **{"data.save_dir": log_folder}) == 0
    sys.stdout.flush()
    printed = sys.stdout.buffer.getvalue()
    assert b"drsl-search" in printed and rb"\u65e5\u5fd7" in printed
    (log,) = log_folder.glob("train.log-*")
    assert os.fsencode(folder) in log.read_bytes()
    saved = get_default_config()
    saved.merge_from_file(log_folder / "config.yaml")
    assert saved.data.root == folder
