"""The distance matrix of a batch, in full precision, and the angles of pairs that it gives for free.

A Euclidean distance comes from a matrix product, as in PML. In float32, rounding decides the distances and gradients of
near-duplicates, such as positives at a distance of 1e-4: the cosine and float64 do not have this error."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning import distances as pml
from pytorch_metric_learning.distances import BaseDistance, LpDistance
from torch import Tensor

from pml_drsl.checks import InputError
from pml_drsl.fused import check_once
from pml_drsl.machine import full_precision
from pml_drsl.pairs import Pairs

# Below this norm torch.nn.functional.normalize divides by a constant: such a vector has no direction.
SMALLEST_NORM = 1e-12
COSINE = pml.CosineSimilarity()


def prepare(distance: BaseDistance, x: Tensor, fused: bool = True) -> Tensor:
    """Embeddings ``x``, shape (N, dim), float32 or float64, as ``distance_matrix`` takes them.

    If the distance normalises its embeddings, a vector without direction becomes 0 and gets no gradient. The others get
    a norm of 1 here, once for all chunks of queries, if the distance is computed here. Any other distance normalises
    them itself, and keeps a copy of the references for each chunk."""
    if not distance.normalize_embeddings:
        return x
    here = _is_computed_here(distance)
    if here and fused:
        return _Normalized.apply(x)  # type: ignore[no-any-return]
    # Normalising a zero vector multiplies its gradient by 1e12, which half precision cannot hold.
    # A norm that is NaN is not below the smallest: the loss of a diverged network is NaN too.
    x = torch.where(torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True) <= SMALLEST_NORM, 0, x)
    return distance.normalize(x) if here else x


def distance_matrix(distance: BaseDistance, x: Tensor, ref: Tensor | None = None, fused: bool = True) -> Tensor:
    """The distances of ``x`` and ``ref``, shape (N, M), smaller is nearer: a similarity has its sign changed.

    Args:
        distance: a distance of pytorch-metric-learning that returns a matrix.
        x: embeddings of the queries, shape (N, dim), from ``prepare``.
        ref: embeddings of the candidates, shape (M, dim), from ``prepare``; None for the queries themselves.
        fused: give Euclidean distances and inner products a gradient in full precision, which can be differentiated
            once, and takes one matrix product less if a batch is compared with itself. All else is plain autograd,
            whose backward pass follows the user's settings.

    Raises:
        InputError: for infinite or NaN values of a distance that is neither Euclidean nor an inner product.
    """
    euclidean, power = isinstance(distance, LpDistance), distance.power
    with full_precision(x.device.type):
        if not _is_computed_here(distance):
            mat: Tensor = distance(x, ref)
            if not is_known(distance) and not bool(torch.isfinite(mat.detach()).all()):
                given = f"distance {type(distance).__name__} gave infinite or NaN values"
                why = "SNRDistance does so for an embedding whose values are all equal"
                raise InputError(f"{given}; {why}; give another distance or embeddings")
            return -mat if distance.is_inverted else mat
        if fused:
            mat = _Distances.apply(x, ref, euclidean)
        else:
            refs = x if ref is None else ref
            mat = _plain_euclidean(x, refs) if euclidean else -(x @ refs.T)
        if power == 1:
            return mat
        return mat.pow(power) if euclidean else -(-mat).pow(power)


def has_angles(distance: BaseDistance) -> bool:
    """Whether the angle of a pair comes from its distance. From the distance of a long and a short vector, rounding has
    taken their angle."""
    highest = 2 if isinstance(distance, LpDistance) else 1
    return _is_computed_here(distance) and distance.normalize_embeddings and distance.power <= highest


def angular_dissimilarity(
    distance: BaseDistance, unit: Tensor, unit_ref: Tensor, pairs: Pairs, fused: bool, of_pairs: Tensor
) -> Tensor:
    """The angular dissimilarity ``u = (1 - cos) / 2`` of pairs, shape (E,), in [0, 1].

    Where ``has_angles`` it comes from ``of_pairs``, the distance of each pair from ``distance_matrix``. ``unit`` and
    ``unit_ref``, which are one tensor if the batch is compared with itself, are embeddings of norm 1, or 0 for those
    without direction. These count as orthogonal to all others (u = 1/2) and get no gradient."""
    query, candidate = pairs.query, pairs.positive
    if not has_angles(distance):
        cosines = distance_matrix(COSINE, unit, None if unit_ref is unit else unit_ref, fused)
        return 0.5 + 0.5 * cosines[query, candidate]
    if not isinstance(distance, LpDistance):
        return 0.5 + 0.5 * of_pairs
    defined = unit.detach().any(1)
    ref_defined = defined if unit_ref is unit else unit_ref.detach().any(1)
    # Of unit vectors: |x - y|^2 = 2 - 2 cos = 4 u.
    return torch.where(defined[query] & ref_defined[candidate], 0.25 * of_pairs ** (2 / distance.power), 0.5)


def check_distance(distance: object) -> None:
    """Refuses a distance that DRSL cannot rank by, with an ``InputError`` that says why."""
    if isinstance(distance, pml.BatchedDistance):
        why = "distance must return the matrix of distances, and BatchedDistance returns none"
        raise InputError(f"{why}; give the distance inside it, {distance.distance!r}, and query_chunk_size")
    if not isinstance(distance, BaseDistance):
        wanted = "a distance of pytorch_metric_learning.distances, such as LpDistance()"
        raise InputError(f"distance must be {wanted}, got {distance!r}")
    power = distance.power
    if distance.is_inverted and not (power >= 1 and power == int(power)):
        raise InputError(f"distance has power={power}, and that power of a negative similarity is not a number; give 1")
    if power < 1 or (isinstance(distance, LpDistance) and distance.p < 1):
        why = "below 1 the gradient at a distance or difference of 0 is infinite"
        raise InputError(f"distance has p={distance.p} and power={power}; {why}; give 1 or more")


def is_known(distance: BaseDistance) -> bool:
    """Whether a distance is the Euclidean distance or an inner product."""
    return type(distance) in (LpDistance, pml.CosineSimilarity, pml.DotProductSimilarity) and distance.p == 2


def _is_computed_here(distance: BaseDistance) -> bool:
    """Whether the distance's own ``forward`` need not be called: it may be a user's, or record statistics."""
    return is_known(distance) and not distance.collect_stats


def _plain_euclidean(x: Tensor, ref: Tensor) -> Tensor:
    """``torch.cdist(x, ref)`` that can be differentiated any number of times. Distances of 0 are constants."""
    squared = x.square().sum(1, keepdim=True) + ref.square().sum(1) - 2 * (x @ ref.T)
    zero = squared <= 0  # not where it is NaN
    return torch.where(zero, 0, torch.where(zero, 1, squared).sqrt())


class _Normalized(torch.autograd.Function):
    """Vectors of norm 1, or 0 without gradient if without direction, in a third of the passes of autograd's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        norm.masked_fill_(norm <= SMALLEST_NORM, torch.inf)
        y: Tensor = x / norm
        ctx.save_for_backward(y, norm)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        check_once()
        y, norm = ctx.saved_tensors  # (grad - y (y . grad)) / norm
        with full_precision(grad.device.type):
            along = torch.linalg.vecdot(y, grad)[:, None]
        return torch.addcmul(grad, y, along, value=-1).div_(norm)


class _Distances(torch.autograd.Function):
    """``torch.cdist(x, ref)`` if ``euclidean``, else ``-x @ ref.T``; to be called in full precision.

    With w the gradient of the matrix, divided by Euclidean distances (0 at distance 0), the gradient in x_i is the sum
    over j of ``w_ij (x_i - ref_j)`` for Euclidean distances, and of ``-w_ij ref_j`` for inner products. If a batch is
    compared with itself, w is ``w + w.T``, which takes one matrix product less."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ref: Tensor | None, euclidean: bool) -> Tensor:
        refs = x if ref is None else ref
        d = torch.cdist(x, refs) if euclidean else _minus_product(x, refs.T)
        ctx.save_for_backward(x, ref, d if euclidean else None)
        return d

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        check_once()
        x, ref, d = ctx.saved_tensors
        w = grad if d is None else (grad / d).masked_fill_(d == 0, 0)

        def gradient(w: Tensor, x: Tensor, ref: Tensor) -> Tensor:
            return _minus_product(w, ref, None if d is None else x * w.sum(1, keepdim=True))

        with full_precision(x.device.type):
            if ref is None:
                # A copy of the transposed matrix goes by blocks. ``w + w.T`` takes five times as long on a CPU.
                w, ref = w.T.clone(memory_format=torch.contiguous_format).add_(w), x
            needs_x, needs_ref, _ = ctx.needs_input_grad
            return gradient(w, x, ref) if needs_x else None, gradient(w.T, ref, x) if needs_ref else None, None


def _minus_product(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """``c - a @ b``, or ``-a @ b``. The product takes the sign as its factor, without a pass over the result."""
    return torch.addmm(a.new_zeros(()) if c is None else c, a, b, beta=c is not None, alpha=-1)
