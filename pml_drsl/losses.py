"""DRSL as a loss function of pytorch-metric-learning."""

from __future__ import annotations

import math
from typing import Any

import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor
from torch.nn import functional as F

from pml_drsl import functional
from pml_drsl.reducers import PerQueryReducer

# Distances of one chunk of queries, in elements, where `query_chunk_size` does not say: 64 MiB of float32.
CHUNK_ELEMENTS = 2**24

# Below this norm torch.nn.functional.normalize divides by a constant: the vector has no direction.
SMALLEST_NORM = 1e-12

IndicesTuple = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]


class DRSLoss(BaseMetricLossFunction):
    """The Differentiable Retrieval-Sort Loss (Xu et al., "Rank-in-Rank Loss for Person Re-identification",
    ACM TOMM 2022): ranks every positive of a query ahead of every negative by distance, then sorts the positives
    among themselves by angle.

    For a query with positives P and negatives N, candidate distances d and angular dissimilarities
    ``u = (1 - cos) / 2``, and ``G(x) = sigmoid(x / temperature)``::

        rank_pos(i)  = 1 + sum over j in P, j != i of G(d_i - d_j)
        false_pos(i) = sum over n in N of G(d_i - d_n + margin)
        retrieval(i) = false_pos(i) / (rank_pos(i) + false_pos(i))
        sort(i)      = (u_i + sum over j in P, j != i of G(d_i - d_j) * u_j) / rank_pos(i)
        loss         = mean over queries of the mean over i in P of retrieval(i) + sort_weight * sort(i)

    ``1 - mean retrieval`` is the smoothed average precision; at temperature 0 it is average precision itself.
    Queries without a positive or without a negative have no term. Half-precision embeddings and autocast are
    computed in float32.

    Called as every PML loss: ``loss(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None)``, with
    embeddings of shape (batch, dim), integer labels of shape (batch,), and the pairs or triplets of a miner.
    Positives and negatives are then exactly those pairs; ``labels`` may be left out.

    The sub-losses, for a ``MultipleReducers``, are ``"retrieval_loss"`` and ``"sort_loss"`` (``sort_weight``
    included), with one error per (query, positive) pair. With ``collect_stats=True`` the attributes
    ``retrieval_error`` and ``sort_error`` hold the batch's mean over queries of each, unweighted, and
    ``num_queries`` the number of queries with a term.

    Args:
        temperature: softness of the ranks, > 0, in units of distance (which is in [0, 2] by default).
        sort_weight: weight of the sort error, >= 0.
        margin: distance by which negatives must follow positives; any finite number.
        query_chunk_size: queries whose distances are computed at once; bounds memory, changes no value.
            None chooses it so that one chunk of distances takes 64 MiB.
        **kwargs: of ``BaseMetricLossFunction``: ``distance`` (default: ``LpDistance``, Euclidean between normalised
            embeddings; a similarity enters with its sign changed), ``reducer`` (default: ``PerQueryReducer``),
            ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``.

    Raises:
        ValueError: for a hyper-parameter out of range, at construction; for tensors of wrong shape or type, when
            called.
    """

    def __init__(
        self,
        temperature: float = 0.01,
        sort_weight: float = 0.3,
        margin: float = 0.0,
        query_chunk_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not (_is_real(temperature) and temperature > 0):
            raise ValueError(f"temperature must be a number above 0, got {temperature!r}; try 0.01")
        if not (_is_real(sort_weight) and sort_weight >= 0):
            raise ValueError(f"sort_weight must be a number of at least 0, got {sort_weight!r}; 0 turns sorting off")
        if not _is_real(margin):
            raise ValueError(f"margin must be a finite number, got {margin!r}; 0 asks for order alone")
        if query_chunk_size is not None and not (isinstance(query_chunk_size, int) and query_chunk_size > 0):
            raise ValueError(f"query_chunk_size must be None or an integer above 0, got {query_chunk_size!r}")
        if not isinstance(self.distance, BaseDistance):
            raise ValueError(
                f"distance must be a distance of pytorch_metric_learning.distances, such as LpDistance() or "
                f"CosineSimilarity(), got {self.distance!r}"
            )
        self.temperature = temperature
        self.sort_weight = sort_weight
        self.margin = margin
        self.query_chunk_size = query_chunk_size
        self.add_to_recordable_attributes(list_of_names=["temperature", "sort_weight", "margin"], is_stat=False)
        self.add_to_recordable_attributes(list_of_names=["retrieval_error", "sort_error", "num_queries"], is_stat=True)

    # The number of pairs depends on the labels, so a compiler would start anew at almost every batch.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: IndicesTuple | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        _check_embeddings("embeddings", embeddings)
        _check_labels("labels", labels, len(embeddings))
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        if ref_emb is not None:
            _check_embeddings("ref_emb", ref_emb)
            if ref_emb.shape[1] != embeddings.shape[1]:
                raise ValueError(
                    f"ref_emb has {ref_emb.shape[1]} dimensions and embeddings {embeddings.shape[1]}; give both alike"
                )
            _check_labels("ref_labels", ref_labels, len(ref_emb))
            dtype = torch.promote_types(dtype, ref_emb.dtype)
            ref_emb = self._with_direction(ref_emb.to(dtype))
        if indices_tuple is None and (labels is None or (ref_emb is not None and ref_labels is None)):
            raise ValueError("labels (and ref_labels with ref_emb) are required where no indices_tuple is given")
        # At temperature 0.01 a half-precision similarity has no usable ranks.
        with torch.autocast(embeddings.device.type, enabled=False):
            return super().forward(  # type: ignore[no-any-return]
                self._with_direction(embeddings.to(dtype)), labels, indices_tuple, ref_emb, ref_labels
            )

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: IndicesTuple | None,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> dict[str, Any]:
        pairs = None
        if indices_tuple is not None:
            pairs = _check_indices(indices_tuple, len(embeddings), len(ref_emb), embeddings.device)
        size = self.query_chunk_size or max(1, CHUNK_ELEMENTS // max(1, len(ref_emb)))
        chunks = []
        for start in range(0, len(embeddings), size):
            rows = slice(start, min(start + size, len(embeddings)))
            if pairs is not None:
                masks = _masks_from_indices(pairs, rows, len(ref_emb))
            else:
                assert labels is not None and ref_labels is not None
                masks = _masks_from_labels(labels, ref_labels, rows)
            query, positive, retrieval, sort = self._errors(embeddings, ref_emb, rows, *masks)
            chunks.append((query + start, positive, retrieval, sort))
        if not any(len(chunk[0]) for chunk in chunks):
            return self.zero_losses()  # type: ignore[no-any-return]
        query, positive, retrieval, sort = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        self._collect_stats(query, retrieval, sort)
        of_pairs = {"indices": (query, positive), "reduction_type": "pos_pair"}
        return {
            "retrieval_loss": {"losses": retrieval, **of_pairs},
            "sort_loss": {"losses": self.sort_weight * sort, **of_pairs},
        }

    def _errors(
        self, embeddings: Tensor, ref_emb: Tensor, rows: slice, positives: Tensor, negatives: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pairs and errors of the queries in ``rows``, all of shape (E,); queries count from ``rows.start``."""
        query, positive = positives.nonzero(as_tuple=True)
        has_negative = negatives.any(1)[query]
        query, positive = query[has_negative], positive[has_negative]
        if len(query) == 0:
            none = embeddings.new_zeros(0)
            return query, positive, none, none
        whole = ref_emb is embeddings and rows == slice(0, len(embeddings))
        queries = embeddings if whole else embeddings[rows]
        mat = self.distance(queries, None if whole else ref_emb)
        of_pairs = mat[query, positive]
        sign = -1 if self.distance.is_inverted else 1
        retrieval, sort = functional.retrieval_sort_errors(
            sign * of_pairs,
            query,
            sign * mat if sign < 0 else mat,
            negatives,
            self.temperature,
            self.margin,
            self._dissimilarity(of_pairs, queries, ref_emb, query, positive) if self.sort_weight > 0 else None,
        )
        return query, positive, retrieval, torch.zeros_like(retrieval) if sort is None else sort

    def _dissimilarity(self, of_pairs: Tensor, x: Tensor, y: Tensor, query: Tensor, positive: Tensor) -> Tensor:
        """Angular dissimilarity of the pairs, shape (E,), from what the distance says of them where that is enough."""
        if type(self.distance) is LpDistance and self.distance.p == 2:
            x_norm, y_norm = self._norms(x)[query], self._norms(y)[positive]
            squared = of_pairs ** (2 / self.distance.power)
            inner_product = (x_norm**2 + y_norm**2 - squared) / 2
        elif type(self.distance) in (CosineSimilarity, DotProductSimilarity) and self.distance.power == 1:
            x_norm, y_norm = self._norms(x)[query], self._norms(y)[positive]
            inner_product = of_pairs
        else:
            inner_product = (F.normalize(x) @ F.normalize(y).T)[query, positive]
            x_norm, y_norm = (x != 0).any(1)[query].to(x), (y != 0).any(1)[positive].to(y)
        return functional.angular_dissimilarity(inner_product, x_norm, y_norm)

    def _norms(self, x: Tensor) -> Tensor:
        """Norms, shape (N,), of the embeddings as the distance compares them."""
        norms: Tensor = torch.linalg.vector_norm(x, dim=1)
        return (norms > SMALLEST_NORM).to(x) if self.distance.normalize_embeddings else norms

    def _with_direction(self, x: Tensor) -> Tensor:
        # Normalising a zero vector multiplies its gradient by 1e12, which half precision cannot hold.
        if not self.distance.normalize_embeddings:
            return x
        has_direction = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True) > SMALLEST_NORM
        return torch.where(has_direction, x, x.detach())

    def _collect_stats(self, query: Tensor, retrieval: Tensor, sort: Tensor) -> None:
        if not self.collect_stats:
            return
        mean = PerQueryReducer(collect_stats=False)
        self.retrieval_error, self.sort_error = (
            float(mean.element_reduction(errors.detach(), query, errors, None)) for errors in (retrieval, sort)
        )
        self.num_queries = len(torch.unique(query))

    def get_default_reducer(self) -> PerQueryReducer:
        return PerQueryReducer()

    def get_default_distance(self) -> LpDistance:
        return LpDistance(p=2)

    def _sub_loss_names(self) -> list[str]:
        return ["retrieval_loss", "sort_loss"]

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, sort_weight={self.sort_weight}, margin={self.margin}"


def _masks_from_labels(labels: Tensor, ref_labels: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The pairs of ``lmu.get_all_pairs_indices`` as two masks, shape (rows, M), without its N^2 indices."""
    same = labels[rows, None] == ref_labels[None]
    different = ~same
    if ref_labels is labels:
        same.diagonal(rows.start).fill_(False)
    return same, different


def _masks_from_indices(indices: tuple[Tensor, ...], rows: slice, num_refs: int) -> tuple[Tensor, Tensor]:
    """The pairs of an indices tuple (a1, p, a2, n) as two masks, shape (rows, M)."""
    masks = []
    for anchor, other in (indices[:2], indices[2:]):
        mask = torch.zeros(rows.stop - rows.start, num_refs, dtype=torch.bool, device=anchor.device)
        inside = (anchor >= rows.start) & (anchor < rows.stop)
        mask[anchor[inside] - rows.start, other[inside]] = True
        masks.append(mask)
    positives, negatives = masks
    if bool((positives & negatives).any()):
        query, other = (positives & negatives).nonzero()[0].tolist()
        raise ValueError(
            f"indices_tuple has the pair ({query + rows.start}, {other}) both as a positive and as a negative"
        )
    return positives, negatives


def _check_indices(
    indices_tuple: IndicesTuple, num_queries: int, num_refs: int, device: torch.device
) -> tuple[Tensor, ...]:
    if len(indices_tuple) not in (3, 4):
        raise ValueError(
            f"indices_tuple must have 3 tensors (anchors, positives, negatives) or 4 (anchors, positives, anchors, "
            f"negatives), got {len(indices_tuple)}"
        )
    indices = tuple(index.to(device) for index in lmu.convert_to_pairs(indices_tuple, None))
    for (anchor, other), name in ((indices[:2], "positive"), (indices[2:], "negative")):
        if anchor.shape != other.shape or anchor.ndim != 1:
            raise ValueError(
                f"indices_tuple needs 1-D anchors and {name}s of one length, got shapes {tuple(anchor.shape)} and "
                f"{tuple(other.shape)}"
            )
        for index, size, what in ((anchor, num_queries, "anchor"), (other, num_refs, name)):
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise ValueError(
                    f"indices_tuple has {what} indices from {int(index.min())} to {int(index.max())}, outside the "
                    f"{size} embeddings they point into"
                )
    return indices


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_embeddings(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a floating-point tensor of shape (batch, dim), got {got}")


def _check_labels(name: str, labels: Tensor | None, size: int) -> None:
    if labels is None:
        return
    is_tensor = isinstance(labels, Tensor)
    if not is_tensor or labels.is_floating_point() or labels.is_complex() or labels.shape != (size,):
        got = f"{labels.dtype} of shape {tuple(labels.shape)}" if is_tensor else type(labels).__name__
        raise ValueError(f"{name} must be an integer tensor of shape ({size},), one for each embedding, got {got}")
