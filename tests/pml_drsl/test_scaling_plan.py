"""docs/scaling.md: its tables are what its formulas give, and the formulas what is counted."""

import contextlib
import io
import re
from pathlib import Path

import pytest

PLAN = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
(PROGRAM,) = re.findall(r"```python\n(.*?)```", PLAN, re.S)


@pytest.fixture
def names():
    found = {"printed": io.StringIO()}
    with contextlib.redirect_stdout(found["printed"]):
        exec(PROGRAM, found)
    return found


def test_the_table_of_the_loss_is_what_the_program_prints(names):
    rows = names["printed"].getvalue()
    assert rows.count("\n") == 12
    assert rows in PLAN


def test_measured_bytes_and_memory_are_beside_their_formulas(names):
    rows = re.findall(r"^\| ([\d,]+) \|(?:[^|]*\|){5} ([\d.]+) \| ([\d.]+) \| (\d+) \| (\d+) \|$", PLAN, re.M)
    assert len(rows) == 4
    for size, moved, moved_formula, memory, memory_formula in rows:
        number = int(size.replace(",", ""))
        assert f"{names['loss'](number, 2)[0]:.1f}" == moved_formula == moved
        assert f"{names['loss'](number, 1)[1]:.0f}" == memory_formula
        assert float(memory) == pytest.approx(float(memory_formula), rel=0.2)


def test_the_times_and_features_of_the_evaluation_are_their_formulas():
    rows = re.findall(r"^\| ([\d,]+) \| ([\d.]+) (s|min|h) \| ([\d.]+) \|$", PLAN, re.M)
    assert len(rows) == 4
    for size, time, unit, features in rows:
        number = int(size.replace(",", ""))
        seconds = float(time) * {"s": 1, "min": 60, "h": 3600}[unit]
        assert seconds == pytest.approx(44e-9 * 10_000 * number, rel=0.03)
        assert float(features) == pytest.approx(4 * 512 * (number + 10_000) / 2**30, rel=0.05)
