"""Generation: a reader reads tokens into a model's state, decoding draws the next one of each row and has it read.

    p(i) ∝ exp(z_i / τ), of the top_k most likely tokens, then of the smallest set whose probability reaches top_p

τ = 0 is greedy. One engine: `stream` (samples of one prompt), `complete` (many prompts), `generate` (text) and
chat.py all are a Reader and `decode`. The engine never looks inside a mixer's state: it picks its rows and passes it
on. When a row outgrows the model's context, the last half of it is read again, so any length can be generated in
bounded memory; a model whose layers all have a state of constant size has no such limit.

Draws    every random choice is one number of a table (max_tokens, rows) made from the seed, so that what a row says
         depends neither on which other rows have stopped nor on how prompts were batched
Raises   UserError: impossible sampling settings, a prompt that the tokenizer cannot express, a model without tokenizer.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from muonlm.errors import UserError

LOGITS_PER_PIECE = 1 << 26  # read at a time: 256 MiB of fp32, of which only each row's last are used


def check_sampling(*, temperature: float, top_k: int, top_p: float, max_tokens: int, samples: int = 1) -> None:
    if not 0 <= temperature < float("inf"):
        raise UserError(f"`temperature` {temperature} must be 0 (greedy) or more; 0.8 is usual.")
    if not 0 < top_p <= 1:
        raise UserError(f"`top_p` {top_p} must be in (0, 1]; 1 keeps every token.")
    for name, value, low in (("top_k", top_k, 0), ("samples", samples, 1), ("max_tokens", max_tokens, 1)):
        if value < low:
            raise UserError(f"`{name}` {value} must be at least {low}.")


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float, draws: Tensor) -> Tensor:
    """One token per row of logits (N, V) -> (N,), decided by `draws` (N,), uniform in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0  # keeps the token that crosses top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
    upto = probabilities.cumsum(-1)
    # the first token whose sum exceeds the draw has a probability above 0; a draw is at most 1 − 2⁻²⁴: its product with
    # the total rounds below the total, so there always is one
    return torch.searchsorted(upto, draws[:, None] * upto[:, -1:], right=True).squeeze(-1)


def map_state(fn, state):
    """Apply `fn` to every tensor of a state (nested lists and tuples)."""
    return fn(state) if isinstance(state, Tensor) else type(state)(map_state(fn, part) for part in state)


class Reader:
    """What a model has read in each of N rows: its state, and the logits (N, V) of the token that follows.

    Rows may differ in length. `rows` holds the ids that a row still remembers, kept only where the context is limited.
    """

    def __init__(self, model, prompts: list[list[int]]):
        assert prompts and all(prompts), "a model needs at least one token to continue"
        self.model, self.context = model, model.context
        self.device = next(model.parameters()).device
        self.state, self.logits, self.rows = None, None, [[] for _ in prompts]
        self.read([ids[-self.context :] for ids in prompts] if self.context else prompts)

    @torch.no_grad()  # not inference_mode: tables cached here (RoPE) may be used by a training step later
    def read(self, new: list[list[int]]) -> None:
        """Read the tokens of new[i], at least one, in row i."""
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

    def take(self, index: list[int]) -> None:
        """Go on with these rows alone, in this order; a row may be named more than once."""
        self.rows = [self.rows[i] for i in index]
        picked = torch.tensor(index)
        self.logits, self.state = map_state(lambda t: t.index_select(0, picked.to(t.device)), (self.logits, self.state))


def draw_table(model, max_tokens: int, rows: int, seed: int) -> Tensor:
    device = next(model.parameters()).device
    return torch.rand(max_tokens, rows, generator=torch.Generator(device).manual_seed(seed), device=device)


def decode(
    reader: Reader,
    draws: Tensor,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: frozenset[int] = frozenset(),
    vocab: int | None = None,
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next token of each row of the reader; None for a row that has met a stop token.

    Such rows leave the reader. It reads a token after it was yielded: the last ones, and stops, stay unread.

    draws  (steps, rows) uniform in [0, 1)       vocab  only ids below it are drawn
    """
    number, going = draws.shape[1], list(range(draws.shape[1]))
    for remaining, u in zip(range(len(draws) - 1, -1, -1), draws):
        tokens = pick(reader.logits[:, :vocab], temperature, top_k, top_p, u[going]).tolist()
        next_of = {row: token for row, token in zip(going, tokens) if token not in stop}
        yield [next_of.get(row) for row in range(number)]
        if not next_of or not remaining:
            return
        if len(next_of) < len(going):
            reader.take([i for i, row in enumerate(going) if row in next_of])
            going = list(next_of)
        reader.read([[token] for token in next_of.values()])


def stream(
    model,
    prompt: list[int],
    *,
    samples: int = 1,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: frozenset[int] = frozenset(),
    vocab: int | None = None,
) -> Iterator[list[int | None]]:
    """`decode` for samples of one prompt, which is read once."""
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p, samples=samples, max_tokens=max_tokens)
    reader = Reader(model, [prompt])
    reader.take([0] * samples)
    draws = draw_table(model, max_tokens, samples, seed)
    yield from decode(reader, draws, temperature=temperature, top_k=top_k, top_p=top_p, stop=stop, vocab=vocab)


def complete(
    model,
    prompts: list[list[int]],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: frozenset[int],
    vocab: int | None = None,
    rows: int = 64,
) -> list[list[int]]:
    """The ids that follow each prompt, up to a stop token (left out) or max_tokens; `rows` prompts at a time."""
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens)
    draws = draw_table(model, max_tokens, len(prompts), seed)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # like lengths together: little padding
    replies = [[] for _ in prompts]
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        reader = Reader(model, [prompts[i] for i in batch])
        for step in decode(
            reader, draws[:, batch], temperature=temperature, top_k=top_k, top_p=top_p, stop=stop, vocab=vocab
        ):
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


def generate(
    model,
    tokenizer,
    prompt: str = "",
    *,
    samples: int = 1,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: list[str] = (),
    on_text=None,
) -> list[str]:
    """Continuations of `prompt`, one text per sample (without the prompt).

    stop     texts that are one token each, besides the tokenizer's end-of-text
    on_text  called with each piece of the first sample as soon as it is whole characters (streaming)
    """
    need_words(tokenizer)
    ids = tokenizer.encode(prompt)
    if tokenizer.eot_id is not None and (not ids or ids[0] != tokenizer.eot_id):
        ids = [tokenizer.eot_id, *ids]  # training rows see documents begin with it
    ids = ids or [0]  # no text and no end-of-text to begin with: any token will do
    stops = set() if tokenizer.eot_id is None else {tokenizer.eot_id}
    for text in stop:
        encoded = tokenizer.encode(text)
        if len(encoded) != 1:
            raise UserError(
                f"`stop` {text!r} is {len(encoded)} tokens of this model's tokenizer; a stop must be exactly one."
            )
        stops.add(encoded[0])
    decoders, texts = [tokenizer.stream() for _ in range(samples)], ["" for _ in range(samples)]

    def add(i: int, piece: str):
        texts[i] += piece
        if i == 0 and on_text and piece:
            on_text(piece)

    for tokens in stream(
        model,
        ids,
        samples=samples,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=frozenset(stops),
        vocab=tokenizer.vocab_size,  # rows that only pad the embedding stand for no token
    ):
        for i, token in enumerate(tokens):
            if token is not None:
                add(i, decoders[i].push(token))
    for i, decoder in enumerate(decoders):
        add(i, decoder.flush())
    return texts
