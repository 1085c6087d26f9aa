"""How the next token is drawn; without torch, as the command line makes flags of it."""

from dataclasses import dataclass

from muonlm.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """p(i) ∝ exp(z_i / temperature), of the top_k likeliest tokens, then of the likeliest that hold top_p.

    Raises UserError for values that mean nothing.
    """

    temperature: float = 0.8
    """0 = always the likeliest token"""
    top_k: int = 0
    """sample among the K likeliest tokens; 0 = all"""
    top_p: float = 1.0
    """sample among the likeliest tokens that hold P of the probability"""
    max_tokens: int = 200
    """tokens per continuation or reply"""
    seed: int = 0
    """same seed and words, same answer"""

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"`temperature` {self.temperature} must be 0 (greedy) or more; 0.8 is usual.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"`top_p` {self.top_p} must be in (0, 1]; 1 keeps every token.")
        for name, low in (("top_k", 0), ("max_tokens", 1)):
            if getattr(self, name) < low:
                raise UserError(f"`{name}` {getattr(self, name)} must be at least {low}.")


OF_CHAT = Sampling(temperature=0.85, top_p=0.85, max_tokens=256)  # as `muonlm chat` draws unless told otherwise
