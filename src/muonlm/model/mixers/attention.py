"""Attention mixer: grouped queries, QK-norm, RoPE, sliding window, soft-cap, and a cache that is a plain value.

    q, k, v = x W_qkv                       heads of width K; query head i reads key/value head ⌊i·Hkv/H⌋
    q, k    ← RMSNorm(q), RMSNorm(k)        optional, gain (K,), before the rotation
    q, k    ← R(pos) q, R(pos) k            pairs (i, i + K/2) turn by pos·θ^(−2i/K), angles in fp32
    y_t     = Σ_j softmax_j(c(q_t·k_j / √K)) v_j W_o,   c(z) = z or s·tanh(z/s),   over keys j ≤ t (and j > t − w)

Letters  B batch, T time, D model width, H query heads, G key/value heads, K head width, S keys in view
Shapes   x, y (B,T,D) · mask (B,T) bool, True = real token · cache k, v (B,G,S,K) after RoPE, length (B,) int64 on the
         CPU
State    (k, v, length). Slot j of row b holds position j (full) or position max(0, length_b − (w−1)) + j (window w,
         which keeps its last w−1 keys only). Masked tokens are deleted: they take no position, leave no key, and
         output 0. After forward(x, state) only the returned state is valid: full attention appends in place when
         there is room and no gradient is wanted.
Measure  with `track_logits = True`, each forward in training mode raises `max_logit` (H,) to the largest z of the
         batch over what each query sees, before the soft-cap: for QK-clip (optim/watch/qk_clip.py), or to explain a
         loss spike.
Raises   UserError from qk_heads() with QK-norm, where scaling W changes no logit; shapes are asserted.
Source   Vaswani 2017; RoPE: Su 2021 (2104.09864); GQA: Ainslie 2023 (2305.13245); QK-norm: Henry 2020 (2010.04245)
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonlm.config.schema import ModelConfig
from muonlm.errors import UserError

from ..kernels import kernels_for
from ..norm import RMSNorm, at_least_fp32, wide
from .base import Mixer

State = tuple[Tensor, Tensor, Tensor]

# Keys up to which written-out products beat SDPA on a CPU, forward and backward
# (LOG 2026-11-22: 2-4x at 64, equal at these lengths).
EXPLICIT_UP_TO = {torch.float32: 128, torch.bfloat16: 256, torch.float64: 128}
MEASURED_LOGITS = 1 << 22  # at a time, while max_logit is tracked: 16 MiB in fp32


def rope_table(
    length: int, width: int, theta: float, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of pos·θ^(−2i/width), each (length, width/2): computed in fp64, stored in the dtype of their use."""
    return _rope_table(length, width, theta, device, dtype)


# What torch.compiler.assume_constant_result sets, without the second that it takes to import: a compiled graph holds
# the tables, it does not compute them in every block.
rope_table._dynamo_marked_constant = True


@lru_cache(maxsize=16)
def _rope_table(length, width, theta, device, dtype) -> tuple[Tensor, Tensor]:
    frequency = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first 2·cos.shape[-1] dimensions of x (B, T, heads, K); cos and sin (T, ·) or (B, T, ·)."""
    half = cos.shape[-1]
    if cos.ndim == 2 and 2 * half == x.shape[-1] and (fast := kernels_for(x)):
        return fast.rotate(x, cos, sin)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one angle for all heads
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [a * cos - b * sin, b * cos + a * sin]
    return torch.cat(turned if rest.shape[-1] == 0 else [*turned, rest], -1)


def _as_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, −∞ elsewhere. Every query sees something, or its output is zeroed later."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


@lru_cache(maxsize=4)
def causal_bias(T: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return _as_bias(torch.ones(T, T, dtype=torch.bool, device=device).tril(), dtype)


@torch.no_grad()
def max_logits(q: Tensor, k: Tensor, visible: Tensor | None = None, *, scale: float) -> Tensor:
    """max of scale·q_t·k_j over rows, queries t and the keys j that t sees, per query head: (H,), fp32 (fp64 for fp64).

    q (B,H,T,K), k (B,G,S,K); visible: bool, broadcastable to (B,1,T,S), None = causal with S = T. −∞: nothing is seen.
    The logits exist in chunks of queries, at most max(MEASURED_LOGITS, B·H·S) at a time, in the dtype of the products.
    """
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    size = max(1, MEASURED_LOGITS // (B * H * S))
    if visible is not None:
        visible = visible.expand(*visible.shape[:-2], T, S)
    tops = []
    for start in range(0, T, size):
        end = min(start + size, T)
        if visible is None:  # later keys are not seen by anyone here
            keys, seen = k[:, :, :end], torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
        else:
            keys, seen = k, visible[..., start:end, :]
        grouped = q[:, :, start:end].reshape(B, G, -1, K)  # a group's heads share its keys, uncopied
        logits = (grouped @ keys.transpose(-1, -2)).view(B, H, end - start, -1)
        tops.append(logits.masked_fill_(~seen, float("-inf")).amax((0, 2, 3)))
    return at_least_fp32(torch.stack(tops).amax(0)) * scale


def in_one_order(y: Tensor) -> Tensor:
    """y of SDPA on a GPU, whose backward then adds up the gradients of q block by block, not as blocks come to an end.

    torch has one switch for all operations, and cannot run others of ours with it: it is on for this one alone.
    """
    node = y.grad_fn
    for _ in range(3):  # SDPA pads odd widths of a head, and cuts its result
        if node is None or "ScaledDotProduct" in node.name():
            break
        node = node.next_functions[0][0] if node.next_functions else None
    else:
        node = None  # written out by torch, in products: always in one order
    if node is not None:
        node.register_prehook(lambda grads: torch.use_deterministic_algorithms(True))
        node.register_hook(lambda *grads: torch.use_deterministic_algorithms(False))
    return y


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, dropout: float) -> Tensor:
    """SDPA as its kernels with a mask want it on a GPU: as many key heads as query heads, widths in eights. Otherwise
    it writes out the logits, in fp32. q (B,H,T,K), k and v (B,G,S,K) -> (B,H,T,K)."""
    (H, width), G = q.shape[1::2], k.shape[1]
    if H != G:
        k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
    if pad := -width % 8:
        q, k, v = (F.pad(t, (0, pad)) for t in (q, k, v))
    if visible.shape[-1] != k.shape[2]:  # one entry for all keys: a kernel reads a mask of full width
        visible = visible.expand(*visible.shape[:-1], k.shape[2]).contiguous()
    return F.scaled_dot_product_attention(q, k, v, visible, dropout, scale=width**-0.5)[..., :width]


class Heads(Mixer):
    """What attention at one resolution and at several share: the widths of the heads, and their rotation."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg)
        self.repeatable = False  # on a GPU, in training: the same gradients to the bit each time
        self.heads, self.kv_heads, self.width = cfg.n_head, cfg.n_kv_head or cfg.n_head, cfg.d_model // cfg.n_head
        self.rotary_width = rotary_width(cfg)

    @classmethod
    def check(cls, cfg: ModelConfig) -> None:
        check_heads(cfg)
        d, H, G = cfg.d_model, cfg.n_head, cfg.n_kv_head or cfg.n_head
        if H % G:
            near = max(k for k in range(1, G + 1) if H % k == 0)
            raise UserError(f"`n_kv_head` = {G} does not divide `n_head` = {H}; use `n_kv_head` {near}")
        if cfg.positions == "rope" and rotary_width(cfg) % 2:
            raise UserError(
                f"RoPE turns pairs, but {rotary_width(cfg)} dimensions of a head would turn (`d_model` {d} / "
                f"`n_head` {H}); choose an even head width, or `positions` learned"
            )

    def residual_projections(self) -> list[nn.Linear]:
        return [self.out]

    def _angles(self, x: Tensor, positions, end: int) -> tuple[Tensor, Tensor]:
        """cos and sin for x at positions below `end`: a slice, or (B,T) indices on the device of x."""
        size = max(64, 1 << (end - 1).bit_length())  # few distinct tables while decoding grows the sequence
        cos, sin = rope_table(size, self.rotary_width, self.cfg.rope_theta, x.device, x.dtype)
        return cos[positions], sin[positions]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        """q (B,H,T,K), k and v (B,G,S,K) -> (B,H,T,K). visible: bool, broadcasts to (B,1,T,S); None = causal, S = T."""
        dropout, cap = self.cfg.dropout if self.training else 0.0, self.cfg.attn_softcap
        grouped = self.heads != self.kv_heads
        if not cap and not (q.device.type == "cpu" and k.shape[2] <= EXPLICIT_UP_TO.get(q.dtype, 0)):
            if visible is not None and q.device.type == "cuda":
                y = masked_attention(q, k, v, visible, dropout)
            else:
                causal = visible is None
                y = F.scaled_dot_product_attention(q, k, v, visible, dropout, is_causal=causal, enable_gqa=grouped)
            return in_one_order(y) if self.repeatable else y
        if grouped:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        bias = causal_bias(q.shape[2], q.device, q.dtype) if visible is None else _as_bias(visible, q.dtype)
        chunks = []
        for rows in (slice(start, start + 512) for start in range(0, q.shape[2], 512)):  # bounds the (T, S) logits
            logits = (q[:, :, rows] * self.width**-0.5) @ k.transpose(-1, -2)
            if cap:
                logits = cap * torch.tanh(at_least_fp32(logits) / cap)
            logits = logits + bias[..., rows, :]
            weights = logits.softmax(-1, dtype=wide(logits.dtype))
            chunks.append(F.dropout(weights, dropout).to(v.dtype) @ v)
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, 2)


def check_heads(cfg: ModelConfig) -> None:
    d, H = cfg.d_model, cfg.n_head
    if d % H:
        near = max(1, round(d / H)) * H
        raise UserError(f"`d_model` = {d} is not a multiple of `n_head` = {H}; use `d_model` {near}")


def rotary_width(cfg: ModelConfig) -> int:
    """Dimensions of a head that RoPE turns."""
    return round(cfg.rotary_fraction * (cfg.d_model // cfg.n_head))


class Attention(Heads):
    """windowed: only the last cfg.window keys are seen, the own one included (0: all)."""

    def __init__(self, cfg: ModelConfig, windowed: bool = False):
        super().__init__(cfg)
        self.window = cfg.window if windowed else 0
        self.look_back = None if self.window else cfg.block_size
        self.qkv = nn.Linear(cfg.d_model, (self.heads + 2 * self.kv_heads) * self.width, bias=cfg.bias)
        self.out = nn.Linear(self.heads * self.width, cfg.d_model, bias=cfg.bias)
        self.q_norm = RMSNorm(self.width, eps=cfg.qk_norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm(self.width, eps=cfg.qk_norm_eps) if cfg.qk_norm else None
        self.track_logits = False
        self.max_logit: Tensor | None = None  # (H,), of all training forwards since it was last emptied

    def tags(self) -> dict[nn.Parameter, dict]:
        """What routing should know of the fused matrix: where q, k and v, and where single heads, begin."""
        q, kv = self.heads * self.width, self.kv_heads * self.width
        return {
            self.qkv.weight: {"role": "matrix", "split": (0, [q, kv, kv]), "heads": (0, self.heads + 2 * self.kv_heads)}
        }

    def flops_between_tokens(self, length: int) -> float:
        keys = min(length, self.window or length)
        return 12 * keys * self.cfg.d_model  # two products (Kaplan 2020; PaLM appendix B)

    def qk_heads(self) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """What muon.qk_clip takes: views of q's weight (H, K, D) and bias (H, K), those of k, and max_logit."""
        if self.q_norm is not None:
            raise UserError(
                "`qk_clip` scales the query and key weights, but `qk_norm` = true divides any scale out again: no "
                "logit would change, and QK-norm bounds them already. Use `qk_clip` 0, or `qk_norm` false"
            )
        heads = [p.detach().unflatten(0, (-1, self.width)) for p in (self.qkv.weight, self.qkv.bias) if p is not None]
        H, G = self.heads, self.kv_heads
        return [t[:H] for t in heads], [t[H : H + G] for t in heads], self.max_logit

    def init_state(self, batch: int, device=None, dtype=None) -> State:
        empty = torch.zeros(batch, self.kv_heads, 0, self.width, device=device, dtype=dtype)
        return empty, empty.clone(), torch.zeros(batch, dtype=torch.long)

    def forward(self, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> tuple[Tensor, State]:
        B, T, _ = x.shape
        q, k, v = (
            self.qkv(x)
            .view(B, T, self.heads + 2 * self.kv_heads, self.width)
            .split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if state is None and mask is None:  # training and plain prefill: the causal mask is implicit
            q, k = self._rope(q, k, slice(0, T), T)
            y = self._attend_and_measure(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self._causal(T, x.device)
            )
            state = self._trim(k.transpose(1, 2), v.transpose(1, 2), torch.full((B,), T))
        else:
            y, state = self._continue(q, k, v, self.init_state(B, x.device, k.dtype) if state is None else state, mask)
        y = self.out(y.transpose(1, 2).flatten(2))
        return (y if mask is None else y * mask[..., None]), state

    def _rope(self, q: Tensor, k: Tensor, positions, end: int) -> tuple[Tensor, Tensor]:
        """Rotate q and k by their positions: a slice, or (B, T) indices, below `end`."""
        if self.cfg.positions != "rope":
            return q, k
        cos, sin = self._angles(q, positions, end)
        return rotate(q, cos, sin), rotate(k, cos, sin)

    def _causal(self, T: int, device) -> Tensor | None:
        """None means 'causal'; a window that cuts needs its mask (T, T) written out."""
        if not self.window or self.window >= T:
            return None
        t = torch.arange(T, device=device)
        return (t[None, :] <= t[:, None]) & (t[None, :] > t[:, None] - self.window)

    def _attend_and_measure(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, counted: Tensor | None = None
    ):
        """_attend. counted: the pairs that count for max_logit, where `visible` has others too."""
        if self.track_logits and self.training:
            top = max_logits(q, k, visible if counted is None else counted, scale=self.width**-0.5)
            self.max_logit = top if self.max_logit is None else torch.maximum(self.max_logit, top)
        return self._attend(q, k, v, visible)

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, state: State, mask: Tensor | None) -> tuple[Tensor, State]:
        """Attend from new tokens to cached and new keys, by position; append the new keys."""
        B, T = q.shape[:2]
        past_k, past_v, length = state
        real = torch.ones(B, T, dtype=torch.bool) if mask is None else mask.cpu()
        # of real tokens; a masked one repeats its predecessor's
        positions = length[:, None] + real.long().cumsum(1) - 1
        new_length = length + real.sum(1)
        end = int(new_length.max())
        q, k = self._rope(q, k, positions.clamp(min=0).to(q.device), max(end, 1))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))

        base = (length - (self.window - 1)).clamp(min=0) if self.window else torch.zeros_like(length)
        past = base[:, None] + torch.arange(past_k.shape[2])  # (B, S_past): positions of the cached slots
        past_real = past < length[:, None]
        if self.window or not bool((real.all() and (length == length[0]).all())):
            # general case: view = cache followed by new keys, visibility by position
            keys, values = torch.cat([past_k, k.to(past_k.dtype)], 2), torch.cat([past_v, v.to(past_v.dtype)], 2)
            key_position, key_real = torch.cat([past, positions], 1), torch.cat([past_real, real], 1)
            seen = key_real[:, None, :] & (key_position[:, None, :] <= positions[:, :, None]) & real[:, :, None]
            if self.window:
                seen &= key_position[:, None, :] > positions[:, :, None] - self.window
            # the makeshift pair of the next line is no logit of the model
            counted = seen[:, None].to(q.device, copy=True) if self.track_logits else None
            # a masked query must see something or softmax gives NaN; its output is zeroed
            seen[..., 0] |= ~seen.any(-1)
            y = self._attend_and_measure(q, keys.to(q.dtype), values.to(q.dtype), seen[:, None].to(q.device), counted)
            order = torch.argsort((~key_real).long(), dim=1, stable=True).to(q.device)  # real keys first, in order
            index = order[:, None, :, None].expand_as(keys)
            return y, self._trim(keys.gather(2, index), values.gather(2, index), new_length, start=base)
        # equal rows, full attention: slot = position; grow geometrically, append in place
        start = int(length[0])
        if past_k.shape[2] < end or torch.is_grad_enabled():  # autograd may need what is there
            grown = [t.new_zeros(B, self.kv_heads, max(end, 2 * start), self.width) for t in (past_k, past_v)]
            for new, old in zip(grown, (past_k, past_v)):
                new[:, :, :start] = old[:, :, :start]
            past_k, past_v = grown
        past_k[:, :, start:end] = k
        past_v[:, :, start:end] = v
        seen = (
            torch.ones(T, end, dtype=torch.bool, device=q.device).tril(start)
            if T > 1
            else torch.ones(1, 1, dtype=torch.bool, device=q.device)
        )
        y = self._attend_and_measure(q, past_k[:, :, :end].to(q.dtype), past_v[:, :, :end].to(q.dtype), seen)
        return y, (past_k, past_v, new_length)

    def _trim(self, k: Tensor, v: Tensor, length: Tensor, start: Tensor | None = None) -> State:
        """Keep what later tokens can see. k, v hold positions start_b, start_b+1, … of each row, real ones first."""
        if not self.window:
            return k, v, length
        keep = self.window - 1
        start = torch.zeros_like(length) if start is None else start
        first = (length - keep).clamp(min=0) - start  # slot of the oldest key to keep, per row
        size = min(keep, k.shape[2])
        slot = (first[:, None] + torch.arange(size)).clamp(max=max(k.shape[2] - 1, 0)).to(k.device)
        index = slot[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        return k.gather(2, index), v.gather(2, index), length
