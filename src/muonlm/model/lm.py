"""Language model: embedding, residual stream through blocks, final norm, output head.

    h₀ = E[tokens] (+ P[position]), or norm(conv(E[tokens])) with a short causal convolution
    h_l = block_l(h_{l−1})        logits = c(norm(h_L) Wᵀ),  c(z) = z or s·tanh(z/s)

Loops    cfg.loops passes over the blocks (or a range of them) share weights, never state: a state per application,
         since one that was shared would make a step after a prefill differ from a longer prefill. cfg.loops may
         change between runs.
Shapes   tokens, targets (B,T) int64 · logits (B,T,V) · state: one per applied block, the convolution's, tokens seen
Masks    (B,T) bool: a masked token is deleted. Rows are compacted once, real tokens first, and the output is put back.
Packing  segments (B,T): a token sees the tokens of its own segment only (packing.py); −1 = padding.
Loss     with `targets`, forward returns Σ −log p(target) over targets ≥ 0, in fp32 nats, instead of logits: one call
         holds the whole differentiable path, which data-parallel wrappers need. With `per_token`, the terms (B,T)
         instead of their sum. Logits are made and thrown away in chunks of rows, so memory is O(chunk·V), not
         O(B·T·V): on a GPU with their gradient (loss.py), elsewhere, and for the terms, to be made again in backward.
Init     init.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from muonlm.config.schema import ModelConfig
from muonlm.scan import keep_out_of_graphs

from . import loss
from .block import Block
from .conv import ShortConv
from .init import fill
from .mixers import MIXERS
from .norm import RMSNorm, at_least_fp32, make_norm
from .packing import Segments, compact

LOGITS_PER_CHUNK = 1 << 24  # 64 MiB of fp32 logits at a time


def run_block(block: Block, x: Tensor) -> Tensor:
    """x after a block in training. What `LM.compile` compiles: given the block, not bound to it, one graph serves all
    blocks of a kind. No state leaves it: that of attention counts tokens on the CPU, and on a GPU the graph would wait
    for a C++ compiler.
    """
    return block(x, None, None, None)[0]


class LM(nn.Module):
    can_tie = True

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        assert cfg.vocab_size > 0, "vocab_size is derived from the tokenizer before the model is built"
        self.cfg = cfg
        self.recompute = False  # keep only the input of each block for the backward pass, which runs the block again
        self.run_block, self.chunk_loss = run_block, LM._chunk_loss  # as training without packed rows calls them
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.conv = ShortConv(cfg.d_model, cfg.embed_conv) if cfg.embed_conv else None
        self.conv_norm = RMSNorm(cfg.d_model, eps=cfg.norm_eps, gain=False) if cfg.embed_conv else None
        self.positions = nn.Parameter(torch.empty(cfg.block_size, cfg.d_model)) if cfg.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(cfg, letter) for letter in cfg.layers)
        self.norm = make_norm(cfg)
        self.head = None if cfg.tie else nn.Linear(cfg.d_model, cfg.vocab_size, bias=False)

    @staticmethod
    def check(cfg: ModelConfig) -> None:
        """Raise UserError if a mixer of cfg cannot be built; so does building on meta, which needs a vocab_size."""
        for letter in cfg.layers:
            MIXERS[letter].load().check(cfg)

    @property
    def schedule(self) -> list[int]:
        """Which block is applied, one after another."""
        return self.cfg.schedule

    def compile(self, **options) -> None:
        """Let torch.compile (with its `options`) run what training repeats: a graph for all blocks of a kind, and one
        for the loss where that is no kernel already (loss.py). It takes a fraction of the time that a graph of the
        whole model takes. Evaluation, generation and packed rows, whose shapes change all the time, run as before.
        """
        keep_out_of_graphs()
        self.run_block = torch.compile(run_block, **options)
        self.chunk_loss = torch.compile(LM._chunk_loss, **options)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        state: list | None = None,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        per_token: bool = False,
    ):
        """The loss if `targets` are given, else (logits, state); packed rows give no state."""
        assert segments is None or (state is None and mask is None), "packed rows carry no state and mark padding as −1"
        rows = None if segments is None else Segments(segments)
        x = self.embed(tokens)
        *layers, conv_state, count = [None] * (len(self.schedule) + 2) if state is None else state
        undo = None
        if mask is not None:
            x, lengths, undo = compact(x, mask)
            mask = None if lengths is None else torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        if self.conv is not None:
            if rows is None:
                x, conv_state = self.conv(x, conv_state, mask)
            else:
                x = rows.apply(lambda part: self.conv(part)[0], x)
            x = self.conv_norm(x)
        if self.positions is not None:
            x = x + (self._positions(x, count, mask) if rows is None else self.positions[rows.positions])
        if self.cfg.dropout:
            x = F.dropout(x, self.cfg.dropout, self.training)
        first, entering, states = self.cfg.looped.start, None, []
        training = targets is not None and torch.is_grad_enabled()
        plain = training and mask is None and rows is None and state is None
        for i, layer in zip(self.schedule, layers):
            if i == first and self.cfg.inject:  # once for each pass over the looped blocks
                x = x if entering is None else x + entering
                entering = x if entering is None else entering
            if plain and self.recompute:
                x = checkpoint(self.run_block, self.blocks[i], x, use_reentrant=False)
            elif plain:
                x = self.run_block(self.blocks[i], x)
            elif training and self.recompute:
                x, layer = checkpoint(self.blocks[i], x, layer, mask, rows, use_reentrant=False)
            else:
                x, layer = self.blocks[i](x, layer, mask, rows)
            if targets is None:
                states.append(layer)
        x = self.norm(x if undo is None else undo(x))
        if targets is not None:
            return self._loss(x, targets, per_token, sparse=rows is not None)
        if rows is not None:
            return self._logits(x), None
        # tokens seen are kept on the CPU, where the next call asks for them
        new = torch.full((len(tokens),), tokens.shape[1]) if mask is None else mask.sum(1).cpu()
        conv_state = x.new_zeros(len(x), 0) if conv_state is None else conv_state  # a state is tensors only
        return self._logits(x), [*states, conv_state, new if count is None else count + new]

    @property
    def context(self) -> int | None:
        """Tokens that a continuation may look back on; None where all layers carry a state of constant size."""
        spans = [block.mixer.look_back for block in self.blocks]
        spans.append(None if self.positions is None else len(self.positions))
        return max((span for span in spans if span is not None), default=None)

    def init_state(self, batch: int, device=None, dtype=None) -> list:
        """One state per applied block, the convolution's (empty without one), and the tokens seen (B,), on the CPU."""
        layers = [self.blocks[i].mixer.init_state(batch, device, dtype) for i in self.schedule]
        if self.conv is None:
            conv = torch.zeros(batch, 0, device=device, dtype=dtype)
        else:
            conv = self.conv.init_state(batch, device, dtype)
        return [*layers, conv, torch.zeros(batch, dtype=torch.long)]

    def _positions(self, x: Tensor, count: Tensor | None, mask: Tensor | None) -> Tensor:
        if mask is None and count is None:  # training and plain prefill: asks the device nothing
            assert x.shape[1] <= self.cfg.block_size, (x.shape, self.cfg.block_size)
            return self.positions[: x.shape[1]]
        real = x.new_ones(x.shape[:2], dtype=torch.long) if mask is None else mask.long()
        index = (real.cumsum(1) - 1).clamp(min=0) + (0 if count is None else count[:, None].to(x.device))
        assert not len(x) or int(index.max()) < self.cfg.block_size, (
            "learned positions end at block_size; the engine cuts the context"
        )
        return self.positions[index]

    @property
    def _head(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight

    def _logits(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self._head)
        cap = self.cfg.logit_softcap
        return cap * torch.tanh(at_least_fp32(logits) / cap) if cap else logits

    def _loss(self, x: Tensor, targets: Tensor, per_token: bool, sparse: bool) -> Tensor:
        """`sparse`: many targets are not trained, and logits are made for the others alone."""
        shape, reduction = targets.shape, "none" if per_token else "sum"
        x, targets = x.flatten(0, 1), targets.flatten()
        if sparse:
            kept = (targets != -100).nonzero().squeeze(1)
            n = len(kept)
            more = -n % max(64, 1 << n.bit_length() >> 5)  # untrained ones, so that shapes recur: see packing.py
            kept, targets = torch.cat([kept, kept[:1].expand(more)]), F.pad(targets[kept], (0, more), value=-100)
            x = x.index_select(0, kept)
        if loss.in_one_pass(x.device) and torch.is_grad_enabled() and not (per_token or self.cfg.logit_softcap):
            return loss.OnePass.apply(x, self._head, targets, loss.logits_at_a_time(x.device))
        most = LOGITS_PER_CHUNK if x.device.type == "cpu" else loss.logits_at_a_time(x.device)
        rows = max(1, most // self.cfg.vocab_size)
        run = self.chunk_loss if torch.is_grad_enabled() and not sparse else LM._chunk_loss
        if len(x) <= rows:
            losses = [run(self, x, targets, reduction)]
        else:
            chunks = zip(x.split(rows), targets.split(rows))
            losses = [checkpoint(run, self, *chunk, reduction, use_reentrant=False) for chunk in chunks]
        if not per_token:
            return sum(losses)
        nats = torch.cat(losses)
        return (nats.new_zeros(shape.numel()).index_add(0, kept, nats) if sparse else nats).view(shape)

    def _chunk_loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        return F.cross_entropy(at_least_fp32(self._logits(x)), targets, ignore_index=-100, reduction=reduction)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Fill every parameter once from torch's generator; tag those that routing cannot read from their module."""
        fill(self, self.cfg)
        self.embed.weight.muonlm = {"role": "embed"}
        if self.head is not None:
            self.head.weight.muonlm = {"role": "head"}
        if self.positions is not None:
            self.positions.normal_(0, 0.02)
            self.positions.muonlm = {"role": "scalar"}
