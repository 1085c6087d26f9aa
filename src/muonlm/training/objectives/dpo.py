"""Direct preference optimization: the loss over pairs, and the frozen reference that it compares with.

The reference is the model as it was when the run began. Its log-probabilities of every answer are computed once, before
the first step, kept in the cache (for the next run on the same data and weights) and in the run (for resuming). With
dpo.reference = model the model itself stays in memory instead.

    RUN/reference.safetensors   {split: (pairs, 2) fp32}: Σ log π_ref over the trained tokens of chosen, rejected; nats

Raises   UserError: what the run started from is gone, or the sums cannot be written.
"""

import copy
import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from muonlm import storage
from muonlm.config.schema import Config, flatten
from muonlm.errors import UserError
from muonlm.model import build_model

from .. import parallel
from ..checkpoint import load_weights, read

TIE = 1e-5  # margins below it are rounding: fp32 sums of some hundred nats, in another order than the reference's


class DPO:
    """Σ over pairs of −(1 − ε) log σ(m) − ε log σ(−m),  m = β (r_chosen − r_rejected),  r = log π(y|x) − log π_ref(y|x)

    log π(y|x) sums over the trained tokens of a segment (`length_normalize`: their mean, for both models). π_ref is
    frozen: its sums come with the batch, or from `reference`, a model in memory. Metrics are sums over pairs: `acc`
    (m > 0; a tie counts half), `margin` m, and the rewards `chosen` β r_chosen and `rejected` β r_rejected.
    At π = π_ref the loss is ln 2.
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
    """(B, S): log-probability of each segment's trained tokens; S: the most segments of a row, made even."""
    nats = model(batch.inputs, batch.targets, segments=batch.segments, per_token=True)
    return _by_segment(
        -nats, batch.segments, batch.reference.shape[1] if batch.reference is not None else _width(batch)
    )


def _width(batch) -> int:
    return max(2, 2 * -(-int(batch.segments.max() + 1) // 2)) if batch.segments.numel() else 2


def _by_segment(values: Tensor, segments: Tensor, width: int) -> Tensor:
    """Sums of (B, T) values over each segment -> (B, width)."""
    if values.device.type == "cuda":  # whose scatter_add adds in any order: no run would repeat another bit for bit
        own = segments[..., None] == torch.arange(width, device=values.device)
        return torch.where(own, values[..., None], 0).sum(1)
    sums = values.new_zeros(len(values), width + 1)  # the last column takes what is padding
    return sums.scatter_add(1, torch.where(segments < 0, width, segments), values)[:, :width]


def number_of_pairs(means: dict[str, float], count: float) -> dict[str, float]:
    """How many pairs the shares of an evaluation are of."""
    return {"pairs": int(count)}


# --- the reference ----------------------------------------------------------------------------------------------------


def begin(cfg: Config, model, data, run: Path, *, started: bool, dist, log) -> DPO:
    """The loss of a run; with dpo.reference = cached, every split of `data` is given its reference sums."""
    options = (cfg.dpo.beta, cfg.dpo.label_smoothing, cfg.dpo.length_normalize)
    if cfg.dpo.reference == "model":
        return DPO(*options, reference=_frozen(cfg, model, started))
    splits = {"train": data.train, **data.evaluated}
    kept = run / "reference.safetensors"  # a resumed run needs neither the cache nor where it started from
    found = _read(kept, splits) if started else {}
    if lacking(found, dist):
        frozen = _frozen(cfg, model, started)
        path = _cache_path(cfg, frozen, splits)
        found = _read(path, splits)
        if lacking(found, dist):
            log(f"reference: log-probabilities of {sum(s.num_examples for s in splits.values()):,} pairs …")
            found = {name: log_probabilities(frozen, split, cfg, dist) for name, split in splits.items()}
            if dist.main:
                _write(path, found)
        if dist.main:
            _write(kept, found)
        log(f"reference: log-probabilities kept in {path}")
    for name, split in splits.items():
        split.reference = found[name].numpy()
    return DPO(*options)


def lacking(found: dict[str, Tensor], dist) -> bool:
    """Whether any rank found nothing: what one lacks, all compute."""
    return bool(dist.sum(torch.tensor(float(not found))) > 0)


def _frozen(cfg: Config, model, started: bool):
    """A frozen copy of `model` with the weights that the run started from."""
    if not started:
        frozen = copy.deepcopy(model)
    else:
        # fresh weights, as the run began with, unless it took those of another
        frozen = build_model(cfg.model, next(model.parameters()).device, cfg.seed)
        if cfg.init_from:
            if not Path(cfg.init_from).is_dir():
                raise UserError(
                    f"{cfg.init_from} is gone, and its weights are the reference of this run; put it back where it "
                    "was, or start a new run from this one's weights: --init-from RUN"
                )
            load_weights(frozen, read(Path(cfg.init_from), state=False)[0], cfg.init_from)
    return frozen.requires_grad_(False).eval()


def _cache_path(cfg: Config, frozen, splits: dict) -> Path:
    weights, device = hashlib.sha256(), next(frozen.parameters()).device
    for name, value in sorted(frozen.state_dict().items()):
        weights.update(name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    key = [
        weights.hexdigest(),
        flatten(cfg.to_dict()["model"]),
        cfg.train.dtype + ("" if device.type == "cpu" else f" on {device.type}"),  # bf16 differs by 1e-2
        {n: s.fingerprint for n, s in splits.items()},
    ]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return storage.cache_home() / "reference" / f"{name}.safetensors"


def _read(path: Path, splits: dict) -> dict[str, Tensor]:
    """The sums in `path` if it is whole and holds those of all splits, else none."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return {}
    fits = found.keys() == splits.keys() and all(len(found[n]) == s.num_examples for n, s in splits.items())
    return found if fits else {}


def _write(path: Path, tensors: dict) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.replacing(path) as work:
            save_file(tensors, work)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors in its own
        raise storage.not_written(path, error, "Make room, or set MUONLM_CACHE.") from None


@torch.no_grad()
def log_probabilities(frozen, split, cfg: Config, dist) -> torch.Tensor:
    """(pairs, 2) fp32: the sums over trained tokens of chosen and rejected. Rank r takes every world-th batch."""
    sums = torch.zeros(split.num_examples, 2, dtype=torch.float64)
    for number, (batch, items) in enumerate(split.pairs_in_order(cfg.train.micro_batch)):
        if number % dist.world == dist.rank:
            with parallel.autocast(dist.device, cfg.train.dtype):
                found = segment_sums(frozen, batch.to(dist.device)).unflatten(1, (-1, 2)).double().cpu()
            real = items >= 0
            sums[items[real]] = found[:, : items.shape[1]][real]
    return dist.sum(sums).float().cpu()
