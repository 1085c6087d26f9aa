"""The section [model]. What a mixer needs of its widths, it checks itself (muonlm.model.check_model)."""

import re
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated, Literal

from muonlm.errors import UserError

from .convert import Ge, In, Joined, Section, Table, Told

MIXERS = "muonlm.model.mixers"  # the table of an upper room, read without torch and not before it is asked

AtLeast0 = Annotated[int, Ge(0)]
AtLeast1 = Annotated[int, Ge(1)]


@dataclass(kw_only=True)
class ModelConfig(Section):
    kind: Annotated[str, Table("muonlm.model", "KINDS")] = "lm"
    """lm: a residual stream of blocks that predicts the next token. modular: the post-norm transformer of grokking."""
    pattern: Annotated[str, Joined(","), Told(MIXERS, "known")] = "A"
    """Mixers of the layers, one letter each, tiled over the depth: MMA; or names: mamba,mamba,attention."""
    n_layer: AtLeast1 = 4
    """Blocks, ≥ 1."""
    d_model: AtLeast1 = 256
    """Width of the residual stream, a multiple of n_head."""
    n_head: AtLeast1 = 4
    """Query heads; head width is d_model / n_head."""
    n_kv_head: AtLeast0 = 0
    """Key/value heads (GQA), a divisor of n_head. 0 = n_head."""
    d_ff: AtLeast0 = 0
    """Inner width of the MLP. 0 = 4·d_model, or 64·ceil(⌊8·d_model/3⌋/64) for swiglu (equal parameters)."""
    vocab_size: AtLeast0 = 0
    """Rows of the embedding. 0 = the tokenizer's; larger pads (50257 → 50304), smaller is refused."""
    block_size: Annotated[int, Ge(2)] = 256
    """Context in tokens: the length of a training row."""
    embed_conv: AtLeast0 = 0
    """Taps of a causal depthwise convolution over the embeddings, ≥ 2; lets the first layer see n-grams. 0 = none."""
    tie: bool = False
    """Use the embedding matrix as the output head."""
    mlp: Literal["swiglu", "relu2", "gelu", "none"] = "swiglu"
    """swiglu, relu2 (squared ReLU), gelu, or none: blocks of a mixer alone."""
    norm: Literal["rmsnorm", "rmsnorm_plain", "layernorm"] = "rmsnorm"
    """rmsnorm (learned gain), rmsnorm_plain (no parameters) or layernorm (gain; shift too if bias)."""
    norm_eps: float = 1e-6
    """Added to the mean square before the root."""
    positions: Literal["rope", "learned"] = "rope"
    """rope (rotary) or learned (a table of block_size rows)."""
    rope_theta: float = 10000.0
    """Base of the rotary angles; larger suits longer contexts."""
    rotary_fraction: Annotated[float, In("(0, 1]")] = 1.0
    """Share of each head's dimensions that rotate, in (0, 1]."""
    qk_norm: bool = True
    """RMSNorm with gain on every query and key head, before RoPE. Bounds the attention logits."""
    qk_norm_eps: float = 1e-6
    """As norm_eps, for qk_norm."""
    window: AtLeast0 = 256
    """Keys that a W layer sees, itself included. 0 = all."""
    d_state: AtLeast0 = 0
    """State (key) width N of M, L and D layers. 0 = 16, or 128 for mamba2."""
    d_conv: AtLeast1 = 4
    """Taps of the short causal convolution in recurrent layers, ≥ 1."""
    expand: AtLeast1 = 2
    """Inner width of M, L and D layers in multiples of d_model."""
    dt_rank: AtLeast0 = 0
    """Rank of the step-size projection of M and L layers. 0 = ceil(d_model / 16)."""
    ssm_head: AtLeast1 = 64
    """mamba2: value width of a head, a divisor of expand·d_model."""
    ssm_groups: AtLeast1 = 1
    """mamba2: groups of heads that share keys and queries, a divisor of the heads."""
    delta_heads: AtLeast1 = 9
    """gated_deltanet: heads (n_head belongs to attention)."""
    delta_key: AtLeast0 = 0
    """gated_deltanet: key width of a head. 0 = 0.75·d_model / delta_heads."""
    delta_value: AtLeast0 = 0
    """gated_deltanet: value width of a head. 0 = 2·delta_key."""
    neg_eigval: bool = False
    """gated_deltanet: write rates in (0, 2) instead of (0, 1), so that the state can turn over."""
    beta: Annotated[float, In("[0, 1)")] = 0.9
    """Muon forms (m, d, l, g, V): decay of the velocity, in [0, 1). 0 = no velocity."""
    alpha: Annotated[float, Ge(0)] = 1.0
    """Muon forms: scale of the write, outside its normalisation."""
    write_norm: Literal["newton_schulz", "frobenius", "none"] = "newton_schulz"
    """Muon forms: newton_schulz, frobenius or none. A token's write has rank one: newton_schulz is frobenius times a
    constant (docs/mixers.md)."""
    ns_steps: AtLeast1 = 1
    """Muon forms: Newton-Schulz iterations on the write."""
    ns_poly: Literal["quintic", "cubic"] = "quintic"
    """Muon forms: polynomial of those iterations, quintic or cubic."""
    # the square of write_eps must not vanish in fp32, or the gradient of a silent token would be 0 · ∞
    write_eps: Annotated[float, Ge(1e-18, usual="1e-6")] = 1e-6
    """Muon forms: writes with a smaller norm are not scaled up to size one."""
    scan: Annotated[str, Table("muonlm.scan", "CHOICES")] = "auto"
    """How recurrences are computed: auto, reference, chunked (PyTorch), cpu (numba) or triton."""
    scan_chunk: AtLeast0 = 0
    """Tokens between stored states of a scan; 0 = 64, or for mamba2 and gated_deltanet what suits the device."""
    loops: AtLeast1 = 1
    """Times that the blocks are applied, with the same weights (shared recursion)."""
    loop_blocks: str = ""
    """"2:6" loops blocks 2 to 5 only. Empty = all."""
    inject: bool = False
    """Add the input of the looped blocks again before each further pass."""
    recursion_depth: AtLeast1 = 3
    """stacked_recursion: distinct sub-blocks, one after another."""
    attention_scales: list[int] = field(default_factory=lambda: [1, 2, 4])
    """multiscale_attention: tokens averaged to one key, for each scale."""
    attn_softcap: Annotated[float, Ge(0)] = 0.0
    """s > 0 replaces attention logits by s·tanh(logits/s). 0 = off (and SDPA is used)."""
    logit_softcap: Annotated[float, Ge(0)] = 0.0
    """s > 0 replaces output logits by s·tanh(logits/s). 0 = off."""
    bias: bool = False
    """Biases in Linear layers (and the shift of layernorm)."""
    dropout: Annotated[float, In("[0, 1)")] = 0.0
    """Probability of zeroing embeddings, attention weights and branch outputs in training, in [0, 1)."""
    res_scale: Literal["none", "attn", "both"] = "none"
    """Multiply branches by 1/sqrt(2·n_layer): none, attn (attention branch only) or both."""
    init: Literal["gpt2", "zero_out", "lm", "stack", "dt_small"] = "gpt2"
    """gpt2: N(0, 0.02), branch outputs / sqrt(branches in all). zero_out: N(0, 1/fan_in), embedding N(0, 1), branch
    outputs and head 0. lm: uniform ±1/sqrt(fan_in), branch outputs / sqrt(branches). stack: as gpt2, for mixers without
    MLP. dt_small: lm with longhorn's steps small."""

    def __post_init__(self):
        super().__post_init__()
        self.pattern = import_module(MIXERS).letters(self.pattern)
        if self.loop_blocks:
            match = re.fullmatch(r"(\d+):(\d+)", self.loop_blocks)
            if not match or not int(match[1]) < int(match[2]) <= self.n_layer:
                raise UserError(
                    f"model.loop_blocks = {self.loop_blocks!r} must be FIRST:END with 0 <= FIRST < END <= n_layer = "
                    f"{self.n_layer}, such as 0:{self.n_layer}."
                )

    @property
    def layers(self) -> str:
        """One letter per layer."""
        return "".join(self.pattern[i % len(self.pattern)] for i in range(self.n_layer))

    @property
    def looped(self) -> range:
        """The blocks that `loops` repeats."""
        return range(*map(int, self.loop_blocks.split(":"))) if self.loop_blocks else range(self.n_layer)

    @property
    def schedule(self) -> list[int]:
        """Which block is applied, one after another: 0, 1, …, with the looped range repeated."""
        loop = self.looped
        return [*range(loop.start), *(list(loop) * self.loops), *range(loop.stop, self.n_layer)]

    @property
    def ff_width(self) -> int:
        if self.d_ff:
            return self.d_ff
        return 64 * -(-(8 * self.d_model // 3) // 64) if self.mlp == "swiglu" else 4 * self.d_model
