"""Which tensor is trained by Muon, which by AdamW, and why.

Decision order, first match wins; every decision keeps its reason as a sentence:
    1  an override (regex, route, settings) on any name of the tensor, or an argument of `route` (x_proj, lora)
    2  the tag of a model class, `p.muonlm`: a dict with some of role, route, split, heads, adamw, lr_mult, wd
    3  the type of the module that owns it, by identity, so that a tied tensor is seen under all its names
    4  the exact last component of its name or of its module's name, never a substring (`norm_proj` is a projection)
    5  its shape
    6  default: AdamW

Roles    matrix (Muon) · embed · head · scalar (norms, biases, vectors, gates, learned positions and other leftovers)
Routes   muon · adamw · exclude (trainable, but left out on request) · frozen (requires_grad=False; never counted)
Splits   A fused matrix is orthogonalised slice by slice: {"split": (dim, [sizes])}, or {"heads": (dim, n)} for n equal
         ones. "adamw": [i, ...]: slices too thin for Muon (`min_dim`), which AdamW trains. "transposed": the tensor
         stores (in, out). Where the slices begin is read from the tag, or else from the module around the matrix.
Experts  (E, out, in): one matrix each. For a stack stored as (E, in, out) set `is_transposed = True` on its module.
Raises   UserError for an override or a tag that matches nothing or cannot be followed
"""

import math
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from muonlm.errors import UserError

from .layouts import Flags, Place, is_ssm, is_x_proj, layout, names, splits_entry, transposed
from .plan import Decision, RoutingPlan

ROLES = ("matrix", "embed", "head", "scalar")
SETTINGS = ("lr_mult", "wd", "split", "heads", "adamw")  # what an override may say beside the route
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm, _NormBase)
INPUT_CHANNELS = 4  # a convolution on so few channels reads pixels: an embedding rather than a hidden map


WRAPPERS = names("_orig_mod _fsdp_wrapped_module _checkpoint_wrapped_module base_layer")  # no part of a tensor's name
HEADS_ANYWHERE = names("lm_head lm_heads unembed unembedding embed_out")
HEADS = HEADS_ANYWHERE | names("head output output_layer classifier score qa_outputs")  # only outside numbered layers
POSITIONS = names("""wpe pos_emb pos_embed pos_embedding position_embedding position_embeddings positional_embedding
                      embed_positions pos pos_enc pos_encoding positions relative_attention_bias
                      relative_position_bias_table""")
SCALARS = names("""bias A_log D dt_bias cls_token class_embedding mask_token meta_tokens register_tokens query_tokens
                    prompt prompt_embeddings time_decay time_first time_faaaa""")
SMALL_HEADS = names("dt_proj dt_head shared_expert_gate")  # their weight is a matrix by shape, but no hidden map
GATE_HEADS = names("a_proj b_proj beta_proj in_proj_a in_proj_b in_proj_ba")  # decay and beta of a Gated DeltaNet
LORA = names("lora_A lora_B lora_a lora_b lora_embedding_A lora_embedding_B")


def route(
    model: nn.Module,
    *,
    overrides: Sequence[tuple | str] = (),
    split_fused: bool = True,
    per_head: bool = False,
    min_dim: int = 16,
    x_proj: str = "split",
    lora: str = "adamw",
) -> RoutingPlan:
    """Decide for every parameter of `model`, once by identity.

    overrides    [(regex, "muon" | "adamw" | "exclude"[, settings]), ...], or "regex=muon", searched in every name of a
                 tensor; the first match wins. settings: some of lr_mult, wd, split, heads, adamw; its cut wins
    split_fused  orthogonalise fused matrices (q|k|v) slice by slice; per_head: head by head; neither: as one matrix
    min_dim      a matrix with fewer rows or columns goes to AdamW: its orthogonal factor says little more than its norm
    x_proj       of Mamba and Longhorn: "split" into dt|B|C, "fused" as one matrix, or "adamw"
    lora         "muon" orthogonalises LoRA factors of any rank above 1; "adamw"
    """
    for flag, value, allowed in (("x_proj", x_proj, ("split", "fused", "adamw")), ("lora", lora, ("muon", "adamw"))):
        if value not in allowed:
            raise UserError(f"{flag}={value!r} is unknown; use one of {', '.join(allowed)}")
    places: dict[int, list[Place]] = {}
    tensors: dict[int, Tensor] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for module_name, module in modules.items():
        outer = module_name
        while outer.rpartition(".")[2] in WRAPPERS:
            outer = outer.rpartition(".")[0]
        parent = modules[outer.rpartition(".")[0]] if outer else None
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{module_name}.{name}" if module_name else name
            path = [part for part in full.split(".") if part not in WRAPPERS]
            places.setdefault(id(p), []).append(Place(full, path, module, parent))
            tensors[id(p)] = p
    rules = _compile(overrides, [place.name for found in places.values() for place in found])
    flags = Flags(split_fused, per_head, min_dim, x_proj, lora)
    head, first = _head_by_shape(places, tensors), next(iter(places), None)

    decisions = []
    for key, found in places.items():
        p = tensors[key]
        found = sorted(found, key=lambda place: not isinstance(place.module, nn.Embedding | nn.EmbeddingBag))  # stable
        if not p.requires_grad:
            verdict = {"route": "frozen", "role": "scalar", "split": None, "reason": "requires_grad is False"}
        else:
            verdict = _decide(p, found, rules, flags, is_head=key == head, is_first=key == first)
        names = [place.name for place in found]
        decisions.append(Decision(names[0], names[1:], tuple(p.shape), p.numel(), param=p, **verdict))
    assert {id(d.param) for d in decisions} == {id(p) for p in model.parameters()}
    return RoutingPlan(decisions)


Choice = tuple[str, str, str]  # route, role, reason


def _decide(p: Tensor, places: list[Place], rules: list, flags: Flags, *, is_head: bool, is_first: bool) -> dict:
    """Everything of a `Decision` that is decided, for one trainable tensor."""
    tag = _checked_tag(p, places[0].name)
    taken, role, reason = (
        _by_flag(p, places, flags)
        or _by_tag(tag)
        or _by_owner(p, places, is_head, is_first)
        or _by_name(places)
        or _by_shape(p, places, flags.min_dim)
    )
    settings = {key: tag[key] for key in ("lr_mult", "wd") if key in tag}
    cut, own = {}, next(((rule, at.name) for rule in rules for at in places if rule[0].search(at.name)), None)
    if own:
        (pattern, taken, given), name = own
        if taken == "muon" and p.ndim < 2:
            raise UserError(
                f'the override "{pattern.pattern}=muon" matches {name} of shape {tuple(p.shape)}, which is no matrix; '
                f'narrow the regex or write "{pattern.pattern}=adamw"'
            )
        reason = f'override "{pattern.pattern}={taken}"'
        settings |= {key: given[key] for key in ("lr_mult", "wd") if key in given}
        cut = {key: given[key] for key in ("split", "heads", "adamw") if key in given}
    split = None
    if taken == "muon":
        role = "matrix"
        if cut:
            split = _check_cut(name, p, cut) | ({"transposed": True} if transposed(p, places[0].module) else {})
        else:
            if flags.x_proj == "fused" and is_x_proj(places):
                found, why = {}, "x_proj=fused"
            else:
                found, why = (tag, "") if "split" in tag or "heads" in tag else layout(p, places[0], flags)
            split, refusal = (None, why) if found is None else splits_entry(p, places[0], found, flags)
            if refusal and not own:
                taken, reason = "adamw", refusal
            elif why and found is not None:
                reason += f"; {why}"
    flat = _flattened(p, places)
    return {"route": taken, "role": role, "split": split, "reason": flat or reason, "flat": flat, **settings}


def _by_flag(p: Tensor, places: list[Place], flags: Flags) -> Choice | None:
    """What an argument of `route` says of tensors of one name; it is the user's word, so it comes before a tag."""
    if flags.x_proj == "adamw" and is_x_proj(places):
        return "adamw", "matrix", "x_proj=adamw"
    for factor in LORA.intersection(part for place in places for part in place.path):
        return (flags.lora if p.ndim == 2 and min(p.shape) > 1 else "adamw"), "matrix", f"{factor}, lora={flags.lora}"
    return None


def _checked_tag(p: Tensor, name: str) -> dict:
    """`p.muonlm`, or UserError: a tag comes from the author of the model."""
    tag = getattr(p, "muonlm", None) or {}
    known = ("role", "route", "flatten", "transposed", *SETTINGS)
    good = isinstance(tag, dict) and set(tag) <= set(known)
    good = good and tag.get("role") in (*ROLES, None) and tag.get("route") in ("muon", "adamw", "exclude", None)
    good = good and all(isinstance(tag.get(key, 0.0), int | float) for key in ("lr_mult", "wd"))
    for key, kind in (("split", tuple | list), ("heads", int)):
        pair = tag.get(key, (0, [] if key == "split" else 1)) if good else ()
        good = good and isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], kind)
    if not good:
        raise UserError(
            f"the tag of {name}, p.muonlm = {tag!r}, cannot be followed; write a dict with some of {', '.join(known)}: "
            f"role one of {', '.join(ROLES)}; route muon, adamw or exclude; split (dim, [sizes]); heads (dim, n)"
        )
    if "split" in tag:
        _check_cut(name, p, {key: tag[key] for key in ("split", "adamw") if key in tag})
    elif "heads" in tag:
        _check_cut(name, p, {"heads": tag["heads"]})
    return tag


def _by_tag(tag: dict) -> Choice | None:
    role, taken = tag.get("role"), tag.get("route")
    if role is None and taken is None:
        return None
    role = role or ("matrix" if taken == "muon" else "scalar")
    return taken or ("muon" if role == "matrix" else "adamw"), role, f"tagged {role} by its model class"


def _by_owner(p: Tensor, places: list[Place], is_head: bool, is_first: bool) -> Choice | None:
    for place in places:
        module, kind, last = place.module, type(place.module).__name__, place.last
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or (kind.endswith("Embedding") and p.ndim == 2):
            if place.owner in POSITIONS or "Position" in kind:
                return "adamw", "scalar", f"learned positions ({place.owner}, {kind})"
            tied = f", tied to {', '.join(other.name for other in places[1:])}" if len(places) > 1 else ""
            return "adamw", "embed", f"owned by {kind}{tied}"
        if isinstance(module, NORMS) or re.search(r"(RMS|Layer|Group|Batch)Norm(Gated)?$", kind):
            return "adamw", "scalar", f"owned by {kind}, a norm"
        if re.search(r"(Router|TopkGate|MoEGate)$", kind):
            return "adamw", "scalar", f"owned by {kind}, a router"
        if isinstance(module, _ConvNd) and last == "weight":
            if isinstance(module, _ConvTransposeNd):
                return "adamw", "scalar", f"owned by {kind}: its rows are not its outputs"
            if module.groups > 1:
                return "adamw", "scalar", f"owned by {kind} with {module.groups} groups: no full matrix"
            if module.in_channels <= INPUT_CHANNELS:
                return "adamw", "embed", f"owned by {kind} on {module.in_channels} input channels: reads the raw input"
            if is_first:
                return "adamw", "embed", f"owned by {kind}, the first module: reads the raw input"
        if isinstance(module, nn.MultiheadAttention) and last.endswith("proj_weight"):
            return "muon", "matrix", f"projection of {kind}"
        if isinstance(module, nn.Linear) and last == "weight" and _named_head(place):
            return "adamw", "head", f"output head: Linear named {place.owner}"
    if is_head:
        return "adamw", "head", f"output head: Linear with the shape of the embedding {tuple(p.shape)}"
    return None


def _named_head(place: Place) -> bool:
    """layers.3.attn.output is a hidden projection, output the head; lm_head and lm_heads.2 are heads anywhere."""
    path = place.path[:-1]
    name = path[-2] if len(path) > 1 and path[-1].isdigit() else path[-1] if path else ""
    return name in HEADS_ANYWHERE or (place.owner in HEADS and not any(part.isdigit() for part in path))


def _head_by_shape(places: dict[int, list[Place]], tensors: dict[int, Tensor]) -> int | None:
    """The last Linear outside numbered layers with the shape of an embedding, if no head is known by name or by tie."""
    shapes, found = set(), None
    for key, where in places.items():
        linear = [place for place in where if isinstance(place.module, nn.Linear)]
        table = [place for place in where if isinstance(place.module, nn.Embedding) and place.owner not in POSITIONS]
        if (linear and table) or any(_named_head(place) for place in linear):
            return None
        if table and len(set(tensors[key].shape)) > 1:  # a square one would say nothing
            shapes.add(tensors[key].shape)
    for key, where in places.items():
        inside = any(part.isdigit() for part in where[0].path[:-1]) and len(where[0].path) > 2  # 2: Sequential(...)
        if isinstance(where[0].module, nn.Linear) and not inside and tensors[key].shape in shapes:
            found = key
    return found


def _by_name(places: list[Place]) -> Choice | None:
    for place in places:
        if place.last in SCALARS | POSITIONS or place.last.endswith("_bias"):
            return "adamw", "scalar", f"named {place.last}"
        if "router" in place.path[:-1] or (place.owner == "gate" and hasattr(place.parent, "experts")):
            return "adamw", "scalar", "weight of a router"
        gate = place.owner in GATE_HEADS and is_ssm(place.parent)
        if place.last == "weight" and (gate or place.owner in SMALL_HEADS):
            return "adamw", "scalar", f"weight of {place.owner}"
    return None


def _by_shape(p: Tensor, places: list[Place], min_dim: int) -> Choice:
    module = places[0].module
    conv = isinstance(module, _ConvNd)
    if p.ndim < 2:
        return "adamw", "scalar", f"{p.ndim}-D"
    if p.ndim == 2 or conv:
        rows, columns = p.shape[0], math.prod(p.shape[1:])
        if min(rows, columns) < min_dim:
            return "adamw", "matrix", f"{rows}x{columns} is under {min_dim} in one dimension"
        return "muon", "matrix", ("convolution flattened to" if conv else "hidden matrix") + f" {rows}x{columns}"
    stacked = any("experts" in place.path for place in places) or type(module).__name__.endswith("Experts")
    if p.ndim == 3 and (stacked or getattr(module, "num_experts", 1) == p.shape[0] > 1):
        if min(p.shape[1:]) < min_dim:
            return "adamw", "matrix", f"experts of {p.shape[1]}x{p.shape[2]}, under {min_dim} in one dimension"
        return "muon", "matrix", f"{p.shape[0]} stacked experts, one matrix each"
    return "adamw", "scalar", f"{p.ndim}-D and neither a convolution nor stacked experts: default"


def _flattened(p: Tensor, places: list[Place]) -> str:
    if hasattr(p, "ds_id"):
        return "it is partitioned by DeepSpeed ZeRO-3"
    if getattr(p, "_is_flat_param", False) or any(place.last in ("_flat_param", "flat_param") for place in places):
        return "it is a flat shard of FSDP1"
    if p.ndim < 2 and any(isinstance(at.module, nn.Linear | nn.Embedding) and at.last == "weight" for at in places):
        return "the weight of a matrix module has been flattened (FSDP1 with use_orig_params, or ZeRO)"
    return ""


# -------------------------------------------------------------------------------- overrides


def _compile(overrides: Sequence[tuple | str], names: list[str]) -> list[tuple[re.Pattern, str, dict]]:
    """The overrides with their regexes compiled; every one must match a name and make sense."""
    rules = []
    for rule in overrides:
        given: tuple[Any, ...] = tuple(rule.rsplit("=", 1)) if isinstance(rule, str) else rule
        if not 2 <= len(given) <= 3 or (len(given) == 3 and not isinstance(given[2], dict)):
            raise UserError(
                f'the override {rule!r} is no (regex, route) or (regex, route, settings); write ("attn", "adamw")'
            )
        regex, wanted = given[:2]
        settings = dict(given[2]) if len(given) == 3 else {}
        if wanted not in ("muon", "adamw", "exclude"):
            raise UserError(
                f'the override "{regex}={wanted}" has no such route; write "{regex}=muon", "=adamw" or "=exclude"'
            )
        try:
            pattern: re.Pattern[str] = re.compile(regex)
        except re.error as error:
            raise UserError(
                f"the override {regex!r} is not a regular expression ({error}); escape it, e.g. {re.escape(regex)}"
            ) from None
        if not any(pattern.search(name) for name in names):
            near = get_close_matches(regex, names, n=1, cutoff=0.0)
            raise UserError(
                f"the override {regex!r} matches no parameter; did you mean {near[0] if near else 'another model'}?"
            )
        _check_settings(regex, wanted, settings)
        rules.append((pattern, wanted, settings))
    return rules


def _check_settings(regex: str, wanted: str, settings: dict) -> None:
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise UserError(f"the override {regex!r} sets {unknown[0]!r}; it can set {', '.join(SETTINGS)}")
    if cuts := sorted({"split", "heads", "adamw"}.intersection(settings) if wanted != "muon" else ()):
        raise UserError(
            f'the override "{regex}={wanted}" sets {cuts[0]!r}, which only Muon follows; write "{regex}=muon"'
        )
    if ("split" in settings and "heads" in settings) or ("adamw" in settings and "split" not in settings):
        raise UserError(f"the override {regex!r} must give either split (with adamw, if need be) or heads")
    for key, least in (("lr_mult", "above 0"), ("wd", "at least 0")):
        value = settings.get(key, 1.0)
        number = isinstance(value, int | float) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and key == "lr_mult"):
            raise UserError(f"the override {regex!r} sets {key}={value!r}; use a finite number {least}")


def _check_cut(name: str, p: Tensor, cut: dict) -> dict:
    """The split of an override, with the types that the optimizer's groups have."""
    dim, parts = cut.get("split") or cut["heads"]
    whole = p.shape[dim] if p.ndim in (2, 3) and p.ndim - 2 <= dim < p.ndim else 0
    fits = sum(parts) == whole and min(parts) > 0 if "split" in cut else parts > 0 and whole > 0 and whole % parts == 0
    if not fits:
        raise UserError(
            f"the override or tag of {name} cuts dimension {dim} into {parts}, but its shape is {tuple(p.shape)}; "
            f"give sizes that add up to that dimension, or a number of heads that divides it"
        )
    thin = sorted(set(cut.get("adamw", ())))
    if thin and not (0 <= thin[0] and thin[-1] < len(parts) and len(thin) < len(parts)):
        raise UserError(
            f"the override or tag of {name} gives slices {thin} of {len(parts)} to AdamW; "
            f"count from 0 and leave at least one to Muon"
        )
    if "heads" in cut:
        return {"heads": (dim, parts)}
    return {"split": (dim, list(parts))} | ({"adamw": thin} if thin else {})
