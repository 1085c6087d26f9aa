"""Generation: a prefix holds what a model has read; decoding draws the next token of each row and extends the prefix.

    p(i) ∝ exp(z_i / τ), of the top_k most likely tokens, then of the smallest set whose probability reaches top_p

τ = 0 is greedy. One engine: `stream` (samples of one prompt), `complete` (many prompts), `generate` (text) and chat.py
all are a Prefix and `decode`. The engine never looks inside a mixer's state: it picks its rows and passes it on. When a
row outgrows the model's context, the last half of it is read again, so any length can be generated in bounded memory;
a model whose layers all have a state of constant size has no such limit.

Draws    every random choice is one number of a table (max_tokens, rows) made from the seed, so that what a row says
         depends neither on which other rows have stopped nor on how prompts were batched
Raises   UserError: a prompt that the tokenizer cannot express, a model without tokenizer, impossible settings
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from muonlm.errors import UserError
from muonlm.sampling import Sampling

LOGITS_PER_PIECE = 1 << 26  # read at a time: 256 MiB of fp32, of which only each row's last are used


def pick(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """One token per row of logits (N, V) -> (N,), decided by `draws` (N,), uniform in [0, 1)."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], float("-inf"))
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= sampling.top_p] = 0  # keeps the token that crosses top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    upto = probabilities.cumsum(-1)
    # the first token whose sum exceeds the draw has a probability above 0; a draw is at most 1 − 2⁻²⁴: its product with
    # the total rounds below the total, so there always is one
    return torch.searchsorted(upto, draws[:, None] * upto[:, -1:], right=True).squeeze(-1)


def map_state(fn, state):
    """Apply `fn` to every tensor of a state (nested lists and tuples)."""
    return fn(state) if isinstance(state, Tensor) else type(state)(map_state(fn, part) for part in state)


class Prefix:
    """What a model has read in each of N rows: its state, and the logits (N, V) of the token that follows.

    Rows may differ in length. `rows` holds the ids that a row still remembers, kept only where the context is limited.
    """

    def __init__(self, model, number: int):
        self.model, self.context = model, model.context
        self.device = next(model.parameters()).device
        self.state, self.logits, self.rows = None, None, [[] for _ in range(number)]

    @classmethod
    def prefill(cls, model, prompts: list[list[int]]) -> "Prefix":
        """The prefix of these prompts, each of at least one token; of long ones, what fits into the context."""
        assert prompts and all(prompts), "a model needs at least one token to continue"
        prefix = cls(model, len(prompts))
        prefix.extend([ids[-model.context :] for ids in prompts] if model.context else prompts)
        return prefix

    @torch.no_grad()  # not inference_mode: tables cached here (RoPE) may be used by a training step later
    def extend(self, new: list[list[int]]) -> None:
        """Read the tokens of new[i], at least one, behind row i."""
        if self.context:
            self.rows = [row + ids for row, ids in zip(self.rows, new, strict=True)]
            if max(map(len, self.rows)) > self.context:
                half = max(1, self.context // 2)
                new = self.rows = [row[-half:] if len(row) > self.context else row for row in self.rows]
                self.state = None
        lengths = [len(ids) for ids in new]
        longest = max(lengths)
        tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids in new], device=self.device)
        ends = torch.tensor(lengths, device=self.device) - 1
        mask = None if min(lengths) == longest else torch.arange(longest, device=self.device) <= ends[:, None]
        piece = max(1, LOGITS_PER_PIECE // (len(new) * self.model.cfg.vocab_size))
        found = []
        for start in range(0, longest, piece):
            part = slice(start, start + piece)
            logits, self.state = self.model(
                tokens[:, part], state=self.state, mask=None if mask is None else mask[:, part]
            )
            if mask is None:
                found = [logits[:, -1]]
            else:
                at = (ends - start).clamp(0, logits.shape[1] - 1)
                here = logits[torch.arange(len(new), device=self.device), at]
                found = [torch.where((ends >= start)[:, None], here, found[0]) if found else here]
        self.logits = found[0]

    def select(self, index: list[int]) -> None:
        """Go on with these rows alone, in this order; a row may be named more than once."""
        self.rows = [self.rows[i] for i in index]
        picked = torch.tensor(index)
        self.logits, self.state = map_state(lambda t: t.index_select(0, picked.to(t.device)), (self.logits, self.state))


def draw_table(model, sampling: Sampling, rows: int) -> Tensor:
    """Made on the CPU: the same seed draws the same on every device."""
    generator = torch.Generator().manual_seed(sampling.seed)
    return torch.rand(sampling.max_tokens, rows, generator=generator).to(next(model.parameters()).device)


def decode(
    prefix: Prefix,
    draws: Tensor,
    sampling: Sampling,
    *,
    stop: frozenset[int] = frozenset(),
    vocab: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next token of each row of the prefix; None for a row that has met a stop token.

    Such rows leave the prefix. A token is read after it was yielded: the last ones, and stops, stay unread.

    draws  (steps, rows) uniform in [0, 1)       vocab  only ids below it are drawn
    """
    number, going = draws.shape[1], list(range(draws.shape[1]))
    for remaining, u in zip(range(len(draws) - 1, -1, -1), draws):
        tokens = pick(prefix.logits[:, :vocab], sampling, u[going]).tolist()
        next_of = {row: token for row, token in zip(going, tokens) if token not in stop}
        yield [next_of.get(row) for row in range(number)]
        if not next_of or not remaining:
            return
        if len(next_of) < len(going):
            prefix.select([i for i, row in enumerate(going) if row in next_of])
            going = list(next_of)
        prefix.extend([[token] for token in next_of.values()])


def stream(
    model,
    prompt: list[int],
    sampling: Sampling,
    *,
    samples: int = 1,
    stop: frozenset[int] = frozenset(),
    vocab: int | None = None,
) -> Iterator[list[int | None]]:
    """`decode` for samples of one prompt, which is read once."""
    if samples < 1:
        raise UserError(f"`samples` {samples} must be at least 1.")
    prefix = Prefix.prefill(model, [prompt])
    prefix.select([0] * samples)
    yield from decode(prefix, draw_table(model, sampling, samples), sampling, stop=stop, vocab=vocab)


def complete(
    model,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    stop: frozenset[int],
    vocab: int | None = None,
    rows: int = 64,
) -> list[list[int]]:
    """The ids that follow each prompt, up to a stop token (left out) or max_tokens; `rows` prompts at a time."""
    draws = draw_table(model, sampling, len(prompts))
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # like lengths together: little padding
    replies = [[] for _ in prompts]
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        prefix = Prefix.prefill(model, [prompts[i] for i in batch])
        for step in decode(prefix, draws[:, batch], sampling, stop=stop, vocab=vocab):
            for i, token in zip(batch, step):
                if token is not None:
                    replies[i].append(token)
    return replies


def need_words(tokenizer) -> None:
    if tokenizer is None:
        raise UserError(
            "this run has no tokenizer, so there is no text to generate "
            "(grokking and recall runs answer in symbols, not in words)."
        )


def document(tokenizer, text: str) -> list[int]:
    """The ids of a text that begins a document: behind end-of-text, as in training rows. At least one id."""
    ids = tokenizer.encode(text)
    if tokenizer.eot_id is not None and (not ids or ids[0] != tokenizer.eot_id):
        ids = [tokenizer.eot_id, *ids]
    return ids or [0]  # no text and no end-of-text to begin with: any token will do


def generate(model, tokenizer, prompt: str = "", *, samples=1, stop=(), on_text=None, **sampling) -> list[str]:
    """Continuations of `prompt`, one text per sample (without the prompt).

    stop      texts that are one token each, besides the tokenizer's end-of-text
    on_text   called with each piece of the first sample as soon as it is whole characters (streaming)
    sampling  fields of `Sampling`: temperature, top_k, top_p, max_tokens, seed
    """
    settings = Sampling(**sampling)
    need_words(tokenizer)
    ids = document(tokenizer, prompt)
    stops = frozenset({tokenizer.eot_id} - {None} | {stop_token(tokenizer, text) for text in stop})
    decoders, texts = [tokenizer.stream() for _ in range(samples)], ["" for _ in range(samples)]

    def add(i: int, piece: str):
        texts[i] += piece
        if i == 0 and on_text and piece:
            on_text(piece)

    vocab = tokenizer.vocab_size  # rows that only pad the embedding stand for no token
    for tokens in stream(model, ids, settings, samples=samples, stop=stops, vocab=vocab):
        for i, token in enumerate(tokens):
            if token is not None:
                add(i, decoders[i].push(token))
    for i, decoder in enumerate(decoders):
        add(i, decoder.flush())
    return texts


def stop_token(tokenizer, text: str) -> int:
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise UserError(f"`stop` {text!r} is {len(ids)} tokens of this model's tokenizer; a stop must be exactly one.")
    return ids[0]
