"""The sparse pairwise losses of re-ID, SP-H and AdaSP, which the benchmark compares with."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils import common_functions as c_f
from torch import Tensor
from torch.nn import functional as F

from pml_drsl.checks import InputError, is_real


class SparsePairwiseLoss(BaseMetricLossFunction):
    """One positive pair and one negative pair for each identity of a batch, chosen softly.

    Zhou et al., "Adaptive Sparse Pairwise Loss for Object Re-Identification", CVPR 2023. With cosine similarities s and
    the temperature t, identity i has these pairs (n and m are images of i, and k is an image of another identity)::

        S-      =  t log sum_n sum_k exp(s_nk / t)              the nearest negative pair
        S+_h    = -t log sum_n sum_m exp(-s_nm / t)             the farthest positive pair
        S+_lh   =  t log sum_n 1 / sum_m exp(-s_nm / t)         the nearest of each image's farthest positive
        S+_ada  =  a S+_h + (1 - a) S+_lh,   a = 2 S+_h S+_lh / (S+_h + S+_lh), or 0 if S+_h is not above 0
        loss    =  mean over the identities of log(1 + exp((S- - S+) / t))

    The weight ``a`` has no gradient. The sums over n and m include n = m, as in the code that the authors published. An
    identity with a single image in the batch, or a batch with a single identity, has no pair and no loss. Raises
    InputError for an unknown mining, or a temperature that is not above 0.

    Args:
        mining: the positive pair: ``"h"`` (SP-H), ``"lh"`` (SP-LH) or ``"ada"`` (AdaSP).
        temperature: t, above 0. The default is the value of the paper.
        **kwargs: arguments of ``BaseMetricLossFunction``. The distance must be ``CosineSimilarity``.
    """

    def __init__(self, mining: str = "ada", temperature: float = 0.04, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        c_f.assert_distance_type(self, CosineSimilarity)
        if mining not in ("h", "lh", "ada"):
            raise InputError(f"mining must be h, lh or ada, got {mining!r}")
        if not (is_real(temperature) and temperature > 0):
            raise InputError(f"temperature must be a number above 0, got {temperature!r}")
        self.mining, self.temperature = mining, temperature
        self.add_to_recordable_attributes(name="temperature", is_stat=False)

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Any, ref_labels: Any
    ) -> dict[str, Any]:
        """The loss of each identity of a batch; embeddings of shape (N, dim), labels of shape (N,)."""
        c_f.indices_tuple_not_supported(indices_tuple)
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        identities, image_of, images = labels.unique(return_inverse=True, return_counts=True)
        if len(identities) < 2 or not (images > 1).any():
            return self.zero_losses()
        logits = self.distance(embeddings) / self.temperature
        same = labels[:, None] == labels[None]
        members = F.one_hot(image_of, len(identities)).T.bool()
        negative = _logsumexp(_logsumexp(logits, ~same), members)
        # The similarity of each image to its farthest positive, from the sum over the images of its identity.
        farthest = -_logsumexp(-logits, same)
        hardest = -_logsumexp(-farthest, members)
        least_hard = _logsumexp(farthest, members)
        positive = self._positive(hardest, least_hard)
        losses, kept = F.softplus(negative - positive), images > 1
        # A reducer of pytorch-metric-learning knows images: the first image of an identity stands for it.
        first = members.int().argmax(1)
        return {"loss": {"losses": losses[kept], "indices": first[kept], "reduction_type": "element"}}

    def _positive(self, hardest: Tensor, least_hard: Tensor) -> Tensor:
        if self.mining != "ada":
            return hardest if self.mining == "h" else least_hard
        h, lh = (self.temperature * part.detach() for part in (hardest, least_hard))
        weight = torch.where(h > 0, 2 * h * lh / (h + lh).clamp_min(torch.finfo(h.dtype).tiny), 0)
        return weight * hardest + (1 - weight) * least_hard

    def get_default_distance(self) -> CosineSimilarity:
        """Cosine similarity, as in the paper."""
        return CosineSimilarity()


def _logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    """The logarithm of the sum of exponentials in each row of a mask; the values broadcast to the mask's shape."""
    return values.expand(mask.shape).masked_fill(~mask, -torch.inf).logsumexp(1)
