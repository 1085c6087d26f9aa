"""Generation: prefill once, clone the state for n samples, decode one token at a time.

    p(i) ∝ exp(z_i / τ), restricted to the top_k most likely tokens, then to the smallest set whose probability reaches top_p

τ = 0 is greedy. The engine never looks inside a mixer's state: it repeats its rows and passes it on. When a row reaches the model's
context, the last half of it is prefilled again, so any length can be generated in bounded memory; a model whose layers all have
a state of constant size has no such limit.

Raises   UserError: impossible sampling settings, a prompt that the tokenizer cannot express, a model without tokenizer.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .config import UserError


def check_sampling(*, temperature: float, top_k: int, top_p: float, samples: int, max_tokens: int) -> None:
    if not 0 <= temperature < float("inf"):
        raise UserError(f"--temperature {temperature} must be 0 (greedy) or more; 0.8 is usual.")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p {top_p} must be in (0, 1]; 1 keeps every token.")
    for name, value, low in (("top-k", top_k, 0), ("samples", samples, 1), ("max-tokens", max_tokens, 1)):
        if value < low:
            raise UserError(f"--{name} {value} must be at least {low}.")


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """One token per row of logits (N, V) -> (N,)."""
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
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def map_state(fn, state):
    """Apply `fn` to every tensor of a state (nested lists and tuples)."""
    return fn(state) if isinstance(state, Tensor) else type(state)(map_state(fn, part) for part in state)


@torch.no_grad()  # not inference_mode: tables cached here (RoPE) may be used by a training step later
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
    """Yield, step by step, the next token of each sample; None for one that has met a stop token. Only ids below `vocab` are drawn."""
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p, samples=samples, max_tokens=max_tokens)
    assert prompt, "a model needs at least one token to continue"
    device, context = next(model.parameters()).device, model.context
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.tensor([prompt[-context:] if context else prompt], device=device)
    logits, state = model(rows)
    logits, state = logits[:, -1].expand(samples, -1), map_state(lambda t: t.repeat_interleave(samples, 0), state)
    rows = rows.expand(samples, -1)
    done = torch.zeros(samples, dtype=torch.bool, device=device)
    stops = torch.tensor(sorted(stop), device=device, dtype=torch.long)
    for remaining in range(max_tokens, 0, -1):
        token = pick(logits[:, :vocab], temperature, top_k, top_p, generator)
        done |= torch.isin(token, stops)
        yield [None if finished else int(i) for i, finished in zip(token, done)]
        if done.all() or remaining == 1:
            return
        if context:
            rows = torch.cat([rows, token[:, None]], 1)
        if context and rows.shape[1] > context:
            rows = rows[:, -max(1, context // 2) :]
            logits, state = model(rows)
        else:
            logits, state = model(token[:, None], state=state)
        logits = logits[:, -1]


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
    if tokenizer is None:
        raise UserError(
            "this run has no tokenizer, so there is no text to generate (grokking and recall runs answer in symbols, not in words)."
        )
    ids = tokenizer.encode(prompt)
    if tokenizer.eot_id is not None and (not ids or ids[0] != tokenizer.eot_id):
        ids = [tokenizer.eot_id, *ids]  # training rows see documents begin with it
    ids = ids or [0]  # no text and no end-of-text to begin with: any token will do
    stops = set() if tokenizer.eot_id is None else {tokenizer.eot_id}
    for text in stop:
        encoded = tokenizer.encode(text)
        if len(encoded) != 1:
            raise UserError(
                f"--stop {text!r} is {len(encoded)} tokens of this model's tokenizer; a stop must be exactly one."
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
