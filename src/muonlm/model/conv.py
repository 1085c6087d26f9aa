"""Short causal depthwise convolution over time, on channel-last tensors.

    y[b,t,c] = bias[c] + Σ_{j<W} weight[c,0,j] · xp[b, t+j, c],   xp = state followed by x along time

Letters  B batch, T time, D channels, W taps; tap W−1 multiplies the current token
Shapes   x, y (B,T,D) · weight (D,1,W) as nn.Conv1d stores it · state (B,W−1,D): the last W−1 real inputs, else zeros
Padding  lengths (B,): row b ends after lengths_b tokens; its later outputs are unspecified. mask (B,T) bool: masked
         tokens are deleted, so neighbours on both sides meet; their outputs are 0. One of the two, or neither.
Dtypes   y has the wider of x's and weight's: fp32 under autocast; rounded sums add a third to a mixer's error
Init     default: uniform ± 1/√W, as nn.Conv1d. stack: N(0, 1/(D·W)), bias 0. identity: N(0, 0.3²), 1 more on tap W−1.
Cost     W shifted multiply-adds: on a CPU several times faster than F.conv1d with groups = D, and no transposition
"""

import torch
from torch import Tensor, nn

from .packing import compact


class ShortConv(nn.Module):
    def __init__(self, channels: int, taps: int, *, bias: bool = False):
        super().__init__()
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(channels, 1, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    @torch.no_grad()
    def init_weights(self, kind: str) -> None:
        assert kind in ("default", "stack", "identity"), kind
        bound = self.taps**-0.5
        if kind == "default":
            self.weight.uniform_(-bound, bound)
        elif kind == "stack":
            self.weight.normal_(0, self.weight.numel() ** -0.5)
        else:  # nearly the identity
            self.weight.normal_(0, 0.3)
            self.weight[..., -1] += 1
        if self.bias is not None and kind == "default":
            self.bias.uniform_(-bound, bound)
        elif self.bias is not None:
            self.bias.zero_()

    def tags(self) -> dict[nn.Parameter, dict]:
        return {self.weight: {"role": "scalar"}}  # D filters of W taps: no matrix between channels

    def init_state(self, batch: int, device=None, dtype=None) -> Tensor:
        return torch.zeros(batch, self.taps - 1, len(self.weight), device=device, dtype=dtype)

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token, x (B,1,D), in few calls; where gradients are not wanted."""
        xp = torch.cat([state, x], 1)
        y = (xp * self.weight.squeeze(1).t()).sum(1, keepdim=True)
        return y if self.bias is None else y.add_(self.bias), xp[:, 1:]

    def forward(
        self, x: Tensor, state: Tensor | None = None, mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if mask is not None:
            x, lengths, undo = compact(x, mask)
            y, state = self(x, state, lengths=lengths)
            return undo(y), state
        B, T, D = x.shape
        xp = torch.cat([self.init_state(B, x.device, x.dtype) if state is None else state.to(x.dtype), x], 1)
        taps = self.weight.squeeze(1).t()  # (W, D)
        y = xp[:, self.taps - 1 :] * taps[-1]
        for j in range(self.taps - 1):
            y = torch.addcmul(y, xp[:, j : j + T], taps[j])
        if self.bias is not None:
            y = y + self.bias
        if lengths is None:
            return y, xp[:, T:].clone()  # a view would keep the whole sequence alive
        last = lengths[:, None] + torch.arange(self.taps - 1, device=x.device)  # (B, W−1): ends where the row does
        return y, xp.gather(1, last[..., None].expand(-1, -1, D))
