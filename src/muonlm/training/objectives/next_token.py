"""The likelihood of the next token: pretraining, and SFT, where only the assistant's tokens are trained."""

from torch import Tensor


def next_token(model, batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Σ −log p(token t+1 | tokens ≤ t of the same segment) over trained targets."""
    return model(batch.inputs, batch.targets, segments=batch.segments), batch.count, {}
