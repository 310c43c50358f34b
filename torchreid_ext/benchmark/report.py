"""The report of a file of results: tables of scores, and comparisons with one loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pml_drsl.checks import InputError
from torchreid_ext.benchmark.grid import comparable, same
from torchreid_ext.benchmark.statistics import compare, holm

SCORES = {"mAP": "AP", "rank-1": "hit", "mINP": "INP"}
"""The scores of a table, and the scores of each query whose means they are."""

COMPARED = ("mAP", "rank-1")
LEVEL = 0.05
TUNED = "-tuned"
BEGIN = "<!-- drsl-benchmark report: begin -->"
END = "<!-- drsl-benchmark report: end -->"


@dataclass(frozen=True)
class Section:
    """The results on one data set with one recipe.

    Attributes:
        target: the data set that was tested on.
        config: name of the configuration file.
        network: name of the network, and whether it has the neck.
        changes: keys that were changed in all runs.
        lines: the results of each loss, by seed.
        notes: what is missing, or was left out.
    """

    target: str
    config: str
    network: str
    changes: Mapping[str, str]
    lines: Mapping[str, Mapping[int, dict[str, Any]]]
    notes: Sequence[str]

    @property
    def title(self) -> str:
        """The data set, the network, and what was changed."""
        changed = "".join(f", `{key} {value}`" for key, value in self.changes.items())
        return f"{self.target}, {self.network} (`{self.config}`{changed})"

    def scores(self) -> pd.DataFrame:
        """Mean and standard deviation of each score over the seeds, in percent; a row for each loss, the best first."""
        rows = {
            loss: {
                (score, part): value
                for score in SCORES
                for values in [pd.Series([100 * line["results"][self.target][score] for line in lines.values()])]
                for part, value in (("mean", values.mean()), ("sd", values.std()))
            }
            | {("seeds", ""): len(lines)}
            for loss, lines in self.lines.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index").sort_values(("mAP", "mean"), ascending=False)

    def differences(self, reference: str) -> pd.DataFrame:
        """How far the reference is ahead of each other loss, in percentage points, on the seeds that both have.

        A loss that ``drsl-benchmark tune`` chose, NAME-tuned, is compared with the tuned reference.

        Returns:
            A row for each loss and score: mean, low, high, p, seeds; p is corrected for the number of losses (Holm).
        """
        rows = []
        for score in COMPARED:
            found = {}
            for loss, theirs in self.lines.items():
                name = reference + TUNED if loss.endswith(TUNED) else reference
                ours = self.lines.get(name, {})
                seeds = sorted(set(ours) & set(theirs)) if loss != name else []
                if seeds:
                    paired = [self._paired(ours[seed], theirs[seed], SCORES[score]) for seed in seeds]
                    nested = len(seeds) > 1 and any(ours[seed].get("varied") for seed in seeds)
                    found[loss] = compare([pair[0] for pair in paired], [pair[1] for pair in paired], nested)
            corrected = holm([each.p for each in found.values()])
            rows += [
                (loss, score, 100 * each.mean, 100 * each.low, 100 * each.high, p, each.seeds)
                for (loss, each), p in zip(found.items(), corrected, strict=True)
            ]
        return pd.DataFrame(rows, columns=["loss", "score", "mean", "low", "high", "p", "seeds"])

    def _paired(self, ours: dict[str, Any], theirs: dict[str, Any], score: str) -> tuple[list[float], list[int]]:
        """The difference of each query that has a match, and its identity."""
        one, other = ours["results"][self.target], theirs["results"][self.target]
        if one["identity"] != other["identity"] or ours.get("varied") != theirs.get("varied"):
            raise InputError(
                f"{self.title}: {ours['loss']} and {theirs['loss']} were tested on other queries with seed "
                f"{ours['seed']}; give their runs the same --vary"
            )
        pairs = zip(one[score], other[score], one["identity"], strict=True)
        kept = [(a - b, identity) for a, b, identity in pairs if a is not None and b is not None]
        return [difference for difference, _ in kept], [identity for _, identity in kept]


def sections(results: Sequence[Mapping[str, Any]], losses: Sequence[str] | None = None) -> list[Section]:
    """The results by data set, network and recipe.

    If a loss has results of several configurations, which a changed default makes, only those of the newest count.

    Args:
        results: lines of the file of results, the newest last.
        losses: the losses to report; None for all.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in results:
        if losses is None or line["loss"] in losses:
            for target in line["results"]:
                groups.setdefault((target, *_recipe(line)), []).append(line)
    return [_section(target, network, lines) for (target, _, network, _), lines in groups.items()]


def _recipe(line: Mapping[str, Any]) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    configuration = line["configuration"]
    network = configuration["model.name"] + (" with the neck" if configuration["model.bnneck"] else "")
    changes = {key: value for key, value in line["changes"].items() if key in comparable({key: value})}
    return line["config"], network, tuple(sorted(comparable(changes).items()))


def _section(target: str, network: str, lines: Sequence[Mapping[str, Any]]) -> Section:
    notes = []
    by_loss: dict[str, dict[int, dict[str, Any]]] = {}
    for loss in dict.fromkeys(line["loss"] for line in lines):
        own = [line for line in lines if line["loss"] == loss]
        newest = own[-1]
        free = {"train.seed", *newest.get("varied", {})}
        kept = [line for line in own if same(line["configuration"], newest["configuration"], free)]
        if len(kept) < len(own):
            notes.append(f"{loss}: {len(own) - len(kept)} results of an older configuration are left out.")
        by_loss[loss] = {line["seed"]: dict(line) for line in kept}
    every = sorted({seed for of_loss in by_loss.values() for seed in of_loss})
    for loss, of_loss in by_loss.items():
        missing = [str(seed) for seed in every if seed not in of_loss]
        if missing:
            notes.append(f"{loss}: seed {', '.join(missing)} is missing.")
    changes = {key: value for key, value in _recipe(lines[0])[2] if key != "model.load_weights"}
    return Section(target, lines[0]["config"], network, changes, by_loss, notes)


def to_markdown(section: Section, reference: str) -> str:
    """The section in Markdown: the scores of every loss, and the differences of the reference to each of them."""
    scores, differences = section.scores(), section.differences(reference)
    ahead = {(row.loss, row.score): row for row in differences.itertuples()}
    table = pd.DataFrame(
        [
            {
                "loss": f"**{loss}**" if loss in (reference, reference + TUNED) else loss,
                "seeds": int(row[("seeds", "")]),
                **{score: _spread(row[(score, "mean")], row[(score, "sd")]) for score in SCORES},
                **{
                    f"{reference} is ahead in {score}": _interval(ahead[loss, score]) if (loss, score) in ahead else "-"
                    for score in COMPARED
                },
            }
            for loss, row in scores.iterrows()
        ]
    )
    lines = [f"### {section.title}", "", table.to_markdown(index=False, disable_numparse=True)]
    if section.notes:
        lines += ["", " ".join(section.notes)]
    return "\n".join(lines)


def _spread(mean: float, deviation: float) -> str:
    return f"{mean:.1f}" if pd.isna(deviation) else f"{mean:.1f} ± {deviation:.1f}"


def _interval(row: Any) -> str:
    text = f"{row.mean:+.1f} [{row.low:+.1f}, {row.high:+.1f}]"
    return f"{text}, p {'< 0.001' if row.p < 0.001 else f'= {row.p:.3f}'}" if row.p < LEVEL else text


def report(results: Sequence[Mapping[str, Any]], reference: str = "drsl", losses: Sequence[str] | None = None) -> str:
    """All sections in Markdown.

    Raises:
        InputError: if there are no results, or results of one loss and seed that were tested on other queries.
    """
    found = sections(results, losses)
    if not found:
        raise InputError("there are no results to report; make them with drsl-benchmark run")
    head = (
        f"Mean ± standard deviation over the seeds, in percent. The last columns give the difference to {reference} in "
        "percentage points, with a 95 % interval over seeds and test identities; a p-value stands where it is below "
        f"{LEVEL}, corrected for the number of losses of the table (Holm)."
    )
    return "\n\n".join([head, *(to_markdown(section, reference) for section in found)]) + "\n"


def insert(path: Path, text: str) -> None:
    """Writes a report to a file; where the file has the two comments ``BEGIN`` and ``END``, between them alone.

    Raises:
        InputError: if the file has only one of them.
    """
    content = path.read_text(encoding="utf-8") if path.exists() else f"{BEGIN}\n{END}\n"
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{path} needs the lines {BEGIN} and {END}, between which the report goes")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
