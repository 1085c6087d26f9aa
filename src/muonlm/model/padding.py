"""Rows with tokens that are not there, and rows of several documents.

    x, lengths, undo = compact(x, mask);   y = undo(layer(x, lengths))

A masked token is deleted, not replaced by zeros: `compact` moves the real tokens of each row to its front, in their order,
so that the inside sees right padding only; `undo` puts outputs back, with 0 at masked positions. A mask that already is a
prefix of every row moves nothing.

    y = Segments(segments).apply(layer, x)

Segments that share a row must not see each other. Each becomes a row of its own, beside others of similar length and padded
on the right, and the layer runs on those: what lies to the right cannot change a causal layer's outputs, so attention masks,
resets of states and positions that start at 0 all follow from the layout, in any causal mixer, without a line in it.
Segments are grouped so that padding is at most max(64, an eighth) of a group's tokens; what is not causal along time (norms,
MLPs, projections of the residual stream) stays packed and pays for no padding.

Shapes   x, y (B,T,·) · mask (B,T) bool, True = real · lengths (B,) int64; None: every token is real · segments (B,T) int64:
         0, 1, … along a row, each of them contiguous; −1 = padding, outputs there are 0
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


class Segments:
    """Where the segments of a packed batch lie, computed once and used by every block."""

    def __init__(self, segments: Tensor):
        B, T = segments.shape
        number = (segments + torch.arange(B, device=segments.device)[:, None] * (T + 1)).flatten()  # unique over rows
        number = torch.where(segments.flatten() < 0, -1, number).cpu()
        change = torch.ones_like(number, dtype=torch.bool)
        change[1:] = number[1:] != number[:-1]
        first = change.nonzero().squeeze(1)
        length = torch.diff(first, append=torch.tensor([B * T]))
        real = number[first] >= 0
        first, length = first[real], length[real]
        assert len(number[first].unique()) == len(first), "a segment must be contiguous"
        order = length.argsort(descending=True, stable=True)
        first, length = first[order], length[order]
        self.groups: list[Tensor] = []  # (n, L): flat positions of n segments; padding repeats a segment's last token
        source = torch.full((B * T,), -1)  # flat position -> row in the concatenated outputs of all groups
        position = torch.zeros(B * T, dtype=torch.long)
        at = 0
        for start, end in _similar(length.tolist()):
            L = int(length[start])
            step = torch.arange(L)
            inside = step < length[start:end, None]
            index = first[start:end, None] + step.clamp(max=length[start:end, None] - 1)
            source[index[inside]] = at + torch.arange(index.numel()).view(index.shape)[inside]
            position[index[inside]] = step.expand_as(index)[inside]
            self.groups.append(index.to(segments.device))
            at += index.numel()
        source[source < 0] = at  # one row of zeros behind the outputs
        self.source, self.positions = source.to(segments.device), position.view(B, T).to(segments.device)

    def apply(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """layer (n,L,d) -> (n,L,e), causal; x (B,T,d) -> (B,T,e)."""
        if not self.groups:  # nothing but padding, or no rows: all parameters take part, nothing comes of it
            return layer(x) * 0
        flat = x.flatten(0, 1)
        outputs = [layer(flat.index_select(0, g.flatten()).unflatten(0, g.shape)).flatten(0, 1) for g in self.groups]
        outputs = torch.cat([*outputs, flat.new_zeros(1, outputs[0].shape[1]).to(outputs[0].dtype)])
        return outputs.index_select(0, self.source).unflatten(0, x.shape[:2])


def _similar(lengths: list[int]) -> list[tuple[int, int]]:
    """Ranges of the descending lengths that are run together."""
    ranges, start, tokens, padding = [], 0, 0, 0
    for i, length in enumerate(lengths):
        padding += lengths[start] - length
        if padding > max(64, (tokens + length) // 8):
            ranges.append((start, i))
            start, tokens, padding = i, 0, 0
        tokens += length
    return [*ranges, (start, len(lengths))] if lengths else []
