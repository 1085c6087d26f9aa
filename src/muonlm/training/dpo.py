"""DPO's frozen reference: the weights that the run started from.

Its log-probabilities of every answer are computed once, before the first step, kept in the cache (for the next run on the same
data from the same weights) and in the run (for resuming). With dpo.reference = model the model itself stays in memory instead.

    RUN/reference.safetensors   {split: (pairs, 2) fp32}: Σ log π_ref over the trained tokens of chosen and rejected, in nats

Raises   UserError: what the run started from is gone, or the sums cannot be written.
"""

import copy
import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from muonlm.config.schema import Config, flatten
from muonlm.errors import UserError
from muonlm.model import build_model
from muonlm.storage import cache_home

from . import parallel
from .checkpoint import load_weights, read
from .objectives import DPO, segment_sums


def dpo_objective(cfg: Config, model, data, run: Path, *, started: bool, dist, say):
    """The DPO objective of a run; with dpo.reference = cached, every split of `data` is given its reference sums."""
    options = (cfg.dpo.beta, cfg.dpo.label_smoothing, cfg.dpo.length_normalize)
    if cfg.dpo.reference == "model":
        return DPO(*options, reference=_frozen(cfg, model, started))
    splits = {"train": data.train, **data.evaluated}
    kept = run / "reference.safetensors"  # a resumed run needs neither the cache nor where it started from
    found = _read(kept, splits) if started else None
    if dist.sum(torch.tensor(float(found is None))) > 0:  # what one rank lacks, all compute
        frozen = _frozen(cfg, model, started)
        path = _cache_path(cfg, frozen, splits)
        found = _read(path, splits)
        if dist.sum(torch.tensor(float(found is None))) > 0:
            say(f"reference: log-probabilities of {sum(s.num_examples for s in splits.values()):,} pairs …")
            found = {name: log_probabilities(frozen, split, cfg, dist) for name, split in splits.items()}
            if dist.main:
                _write(path, found)
        if dist.main:
            _write(kept, found)
        say(f"reference: log-probabilities kept in {path}")
    for name, split in splits.items():
        split.reference = found[name].numpy()
    return DPO(*options)


def _frozen(cfg: Config, model, started: bool):
    """A frozen copy of `model` with the weights that the run started from."""
    if not started:
        frozen = copy.deepcopy(model)
    else:
        frozen = build_model(
            cfg.model, next(model.parameters()).device, cfg.seed
        )  # also the start of a run from fresh weights
        if cfg.init_from:
            if not Path(cfg.init_from).is_dir():
                raise UserError(
                    f"{cfg.init_from} is gone, and its weights are the reference of this run; put it back where it was, or start "
                    "a new run from this one's weights: --init-from RUN"
                )
            load_weights(frozen, read(Path(cfg.init_from), state=False)[0], cfg.init_from)
    return frozen.requires_grad_(False).eval()


def _cache_path(cfg: Config, frozen, splits: dict) -> Path:
    weights = hashlib.sha256()
    for name, value in sorted(frozen.state_dict().items()):
        weights.update(name.encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    key = [
        weights.hexdigest(),
        flatten(cfg.to_dict()["model"]),
        cfg.train.dtype,
        {n: s.fingerprint for n, s in splits.items()},
    ]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]
    return cache_home() / "reference" / f"{name}.safetensors"


def _read(path: Path, splits: dict):
    """The sums in `path` if it is whole and holds those of all splits, else None."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError):
        return None
    fits = found.keys() == splits.keys() and all(len(found[n]) == s.num_examples for n, s in splits.items())
    return found if fits else None


def _write(path: Path, tensors: dict) -> None:
    work = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, work)
        os.replace(work, path)
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors in its own
        raise UserError(
            f"{path} cannot be written ({getattr(error, 'strerror', None) or error}); make room, or set MUONLM_CACHE"
        ) from None
    finally:
        work.unlink(missing_ok=True)


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
