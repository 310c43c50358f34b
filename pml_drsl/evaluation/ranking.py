"""Ranks the gallery of each query by the re-ID protocol, and says at which place each match stands.

The gallery is not sorted. The place of a match is one plus the number of gallery entries before it. The loss smooths
the same counts (``rank_pos`` and ``false_pos`` in ``pml_drsl.functional``); here the temperature is 0. Only the matches
of a query are sorted. Every negative is counted in the interval between two matches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from pml_drsl.checks import InputError
from pml_drsl.evaluation.distances import DistanceRows, rows_per_chunk
from pml_drsl.evaluation.identities import Identities, Labels, SingleShots, shared_labels

Ties = Literal["mean", "optimistic", "pessimistic"]
SearchProtocol = Literal["standard", "single-gallery-shot"]
TIES: tuple[Ties, ...] = ("mean", "optimistic", "pessimistic")
PROTOCOLS: tuple[SearchProtocol, ...] = ("standard", "single-gallery-shot")
SHARE_OF_TIED: dict[Ties, float] = {"mean": 0.5, "optimistic": 0.0, "pessimistic": 1.0}


@dataclass(frozen=True)
class RankedQueries:
    """The scores of each query. A query without a match has NaN scores and infinite places.

    Attributes:
        average_precision: float64 of shape (Q,), in (0, 1].
        inverse_negative_penalty: float64 of shape (Q,), in (0, 1]: the number of matches divided by the place of the
            last match (Ye et al., TPAMI 2022).
        first_places: float64 of shape (Q, S): the place of the nearest match (1 is best), in S equally likely cases.
            A case is an order of ties or a drawn gallery. CMC is the mean over the cases.
        num_positives: int64 of shape (Q,): number of matches in the gallery.
        num_junk: int64 of shape (Q,): number of gallery entries that the protocol removed.
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
        """Bool tensor of shape (Q,): which queries have a match. Only those queries are scored."""
        return self.num_positives > 0

    def hits(self, max_rank: int = 50) -> Tensor:
        """The CMC of each query: float64 of shape (Q, min(max_rank, gallery size)), in [0, 1].

        Column k - 1 is the probability that a match is among the first k entries.

        Raises:
            InputError: if ``max_rank`` is below 1.
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
    """Ranks the gallery of every query by the re-ID protocol, which ``evaluation.scores.evaluate`` describes.

    Args:
        distances: distances of Q queries to M gallery entries; see ``DistanceRows``.
        query_ids: identities of the queries, shape (Q,), integers or strings.
        gallery_ids: identities of the gallery, shape (M,).
        query_cams: cameras of the queries, shape (Q,), or None (with ``gallery_cams``) for retrieval without cameras.
        gallery_cams: cameras of the gallery, shape (M,).
        ties: how to score a match and a negative at the same distance; see ``evaluate``.
        protocol: ``"standard"`` (of Market-1501) or ``"single-gallery-shot"`` (of CUHK03).
        seed: seed of the draws of ``"single-gallery-shot"``.
        gallery_starts_with_query: whether the first Q gallery entries are the queries themselves. Each query is then
            junk in its own gallery.
        chunk_size: number of queries to rank at once; None for about 64 MiB of distances.
        progress: show a progress bar on stderr.
        group: processes that share the queries, in whole chunks. Every process must give the same arguments. Every
            process gets the result that one process would get with the same number of threads, bit for bit.

    Raises:
        InputError: if labels have a wrong shape or type, only one camera list is given, an option is unknown, or no
            query has a match.
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

    groups = Identities(ids[1], int(torch.cat(ids).max()) + 1)
    shots = SingleShots(groups, seed) if protocol == "single-gallery-shot" else None
    step = rows_per_chunk(max(num_gallery, 0 if shots is None else shots.draws_per_query), chunk_size)
    # All processes use the same chunks, because a matrix product of another size may round differently.
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
    rows: Tensor, members: Tensor, valid: Tensor, junk: Tensor, ties: Ties, shots: SingleShots | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ranks one chunk of q queries. Overwrites ``rows``.

    Returns:
        Average precision, shape (q,); inverse negative penalty, shape (q,); first places, shape (q, S); number of
        positives, shape (q,).
    """
    num_positives = (valid & ~junk).sum(dim=1)
    device = rows.device
    members, positive = members.to(device), (valid & ~junk).to(device)
    # Padding gets an infinite distance, so that sorting puts it after the query's own positives.
    thresholds = rows.gather(1, members).masked_fill_(~positive, torch.inf).sort(dim=1).values
    thresholds = thresholds[:, : max(1, int(num_positives.max()))].contiguous()
    has_member = valid.any(dim=1).to(device).nonzero().squeeze(1)
    rows[has_member[:, None], members[has_member]] = torch.inf  # Only the negatives remain.
    earlier, tied = _count_before(rows, thresholds)

    count = num_positives.to(device)
    false_pos = earlier + SHARE_OF_TIED[ties] * tied.double()
    rank_pos = torch.arange(1, thresholds.shape[1] + 1, device=device).expand_as(false_pos).double()
    if ties == "mean":  # A tied positive counts half, as in the loss at temperature 0.
        before = torch.searchsorted(thresholds, thresholds)
        rank_pos = (before + torch.searchsorted(thresholds, thresholds, right=True) + 1) / 2.0
    real = torch.arange(thresholds.shape[1], device=device) < count[:, None]
    precision = (rank_pos / (rank_pos + false_pos)).masked_fill_(~real, 0)
    average_precision = precision.sum(dim=1) / count  # Without a match, 0 / 0 gives NaN.
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
    """Counts the entries of each row that are below each threshold, and equal to each threshold.

    This takes O(M log K) operations for each row. ``d <= t`` is the same as ``d < nextafter(t)``, so that one pass
    finds both counts.

    Args:
        rows: distances, shape (q, M).
        thresholds: ascending distances, shape (q, K).

    Returns:
        Two int64 tensors of shape (q, K).
    """
    above = torch.nextafter(thresholds, torch.full_like(thresholds, torch.inf))
    edges = torch.cat([thresholds, above], dim=1).sort(dim=1).values
    bins = torch.searchsorted(edges, rows, right=True)  # An entry in bin b has b edges at or below it.
    counts = torch.zeros(len(rows), edges.shape[1] + 1, dtype=torch.int64, device=rows.device)
    counts.scatter_add_(1, bins, torch.ones((), dtype=torch.int64, device=rows.device).expand_as(bins))
    below = counts.cumsum(dim=1)
    earlier = below.gather(1, torch.searchsorted(edges, thresholds))
    return earlier, below.gather(1, torch.searchsorted(edges, above)) - earlier


def share(number: int, group: dist.ProcessGroup) -> slice:
    """The part of ``number`` consecutive items that belongs to this process. Parts differ by at most one item."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    return slice(number * rank // world_size, number * (rank + 1) // world_size)


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
