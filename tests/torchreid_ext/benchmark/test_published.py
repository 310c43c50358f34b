"""The figures that the documentation and the configurations state are those of the published results."""

from pathlib import Path

import pytest

from torchreid_ext.benchmark import grid, report

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "benchmark.jsonl.gz"


@pytest.fixture(scope="module")
def results():
    return grid.read_results(RESULTS)


def held(page):
    _, _, rest = (ROOT / "docs" / page).read_text().partition(report.BEGIN)
    return rest.partition(report.END)[0].strip()


def test_the_page_holds_the_report(results):
    assert held("benchmark.md") == report.report(results).strip()


@pytest.mark.parametrize(("page", "reference"), [("validation", "t0.1-p0.1-s1"), ("few_positives", "drsl-1-to-4000")])
def test_the_other_pages_hold_their_reports(page, reference):
    results = grid.read_results(ROOT / "docs" / f"{page}.jsonl.gz")
    assert held(f"{page}.md") == report.report(results, reference).strip()


def test_each_configuration_states_its_figures(results):
    sections = [section for section in report.sections(results) if not section.changes]
    assert sections
    for section in sections:
        row, seeds = section.scores().loc["drsl"], len(section.lines["drsl"])
        form = "{} {:.1f} ± {:.1f}" if seeds > 1 else "{} {:.1f}"
        scores = ", ".join(form.format(score, row[score, "mean"], row[score, "sd"]) for score in report.SCORES)
        line = f"#   drsl: {scores} ({seeds} seed{'s' * (seeds > 1)})\n"
        assert line in (ROOT / "configs" / section.config).read_text()
