"""Re-ranking by k-reciprocal neighbours (Zhong, Zheng, Cao, Li, CVPR 2017), without a matrix of all images by all.

Each image is encoded by its k-reciprocal neighbours, as a sparse vector. The Jaccard distance of two codes is mixed
with the original distance. The results equal those of the paper's code, which torchreid contains.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from tqdm import tqdm

from pml_drsl.checks import InputError
from pml_drsl.evaluation import Metric
from pml_drsl.evaluation.arrays import Array
from pml_drsl.evaluation.distances import FeatureDistances, as_features, rows_per_chunk

ROWS_PER_STEP = 256  # Each row compares neighbours with k1^3 / 2 booleans.


def rerank(
    query: Array,
    gallery: Array,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    metric: Metric = "euclidean",
    is_junk: tuple[Tensor, Tensor] | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> RerankedDistances:
    """Re-ranked distances of every query to the gallery, for ``pml_drsl.evaluation.scores.rank_queries``.

    The original distances are squared Euclidean, or 1 - cosine, as in torchreid. As in the published code, each is
    divided by the largest distance of its row and then squared.

    Args:
        query, gallery: floating-point features of shapes (Q, D) and (M, D).
        k1: number of neighbours that may be reciprocal, at least 1.
        k2: number of neighbours whose codes are averaged (local query expansion); 1 turns averaging off.
        lambda_value: weight of the original distance, in [0, 1].
        is_junk: bool of shapes (Q,) and (M,), not all true: images that take no part, whose distances are infinite;
            None if all images take part.
        metric, device, progress: see ``pml_drsl.evaluation.scores.evaluate``.

    An InputError refuses parameters out of their range, and features as ``FeatureDistances`` does."""
    for name, value in (("k1", k1), ("k2", k2)):
        if value < 1:
            raise InputError(f"{name}={value}: give at least 1 neighbour")
    if not 0 <= lambda_value <= 1:
        raise InputError(f"lambda_value={lambda_value}: give a weight between 0 (Jaccard alone) and 1 (original alone)")
    sides = [as_features(query, "query"), as_features(gallery, "gallery")]
    none = [torch.zeros(len(side), dtype=torch.bool, device="cpu") for side in sides]
    kept = [~junk for junk in is_junk or none]
    sides = [side[mask.to(side.device)] for side, mask in zip(sides, kept, strict=True)]
    between = FeatureDistances(sides[0], sides[1], metric, device=device)  # This checks the features.
    everyone = torch.cat([side.to(between.query) for side in sides])
    among = FeatureDistances(everyone, everyone, metric)
    neighbours, largest = _nearest(among, max(k1 + 1, k2), progress)
    encoded, size = _encode(among, neighbours, largest, k1), len(everyone)
    if k2 > 1:  # Replaces each code by the mean code of the image's nearest neighbours (eq. 11).
        nearest = neighbours[:, :k2]
        starts = np.arange(0, nearest.numel() + 1, nearest.shape[1])
        weights = np.full(nearest.numel(), 1 / nearest.shape[1], dtype=np.float32)
        encoded = sparse.csr_array((weights, nearest.flatten().numpy(), starts), shape=(size, size)) @ encoded
    return RerankedDistances(between, largest[: between.num_query], encoded, lambda_value, kept)


class RerankedDistances:
    """Rows of re-ranked distances: ``(1 - lambda) * Jaccard + lambda * original`` (eq. 12). ``rerank`` creates it, from
    bool masks ``kept`` of all queries and of the whole gallery. The rest is of the kept images alone: the original
    distances, the largest of each query, and the codes of queries and gallery, (N, N)."""

    def __init__(
        self, original: FeatureDistances, largest: Tensor, encoded: sparse.csr_array, lambda_value: float,
        kept: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self.original, self.lambda_value, self._largest = original, lambda_value, largest
        self.num_query, self.num_gallery = map(len, kept)
        self._kept = [mask.nonzero().squeeze(1).to(original.query.device) for mask in kept]
        self._queries = encoded[: original.num_query]
        self._gallery = encoded[original.num_query :].tocsc()  # A column lists the images that have a neighbour.

    def rows(self, start: int, stop: int) -> Tensor:
        """Re-ranked distances in [0, 1], or infinity, shape (stop - start, M), on the device of the features."""
        queries, gallery = self._kept
        first, last = (int((queries < place).sum()) for place in (start, stop))
        original = _normalise(self.original.distances(first, last), self._largest[first:last, None])
        jaccard = self._jaccard(self._queries[first:last]).to(original)
        rows = original.new_full((stop - start, self.num_gallery), torch.inf)
        mixed = jaccard.mul_(1 - self.lambda_value).add_(original, alpha=self.lambda_value)
        rows[queries[first:last, None] - start, gallery] = mixed
        return rows

    distances = rows  # Re-ranked rows do not differ from the distances by a constant.

    def _jaccard(self, queries: sparse.csr_array) -> Tensor:
        """Jaccard distances, shape (q, M): ``1 - sum_j min(V_qj, V_gj) / sum_j max(V_qj, V_gj)`` (eq. 10)."""
        shared = torch.zeros(queries.shape[0], self.original.num_gallery, dtype=torch.float32, device="cpu")
        for row, mine in enumerate(shared.numpy()):
            entries = slice(*queries.indptr[row : row + 2])
            both = self._gallery[:, queries.indices[entries]]
            both.data = np.minimum(both.data, np.repeat(queries.data[entries], np.diff(both.indptr)))
            mine[:] = both.sum(axis=1)
        return shared.div_(shared - 2).add_(1)  # 1 - s / (2 - s): both rows of V sum to 1


def _normalise(distances: Tensor, largest: Tensor) -> Tensor:
    """Distances divided by the largest distance of their row and squared; 0 if all distances of a row are 0."""
    return distances.div_(largest.clamp_min(torch.finfo(distances.dtype).tiny)).square_()


def _nearest(among: FeatureDistances, count: int, progress: bool) -> tuple[Tensor, Tensor]:
    """The nearest images of each of N images, itself too, shape (N, min(count, N)), and its largest distance, (N,)."""
    size = among.num_query
    step, neighbours, largest = rows_per_chunk(size), [], []
    with tqdm(total=size, desc="re-ranking", unit="image", disable=not progress) as bar:
        for start in range(0, size, step):
            distances = among.distances(start, min(start + step, size))
            neighbours.append(distances.topk(min(count, size), largest=False).indices.cpu())
            largest.append(distances.amax(dim=1))
            bar.update(len(distances))
    return torch.cat(neighbours), torch.cat(largest)


def _reciprocal(neighbours: Tensor) -> Tensor:
    """Whether each neighbour has the image among its own neighbours too, bool of shape (N, k) (eq. 3)."""
    images = torch.arange(len(neighbours), device=neighbours.device)[:, None, None]
    steps = zip(neighbours.split(ROWS_PER_STEP), images.split(ROWS_PER_STEP), strict=True)
    return torch.cat([(neighbours[mine] == image).any(dim=2) for mine, image in steps])


def _encode(among: FeatureDistances, neighbours: Tensor, largest: Tensor, k1: int) -> sparse.csr_array:
    """Codes of all images, shape (N, N): Gaussians of the distances of expanded reciprocal neighbours (eqs. 5, 7)."""
    size = len(neighbours)
    full, half = neighbours[:, : k1 + 1], neighbours[:, : round(k1 / 2) + 1]
    images, half_reciprocal = torch.arange(size, device=neighbours.device)[:, None], _reciprocal(half)
    pairs = []
    steps = (rows.split(ROWS_PER_STEP) for rows in (images, full, _reciprocal(full)))
    for image, mine, is_mine in zip(*steps, strict=True):
        theirs, is_theirs = half[mine], half_reciprocal[mine]  # (n, k1 + 1, k1 / 2 + 1)
        known = ((theirs[..., None] == mine[:, None, None, :]) & is_mine[:, None, None, :]).any(dim=3) & is_theirs
        # A neighbour's set joins if more than two thirds of the set are among the image's own neighbours.
        joins = is_mine & (3 * known.sum(dim=2) > 2 * is_theirs.sum(dim=2))
        added = is_theirs & joins[..., None]
        pairs.append((image * size + mine)[is_mine])
        pairs.append((image[..., None] * size + theirs)[added])
    rows, columns = np.divmod(np.unique(torch.cat(pairs).numpy()), size)
    distances = among.of_pairs(*(torch.from_numpy(of_pairs).to(among.query.device) for of_pairs in (rows, columns)))
    weights = torch.exp(-_normalise(distances, largest[rows].cpu())).double().numpy()
    weights /= np.bincount(rows, weights, size)[rows]
    return sparse.csr_array((weights.astype(np.float32), (rows, columns)), shape=(size, size))
