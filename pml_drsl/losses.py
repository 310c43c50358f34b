"""DRSL as a loss function of pytorch-metric-learning."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from torch import Tensor

from pml_drsl import checks
from pml_drsl.checks import InputError
from pml_drsl.distances import angular_dissimilarity, distance_matrix, is_known
from pml_drsl.fused import count_ahead, retrieval_and_sort_errors
from pml_drsl.pairs import IndicesTuple, Pairs, pairs_from_indices, pairs_from_labels
from pml_drsl.precision import full_precision
from pml_drsl.reducers import PerQueryReducer, check_reducer

# Distances of one chunk of queries, in elements, where `query_chunk_size` does not say: 64 MiB of float32.
CHUNK_ELEMENTS = 2**24


class _Statistic:
    """A statistic that stays on the device until it is read, as a float. Only reading it waits for the device."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __set__(self, instance: Any, value: Tensor | float) -> None:
        vars(instance)[self.name] = value

    def __get__(self, instance: Any, owner: type) -> float:
        if self.name not in vars(instance):
            raise AttributeError(
                f"{owner.__name__} has no {self.name}; it needs collect_stats=True (sort_error: and sort_weight > 0)"
            )
        return float(vars(instance)[self.name])


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
    Queries without a positive or without a negative have no term. Half-precision embeddings are computed in float32,
    and autocast and TensorFloat-32 are switched off inside the loss. ``pml_drsl.functional.drsl`` is the same
    definition as one readable function.

    Example::

        loss_fn = DRSLoss()
        embeddings, labels = torch.randn(32, 128, requires_grad=True), torch.arange(32) // 4
        loss_fn(embeddings, labels).backward()

    It is called as every PML loss: ``loss(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None)``,
    with embeddings of shape (batch, dim), integer labels of shape (batch,), and the pairs or triplets of a miner.
    Positives and negatives are then exactly the pairs of the miner, and ``labels`` may be left out. Without
    ``ref_emb``, or if ``ref_emb`` is the same object as ``embeddings``, a query is no candidate of its own. Otherwise
    every reference is a candidate, even if ``ref_labels`` is the same object as ``labels``, as for two views of a
    batch. (The losses of PML decide by the object of the labels: give them a copy of the labels for the second view.)

    The sub-losses, for a ``MultipleReducers``, are ``"retrieval_loss"`` and ``"sort_loss"`` (``sort_weight``
    included), with one error per (query, positive) pair. With ``collect_stats=True`` the attributes
    ``retrieval_error`` and ``sort_error`` give the mean over the queries of the batch of each error, unweighted, and
    ``num_queries`` gives the number of queries with a term. With a ``sort_weight`` of 0 there is no ``sort_error``.
    The errors stay on the device until they are read.

    Args:
        temperature: softness of the ranks, > 0, in units of distance. (By default the distance is the cosine similarity
            with its sign changed, in [-1, 1].)
        sort_weight: weight of the sort error, >= 0. The default is 0, which ranks by distance alone: docs/benchmark.md
            has the measurements behind it. Give 0.3, say, to sort by angle too.
        margin: distance by which negatives must follow positives; any finite number.
        query_chunk_size: queries whose distances are computed at once; bounds memory, changes no value.
            None chooses it so that one chunk of distances takes 64 MiB, or as much as the references.
        bound: train an upper bound of the retrieval error (True, the default), or the error itself (False). The bound
            has a gradient where the error itself has none left: where a positive is far behind its negatives, as at
            the beginning of training, or where negatives are very many. It is ``log(1 + false_pos(i) / rank_pos(i))``,
            minus the log of the precision at i, with ``log2(1 + exp(x / temperature))`` in place of G in ``false_pos``
            (the bound of Burges et al., ICML 2005).
        bound_power: power p of the odds of the error in the bound, in (0, 1]. The bound is ``log(1 + odds ** p) / p``
            with ``odds = false_pos(i) / rank_pos(i)``. At 1, the default, it is the bound above. A smaller power gives
            a larger bound, which still moves pairs whose order is right.
        **kwargs: arguments of ``BaseMetricLossFunction``: ``distance`` (default: ``CosineSimilarity()``; a
            similarity enters with its sign changed; ``BatchedDistance`` and ``p`` or ``power`` below 1, whose gradient
            is infinite at a distance of 0, are refused), ``reducer``
            (default: ``PerQueryReducer``), ``embedding_regularizer``, ``embedding_reg_weight``, ``collect_stats``.

    Raises:
        InputError: a ``ValueError``; for a hyper-parameter out of range, at construction; for tensors of wrong shape or
            type, when called.
    """

    retrieval_error = _Statistic()
    sort_error = _Statistic()

    def __init__(
        self,
        temperature: float = 0.1,
        sort_weight: float = 0.0,
        margin: float = 0.0,
        query_chunk_size: int | None = None,
        bound: bool = True,
        bound_power: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not (checks.is_real(temperature) and temperature > 0):
            raise InputError(f"temperature must be a number above 0, got {temperature!r}; try 0.05")
        if not (checks.is_real(sort_weight) and sort_weight >= 0):
            raise InputError(f"sort_weight must be a number of at least 0, got {sort_weight!r}; 0 turns sorting off")
        if not checks.is_real(margin):
            raise InputError(f"margin must be a finite number, got {margin!r}; 0 asks for the right order and no more")
        if query_chunk_size is not None and not (isinstance(query_chunk_size, int) and query_chunk_size > 0):
            raise InputError(f"query_chunk_size must be None or an integer above 0, got {query_chunk_size!r}")
        if not (checks.is_real(bound_power) and 0 < bound_power <= 1):
            raise InputError(f"bound_power must be a number above 0 and at most 1, got {bound_power!r}; try 0.1")
        if bound_power != 1 and not bound:
            raise InputError(f"bound_power {bound_power!r} needs bound=True: without a bound there is no power")
        checks.check_distance(self.distance)
        self.temperature = temperature
        self.sort_weight = sort_weight
        self.margin = margin
        self.query_chunk_size = query_chunk_size
        self.bound = bool(bound)
        self.bound_power = bound_power
        self.add_to_recordable_attributes(list_of_names=["temperature", "sort_weight", "margin"], is_stat=False)
        stats = ["retrieval_error", *(["sort_error"] if sort_weight > 0 else []), "num_queries"]
        self.add_to_recordable_attributes(list_of_names=stats, is_stat=True)

    def get_default_distance(self) -> BaseDistance:
        return CosineSimilarity()

    def get_default_reducer(self) -> PerQueryReducer:
        return PerQueryReducer()

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
        checks.check_embeddings("embeddings", embeddings)
        checks.check_labels("labels", labels, len(embeddings))
        if ref_emb is not None:
            checks.check_embeddings("ref_emb", ref_emb, embeddings.shape[1])
            checks.check_labels("ref_labels", ref_labels, len(ref_emb))
        if indices_tuple is None and (labels is None or (ref_emb is not None and ref_labels is None)):
            raise InputError("labels (and ref_labels with ref_emb) are required where no indices_tuple is given")
        # At temperature 0.01 a half-precision similarity has no usable ranks.
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        dtype = dtype if ref_emb is None else torch.promote_types(dtype, ref_emb.dtype)
        x = embeddings.to(dtype)
        if ref_emb is not None:
            ref_emb = x if ref_emb is embeddings else ref_emb.to(dtype)
        with full_precision(x.device.type):
            return super().forward(x, labels, indices_tuple, ref_emb, ref_labels)  # type: ignore[no-any-return]

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
            pairs = pairs_from_labels(labels, ref_labels, same=ref_emb is embeddings)
        if pairs.num_queries == 0:
            return self.zero_losses()  # type: ignore[no-any-return]
        retrieval, *sort = self.compute_errors(embeddings, ref_emb, pairs)
        if self.collect_stats:
            self._collect_stats(pairs, retrieval, *sort)
        of_pairs = {
            "indices": (pairs.query, pairs.positive),
            "reduction_type": "pos_pair",
            "divisor": pairs.num_queries,  # for a DivisorReducer
        }
        # Unlike PML's zero_loss, this needs no pass over the embeddings.
        no_loss = {"losses": retrieval.new_zeros(()), "indices": None, "reduction_type": "already_reduced"}
        return {
            "retrieval_loss": {"losses": retrieval, **of_pairs},
            "sort_loss": {"losses": self.sort_weight * sort[0], **of_pairs} if sort else no_loss,
        }

    def compute_errors(self, embeddings: Tensor, ref_emb: Tensor, pairs: Pairs) -> tuple[Tensor, ...]:
        """Retrieval errors of the pairs, and their sort errors if ``sort_weight`` is above 0, both of shape (E,).

        They are computed a chunk of queries at a time.
        """
        # Every chunk keeps a copy of the references for the backward pass: a chunk should not be smaller than they are.
        size = self.query_chunk_size or max(1, embeddings.shape[1], CHUNK_ELEMENTS // max(1, len(ref_emb)))
        if size >= len(embeddings):
            return self._errors_of_chunk(embeddings, ref_emb, pairs)
        chunks = []
        for start, x in zip(range(0, len(embeddings), size), torch.split(embeddings, size), strict=True):
            of_rows = pairs.rows(slice(start, start + len(x)))
            if len(of_rows.query) > 0:
                chunks.append(self._errors_of_chunk(x, ref_emb, of_rows))
        return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))

    def _errors_of_chunk(self, x: Tensor, ref: Tensor, pairs: Pairs) -> tuple[Tensor, ...]:
        """The errors of queries ``x``, shape (Q, dim), and references, shape (M, dim)."""
        distance, query, positive = self.distance, pairs.query, pairs.positive
        mat = distance_matrix(distance, x, None if ref is x else ref)
        if not is_known(distance):
            checks.check_finite(mat, distance)
        sign = -1 if distance.is_inverted else 1
        temperature, margin = sign * self.temperature, sign * self.margin
        d, false_pos, _ = count_ahead(mat, query, positive, temperature, margin, pairs.negatives, bound=self.bound)
        u = None
        if self.sort_weight > 0:
            u = angular_dissimilarity(distance, d, x, ref, query, positive)
        retrieval, sort = retrieval_and_sort_errors(d, false_pos, pairs, temperature, u, self.bound, self.bound_power)
        return (retrieval,) if sort is None else (retrieval, sort)

    def _collect_stats(self, pairs: Pairs, retrieval: Tensor, sort: Tensor | None = None) -> None:
        """Keeps the mean over queries of each error, on the device."""
        weight = pairs.weights(retrieval.dtype)
        self.retrieval_error = torch.dot(retrieval.detach(), weight)
        if sort is not None:
            self.sort_error = torch.dot(sort.detach(), weight)
        self.num_queries = pairs.num_queries

    def _sub_loss_names(self) -> list[str]:
        return ["retrieval_loss", "sort_loss"]

    def extra_repr(self) -> str:
        names = ("temperature", "sort_weight", "margin", "bound", "bound_power")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
