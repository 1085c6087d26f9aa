"""What is printed of a routing plan: every tensor with its reason, totals, groups, predicted update RMS.

Units    predicted update RMS = lr s(A, B) / sqrt(max(A, B)) for a perfectly orthogonal update
"""

import math
from typing import TYPE_CHECKING

from ..muon.blocks import FIXED, predicted_rms, shape_factor

if TYPE_CHECKING:
    from .plan import Decision, RoutingPlan

Row = tuple[
    str, "Decision", dict | None
]  # who trains it (Muon, AdamW, …), or exclude or frozen; the decision; its group


def text(plan: "RoutingPlan", groups: list[dict] | None = None) -> str:
    """The text of routing.txt. With the optimizer's `param_groups` also rates, decay and predicted update RMS."""
    rows = _rows(plan, groups)
    totals = _totals(rows)
    lines = [f"[{kind}] Assigning: {d.name} (torch.Size({list(d.shape)}))" for kind, d, _ in rows]
    lines += ["", *(_row(kind, d, group) for kind, d, group in rows), ""]
    lines += [f"{kind} optimizer params: {_millions(n)} ({count} tensors)" for kind, (n, count) in totals.items()]
    lines += [f"{kind} optimizes {100.0 * share:.1f}% of parameters" for kind, share in _shares(totals).items()]
    lines += _group_lines(groups or [])
    muon = [(d, group) for kind, d, group in rows if kind == "Muon" and group is not None]
    if sizes := [rms for d, group in muon for _, _, rms in _predicted(d, group)]:
        variant, mode = muon[0][1].get("variant", "muon"), muon[0][1].get("lr_mode", "original")
        scale = f"variant {variant}" if variant in FIXED else f"lr mode {mode}"
        lines.append(f"Using {scale}: an orthogonal update of Muon has RMS {min(sizes):.2e} to {max(sizes):.2e}")
    return "\n".join(lines) + "\n"


def as_json(plan: "RoutingPlan", groups: list[dict] | None = None) -> dict:
    """Decisions and totals as JSON values; with `param_groups` also lr, wd, s(A, B) and update RMS."""
    rows, tensors = _rows(plan, groups), []
    for kind, d, group in rows:
        split = {k: list(v) if isinstance(v, tuple) else v for k, v in d.split.items()} if d.split else None
        row = {"name": d.name, "aliases": d.aliases, "shape": list(d.shape), "numel": d.numel}
        row |= {"by": kind, "route": kind.lower(), "role": d.role, "split": split, "lr_mult": d.lr_mult}
        if group is not None:
            row |= {"group": group["name"], "lr": float(group["lr"]), "wd": group.get("weight_decay", 0.0)}
        if group is not None and kind == "Muon":
            row["blocks"] = [{"shape": list(b), "s": s, "update_rms": rms} for b, s, rms in _predicted(d, group)]
        tensors.append(row | {"reason": d.reason})
    totals = _totals(rows)
    params = {f"{kind.lower()}_params": values for kind, (values, _) in totals.items()}
    shares = _shares(totals)
    return {"tensors": tensors, **params, "shares": shares, "muon_share": shares.get("Muon", 0.0)}


def _rows(plan: "RoutingPlan", groups: list[dict] | None) -> list[Row]:
    """Every tensor with who trains it; the groups of an optimizer other than Muon overrule the plan."""
    of = {id(p[1] if isinstance(p, tuple) else p): group for group in groups or [] for p in group["params"]}
    rows = []
    for d in plan.decisions:
        kind, group = {"muon": "Muon", "adamw": "AdamW"}.get(d.route, d.route), of.get(id(d.param))
        if groups is not None and d.route in ("muon", "adamw") and not (group or {}).get("use_muon"):
            kind = rule(group or {})
        rows.append((kind, d, group))
    return rows


def rule(group: dict) -> str:
    """Who steps a group that is not Muon's."""
    return group.get("rule", "AdamW")


def _totals(rows: list[Row]) -> dict[str, list[int]]:
    """Values and tensors trained by each; slices that Muon leaves to AdamW count as its values.

    Muon and AdamW are named even if they train nothing, unless somebody else trains something.
    """
    totals = {"Muon": [0, 0], "AdamW": [0, 0]}
    for kind, d, _ in rows:
        if d.route in ("muon", "adamw"):
            muon = d.counts()["muon"] if kind == "Muon" else 0
            totals["Muon"][0] += muon
            totals.setdefault(kind, [0, 0])[1] += 1
            totals["AdamW" if kind == "Muon" else kind][0] += d.numel - muon
    return totals if len(totals) == 2 else {kind: counts for kind, counts in totals.items() if any(counts)}


def _shares(totals: dict[str, list[int]]) -> dict[str, float]:
    """Of all values, what each trains; the rest is AdamW's."""
    everything = max(1, sum(values for values, _ in totals.values()))
    return {kind: values / everything for kind, (values, _) in totals.items() if kind != "AdamW"}


def _predicted(d: "Decision", group: dict) -> list[tuple[tuple[int, int], float, float]]:
    """(shape, s(A, B), predicted update RMS) of every kind of block; s is 1 for variants that set their own size."""
    variant, found = group.get("variant", "muon"), []
    weight_rms = math.nan
    if variant == "hyperball" and not d.param.is_meta:
        weight_rms = d.param.detach().float().square().mean().sqrt().item()
    for A, B in dict.fromkeys(d.block_shapes()):
        s = 1.0
        if variant not in FIXED:
            s = shape_factor(group.get("lr_mode", "original"), A, B, group.get("rms_target", 0.2))
        rms = predicted_rms({"variant": "muon", **group}, float(group["lr"]), s, max(A, B), weight_rms)
        found.append(((A, B), s, rms))
    return found


def _row(kind: str, d: "Decision", group: dict | None) -> str:
    parts = [f"{d.name}", f"{'x'.join(map(str, d.shape)) or 'scalar'}", f"{d.numel} values", kind, d.role]
    if d.aliases:
        parts.append(f"also {', '.join(d.aliases)}")
    if group is not None:
        parts += [f"lr {group['lr']:g}", f"wd {group.get('weight_decay', 0.0):g}"]
    if kind == "Muon":
        if d.split:
            parts.append(" ".join(f"{k} {v}" for k, v in d.split.items()))
        if group is not None:
            predicted = _predicted(d, group)
            parts.append("s(A,B) " + ", ".join(f"{A}x{B}: {s:.3f}" for (A, B), s, _ in predicted))
            parts.append("predicted update RMS " + ", ".join(f"{rms:.2e}" for _, _, rms in predicted))
    return " | ".join([*parts, d.reason])


def _group_lines(groups: list[dict]) -> list[str]:
    lines = []
    for group in groups:
        count = sum((p[1] if isinstance(p, tuple) else p).numel() for p in group["params"])
        text = f"group {group['name']}: {len(group['params'])} tensors, {_millions(count)}, "
        text += f"lr={group['lr']:g}, wd={group.get('weight_decay', 0.0):g}"
        if "slices" in group:
            text += f"; AdamW trains thin slices of them at lr={group['lr'] * group['slices']['lr_ratio']:g}"
        lines.append(text)
    if muon := next((g for g in groups if g.get("use_muon")), None):
        present = {g["name"].split(" ")[0] for g in groups}
        lines += [f"group {role}: empty" for role in ("embed", "head", "scalar") if role not in present]
        lines.append(
            f"Using Muon optimizer for 2D parameters (lr={muon['lr']:g}, momentum={muon.get('momentum', 0.95):g})"
        )
    others: dict[str, list[dict]] = {}
    for group in groups:
        if not group.get("use_muon"):
            others.setdefault(rule(group), []).append(group)
    for who, own in others.items():
        whom = "1D/0D parameters" if others.keys() == {"AdamW"} else "groups " + ", ".join(g["name"] for g in own)
        rates = dict.fromkeys(f"{g['lr']:g}" for g in own)
        lines.append(f"Using {who} optimizer for {whom} (lr={', '.join(rates)})")
    return lines


def _millions(n: int) -> str:
    return f"{n / 1e6:.2f}M" if n >= 10_000 else f"{n / 1e6:.6f}M"
