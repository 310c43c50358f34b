"""What validation chooses, with made-up scores."""

import pytest
import torch

from pml_drsl.benchmark import report, tables
from pml_drsl.benchmark.training.candidates import CANDIDATES, CROSS_ENTROPY, DRSL, SMALL_POWER, defaults
from pml_drsl.benchmark.training.images import Data, Images
from pml_drsl.benchmark.training.networks import Recipe
from pml_drsl.benchmark.training.protocol import (
    ALONE,
    BESIDE,
    WEIGHTS,
    ablation,
    best_first,
    best_of_batches,
    by_batch,
    by_setting,
    by_weight,
    few_positives,
    on_folds,
    out_of_the_box,
    tuned,
    validation_score,
)
from pml_drsl.benchmark.training.results import Results
from pml_drsl.benchmark.training.sets import BenchmarkSet
from pml_drsl.checks import InputError

LOSS = "MultiSimilarity"


def made_up(name="made-up", cameras=False):
    images = [
        Images(
            torch.zeros(16, 1, 16, 16, dtype=torch.uint8),
            torch.arange(8).repeat_interleave(2),
            torch.arange(16) % 2 if cameras else None,
        )
        for _ in range(2)
    ]
    return BenchmarkSet(name, Data(*images, folds=2), Recipe())


@pytest.fixture
def results(tmp_path):
    with Results.opened(tmp_path / "results.jsonl") as found:
        found.agree(made_up())
        yield found


def add(results, trial, *scores, name="MAP@R", of_identity=None):
    """A result with each seed."""
    for seed, score in enumerate(scores):
        identities = [round(1e4 * score)] * 8 if of_identity is None else of_identity
        results.add(trial.but(seed=seed), {"scores": {name: score}, "identities": identities, "machine": "none"})


def validate(results, trial, *scores):
    for fold, score in zip(on_folds(trial, 2), scores, strict=True):
        add(results, fold, score)


def test_out_of_the_box_is_alone_and_beside_cross_entropy():
    found = out_of_the_box("made-up", LOSS)
    assert found[ALONE].parameters == {} and found[ALONE].cross_entropy == 0
    assert found[BESIDE] == found[ALONE].but(cross_entropy=1.0)
    alone = out_of_the_box("made-up", CROSS_ENTROPY)
    assert alone[BESIDE] == alone[ALONE] and alone[ALONE].cross_entropy == 0


def test_the_mean_over_the_folds_chooses(results):
    assert tuned(results, "made-up", LOSS) is None and by_setting(results, "made-up", LOSS) == []
    for trial in by_weight("made-up", LOSS):
        # 0.3 is best by the mean, 0.1 on one fold alone, 10 lacks a fold.
        scores = {0.1: (0.9, 0.3), 0.3: (0.7, 0.6)}.get(trial.cross_entropy, (0.5, 0.5))
        if trial.cross_entropy < 10:
            validate(results, trial, *scores)
        else:
            add(results, on_folds(trial, 2)[0], 1.0)
    settings = by_setting(results, "made-up", LOSS)
    assert [trial.parameters for trial in settings] == list(CANDIDATES[LOSS].grid)
    assert {trial.cross_entropy for trial in settings} == {0.3}
    assert tuned(results, "made-up", LOSS) is None
    validate(results, settings[1], 0.6, 0.6)
    assert tuned(results, "made-up", LOSS) == settings[0]
    validate(results, settings[2], 0.7, 0.7)
    assert tuned(results, "made-up", LOSS) == settings[2] and settings[2].split == "test"
    assert best_first(results, settings) == [settings[2], settings[0], settings[1]]
    assert validation_score(results, settings[1]) == pytest.approx(0.6)
    # Five weights have both folds, and two settings besides the default at the best of them.
    assert "cross-entropy * 0.3; best of 7 |" in tables.chosen(results)


def test_every_loss_has_the_same_number_of_trials(results):
    for loss in CANDIDATES:
        for trial in by_weight("made-up", loss):
            validate(results, trial, 0.5, 0.5)
        tried = {trial.key for trial in (*by_weight("made-up", loss), *by_setting(results, "made-up", loss))}
        assert len(tried) == len(WEIGHTS) + 5


def test_experiments_begin_with_the_default():
    for where, weight in ((ALONE, 0.0), (BESIDE, 1.0)):
        first = ablation("made-up", where)[0][1]
        assert first.parameters == defaults(DRSL) and first.cross_entropy == weight
    trials = [trial for _, trial in ablation("made-up", ALONE)]
    assert all(trial.parameters.keys() == defaults(DRSL).keys() for trial in trials)
    assert {change.group for change, _ in ablation("made-up", ALONE, ["margin"])} == {"margin"}
    assert [trial.negatives_per_positive for trial in few_positives("made-up", DRSL).values()] == [15, 60, 250, 1000]


def test_the_gain_of_a_change_is_over_what_it_changes(results):
    unchanged, _, _, changed = (trial for _, trial in ablation("made-up", ALONE)[:4])
    assert changed.parameters == {**unchanged.parameters, "sort_weight": 0.1}
    for trial, scores in ((unchanged, (0.5, 0.4)), (changed, (0.52, 0.42))):
        for fold, score in zip(on_folds(trial, 2), scores, strict=True):
            results.add(fold, {"scores": {"MAP@R": score}, "machine": "none"})
    table = tables.ablation(results, ALONE)
    row = next(line for line in table.split("\n") if "| 0.1" in line)
    assert [cell.strip() for cell in row.split("|")[1:-1]] == ["sort_weight", "0.1", "47.0", "+2.0"]
    assert "temperature" not in table  # its default alone has a result
    assert tables.ablation(results, BESIDE) == tables.NOTHING
    results.agree(made_up("other"))
    assert tables.ablation(results, ALONE).split("\n")[-1].split("|")[-2].strip() == "-"


def test_batches_are_tested_at_the_learning_rate_that_is_best_on_validation(results):
    of_size = by_batch(results.sets["made-up"], LOSS)
    assert {size: trials[0].changes["identities"] for size, trials in of_size.items()} == {64: 16, 256: 64, 1024: 256}
    assert [trial.changes["lr"] for trial in of_size[64]] == pytest.approx([0.001, 0.003, 0.01])
    for trial, score in zip(of_size[256], (0.4, 0.6, 0.5), strict=True):
        validate(results, trial, score, score)
    validate(results, of_size[64][0], 0.9, 0.9)  # its other learning rates have no result yet
    best = best_of_batches(results, "made-up", LOSS)
    assert best == {256: of_size[256][1]}
    assert tables.batches(results) == {}
    add(results, best[256], 0.3, 0.32)
    row = tables.batches(results)["made-up"].split("\n")[-1]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [LOSS, "-", "31.0 ± 1.4 at 0.003", "-"]


def test_another_recipe_by_the_same_name_needs_another_file(results):
    other = made_up()
    results.agree(other)
    other = BenchmarkSet("made-up", other.data, Recipe(epochs=3))
    with pytest.raises(InputError, match="epochs 40, not 3"):
        results.agree(other)


def test_tables_have_scores_ranks_and_differences(results):
    results.agree(made_up("cameras", cameras=True))
    for name, score, scores in (("made-up", "MAP@R", (0.5, 0.4, 0.1)), ("cameras", "mAP", (0.6, 0.7, 0.2))):
        for loss, value in zip((DRSL, LOSS, CROSS_ENTROPY), scores, strict=True):
            for trial in {one.key: one for one in out_of_the_box(name, loss).values()}.values():
                add(results, trial, value, value + 0.02, name=score)
    add(results, out_of_the_box("cameras", "SupCon")[ALONE], 0.9, name="mAP")  # has not run on the other set
    for name, score in (("made-up", "MAP@R"), ("cameras", "mAP")):
        add(results, out_of_the_box(name, SMALL_POWER)[ALONE], 0.95, name=score)
    alone, beside = tables.out_of_the_box(results).split("\n\n")
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in alone.split("\n")}
    assert rows["alone"] == ["made-up, MAP@R, 2 seeds", "cameras, mAP, 2 seeds", "mean rank"]
    assert rows[DRSL] == ["51.0 ± 1.4", "61.0 ± 1.4", "1.5"] and rows[LOSS][2] == "1.5"
    assert rows[CROSS_ENTROPY][2] == "3.0" and rows["SupCon"] == ["-", "90.0 (1 seed)", "-"]
    assert CROSS_ENTROPY in beside and "SupCon" not in beside
    assert rows[SMALL_POWER] == ["95.0 (1 seed)", "95.0 (1 seed)", "-"]  # it would push the others back by a rank
    table = tables.differences(results, tables.trials_out_of_the_box(results, ALONE))
    row = next(line for line in table.split("\n") if LOSS in line)
    assert "+10.0 [+10.0, +10.0]*" in row and "-10.0 [-10.0, -10.0]*" in row
    small = report.small_table(results)
    assert "| **DRSL** " in small and "51.0 / 51.0" in small and "1.5 / 1.5" in small and "SupCon" not in small


def test_a_drawn_set_is_compared_over_the_identities_of_each_seed(results):
    trials = {loss: out_of_the_box("made-up", loss)[ALONE] for loss in (DRSL, LOSS)}
    add(results, trials[DRSL], 0.5, of_identity=[None, 6000, 6000])
    results.add(trials[DRSL].but(seed=1), {"scores": {}, "identities": [4000, 4000], "machine": "none"})
    add(results, trials[LOSS], 0.5, of_identity=[None, 5000, 5000])
    results.add(trials[LOSS].but(seed=1), {"scores": {}, "identities": [3000, 3000], "machine": "none"})
    found = tables.ahead(results, trials[DRSL], trials[LOSS])
    assert (found.mean, found.low, found.high) == (1000, 1000, 1000)
    results.add(trials[LOSS].but(seed=2), {"scores": {}, "failure": "the loss is nan", "machine": "none"})
    assert tables.ahead(results, trials[DRSL], trials[LOSS]) == found


def test_a_page_without_marks_is_refused(results, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("no marks")
    with pytest.raises(InputError, match="must have the lines"):
        report.with_table(page, results)
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    text = report.with_table(page, results)
    assert text.startswith(f"before\n{report.BEGIN}\n") and text.endswith(f"\n{report.END}\nafter\n")
    assert "old" not in text
