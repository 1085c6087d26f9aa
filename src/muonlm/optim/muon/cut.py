"""Parameters cut into the matrices that are orthogonalised, and AdamW for the slices that are too thin for it."""

from collections.abc import Mapping

from torch import Tensor
from torch.optim.adamw import adamw

from ..tensors import local
from .blocks import adamw_blocks, blocks, shape_factor
from .update import Piece
from .variants import second_momentum_size


def cut(
    group: dict,
    state: Mapping[Tensor, dict],
    found: list[tuple],
    weights: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
) -> list[Piece]:
    """The pieces of whole parameters; slices that AdamW trains are stepped here and left out.

    found   (parameter, gradient as it came, split, name) for each weight, gradient and momentum
    """
    work = []
    for (p, grad, split, name), weight, G, M in zip(found, weights, grads, momenta, strict=True):
        kept = state[p]
        views = list(zip(blocks(weight, split), blocks(G, split), blocks(M, split), strict=True))
        aux = adamw_blocks(split, len(views))
        if aux:
            plain = blocks(G, split) if group["decoupled_wd"] else blocks(local(grad).to(G.dtype), split)
            _slices_step(group, kept, [(views[i][0], plain[i]) for i in sorted(aux)])
        transposed, start = bool(split and split.get("transposed")), 0
        for i, (w, g, m) in enumerate(views):
            if i in aux:
                continue
            A, B = w.shape
            second = None
            if size := second_momentum_size(group["variant"], A, B):
                second = kept["second_momentum"][start : start + size]
                start += size
            block = f"{name}[{i}]" if len(views) > 1 else name
            factor = shape_factor(group["lr_mode"], *((B, A) if transposed else (A, B)), group["rms_target"])
            work.append(Piece(block, w, g, m, second, factor, transposed))
    return work


def _slices_step(group: dict, state: dict, pieces: list[tuple[Tensor, Tensor]]) -> None:
    """AdamW on the slices of a fused matrix that are too thin for Newton-Schulz; their state is one flat tensor."""
    options, sizes = group["slices"], [w.numel() for w, _ in pieces]
    on_gpu, lr, weights, grads = pieces[0][0].is_cuda, group["lr"], [w for w, _ in pieces], [g for _, g in pieces]
    if on_gpu:  # what the fused kernel takes; it finds `step` on the device: nothing waits, a captured step counts on
        weights, grads = ([t.to(state["exp_avg"].dtype).contiguous() for t in ts] for ts in (weights, grads))
    first, second = (
        [v.view(w.shape) for v, (w, _) in zip(state[key].split(sizes), pieces)] for key in ("exp_avg", "exp_avg_sq")
    )
    steps = [state["step"].clone() for _ in pieces]
    adamw(
        weights,
        grads,
        first,
        second,
        [],
        steps,
        foreach=False,
        fused=on_gpu,
        amsgrad=False,
        beta1=options["betas"][0],
        beta2=options["betas"][1],
        lr=(lr if on_gpu else float(lr)) * options["lr_ratio"],
        weight_decay=options["weight_decay"],
        eps=options["eps"],
        maximize=False,
    )
    state["step"].copy_(steps[0])
    for (w, _), stepped in zip(pieces, weights, strict=True):
        if stepped is not w:
            w.copy_(stepped)
