"""Is Muon healthy? Measurements of every matrix, cheap, every k steps; advice.py makes plain lines of them.

    diagnostics = Diagnostics(every=100).attach(optimizer)       sets optimizer.diagnostics; None there = no cost at all
    if diagnostics.due(step):  metrics = diagnostics.collect()   on every rank, after the step
    for line in diagnostics.advise(step, loss=loss): log(line)

Measured, of a block W (A x B) with NS input U and output O, both wide (m, n), m <= n; median, max or min, worst layer:

    update_rms = lr s RMS(O)                  predicted_rms = lr s / sqrt(max(A, B)), s of the group's lr_mode
    u_w = update_rms / RMS(W)                 k = ||O||_F / sqrt(m): 1 for a polar factor, sqrt(r/m) where U has rank r
    orthogonality_error                       sqrt(mean_z ||O O^T z - z||^2 / m) ~ ||O O^T - I||_F / sqrt(m)
                                              (Hutchinson): 4 Gaussian z scaled to ||z||^2 = m; same mean, less variance
    orthogonality_error_exact                 of one layer an event, in turn
    spectral_norm_w, spectral_norm_u          power steps from the vectors of the last event
    stable_rank = ||U||_F^2 / sigma_1^2
    sigma_05, sigma_50, sigma_95              quantiles of sigma(U) / ||U||_F, one layer a spectra event
    cos_previous                              cos(O_t, O_t-1) of the same layer, from one kept copy of one O

Cost     flops of one event, a block: norms 6 mn, Hutchinson 16 mn, power 2 x 16 mn: 54 mn, and a copy of U; one layer
         2 m^2 n for the exact error. Every 100 steps that is 0.54 mn a step, against (20 m + 10 m^2/n) mn of Newton-
         Schulz: below 0.2 % of it from m = 16 on, and Newton-Schulz is a part of the step. One svdvals (some 10 m^2
         n) in 1000 steps is nothing. Off: due() is not called
Ranks    Probes depend on (seed, step, name) only, sampled layers on the list of all names, and each matrix is
         measured by itself, so a value does not depend on which rank or batch holds the matrix. collect() gathers
         them from the owners (distributed.py). Matrices sharded by FSDP2 are counted, not measured. The global random
         state is not touched
State    Power vectors and the history behind the advice are not saved: after a resume values may differ in the last
         digits
Raises   UserError for settings that cannot work
Source   Hutchinson 1990
"""

import hashlib
import math
from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor

from muonlm.errors import UserError

from ..muon.blocks import FIXED, adamw_blocks, blocks, predicted_rms, shape_factor
from ..muon.groups import names_of
from ..muon.muon import Muon
from ..muon.newton_schulz import SAFETY, SCHATTEN_MARGIN, power_of_two, triples
from ..muon.update import Observation
from ..tensors import is_sharded
from .advice import Advice, Layers

PROBES = 4
POWER_STEPS = 4  # an event; the vectors of the last event start them


def block_list(group: dict) -> Iterator[tuple[str, Tensor, dict | None, int, float]]:
    """(block name, parameter, its split, i, s(A, B) by the group's lr_mode) of all blocks that Muon trains in a group.

    The block of any tensor shaped like the parameter is blocks(tensor, split)[i].
    """
    for name, p, split in zip(names_of(group), group["params"], group["splits"], strict=True):
        pieces, cut = blocks(torch.empty(p.shape, device="meta"), split), split or {}
        for i, w in enumerate(pieces):
            if i not in adamw_blocks(split, len(pieces)):
                A, B = reversed(w.shape) if cut.get("transposed") else w.shape
                factor = shape_factor(group["lr_mode"], A, B, group["rms_target"])
                yield (f"{name}[{i}]" if len(pieces) > 1 else name), p, split, i, factor


# -------------------------------------------------------------------------------------------------- measurements


class Diagnostics:
    """See the module docstring.

    every          steps between events; 0 = none
    spectra_every  steps between spectra of one sampled layer, a multiple of `every`; 0 = none
    advice         False: advise() returns nothing
    """

    optimizer: Muon  # see `attach`

    def __init__(self, every: int = 100, spectra_every: int = 1000, advice: bool = True, seed: int = 0):
        if every < 0 or spectra_every < 0 or (every and spectra_every % every):
            raise UserError(
                f"spectra_every={spectra_every} is no multiple of every={every}, when all else is measured; "
                f"use {10 * max(every, 1)}"
            )
        self.every, self.spectra_every, self.seed = every, spectra_every, seed
        self.advice = Advice() if advice else None
        self.places: dict[str, int] = {}  # block name -> index of its group; load_state_dict makes new group dicts
        self.factors: dict[str, float] = {}
        self.names: list[str] = []
        self._measured: Layers = {}
        self._vectors: dict[tuple[str, str], Tensor] = {}
        self._previous: dict[str, Tensor] = {}

    def attach(self, optimizer: Muon) -> "Diagnostics":
        """Watch `optimizer` from now on; returns self."""
        self.optimizer = optimizer
        for place, group in enumerate(optimizer.param_groups):
            if not group["use_muon"]:
                continue
            for name, p, *_, factor in block_list(group):
                if not is_sharded(p):
                    self.places[name], self.factors[name] = place, factor
        self.names = sorted(self.places)
        optimizer.diagnostics = self
        return self

    def due(self, step: int) -> bool:
        if not self.every:
            return False
        return step % self.every == 0 or bool(self.spectra_every) and (step + 1) % self.spectra_every == 0

    @torch.no_grad()
    def observe(self, seen: Observation) -> None:
        """Measure one batch of a due step; called by the optimizer before the weights change."""
        if seen.step % self.every == 0:
            self._measure_batch(seen)
        if self.spectra_every and (seen.step + 1) % self.spectra_every == 0:
            name = self._sampled(seen.step + 1)
            if name in seen.names:
                self._previous = {name: seen.O[seen.names.index(name)].clone()}

    def _sampled(self, step: int) -> str:
        return self.names[(step // self.spectra_every + self.seed) % len(self.names)]

    def _measure_batch(self, seen: Observation) -> None:
        exact = self.names[(seen.step // self.every + self.seed) % len(self.names)]
        spectrum = self._sampled(seen.step) if self.spectra_every and seen.step % self.spectra_every == 0 else None
        rows, keys = [], []
        for i, name in enumerate(seen.names):
            values = self._measure(name, seen.U[i], seen.O[i], seen.weights[i], seen.step)
            if name == exact:
                values["orthogonality_error_exact"] = exact_error(seen.O[i])
            if name == spectrum and values["norm_u"].isfinite():  # svdvals raises on NaN
                sigma = torch.linalg.svdvals(unit(seen.U[i]))
                values |= {f"sigma_{q:02}": torch.quantile(sigma, q / 100) for q in (5, 50, 95)}
            if name == spectrum and name in self._previous:
                before = self._previous.pop(name)
                values["cos_previous"] = torch.cosine_similarity(seen.O[i].flatten(), before.flatten(), 0)
            keys.append(list(values))
            rows.append(torch.stack([v.double() for v in values.values()]))
        flat = iter(torch.cat(rows).tolist())  # one transfer from the device a batch
        for name, names, W, factor in zip(seen.names, keys, seen.weights, seen.factors, strict=True):
            self._measured[name] = self._scalars({key: next(flat) for key in names}, name, W, factor, seen)

    def _measure(self, name: str, U: Tensor, O: Tensor, W: Tensor, step: int) -> dict[str, Tensor]:
        W = W.float() if W.dtype in (torch.bfloat16, torch.float16) else W
        z = probe_vectors(f"{self.seed}/{step}/{name}", O.shape[0], PROBES, O)
        scaled = unit(U)
        norm_U = torch.linalg.vector_norm(U.double())
        sigma = self._power("U", name, scaled)
        return {
            "norm_o": torch.linalg.vector_norm(O),
            "norm_w": torch.linalg.vector_norm(W),
            "norm_u": norm_U,
            "orthogonality_error": hutchinson_error(O, z),
            "spectral_norm_w": self._power("W", name, W),
            "spectral_norm_u": sigma * norm_U,
            "stable_rank": sigma**-2,
        }

    def _power(self, kind: str, name: str, X: Tensor) -> Tensor:
        """Largest singular value of X, approached from below, from where the last event ended."""
        if (kind, name) not in self._vectors:
            self._vectors[kind, name] = probe_vectors(f"{self.seed}/{kind}/{name}", X.shape[0], 1, X)
        v = self._vectors[kind, name]
        v = v / torch.linalg.vector_norm(v)
        for _ in range(POWER_STEPS):
            w = X @ (X.mT @ v)
            length = torch.linalg.vector_norm(w)
            v = torch.where((length > 0) & length.isfinite(), w / length, v)  # zero or broken matrices leave v usable
        self._vectors[kind, name] = v
        return torch.linalg.vector_norm(X.mT @ v)

    def _scalars(
        self, values: dict[str, float], name: str, W: Tensor, factor: float, seen: Observation
    ) -> dict[str, float]:
        group, entries, m, n = self._group(name), math.sqrt(W.numel()), min(W.shape), max(W.shape)
        norm_o, norm_w, norm_u = values.pop("norm_o"), values.pop("norm_w"), values.pop("norm_u")
        weight_rms = norm_w / entries
        predicted = predicted_rms(group, seen.lr, self.factors[name], n, weight_rms)
        values |= {
            "k": norm_o / math.sqrt(m),
            "weight_rms": weight_rms,
            "update_rms": predicted if group["variant"] in FIXED else seen.lr * factor * norm_o / entries,
            "predicted_rms": predicted,
            "lr": seen.lr,
            "weight_decay": seen.weight_decay,
            "step": seen.step,
        }
        if weight_rms > 0.0:
            values["u_w"] = values["update_rms"] / weight_rms
        values["nonfinite"] = float(not (math.isfinite(norm_o) and math.isfinite(norm_w)))
        values["zero_update"] = float(norm_u == 0.0)
        return {key: value for key, value in values.items() if math.isfinite(value)}

    def collect(self) -> dict[str, float | str]:
        """Metrics of the last event as flat keys "muon/…", which are then forgotten; {} if nothing was measured.

        Collective where the matrices have owners: call it on every rank.
        """
        own, self._measured = self._measured, {}
        owners = self.optimizer.replicas
        parts = owners.gather_objects(own) if owners else [own]
        layers = _union(parts)
        if not layers:
            return {}
        if self.advice:
            self.advice.see(layers, self.names, {name: self._group(name) for name in self.names})
        return merge(parts)

    def advise(self, step: int, loss: float) -> list[str]:
        """Lines of advice, usually none: call it in every step, so that a loss spike is seen."""
        return self.advice.lines(step, loss) if self.advice else []

    def _group(self, name: str) -> dict:
        return self.optimizer.param_groups[self.places[name]]


def hutchinson_error(O: Tensor, z: Tensor) -> Tensor:
    """Estimate of ||O O^T - I||_F / sqrt(m) from probes z (m, probes) of length sqrt(m)."""
    residual = O @ (O.mT @ z) - z
    return (residual.square().sum(0).mean() / O.shape[0]).sqrt()


def exact_error(O: Tensor) -> Tensor:
    R = O @ O.mT
    R.diagonal().sub_(1.0)
    return torch.linalg.vector_norm(R) / math.sqrt(O.shape[0])


def probe_vectors(key: str, rows: int, columns: int, like: Tensor) -> Tensor:
    """(rows, columns) with columns of length sqrt(rows), a function of the key alone."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "little")
    z = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (z * (math.sqrt(rows) / torch.linalg.vector_norm(z, dim=0))).to(like.device, like.dtype)


def unit(U: Tensor) -> Tensor:
    """U / ||U||_F without underflow; zero stays zero."""
    U = U * power_of_two(U.contiguous()[None])[0]
    norm = torch.linalg.vector_norm(U)
    return U / torch.where(norm == 0, 1.0, norm)


def rms(X: Tensor) -> float:
    return (torch.linalg.vector_norm(X.double()) / math.sqrt(X.numel())).item()


def _union(parts: list[Layers]) -> Layers:
    return {name: values for part in parts for name, values in part.items()}


def merge(parts: list[Layers]) -> dict[str, float | str]:
    """Flat metrics of the layers that several ranks measured (a layer that two of them hold counts once)."""
    layers = dict(sorted(_union(parts).items()))
    flat: dict[str, float | str] = {}
    for what, kinds in {
        "update_rms": "median max",
        "predicted_rms": "median",
        "weight_rms": "median max",
        "u_w": "median max",
        "k": "median min",
        "orthogonality_error": "median max",
        "spectral_norm_w": "max",
        "spectral_norm_u": "median max",
        "stable_rank": "median min",
    }.items():
        values = {name: v[what] for name, v in layers.items() if what in v}
        for kind in kinds.split() if values else ():
            flat[f"muon/{what}_{kind}"] = {"median": median, "max": max, "min": min}[kind](values.values())
        if what in ("u_w", "orthogonality_error") and values:
            flat[f"muon/{what}_layer"] = max(values, key=values.__getitem__)
    if "muon/orthogonality_error_layer" in flat:
        flat["muon/worst_layer"] = flat.pop("muon/orthogonality_error_layer")
    for what in ("orthogonality_error_exact", "cos_previous", "sigma_05", "sigma_50", "sigma_95"):
        values = {name: v[what] for name, v in layers.items() if what in v}
        if values:  # of one layer
            flat[f"muon/{what}"] = median(values.values())
        if len(values) == 1 and what in ("orthogonality_error_exact", "sigma_05"):
            flat[f"muon/{what}_layer"] = next(iter(values))
    for count in ("zero_update", "nonfinite"):
        flat[f"muon/{count}_layers"] = int(sum(v.get(count, 0.0) for v in layers.values()))
    return flat | {"muon/layers": len(layers)}


def scalar_map(sigma: Tensor, coefficients: str | list, steps: int) -> Tensor:
    """What Newton-Schulz makes of the singular values `sigma` (of U / ||U||_F) in exact arithmetic."""
    if coefficients == "polar_express4":
        s = sigma / (SCHATTEN_MARGIN * torch.linalg.vector_norm(sigma, 8).clamp(min=torch.finfo(sigma.dtype).tiny))
    else:
        s = sigma / (SAFETY.get(coefficients, 1.0) if isinstance(coefficients, str) else 1.0)
    for a, b, c in triples(coefficients, steps):
        s = a * s + b * s**3 + c * s**5
    return s
