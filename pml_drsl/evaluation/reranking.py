"""k-reciprocal re-ranking (Zhong, Zheng, Cao, Li, CVPR 2017) in the memory of its neighbour lists.

Two images are alike if their neighbours are. Each image is encoded by its k-reciprocal neighbours, a vector
with a few dozen non-zero entries; the Jaccard distance of two codes is mixed with the original distance.
Only neighbours, codes and a few rows of distances are held, never a matrix of all images by all images.
Equation numbers are the paper's. Numbers are those of its published code, which torchreid ships.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from tqdm import tqdm

from pml_drsl.checks import InputError
from pml_drsl.evaluation.distances import Array, FeatureDistances, Metric, as_features, rows_per_chunk

ROWS_PER_STEP = 256  # of neighbour comparisons, k1^3 / 2 booleans each


def rerank(
    query: Array,
    gallery: Array,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    metric: Metric = "euclidean",
    device: torch.device | str | None = None,
    progress: bool = False,
) -> RerankedDistances:
    """Re-ranked distances of every query to the gallery, for ``pml_drsl.evaluation.accuracy.rank_queries``.

    Original distances are torchreid's (squared Euclidean, or 1 - cosine), squared once more and divided by the
    largest of their row, as the published code does.

    Args:
        query: [Q, D] floating features.
        gallery: [M, D] floating features.
        k1: neighbours that may be reciprocal, at least 1.
        k2: neighbours whose codes are averaged (local query expansion), at least 1; 1 for none.
        lambda_value: weight of the original distance, in [0, 1].
        metric: ``"euclidean"`` or ``"cosine"``.
        device: where to compute distances; None for the device of ``query``.
        progress: show a progress bar on stderr.

    Raises:
        InputError: for a parameter out of its range, or features that ``FeatureDistances`` refuses.
    """
    for name, value in (("k1", k1), ("k2", k2)):
        if value < 1:
            raise InputError(f"{name}={value}: give at least 1 neighbour")
    if not 0 <= lambda_value <= 1:
        raise InputError(f"lambda_value={lambda_value}: give a weight between 0 (Jaccard alone) and 1 (original alone)")
    between = FeatureDistances(query, gallery, metric, device=device)  # checks both sides by their names
    everyone = torch.cat([as_features(features, "").to(between.query) for features in (query, gallery)])
    among = FeatureDistances(everyone, everyone, metric)
    neighbours, largest = _nearest(among, max(k1 + 1, k2), progress)
    encoded = _expand_queries(_encode(among, neighbours, largest, k1), neighbours[:, :k2])
    return RerankedDistances(between, largest[: between.num_query], encoded, lambda_value)


class RerankedDistances:
    """``DistanceRows`` after re-ranking: ``(1 - lambda) * Jaccard + lambda * original`` (eq. 12). Made by ``rerank``.

    Args:
        original: distances of Q queries to M gallery entries.
        largest: [Q] largest original distance of each query to any image.
        encoded: [Q + M, Q + M] sparse codes of all images, queries first; each row sums to 1 or is empty.
        lambda_value: weight of the original distance.
    """

    def __init__(
        self, original: FeatureDistances, largest: Tensor, encoded: sparse.csr_array, lambda_value: float
    ) -> None:
        self.original = original
        self.lambda_value = lambda_value
        self._largest = largest
        self._queries = encoded[: original.num_query]
        self._gallery = encoded[original.num_query :].tocsc()  # by neighbour: who else has it

    @property
    def num_query(self) -> int:
        return self.original.num_query

    @property
    def num_gallery(self) -> int:
        return self.original.num_gallery

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, M] re-ranked distances in [0, 1], on the device of the features."""
        original = _normalise(self.original.distances(start, stop), self._largest[start:stop, None])
        jaccard = self._jaccard(self._queries[start:stop]).to(original)
        return jaccard.mul_(1 - self.lambda_value).add_(original, alpha=self.lambda_value)

    def distances(self, start: int, stop: int) -> Tensor:
        """The same as ``rows``: here they are shifted by nothing (compare ``FeatureDistances``)."""
        return self.rows(start, stop)

    def _jaccard(self, queries: sparse.csr_array) -> Tensor:
        """[q, M] ``1 - sum_j min(V_qj, V_gj) / sum_j max(V_qj, V_gj)`` (eq. 10), where both rows sum to 1."""
        shared = torch.zeros(queries.shape[0] * self.num_gallery)
        for row in range(queries.shape[0]):
            entries = slice(queries.indptr[row], queries.indptr[row + 1])
            columns, mine = queries.indices[entries], queries.data[entries]
            begins = self._gallery.indptr[columns].astype(np.int64)
            lengths = self._gallery.indptr[columns + 1] - begins
            # The concatenation of the ranges begins[j] : begins[j] + lengths[j].
            places = np.arange(lengths.sum()) + np.repeat(begins - (lengths.cumsum() - lengths), lengths)
            smaller = np.minimum(np.repeat(mine, lengths), self._gallery.data[places])
            found = torch.from_numpy(row * self.num_gallery + self._gallery.indices[places].astype(np.int64))
            shared.index_add_(0, found, torch.from_numpy(smaller))
        shared = shared.view(-1, self.num_gallery)
        return shared.div_(shared - 2).add_(1)  # 1 - s / (2 - s)


def _normalise(distances: Tensor, largest: Tensor) -> Tensor:
    """Squares of distances, divided by the square of the row's largest (0 where all are 0)."""
    return distances.div_(largest.clamp_min(torch.finfo(distances.dtype).tiny)).square_()


def _nearest(among: FeatureDistances, count: int, progress: bool) -> tuple[Tensor, Tensor]:
    """[N, min(count, N)] nearest images of each of N, itself included, nearest first; [N] its largest distance."""
    size = among.num_query
    step = rows_per_chunk(size)
    neighbours, largest = [], []
    with tqdm(total=size, desc="re-ranking", unit="image", disable=not progress) as bar:
        for start in range(0, size, step):
            distances = among.distances(start, min(start + step, size))
            neighbours.append(distances.topk(min(count, size), largest=False).indices.cpu())
            largest.append(distances.amax(dim=1))
            bar.update(len(distances))
    return torch.cat(neighbours), torch.cat(largest)


def _reciprocal(neighbours: Tensor) -> Tensor:
    """[N, k] bool: of each listed neighbour, whether it lists this image too (eq. 3)."""
    images = torch.arange(len(neighbours))[:, None, None]
    return torch.cat(
        [
            (neighbours[neighbours[i : i + ROWS_PER_STEP]] == images[i : i + ROWS_PER_STEP]).any(dim=2)
            for i in range(0, len(neighbours), ROWS_PER_STEP)
        ]
    )


def _encode(among: FeatureDistances, neighbours: Tensor, largest: Tensor, k1: int) -> sparse.csr_array:
    """[N, N] codes: a Gaussian of the distance on the expanded reciprocal neighbours (eqs. 5 and 7), rows sum to 1."""
    size = len(neighbours)
    full, half = neighbours[:, : k1 + 1], neighbours[:, : round(k1 / 2) + 1]
    full_reciprocal, half_reciprocal = _reciprocal(full), _reciprocal(half)
    pairs = []
    for start in range(0, size, ROWS_PER_STEP):
        step = slice(start, start + ROWS_PER_STEP)
        image = torch.arange(size)[step, None]
        mine, is_mine = full[step], full_reciprocal[step]
        theirs, is_theirs = half[mine], half_reciprocal[mine]  # [n, k1 + 1, k1 / 2 + 1]: sets of each neighbour
        known = ((theirs[..., None] == mine[:, None, None, :]) & is_mine[:, None, None, :]).any(dim=3) & is_theirs
        # Two thirds in integers: a neighbour's set joins if more than that share of it is known already.
        joins = is_mine & (3 * known.sum(dim=2) > 2 * is_theirs.sum(dim=2))
        added = is_theirs & joins[..., None]
        pairs.append((image * size + mine)[is_mine])
        pairs.append((image[..., None] * size + theirs)[added])
    rows, columns = np.divmod(np.unique(torch.cat(pairs).numpy()), size)
    weights = torch.exp(-_normalise(_distances_of_pairs(among, rows, columns), largest[rows].cpu())).double().numpy()
    weights /= np.bincount(rows, weights, size)[rows]
    return sparse.csr_array((weights.astype(np.float32), (rows, columns)), shape=(size, size))


def _distances_of_pairs(among: FeatureDistances, rows: Any, columns: Any) -> Tensor:
    """[P] distances of P pairs of images, on the CPU."""
    left, right = (torch.from_numpy(indices).to(among.query.device) for indices in (rows, columns))
    step = rows_per_chunk(among.query.shape[1])
    parts = []
    for start in range(0, len(left), step):
        x, y = among.query[left[start : start + step]], among.query[right[start : start + step]]
        if among.metric == "cosine":
            parts.append(1 - x.mul_(y).sum(dim=1).cpu())
        else:
            parts.append(x.sub_(y).square_().sum(dim=1).cpu())
    return torch.cat(parts)


def _expand_queries(encoded: sparse.csr_array, neighbours: Tensor) -> sparse.csr_array:
    """Each code averaged over the codes of the image's nearest neighbours, [N, k2] (eq. 11)."""
    size, k2 = neighbours.shape
    if k2 == 1:
        return encoded
    starts = np.arange(0, size * k2 + 1, k2)
    weights = np.full(size * k2, 1 / k2, dtype=np.float32)
    return sparse.csr_array((weights, neighbours.flatten().numpy(), starts), shape=(size, size)) @ encoded
