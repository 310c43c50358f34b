"""DRSL as a loss function of pytorch-metric-learning."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.distances import (
    BaseDistance,
    BatchedDistance,
    CosineSimilarity,
    DotProductSimilarity,
    LpDistance,
)
from pytorch_metric_learning.losses import BaseMetricLossFunction
from torch import Tensor
from torch.nn import functional as F

from pml_drsl import functional
from pml_drsl.checks import InputError, is_real
from pml_drsl.distances import EuclideanDistance
from pml_drsl.pairs import IndicesTuple, Pairs, pairs_from_indices, pairs_from_labels
from pml_drsl.reducers import PerQueryReducer, check_reducer

# Distances of one chunk of queries, in elements, where `query_chunk_size` does not say: 64 MiB of float32.
CHUNK_ELEMENTS = 2**24

# Below this norm torch.nn.functional.normalize divides by a constant: the vector has no direction.
SMALLEST_NORM = 1e-12


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
            None chooses it so that one chunk of distances takes 64 MiB, or as much as the references.
        bound: train an upper bound of the retrieval error, which has a gradient where the error itself has none left:
            where a positive is far behind its negatives, as it is at the beginning, or where negatives are very many.
            It is ``log(1 + false_pos(i) / rank_pos(i))``, minus the log of the precision at i, with
            ``log2(1 + exp(x / temperature))`` in place of G in ``false_pos`` (the bound of Burges et al., ICML 2005).
        **kwargs: of ``BaseMetricLossFunction``: ``distance`` (default: ``EuclideanDistance``, between normalised
            embeddings; a similarity enters with its sign changed; refused are ``BatchedDistance``, and ``p`` or
            ``power`` below 1, whose gradient is infinite at a distance of 0), ``reducer`` (default:
            ``PerQueryReducer``), ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``.

    Raises:
        InputError: for a hyper-parameter out of range, at construction; for tensors of wrong shape or type, when
            called.
    """

    def __init__(
        self,
        temperature: float = 0.01,
        sort_weight: float = 0.3,
        margin: float = 0.0,
        query_chunk_size: int | None = None,
        bound: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not (is_real(temperature) and temperature > 0):
            raise InputError(f"temperature must be a number above 0, got {temperature!r}; try 0.01")
        if not (is_real(sort_weight) and sort_weight >= 0):
            raise InputError(f"sort_weight must be a number of at least 0, got {sort_weight!r}; 0 turns sorting off")
        if not is_real(margin):
            raise InputError(f"margin must be a finite number, got {margin!r}; 0 asks for order alone")
        if query_chunk_size is not None and not (isinstance(query_chunk_size, int) and query_chunk_size > 0):
            raise InputError(f"query_chunk_size must be None or an integer above 0, got {query_chunk_size!r}")
        _check_distance(self.distance)
        self.temperature = temperature
        self.sort_weight = sort_weight
        self.margin = margin
        self.query_chunk_size = query_chunk_size
        self.bound = bool(bound)
        self.add_to_recordable_attributes(list_of_names=["temperature", "sort_weight", "margin"], is_stat=False)
        self.add_to_recordable_attributes(list_of_names=["retrieval_error", "sort_error", "num_queries"], is_stat=True)

    # The number of pairs depends on the labels, so a compiler would start anew at almost every batch.
    @torch.compiler.disable
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
                raise InputError(
                    f"ref_emb has {ref_emb.shape[1]} dimensions and embeddings {embeddings.shape[1]}; give both alike"
                )
            _check_labels("ref_labels", ref_labels, len(ref_emb))
            dtype = torch.promote_types(dtype, ref_emb.dtype)
            ref_emb = self._with_direction(ref_emb.to(dtype))
        if indices_tuple is None and (labels is None or (ref_emb is not None and ref_labels is None)):
            raise InputError("labels (and ref_labels with ref_emb) are required where no indices_tuple is given")
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
        check_reducer(self.reducer, labels, len(embeddings), len(ref_emb))
        if indices_tuple is not None:
            pairs = pairs_from_indices(indices_tuple, len(embeddings), len(ref_emb), embeddings.device)
        else:
            assert labels is not None and ref_labels is not None
            pairs = pairs_from_labels(labels, ref_labels)
        if len(pairs.query) == 0:
            return self.zero_losses()  # type: ignore[no-any-return]
        retrieval, sort = self.compute_errors(embeddings, ref_emb, pairs)
        self._collect_stats(pairs.query, retrieval, sort)
        of_pairs = {
            "indices": (pairs.query, pairs.positive),
            "reduction_type": "pos_pair",
            "divisor": len(torch.unique_consecutive(pairs.query)),  # for a DivisorReducer
        }
        return {
            "retrieval_loss": {"losses": retrieval, **of_pairs},
            "sort_loss": {"losses": self.sort_weight * sort, **of_pairs},
        }

    def compute_errors(self, embeddings: Tensor, ref_emb: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Retrieval and sort errors of the pairs, both of shape (E,), a chunk of queries at a time."""
        norms = self._norms(embeddings)
        ref_norms = norms if ref_emb is embeddings else self._norms(ref_emb)
        # Every chunk keeps a copy of the references for the backward pass: it is worth their size.
        size = self.query_chunk_size or max(1, embeddings.shape[1], CHUNK_ELEMENTS // max(1, len(ref_emb)))
        if size >= len(embeddings):
            mat = self.distance(embeddings, None if ref_emb is embeddings else ref_emb)
            return self._errors_of_chunk(mat, embeddings, ref_emb, norms, ref_norms, pairs)
        chunks = []
        starts = range(0, len(embeddings), size)
        for start, x in zip(starts, torch.split(embeddings, size), strict=True):
            rows = slice(start, start + len(x))
            of_rows = pairs.rows(rows)
            if len(of_rows.query) > 0:
                mat = self.distance(x, ref_emb)
                chunks.append(self._errors_of_chunk(mat, x, ref_emb, norms[rows], ref_norms, of_rows))
        retrieval, sort = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return retrieval, sort

    def _errors_of_chunk(
        self, mat: Tensor, x: Tensor, y: Tensor, x_norm: Tensor, y_norm: Tensor, pairs: Pairs
    ) -> tuple[Tensor, Tensor]:
        """Both errors of the pairs, shape (E,), from what the distance says, shape (Q, M)."""
        query, positive = pairs.query, pairs.positive
        if type(self.distance) not in (EuclideanDistance, LpDistance, CosineSimilarity, DotProductSimilarity):
            _check_distances(mat, self.distance)
        if self.distance.is_inverted:
            mat = -mat
        d, false_pos, _ = functional.count_ahead(
            mat, query, positive, self.temperature, self.margin, candidates=pairs.negatives, bound=self.bound
        )
        u = None
        if self.sort_weight > 0:
            of_pairs = -d if self.distance.is_inverted else d
            u = self._dissimilarity(of_pairs, x, y, x_norm, y_norm, query, positive)
        retrieval, sort = functional.retrieval_sort_errors(d, false_pos, query, self.temperature, u, self.bound)
        return retrieval, torch.zeros_like(retrieval) if sort is None else sort

    def _dissimilarity(
        self, of_pairs: Tensor, x: Tensor, y: Tensor, x_norm: Tensor, y_norm: Tensor, query: Tensor, positive: Tensor
    ) -> Tensor:
        """Angular dissimilarity of the pairs, shape (E,), from what the distance says of them where that is enough."""
        x_norm, y_norm = x_norm[query], y_norm[positive]
        if type(self.distance) in (EuclideanDistance, LpDistance) and self.distance.p == 2 and self.distance.power <= 2:
            squared = of_pairs ** (2 / self.distance.power)
            inner_product = torch.sub((x_norm**2 + y_norm**2) / 2, squared, alpha=0.5)
        elif type(self.distance) in (CosineSimilarity, DotProductSimilarity) and self.distance.power == 1:
            inner_product = of_pairs
        else:
            inner_product = (F.normalize(x) @ F.normalize(y).T)[query, positive]
            x_norm, y_norm = ((norm.detach() > 0).to(x) for norm in (x_norm, y_norm))
        return functional.angular_dissimilarity(inner_product, x_norm, y_norm)

    def _norms(self, x: Tensor) -> Tensor:
        """Norms, shape (N,), of the embeddings as the distance compares them."""
        if self.distance.normalize_embeddings:
            return _has_direction(x).to(x)
        return torch.linalg.vector_norm(x, dim=1)  # type: ignore[no-any-return]

    def _with_direction(self, x: Tensor) -> Tensor:
        # Normalising a zero vector multiplies its gradient by 1e12, which half precision cannot hold.
        if not self.distance.normalize_embeddings:
            return x
        has_direction = _has_direction(x)
        return x if bool(has_direction.all()) else torch.where(has_direction[:, None], x, x.detach())

    def _collect_stats(self, query: Tensor, retrieval: Tensor, sort: Tensor) -> None:
        if not self.collect_stats:
            return
        mean = PerQueryReducer(collect_stats=False)
        self.retrieval_error, self.sort_error = (
            float(mean.element_reduction(errors.detach(), query, errors, None)) for errors in (retrieval, sort)
        )
        self.num_queries = len(torch.unique_consecutive(query))

    def get_default_reducer(self) -> PerQueryReducer:
        return PerQueryReducer()

    def get_default_distance(self) -> EuclideanDistance:
        return EuclideanDistance()

    def _sub_loss_names(self) -> list[str]:
        return ["retrieval_loss", "sort_loss"]

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, sort_weight={self.sort_weight}, margin={self.margin}, bound={self.bound}"
        )


def _has_direction(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x.detach(), dim=1)
    return norms > SMALLEST_NORM


def _check_distance(distance: object) -> None:
    if isinstance(distance, BatchedDistance):
        raise InputError(
            f"distance must return the matrix of distances, and BatchedDistance returns none; give the one inside, "
            f"{distance.distance!r}, and query_chunk_size to save memory"
        )
    if not isinstance(distance, BaseDistance):
        raise InputError(
            f"distance must be a distance of pytorch_metric_learning.distances, such as LpDistance() or "
            f"CosineSimilarity(), got {distance!r}"
        )
    if distance.is_inverted and not (distance.power >= 1 and distance.power == int(distance.power)):
        raise InputError(
            f"distance has power={distance.power}, and that of a negative similarity is not a number; give power=1"
        )
    if distance.power < 1 or (isinstance(distance, LpDistance) and distance.p < 1):
        raise InputError(
            f"distance has p={distance.p} and power={distance.power}; below 1 the gradient of a distance of 0, or of "
            f"one difference of 0, is infinite; give 1 or more"
        )


def _check_distances(mat: Tensor, distance: BaseDistance) -> None:
    if not bool(torch.isfinite(mat).all()):
        raise InputError(
            f"distance {type(distance).__name__} gave infinite or NaN values; SNRDistance does so for an embedding "
            f"whose values are all alike"
        )


def _check_embeddings(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name} must be a floating-point tensor of shape (batch, dim), got {got}")


def _check_labels(name: str, labels: Tensor | None, size: int) -> None:
    if labels is None:
        return
    is_tensor = isinstance(labels, Tensor)
    if not is_tensor or labels.is_floating_point() or labels.is_complex() or labels.shape != (size,):
        got = f"{labels.dtype} of shape {tuple(labels.shape)}" if is_tensor else type(labels).__name__
        raise InputError(f"{name} must be an integer tensor of shape ({size},), one for each embedding, got {got}")
