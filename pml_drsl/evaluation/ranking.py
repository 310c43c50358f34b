"""Where each query's true matches stand in its ranked gallery, without sorting the gallery.

A match's place is one plus how many gallery entries precede it: the quantity that the loss smooths
(``rank_pos`` and ``false_pos`` in ``pml_drsl.functional``), here at temperature 0. Only the matches of a
query are sorted; every other gallery entry is put into its bin between two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from pml_drsl.checks import InputError
from pml_drsl.evaluation.distances import Array, DistanceRows, rows_per_chunk

Ties = Literal["mean", "optimistic", "pessimistic"]
SearchProtocol = Literal["standard", "single-gallery-shot"]
TIES: tuple[Ties, ...] = ("mean", "optimistic", "pessimistic")
PROTOCOLS: tuple[SearchProtocol, ...] = ("standard", "single-gallery-shot")
SHARE_OF_TIED: dict[Ties, float] = {"mean": 0.5, "optimistic": 0.0, "pessimistic": 1.0}
NUM_REPEATS = 10  # galleries drawn per query by the single-gallery-shot protocol, as in torchreid

Labels: TypeAlias = Array | Sequence[int] | Sequence[str]


@dataclass(frozen=True)
class RankedQueries:
    """What a ranking says of each query. A query without a match has NaN, NaN and infinite places.

    Attributes:
        average_precision: [Q] float64 in (0, 1].
        inverse_negative_penalty: [Q] float64 in (0, 1]: number of matches / place of the last one
            (Ye et al., TPAMI 2022).
        first_places: [Q, S] float64, place of the nearest match (1 is best), in S equally likely cases
            over which CMC is averaged (orders of ties, and galleries drawn).
        num_positives: [Q] int64, true matches in the gallery.
        num_junk: [Q] int64, gallery entries left out.
        num_gallery: size of the gallery.
    """

    average_precision: Tensor
    inverse_negative_penalty: Tensor
    first_places: Tensor
    num_positives: Tensor
    num_junk: Tensor
    num_gallery: int

    @property
    def matched(self) -> Tensor:
        """[Q] bool: which queries have a match, and so count."""
        return self.num_positives > 0

    def hits(self, max_rank: int = 50) -> Tensor:
        """[Q, min(max_rank, gallery)] float64 in [0, 1]: chance that a match is among the first k, column k - 1.

        Raises:
            InputError: for a ``max_rank`` below 1.
        """
        if max_rank < 1:
            raise InputError(f"max_rank={max_rank}: give a positive rank")
        ranks = torch.arange(1, min(max_rank, self.num_gallery) + 1, device=self.first_places.device)
        return (self.first_places[:, :, None] <= ranks).double().mean(dim=1)


def rank_queries(
    distances: DistanceRows,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels | None = None,
    gallery_cams: Labels | None = None,
    *,
    ties: Ties = "mean",
    protocol: SearchProtocol = "standard",
    seed: int = 0,
    gallery_starts_with_query: bool = False,
    chunk_size: int | None = None,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
) -> RankedQueries:
    """Ranks the gallery of every query by the re-ID protocol; ``evaluation.accuracy.evaluate`` says its terms.

    Args:
        distances: Q queries by M gallery entries; see ``DistanceRows``.
        query_ids: [Q] identities: integers or strings.
        gallery_ids: [M] identities.
        query_cams: [Q] cameras, or None (with ``gallery_cams``) for retrieval without cameras.
        gallery_cams: [M] cameras.
        ties: who comes first of a match and a wrong entry at the same distance.
        protocol: ``"standard"`` (Market-1501's) or ``"single-gallery-shot"`` (CUHK03's).
        seed: of the generator that draws the galleries of ``"single-gallery-shot"``.
        gallery_starts_with_query: the first Q gallery entries are the queries themselves; each is junk to itself.
        chunk_size: queries at a time; None chooses by memory.
        progress: show a progress bar on stderr.
        group: processes that share the queries, in whole chunks; each must call this with the same arguments, and
            gets the same answer: bit for bit that of one process, with the same number of threads.

    Raises:
        InputError: for labels of a wrong shape or type, one camera list without the other, an unknown option,
            or when no query has a match.
    """
    _check_option("ties", ties, TIES)
    _check_option("protocol", protocol, PROTOCOLS)
    num_query, num_gallery = distances.num_query, distances.num_gallery
    ids = shared_labels(query_ids, gallery_ids, num_query, num_gallery, "ids")
    if (query_cams is None) != (gallery_cams is None):
        given, missing = ("gallery", "query") if query_cams is None else ("query", "gallery")
        raise InputError(f"{given}_cams without {missing}_cams: give both, or neither to ignore cameras")
    cams = None
    if query_cams is not None and gallery_cams is not None:
        cams = shared_labels(query_cams, gallery_cams, num_query, num_gallery, "cams")
    if gallery_starts_with_query and (num_gallery < num_query or not torch.equal(ids[0], ids[1][:num_query])):
        raise InputError("gallery_starts_with_query: the first gallery identities are not those of the queries")

    groups = _Identities(ids[1], int(torch.cat(ids).max()) + 1)
    shots = _SingleShots(groups, seed) if protocol == "single-gallery-shot" else None
    step = rows_per_chunk(max(num_gallery, 0 if shots is None else shots.draws_per_query), chunk_size)
    # Of a chunk of another size, a matrix product may round differently.
    starts = range(0, num_query, step)
    mine = starts if group is None else starts[share(len(starts), group)]
    if shots is not None:
        shots.skip(mine.start)
    parts: list[tuple[Tensor, ...]] = []
    with tqdm(total=num_query, desc="ranking", unit="query", disable=not progress) as bar:
        for start in mine:
            stop = min(start + step, num_query)
            rows = distances.rows(start, stop)
            members, valid = groups.members(ids[0][start:stop])
            junk = torch.zeros_like(valid)
            if cams is not None:
                junk |= valid & (cams[1][members] == cams[0][start:stop, None])
            if gallery_starts_with_query:
                junk |= valid & (members == torch.arange(start, stop)[:, None])
            parts.append((*_rank_rows(rows, members, valid, junk, ties, shots), junk.sum(dim=1)))
            bar.update(stop - start)
    if group is not None:
        of_all: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(of_all, parts, group)
        parts = [part for of_process in of_all for part in of_process]
    ap, inp, first, positives, junks = (torch.cat(column) for column in zip(*parts, strict=True))
    ranked = RankedQueries(ap, inp, first, positives, junks, num_gallery)
    if not bool(ranked.matched.any()):
        raise InputError(_why_no_match(ids, ranked, cams is not None, gallery_starts_with_query))
    return ranked


def _rank_rows(
    rows: Tensor, members: Tensor, valid: Tensor, junk: Tensor, ties: Ties, shots: _SingleShots | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """AP [q], INP [q], first places [q, S] and number of positives [q] of a chunk. Overwrites ``rows``."""
    num_positives = (valid & ~junk).sum(dim=1)
    device = rows.device
    members, positive = members.to(device), (valid & ~junk).to(device)
    # Sorting puts the padding, at infinity, behind each query's own positives.
    thresholds = rows.gather(1, members).masked_fill_(~positive, torch.inf).sort(dim=1).values
    thresholds = thresholds[:, : max(1, int(num_positives.max()))].contiguous()
    has_member = valid.any(dim=1).to(device).nonzero().squeeze(1)
    rows[has_member[:, None], members[has_member]] = torch.inf  # now each row holds negatives alone
    earlier, tied = _count_before(rows, thresholds)

    count = num_positives.to(device)
    false_pos = earlier + SHARE_OF_TIED[ties] * tied.double()
    rank_pos = torch.arange(1, thresholds.shape[1] + 1, device=device).expand_as(false_pos).double()
    if ties == "mean":  # as the loss has it at temperature 0: a tied positive counts half
        before = torch.searchsorted(thresholds, thresholds)
        rank_pos = (before + torch.searchsorted(thresholds, thresholds, right=True) + 1) / 2.0
    real = torch.arange(thresholds.shape[1], device=device) < count[:, None]
    precision = (rank_pos / (rank_pos + false_pos)).masked_fill_(~real, 0)
    average_precision = precision.sum(dim=1) / count  # 0 / 0 is the NaN of a query without a match
    last = (count - 1).clamp_(min=0)[:, None]
    penalty = count / (count + false_pos.gather(1, last).squeeze(1))

    if shots is not None:
        earlier, tied = shots.negatives_before(rows, thresholds, count)
    bounds = {"mean": (0, 1), "optimistic": (0,), "pessimistic": (1,)}[ties]
    first = earlier[:, :1] if shots is None else earlier
    first_tied = tied[:, :1] if shots is None else tied
    places = torch.cat([1.0 + first + bound * first_tied for bound in bounds], dim=1).double()
    unmatched = count == 0
    penalty[unmatched] = torch.nan
    places[unmatched] = torch.inf
    return average_precision.cpu(), penalty.cpu(), places.cpu(), num_positives


def _count_before(rows: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """How many entries of each row of [q, M] lie below, and at, each ascending threshold of [q, K]: two [q, K].

    Costs O(M log K) a row. ``d <= t`` is asked as ``d < nextafter(t)``, so one pass finds both counts.
    """
    above = torch.nextafter(thresholds, torch.full_like(thresholds, torch.inf))
    edges = torch.cat([thresholds, above], dim=1).sort(dim=1).values
    bins = torch.searchsorted(edges, rows, right=True)  # an entry in bin b has b edges at or below it
    counts = torch.zeros(len(rows), edges.shape[1] + 1, dtype=torch.int64, device=rows.device)
    counts.scatter_add_(1, bins, torch.ones((), dtype=torch.int64, device=rows.device).expand_as(bins))
    below = counts.cumsum(dim=1)
    earlier = below.gather(1, torch.searchsorted(edges, thresholds))
    return earlier, below.gather(1, torch.searchsorted(edges, above)) - earlier


class _Identities:
    """The gallery grouped by identity: ``order[starts[i] : starts[i] + counts[i]]`` are the entries of ``i``."""

    def __init__(self, gallery_ids: Tensor, num_identities: int) -> None:
        self.order = gallery_ids.argsort(stable=True)
        self.counts = torch.bincount(gallery_ids, minlength=num_identities)
        self.starts = self.counts.cumsum(0) - self.counts

    def members(self, identities: Tensor) -> tuple[Tensor, Tensor]:
        """[q, C] gallery entries of each of [q] identities, and [q, C] bool which of them are not padding.

        Padding repeats an identity's first entry; C is at least 1.
        """
        counts = self.counts[identities][:, None]
        column = torch.arange(max(1, int(counts.max())))[None, :]
        valid = column < counts
        places = self.starts[identities][:, None] + torch.where(valid, column, 0)
        return self.order[places.clamp_(max=len(self.order) - 1)], valid


class _SingleShots:
    """CUHK03's single-gallery-shot protocol: galleries with one entry per identity, drawn anew for each query."""

    def __init__(self, groups: _Identities, seed: int) -> None:
        self.order = groups.order
        present = groups.counts > 0
        self.starts, self.counts = groups.starts[present], groups.counts[present]
        self.generator = np.random.default_rng(seed)
        self.draws_per_query = NUM_REPEATS * (len(self.counts) + 1)

    def skip(self, num_queries: int) -> None:
        """Draws for ``num_queries`` queries, and drops what is drawn."""
        self.generator.bit_generator.advance(num_queries * self.draws_per_query)  # type: ignore[attr-defined]

    def negatives_before(self, rows: Tensor, thresholds: Tensor, num_positives: Tensor) -> tuple[Tensor, Tensor]:
        """Drawn negatives closer than, and as close as, the drawn positive: two [q, repeats] integer tensors.

        Args:
            rows: [q, M] distances of negatives; infinity at entries of the query's identity.
            thresholds: [q, K] distances of its positives, in the first ``num_positives`` [q] columns.
        """
        # One stream of numbers in the order of the queries: results do not depend on the chunks.
        shape = (len(rows), NUM_REPEATS, len(self.counts) + 1)
        draws = torch.from_numpy(self.generator.random(shape))
        chosen = self.order[self.starts + (draws[..., :-1] * self.counts).long()].to(rows.device)
        negatives = rows.gather(1, chosen.flatten(1)).view(chosen.shape)
        which = (draws[..., -1].to(rows.device) * num_positives[:, None]).long()
        threshold = thresholds.gather(1, which)[:, :, None]
        return (negatives < threshold).sum(dim=2), (negatives == threshold).sum(dim=2)


def share(number: int, group: dist.ProcessGroup) -> slice:
    """Which of ``number`` things in a row are this process's; shares differ by one at most."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    return slice(number * rank // world_size, number * (rank + 1) // world_size)


def shared_labels(query: Labels, gallery: Labels, num_query: int, num_gallery: int, name: str) -> tuple[Tensor, Tensor]:
    """Labels of both sides, on the CPU, as indices into their shared set of values."""
    sides: list[np.ndarray[Any, Any]] = []
    for side, labels, count in (("query", query, num_query), ("gallery", gallery, num_gallery)):
        array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if array.shape != (count,):
            raise InputError(f"{side}_{name} have shape {list(array.shape)}: give one for each of {count} features")
        if array.dtype.kind not in "iubUS":
            raise InputError(f"{side}_{name} are {array.dtype}: give integers or strings")
        sides.append(array)
    if (sides[0].dtype.kind in "US") != (sides[1].dtype.kind in "US"):
        raise InputError(f"query_{name} are {sides[0].dtype} and gallery_{name} {sides[1].dtype}: give the same kind")
    _, indices = np.unique(np.concatenate(sides), return_inverse=True)
    together = torch.from_numpy(indices.astype(np.int64).reshape(-1))
    return together[:num_query], together[num_query:]


def _check_option(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"unknown {name} {value!r}: choose one of {', '.join(map(repr, allowed))}")


def _why_no_match(ids: tuple[Tensor, Tensor], ranked: RankedQueries, has_cams: bool, with_query: bool) -> str:
    shared = int(torch.isin(ids[0], ids[1]).sum())
    message = f"none of the {len(ids[0])} queries has a match in the gallery of {len(ids[1])}"
    if shared == 0:
        return f"{message}: no query identity occurs in the gallery; check that both use the same identity labels"
    message += f": the identities of {shared} occur there, but only as entries that the protocol leaves out"
    if has_cams:
        return (
            f"{message} ({int(ranked.num_junk.sum())} entries of the query's identity and camera). A match must come "
            "from another camera than its query: check query_cams and gallery_cams, or leave both out"
        )
    return f"{message} (the query itself)" if with_query else message
