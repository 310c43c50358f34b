"""Ranking across cameras: which pairs of a batch evaluation would count."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def cross_camera_pairs(pids: Tensor, camids: Tensor, mined: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
    """Pairs of a batch without those of one identity and one camera, which evaluation leaves out of the gallery.

    Args:
        pids: identities, shape (N,), integer.
        camids: cameras, shape (N,), integer.
        mined: what a miner chose: pairs (a1, p, a2, n) or triplets (a, p, n), as indices below N; None for all pairs.

    Returns:
        Pairs (a1, p, a2, n), or triplets if those were mined. Each positive is of another camera than its anchor. No
        negative is of its anchor's identity, so these stay.
    """
    if mined is None:
        same = pids[:, None] == pids
        positive = same & (camids[:, None] != camids)
        return (*positive.nonzero(as_tuple=True), *(~same).nonzero(as_tuple=True))
    a, p, *negatives = mined
    kept = camids[a] != camids[p]
    return (a[kept], p[kept], *(negatives if len(mined) == 4 else [negatives[0][kept]]))
