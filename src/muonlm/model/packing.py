"""Rows with tokens that are not there, and rows of several documents.

    x, lengths, undo = compact(x, mask);   y = undo(layer(x, lengths))

A masked token is deleted, not replaced by zeros: `compact` moves the real tokens of each row to its front, in their
order, so that the inside sees right padding only; `undo` puts outputs back, with 0 at masked positions. A mask that
already is a prefix of every row moves nothing.

    y = Segments(segments).apply(layer, x)

Segments that share a row must not see each other. Each becomes a row of its own, beside others of similar length and
padded on the right, and the layer runs on those: what lies to the right cannot change a causal layer's outputs, so
attention masks, resets of states and positions that start at 0 all follow from the layout, in any causal mixer,
without a line in it. What is not causal along time (norms, MLPs, projections of the residual stream) stays packed and
pays for no padding.
The groups (n_g rows of length L_g) minimise  Σ_g n_g·L_g + 64  tokens, 64 standing for what a
further call of the layer costs. n_g is 1, 2, 3, 4, 6, 8, 12, 16, …, and L_g a multiple of 8 or T, so that shapes
recur from batch to batch: in bf16 on a CPU oneDNN generates code for every new shape of a product, and keeps it.

Shapes   x, y (B,T,·) · mask (B,T) bool, True = real · lengths (B,) int64; None: every token is real · segments (B,T)
         int64: 0, 1, … along a row, each of them contiguous; −1 = padding, outputs there are 0
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def compact(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """x (B,T,d), mask (B,T) -> x with real tokens first, lengths (B,) or None if all are real, and the way back."""
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
        # runs of one number, by their first position and length in the flattened batch; padding is no segment
        change = torch.ones_like(number, dtype=torch.bool)
        change[1:] = number[1:] != number[:-1]
        first = change.nonzero().squeeze(1)
        length = torch.diff(first, append=torch.tensor([B * T]))
        real = number[first] >= 0
        first, length = first[real], length[real]
        assert len(number[first].unique()) == len(first), "a segment must be contiguous"
        order = length.argsort(descending=True, stable=True)  # neighbours are of similar length: little padding
        first, length = first[order], length[order]
        self.groups: list[Tensor] = []  # (n, L): flat positions; padding repeats a segment's last token, or a segment
        source = torch.full((B * T,), -1)  # flat position -> row in the concatenated outputs of all groups
        position = torch.zeros(B * T, dtype=torch.long)
        at = start = 0
        for n, L in _groups(length.tolist(), T):
            own = length[start : start + n, None]
            step = torch.arange(L)
            index = first[start : start + n, None] + step.clamp(max=own - 1)
            inside = step < own
            # where the output of each real token will stand, and how far into its segment it is
            source[index[inside]] = at + torch.arange(index.numel()).view(index.shape)[inside]
            position[index[inside]] = step.expand_as(index)[inside]
            index = torch.cat([index, index[-1:].expand(n - len(index), -1)])
            self.groups.append(index.to(segments.device))
            at, start = at + n * L, start + n
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


def _groups(lengths: list[int], T: int) -> list[tuple[int, int]]:
    """(n_g, L_g) in the order of the descending lengths, by dynamic programming; the last may have rows to spare."""
    widths = [min(-(-length // 8) * 8, T) for length in lengths]
    rows = [1]
    while rows[-1] < len(lengths):
        rows.append(rows[-1] + max(1, 1 << rows[-1].bit_length() >> 2))  # half a power of two more
    best, via = [0.0] + [math.inf] * len(lengths), [(0, 0)] * (len(lengths) + 1)  # covering the first j; its last group
    for i, width in enumerate(widths):
        for n in rows:
            j, cost = min(i + n, len(lengths)), best[i] + n * width + 64
            if cost < best[j]:
                best[j], via[j] = cost, (i, n)
            if j == len(lengths):
                break
    groups, j = [], len(lengths)
    while j:
        j, n = via[j]
        groups.append((n, widths[j]))
    return groups[::-1]
