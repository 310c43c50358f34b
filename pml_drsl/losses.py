"""DRSL as a loss function of pytorch-metric-learning."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from torch import Tensor

from pml_drsl import functional
from pml_drsl.checks import InputError, check_arguments, is_real, is_whole
from pml_drsl.distances import COSINE, angular_dissimilarity, check_distance, distance_matrix, has_angles, prepare
from pml_drsl.machine import full_precision
from pml_drsl.pairs import IndicesTuple, Pairs, pairs_from_indices, pairs_from_labels
from pml_drsl.reducers import PerQueryReducer, check_reducer

CHUNK_ELEMENTS = 2**24  # Distances of a chunk of queries, where `query_chunk_size` does not say: 64 MiB of float32.
# Errors of each (query, positive) pair, shape (E,), by name: "retrieval" (what is trained), "sort" if there is a sort,
# and with statistics "smoothed", the retrieval error itself, without a graph.
Errors = dict[str, Tensor]
Compute = Callable[[Tensor, Tensor, Pairs], Errors]


class DRSLoss(BaseMetricLossFunction):
    """The Differentiable Retrieval-Sort Loss (Xu et al., "Rank-in-Rank Loss for Person Re-identification",
    ACM TOMM 2022): ranks every positive of a query ahead of every negative by distance, then sorts the positives
    among themselves by angle. ``pml_drsl.functional`` has the equations.

    Example::

        loss_fn = DRSLoss()
        embeddings, labels = torch.randn(32, 128, requires_grad=True), torch.arange(32) // 4
        loss_fn(embeddings, labels).backward()

    A query without a positive or without a negative has no term. The sub-losses, for a ``MultipleReducers``, are
    ``"retrieval_loss"`` and ``"sort_loss"`` (``sort_weight`` included), with one error per (query, positive) pair.

    With ``collect_stats=True`` these attributes describe the last batch: ``retrieval_error``, the smoothed
    retrieval error in [0, 1], also where a bound is trained (at margin 0 one minus the smoothed mean average
    precision); ``sort_error``, unweighted, or 0 without a sort; and ``num_queries``, the number of queries with a term.
    The errors are tensors on the device, without a graph, and the number 0 where no query has a term.

    Args:
        temperature: softness of the ranks, > 0, in units of the distance, which by default is minus the cosine, from -1
            to 1.
        sort_weight: weight of the sort error, >= 0. At 0 the loss ranks by distance alone.
        margin: distance by which negatives must follow positives; any finite number.
        bound_power: the power p, in (0, 1], of the bound of the smoothed retrieval error, a softplus of its log odds,
            ``log(1 + odds**p) / p``; None trains the error itself, which is the definition. The bound has a gradient
            where the error has none left: where a positive is far behind its negatives. A smaller power still moves
            pairs whose order is right.
        query_chunk_size: queries whose distances are computed at once; bounds memory, changes no value. Several chunks
            are computed again in the backward pass, one by one, so that no distances are kept. None chooses a size so
            that one chunk of distances takes 64 MiB, and keeps the distances of all chunks, which is faster. The
            ``collect_stats`` of a distance is of the last chunk.
        fused: the fast path, differentiable once; double backward, ``torch.func.grad`` (torch 2.7 or later) and a
            learnable temperature or margin (a tensor) need False.
        **kwargs: arguments of ``BaseMetricLossFunction``: ``distance`` (default: ``CosineSimilarity()``; refused are
            ``BatchedDistance``, and ``p`` or ``power`` below 1, whose gradient is infinite at a distance of 0),
            ``reducer`` (default: ``PerQueryReducer``), ``embedding_regularizer``, ``embedding_reg_weight``,
            ``collect_stats``.

    Raises:
        InputError: a ``ValueError``, for an unknown argument or a hyper-parameter out of range, also if it was assigned
            later, and when called, for tensors of wrong shape or type.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.05,
        sort_weight: float = 1.0,
        margin: float | Tensor = 0.0,
        bound_power: float | None = 0.1,
        query_chunk_size: int | None = None,
        fused: bool = True,
        **kwargs: Any,
    ) -> None:
        check_arguments(type(self), kwargs)
        super().__init__(**kwargs)
        self.temperature, self.sort_weight, self.margin = temperature, sort_weight, margin
        self.bound_power, self.query_chunk_size, self.fused = bound_power, query_chunk_size, fused
        self._check_settings()
        # Where several processes share the queries of a batch, this says how (`DistributedLossWrapper` sets it).
        self.shared: Callable[[Compute, Tensor, Tensor, Pairs], Errors] | None = None
        settings = ["temperature", "sort_weight", "margin", *([] if bound_power is None else ["bound_power"])]
        self.add_to_recordable_attributes(list_of_names=settings, is_stat=False)
        # The same names from the start: PML's record keeper fails where one is added between two of its saves.
        stats = ["retrieval_error", "sort_error", "num_queries"]
        self.add_to_recordable_attributes(list_of_names=stats, is_stat=True)

    def _check_settings(self) -> None:
        """Refuses hyper-parameters out of range, at every call too: a schedule or an optimiser may change them."""
        check_distance(self.distance)
        temperature, sort_weight, margin = (
            value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            for value in (self.temperature, self.sort_weight, self.margin)
        )
        if not (is_real(temperature) and temperature > 0):
            raise InputError(f"temperature must be a number above 0, got {temperature!r}; try 0.05")
        if not (is_real(sort_weight) and sort_weight >= 0):
            raise InputError(f"sort_weight must be a number of at least 0, got {sort_weight!r}; 0 turns sorting off")
        if not is_real(margin):
            raise InputError(f"margin must be a finite number, got {margin!r}; 0 asks for the right order and no more")
        power, size = self.bound_power, self.query_chunk_size
        if power is not None and not (is_real(power) and 0 < power <= 1):
            raise InputError(f"bound_power must be None, or a number above 0 and at most 1, got {power!r}")
        if size is not None and not (is_whole(size) and size > 0):
            raise InputError(f"query_chunk_size must be None or an integer above 0, got {size!r}")
        if not isinstance(self.fused, bool):
            raise InputError(f"fused must be True or False, got {self.fused!r}")
        if self.fused and torch._C._are_functorch_transforms_active():
            raise InputError("torch.func needs fused=False: give DRSLoss(fused=False)")
        for name in ("temperature", "margin"):
            if self.fused and getattr(getattr(self, name), "requires_grad", False):
                raise InputError(f"a learnable {name} needs fused=False")

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
        """The loss of a batch, a scalar. It is computed in float32 or float64, without autocast or TensorFloat-32.

        Args:
            embeddings, labels: shapes (batch, dim) and (batch,), integer labels, or None with an ``indices_tuple``.
            indices_tuple: pairs or triplets of a miner, which are then the positives and negatives.
            ref_emb, ref_labels: the candidates, shapes (references, dim) and (references,). Without ``ref_emb``, or if
                it is the same object as ``embeddings``, a query is never compared with itself. PML compares the label
                objects instead. An InputError refuses ``ref_labels`` without ``ref_emb``.
        """
        self._check_settings()
        check_batch("embeddings", embeddings, "labels", labels)
        if ref_emb is None and ref_labels is not None:
            raise InputError("ref_labels without ref_emb: give the references, or leave both out")
        if ref_emb is not None:
            check_batch("ref_emb", ref_emb, "ref_labels", ref_labels, embeddings.shape[1])
        if indices_tuple is None:
            if labels is None or (ref_emb is not None and ref_labels is None):
                raise InputError("labels (and ref_labels with ref_emb) are required where no indices_tuple is given")
            others = ref_labels if ref_emb is embeddings and ref_labels is not labels else None
            if others is not None and not torch.equal(labels, others.to(labels)):
                why = "ref_emb is the object embeddings, and ref_labels differ from labels"
                raise InputError(f"{why}; give ref_emb a copy")
        # At temperature 0.01 a half-precision similarity has no usable ranks.
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        dtype = dtype if ref_emb is None else torch.promote_types(dtype, ref_emb.dtype)
        x = embeddings.to(dtype)
        if ref_emb is not None:
            ref_emb = x if ref_emb is embeddings else ref_emb.to(dtype)
        if labels is not None:
            labels = labels.long()  # A ClassWeightedReducer takes them as indices, and torch takes uint8 for a mask.
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
        compute = self.compute_errors if self.shared is None else functools.partial(self.shared, self.compute_errors)
        errors = compute(embeddings, ref_emb, pairs)
        if self.collect_stats:
            # Of each pair in the mean over queries of the mean over their positives.
            weight = 1 / (pairs.counts[pairs.query] * pairs.num_queries).to(embeddings.dtype)
            self.retrieval_error = torch.dot(errors["smoothed"], weight)
            self.num_queries = pairs.num_queries
            if "sort" in errors:
                self.sort_error = torch.dot(errors["sort"].detach(), weight)
        of_pairs = {"indices": (pairs.query, pairs.positive), "reduction_type": "pos_pair", "divisor": len(pairs.query)}
        sort_weight = _scalar(self.sort_weight)
        return {
            "retrieval_loss": {"losses": errors["retrieval"], **of_pairs},
            "sort_loss": {"losses": sort_weight * errors["sort"], **of_pairs} if "sort" in errors else self.zero_loss(),
        }

    def compute_errors(self, embeddings: Tensor, ref_emb: Tensor, pairs: Pairs) -> Errors:
        """The errors of the pairs of ``embeddings`` (the queries) and ``ref_emb``, a chunk of queries at a time."""
        # The settings of this call. They may have changed when a backward pass computes a chunk again.
        distance, fused, has_sort, stats = self.distance, self.fused, bool(self.sort_weight), self.collect_stats
        power = None if self.bound_power is None else float(self.bound_power)
        settings: tuple[Any, Any] = _scalar(self.temperature), _scalar(self.margin)

        def prepared(distance: BaseDistance) -> tuple[Tensor, Tensor]:
            x = prepare(distance, embeddings, fused)
            return x, x if ref_emb is embeddings else prepare(distance, ref_emb, fused)

        # The references are arguments, so that a chunk is not computed again from a memory that has changed meanwhile.
        def of_chunk(x: Tensor, unit: Tensor, pairs: Pairs, ref: Tensor, unit_ref: Tensor) -> Errors:
            distances = distance_matrix(distance, x, None if ref is x else ref, fused)
            angle = functools.partial(angular_dissimilarity, distance, unit, unit_ref, pairs, fused)
            options: Any = {"bound_power": power, "dissimilarity": angle if has_sort else None, "use_fused": fused}
            retrieval, sort = functional.errors(distances, pairs, *settings, **options)
            errors = {"retrieval": retrieval} if sort is None else {"retrieval": retrieval, "sort": sort}
            if stats:
                smoothed = retrieval
                if power is not None:
                    smoothed, _ = functional.errors(distances.detach(), pairs, *settings, use_fused=fused)
                errors["smoothed"] = smoothed.detach()
            return errors

        x, ref = prepared(distance)
        unit, unit_ref = prepared(COSINE) if has_sort and not has_angles(distance) else (x, ref)
        size = int(self.query_chunk_size or max(1, CHUNK_ELEMENTS // max(1, len(ref))))
        if size >= len(x):
            return of_chunk(x, unit, pairs, ref, unit_ref)
        compute = functional.recomputed(of_chunk) if self.query_chunk_size else of_chunk
        parts = zip(x.split(size), unit.split(size), pairs.split(size), strict=True)
        chunks = [compute(y, u, part, ref, unit_ref) for y, u, part in parts if part.num_queries > 0]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    def _sub_loss_names(self) -> list[str]:
        return ["retrieval_loss", "sort_loss"]

    def extra_repr(self) -> str:
        names = ("temperature", "sort_weight", "margin", "bound_power")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _scalar(value: Any) -> Tensor | float:
    return value.reshape(()) if isinstance(value, Tensor) else float(value)


def check_batch(
    name: str, x: Tensor, name_of_labels: str, labels: Tensor | None, dim: int | None = None, of: str = "embeddings"
) -> None:
    """Refuses what is not a floating-point tensor of shape (N, ``dim``) with None or integer labels of shape (N,)."""
    if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
        raise InputError(f"{name} must be a floating-point tensor of shape (batch, dim), got {kind_of(x)}")
    if dim is not None and x.shape[1] != dim:
        raise InputError(f"{name} has {x.shape[1]} dimensions and {of} {dim}; give both the same number")
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    if labels is not None and not (whole and labels.shape == x.shape[:1]):
        wanted = f"an integer tensor of shape ({len(x)},), one for each embedding"
        raise InputError(f"{name_of_labels} must be {wanted}, got {kind_of(labels)}")


def kind_of(x: object) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
