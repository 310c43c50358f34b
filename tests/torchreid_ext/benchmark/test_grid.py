"""The runs of a grid, and the file of results."""

import gzip
import json
from pathlib import Path

import pytest

from pml_drsl.checks import InputError
from torchreid_ext.benchmark import grid
from torchreid_ext.cli import benchmark
from torchreid_ext.config.node import flat, get_default_config

CONFIGS = Path(__file__).parents[3] / "configs"
DEMO = CONFIGS / "demo.yaml"
LOSSES = {"drsl": {"loss": {"name": "drsl"}}, "supcon": {"loss": {"name": "pml", "pml": {"loss": "SupConLoss"}}}}

# What a run prints, writes, keeps and shows, and how fast it is.
WITHOUT_EFFECT = {
    "data.root": "elsewhere", "data.workers": 3, "data.save_dir": "other", "model.resume": "auto",
    "train.print_freq": 7, "train.timeout": 7, "train.checkpoint_freq": 7, "train.keep_checkpoints": 7,
    "test.batch_size": 7, "test.ranks": [7], "test.eval_freq": 7, "test.start_eval": 7, "test.untrained": True,
    "test.picture": 7, "test.visrank": True, "test.visrank_topk": 7, "test.queries": True,
}  # fmt: skip


def test_a_grid_is_files_times_losses_times_seeds():
    words = ["train.max_epoch", "1"]
    files = [DEMO, CONFIGS / "omniglot.yaml"]
    runs = grid.plan(files, LOSSES, range(2), words, [["data.split_id", "0", "2"]], "somewhere")
    assert [(run.seed, run.config.stem, run.loss) for run in runs] == [
        (seed, file, loss) for seed in (0, 1) for file in ("demo", "omniglot") for loss in ("drsl", "supcon")
    ]
    first, last = runs[0].configuration, runs[-1].configuration
    assert (first["loss.name"], first["data.split_id"], first["train.seed"]) == ("drsl", 0, 0)
    assert (last["loss.name"], last["loss.pml.loss"]) == ("pml", "SupConLoss")
    assert (last["data.split_id"], last["train.seed"], last["train.max_epoch"]) == (2, 1, 1)
    assert last["data.root"] == "somewhere" and last["data.sources"] == ["omniglot"]
    assert runs[-1].changes == {"train.max_epoch": "1"} and runs[-1].varied == {"data.split_id": "2"}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        (WITHOUT_EFFECT, True),
        ({"model.load_weights": "elsewhere/weights.pth"}, True),
        ({"model.load_weights": "others.pth"}, False),
        ({"loss.drsl.temperature": 0.5}, False),
        ({"loss.pml.loss": "SupConLoss", "loss.triplet.margin": 1.0}, True),
        ({"train.seed": 1}, False),
        ({"a.key.that.is.gone": 1}, True),
        ({"train.warmup_epoch": None}, True),
        ({"loss.name": None}, False),
    ],
    ids=lambda value: next(iter(value), "nothing") if isinstance(value, dict) else "",
)
def test_a_run_is_known_by_the_keys_that_matter(change, same):
    """None stands for a key that the result does not have: it counts as its default."""
    (run,) = grid.plan([DEMO], {"drsl": LOSSES["drsl"]}, [0], ["model.load_weights", "here/weights.pth"])
    other = {key: value for key, value in {**run.configuration, **change}.items() if value is not None}
    assert grid.same(run.configuration, other) is same


@pytest.mark.parametrize(
    ("words", "varied", "losses", "message"),
    [
        (["train.max_epoch"], [], LOSSES, "KEY VALUE pairs"),
        (["train.max_epok", "1"], [], LOSSES, "did you mean 'train.max_epoch'"),
        (["test.rerank", "True"], [], LOSSES, "test.rerank re-ranks in a test alone"),
        (["train.max_epoch", "0"], [], LOSSES, "train.max_epoch 0 trains nothing"),
        (["train.seed", "5"], [], LOSSES, "train.seed is set by --seeds"),
        ([], [["train.seed", "5", "6"]], LOSSES, "train.seed is set by --seeds"),
        ([], [["data.split_id", "0"]], LOSSES, "has 1 values for 2 seeds"),
        ([], [["data.split_id", "0", "2", "data.height"]], LOSSES, "has 3 values for 2 seeds"),
        ([], [], {"odd": {"loss": {"nam": "drsl"}}}, "loss odd: .*did you mean 'loss.name'"),
        ([], [], {"odd": {"loss.pml.loss": "SupConLoss"}}, "odd sets loss.pml.loss.*'drsl': .*loss.name pml"),
        (["loss.name", "softmax"], [], {"odd": {"loss.drsl.margin": 0.1}}, "sets loss.drsl.margin"),
    ],
)
def test_wrong_words_are_refused(words, varied, losses, message):
    with pytest.raises(InputError, match=message):
        grid.plan([DEMO], losses, range(2), words, varied)


def test_two_files_of_one_name_are_refused(tmp_path):
    """The report goes by the name."""
    (tmp_path / DEMO.name).write_text(f"base: {DEMO}\n")
    with pytest.raises(InputError, match="have the same name"):
        grid.plan([DEMO, tmp_path / DEMO.name], LOSSES, range(2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("a: [", "is not YAML"),
        ("- drsl", "must hold config keys"),
        ("drsl: 1", "must hold config keys"),
        ("0.1: {}", "the name 0.1 is no text: write it in quotes"),
        ("drsl: {settings: {a: 1}}", "must be a list"),
        ("supcon: {}", "did you mean 'supcon'"),
    ],
)
def test_a_wrong_file_of_losses_is_refused(tmp_path, text, message):
    path = tmp_path / "losses.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        grid.read_losses(path, ["drsl"] if "drsl" in (text or "") else ["supcom"])


def test_losses_come_in_the_order_asked_for_without_their_settings(tmp_path):
    path = tmp_path / "losses.yaml"
    path.write_text("a: &a {settings: [{x: 1}]}\nb: {y: 2}\nsame: *a")
    chosen = {"b": {"y": 2}, "a": {}, "same": {}}
    assert grid.read_losses(path, [*chosen]) == (chosen, {"b": [], "a": [{"x": 1}], "same": [{"x": 1}]})
    assert list(grid.read_losses(path, None)[0]) == ["a", "b", "same"]


@pytest.mark.parametrize("setting", [{"loss": {"pml": {"kwargs": {"b": 3}}}}, {"loss.pml.kwargs": {"b": 3}}])
@pytest.mark.parametrize("kwargs", [{"pml": {"kwargs": {"a": 1, "b": 2}}}, {"pml.kwargs": {"a": 1, "b": 2}}])
def test_a_setting_changes_what_it_sets_alone(setting, kwargs):
    base = {"loss": {"name": "pml", "pml.loss": "SupConLoss", **kwargs}}
    (run,) = grid.plan([DEMO], {"a": grid.added("a", base, setting)}, [0])
    plain = get_default_config()
    plain.merge_from_file(DEMO)
    expected = {"loss.name": "pml", "loss.pml.loss": "SupConLoss", "loss.pml.kwargs": {"a": 1, "b": 3}}
    assert run.configuration == {**flat(plain), **expected, "train.seed": 0}
    with pytest.raises(InputError, match=r"loss a.*did you mean 'loss.name'"):
        grid.added("a", base, {"loss": {"nam": "drsl"}})


def test_results_are_appended_after_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "folder" / "results.jsonl"
    lines = [{"configuration": {}, "results": {"a": number}} for number in range(3)]
    grid.append_result(path, lines[0])
    with path.open("a") as file:
        file.write('{"configuration": {"cut')
    with pytest.warns(UserWarning, match="cut off"):
        assert grid.read_results(path) == lines[:1]
    grid.append_result(path, lines[1])
    grid.append_result(path, lines[2])
    assert grid.read_results(path) == lines
    packed = tmp_path / "results.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert grid.read_results(packed) == lines
    with pytest.raises(InputError, match="not compressed"):
        grid.append_result(packed, lines[0])
    assert grid.read_results(tmp_path / "none.jsonl") == []


def test_a_result_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "results.jsonl"
    lines = [{"configuration": {}, "results": {"a": number}} for number in range(3)]
    path.write_text("\n".join(json.dumps(line) for line in lines[:2]))
    grid.append_result(path, lines[2])
    assert grid.read_results(path) == lines


@pytest.mark.parametrize("text", ["some notes\nand more\n", '{"precious": "data"}', '{"precious": "data"}\n', "null"])
def test_a_file_that_holds_no_results_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(InputError, match="line 1"):
        grid.read_results(path)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.jsonl.gz", gzip.compress(b'{"configuration": {}, "results": {}}\n' * 9)[:-12], "cut off or damaged"),
        ("r.jsonl.gz", gzip.compress(b"{}")[:12] + b"\xff" * 9, "cut off or damaged"),
        ("r.jsonl.gz", b"no gzip", "cut off or damaged"),
        ("r.jsonl", b'{"configuration": {"a": "\xe9"}, "results": {}}\n{}\n', "line 1: this is not a result"),
    ],
    ids=["cut off", "damaged", "no gzip", "not UTF-8"],
)
def test_a_damaged_file_is_refused_in_a_line(tmp_path, capsys, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert benchmark.main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and message in error and error.count("\n") == 1
