"""The distance matrix of a batch, in full precision, and the angles of pairs that it gives for free."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, DotProductSimilarity, LpDistance
from torch import Tensor
from torch.autograd.function import once_differentiable

from pml_drsl.precision import full_precision

# Below this norm torch.nn.functional.normalize divides by a constant: such a vector has no direction.
SMALLEST_NORM = 1e-12


def distance_matrix(distance: BaseDistance, x: Tensor, ref: Tensor | None = None) -> Tensor:
    """The values of ``distance(x, ref)``, shape (N, M), differentiable (once).

    Euclidean distances and inner products have a gradient of their own. It is computed in full precision, even if
    the backward pass runs with TensorFloat-32 or under autocast. It takes one matrix product less if a batch is
    compared with itself. Another distance is called inside ``full_precision``; its backward pass follows the user's
    settings. A vector without direction gets no gradient if the distance normalises its embeddings.

    Args:
        distance: a distance of pytorch-metric-learning that returns a matrix.
        x: embeddings of the queries, shape (N, dim), float32 or float64.
        ref: embeddings of the candidates, shape (M, dim), of the type of ``x``; None for the queries themselves.
    """
    if is_known(distance) and not distance.collect_stats:
        if distance.normalize_embeddings:
            x, ref = normalize(x), None if ref is None else normalize(ref)
        matrix = _EuclideanDistances if isinstance(distance, LpDistance) else _InnerProducts
        mat: Tensor = matrix.apply(x, ref)
        power: float = distance.power
        return mat if power == 1 else mat.pow(power)
    if distance.normalize_embeddings:
        x, ref = _without_gradient_of_zeros(x), None if ref is None else _without_gradient_of_zeros(ref)
    with full_precision(x.device.type):
        return distance(x, ref)  # type: ignore[no-any-return]


def angular_dissimilarity(
    distance: BaseDistance, of_pairs: Tensor, x: Tensor, ref: Tensor, query: Tensor, candidate: Tensor
) -> Tensor:
    """The angular dissimilarity ``u = (1 - cos) / 2`` of pairs, shape (E,), in [0, 1].

    If possible it comes from the distances of the pairs. A zero vector has no angle; it counts as orthogonal to every
    other vector (u = 1/2) and gets no gradient.

    Args:
        distance: the distance that gave ``of_pairs``.
        of_pairs: the value of ``distance`` for each pair, shape (E,).
        x: embeddings of the queries, shape (N, dim).
        ref: embeddings of the candidates, shape (M, dim); ``x`` itself if the batch is compared with itself.
        query: query of each pair, shape (E,), integer.
        candidate: candidate of each pair, shape (E,), integer.
    """
    euclidean = isinstance(distance, LpDistance)
    if not is_known(distance) or distance.power > (2 if euclidean else 1):
        inner_products: Tensor = _InnerProducts.apply(normalize(x), None if ref is x else normalize(ref))
        return 0.5 - 0.5 * inner_products[query, candidate]
    if distance.normalize_embeddings and not euclidean:
        return 0.5 - 0.5 * of_pairs
    squared = of_pairs ** (2 / distance.power) if euclidean else None
    x_norm = torch.linalg.vector_norm(x, dim=1)
    ref_norm = x_norm if ref is x else torch.linalg.vector_norm(ref, dim=1)
    if squared is not None and distance.normalize_embeddings:  # of unit vectors: |x - y|^2 = 2 - 2 cos = 4 u
        defined = (x_norm > SMALLEST_NORM)[query] & (ref_norm > SMALLEST_NORM)[candidate]
        quarter: Tensor = torch.where(defined, 0.25 * squared, 0.5)
        return quarter
    x_norm, ref_norm = x_norm[query], ref_norm[candidate]
    norms = x_norm * ref_norm
    defined = norms > 0
    inner_product = of_pairs if squared is None else (x_norm**2 + ref_norm**2 - squared) / 2
    return 0.5 - torch.where(defined, inner_product * (0.5 / torch.where(defined, norms, 1)), 0)


def is_known(distance: BaseDistance) -> bool:
    """Whether a distance is the Euclidean distance or an inner product, which are computed here."""
    return type(distance) in (LpDistance, CosineSimilarity, DotProductSimilarity) and distance.p == 2


def normalize(x: Tensor) -> Tensor:
    """``x``, shape (N, dim), with vectors of norm 1. A vector without direction becomes 0 and gets no gradient."""
    normalized: Tensor = _Normalized.apply(x)
    return normalized


def _without_gradient_of_zeros(x: Tensor) -> Tensor:
    # Normalising a zero vector multiplies its gradient by 1e12, which half precision cannot hold.
    has_direction = torch.linalg.vector_norm(x.detach(), dim=1, keepdim=True) > SMALLEST_NORM
    return torch.where(has_direction, x, x.detach())


def _plus_transposed(w: Tensor) -> Tensor:
    # A copy of the transposed matrix goes by blocks. ``w + w.T`` does not, and takes five times as long on a CPU.
    return w.T.clone(memory_format=torch.contiguous_format).add_(w)


class _Normalized(torch.autograd.Function):
    """``y = x / norm``. Its gradient, ``(grad - y (y . grad)) / norm``, takes a third of the passes of autograd's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        norm = norm.masked_fill(norm <= SMALLEST_NORM, torch.inf)
        y: Tensor = x / norm
        ctx.save_for_backward(y, norm)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, norm = ctx.saved_tensors
        along = torch.linalg.vecdot(y, grad).unsqueeze(1)
        return torch.addcmul(grad, y, along, value=-1).div_(norm)


class _EuclideanDistances(torch.autograd.Function):
    """``torch.cdist(x, ref)``. The gradient in x_i is ``sum over j of w_ij (x_i - ref_j)``, w the gradient over the
    distance. Vectors at distance 0 give each other no gradient. Of a batch with itself, w is ``w + w.T``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ref: Tensor | None) -> Tensor:
        with full_precision(x.device.type):
            d = torch.cdist(x, x if ref is None else ref)
        ctx.save_for_backward(x, ref, d)
        return d

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, ref, d = ctx.saved_tensors
        w = (grad / d).masked_fill_(d == 0, 0)
        with full_precision(x.device.type):
            if ref is None:
                w = _plus_transposed(w)
                return torch.addmm(x * w.sum(1, keepdim=True), w, x, alpha=-1), None
            needs_x, needs_ref = ctx.needs_input_grad
            grad_x = torch.addmm(x * w.sum(1, keepdim=True), w, ref, alpha=-1) if needs_x else None
            grad_ref = torch.addmm(ref * w.sum(0)[:, None], w.T, x, alpha=-1) if needs_ref else None
        return grad_x, grad_ref


class _InnerProducts(torch.autograd.Function):
    """``x @ ref.T``. Of a batch with itself the gradient takes one matrix product, ``(grad + grad.T) @ x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ref: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, ref)
        with full_precision(x.device.type):
            return x @ (x if ref is None else ref).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, ref = ctx.saved_tensors
        with full_precision(x.device.type):
            if ref is None:
                return _plus_transposed(grad) @ x, None
            needs_x, needs_ref = ctx.needs_input_grad
            return grad @ ref if needs_x else None, grad.T @ x if needs_ref else None
