"""Which tensor is trained by Muon, which by AdamW, and why.

Decision order, first match wins; every decision keeps its reason as a sentence:
    1  an override (regex on any name of the tensor)      --optim.route "regex=adamw"
    2  the tag of a model class, `p.muonlm = {"role": ..., "route": ..., "split": (dim, [sizes]), "heads": (dim, n)}`
    3  the type of the module that owns it, by identity, so that a tied tensor is seen under all its names
    4  the exact last component of its name or of its module's name, never a substring (`norm_proj` is a projection)
    5  its shape
    6  default: AdamW

Roles    matrix (Muon) · embed · head · scalar (norms, biases, vectors, learned positions and other leftovers)
Routes   muon · adamw · exclude (trainable, but left out on request) · frozen (requires_grad=False; listed, never counted)
Units    predicted update RMS = lr s(A, B) / sqrt(max(A, B)) for a perfectly orthogonal update
Raises   UserError for an override that matches nothing or cannot be followed, and for a Muon run without a Muon tensor
"""

import math
import re
from dataclasses import dataclass, field
from difflib import get_close_matches

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..config import UserError
from .muon import blocks, shape_factor

ROLES = ("matrix", "embed", "head", "scalar")
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm, _NormBase)
HEAD_NAMES = {"lm_head", "head", "output", "output_layer", "unembed", "unembedding", "embed_out", "classifier"}
POSITION_NAMES = {"wpe", "pos_emb", "pos_embed", "pos_embedding", "position_embedding", "position_embeddings",
                  "positional_embedding", "embed_positions"}  # fmt: skip
SCALAR_NAMES = {
    "bias",
    "A_log",
    "D",
    "dt_bias",
    "cls_token",
    "mask_token",
    "meta_tokens",
    "prompt",
    "prompt_embeddings",
}
SMALL_HEADS = {"dt_proj", "dt_head", "router"}  # modules whose weight is a matrix by shape, but no hidden map
INPUT_CHANNELS = 4  # a convolution on so few channels reads pixels: an embedding rather than a hidden map


@dataclass(frozen=True)
class Decision:
    name: str
    aliases: list[str]
    shape: tuple[int, ...]
    numel: int
    route: str
    role: str
    split: dict | None
    reason: str
    param: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class RoutingPlan:
    decisions: list[Decision]

    def groups(
        self,
        *,
        lr: float,
        adamw_lr: float | None = None,
        embed_lr: float | None = None,
        head_lr: float | None = None,
        scalar_lr: float | None = None,
        wd: float = 0.0,
        adamw_wd: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> list[dict]:
        """Parameter groups "muon", "embed", "head", "scalar" for `Muon`; empty ones are dropped, scalars are never decayed."""
        chosen = [d for d in self.decisions if d.route == "muon"]
        if not chosen:
            raise UserError(
                "this run asks for Muon but no parameter is routed to it (see the reasons in routing.txt); "
                "use --optim.name adamw"
            )
        groups = [
            {
                "params": [(d.name, d.param) for d in chosen],
                "splits": [d.split for d in chosen],
                "name": "muon",
                "use_muon": True,
                "lr": lr,
                "base_lr": lr,
                "weight_decay": wd,
            }
        ]
        for role, own_lr in (("embed", embed_lr), ("head", head_lr), ("scalar", scalar_lr)):
            roles = ("scalar", "matrix") if role == "scalar" else (role,)  # a matrix kept from Muon joins the leftovers
            params = [(d.name, d.param) for d in self.decisions if d.route == "adamw" and d.role in roles]
            rate = adamw_lr if own_lr is None else own_lr
            if not params:
                continue
            if rate is None:
                raise UserError(f"the {role} parameters are trained by AdamW and need a rate of their own, found none; "
                                f"set --optim.adamw_lr or --optim.{role}_lr")  # fmt: skip
            decay = 0.0 if role == "scalar" else adamw_wd
            rates = {"lr": rate, "base_lr": rate, "weight_decay": decay, "betas": tuple(betas), "eps": eps}
            groups.append({"params": params, "name": role, "use_muon": False, **rates})
        return groups

    def table(self, groups: list[dict] | None = None) -> str:
        """The text of routing.txt. With the optimizer's `param_groups` it also has rates, decay and predicted update RMS."""
        tensors = {id(p[1] if isinstance(p, tuple) else p): g for g in groups or [] for p in g["params"]}
        rows, totals = [], {"Muon": [0, 0], "AdamW": [0, 0]}
        for d in self.decisions:
            group = tensors.get(id(d.param))
            kind = {"muon": "Muon", "adamw": "AdamW"}.get(d.route, d.route)
            if groups is not None and d.route in ("muon", "adamw"):
                kind = "Muon" if group is not None and group.get("use_muon") else "AdamW"
            if kind in totals:
                totals[kind][0] += d.numel
                totals[kind][1] += 1
            rows.append((kind, d, group))
        everything = totals["Muon"][0] + totals["AdamW"][0]
        share = 100.0 * totals["Muon"][0] / everything if everything else 0.0
        lines = [f"[{kind}] Assigning: {d.name} (torch.Size({list(d.shape)}))" for kind, d, _ in rows]
        lines += ["", *(_row(kind, d, group) for kind, d, group in rows), ""]
        lines += [f"{kind} optimizer params: {_millions(n)} ({count} tensors)" for kind, (n, count) in totals.items()]
        lines.append(f"Muon optimizes {share:.1f}% of parameters")
        lines += _group_lines(groups or [])
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict:
        """The decisions and totals as plain JSON values."""
        keys = ("name", "aliases", "shape", "numel", "route", "role", "split", "reason")
        rows = [{k: list(v) if isinstance(v := getattr(d, k), tuple) else v for k in keys} for d in self.decisions]
        muon, adamw = (sum(d.numel for d in self.decisions if d.route == r) for r in ("muon", "adamw"))
        return {"tensors": rows, "muon_params": muon, "adamw_params": adamw, "muon_share": muon / max(1, muon + adamw)}


def route(
    model: nn.Module,
    *,
    overrides: list[tuple[str, str]] = (),
    split_fused: bool = True,
    per_head: bool = False,
    min_dim: int = 16,
) -> RoutingPlan:
    """Decide for every parameter of `model`, once by identity.

    overrides    [(regex, "muon" | "adamw" | "exclude"), ...], searched in every name of a tensor; the first match wins
    split_fused  orthogonalise fused matrices (q|k|v) slice by slice; per_head: head by head; neither: as one matrix
    min_dim      a matrix with fewer rows or columns goes to AdamW: its orthogonal factor says little more than its norm
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    tensors: dict[int, Tensor] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{module_name}.{name}" if module_name else name
            owners.setdefault(id(p), []).append((full, module))
            tensors[id(p)] = p
    rules = _compile(overrides, [name for places in owners.values() for name, _ in places])
    embeddings = {(m.num_embeddings, m.embedding_dim) for m in model.modules() if isinstance(m, nn.Embedding)}

    decisions = []
    for key, places in owners.items():
        p = tensors[key]
        places = sorted(places, key=lambda place: not isinstance(place[1], nn.Embedding | nn.EmbeddingBag))  # stable
        names = [name for name, _ in places]
        if not p.requires_grad:
            taken, role, split, reason = "frozen", "scalar", None, "requires_grad is False"
        else:
            taken, role, split, reason = _decide(p, places, rules, embeddings, split_fused, per_head, min_dim)
        decisions.append(Decision(names[0], names[1:], tuple(p.shape), p.numel(), taken, role, split, reason, p))
    assert {id(d.param) for d in decisions} == {id(p) for p in model.parameters()}
    return RoutingPlan(decisions)


def _decide(p, places, rules, embeddings, split_fused, per_head, min_dim) -> tuple[str, str, dict | None, str]:
    """(route, role, split, reason) of one trainable tensor."""
    tag = getattr(p, "muonlm", None) or {}
    natural = _by_tag(tag) or _by_owner(places, embeddings) or _by_name(places, p) or _by_shape(p, places, min_dim)
    taken, role, reason = natural
    for pattern, wanted in rules:
        if hit := next((name for name, _ in places if pattern.search(name)), None):
            if wanted == "muon" and p.ndim < 2:
                raise UserError(f'the override "{pattern.pattern}=muon" matches {hit} of shape {tuple(p.shape)}, which is no matrix; '
                                f'narrow the regex or write "{pattern.pattern}=adamw"')  # fmt: skip
            taken, reason = wanted, f'override "{pattern.pattern}={wanted}"'
    if taken == "muon":
        role = "matrix"
    return taken, role, _split(p, tag, places, split_fused, per_head) if taken == "muon" else None, reason


def _by_tag(tag: dict) -> tuple[str, str, str] | None:
    role, taken = tag.get("role"), tag.get("route")
    if role is None and taken is None:
        return None
    assert role in (*ROLES, None) and taken in ("muon", "adamw", "exclude", None), f"bad tag {tag}"
    role = role or ("matrix" if taken == "muon" else "scalar")
    return taken or ("muon" if role == "matrix" else "adamw"), role, f"tagged {role} by its model class"


def _by_owner(places: list[tuple[str, nn.Module]], embeddings: set[tuple[int, int]]) -> tuple[str, str, str] | None:
    for name, module in places:
        kind, path = type(module).__name__, name.split(".")
        last = path[-1]
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            if path[-2:-1] and path[-2] in POSITION_NAMES:
                return "adamw", "scalar", f"learned positions ({path[-2]}, {kind})"
            tied = f", tied to {', '.join(n for n, _ in places[1:])}" if len(places) > 1 else ""
            return "adamw", "embed", f"owned by {kind}{tied}"
        if isinstance(module, NORMS):
            return "adamw", "scalar", f"owned by {kind}, a norm"
        if isinstance(module, _ConvNd) and last == "weight":
            if isinstance(module, _ConvTransposeNd):
                return "adamw", "scalar", f"owned by {kind}: its rows are not its outputs"
            if module.groups > 1:
                return "adamw", "scalar", f"owned by {kind} with {module.groups} groups: no full matrix"
            if module.in_channels <= INPUT_CHANNELS:
                return "adamw", "embed", f"owned by {kind} on {module.in_channels} input channels: reads the raw input"
            return None  # an ordinary convolution is decided by its flattened shape
        if isinstance(module, nn.MultiheadAttention) and last.endswith("proj_weight"):
            return "muon", "matrix", f"projection of {kind}"
        if isinstance(module, nn.Linear) and last == "weight":
            inside = any(part.isdigit() for part in path)  # layers.3.attn.output is a hidden projection
            if not inside and path[-2:-1] and path[-2] in HEAD_NAMES:
                return "adamw", "head", f"output head: Linear named {path[-2]}"
            if not inside and (module.out_features, module.in_features) in embeddings:
                return (
                    "adamw",
                    "head",
                    f"output head: Linear with the shape of the embedding {tuple(module.weight.shape)}",
                )
    return None


def _by_name(places: list[tuple[str, nn.Module]], p: Tensor) -> tuple[str, str, str] | None:
    for name, _ in places:
        path = name.split(".")
        if path[-1] in SCALAR_NAMES | POSITION_NAMES:
            return "adamw", "scalar", f"named {path[-1]}"
        if path[-1] == "weight" and path[-2:-1] and path[-2] in SMALL_HEADS:
            return "adamw", "scalar", f"weight of a {path[-2]}"
    return None


def _by_shape(p: Tensor, places: list[tuple[str, nn.Module]], min_dim: int) -> tuple[str, str, str]:
    conv = isinstance(places[0][1], _ConvNd)
    if p.ndim < 2:
        return "adamw", "scalar", f"{p.ndim}-D"
    if p.ndim == 2 or (conv and p.ndim > 2):
        rows, columns = p.shape[0], p[0].numel()
        if min(rows, columns) < min_dim:
            return "adamw", "matrix", f"{rows}x{columns} is under {min_dim} in one dimension"
        return (
            "muon",
            "matrix",
            f"convolution flattened to {rows}x{columns}" if conv else f"hidden matrix {rows}x{columns}",
        )
    if p.ndim == 3 and any("experts" in name.split(".") for name, _ in places) and min(p.shape[1:]) >= min_dim:
        return "muon", "matrix", f"{p.shape[0]} stacked experts, one matrix each"
    return "adamw", "scalar", f"{p.ndim}-D and neither a convolution nor stacked experts: default"


def _split(p: Tensor, tag: dict, places: list[tuple[str, nn.Module]], split_fused: bool, per_head: bool) -> dict | None:
    module, last = places[0][1], places[0][0].split(".")[-1]
    if isinstance(module, _ConvNd):
        return {"flatten": True}
    if isinstance(module, nn.MultiheadAttention) and last == "in_proj_weight" and not tag:
        tag = {"split": (0, [module.embed_dim] * 3), "heads": (0, 3 * module.num_heads)}
    if per_head and "heads" in tag:
        return {"heads": tuple(tag["heads"])}
    if split_fused and "split" in tag:
        return {"split": (tag["split"][0], list(tag["split"][1]))}
    return None


def _compile(overrides: list[tuple[str, str]], names: list[str]) -> list[tuple[re.Pattern, str]]:
    """Overrides in reverse, so that a later assignment in a plain loop leaves the first match; every one must match."""
    rules = []
    for regex, wanted in overrides:
        if wanted not in ("muon", "adamw", "exclude"):
            raise UserError(
                f'the override "{regex}={wanted}" has no such route; write "{regex}=muon", "=adamw" or "=exclude"'
            )
        try:
            pattern = re.compile(regex)
        except re.error as error:
            raise UserError(
                f"the override {regex!r} is not a regular expression ({error}); escape it, e.g. {re.escape(regex)}"
            ) from None
        if not any(pattern.search(name) for name in names):
            near = get_close_matches(regex, names, n=1, cutoff=0.0)
            raise UserError(
                f"the override {regex!r} matches no parameter; did you mean {near[0] if near else 'another model'}?"
            )
        rules.insert(0, (pattern, wanted))
    return rules


def _row(kind: str, d: Decision, group: dict | None) -> str:
    parts = [f"{d.name}", f"{'x'.join(map(str, d.shape)) or 'scalar'}", f"{d.numel} values", kind, d.role]
    if d.aliases:
        parts.append(f"also {', '.join(d.aliases)}")
    if group is not None:
        parts += [f"lr {group['lr']:g}", f"wd {group['weight_decay']:g}"]
    if kind == "Muon":
        if d.split:
            parts.append(" ".join(f"{k} {v}" for k, v in d.split.items()))
        shapes = list(dict.fromkeys(tuple(b.shape) for b in blocks(d.param.detach(), d.split)))
        if group is not None:
            mode, target = group.get("lr_mode", "original"), group.get("rms_target", 0.2)
            factors = [shape_factor(mode, *shape, target) for shape in shapes]
            parts.append("s(A,B) " + ", ".join(f"{A}x{B}: {s:.3f}" for (A, B), s in zip(shapes, factors, strict=True)))
            rms = [group["lr"] * s / math.sqrt(max(shape)) for s, shape in zip(factors, shapes, strict=True)]
            parts.append("predicted update RMS " + ", ".join(f"{r:.2e}" for r in rms))
    return " | ".join([*parts, d.reason])


def _group_lines(groups: list[dict]) -> list[str]:
    lines = []
    for group in groups:
        count = sum((p[1] if isinstance(p, tuple) else p).numel() for p in group["params"])
        text = f"group {group['name']}: {len(group['params'])} tensors, {_millions(count)}, lr={group['lr']:g}, wd={group['weight_decay']:g}"
        lines.append(text)
    if any(g.get("use_muon") for g in groups):
        present = {g["name"] for g in groups}
        lines += [f"group {role}: empty" for role in ("embed", "head", "scalar") if role not in present]
        muon = next(g for g in groups if g.get("use_muon"))
        lines.append(
            f"Using Muon optimizer for 2D parameters (lr={muon['lr']:g}, momentum={muon.get('momentum', 0.95):g})"
        )
    rates = dict.fromkeys(f"{g['lr']:g}" for g in groups if not g.get("use_muon"))
    if rates:
        lines.append(f"Using AdamW optimizer for 1D/0D parameters (lr={', '.join(rates)})")
    return lines


def _millions(n: int) -> str:
    return f"{n / 1e6:.2f}M" if n >= 10_000 else f"{n / 1e6:.6f}M"
