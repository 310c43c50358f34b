"""The report of a file of results, and the choice of settings."""

import inspect
import json
import os

import numpy as np
import pytest
import torchreid
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from pml_drsl.checks import InputError
from torchreid_ext.benchmark import grid, report, runner
from torchreid_ext.cli import benchmark
from torchreid_ext.config.node import flat, get_default_config


def line(loss, seed, mean, *, people=60, changes=None, varied=None, target="market1501", **keys):
    """A result whose APs scatter around a mean, alike for all losses of a seed."""
    noise = np.random.default_rng(seed).uniform(-0.2, 0.2, 2 * people)
    own = np.random.default_rng([seed, *loss.encode()]).uniform(-0.05, 0.05, 2 * people)
    ap = np.clip(mean + noise + own, 0, 1).round(5)
    kind = loss if loss in ("softmax", "triplet", "drsl") else "pml"
    configuration = flat(get_default_config()) | {"train.seed": seed, "loss.name": kind, **keys}
    scores = {
        "mAP": float(ap.mean()), "mINP": float(ap.mean() / 2), "rank-1": float((ap > 0.5).mean()),
        "identity": list(range(people)) * 2, "AP": ap.tolist(), "hit": (ap > 0.5).astype(int).tolist(),
    }  # fmt: skip
    return {
        "config": "market.yaml", "loss": loss, "seed": seed, "changes": changes or {}, "varied": varied or {},
        "snippet": {"loss": {"name": loss}, "sampler.train_sampler": "RandomSampler"},
        "results": {target: scores}, "configuration": configuration,
    }  # fmt: skip


def lines(seeds):
    means = {"drsl": 0.6, "supcon": 0.59, "triplet": 0.5}
    return [line(loss, seed, mean + seed / 1000) for loss, mean in means.items() for seed in range(seeds)]


RESULTS = lines(3)


def test_scores_are_means_over_seeds():
    (section,) = report.sections(RESULTS)
    scores = section.scores()
    assert list(scores.index) == ["drsl", "supcon", "triplet"]
    values = [100 * each["results"]["market1501"]["mAP"] for each in RESULTS if each["loss"] == "supcon"]
    assert scores.loc["supcon", ("mAP", "mean")] == pytest.approx(np.mean(values))
    assert scores.loc["supcon", ("mAP", "sd")] == pytest.approx(np.std(values, ddof=1))
    assert scores.loc["supcon", ("seeds", "")] == 3


def test_a_recipe_is_one_however_its_mappings_are_written():
    results = []
    for loss, mine in (("drsl", {"folder": "x", "seed": 1}), ("supcon", {"seed": 1, "folder": "x"})):
        changed = {"changes": {"datasets.mine": str(mine)}, "datasets.mine": mine}
        results.append(line(loss, 0, 0.5, **changed))
    (section,) = report.sections(results)
    assert [*section.lines] == ["drsl", "supcon"]


def test_runs_of_one_loss_alone_stand_in_one_table_and_have_no_panel(tmp_path):
    changed = [{"data.height": "128"}, {"data.height": "64", "train.lr": "0.1"}]
    alone = [line("drsl", 0, 0.5 + n / 10, changes=each) for n, each in enumerate(changed)]
    alone[1]["commit"] = "0123456+abcdefg"
    sections = report.sections([*RESULTS, *alone])
    text = report.report(sections)
    compared, single = text.split("### ")[1:]
    assert single.startswith("One loss alone") and "supcon" in compared and "supcon" not in single
    for each, keys in zip(alone, ("`data.height 128`)", "`data.height 64`, `train.lr 0.1`)"), strict=True):
        (row,) = [cells.split("|") for cells in single.splitlines() if cells.startswith("|") and keys in cells]
        mean = 100 * each["results"]["market1501"]["mAP"]
        assert [cell.strip() for cell in row[2:5]] == ["**drsl**", "1", f"{mean:.1f}"]
    assert "`train.lr 0.1`): Measured with the commits 0123456, abcdefg." in single
    report.draw(sections, tmp_path / "all.png")
    report.draw(report.sections(RESULTS), tmp_path / "compared.png")
    assert Image.open(tmp_path / "all.png").size == Image.open(tmp_path / "compared.png").size
    # Where no section compares losses, each has its own table.
    assert report.report(report.sections(alone)).count("is ahead in mAP") == 2


def test_differences_are_paired_by_seed_and_query_and_corrected():
    (section,) = report.sections([*RESULTS, line("triplet", 7, 0.9)])
    table = section.differences("drsl").set_index(["loss", "score"])
    ours, theirs = ([each for each in RESULTS if each["loss"] == loss] for loss in ("drsl", "triplet"))
    gaps = [
        np.subtract(a["results"]["market1501"]["AP"], b["results"]["market1501"]["AP"]).mean() * 100
        for a, b in zip(ours, theirs, strict=True)
    ]
    row = table.loc["triplet", "mAP"]
    # Seed 7 has no result of drsl to compare with.
    assert row["mean"] == pytest.approx(np.mean(gaps)) and row["seeds"] == 3
    assert row["low"] > 5 and row["p"] < 0.01 and table.loc["supcon", "mAP"]["p"] > row["p"]
    assert not section.differences("none").size


def test_a_tuned_loss_without_a_tuned_reference_is_compared_with_the_reference():
    results = [line(loss, seed, 0.5) for loss in ("drsl", "a-tuned") for seed in range(3)]
    assert set(report.sections(results)[0].differences("drsl")["loss"]) == {"a-tuned"}


def test_a_tuned_loss_is_compared_with_the_tuned_reference():
    results = [line(loss, 0, mean) for loss, mean in {"drsl": 0.5, "a": 0.4, "drsl-tuned": 0.7, "a-tuned": 0.4}.items()]
    (section,) = report.sections(results)
    table = section.differences("drsl").set_index(["loss", "score"])["mean"]
    assert sorted({loss for loss, _ in table.index}) == ["a", "a-tuned"]
    assert table["a-tuned", "mAP"] == pytest.approx(30, abs=5) and table["a", "mAP"] == pytest.approx(10, abs=5)
    told = "A loss NAME-tuned is compared with drsl-tuned"
    assert told in report.report([section]) and told not in report.report(report.sections(results[:2]))
    # A reference that is itself tuned is compared with all.
    table = section.differences("drsl-tuned").set_index(["loss", "score"])["mean"]
    assert table["a-tuned", "mAP"] == pytest.approx(30, abs=5) and table["drsl", "mAP"] == pytest.approx(20, abs=5)


@pytest.mark.parametrize(
    ("key", "labels", "target", "keys", "others"),
    [
        ("train.lr", 0, "viper", {}, False),
        ("data.split_id", 0, "viper", {}, True),
        ("data.split_id", 0, "market1501", {}, False),
        ("data.split_id", 0, "validation", {"data.validation": 0.5, "data.sources": ["viper"]}, True),
        ("data.split_id", 0, "validation", {"data.validation": 0.5, "data.sources": ["market1501"]}, False),
        ("data.validation_seed", 0, "validation", {}, False),
        ("data.validation_seed", 100, "validation", {}, True),
    ],
)
def test_other_people_for_each_seed_are_told_from_the_same_people(key, labels, target, keys, others):
    """A split counts its people from 0, where a data set has splits. Validation people keep their labels, of which each
    draw has others here."""
    grid_ = [(loss, seed, 0.5) for loss in ("drsl", "a") for seed in range(3)]
    same = [line(*run, target=target, **keys) for run in grid_]
    varied = [line(*run, target=target, varied={key: str(run[1])}, **keys, **{key: run[1]}) for run in grid_]
    for result in varied:
        scores = result["results"][target]
        scores["identity"] = [identity + result["seed"] * labels for identity in scores["identity"]]
    one, other = (report.sections(results)[0].differences("drsl") for results in (same, varied))
    assert one["mean"].tolist() == pytest.approx(other["mean"].tolist())
    assert (one["low"].tolist() != other["low"].tolist()) is others


def test_a_second_set_of_draws_does_not_take_the_place_of_the_first_without_a_word():
    draws = [
        line("drsl", seed, 0.5, target="viper", varied={"data.split_id": f"{split}"}, **{"data.split_id": split})
        for seed, split in ((0, 0), (1, 2), (0, 6), (1, 8))
    ]
    (section,) = report.sections(draws)
    assert [note.split(" is left out")[0] for note in section.notes] == [
        f"`drsl`, seed {seed}: the result with data.split_id {2 * seed}" for seed in range(2)
    ]


def test_a_key_of_ones_own_data_is_varied(tmp_path):
    def planned(varied, folder="photos"):
        file, losses = tmp_path / "own.yaml", {name: {"loss": {"name": name}} for name in ("drsl", "triplet")}
        sets = {name: {"folder": folder} for name in ("mine", "other")}
        data = {"sources": ["mine", "other"], "targets": ["mine"]}
        file.write_text(yaml.safe_dump({"datasets": sets, "data": data}))
        runs = grid.plan([file], losses, range(3), (), varied)
        return [line(run.loss, run.seed, 0.5, target="mine") | json.loads(json.dumps(run.labels())) for run in runs]

    def lows(results):
        (section,) = report.sections(results)
        assert [len(lines) for lines in section.lines.values()] == [3, 3] and not section.notes
        return section.differences("drsl")["low"].tolist()

    draws, same = planned([["datasets.mine.seed", "0", "1", "2"]]), planned([])
    # Each draw counts its test people from 0, and only draws of the set that is tested have other test people.
    assert lows(draws) != lows(same) == lows(planned([["datasets.other.seed", "0", "1", "2"]]))
    with pytest.raises(InputError, match="other queries with seed 2"):
        report.report(report.sections([*draws[:-1], planned([["datasets.mine.seed", "0", "1", "3"]])[-1]]))
    # Another folder is not another draw.
    old = planned([["datasets.mine.seed", "0", "1", "2"]], "older_photos")
    (section,) = report.sections([old[0], *draws[1:]])
    assert section.notes[0] == "`drsl`: 1 results of an older configuration are left out."


def test_the_data_sets_with_splits_are_those_of_torchreid():
    sets = vars(torchreid.data.datasets)
    known = sets["__image_datasets"] | sets["__video_datasets"]
    split = {name for name, kind in known.items() if "split_id" in inspect.signature(kind).parameters}
    assert split == set(report.WITH_SPLITS) < set(known)


def test_sections_are_told_apart_by_data_network_neck_and_changed_keys():
    results = [
        line("drsl", 0, 0.5),
        line("drsl", 0, 0.5, target="viper"),
        line("drsl", 0, 0.5, **{"model.name": "mobilenetv2_x1_0"}),
        line("drsl", 0, 0.5, **{"model.bnneck": True}),
        line("drsl", 0, 0.5, changes={"train.max_epoch": "5"}),
        # A key without an effect on scores, and other places of the same weights.
        line("drsl", 1, 0.5, changes={"data.workers": "2"}),
    ]
    found = report.sections(results)
    assert [len(section.lines["drsl"]) for section in found] == [2, 1, 1, 1, 1]
    assert "with the neck" in found[3].title and "train.max_epoch 5" in found[4].title


def test_titles_tell_apart_what_is_changed_in_all_runs():
    """Also keys of a loss, and starting weights, which other titles leave out. A number has two spellings."""
    keys = [{"model.load_weights": f"{word}.pth"} for word in ("one", "two")]
    results = [
        line("drsl", 0, 0.5),
        line("drsl", 0, 0.5, changes={"loss.drsl.weight_m": "0.1"}, **{"loss.drsl.weight_m": 0.1}),
        line("drsl", 1, 0.5, changes={"loss.drsl.weight_m": "1e-1"}, **{"loss.drsl.weight_m": 0.1}),
        *(line("drsl", 0, 0.5, changes=each, **each) for each in keys),
    ]
    first, second, *others = [section.title for section in report.sections(results)]
    assert first.endswith("(`market.yaml`)") and second.endswith("`loss.drsl.weight_m 0.1`)")
    assert [title.split("`")[-2] for title in others] == ["model.load_weights one.pth", "model.load_weights two.pth"]
    assert report.sections(results[-1:])[0].title == first


def test_results_of_an_older_recipe_do_not_stand_beside_the_newest():
    # A loss may bring a sampler of its own, and another learning rate is another recipe.
    own = [line("softmax", seed, 0.9, **{"sampler.train_sampler": "RandomSampler"}) for seed in range(3)]
    old = [line("circle", seed, 0.9, **{"train.lr": 0.1}) for seed in range(3)]
    (section,) = report.sections([*own, *old, *RESULTS])
    assert "softmax" in section.lines and "circle" not in section.lines
    assert any(note.startswith("`circle`: 3 results") for note in section.notes)


def test_an_older_result_on_data_of_another_place_is_named():
    (section,) = report.sections(
        [line("drsl", 0, ap, **{"data.root": root}) for root, ap in (("hall", 0.3), ("door", 0.9))]
    )
    assert section.lines["drsl"][0]["configuration"]["data.root"] == "door"
    assert (
        section.notes[0]
        == "`drsl`, seed 0: the result with data.root 'hall' is left out, because there is a newer one."
    )
    (section,) = report.sections(
        [line("drsl", 0, 0.3), line("drsl", 0, 0.9), line("drsl", 1, 0.5), line("drsl", 1, 0.5)]
    )
    assert section.notes[0] == "`drsl`, seed 0: of two results, the last counts." and "seed 1" not in section.notes[1:]
    assert section.scores().loc["drsl", ("mAP", "mean")] == pytest.approx(70, abs=0.2)


@pytest.mark.parametrize(
    ("snippet", "key", "value"),
    [
        ({"sampler": {"train_sampler": "RandomSampler"}}, "sampler.num_instances", 8),
        ({"loss": {"name": "softmax"}}, "loss.softmax.label_smooth", False),
        ({"train": {"lr": 0.1}}, "train.max_epoch", 20),
    ],
)
def test_a_loss_frees_the_keys_that_it_sets_and_no_other_of_their_section(snippet, key, value):
    old = [line("a", 0, 0.5) | {"snippet": snippet}, line("drsl", 0, 0.5)]
    new = [line("drsl", 0, 0.5, **{key: value})]
    (section,) = report.sections([*old, *new])
    assert [*section.lines] == ["drsl"] and "`a`: 1 results of an older configuration are left out." in section.notes


@pytest.mark.parametrize("newest", ["varied", "plain"])
def test_seeds_with_and_without_a_varied_key_are_not_pooled(newest):
    """Seed 0 is in both under its own labels, because its split is the default."""
    losses = ("drsl", "a")
    plain = [line(loss, seed, 0.5, target="viper") for loss in losses for seed in range(5)]
    varied = [
        line(loss, seed, 0.5, target="viper", varied={"data.split_id": f"{2 * seed}"}, **{"data.split_id": 2 * seed})
        for loss in losses
        for seed in range(3)
    ]
    results, seeds, left = (plain + varied, 3, 5) if newest == "varied" else (varied + plain, 5, 3)
    (section,) = report.sections(results)
    assert {loss: [*lines] for loss, lines in section.lines.items()} == {loss: [*range(seeds)] for loss in losses}
    assert section.notes == [f"`{loss}`: {left} results of an older configuration are left out." for loss in losses]
    assert len(section.differences("drsl")) == 2


def test_two_spellings_of_a_varied_value_are_compared():
    results = [
        line(loss, 0, 0.5, varied={"train.lr": word}, **{"train.lr": 0.001})
        for loss, word in (("drsl", "1e-3"), ("a", "0.001"))
    ]
    assert len(report.sections(results)[0].differences("drsl")) == 2


def test_results_of_an_older_default_do_not_mix_with_the_newest():
    old = line("drsl", 0, 0.9, **{"loss.drsl.temperature": 0.3})
    (section,) = report.sections([old, *RESULTS[1:]])
    assert sorted(section.lines["drsl"]) == [1, 2]
    assert any("older configuration" in note for note in section.notes)
    assert "No results for seed 0: `drsl`." in section.notes


def test_a_table_of_several_commits_names_them():
    results = [each | {"commit": f"{each['seed']}" * 12} for each in RESULTS]
    assert report.sections(results)[0].notes == ["Measured with the commits 0000000, 1111111, 2222222."]
    assert not report.sections(results[:1])[0].notes
    # A run that went on with other code has several.
    both = [each | {"commit": "0" * 12 + "+" + "1" * 12 + "-dirty"} for each in RESULTS]
    assert report.sections(both)[0].notes == ["Measured with the commits 0000000, 1111111-dirty."]
    dirty = [each | {"commit": "0" * 12 + "-dirty" * (each["seed"] == 2)} for each in RESULTS]
    assert report.sections(dirty)[0].notes == ["Measured with the commits 0000000, 0000000-dirty."]


def test_losses_that_miss_the_same_seeds_share_a_note():
    some = [line(loss, seed, 0.5) for loss, seeds in (("a", (0,)), ("b", (0, 1)), ("c", (0,))) for seed in seeds]
    (section,) = report.sections([*some, line("drsl", 0, 0.5), line("drsl", 1, 0.5), line("drsl", 2, 0.5)])
    assert section.notes == ["No results for seed 1, 2: `a`, `c`.", "No results for seed 2: `b`."]


def test_other_queries_cannot_be_compared():
    split = [{"varied": {"data.split_id": f"{number}"}, "data.split_id": number} for number in (0, 2)]
    for one, other in (({}, {"people": 50}), split):
        with pytest.raises(InputError, match=r"other queries with seed 0; give .* the same images"):
            report.report(report.sections([line("drsl", 0, 0.5, **one), line("triplet", 0, 0.5, **other)]))


def test_a_p_value_needs_three_seeds_and_is_corrected_for_the_losses_that_have_them():
    one, two, six = (report.report(report.sections(lines(seeds))) for seeds in (1, 2, 6))
    assert one.count("+22.5 [") == two.count("+24.2 [") == 1 and "], p " not in one + two and "], p < 0.01" in six
    more = [line("a", seed, 0.5) for seed in range(2)]
    alone, beside = (report.sections(results)[0].differences("drsl") for results in (RESULTS, RESULTS + more))
    beside = beside.set_index("loss")
    assert beside.drop("a")["p"].tolist() == alone["p"].tolist() and beside.loc["a", "p"].isna().all()


def test_the_page_keeps_what_is_around_the_report(tmp_path, capsys, monkeypatch):
    path, page, figure = tmp_path / "results.jsonl", tmp_path / "page.md", tmp_path / "figure.png"
    path.write_text("".join(json.dumps(each) + "\n" for each in RESULTS))
    page.write_text(f"before\n{benchmark.BEGIN}\nold\n{benchmark.END}\nafter\n")
    words = ["report", str(path), "--output", str(page), "--figure", str(figure)]
    assert benchmark.main(words) == benchmark.main(words) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{benchmark.BEGIN}\n") and text.endswith(f"{benchmark.END}\nafter\n")
    assert "old" not in text and text.count("| **drsl** | 3") == 1 and ", p < 0.01" in text
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert benchmark.main(["report", str(path), "--losses", "drsl", "supcon"]) == 0
    printed = capsys.readouterr().out
    assert "supcon" in printed and "triplet" not in printed
    for lacking in (f"{benchmark.BEGIN} only\n", "neither\n"):
        page.write_text(lacking)
        assert benchmark.main(words) == 2 and page.read_text() == lacking
    foreign = f"caf\xe9\r\n{benchmark.BEGIN}\r\n{benchmark.END}\r\n".encode("latin-1")
    page.write_bytes(foreign)
    assert benchmark.main(words) == 0 and page.read_bytes().startswith(b"caf\xe9\r\n<!--")
    assert page.read_bytes().endswith(b"-->\r\n")
    page.write_text("")
    assert benchmark.main(words) == 0 and page.read_text() == text.removeprefix("before\n").removesuffix("after\n")

    def full(file):
        raise OSError("No space left on device")

    page.write_text(text)
    monkeypatch.setattr("os.fsync", full)
    assert benchmark.main(words) == 2 and page.read_text() == text
    drawn = figure.read_bytes()
    assert benchmark.main(["report", str(path), "--losses", "supcon", "--figure", str(figure)]) == 2
    assert figure.read_bytes() == drawn and sorted(os.listdir(tmp_path)) == [figure.name, page.name, path.name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reference", "drls"], "no results of 'drls'; did you mean 'drsl'"),
        (["--losses", "drsl", "suncon"], "no results of 'suncon'; did you mean 'supcon'"),
        (["--losses", "supcon", "--reference", "drsl"], "no results of 'drsl'; did you mean 'supcon'"),
        (["--figure", "results.jsonl"], "would overwrite the input"),
        (["--figure", "page.jpeg"], "--figure page.jpeg: its name must end in .png, .svg or .pdf"),
    ],
)
def test_a_loss_without_results_is_refused_before_the_page_is_written(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "".join(json.dumps(each) + "\n" for each in RESULTS)
    (tmp_path / "results.jsonl").write_text(text)
    assert benchmark.main(["report", "results.jsonl", "--output", "page.md", *words]) == 2
    assert message in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == [text]


def test_a_reference_may_be_missing_in_some_sections_or_be_tuned():
    results = [line("drsl", 0, 0.6), line("a", 0, 0.5), line("a", 0, 0.5, target="viper"), line("b-tuned", 0, 0.5)]
    for reference in ("drsl", "b", "b-tuned"):
        assert report.report(report.sections(results), reference).count("### ") == 2
    assert report.report(report.sections(results[1:])).count("### ") == 2  # drsl, the default, need not be there.


def test_a_figure_has_three_panels_in_a_row(tmp_path):
    sections = report.sections([line("drsl", 0, 0.5, target=name) for name in ("one", "two", "three", "four")])
    report.draw(sections[:1], tmp_path / "one.png")
    report.draw(sections, tmp_path / "four.png")
    (width, height), size = (Image.open(tmp_path / f"{name}.png").size for name in ("one", "four"))
    assert size == (3 * width, 2 * height)


def test_names_with_bars_and_dollars_are_shown_as_they_are(tmp_path):
    """Which are the ends of a cell in Markdown, and mathematics in a figure."""
    odd, changes = r"a|$\frac{$", {"datasets.mine.pattern": "^a$|^b$"}
    sections = report.sections([line(loss, 0, 0.5, changes=changes) for loss in ("drsl", odd)])
    alone = report.sections([line(odd, 0, 0.5, changes=changes, target=name) for name in ("one", "two")])
    parts = report.report([*sections, *alone], odd).split("\n\n")
    tables = [part.replace(r"\|", "").splitlines() for part in parts if part.startswith("|")]
    assert [{row.count("|") for row in table} for table in tables] == [{8}, {7}]
    report.draw(sections, tmp_path / "figure.png")


def test_losses_with_numbers_of_negatives_become_curves(tmp_path, monkeypatch):
    results = [line(f"{loss}-1-to-{n}", 0, 0.5) for loss in ("drsl", "supcon") for n in (60, 15)]
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.extend(figure.axes))
    drawn = list[Axes]()
    report.draw(report.sections(results), tmp_path / "figure.png")
    report.draw(report.sections([*results, line("softmax", 0, 0.5)]), tmp_path / "figure.png")
    others = [line(each["loss"], 0, 0.5, target="viper") for each in results]
    report.draw(report.sections([*results[2:], *others]), tmp_path / "figure.png")
    curves, points, *panels = drawn
    of_supcon, other = (panel.get_legend_handles_labels() for panel in panels)  # of one loss, and of two
    colours = [handles[names.index("supcon")].lines[0].get_color() for handles, names in (of_supcon, other)]
    assert of_supcon[1] == ["supcon"] and colours[0] == colours[1]
    assert sorted(curves.get_legend_handles_labels()[1]) == ["drsl", "supcon"]
    first, second = ([*container.lines[0].get_xdata()] for container in curves.containers)
    assert first == [15, 60] and second == pytest.approx(first, rel=0.1) and min(second) > 15
    # A loss without a number has no place on a curve, and is not left out.
    assert {text.get_text() for text in points.get_yticklabels()} == {"softmax", *(each["loss"] for each in results)}


DRSL = {"loss": {"name": "drsl"}}


@pytest.mark.parametrize("fails", [(), ("drsl*3",)])
def test_tuning_tries_the_settings_with_the_best_weight(tmp_path, monkeypatch, fails):
    """In place of training, a score that is best for weight 3 and temperature 0.2."""

    def run_all(runs, results, workers):
        for run in runs:
            if run.loss not in fails:
                weight, temperature = (run.configuration[f"loss.drsl.{key}"] for key in ("weight_m", "temperature"))
                score = 0.5 + 0.01 * weight + 0.1 * (temperature == 0.2)
                configuration = dict(run.configuration)
                grid.append_result(
                    results, {"configuration": configuration, "results": {"a": {"mAP": score}, "b": {"mAP": score}}}
                )
        return sum(run.loss in fails for run in runs)

    monkeypatch.setattr(runner, "run_all", run_all)
    monkeypatch.setattr(runner, "plan", lambda **grid_: [_validated(run) for run in grid.plan(**grid_)])
    (tmp_path / "demo.yaml").write_text("loss: {name: softmax}\n")
    arguments = {"files": [tmp_path / "demo.yaml"], "seeds": range(2), "words": [], "varied": [], "root": None}
    settings = {"drsl": [{"loss.drsl.temperature": 0.5}, {"loss": {"drsl": {"temperature": 0.2}}}]}
    best, scores, failed = runner.tune({"drsl": DRSL}, settings, arguments, tmp_path / "results.jsonl", 1)
    weight = 1.0 if fails else 3.0
    assert best == {"drsl": {"loss.name": "drsl", "loss.drsl.weight_m": weight, "loss.drsl.temperature": 0.2}}
    assert len(scores) == (5 if fails else 6) and failed == 2 * len(fails)
    assert scores[f"drsl*{weight:g}+2"] == pytest.approx(0.6 + 0.01 * weight)
    runner.write_tuned(tmp_path / "tuned.yaml", best, scores)
    assert yaml.safe_load((tmp_path / "tuned.yaml").read_text()) == {"drsl-tuned": best["drsl"]}
    losses, _ = grid.read_losses(tmp_path / "tuned.yaml", None)
    (run,) = grid.plan([tmp_path / "demo.yaml"], losses, [0])
    assert run.configuration["loss.drsl.weight_m"] == weight and run.configuration["loss.name"] == "drsl"


def _validated(run):
    object.__setattr__(run, "configuration", {**run.configuration, "data.validation": 0.5})
    return run
