"""The report of a file of results: tables of scores, comparisons with one loss, and a figure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pml_drsl.checks import InputError
from pml_drsl.console import replacing
from torchreid_ext.benchmark.grid import PLACES, TUNED, check_name, recipe, same, scored
from torchreid_ext.benchmark.statistics import compare, holm
from torchreid_ext.config.values import flatten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCORES = ("mAP", "rank-1", "mINP")
COMPARED = {"mAP": "AP", "rank-1": "hit"}
"""The scores that are compared, and the scores of each query whose means they are."""

WITH_SPLITS = ("cuhk01", "cuhk03", "grid", "ilids", "ilidsvid", "prid", "prid2011", "viper")
"""The data sets of torchreid whose people ``data.split_id`` draws; it has no effect on any other."""

LEVEL = 0.05
MIN_SEEDS = 3
"""The fewest seeds for a p-value: the spread of two may by chance look like 0, and too much would be significant."""

WITH_NEGATIVES = re.compile(r"(?P<loss>.+)-1-to-(?P<negatives>\d+)")
"""A loss that was trained with so many negatives for one positive, in ``configs/losses_rare.yaml``."""


@dataclass(frozen=True)
class Section:
    """The results on one data set with one recipe."""

    target: str  # the data set that was tested on
    config: str  # name of the configuration file
    network: str  # its name, and whether it has the neck
    changes: Mapping[str, str]  # keys that were changed in all runs
    lines: Mapping[str, Mapping[int, dict[str, Any]]]  # the results of each loss, by seed
    notes: Sequence[str]  # what is missing, or was left out

    @property
    def title(self) -> str:
        changed = "".join(f", `{key} {value}`" for key, value in self.changes.items())
        return f"{self.target}, {self.network} (`{self.config}`{changed})"

    def scores(self) -> pd.DataFrame:
        """Mean and standard deviation of each score over the seeds, in percent; a row for each loss, the best first."""
        percent = pd.concat({
            loss: 100 * pd.DataFrame([line["results"][self.target] for line in lines.values()], columns=[*SCORES])
            for loss, lines in self.lines.items()
        })  # fmt: skip
        by_loss = percent.groupby(level=0, sort=False)
        table = by_loss.agg(["mean", "std"]).rename(columns={"std": "sd"})
        table["seeds", ""] = by_loss.size()
        return table.sort_values(("mAP", "mean"), ascending=False)

    def differences(self, reference: str) -> pd.DataFrame:
        """How far the reference is ahead of each other loss, in percentage points, on the seeds that both have. A row
        for each loss and score: mean, low, high, p, seeds. p is corrected for the number of losses with three seeds or
        more (Holm), and NaN for the others. A loss that ``drsl-benchmark tune`` chose, NAME-tuned, is compared with the
        tuned reference if there is one, and every loss with a reference that is itself NAME-tuned."""
        rows, tuned = [], reference.removesuffix(TUNED) + TUNED
        for score, of_query in COMPARED.items():
            found = {}
            for loss, theirs in self.lines.items():
                name = tuned if loss.endswith(TUNED) and tuned in self.lines else reference
                ours = self.lines.get(name, {})
                seeds = sorted(set(ours) & set(theirs)) if loss != name else []
                if seeds:
                    paired = [self._paired(ours[seed], theirs[seed], of_query) for seed in seeds]
                    nested = len({self._people(ours[seed]) for seed in seeds}) > 1
                    found[loss] = compare([pair[0] for pair in paired], [pair[1] for pair in paired], nested)
            # What is not tested makes no other test stricter.
            tested = {loss: each.p for loss, each in found.items() if each.seeds >= MIN_SEEDS}
            corrected = dict(zip(tested, holm([*tested.values()]), strict=True))
            for loss, each in found.items():
                percent = (100 * each.mean, 100 * each.low, 100 * each.high)
                rows.append((loss, score, *percent, corrected.get(loss, math.nan), each.seeds))
        return pd.DataFrame(rows, columns=["loss", "score", "mean", "low", "high", "p", "seeds"])

    def _people(self, line: dict[str, Any]) -> tuple[Any, ...]:
        """What differs between seeds that test on other people, and not between seeds that test on the same people.
        The labels alone do not show it, because each split counts its people from 0."""
        configuration = line["configuration"]
        drawn = configuration["data.sources"] if configuration.get("data.validation") else [self.target]
        splits = ["data.split_id."] if {*drawn} & {*WITH_SPLITS} else []
        keys = ("data.root.", *splits, *(f"datasets.{name}." for name in drawn))
        draws = [str(configuration.get(key)) for key in line["varied"] if f"{key}.".startswith(keys)]
        return tuple(sorted(line["results"][self.target]["identity"])), *draws

    def _paired(self, ours: dict[str, Any], theirs: dict[str, Any], score: str) -> tuple[list[float], list[int]]:
        """The difference of each query that has a match, and its identity."""
        one, other = ours["results"][self.target], theirs["results"][self.target]
        left, right = ([line["configuration"].get(key) for key in ours["varied"]] for line in (ours, theirs))
        if one["identity"] != other["identity"] or left != right:
            other_queries = f"{ours['loss']} and {theirs['loss']} were tested on other queries with seed {ours['seed']}"
            raise InputError(f"{self.title}: {other_queries}; give their runs the same images and --vary")
        pairs = zip(one[score], other[score], one["identity"], strict=True)
        kept = [(a - b, identity) for a, b, identity in pairs if a is not None and b is not None]
        return [difference for difference, _ in kept], [identity for _, identity in kept]


def sections(results: Sequence[Mapping[str, Any]], losses: Sequence[str] | None = None) -> list[Section]:
    """The results, the newest last, by data set, network and recipe; of some losses, or of all. Of a loss with results
    of several configurations, which a changed default makes, only those of the newest count. The title names the
    starting weights where another has the same title. Raises InputError if there are no results, or none of a loss that
    is named."""
    known = {line["loss"] for line in results if line["results"]}
    if not known:
        raise InputError("there are no results to report; make them with drsl-benchmark run")
    for name in losses or ():
        check_name("there are no results of", name, known)
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in map(_with_varied, results):
        if losses is None or line["loss"] in losses:
            (config, changed), model = recipe(line), line["configuration"]
            network = model["model.name"] + (" with the neck" if model["model.bnneck"] else "")
            for target in line["results"]:
                key = target, network, config, json.dumps(changed, sort_keys=True)
                groups.setdefault(key, []).append(line)
    found = [_section(target, network, lines) for (target, network, *_), lines in groups.items()]
    titles = [section.title for section in found]
    return [
        replace(section, changes=_changes(lines[0])) if titles.count(section.title) > 1 else section
        for section, lines in zip(found, groups.values(), strict=True)
    ]


def _with_varied(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """The line, with each varied key in its configuration as a key of its own: ``datasets.mine.seed``, say, is taken
    out of the value of ``datasets.mine``. Then this value is the same for all seeds."""
    configuration, varied = dict(line["configuration"]), line.get("varied", {})
    for own in varied:
        for key, options in line["configuration"].items():
            name = own.removeprefix(f"{key}.").split(".")[0]
            if own.startswith(f"{key}.") and name in options:
                configuration[key] = {other: value for other, value in configuration[key].items() if other != name}
                configuration[own] = options[name]
    return {**line, "varied": varied, "configuration": configuration}


def _changes(line: Mapping[str, Any]) -> dict[str, str]:
    return dict(sorted(scored(line["changes"]).items()))


def _section(target: str, network: str, lines: Sequence[Mapping[str, Any]]) -> Section:
    notes = []
    by_loss: dict[str, dict[int, dict[str, Any]]] = {}
    # What losses set, such as their sampler; all else is the recipe, which is that of the newest line.
    theirs = {key for line in lines for key, _ in flatten(line["snippet"])}
    # The identity cross-entropy stands beside every loss.
    theirs |= {key for line in lines for key in line["configuration"] if re.match(r"loss\.(?!softmax\.)", key)}
    newest, varied = lines[-1]["configuration"], {*lines[-1]["varied"]}
    free = {"train.seed", *varied}
    for loss in dict.fromkeys(line["loss"] for line in lines):
        own = [line for line in lines if line["loss"] == loss]
        kept = [line for line in own if {*line["varied"]} == varied]
        kept = [line for line in kept if same(line["configuration"], kept[-1]["configuration"], free)]
        kept = [line for line in kept if same(line["configuration"], newest, free | theirs)]
        if len(kept) < len(own):
            notes.append(f"`{loss}`: {len(own) - len(kept)} results of an older configuration are left out.")
        for line in kept:
            of_loss = by_loss.setdefault(loss, {})
            twin = of_loss.get(line["seed"], line)
            older, newer = twin["configuration"], line["configuration"]
            places = [key for key in (*PLACES, *sorted(varied)) if older.get(key) != newer.get(key)]
            for key in places:
                where = f"`{loss}`, seed {line['seed']}: the result with {key} {older.get(key)!r}"
                notes.append(f"{where} is left out, because there is a newer one.")
            if not places and twin["results"] != line["results"]:
                notes.append(f"`{loss}`, seed {line['seed']}: of two results, the last counts.")
            of_loss[line["seed"]] = dict(line)
    every = sorted({seed for of_loss in by_loss.values() for seed in of_loss})
    without: dict[str, list[str]] = {}
    for loss, of_loss in by_loss.items():
        if missing := ", ".join(str(seed) for seed in every if seed not in of_loss):
            without.setdefault(missing, []).append(f"`{loss}`")
    notes += [f"No results for seed {missing}: {', '.join(names)}." for missing, names in without.items()]
    named = (line["commit"] for of_loss in by_loss.values() for line in of_loss.values() if "commit" in line)
    names = (name for several in named for name in several.split("+"))  # A run may have gone on with other code.
    commits = dict.fromkeys(name[:7] + "-dirty" * name.endswith("-dirty") for name in names)
    if len(commits) > 1:
        notes.append(f"Measured with the commits {', '.join(commits)}.")
    changes = {key: word for key, word in _changes(lines[0]).items() if key != "model.load_weights"}
    return Section(target, lines[0]["config"], network, changes, by_loss, notes)


def to_markdown(section: Section, reference: str) -> str:
    """The section in Markdown: the scores of every loss, and the differences of the reference to each of them."""
    ahead = {(row.loss, row.score): _interval(row) for row in section.differences(reference).itertuples()}
    rows = _rows(section, reference)
    for loss, row in rows.items():
        row |= {f"{reference} is ahead in {score}": ahead.get((loss, score), "-") for score in COMPARED}
    return _table(section.title, rows.values(), section.notes)


def _rows(section: Section, reference: str) -> dict[Any, dict[str, Any]]:
    rows = {}
    for loss, row in section.scores().iterrows():
        name = f"**{loss}**" if loss in (reference, reference + TUNED) else loss
        scores = {score: _spread(row[score, "mean"], row[score, "sd"]) for score in SCORES}
        rows[loss] = {"loss": name, "seeds": int(row["seeds", ""]), **scores}
    return rows


def _table(title: str, rows: Iterable[Mapping[str, Any]], notes: Sequence[str]) -> str:
    # A bar in a name, or in a pattern that was changed in all runs, would begin another cell.
    cells = [{name.replace("|", r"\|"): str(cell).replace("|", r"\|") for name, cell in row.items()} for row in rows]
    table = pd.DataFrame(cells).to_markdown(index=False, disable_numparse=True)
    return "\n\n".join(filter(None, [f"### {title}", table, " ".join(notes)]))


def _spread(mean: float, deviation: float) -> str:
    return f"{mean:.1f}" if pd.isna(deviation) else f"{mean:.1f} ± {deviation:.1f}"


def _interval(row: Any) -> str:
    significant = f", p {'< 0.01' if row.p < 0.01 else f'= {row.p:.3f}'}" if row.p < LEVEL else ""
    return f"{row.mean:+.1f} [{row.low:+.1f}, {row.high:+.1f}]{significant}"


def report(sections: Sequence[Section], reference: str | None = None) -> str:
    """All sections in Markdown, those of one loss in a table together. Each loss is compared with the reference; None
    is drsl, which need not be there. Raises InputError if there are no results of the reference, or if two losses were
    tested on other queries with one seed."""
    shown = [loss for section in sections for loss in section.lines]
    if reference is not None:
        check_name("there are no results of", reference, {*shown, *(loss.removesuffix(TUNED) for loss in shown)})
    reference = reference or "drsl"
    head = (
        f"Mean ± standard deviation over the seeds, in percent. The last columns give the difference to {reference} in "
        "percentage points, with a 95 % interval over seeds and test identities; a p-value stands where it is below "
        f"{LEVEL}, corrected for the number of losses of the table that have {MIN_SEEDS} seeds or more (Holm). With "
        "fewer there is none; with one seed, the interval is of the identities alone."
    )
    if (tuned := reference + TUNED) in shown:
        head += f" A loss NAME{TUNED} is compared with {tuned}, in a table that has it."
    compared = [section for section in sections if len(section.lines) > 1] or sections
    parts = [head, *(to_markdown(section, reference) for section in compared)]
    if alone := [section for section in sections if section not in compared]:
        rows = [{"run": each.title} | row for each in alone for row in _rows(each, reference).values()]
        notes = [f"{each.title}: {note}" for each in alone for note in each.notes]
        parts.append(_table("One loss alone", rows, notes))
    return "\n\n".join(parts) + "\n"


def draw(sections: Sequence[Section], path: Path) -> None:
    """Draws one panel for each section that compares losses, or for all where none does, three in a row: mean and
    standard deviation of mAP and rank-1. The suffix of the path gives the format. Where the names of all losses tell
    the number of negatives for each positive, the panel has curves of mAP. Raises OSError if the file cannot be
    written, which keeps its old content then. Dollars in names begin no formula."""
    from matplotlib.figure import Figure

    sections = [section for section in sections if len(section.lines) > 1] or sections
    columns, rows = min(3, len(sections)), math.ceil(len(sections) / 3)
    named = (WITH_NEGATIVES.fullmatch(loss) for section in sections for loss in section.lines)
    losses = sorted({each["loss"] for each in named if each})  # A loss has one colour in all panels.
    figure = Figure(figsize=(6 * columns, 4.5 * rows), layout="constrained")
    for number, section in enumerate(sections, 1):
        axes, scores = figure.add_subplot(rows, columns, number), section.scores().fillna(0)
        curves = all(WITH_NEGATIVES.fullmatch(loss) for loss in section.lines)
        _curves(axes, scores, losses) if curves else _points(axes, scores)
        changed = [f"{key} {value}" for key, value in section.changes.items() if not key.startswith("model.")]
        axes.set_title("\n".join([f"{section.target}, {section.network}", *changed]), parse_math=False)
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format=path.suffix[1:])


def _points(axes: Axes, scores: pd.DataFrame) -> None:
    heights = np.arange(len(scores))[::-1]
    for score, fmt, shift in (("mAP", "o", 0.1), ("rank-1", "s", -0.1)):
        axes.errorbar(scores[score, "mean"], heights + shift, xerr=scores[score, "sd"], fmt=fmt, label=score, capsize=2)
    axes.set_yticks(heights, scores.index, parse_math=False)
    axes.set_xlabel("%")


def _curves(axes: Axes, scores: pd.DataFrame, losses: Sequence[str]) -> None:
    parts = scores.index.str.extract(WITH_NEGATIVES.pattern).set_index(scores.index)
    rows = scores["mAP"].assign(loss=parts["loss"], negatives=parts["negatives"].astype(float))
    for place, (loss, curve) in enumerate(rows.sort_values("negatives").groupby("loss")):
        x = curve["negatives"] * 1.04**place  # A little apart, so that no deviation hides another.
        style = {"marker": "o", "label": loss, "capsize": 2, "color": f"C{losses.index(loss)}"}
        axes.errorbar(x, curve["mean"], yerr=curve["sd"], **style)
    numbers = sorted(set(rows["negatives"]))
    axes.set(xscale="log", xlabel="negatives for each positive", ylabel="mAP (%)")
    axes.set(xticks=numbers, xticklabels=[f"{number:,.0f}" for number in numbers])
    axes.set_xlim(numbers[0] / 1.5, numbers[-1] * 1.7)
    axes.minorticks_off()
