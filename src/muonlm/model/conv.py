"""Short causal depthwise convolution over time, on channel-last tensors.

    y[b,t,c] = bias[c] + Σ_{j<W} weight[c,0,j] · xp[b, t+j, c],   xp = state followed by x along time

Letters  B batch, T time, D channels, W taps; tap W−1 multiplies the current token
Shapes   x, y (B,T,D) · weight (D,1,W) as nn.Conv1d stores it · state (B,W−1,D): the last W−1 real inputs, zeros at the start
Mask     (B,T) bool: masked tokens are deleted, so neighbours on both sides meet; their outputs are unspecified
Cost     W shifted multiply-adds: on a CPU several times faster than F.conv1d with groups = D, and no transposition
"""

import torch
from torch import Tensor, nn


class ShortConv(nn.Module):
    def __init__(self, channels: int, taps: int, *, bias: bool = False):
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_state(self, batch: int, device=None, dtype=None) -> Tensor:
        return torch.zeros(batch, self.taps - 1, len(self.weight), device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        B, T, D = x.shape
        if mask is not None:  # real tokens first; the permutation is undone below
            order = (~mask).long().argsort(dim=1, stable=True)[..., None].expand_as(x)
            x = x.gather(1, order)
        xp = torch.cat([self.init_state(B, x.device, x.dtype) if state is None else state.to(x.dtype), x], 1)
        taps = self.weight.squeeze(1).t()  # (W, D)
        y = xp[:, self.taps - 1 :] * taps[-1]
        for j in range(self.taps - 1):
            y = torch.addcmul(y, xp[:, j : j + T], taps[j])
        if self.bias is not None:
            y = y + self.bias
        if mask is None:
            return y, xp[:, T:]
        last = mask.sum(1)[:, None] + torch.arange(self.taps - 1, device=x.device)  # (B, W−1)
        return torch.empty_like(y).scatter(1, order, y), xp.gather(1, last[..., None].expand(-1, -1, D))
