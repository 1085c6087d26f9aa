"""Config: everything that defines a run, typed, strict and serialisable.

    defaults ← recipe (TOML) ← [preset.NAME] ← [smoke] ← the run it starts from ← dotted flags ← [baseline] when optim.name = "adamw"

`load_recipe` applies the layers in that order, but [baseline] only fills keys that no flag names, nor with --smoke [smoke].
A layer is a nested table with the sections of `Config`; every key is checked, whether it came from TOML or from the command
line, by the same function, so a typo reads the same everywhere. The string under a field is its help text.

Units    batches and budgets in tokens unless a name says `rows`; steps are optimizer steps.
Raises   UserError: unknown key (with the nearest valid one), wrong type, impossible value, unknown recipe or preset.
"""

import dataclasses
import difflib
import json
import math
import re
import tomllib
import typing
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from muonlm.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"


MIXERS = "muonlm.model.mixers"  # the table of an upper room, read without torch and not before it is asked

ELSEWHERE = {  # what other trainers call it -> our name
    "learning_rate": "lr",
    "weight_decay": "wd",
    "batch_size": "micro_batch",
    "gradient_accumulation_steps": "accum",
    "max_iters": "steps",
    "max_steps": "steps",
    "num_epochs": "epochs",
    "n_embd": "d_model",
    "hidden_size": "d_model",
    "num_layers": "n_layer",
    "dataset": "source",
    "eval_interval": "every",
    "warmup_iters": "warmup",
    "warmup_steps": "warmup",
    "context_length": "block_size",
    "seq_len": "block_size",
    "local_window": "window",
    "mixer": "pattern",
    "use_newton_schulz": "write_norm",
    "intermediate_size": "d_ff",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "d_inner": "expand",
    "headdim": "ssm_head",
    "head_dim": "ssm_head",
    "ngroups": "ssm_groups",
    "n_groups": "ssm_groups",
    "time_step_rank": "dt_rank",
    "ns_mode": "scan",
    "use_fast_path": "scan",
    "mamba_init": "tie",
    "chunk_size": "scan_chunk",
    "recursion": "recursion_depth",
}


def nearest(word: str, valid) -> str:
    """' Did you mean …?' with the closest valid word, else the empty string. The last part of a dotted key decides first."""
    valid = list(valid)
    leaf, leaves = _leaf(word).replace("-", "_"), {_leaf(v) for v in valid}
    leaf = ELSEWHERE.get(leaf, leaf) if leaf not in leaves else leaf
    if leaf in leaves:
        word = word.replace(_leaf(word), leaf)
    near = [leaf] if leaf in leaves else difflib.get_close_matches(leaf, leaves, n=3, cutoff=0.6)
    same = [v for v in valid if _leaf(v) in near]
    close = difflib.get_close_matches(word, same, n=1, cutoff=0.35)
    return f" Did you mean {close[0]!r}?" if close else ""


def _leaf(key: str) -> str:
    return key.lstrip("-").rpartition(".")[2]


def _choice(section: str, **fields) -> None:
    for name, (value, valid) in fields.items():
        if value not in valid:
            hint = nearest(str(value), valid) or f" Choose one of: {', '.join(valid)}."
            raise UserError(f"{section}.{name} = {value!r} is not known.{hint}")


def _at_least(section: str, low, **fields) -> None:
    for name, value in fields.items():
        if not value >= low:  # written so that NaN is refused too
            raise UserError(f"{section}.{name} = {value} must be at least {low}.")


@dataclass(kw_only=True)
class ModelConfig:
    kind: str = "lm"
    """lm: a residual stream of blocks that predicts the next token. modular: the small post-norm grokking transformer."""
    pattern: str = "A"
    """One letter per layer, tiled over the depth: A attention, W window attention, M mamba, D mamba2, L longhorn, G gated_deltanet; m, d, l, g their Muon forms; V gdn_velocity_ns, S multiscale_attention, R stacked_recursion. Or names: mamba,mamba,attention."""
    n_layer: int = 4
    """Blocks, ≥ 1."""
    d_model: int = 256
    """Width of the residual stream, a multiple of n_head."""
    n_head: int = 4
    """Query heads; head width is d_model / n_head."""
    n_kv_head: int = 0
    """Key/value heads (GQA), a divisor of n_head. 0 = n_head."""
    d_ff: int = 0
    """Inner width of the MLP. 0 = 4·d_model, or 64·ceil(⌊8·d_model/3⌋/64) for swiglu (equal parameters)."""
    vocab_size: int = 0
    """Rows of the embedding. 0 = the tokenizer's; larger pads (50257 → 50304), smaller is refused."""
    block_size: int = 256
    """Context in tokens: the length of a training row."""
    embed_conv: int = 0
    """Taps of a causal depthwise convolution over the embeddings, ≥ 2; lets the first layer see n-grams. 0 = none."""
    tie: bool = False
    """Use the embedding matrix as the output head."""
    mlp: str = "swiglu"
    """swiglu, relu2 (squared ReLU), gelu, or none: blocks of a mixer alone."""
    norm: str = "rmsnorm"
    """rmsnorm (learned gain), rmsnorm_plain (no parameters) or layernorm (gain; shift too if bias)."""
    norm_eps: float = 1e-6
    """Added to the mean square before the root."""
    positions: str = "rope"
    """rope (rotary) or learned (a table of block_size rows)."""
    rope_theta: float = 10000.0
    """Base of the rotary angles; larger suits longer contexts."""
    rotary_fraction: float = 1.0
    """Share of each head's dimensions that rotate, in (0, 1]."""
    qk_norm: bool = True
    """RMSNorm with gain on every query and key head, before RoPE. Bounds the attention logits."""
    qk_norm_eps: float = 1e-6
    """As norm_eps, for qk_norm."""
    window: int = 256
    """Keys that a W layer sees, itself included. 0 = all."""
    gated_delta_per_layer: int = -1
    """j > 0: layer i is gated_deltanet if j divides i, else attention (window attention if window > 0); replaces pattern."""
    muon_longhorn_per_layer: int = -1
    """The same for muon_longhorn."""
    longhorn_per_layer: int = -1
    """The same for longhorn."""
    d_state: int = 0
    """State (key) width N of M, L and D layers. 0 = 16, or 128 for mamba2."""
    d_conv: int = 4
    """Taps of the short causal convolution in recurrent layers, ≥ 1."""
    expand: int = 2
    """Inner width of M, L and D layers in multiples of d_model."""
    dt_rank: int = 0
    """Rank of the step-size projection of M and L layers. 0 = ceil(d_model / 16)."""
    ssm_head: int = 64
    """mamba2: value width of a head, a divisor of expand·d_model."""
    ssm_groups: int = 1
    """mamba2: groups of heads that share keys and queries, a divisor of the heads."""
    delta_heads: int = 9
    """gated_deltanet: heads (n_head belongs to attention)."""
    delta_key: int = 0
    """gated_deltanet: key width of a head. 0 = 0.75·d_model / delta_heads."""
    delta_value: int = 0
    """gated_deltanet: value width of a head. 0 = 2·delta_key."""
    neg_eigval: bool = False
    """gated_deltanet: write rates in (0, 2) instead of (0, 1), so that the state can turn over."""
    beta: float = 0.9
    """Muon forms (m, d, l, g, V): decay of the velocity, in [0, 1). 0 = no velocity."""
    alpha: float = 1.0
    """Muon forms: scale of the write, outside its normalisation."""
    write_norm: str = "newton_schulz"
    """Muon forms: newton_schulz, frobenius or none. A token's write has rank one: newton_schulz is frobenius times a constant (docs/mixers.md)."""
    ns_steps: int = 1
    """Muon forms: Newton-Schulz iterations on the write."""
    ns_poly: str = "quintic"
    """Muon forms: polynomial of those iterations, quintic or cubic."""
    write_eps: float = 1e-6
    """Muon forms: writes with a smaller norm are not scaled up to size one."""
    scan: str = "auto"
    """How recurrences are computed: auto, reference, chunked (PyTorch), cpu (numba) or triton."""
    scan_chunk: int = 0
    """Tokens between stored states of a scan; 0 = 64, or for mamba2 and gated_deltanet what suits the device."""
    loops: int = 1
    """Times that the blocks are applied, with the same weights (shared recursion)."""
    loop_blocks: str = ""
    """"2:6" loops blocks 2 to 5 only. Empty = all."""
    inject: bool = False
    """Add the input of the looped blocks again before each further pass."""
    recursion_depth: int = 3
    """stacked_recursion: distinct sub-blocks, one after another."""
    attention_scales: list[int] = field(default_factory=lambda: [1, 2, 4])
    """multiscale_attention: tokens averaged to one key, for each scale."""
    attn_softcap: float = 0.0
    """s > 0 replaces attention logits by s·tanh(logits/s). 0 = off (and SDPA is used)."""
    logit_softcap: float = 0.0
    """s > 0 replaces output logits by s·tanh(logits/s). 0 = off."""
    bias: bool = False
    """Biases in Linear layers (and the shift of layernorm)."""
    dropout: float = 0.0
    """Probability of zeroing embeddings, attention weights and branch outputs in training, in [0, 1)."""
    res_scale: str = "none"
    """Multiply branches by 1/sqrt(2·n_layer): none, attn (attention branch only) or both."""
    init: str = "gpt2"
    """gpt2: N(0, 0.02), branch outputs / sqrt(branches in all). zero_out: N(0, 1/fan_in), embedding N(0, 1), branch outputs and head 0. lm: uniform ±1/sqrt(fan_in), branch outputs / sqrt(branches). stack: as gpt2, for mixers without MLP. dt_small: lm with longhorn's steps small."""

    def __post_init__(self):
        _choice(
            "model",
            kind=(self.kind, ("lm", "modular")),
            mlp=(self.mlp, ("swiglu", "relu2", "gelu", "none")),
            norm=(self.norm, ("rmsnorm", "rmsnorm_plain", "layernorm")),
            init=(self.init, ("gpt2", "zero_out", "lm", "stack", "dt_small")),
            write_norm=(self.write_norm, ("newton_schulz", "frobenius", "none")),
            ns_poly=(self.ns_poly, ("quintic", "cubic")),
            scan=(self.scan, ("auto", "reference", "chunked", "cpu", "triton")),
            positions=(self.positions, ("rope", "learned")),
            res_scale=(self.res_scale, ("none", "attn", "both")),
        )
        self.pattern = self._selected() or import_module(MIXERS).letters(self.pattern)
        positive = "n_layer d_model n_head d_conv expand ssm_head ssm_groups delta_heads ns_steps loops recursion_depth"
        _at_least("model", 1, **{name: getattr(self, name) for name in positive.split()})
        _at_least("model", 2, block_size=self.block_size)
        _at_least(
            "model",
            0,
            n_kv_head=self.n_kv_head,
            d_ff=self.d_ff,
            embed_conv=self.embed_conv,
            vocab_size=self.vocab_size,
            attn_softcap=self.attn_softcap,
            logit_softcap=self.logit_softcap,
            window=self.window,
            d_state=self.d_state,
            dt_rank=self.dt_rank,
            delta_key=self.delta_key,
            delta_value=self.delta_value,
            scan_chunk=self.scan_chunk,
            alpha=self.alpha,
        )
        self._check_recurrent()
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout = {self.dropout} must be in [0, 1).")
        if not 0 < self.rotary_fraction <= 1:
            raise UserError(f"model.rotary_fraction = {self.rotary_fraction} must be in (0, 1].")

    def _selected(self) -> str:
        """The pattern that one of the *_per_layer selectors asks for; empty if none does."""
        selectors = {"G": "gated_delta_per_layer", "l": "muon_longhorn_per_layer", "L": "longhorn_per_layer"}
        for key in selectors.values():
            if getattr(self, key) < 1 and getattr(self, key) != -1:
                raise UserError(f"model.{key} = {getattr(self, key)} must be -1 (off), or 1 or more.")
        active = {letter: key for letter, key in selectors.items() if getattr(self, key) > 0}
        if len(active) > 1:
            raise UserError(
                f"model.{' and model.'.join(active.values())} both choose the mixers; set all but one to -1."
            )
        pattern = "".join(
            letter + ("W" if self.window else "A") * (getattr(self, key) - 1) for letter, key in active.items()
        )
        for key in active.values():
            setattr(self, key, -1)  # said once: from here on the pattern alone counts
        return pattern

    def _check_recurrent(self) -> None:
        if not 0 <= self.beta < 1:
            raise UserError(f"model.beta = {self.beta} must be in [0, 1).")
        if (
            not 1e-18 <= self.write_eps < float("inf")
        ):  # its square must not vanish in fp32: a silent token's gradient would be 0 · ∞
            raise UserError(f"model.write_eps = {self.write_eps} must be at least 1e-18; 1e-6 is usual.")
        if not self.alpha < float("inf"):
            raise UserError(f"model.alpha = {self.alpha} must be finite.")
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


@dataclass(kw_only=True)
class DataConfig:
    source: str = ""
    """What to train on: a .txt, .jsonl or .parquet file, a folder, a glob, a folder made by `muonlm prep`, `sotu`, `modular` or `recall`. `--data X` is short for it."""
    tokenizer: str = "bpe:4096"
    """byte, char, bpe:N (trained on the text), bpe:N:digits (each digit a token), gpt2:MERGES_FILE, or a tokenizer.json. Ignored for prepared folders."""
    columns: str = "text"
    """Column(s) of .jsonl and .parquet rows that hold the text, separated by commas; `text` also means `content` where there is no `text`. Of conversations: the columns to read, if not all."""
    val: str = "hash:0.01"
    """Held-out part: hash:F (documents chosen by a hash of their text), tail:F (the last F of the characters), or a path."""
    name: str = ""
    """Configuration of a Hugging Face data set, such as sample-10BT. Empty = the usual one."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    num_tokens: int = 0
    """Stop preparing text after so many training tokens; 1e8 is accepted. 0 = all of it (refused for a Hugging Face data set)."""
    special: str = ""
    """More special tokens for a tokenizer made here, separated by commas: "<|im_start|>,<|im_end|>"."""
    reset: bool = False
    """Text: documents in one row do not see each other (attention is masked, states begin anew)."""
    template: str = ""
    """Conversations (objectives sft and dpo): minimind-chatml, alpaca-plain, alpaca-stanford, qa, think, stepwise, or a .toml file. Empty = the parent's, else qa."""
    pack: bool = True
    """Conversations: several to a row, without seeing each other. false = one a row."""
    overlong: str = "cut"
    """Conversations longer than a row: cut them, or drop them (both are counted)."""
    op: str = "x/y"
    """modular data: the operation, one of those in families.md §4f."""
    prime: int = 223
    """modular data: the modulus."""
    train_fraction: float = 0.5
    """modular data: share of all pairs that is trained on."""
    operations: int = 9
    """modular data: operation tokens in the vocabulary: 9, or 6 for the plan's version."""
    pairs: int = 8
    """recall data: key-value pairs in a row, each asked for once."""
    symbols: int = 256
    """recall data: tokens in the vocabulary, half of them keys and half values."""

    def __post_init__(self):
        _choice("data", overlong=(self.overlong, ("cut", "drop")))
        _at_least("data", 0, num_tokens=self.num_tokens)
        for name in ("source", "tokenizer", "val", "template"):  # a run must find its text again from any folder
            value = getattr(self, name)
            if "/" in value and Path(value).exists() or Path(value).suffix and Path(value).is_file():
                setattr(self, name, str(Path(value).resolve()))
        if not 0 < self.train_fraction < 1:
            raise UserError(f"data.train_fraction = {self.train_fraction} must be between 0 and 1.")


@dataclass(kw_only=True)
class OptimConfig:
    name: str = "muon"
    """muon (matrices) with AdamW (everything else), or adamw for everything, with the recipe's [baseline] settings."""
    lr: float = 0.02
    """Peak rate. muon: spectral norm per step of a square matrix (see lr_mode). adamw: of every parameter. ×2 / ÷2 first."""
    wd: float = 0.0
    """Decoupled weight decay of the matrices, per unit of rate. Raising it shrinks weights."""
    decay: str = "2d"
    """name = adamw: 2d decays matrices only; all decays norms, biases and positions as well."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging constants."""
    eps: float = 1e-8
    """AdamW's denominator floor."""
    grad_clip: float = 1.0
    """Largest global gradient norm (clip_mode clip)."""
    clip_mode: str = "clip"
    """clip, normalize_per_param (each tensor's gradient scaled to norm 1) or off."""

    def __post_init__(self):
        _choice(
            "optim",
            name=(self.name, ("muon", "adamw")),
            decay=(self.decay, ("2d", "all")),
            clip_mode=(self.clip_mode, ("clip", "normalize_per_param", "off")),
        )
        for name in ("lr", "grad_clip", "eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"optim.{name} = {getattr(self, name)} must be a finite number above 0.")
        _at_least("optim", 0, wd=self.wd)
        for value in self.betas:
            if not 0 <= value < 1:
                raise UserError(f"optim.betas = {value} must be in [0, 1).")


@dataclass(kw_only=True)
class MuonConfig:
    adamw_lr: float = 3e-3
    """Peak AdamW rate of what Muon does not take, unless one of the next three says otherwise."""
    embed_lr: float = 0.0
    """AdamW rate of the embedding (and of a tied head). 0 = adamw_lr."""
    head_lr: float = 0.0
    """AdamW rate of the output head. 0 = adamw_lr."""
    scalar_lr: float = 0.0
    """AdamW rate of norms, biases and other vectors. 0 = adamw_lr."""
    momentum: float = 0.95
    """Muon's momentum after its warm-up, in [0, 1)."""
    momentum_warmup: str = ""
    """"0.85:0.95:300" raises momentum linearly from .85 to .95 over 300 steps. Empty = constant."""
    momentum_form: str = "ema"
    """ema averages gradients (Keller, torch); classical sums them (Moonlight, Dion). Same direction at constant momentum."""
    nesterov: bool = True
    """Look one momentum step ahead (Muon)."""
    variant: str = "muon"
    """muon, normuon (rows evened out by a second moment), adamuon (all entries) or hyperball (weights keep their norm; wd 0)."""
    beta2: float = 0.95
    """Averaging constant of the second moment of normuon and adamuon."""
    adamw_wd: float = 0.0
    """Decoupled weight decay of AdamW's embedding and head beside Muon."""
    cautious: bool = False
    """Decay only coordinates whose update also shrinks them (Muon)."""
    wd_follows_lr: bool = False
    """Scale Muon's wd with the schedule of its rate as well."""
    ns_steps: int = 5
    """Newton–Schulz iterations, 1–99. More is closer to orthogonal and costs time."""
    coefficients: str = "polar_express"
    """Newton–Schulz polynomial: polar_express, keller, you, cans, … (optim/muon/newton_schulz.py)."""
    ns_method: str = "auto"
    """direct, hybrid, gram, aol or cayley (optim/muon/newton_schulz.py). auto: direct, hybrid or gram, what a timing probe prefers."""
    ns_dtype: str = "auto"
    """Newton–Schulz in float32 or bfloat16. auto: float32 if train.dtype says float32, else on CPU what a timing probe prefers."""
    adaptive_ns: bool = False
    """Experiment: 3 to 8 Newton-Schulz steps per matrix, by its measured spectrum (needs log.diagnostics)."""
    state_dtype: str = "float32"
    """Muon's momentum in float32, or in bfloat16 for half the memory."""
    lr_mode: str = "original"
    """Shape multiplier: original √max(1, rows/cols), match_rms_adamw 0.2·√max(rows, cols), spectral √(rows/cols), none 1."""
    split_fused: bool = True
    """Orthogonalise q, k, v (gate, up) of a fused matrix apart."""
    per_head: bool = False
    """Orthogonalise each attention head apart: cheaper, often steadier."""
    route: list[str] = field(default_factory=list)
    """Overrides "regex=muon", "regex=adamw" or "regex=exclude", first match wins."""
    clip_scope: str = "aux"
    """Whom clip_mode clip scales: aux (AdamW's tensors; Newton-Schulz forgets the scale anyway) or all. The norm is that of all."""
    qk_clip: float = 0.0
    """Shrink query and key weights of heads whose largest attention logit exceeds this (100 is usual; MuonClip). 0 = off."""

    def __post_init__(self):
        _choice(
            "muon",
            momentum_form=(self.momentum_form, ("ema", "classical")),
            variant=(self.variant, ("muon", "normuon", "adamuon", "hyperball")),
            ns_method=(self.ns_method, ("auto", "direct", "hybrid", "gram", "aol", "cayley")),
            ns_dtype=(self.ns_dtype, ("auto", "float32", "bfloat16")),
            state_dtype=(self.state_dtype, ("float32", "bfloat16")),
            clip_scope=(self.clip_scope, ("aux", "all")),
            lr_mode=(self.lr_mode, ("original", "match_rms_adamw", "spectral", "none")),
        )
        if not 0 < self.adamw_lr < float("inf"):
            raise UserError(f"muon.adamw_lr = {self.adamw_lr} must be a finite number above 0.")
        _at_least(
            "muon",
            0,
            embed_lr=self.embed_lr,
            head_lr=self.head_lr,
            scalar_lr=self.scalar_lr,
            adamw_wd=self.adamw_wd,
            qk_clip=self.qk_clip,
        )
        if not 0 <= self.momentum < 1:
            raise UserError(f"muon.momentum = {self.momentum} must be in [0, 1).")
        if not 1 <= self.ns_steps <= 99:
            raise UserError(f"muon.ns_steps = {self.ns_steps} must be between 1 and 99; 5 is usual.")
        for rule in self.route:
            if rule.rpartition("=")[2] not in ("muon", "adamw", "exclude"):
                raise UserError(
                    f'muon.route entry {rule!r} must end in =muon, =adamw or =exclude, as in "blocks.0=adamw".'
                )


@dataclass(kw_only=True)
class SchedConfig:
    kind: str = "wsd"
    """wsd (warm-up, constant, linear cool-down), cosine, linear or constant."""
    warmup: int = 0
    """Steps of linear warm-up from 0 to the peak rate."""
    cooldown_frac: float = 0.4
    """wsd: share of the steps spent cooling down, in [0, 1]."""
    end_factor: float = 0.0
    """Rate at the last step, as a share of the peak."""

    def __post_init__(self):
        _choice("sched", kind=(self.kind, ("wsd", "cosine", "linear", "constant")))
        _at_least("sched", 0, warmup=self.warmup, end_factor=self.end_factor)
        if not 0 <= self.cooldown_frac <= 1:
            raise UserError(f"sched.cooldown_frac = {self.cooldown_frac} must be in [0, 1].")


@dataclass(kw_only=True)
class TrainConfig:
    objective: str = "next_token"
    """next_token; sft (conversations: only the assistant's tokens count); dpo (preferences, see [dpo]); classify (the answer after the last position); recall (with --data recall: only the answers count)."""
    steps: int = 0
    """Optimizer steps. 0 = derived from epochs, tokens or budget."""
    epochs: float = 0.0
    """Passes over the training split, or over `tokens` if those are given too."""
    tokens: int = 0
    """Training tokens in all, or with epochs those of one epoch (a stream's length, say); 1e8 is accepted."""
    budget: str = ""
    """"tsz512x4k_10B": 512 rows × 4096 tokens a step, 10 billion tokens in all."""
    micro_batch: int = 0
    """Rows per forward pass on one device. 0 = the whole share of the step. Lower it to save memory; losses do not change."""
    global_batch: int = 0
    """Tokens per optimizer step over all devices, a multiple of block_size. 0 = micro_batch × accum × world × block_size."""
    accum: int = 0
    """Micro-batches per step and device: another way to say global_batch."""
    dtype: str = "auto"
    """auto, float32 or bfloat16 autocast (weights stay fp32). auto: bfloat16 on GPUs that have it; on CPU what a timing probe prefers."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    compile: bool = False
    """torch.compile the model: worth it on GPUs, 20–50 s of waiting on a CPU."""
    recompute: bool = False
    """Keep only the input of each block and run the block again in the backward pass: long rows in little memory, for a third more time."""
    save_every: int = 0
    """Steps between checkpoints. 0 = only at the end (and when interrupted)."""
    keep: int = 2
    """Checkpoints to keep besides the best, ≥ 1."""

    def __post_init__(self):
        _choice(
            "train",
            objective=(self.objective, ("next_token", "sft", "dpo", "classify", "recall")),
            dtype=(self.dtype, ("auto", "float32", "bfloat16")),
            device=(self.device.partition(":")[0], ("auto", "cpu", "cuda", "mps")),
        )
        _at_least(
            "train",
            0,
            steps=self.steps,
            epochs=self.epochs,
            tokens=self.tokens,
            micro_batch=self.micro_batch,
            global_batch=self.global_batch,
            accum=self.accum,
            save_every=self.save_every,
        )
        _at_least("train", 1, keep=self.keep)
        lengths = [name for name in ("steps", "epochs", "tokens", "budget") if getattr(self, name)]
        if len(lengths) > 1 and lengths != ["epochs", "tokens"]:
            raise UserError(
                f"train.{' and train.'.join(lengths)} both set the length of the run; keep one (set the other to 0)."
            )
        if self.budget:
            self.parse_budget()

    def fixed_steps(self, tokens_per_step: int) -> int:
        """Steps that follow without knowing the data; 0 if its size decides. Epochs of so many tokens end in no short batch."""
        if self.steps or self.budget:
            return self.steps or max(1, self.parse_budget()[1] // tokens_per_step)
        if self.epochs and self.tokens:
            return math.ceil(self.epochs * max(1, self.tokens // tokens_per_step))
        return -(-self.tokens // tokens_per_step)

    def parse_budget(self) -> tuple[int, int]:
        """'tsz512x4k_10B' -> (tokens per step, tokens in all)."""
        match = re.fullmatch(r"tsz(\d+)x(\d+)k_(\d+(?:\.\d+)?)([MB])", self.budget)
        if not match:
            raise UserError(
                f"train.budget = {self.budget!r} is not a budget; write ROWSxLENGTHk_TOKENS like tsz512x4k_10B."
            )
        rows, length, total, unit = match.groups()
        return int(rows) * int(length) * 1024, int(float(total) * {"M": 1e6, "B": 1e9}[unit])


@dataclass(kw_only=True)
class DPOConfig:
    beta: float = 0.1
    """How far the model may move from the reference: larger keeps it closer. Above 0."""
    label_smoothing: float = 0.0
    """Share of preferences taken to be the wrong way round, in [0, 0.5)."""
    length_normalize: bool = False
    """Mean log-probability of an answer's tokens instead of their sum."""
    reference: str = "cached"
    """cached: the reference's log-probabilities are computed once and kept with the data. model: the reference stays in memory."""

    def __post_init__(self):
        _choice("dpo", reference=(self.reference, ("cached", "model")))
        if not 0 < self.beta < float("inf"):
            raise UserError(f"dpo.beta = {self.beta} must be a finite number above 0; 0.1 is usual.")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"dpo.label_smoothing = {self.label_smoothing} must be in [0, 0.5).")


@dataclass(kw_only=True)
class EvalConfig:
    every: int = 0
    """Steps between evaluations. 0 = only at the end."""
    iters: int = 0
    """Held-out batches per evaluation. 0 = the whole held-out split."""
    rows: int = 0
    """Rows per evaluation batch. 0 = as many as make 16,384 tokens."""
    target: float = 0.0
    """Stop once an evaluation reaches this held-out loss (nats per token). 0 = train to the end."""
    sample: int = 200
    """Tokens of the sample written at the end. 0 = none."""
    prompt: str = ""
    """Text that the sample continues."""

    def __post_init__(self):
        _at_least("eval", 0, every=self.every, iters=self.iters, rows=self.rows, target=self.target, sample=self.sample)


@dataclass(kw_only=True)
class LogConfig:
    every: int = 10
    """Steps between lines of metrics.jsonl (the console's live line follows them)."""
    diagnostics: int = 100
    """Steps between measurements of Muon (update sizes, orthogonality, advice; optim/watch/diagnostics.py). 0 = off."""
    spectra: int = 1000
    """Steps between spectra of one layer's momentum, rounded up to a multiple of diagnostics. 0 = none."""
    advice: bool = True
    """Say what the measurements suggest: a rate that is too high, a layer that does not move, …"""

    def __post_init__(self):
        _at_least("log", 1, every=self.every)
        _at_least("log", 0, diagnostics=self.diagnostics, spectra=self.spectra)


@dataclass(kw_only=True)
class Config:
    """A run, completely. `recipe` and `baseline` record where it came from."""

    recipe: str = ""
    """Name or path of the recipe."""
    seed: int = 1337
    """Drives initialisation, data order, dropout and sampling."""
    track: str = "none"
    """none, wandb, trackio or tensorboard, beside metrics.jsonl."""
    parent: str = ""
    """Recipe whose newest finished run this stage starts from; --init-from RUN names another."""
    init_from: str = ""
    """Run or checkpoint whose weights this run started from."""
    shrunk: bool = False
    """Made by --smoke: no stage takes it for its parent, but another that is made by --smoke."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    sched: SchedConfig = field(default_factory=SchedConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self):
        _choice("config", track=(self.track, ("none", "wandb", "trackio", "tensorboard")))

    def to_dict(self) -> dict:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, tree: dict, where: str = "config.json") -> "Config":
        """The config of a nested table, of flat dotted keys, or of both."""
        return _build(cls, tree, where)

    def to_toml(self) -> str:
        """The fully resolved recipe, to copy and edit."""
        tree, lines = self.to_dict(), []
        lines += [f"{key} = {_toml_value(value)}" for key, value in tree.items() if not isinstance(value, dict)]
        for section, table in tree.items():
            if isinstance(table, dict):
                lines += ["", f"[{section}]"] + [f"{key} = {_toml_value(value)}" for key, value in table.items()]
        return "\n".join(lines) + "\n"


def upgrade(tree: dict) -> dict:
    """The config.json of an older run in today's keys: until 2026-11-26 Muon's own settings stood in [optim]."""
    own = typing.get_type_hints(MuonConfig).keys()
    optim, muon = dict(tree.get("optim", {})), dict(tree.get("muon", {}))
    muon |= {key: optim.pop(key) for key in list(optim) if key in own}
    return tree | {"optim": optim, "muon": muon}


def _toml_value(value) -> str:
    return json.dumps(value, ensure_ascii=False)  # strings, numbers, booleans and lists of them are written as in JSON


def keys() -> dict[str, type]:
    """Every dotted key of a config with its type: {'seed': int, 'model.n_layer': int, …}."""
    found = {}
    for name, kind in typing.get_type_hints(Config).items():
        if dataclasses.is_dataclass(kind):
            found |= {f"{name}.{leaf}": leaf_kind for leaf, leaf_kind in typing.get_type_hints(kind).items()}
        else:
            found[name] = kind
    return found


def _convert(key: str, value, kind, where: str):
    """`value` (from TOML, JSON or a flag's text) as `kind`, or a UserError that names the key and the place."""
    wrong = UserError(f"{key} = {value!r} ({where}) should be {_describe(kind)}.")
    if key == "model.pattern" and isinstance(value, list) and all(isinstance(name, str) for name in value):
        return ",".join(value)  # names, as TOML writes them
    if typing.get_origin(kind) in (list, tuple):
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise wrong
        args = typing.get_args(kind)
        if typing.get_origin(kind) is tuple:
            if len(value) != len(args):
                raise wrong
            return tuple(_convert(key, item, arg, where) for item, arg in zip(value, args))
        return [_convert(key, item, args[0], where) for item in value]
    try:
        if kind is bool:
            text = str(value).lower()
            if text in ("true", "yes", "on", "1"):
                return True
            if text in ("false", "no", "off", "0"):
                return False
            raise wrong
        if isinstance(value, bool):
            raise wrong
        if kind is str:
            if not isinstance(value, str):
                raise wrong
            return value
        if kind is int:
            number = float(value) if isinstance(value, (str, float)) else value  # "1e8" and "20_000" are whole numbers
            if number != int(number):
                raise wrong
            return int(str(value).replace("_", "")) if re.fullmatch(r"-?[\d_]+", str(value)) else int(number)
        number = float(value)
        if not math.isfinite(number):
            raise wrong
        return number
    except (TypeError, ValueError, OverflowError):
        raise wrong from None


def _describe(kind) -> str:
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind in plain:
        return plain[kind]
    inner = typing.get_args(kind)
    return f"{len(inner)} numbers separated by a comma" if typing.get_origin(kind) is tuple else "a list"


def flatten(tree: dict, prefix: str = "") -> dict:
    """{'a': {'b': 1}} -> {'a.b': 1}; hyphens in keys become underscores."""
    flat = {}
    for key, value in tree.items():
        name = prefix + str(key).replace("-", "_")
        flat |= flatten(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat


def _check(layer: dict, where: str) -> dict:
    """The flat layer with converted values; unknown keys are refused with the nearest valid one."""
    valid = keys()
    for key in layer:
        if key not in valid:
            sections = sorted({name.partition(".")[0] for name in valid if "." in name})
            if key in sections:
                raise UserError(
                    f"{key!r} ({where}) is a section; name one of its keys, such as "
                    f"{next(name for name in valid if name.startswith(key + '.'))!r}."
                )
            raise UserError(
                f"unknown key {key!r} ({where}).{nearest(key, valid) or ' `muonlm info --keys` lists all keys.'}"
            )
    return {key: _convert(key, value, valid[key], where) for key, value in layer.items()}


def _build(cls, tree: dict, where: str) -> "Config":
    flat = _check(flatten(tree), where)
    sections: dict[str, dict] = {}
    top = {}
    for key, value in flat.items():
        section, dot, leaf = key.partition(".")
        if dot:
            sections.setdefault(section, {})[leaf] = value
        else:
            top[key] = value
    hints = typing.get_type_hints(cls)
    return cls(**top, **{name: hints[name](**table) for name, table in sections.items()})


# --- recipes ------------------------------------------------------------------------------------------------------------------

SMOKE = {  # every recipe with --smoke: tiny, on a CPU, under a minute, all artefacts written; a recipe's [smoke] adds to it
    "model.n_layer": 2,
    "model.d_model": 64,
    "model.n_head": 2,
    "model.n_kv_head": 0,
    "model.d_ff": 0,
    "model.block_size": 64,
    "model.window": 32,
    "model.vocab_size": 0,
    "train.steps": 30,
    "train.epochs": 0,
    "train.tokens": 0,
    "train.budget": "",
    "train.global_batch": 512,
    "train.micro_batch": 0,
    "train.accum": 0,
    "train.save_every": 10,
    "train.dtype": "float32",
    "train.device": "cpu",
    "eval.every": 10,
    "eval.iters": 4,
    "eval.sample": 40,
    "log.every": 5,
    "data.tokenizer": "byte",
    "sched.warmup": 1,
    "muon.momentum_warmup": "0.85:0.95:10",
    "eval.target": 0,
}


# Ways of saying how long a run is, and how large a step; one that is given replaces another. The values say nothing.
LENGTHS = {"train.steps": 0, "train.epochs": 0.0, "train.tokens": 0, "train.budget": ""}
SIZES = {"train.global_batch": 0, "train.accum": 0}


def recipe_names() -> list[str]:
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.toml"))


def read_recipe(name: str, seen: tuple[str, ...] = ()) -> dict:
    """The TOML tree of a packaged recipe or of the user's own file, laid over the one that it `extends`."""
    path = RECIPES / f"{name}.toml"
    if name not in recipe_names():
        path = Path(name)
        if not path.is_file():
            if path.suffix == ".toml":
                raise UserError(f"recipe file {name!r} does not exist (looked in {Path.cwd()}).")
            family = [known for known in recipe_names() if known.startswith(name + "/")]
            hint = (
                f" Members of that family: {', '.join(family)}."
                if family
                else f" Published names are presets: muonssm/published --preset {name}."
                if name in read_recipe("muonssm/published")["preset"]
                else nearest(name, recipe_names())
                or f" Known: {', '.join(recipe_names())}; or give the path of a .toml file."
            )
            raise UserError(f"unknown recipe {name!r}.{hint}")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from None
    if parent := tree.pop("extends", ""):
        if name in seen:
            raise UserError(f"recipes extend each other in a circle: {' → '.join([*seen, name])}.")
        tree = _merge(read_recipe(parent, (*seen, name)), tree)
    return tree


def _merge(base: dict, over: dict) -> dict:
    return base | {
        key: _merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in over.items()
    }


def load_recipe(
    name: str = "quickstart",
    flags: dict | None = None,
    *,
    preset: str = "",
    smoke: bool = False,
    presets: dict | None = None,
    inherited: dict | None = None,
) -> Config:
    """Config of a recipe with the layers of this module's docstring applied. `flags` maps dotted keys to values.

    presets    more of them, {name: table}: the user's own (presets.py); a name of theirs comes before the recipe's
    inherited  keys from the run that a stage starts from (training/stages.py)
    """
    tree = read_recipe(name)
    where = f"recipe {name}"
    presets = tree.pop("preset", {}) | (presets or {})
    baseline = _check(flatten(tree.pop("baseline", {})), f"{where} [baseline]")
    own_smoke = _check(flatten(tree.pop("smoke", {})), f"{where} [smoke]")
    layer = _check(flatten(tree), where) | {"recipe": name}
    if preset and preset not in presets:
        known = f" Known: {', '.join(presets)}." if presets else " This recipe has none."
        raise UserError(f"recipe {name} has no preset {preset!r}.{nearest(preset, presets)}{known}")
    tuned = dict(presets.get(preset, {}))
    baseline |= _check(flatten(tuned.pop("baseline", {})), f"{where} [preset.{preset}.baseline]")
    chosen = _check(flatten(tuned), f"{where} [preset.{preset}]")
    given = _check({key.replace("-", "_"): value for key, value in (flags or {}).items()}, "command line")
    layer |= chosen
    if smoke:
        layer["shrunk"] = True
        layer |= {
            k: v
            for k, v in SMOKE.items()
            if layer.get("model.kind") != "modular" or not k.startswith(("model", "data"))
        } | own_smoke
        baseline = {k: v for k, v in baseline.items() if k not in SMOKE | own_smoke}
    if smoke and not given.get("data.source") and not layer.get("data.source"):
        layer["data.source"] = "sotu"  # a recipe that brings no text is tried on the speeches
    if inherited:
        layer |= {key: value for key, value in inherited.items() if key != "data.template" or not layer.get(key)}
    if "model.pattern" in given:
        layer = {key: value for key, value in layer.items() if not key.endswith("_per_layer")}
    if LENGTHS.keys() & given.keys():  # a flag that sets the run's length replaces the recipe's way of saying it
        layer = {key: value for key, value in layer.items() if key not in LENGTHS}
    if SIZES.keys() & given.keys() or given.get("train.budget"):
        layer = {key: value for key, value in layer.items() if key not in SIZES}
    layer |= given
    if layer.get("optim.name") == "adamw":
        layer |= {key: value for key, value in baseline.items() if key not in given}
    return _build(Config, layer, where)
