"""How a fused matrix is cut into the matrices it holds: q|k|v, gate|up, the projections of state-space models, heads.

`layout` reads the module around the tensor (numbers of heads, ranks, the shapes of its neighbours; never a model class
of ours) and gives the cut as a tag would: {"split": (dim, [sizes])}, {"heads": (dim, n)}. `splits_entry` turns that
into what the optimizer's group wants, with slices too thin for Newton-Schulz left to AdamW. What cannot be found is
left whole or, for state-space models, left to AdamW, and the reason says so.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


QKV = names("qkv qkv_proj to_qkv Wqkv c_attn query_key_value in_proj_qkv")
BY_HEAD = names("query_key_value")  # GPT-NeoX, BLOOM, Falcon, ChatGLM: q, k, v of one head may lie side by side
BY_HEAD_TYPES = names("CodeGenAttention GPTBigCodeAttention")  # usual names, unusual order
GATE_UP = names("gate_up_proj gate_up up_gate_proj w12 Wi")


@dataclass(frozen=True)
class Place:
    """One name of a tensor, with the module that owns it and the module around that one."""

    name: str
    path: list[str]
    module: nn.Module
    parent: nn.Module | None

    @property
    def last(self) -> str:
        return self.path[-1]

    @property
    def owner(self) -> str:
        return self.path[-2] if len(self.path) > 1 else ""


@dataclass(frozen=True)
class Flags:
    """The arguments of `route`."""

    split_fused: bool
    per_head: bool
    min_dim: int
    x_proj: str
    lora: str


def transposed(p: Tensor, module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2) and some stacks of experts store (in, out)."""
    conv1d = type(module).__name__ == "Conv1D" and p.ndim == 2 and getattr(module, "nf", None) == p.shape[1]
    return conv1d or (p.ndim == 3 and bool(getattr(module, "is_transposed", False)))


def is_ssm(module: nn.Module | None) -> bool:
    return any(hasattr(module, name) for name in ("A_log", "dt_bias", "dt_proj", "dt_head"))


def is_x_proj(places: list[Place]) -> bool:
    return any(place.owner == "x_proj" and is_ssm(place.parent) for place in places)


def _number(module: nn.Module | None, *names: str) -> int:
    """The first of these attributes that is a whole number, in the module or else in its config; 0 if there is none."""
    sources = (module, getattr(module, "config", None))
    return next((v for at in sources for name in names if type(v := getattr(at, name, None)) is int), 0)


def layout(p: Tensor, place: Place, flags: Flags) -> tuple[dict | None, str]:
    """(split and heads as a tag would give them, a word on why); None for a dict: fused, and no slice is certain."""
    module, parent, name = place.module, place.parent, place.owner
    out = p.ndim - 1 if transposed(p, module) else p.ndim - 2
    if isinstance(module, nn.MultiheadAttention) and place.last == "in_proj_weight":
        return {"split": (0, [module.embed_dim] * 3), "heads": (0, 3 * module.num_heads)}, "q|k|v"
    gates = {nn.LSTM: 4, nn.GRU: 3}.get(type(module), 0)
    if gates and place.last.startswith(("weight_ih", "weight_hh")):
        return {"split": (0, [len(p) // gates] * gates)}, f"{gates} gates"
    if p.ndim == 3 and place.last in GATE_UP:  # experts
        if not getattr(module, "is_concatenated", True):
            return {}, "gate and up alternate: one matrix"
        return ({"split": (out, [p.shape[out] // 2] * 2)}, "gate|up") if p.shape[out] % 2 == 0 else ({}, "")
    if p.ndim != 2 or place.last != "weight" or parent is None:
        return {}, ""
    rows, columns = p.shape[out], p.shape[1 - out]
    unknown = f"{name} may be fused, but its parts cannot be found: one matrix, unless it is tagged"
    if name in GATE_UP:
        if rows % 2 == 0 and any(rows == 2 * m.in_features for m in parent.children() if isinstance(m, nn.Linear)):
            return {"split": (out, [rows // 2] * 2)}, "gate|up"
        return {}, unknown
    if is_ssm(parent) and name in ("in_proj", "in_proj_qkvz", "in_proj_qkv", "x_proj"):
        if sizes := _ssm_slices(name, rows, parent):
            return {"split": (out, sizes)}, f"slices of a {type(parent).__name__}"
        return None, f"fused {name} whose slices cannot be found: tag it with a split to have it trained by Muon"
    if name in ("kv_a_proj_with_mqa", "kv_b_proj"):  # multi-head latent attention
        rank, rope = _number(parent, "kv_lora_rank"), _number(parent, "qk_rope_head_dim")
        key, value = _number(parent, "qk_nope_head_dim"), _number(parent, "v_head_dim")
        sizes = [rank, rope] if name == "kv_a_proj_with_mqa" else [key, value] * (rows // max(1, key + value))
        return ({"split": (out, sizes)}, "of latent attention") if sum(sizes) == rows and min(sizes) else ({}, unknown)
    if name not in QKV | {"q_proj", "k_proj", "v_proj"}:
        return {}, ""

    heads = _number(parent, "num_attention_heads", "num_heads", "n_head", "n_heads", "heads")
    kv = _number(parent, "num_key_value_heads", "num_kv_heads", "n_kv_head", "n_kv_heads", "kv_heads") or heads
    width = _number(parent, "head_dim", "head_size", "attention_head_size", "head_width") or columns // (heads or rows)
    by_head = {"heads": (out, rows // width)} if width and rows % width == 0 else {}
    gated = name == "q_proj" and rows == 2 * heads * width > 0  # Qwen3-Next: q and its gate, head by head
    if name not in QKV and not gated:
        return by_head if rows in (heads * width, kv * width) else {}, ""
    if gated or name in BY_HEAD or type(parent).__name__ in BY_HEAD_TYPES:
        if by_head and width >= flags.min_dim:
            return by_head | {"interleaved": True}, "q and gate head by head" if gated else "q, k, v head by head"
        return {}, "fused head by head, and " + (f"{width} rows are under {flags.min_dim}" if by_head else unknown)
    if width and rows == (heads + 2 * kv) * width:
        return by_head | {"split": (out, [heads * width, kv * width, kv * width])}, "q|k|v"
    if rows == 3 * columns:
        return by_head | {"split": (out, [rows // 3] * 3)}, "q|k|v"
    if rows == 2 * columns and hasattr(parent, "q_attn"):  # cross attention of GPT-2
        return by_head | {"split": (out, [rows // 2] * 2)}, "k|v"
    return {}, unknown


def _ssm_slices(name: str, rows: int, mixer: nn.Module) -> list[int] | None:
    """Row counts of the slices of a state-space model's fused projection, or None if they do not add up."""
    x_proj, out, conv = (_matrix(mixer, part) for part in ("x_proj", "out_proj", "conv1d"))
    step = _matrix(mixer, "dt_proj", "dt_head")
    sizes = []
    if name == "x_proj" and step is not None:  # dt|B|C
        rank = step.shape[1]
        sizes = [rank, (rows - rank) // 2, (rows - rank) // 2]
    elif name == "in_proj" and step is not None and x_proj is not None:  # Mamba, Longhorn: x|z
        sizes = [rows // 2, rows // 2]
    elif name == "in_proj" and out is not None:  # Mamba-2: z|x|B|C|dt, convolution over x|B|C
        per_head = (getattr(mixer, vector, None) for vector in ("dt_bias", "A_log"))
        heads = next((v.numel() for v in per_head if isinstance(v, Tensor)), 0)
        inner, state = out.shape[1], (rows - 2 * out.shape[1] - heads) // 2
        if conv is None or conv.shape[0] == inner + 2 * state:
            sizes = [inner, inner, state, state, heads]
    elif groups := _number(mixer, "num_k_heads"):  # Gated DeltaNet: q|k|v, or q|k|v|z of each key head in turn
        key, value = _number(mixer, "key_dim"), _number(mixer, "value_dim")
        sizes = [key, key, value]
        if name == "in_proj_qkvz":
            sizes = [key // groups, key // groups, value // groups, value // groups] * groups
    return sizes if sizes and sum(sizes) == rows and min(sizes) > 0 else None


def _matrix(module: nn.Module, *parts: str) -> Tensor | None:
    """The weight, of two dimensions or more, of the first of these submodules that has one."""
    weights = (getattr(getattr(module, part, None), "weight", None) for part in parts)
    return next((w for w in weights if isinstance(w, Tensor) and w.ndim >= 2), None)


def splits_entry(p: Tensor, place: Place, cut: dict, flags: Flags) -> tuple[dict | None, str]:
    """(the group's `splits` entry of a Muon tensor, why it is none of Muon's after all)."""
    if p.ndim > 3 or isinstance(place.module, _ConvNd):
        return {"flatten": True}, ""
    entry: dict = {}
    if "heads" in cut and (flags.per_head or (flags.split_fused and "interleaved" in cut)):
        entry = {"heads": tuple(cut["heads"])}
    elif "split" in cut and flags.split_fused:
        dim, sizes = cut["split"]
        entry = {"split": (dim, list(sizes))}
        thin = sorted({*cut.get("adamw", ()), *(i for i, size in enumerate(sizes) if size < flags.min_dim)})
        if len(thin) == len(sizes):
            return None, f"all its slices, {list(sizes)}, are under {flags.min_dim}"
        if thin:
            entry["adamw"] = thin
    if transposed(p, place.module):
        entry["transposed"] = True
    return entry or None, ""
