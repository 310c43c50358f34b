"""The figures that the documentation and the configurations state are those of the published results."""

import re
from pathlib import Path

import pytest

from torchreid_ext.benchmark import grid, report, runner
from torchreid_ext.cli import benchmark

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "benchmark.jsonl.gz"
# Losses with columns of their own in the README's table, on other batches, or DRSL too.
SHOWN = ("softmax", "softmax-identity", "triplet", "drsl", "t0.1-p0.1-s1")


@pytest.fixture(scope="module")
def results():
    return grid.read_results(RESULTS)


def held(page):
    _, _, rest = (ROOT / "docs" / page).read_text().partition(benchmark.BEGIN)
    return rest.partition(benchmark.END)[0].strip()


@pytest.mark.slow
def test_the_page_holds_the_report(results):
    assert held("benchmark.md") == report.report(report.sections(results)).strip()


@pytest.mark.parametrize(("page", "reference"), [
    pytest.param("validation", "t0.1-p0.1-s1", marks=pytest.mark.slow), ("few_positives", "drsl-1-to-4000"),
])  # fmt: skip
def test_the_other_pages_hold_their_reports(page, reference):
    results = grid.read_results(ROOT / "docs" / f"{page}.jsonl.gz")
    assert held(f"{page}.md") == report.report(report.sections(results), reference).strip()


@pytest.mark.parametrize(
    ("page", "config", "losses", "names", "seeds", "words"),
    [
        ("benchmark", "market1501", "losses", ["drsl", "triplet"], 3, ""),
        ("benchmark", "market1501", "losses", ["drsl", "softmax", "triplet"], 5, "train.max_epoch 12"),
        ("few_positives", "market1501", "losses_rare", ["drsl-1-to-15", "supcon-1-to-4000"], 1, "train.max_epoch 12"),
        ("few_positives", "cuhk03", "losses_rare", ["drsl-1-to-15", "supcon-1-to-250"], 3, ""),
        ("validation", "cuhk03", "losses_drsl", ["t0.1-p0.1-s1"], 1, "data.validation 0.5 data.identities 300"),
    ],
)
def test_a_command_goes_on_from_the_published_results(page, config, losses, names, seeds, words):
    file, words = ROOT / "configs" / f"{config}_osnet_x0_25.yaml", f"model.load_weights osnet_x0_25_msmt17.pth {words}"
    chosen, _ = grid.read_losses(ROOT / "configs" / f"{losses}.yaml", names)
    runs = grid.plan([file], chosen, range(seeds), words.split(), root="DATA")
    assert runner._missing(runs, ROOT / "docs" / f"{page}.jsonl.gz") == []


def test_each_configuration_states_its_figures(results):
    sections = [section for section in report.sections(results) if not section.changes]
    assert sections
    for section in sections:
        row, seeds = section.scores().loc["drsl"], len(section.lines["drsl"])
        form = "{} {:.1f} ± {:.1f}" if seeds > 1 else "{} {:.1f}"
        scores = ", ".join(form.format(score, row[score, "mean"], row[score, "sd"]) for score in report.SCORES)
        line = f"#   drsl: {scores} ({seeds} seed{'s' * (seeds > 1)})\n"
        assert line in (ROOT / "configs" / section.config).read_text()


def test_the_table_of_the_readme_has_the_figures_and_the_best_other_loss(results):
    configs = {"Market-1501": "market1501_osnet_x0_25", "VIPeR": "viper_mobilenetv2", "CUHK03": "cuhk03_osnet_x0_25"}
    sections = {section.config: section for section in report.sections(results) if not section.changes}
    readme = (ROOT / "README.md").read_text().replace("**", "")
    rows = re.findall(r"^\| ([\w-]+), [^|]* \| (.*) \|$", readme, re.M)
    assert [name for name, _ in rows] == [*configs]
    for name, cells in rows:
        scores = sections[f"{configs[name]}.yaml"].scores()
        others = scores.drop(index=[loss for loss in scores.index if loss.endswith(grid.TUNED) or loss in SHOWN])
        best = others[others["seeds", ""] >= 3].index[0]
        for loss, cell in zip(("softmax", "triplet", best, "drsl"), cells.split(" | "), strict=True):
            title, _, figures = cell.rpartition(": ")
            assert title.lower() == (best.replace("-", "") if loss == best else "")
            row = scores.loc[loss]
            assert figures == " / ".join(f"{row[of, 'mean']:.1f} ± {row[of, 'sd']:.1f}" for of in ("mAP", "rank-1"))
