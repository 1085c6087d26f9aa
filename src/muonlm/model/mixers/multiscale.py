"""Multi-scale attention (letter S): at each scale s, heads of their own read blocks of s tokens.

    k_j = R(js+s−1) RMSNorm((1/s) Σ_i k_i),  v_j = (1/s) Σ_i v_i        over block j, the tokens js … js+s−1
    y_t = W_o [y_t⁽ˢ⁾ for s in scales],  y_t⁽ˢ⁾ = Σ_j softmax_j(c(R(t) q_t · k_j / √K)) v_j over j with js+s−1 ≤ t

The mean comes before QK-norm and RoPE, so that keys of all scales have one size. Queries keep full resolution; a
query before the first complete block of a scale gets 0 there. Scale 1 is attention.

Letters  B batch, T time, D model width, H query heads, G key/value heads, K head width, s scale, S blocks
Shapes   x, y (B,T,D) · mask (B,T) bool, True = real token; masked tokens are deleted and their outputs are 0
State    per scale keys (B,G,S,K) after RoPE, values, and (B,2,G,K) sums over the unfinished block; then length (B,)
         int64 on the CPU. Slot j holds block j; slots of row b from ⌊length_b/s⌋ on are unspecified. After forward(x,
         state) only the returned state is valid.
Cost     Σ_s T·T/s pairs of query and key
Source   the hybrid of infrabrew/mamba-recursive-model, rebuilt causally (its own pools, gate and labels see the future)
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig
from muonlm.errors import UserError

from ..norm import RMSNorm, at_least_fp32, wide
from . import attention


@lru_cache(maxsize=8)
def visible_blocks(T: int, scale: int, device: torch.device) -> Tensor:
    """(T−s+1, ⌊T/s⌋) bool: the blocks that queries s−1 … T−1 see; each sees at least the first. Layers share it."""
    last = torch.arange(T // scale, device=device) * scale + scale - 1
    return last <= torch.arange(scale - 1, T, device=device)[:, None]


class MultiScaleAttention(attention.Heads):
    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.scales, self.look_back = cfg.attention_scales, cfg.block_size
        self.per_scale = self.heads + 2 * self.kv_heads
        self.qkv = nn.Linear(cfg.d_model, len(self.scales) * self.per_scale * self.width, bias=cfg.bias)
        self.out = nn.Linear(len(self.scales) * self.heads * self.width, cfg.d_model, bias=cfg.bias)
        norms = range(len(self.scales) if cfg.qk_norm else 0)
        self.q_norms = nn.ModuleList(RMSNorm(self.width, eps=cfg.qk_norm_eps) for _ in norms)
        self.k_norms = nn.ModuleList(RMSNorm(self.width, eps=cfg.qk_norm_eps) for _ in norms)

    @classmethod
    def check(cls, cfg: ModelConfig) -> None:
        super().check(cfg)
        scales = cfg.attention_scales
        if not (scales and 1 <= min(scales) and max(scales) <= cfg.block_size):
            raise UserError(
                f"`attention_scales` = {scales} must be from 1 to `block_size` = {cfg.block_size}, such as 1,2,4."
            )

    def tags(self) -> dict[nn.Parameter, dict]:
        """Where q, k and v of each scale, and where single heads, begin."""
        sizes = [n * self.width for n in (self.heads, self.kv_heads, self.kv_heads)] * len(self.scales)
        return {
            self.qkv.weight: {"role": "matrix", "split": (0, sizes), "heads": (0, len(self.scales) * self.per_scale)}
        }

    def flops_between_tokens(self, length: int) -> float:
        return sum(12 * length * self.cfg.d_model / s for s in self.scales)

    def init_state(self, batch: int, device=None, dtype=None) -> tuple[Tensor, ...]:
        dtype = dtype or torch.get_default_dtype()
        state = []
        for _ in self.scales:
            state += [torch.zeros(batch, self.kv_heads, 0, self.width, device=device, dtype=dtype) for _ in "kv"]
            state.append(torch.zeros(batch, 2, self.kv_heads, self.width, device=device, dtype=wide(dtype)))
        return *state, torch.zeros(batch, dtype=torch.long)

    def forward(self, x: Tensor, state=None, mask: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, len(self.scales), self.per_scale, self.width)
        fresh = state is None and mask is None  # training and plain prefill: all rows alike, from position 0
        state = self.init_state(B, x.device, qkv.dtype) if state is None else state
        length = state[-1]
        real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.cpu()
        outputs, new_state = [], []
        for i in range(len(self.scales)):
            q, kv = qkv[:, :, i].split([self.heads, 2 * self.kv_heads], 2)
            kv = kv.unflatten(2, (2, self.kv_heads))  # (B,T,2,G,K)
            before = state[3 * i : 3 * i + 3]
            y, cache = self._whole(i, q, kv) if fresh else self._continue(i, q, kv, before, length, real)
            outputs.append(y.transpose(1, 2))
            new_state += cache
        y = self.out(torch.cat(outputs, 2).flatten(2))
        return (y if mask is None else y * mask[..., None]), (*new_state, length + real.sum(1))

    def _whole(self, i: int, q: Tensor, kv: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A row from its start: y (B,H,T,K) and (keys, values, unfinished block)."""
        s, (B, T) = self.scales[i], q.shape[:2]
        end = T - T % s  # of the last complete block
        unfinished = at_least_fp32(kv[:, end:]).sum(1)
        k, v = self._pool(
            i, at_least_fp32(kv[:, :end]).unflatten(1, (end // s, s)).mean(2), q.dtype, slice(s - 1, end, s), T
        )
        if not end:
            return q.new_zeros(B, self.heads, T, self.width), [k, v, unfinished]
        q = self._query(i, q[:, s - 1 :], slice(s - 1, T), T)  # the first s − 1 see nothing
        y = self._attend(q, k, v, None if s == 1 else visible_blocks(T, s, q.device))
        return F.pad(y, (0, 0, s - 1, 0)), [k, v, unfinished]

    def _continue(
        self, i: int, q: Tensor, kv: Tensor, state, length: Tensor, real: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """New tokens after those of the state, row by row at their own positions."""
        s, (B, T), device = self.scales[i], q.shape[:2], q.device
        keys, values, unfinished = state
        rank = (real.long().cumsum(1) - 1).clamp(min=0)  # among real tokens; a masked one repeats its predecessor's
        filled, done = length % s, length // s  # tokens in the unfinished block, blocks in the cache
        finished = (filled + real.sum(1)) // s  # new blocks, per row
        new, top = int(finished.max()), int((done + finished).max())

        block = ((filled[:, None] + rank) // s).to(device)  # of each token, counted from the unfinished one
        sums = F.pad(unfinished[:, None], (0, 0, 0, 0, 0, 0, 0, new))  # (B,new+1,2,G,K)
        add = at_least_fp32(kv) * real[..., None, None, None].to(device)
        sums = sums.scatter_add(1, block[..., None, None, None].expand_as(add), add)
        unfinished = sums[torch.arange(B, device=device), finished.to(device)]
        if new:  # rows that finish fewer blocks write a slot that nobody sees until its own block overwrites it
            slot = done[:, None] + torch.arange(new)
            size = int(done.max()) + new
            k, v = self._pool(i, sums[:, :new] / s, q.dtype, slot * s + s - 1, size * s)
            keys, values = (_write(cache, slot.to(device), t, size) for cache, t in ((keys, k), (values, v)))
        if not top:
            return q.new_zeros(B, self.heads, T, self.width), [keys, values, unfinished]
        position = length[:, None] + rank
        visible = torch.arange(top) < ((position + 1) // s)[..., None]  # (B,T,S)
        some = visible.any(-1)
        visible[..., 0] |= ~some  # a query must see something or softmax gives NaN; its output is zeroed
        q = self._query(i, q, position, int(position.max()) + 1)
        k, v = keys[:, :, :top].to(q.dtype), values[:, :, :top].to(q.dtype)
        y = self._attend(q, k, v, visible[:, None].to(device))
        return torch.where(some[:, None, :, None].to(device), y, 0), [keys, values, unfinished]

    def _query(self, i: int, q: Tensor, positions, end: int) -> Tensor:
        """Queries (B,T,H,K) as they meet the keys: (B,H,T,K), normalised and rotated."""
        return self._rotate(self.q_norms[i](q) if self.cfg.qk_norm else q, positions, end).transpose(1, 2)

    def _pool(self, i: int, means: Tensor, dtype: torch.dtype, positions, end: int) -> tuple[Tensor, Tensor]:
        """Means over whole blocks (B,S,2,G,K) -> keys, normalised and rotated, and values, (B,G,S,K) each."""
        k, v = means[:, :, 0].to(dtype), means[:, :, 1].to(dtype)
        k = self._rotate(self.k_norms[i](k) if self.cfg.qk_norm else k, positions, end)
        return k.transpose(1, 2), v.transpose(1, 2)

    def _rotate(self, x: Tensor, positions, end: int) -> Tensor:
        """RoPE on x (B,T,heads,K) at positions below `end`: a slice, or indices (B,T)."""
        if self.cfg.positions != "rope":
            return x
        at = positions if isinstance(positions, slice) else positions.to(x.device)
        return attention.rotate(x, *self._angles(x, at, end))


def _write(cache: Tensor, slot: Tensor, new: Tensor, size: int) -> Tensor:
    """The cache with new (B,G,n,K) at slots (B,n) < size: grown geometrically, in place unless autograd may need it."""
    if cache.shape[2] < size:
        cache = F.pad(cache, (0, 0, 0, max(size - cache.shape[2], cache.shape[2])))
    index = slot[:, None, :, None].expand_as(new)
    new = new.to(cache.dtype)
    return cache.scatter(2, index, new) if torch.is_grad_enabled() else cache.scatter_(2, index, new)
