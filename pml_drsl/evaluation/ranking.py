"""Ranks the gallery of each query by the re-ID protocol, from counts of the entries before each match.

These counts are ``rank_pos`` and ``false_pos`` of ``pml_drsl.functional`` at temperature 0. Only distances are sorted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from tqdm import tqdm

from pml_drsl.checks import InputError
from pml_drsl.evaluation import JUNK, PROTOCOLS, RANKS, TIES, SearchProtocol, Ties
from pml_drsl.evaluation.arrays import Junk, Labels, label_array, number_cameras, number_identities
from pml_drsl.evaluation.distances import FeatureDistances, check_option, rows_per_chunk
from pml_drsl.evaluation.reranking import RerankedDistances

NUM_REPEATS = 10  # galleries that the single-gallery-shot protocol draws for each query, as torchreid does
# The equally likely shares of the tied negatives that come before a match.
SHARES_OF_TIED: dict[Ties, tuple[int, ...]] = {"mean": (0, 1), "optimistic": (0,), "pessimistic": (1,)}


@dataclass(frozen=True, eq=False)
class RankedQueries:
    """The scores of each query. A query without a match has NaN scores and infinite places.

    Attributes:
        average_precision: float64 of shape (Q,), in (0, 1].
        inverse_negative_penalty: float64 of shape (Q,), in (0, 1]: the number of matches divided by the place of the
            last match (Ye et al., TPAMI 2022).
        first_places: float64 of shape (Q, S): the place of the nearest match (1 is best), in S equally likely cases.
            A case is an order of ties or a drawn gallery. CMC is the mean over the cases.
        num_positives, num_junk: int64 of shape (Q,): matches in the gallery, and entries that the protocol removed.
        is_junk: bool of shape (Q,): whether the query has a junk identity. Such a query has no match.
        identities: array of shape (Q,): the identity of each query, as it was given.
        num_gallery: size of the gallery, without the entries that have a junk identity.
    """

    average_precision: Tensor
    inverse_negative_penalty: Tensor
    first_places: Tensor
    num_positives: Tensor
    num_junk: Tensor
    is_junk: Tensor
    identities: np.ndarray[Any, Any]
    num_gallery: int

    @property
    def matched(self) -> Tensor:
        """Bool tensor of shape (Q,): which queries have a match. Only those queries are scored."""
        return self.num_positives > 0

    def hits(self, max_rank: int = 50) -> Tensor:
        """The CMC of each query: float64 of shape (Q, min(max_rank, gallery size)), in [0, 1], ``max_rank`` >= 1.
        Column k - 1 is the probability that a match is among the first k entries."""
        return (self.first_places[:, :, None] <= self._ranks(max_rank)).double().mean(dim=1)

    def cmc(self, max_rank: int = 50) -> Tensor:
        """The mean of ``hits`` over the queries with a match, in memory for the gallery's size alone."""
        places = self.first_places[self.matched].flatten().sort().values
        return torch.searchsorted(places, self._ranks(max_rank), right=True).double() / len(places)

    def _ranks(self, max_rank: int) -> Tensor:
        if max_rank < 1:
            raise InputError(f"max_rank={max_rank}: give a positive rank")
        return torch.arange(1, min(max_rank, self.num_gallery) + 1, device=self.first_places.device).double()

    def scores(self, ranks: Sequence[int] = RANKS) -> dict[str, Tensor]:
        """The scores of each query by name, float64 of shape (Q,): ``SCORES``, and "rank-k" for each of the ranks."""
        scores = {name: of_queries(self) for name, of_queries in SCORES.items()}
        return scores | {f"rank-{k}": self.hits(k)[:, -1] for k in ranks}


# A search's scores are the means of these of its queries. A new metric is a line here: all else loops over them.
SCORES: dict[str, Callable[[RankedQueries], Tensor]] = {
    "mAP": lambda ranked: ranked.average_precision,
    "mINP": lambda ranked: ranked.inverse_negative_penalty,
}


def rank_queries(
    distances: FeatureDistances | RerankedDistances,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels | None = None,
    gallery_cams: Labels | None = None,
    *,
    ties: Ties = "mean",
    protocol: SearchProtocol = "standard",
    seed: int = 0,
    gallery_starts_with_query: bool = False,
    require_match: bool = True,
    junk: Junk = JUNK,
    progress: bool = False,
    group: dist.ProcessGroup | None = None,
) -> RankedQueries:
    """Ranks the gallery of every query by the re-ID protocol.

    ``pml_drsl.evaluation.scores.evaluate`` describes the protocol and the arguments that are not here.

    Args:
        distances: distances of Q queries to M gallery entries, of features or re-ranked.
        gallery_starts_with_query: whether the first Q gallery entries are the queries, each then removed from its own.
        require_match: raise an InputError where no query has a match; False only warns.
        group: processes that share the queries, in whole chunks. Every process must give the same arguments, and gets
            the result of one process with the same number of threads, bit for bit.

    An InputError refuses labels of a wrong shape or type, a single camera list, and unknown options."""
    check_options(ties, protocol, seed=seed)
    num_query, num_gallery = distances.num_query, distances.num_gallery
    ids = number_identities(query_ids, gallery_ids, num_query, num_gallery, junk)
    cams = number_cameras(query_cams, gallery_cams, num_query, num_gallery)
    for name, both in (("identities", ids), ("cameras", cams)):
        if gallery_starts_with_query and both is not None and not torch.equal(both[0], both[1][:num_query]):
            why = f"the first gallery {name} are not those of the queries"
            raise InputError(f"gallery_starts_with_query: {why}; the testers of PML put the query split first")
    is_junk, ignored = ids[0] < 0, (ids[1] < 0).nonzero().squeeze(1)
    groups = Identities(ids[1], max(1, int(torch.cat(ids).max()) + 1))
    shots = SingleShots(groups, seed) if protocol == "single-gallery-shot" else None
    # Some ten numbers of eight bytes for each image of the query's identity, where a distance has four.
    of_identity = 20 * int(groups.counts[ids[0].clamp(min=0)].max())
    step = rows_per_chunk(max(num_gallery, of_identity, 0 if shots is None else shots.draws_per_query))
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
            if len(ignored) > 0:
                rows[:, ignored.to(rows.device)] = torch.inf
            members, valid = groups.members(ids[0][start:stop])
            removed = torch.zeros_like(valid) if cams is None else cams[1][members] == cams[0][start:stop, None]
            if gallery_starts_with_query:
                removed |= members == torch.arange(start, stop, device=members.device)[:, None]
            removed &= valid
            parts.append((*_rank_rows(rows, members, valid, removed, ties, shots), removed.sum(dim=1)))
            bar.update(stop - start)
    if group is not None:
        of_all: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(of_all, parts, group)
        parts = [part for of_process in of_all for part in of_process]
    ap, inp, first, positives, junks = (torch.cat(column) for column in zip(*parts, strict=True))
    identities = label_array(query_ids)
    ranked = RankedQueries(ap, inp, first, positives, junks, is_junk, identities, num_gallery - len(ignored))
    if not bool(ranked.matched.any()):
        why = _why_no_match(ids, ranked, cams is not None, gallery_starts_with_query)
        if require_match:
            raise InputError(why)
        warnings.warn(why, stacklevel=2)
    return ranked


def check_options(ties: str, protocol: str, max_rank: int = 1, seed: int = 0) -> None:
    """Raises InputError for an option out of its range."""
    check_option("ties", ties, TIES)
    check_option("protocol", protocol, PROTOCOLS)
    if max_rank < 1:
        raise InputError(f"max_rank={max_rank}: give a positive rank")
    if seed < 0:
        raise InputError(f"seed={seed}: give 0 or more")


def _rank_rows(
    rows: Tensor, members: Tensor, valid: Tensor, removed: Tensor, ties: Ties, shots: SingleShots | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first four attributes of ``RankedQueries`` for a chunk of q queries. Overwrites ``rows``, shape (q, M). The
    members of each query's identity, ``valid`` (False for padding) and ``removed`` by the protocol: shape (q, C)."""
    num_positives, device = (valid & ~removed).sum(dim=1), rows.device
    members, positive = members.to(device), (valid & ~removed).to(device)
    # Padding gets an infinite distance, so that sorting puts it after the query's own positives.
    thresholds = rows.gather(1, members).masked_fill_(~positive, torch.inf).sort(dim=1).values
    thresholds = thresholds[:, : max(1, int(num_positives.max()))].contiguous()
    has_member = valid.any(dim=1).to(device).nonzero().squeeze(1)
    rows[has_member[:, None], members[has_member]] = torch.inf  # Only the negatives remain.
    count = num_positives.to(device)
    first = None if shots is None else shots.negatives_before(rows, thresholds, count)
    last = (count - 1).clamp_(min=0)[:, None]
    earlier, tied = _count_before(rows, thresholds, thresholds.gather(1, last))

    shares = SHARES_OF_TIED[ties]
    false_pos = earlier + sum(shares) / len(shares) * tied.double()
    rank_pos = torch.arange(1, thresholds.shape[1] + 1, device=device).expand_as(false_pos).double()
    if ties == "mean":  # A tied positive counts half, as in the loss at temperature 0.
        before = torch.searchsorted(thresholds, thresholds)
        rank_pos = (before + torch.searchsorted(thresholds, thresholds, right=True) + 1).double() / 2
    real = torch.arange(thresholds.shape[1], device=device) < count[:, None]
    precision = (rank_pos / (rank_pos + false_pos)).masked_fill_(~real, 0)
    average_precision = precision.sum(dim=1) / count  # Without a match, 0 / 0 gives NaN.
    penalty = count / (count + false_pos.gather(1, last).squeeze(1))
    earlier, tied = first or (earlier[:, :1], tied[:, :1])
    places = torch.cat([1 + earlier + each * tied for each in shares], dim=1).double()
    unmatched = count == 0
    penalty[unmatched] = torch.nan
    places[unmatched] = torch.inf
    return average_precision.cpu(), penalty.cpu(), places.cpu(), num_positives


def _count_before(rows: Tensor, thresholds: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Counts the entries of each row, (q, M), below and at each threshold, (q, K), up to ``last``; overwrites rows."""
    # Equal entries are sorted fast. Entries after the last match need no order among themselves.
    torch.minimum(rows, torch.nextafter(last, torch.full_like(last, torch.inf)), out=rows)
    if rows.device.type == "cpu":
        threads = torch.get_num_threads()
        # numpy sorts ten times as fast as torch, which notes the places, and releases the interpreter's lock meanwhile.
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda part: part.sort(axis=1), np.array_split(rows.numpy(), threads)))
    else:
        rows = rows.sort(dim=1).values
    earlier = torch.searchsorted(rows, thresholds)
    return earlier, torch.searchsorted(rows, thresholds, right=True) - earlier


class Identities:
    """Entries ``order[starts[i] : starts[i] + counts[i]]`` have identity i, from 0; -1 is in no group."""

    def __init__(self, gallery_ids: Tensor, num_identities: int) -> None:
        self.order = gallery_ids.argsort(stable=True)
        self.counts = torch.bincount(gallery_ids[gallery_ids >= 0], minlength=num_identities)
        self.starts = self.counts.cumsum(0) - self.counts + (gallery_ids < 0).sum()

    def members(self, identities: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of some identities, -1 has none, shape (q, C) with C >= 1, and False where one is padding."""
        counts = torch.where(identities < 0, 0, self.counts[identities])[:, None]
        column = torch.arange(max(1, int(counts.max())), device=counts.device)[None, :]
        valid = column < counts
        places = self.starts[identities][:, None] + torch.where(valid, column, 0)
        return self.order[places.clamp_(max=len(self.order) - 1)], valid


class SingleShots:
    """Galleries of CUHK03's single-gallery-shot protocol: new galleries for each query, with one entry per identity."""

    def __init__(self, groups: Identities, seed: int) -> None:
        self.order = groups.order
        present = groups.counts > 0
        self.starts, self.counts = groups.starts[present], groups.counts[present]
        self.generator = np.random.default_rng(seed)
        self.draws_per_query = NUM_REPEATS * (len(self.counts) + 1)

    def skip(self, num_queries: int) -> None:
        """Moves the random generator on, as if so many queries had drawn their galleries."""
        self.generator.bit_generator.advance(num_queries * self.draws_per_query)  # type: ignore[attr-defined]

    def negatives_before(self, rows: Tensor, thresholds: Tensor, num_positives: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of drawn negatives closer than the drawn positive, and at its distance: (q, ``NUM_REPEATS``).
        ``rows`` has the distances of the negatives, infinite elsewhere; ``thresholds`` starts with the positives'."""
        # One stream of random numbers in the order of the queries makes results independent of the chunks.
        shape = (len(rows), NUM_REPEATS, len(self.counts) + 1)
        draws = torch.from_numpy(self.generator.random(shape))
        chosen = self.order[self.starts + (draws[..., :-1] * self.counts).long()].to(rows.device)
        negatives = rows.gather(1, chosen.flatten(1)).view(chosen.shape)
        which = (draws[..., -1].to(rows.device) * num_positives[:, None]).long()
        threshold = thresholds.gather(1, which)[:, :, None]
        return (negatives < threshold).sum(dim=2), (negatives == threshold).sum(dim=2)


def share(number: int, group: dist.ProcessGroup) -> slice:
    """The part of ``number`` consecutive items that belongs to this process. Parts differ by at most one item."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    return slice(number * rank // world_size, number * (rank + 1) // world_size)


def _why_no_match(ids: tuple[Tensor, Tensor], ranked: RankedQueries, has_cams: bool, with_query: bool) -> str:
    shared = int(torch.isin(ids[0][~ranked.is_junk], ids[1]).sum())
    message = f"none of the {len(ids[0])} queries has a match in the gallery of {len(ids[1])}"
    if shared == 0:
        return f"{message}: no query identity occurs in the gallery; check that both use the same identity labels"
    message += f": the identities of {shared} occur there, but only as entries that the protocol leaves out"
    if not has_cams:
        return f"{message} (the query itself)" if with_query else message
    message += f" ({int(ranked.num_junk.sum())} entries of the query's identity and camera)"
    cure = "check query_cams and gallery_cams, or leave both out (drsl-evaluate --no-cameras)"
    if int(ranked.num_junk.max()) == 1:  # drsl-extract gives an image without a camera a camera of its own.
        cure += "; if that entry is the query itself, add other images of its identity"
    return f"{message}. A match must come from another camera than its query: {cure}"
