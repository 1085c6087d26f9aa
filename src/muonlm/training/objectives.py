"""Objectives: `fn(model, batch) -> (loss_sum, count, metrics)`.

`loss_sum` is the differentiable sum over trained tokens (nats), `count` how many there are, `metrics` detached sums over the same
items. The loop divides by the count of the whole global step, so accumulation and data parallelism equal one big batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token(model, batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Σ −log p(token t+1 | tokens ≤ t of the same segment) over trained targets: pretraining, and SFT, where the assistant's
    tokens are trained alone."""
    return model(batch.inputs, batch.targets, segments=batch.segments), batch.count, {}


TIE = 1e-5  # margins below it are rounding: fp32 sums of some hundred nats, in another order than the reference's


class DPO:
    """Σ over pairs of −(1 − ε) log σ(m) − ε log σ(−m),   m = β (r_chosen − r_rejected),   r = log π(y|x) − log π_ref(y|x)

    log π(y|x) sums over the trained tokens of a segment (`length_normalize`: their mean, for both models). π_ref is frozen:
    its sums come with the batch, or from `reference`, a model in memory. Metrics are sums over pairs: `acc` (m > 0; a tie
    counts half), `margin` m, and the rewards `chosen` β r_chosen and `rejected` β r_rejected. At π = π_ref the loss is ln 2.
    Source: Rafailov et al. 2023 (2305.18290); ε: Mitchell, "A note on DPO with noisy preferences" (cDPO, 2023).
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, length_normalize: bool = False, reference=None):
        self.beta, self.smoothing, self.normalize, self.reference = beta, label_smoothing, length_normalize, reference

    def __call__(self, model, batch) -> tuple[Tensor, int, dict[str, Tensor]]:
        frozen = batch.reference
        if frozen is None:
            with torch.no_grad():
                frozen = segment_sums(self.reference, batch)
        real = torch.arange(frozen.shape[1], device=frozen.device) <= batch.segments.amax(1, keepdim=True)
        ratio = torch.where(real, segment_sums(model, batch) - frozen, 0.0)
        if self.normalize:
            trained = (batch.targets >= 0).float()
            ratio = ratio / _by_segment(trained, batch.segments, frozen.shape[1]).clamp(min=1)
        chosen, rejected = (self.beta * ratio).unflatten(1, (-1, 2)).unbind(-1)
        real, margin = real[:, ::2], chosen - rejected
        loss = -(1 - self.smoothing) * F.logsigmoid(margin) - self.smoothing * F.logsigmoid(-margin)
        metrics = {
            "acc": (margin > TIE).float() + 0.5 * (margin.abs() <= TIE),
            "margin": margin,
            "chosen": chosen,
            "rejected": rejected,
        }
        sums = {name: value.detach()[real].sum() for name, value in metrics.items()}
        return loss[real].sum(), batch.count, sums


def segment_sums(model, batch) -> Tensor:
    """(B, S): log-probability of each segment's trained tokens; S is the batch's largest number of segments, made even."""
    nats = model(batch.inputs, batch.targets, segments=batch.segments, per_token=True)
    return _by_segment(
        -nats, batch.segments, batch.reference.shape[1] if batch.reference is not None else _width(batch)
    )


def _width(batch) -> int:
    return max(2, 2 * -(-int(batch.segments.max() + 1) // 2)) if batch.segments.numel() else 2


def _by_segment(values: Tensor, segments: Tensor, width: int) -> Tensor:
    """Sums of (B, T) values over each segment -> (B, width)."""
    sums = values.new_zeros(len(values), width + 1)  # the last column takes what is padding
    return sums.scatter_add(1, torch.where(segments < 0, width, segments), values)[:, :width]


def classify(model, batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Σ −log p(answer | row), one answer a row; `acc` counts rows whose most likely class is the answer."""
    logits = model(batch.inputs)
    loss = F.cross_entropy(logits, batch.targets, reduction="sum")
    return loss, batch.count, {"acc": (logits.detach().argmax(-1) == batch.targets).sum()}


def recall(model, batch) -> tuple[Tensor, int, dict[str, Tensor]]:
    """Σ −log p(value | row so far) over the questions of data/synthetic/recall.py; `acc` counts those whose most likely token is the value."""
    logits, _ = model(batch.inputs)
    asked = batch.targets >= 0
    logits, targets = logits[asked].float(), batch.targets[asked]
    loss = F.cross_entropy(logits, targets, reduction="sum")
    return loss, batch.count, {"acc": (logits.detach().argmax(-1) == targets).sum()}


OBJECTIVES = {
    "next_token": next_token,
    "sft": next_token,
    "classify": classify,
    "recall": recall,
}  # and DPO: dpo.py
# objective -> the kind of data it needs, as the table of data/open.py calls them
NEEDS = {
    "next_token": "text",
    "sft": "conversations",
    "dpo": "preferences",
    "classify": "pairs of numbers",
    "recall": "keys and values",
}
