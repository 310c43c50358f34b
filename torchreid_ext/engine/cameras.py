"""Leaves pairs of one identity and one camera out of the training, as evaluation leaves them out of the gallery."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def cross_camera_pairs(pids: Tensor, camids: Tensor, mined: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
    """The pairs of a batch, without the pairs of one identity and one camera.

    Args:
        pids: identities, shape (N,), integer.
        camids: cameras, shape (N,), integer.
        mined: the choice of a miner, pairs (a1, p, a2, n) or triplets (a, p, n) of indices below N; None for all pairs.

    Returns:
        Pairs (a1, p, a2, n), or triplets if the miner chose triplets. Each positive has another camera than its anchor.
        All negatives stay, because a negative has another identity than its anchor.
    """
    if mined is None:
        same = pids[:, None] == pids
        positive = same & (camids[:, None] != camids)
        return (*positive.nonzero(as_tuple=True), *(~same).nonzero(as_tuple=True))
    a, p, *negatives = mined
    kept = camids[a] != camids[p]
    return (a[kept], p[kept], *(negatives if len(mined) == 4 else [negatives[0][kept]]))
