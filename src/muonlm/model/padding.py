"""Masks of recurrent layers: a masked token is deleted, not replaced by zeros.

    x, lengths, undo = compact(x, mask);   y = undo(layer(x, lengths))

`compact` moves the real tokens of each row to its front, in their order, so that the inside sees right padding only;
`undo` puts outputs back, with 0 at masked positions. A mask that already is a prefix of every row moves nothing.

Shapes   x, y (B,T,·) · mask (B,T) bool, True = real · lengths (B,) int64; None: every token is real
"""

from collections.abc import Callable

import torch
from torch import Tensor


def compact(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    if mask is None or bool(mask.all()):
        return x, None, lambda y: y
    padding, lengths = ~mask, mask.sum(1)
    front = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    if torch.equal(mask, front):
        return x, lengths, lambda y: y.masked_fill(padding[..., None], 0)
    order = padding.long().argsort(dim=1, stable=True)
    back = order.argsort(1)
    return _pick(x, order), lengths, lambda y: _pick(y, back).masked_fill(padding[..., None], 0)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
