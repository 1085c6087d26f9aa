"""Recurrent mixers as modules: their states, the equations written out token by token, the reductions
between forms, numbers of parameters, beginnings, precision, and implementations that others wrote.

The recurrences alone, and every backend of them, are tested in tests/scan.
"""

import inspect
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from muonlm.config.schema import ModelConfig
from muonlm.model import build_model
from muonlm.model.conv import ShortConv
from muonlm.model.mixers import MIXERS, diagonal
from muonlm.model.mixers.base import Writes, inner_width
from muonlm.model.mixers.diagonal import Diagonal
from muonlm.model.mixers.gated_deltanet import head_widths
from muonlm.model.packing import compact
from muonlm.optim import route
from muonlm.scan.writes import normalize_matrix

# The mixers whose equations, precision and failures are tested here. The contract of every mixer: test_contract.py
LETTERS = list("MmLlDdGgV")
MUON = {"m": "M", "l": "L", "d": "D", "g": "G", "V": "G"}
# widths that no power of two divides, two groups, chunks of 8 so that short rows have several
SMALL = {"d_model": 32, "n_head": 4, "ssm_head": 16, "ssm_groups": 2, "delta_heads": 3, "delta_key": 5, "d_state": 6}
SMALL |= {"scan": "chunked", "scan_chunk": 8, "alpha": 0.7, "beta": 0.8}
TAPS, CHUNK = 4, 8
FP64 = 1e-11, 1e-10  # outputs and states, gradients: any two ways in fp64; seen 2e-14, 3e-13


def make(letter: str, *, dtype=torch.float64, seed=0, **options) -> nn.Module:
    """A mixer of random weights in which no parameter is at a special value."""
    torch.manual_seed(seed)
    cfg = ModelConfig(**SMALL | options)
    mixer = MIXERS[letter].build(cfg)
    for module in mixer.modules():
        if isinstance(module, ShortConv):
            module.init_weights("default")
    mixer.init_special(cfg)
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            if name in ("D", "norm.weight", "dt_head.bias"):
                p.add_(torch.rand_like(p) - 0.3)
            elif name.endswith("proj.weight"):
                p.mul_(2)  # gates and steps that really depend on the token
    return mixer.to(dtype)


def tokens(B: int, L: int, *, dtype=torch.float64, seed=1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(B, L, SMALL["d_model"], generator=draw, dtype=torch.float64).to(dtype)


def gap(a, b, floor=0.0) -> float:
    """Largest relative Frobenius distance, of tensors or of sequences of them; `floor` in units of ‖all of b‖."""
    if isinstance(a, torch.Tensor):
        a, b = [a], [b]
    assert len(a) == len(b)
    assert all(x.shape == y.shape for x, y in zip(a, b)), [(x.shape, y.shape) for x, y in zip(a, b)]
    least = max(1e-30, floor * math.sqrt(sum(y.double().square().sum().item() for y in b)))
    return max(((x.double() - y.double()).norm() / y.double().norm().clamp(min=least)).item() for x, y in zip(a, b))


def gradient_gap(a, b) -> float:
    """Where a gradient is 0 but for rounding (the rate of a normalised write), it is measured against the others."""
    return gap(a, b, floor=1e-4)


def gradients(mixer: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(mixer.parameters()), retain_graph=True))


# ---------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_states_are_tuples_with_the_batch_first_and_recurrent_states_in_full_precision(letter, dtype):
    mixer, x = make(letter, dtype=dtype), tokens(3, 5, dtype=dtype)
    y, state = mixer(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert y.shape == x.shape and y.dtype == dtype and isinstance(state, tuple)
    assert len(state) == (3 if letter in MUON else 2)
    empty = mixer.init_state(3, dtype=dtype)
    assert [(s.shape, s.dtype) for s in state] == [(s.shape, s.dtype) for s in empty]
    assert [s.dtype for s in state] == [dtype] + [wide] * (len(state) - 1)
    assert all(len(s) == 3 and not s.any() for s in empty)
    assert [s.dtype for s in mixer.init_state(2)] == [torch.float32] * len(state)


@pytest.mark.parametrize("letter", MUON)
def test_without_velocity_no_velocity_is_kept(letter):
    mixer = make(letter, beta=0.0)
    assert len(mixer.init_state(2)) == len(mixer(tokens(2, 5))[1]) == 2


@pytest.mark.parametrize("letter", LETTERS)
def test_in_fp32_decoding_after_a_prefill_continues_it(letter):
    mixer, x = make(letter, dtype=torch.float32), tokens(2, 40, dtype=torch.float32)
    with torch.no_grad():
        y, state = mixer(x)
        pieces, s = mixer(x[:, :17])
        pieces = [pieces]
        for t in range(17, 40):
            piece, s = mixer(x[:, t : t + 1], s)
            pieces.append(piece)
    assert gap([torch.cat(pieces, 1), *s], [y, *state]) < 1e-5  # other orders of sums, seen 8e-7


# ---------------------------------------------------------------------------------------- causality


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("scan, allowed", [("reference", 0.0), ("chunked", 1e-14)])  # products may round otherwise
def test_changing_a_token_changes_no_earlier_output(letter, scan, allowed):
    mixer, x = make(letter, scan=scan), tokens(2, 19)
    with torch.no_grad():
        y, _ = mixer(x)
        for t in (0, 3, 8, 18):
            other = x.clone()
            other[:, t] += 3
            z, _ = mixer(other)
            change = (z - y).abs().amax((0, 2)) / y.abs().max()
            assert change[:t].sum() <= allowed
            assert change[t] > 1e-3


# ---------------------------------------------------------------------------------------- masks


def test_compacting_keeps_the_order_and_undoing_it_puts_zeros_where_the_mask_is():
    x = torch.arange(1.0, 11).view(2, 5, 1)
    mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 1]], dtype=torch.bool)
    packed, lengths, undo = compact(x, mask)
    assert packed[0, :3, 0].tolist() == [2, 4, 5] and packed[1, :3, 0].tolist() == [6, 7, 10]
    assert lengths.tolist() == [3, 3]
    assert torch.equal(undo(packed), x * mask[..., None])


def test_a_mask_that_is_a_prefix_moves_no_token():
    x = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    packed, lengths, undo = compact(x, mask)
    assert packed is x and lengths.tolist() == [3, 5]
    assert torch.equal(undo(x), x * mask[..., None])
    assert compact(x, mask[1:].expand(2, 5))[1] is None and compact(x, None)[0] is x


# ---------------------------------------------------------------------------------------- the short convolution


def test_the_short_convolution_is_conv1d_and_its_state_the_last_real_inputs():
    torch.manual_seed(0)
    conv, W = ShortConv(6, 4, bias=True).double(), 4
    conv.init_weights("default")
    x, lengths = torch.randn(4, 9, 6, dtype=torch.float64), torch.tensor([9, 5, 1, 0])
    y, state = conv(x, lengths=lengths)
    theirs = F.conv1d(F.pad(x, (0, 0, W - 1, 0)).mT, conv.weight, conv.bias, groups=6).mT
    mask = torch.arange(9) < lengths[:, None]
    assert gap(y[mask], theirs[mask]) < 1e-14
    left = F.pad(x, (0, 0, W - 1, 0))  # zeros stand before the first token
    assert torch.equal(state, torch.stack([left[b, n : n + W - 1] for b, n in enumerate(lengths.tolist())]))
    masked, other = conv(x, mask=mask)
    assert torch.equal(masked, torch.where(mask[..., None], y, 0)) and torch.equal(other, state)
    step, _ = conv.step(x[:, :1], conv.init_state(4, dtype=torch.float64))
    assert gap(step, theirs[:, :1]) < 1e-14


def test_a_convolution_of_one_tap_keeps_no_state():
    mixer, x = make("l", d_conv=1), tokens(2, 7)
    with torch.no_grad():
        y, state = mixer(x)
        assert state[0].shape[1] == 0
        part, s = mixer(x[:, :6])
        last, s = mixer(x[:, 6:], s)
    assert gap([torch.cat([part, last], 1), *s[1:]], [y, *state[1:]]) < FP64[0]


# ---------------------------------------------------------------------------------------- the equations, token by token


def unit_rows(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def normed(U, cfg, muon):
    """The explicit iteration on a token's whole write, which the mixers replace by a factor."""
    if not muon or cfg.write_norm == "none":
        return U
    return normalize_matrix(U, norm=cfg.write_norm, steps=cfg.ns_steps, poly=cfg.ns_poly, eps=cfg.write_eps)


def convolved(conv: ShortConv, rows):
    """(L,D) by the definition."""
    W, past = conv.taps, torch.cat([rows.new_zeros(conv.taps - 1, rows.shape[1]), rows])
    out = torch.stack([sum(conv.weight[:, 0, j] * past[t + j] for j in range(W)) for t in range(len(rows))])
    return F.silu(out if conv.bias is None else out + conv.bias)


def by_hand(letter, mixer, cfg, x):
    """One row x (L,d) -> y (L,d), S: the equations at the heads of the mixers' files, line by line."""
    muon = letter in MUON
    gamma, alpha = (cfg.beta, cfg.alpha) if muon else (0.0, 1.0)
    S = M = 0.0
    out = []
    if letter in "MmLl":
        D, N, R = inner_width(cfg), cfg.d_state, Diagonal.step_rank(cfg)
        h = x @ mixer.in_proj.weight.T
        u, z = convolved(mixer.conv1d, h[:, :D]), h[:, D:]
        p = u @ mixer.x_proj.weight.T
        for t in range(len(x)):
            k, q = p[t, R : R + N], p[t, R + N :]
            if letter in "Mm":
                delta = F.softplus(mixer.dt_proj.weight @ p[t, :R] + mixer.dt_proj.bias)
                f = torch.exp(delta[None] * -torch.exp(mixer.A_log).T)
            else:
                s = torch.sigmoid(mixer.dt_head.weight @ p[t, :R] + mixer.dt_head.bias)
                delta = s / (1 + s * (k @ k))
                f = 1 - delta[None] * k[:, None] ** 2
            M = gamma * M + alpha * normed(torch.outer(k, delta * u[t]), cfg, muon)
            S = f * S + M
            out.append((S.T @ q + mixer.D * u[t]) * F.silu(z[t]))
        return torch.stack(out) @ mixer.out_proj.weight.T, S
    if letter in "Dd":
        D, P, G, N = inner_width(cfg), cfg.ssm_head, cfg.ssm_groups, cfg.d_state
        H = D // P
        h = x @ mixer.in_proj.weight.T
        z, ukq, dt = h[:, :D], convolved(mixer.conv1d, h[:, D:-H]), h[:, -H:]
        step = F.softplus(dt + mixer.dt_bias)
        S, M, out = [0.0] * H, [0.0] * H, []
        for t in range(len(x)):
            u, k, q = ukq[t, :D].view(H, P), ukq[t, D : D + G * N].view(G, N), ukq[t, D + G * N :].view(G, N)
            y = []
            for i in range(H):
                g = i // (H // G)
                M[i] = gamma * M[i] + alpha * normed(torch.outer(k[g], step[t, i] * u[i]), cfg, muon)
                S[i] = torch.exp(-step[t, i] * torch.exp(mixer.A_log[i])) * S[i] + M[i]
                y.append(S[i].T @ q[g] + mixer.D[i] * u[i])
            y = (torch.cat(y) * F.silu(z[t])).view(G, -1)
            y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            out.append(y.flatten() * mixer.norm.weight)
        return torch.stack(out) @ mixer.out_proj.weight.T, torch.stack(S)
    H, (N, P) = cfg.delta_heads, head_widths(cfg)
    qku = convolved(mixer.conv1d, torch.cat([x @ p.weight.T for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)], 1))
    g, rate = x @ mixer.g_proj.weight.T, torch.sigmoid(x @ mixer.b_proj.weight.T) * (2 if cfg.neg_eigval else 1)
    a = torch.exp(-torch.exp(mixer.A_log) * F.softplus(x @ mixer.a_proj.weight.T + mixer.dt_bias))
    S, M, out = [x.new_zeros(N, P)] * H, [0.0] * H, []
    for t in range(len(x)):
        y = []
        for i in range(H):
            q, k = (unit_rows(qku[t, j * H * N + i * N :][:N]) for j in (0, 1))
            u, b = qku[t, 2 * H * N + i * P :][:P], rate[t, i]
            decayed = a[t, i] * S[i]
            if letter == "g":
                M[i] = gamma * M[i] + alpha * normed(torch.outer(k, b * u), cfg, muon)
                S[i] = decayed - b * torch.outer(k, k @ decayed) + M[i]
            else:
                write = torch.outer(k, b * (u - decayed.T @ k))
                M[i] = gamma * M[i] + alpha * write
                S[i] = decayed + (normed(M[i], cfg, muon) if letter == "V" else write)
            r = S[i].T @ q / N**0.5
            r = r / (r.square().mean() + 1e-5).sqrt() * mixer.norm.weight
            y.append(r * F.silu(g[t, i * P : (i + 1) * P]))
        out.append(torch.cat(y))
    return torch.stack(out) @ mixer.out_proj.weight.T, torch.stack(S)


VARIANTS = [{}, {"beta": 0.5, "alpha": 0.3, "ns_steps": 3}, {"write_norm": "frobenius", "alpha": 2.0}]
VARIANTS += [{"ns_poly": "cubic", "beta": 0.0}, {"write_norm": "none", "neg_eigval": True}]


CASES = [(letter, v) for letter in LETTERS for v in (VARIANTS if letter in MUON else VARIANTS[::4])]


@pytest.mark.parametrize("letter, options", CASES)
def test_a_mixer_is_its_equations_with_the_explicit_iteration_on_every_write(letter, options):
    cfg, mixer, x = ModelConfig(**SMALL | options), make(letter, **options), tokens(1, 13)
    y, state = mixer(x)
    want, S = by_hand(letter, mixer, cfg, x[0])
    assert gap([y[0], state[1][0]], [want, S]) < FP64[0]
    weigh = tokens(1, 13, seed=4)[0]
    assert gradient_gap(gradients(mixer, (y[0] * weigh).sum()), gradients(mixer, (want * weigh).sum())) < FP64[1]


# ---------------------------------------------------------------------------------------- reductions


@pytest.mark.parametrize("letter", MUON)
def test_a_muon_form_without_velocity_scale_and_norm_is_the_plain_mixer(letter):
    plain = {"beta": 0.0, "alpha": 1.0, "write_norm": "none"}
    muon, base, x = make(letter, **plain), make(MUON[letter], **plain), tokens(2, 21)
    base.load_state_dict(muon.state_dict())
    (y, state), (want, other) = muon(x), base(x)
    if letter in "gV":  # another order of the same sums
        assert gap([y, *state], [want, *other]) < FP64[0]
    else:
        assert torch.equal(y, want) and all(map(torch.equal, state, other))
    weigh = tokens(2, 21, seed=4)
    assert gradient_gap(gradients(muon, (y * weigh).sum()), gradients(base, (want * weigh).sum())) < FP64[1]


@pytest.mark.parametrize("letter", "MLDG")
def test_a_plain_mixer_ignores_the_options_of_the_muon_form(letter):
    x = tokens(2, 9)
    one, other = make(letter), make(letter, beta=0.5, alpha=3.0, write_norm="frobenius", write_eps=1.0)
    assert torch.equal(one(x)[0], other(x)[0]) and other.write_gain is None


@pytest.mark.parametrize("letter", "mldg")
def test_newton_schulz_is_frobenius_with_another_alpha(letter):
    ns, x = make(letter, alpha=0.5, ns_steps=2), tokens(2, 21)
    same = make(letter, alpha=ns.write_gain, write_norm="frobenius")
    assert ns.write_gain == same.write_gain == pytest.approx(0.5 * 1.1136, abs=5e-5)  # κ of two steps
    assert make(letter, alpha=1.0).write_gain == pytest.approx(0.7010, abs=5e-5)
    (y, state), (want, other) = ns(x), same(x)
    assert gap([y, *state], [want, *other]) < FP64[0]
    none = make(letter, alpha=0.5, write_norm="none")
    assert none.write_gain == 0.5 and gap(none(x)[0], y) > 1e-2


@pytest.mark.parametrize("norm", ["newton_schulz", "frobenius"])
def test_a_normalised_write_does_not_depend_on_the_sizes_of_value_and_key(norm):
    writes = Writes(ModelConfig(write_norm=norm), muon=True)
    e, k = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    write = k[..., None] * writes(e, k)[..., None, :]
    assert gap(write, k[..., None] * writes(7 * e, k)[..., None, :]) < 1e-14
    assert gap(write, 7 * k[..., None] * writes(e, 7 * k)[..., None, :]) < 1e-14
    assert gap(write.norm(dim=(1, 2)), torch.full((3,), writes.kappa, dtype=torch.float64)) < 1e-14


# ---------------------------------------------------------------------------------------- numbers of parameters


def count(letter, **options) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in MIXERS[letter].build(ModelConfig(**options)).parameters())


@pytest.mark.parametrize(
    "letters, d, parameters",  # Longhorn and Mamba by hand, Gated DeltaNet's of NVlabs/GatedDeltaNet
    [
        ("Ll", 672, 2_874_816),
        ("Ll", 768, 3_746_304),
        ("GgV", 672, 2_729_794),
        ("GgV", 768, 3_562_130),
        ("GgV", 1536, 14_202_130),
        ("Mm", 672, 2_896_320),
    ],
)
def test_mixers_have_exactly_the_published_numbers_of_parameters(letters, d, parameters):
    assert [count(letter, d_model=d, n_head=12) for letter in letters] == [parameters] * len(letters)


@pytest.mark.parametrize(
    "letter, vocab, total",  # 24 layers of d 768 without MLP, one norm each and one at the end, tied
    [("M", 50280, 129_135_360), ("D", 50288, 128_989_632), ("L", 50280, 128_545_536)],
)
def test_stacks_of_mixers_alone_have_exactly_the_published_numbers_of_parameters(letter, vocab, total):
    assert 24 * (count(letter, d_model=768, n_head=12) + 768) + 768 + vocab * 768 == total


def test_numbers_of_parameters_follow_the_formulas_of_the_docstrings():
    d, W, N, R, G, H = 48, 3, 5, 7, 2, 6
    D, common = 3 * 48, {"d_model": 48, "n_head": 4, "d_conv": 3, "expand": 3, "d_state": 5, "dt_rank": 7}
    longhorn = 2 * d * D + D * W + D + D * (R + 2 * N) + R * D + D + D + D * d
    assert count("l", **common) == longhorn and count("m", **common) == longhorn + D * N
    P = D // H
    wanted = d * (2 * D + 2 * G * N + H) + (W + 1) * (D + 2 * G * N) + 3 * H + D + D * d
    assert count("d", **common, ssm_head=P, ssm_groups=G) == wanted
    K, V = 5, 11
    wanted = 2 * d * H * K + 2 * d * H * V + H * V * d + W * (2 * H * K + H * V) + 2 * d * H + V + 2 * H
    assert count("g", **common, delta_heads=H, delta_key=K, delta_value=V) == wanted


# ---------------------------------------------------------------------------------------- beginnings and routing


@pytest.mark.parametrize("init", ["gpt2", "zero_out", "lm", "stack", "dt_small"])
def test_a_built_model_begins_with_the_step_sizes_and_gates_of_the_papers(init):
    cfg = ModelConfig(pattern="MLDG", n_layer=4, d_model=256, vocab_size=32, init=init, delta_heads=4, ssm_head=4)
    M, L, D, G = (block.mixer for block in build_model(cfg).blocks)
    for bias in (M.dt_proj.bias, D.dt_bias, G.dt_bias):
        steps = F.softplus(bias.double())
        assert steps.min() > 0.999e-3 and steps.max() < 0.1001
        if len(bias) > 100:  # log-uniform: the mean of the logarithm, within 4 standard errors
            error = 4 * math.log(100) / (12 * len(bias)) ** 0.5
            assert steps.log().mean().item() == pytest.approx(math.log(1e-2), abs=error)
    # the largest of 512; were the bias log(v) instead of the inverse of softplus, steps would end at 0.0953
    assert F.softplus(M.dt_proj.bias).max() > 0.0955
    bound = Diagonal.step_rank(cfg) ** -0.5
    assert 0.98 * bound < M.dt_proj.weight.abs().max() <= bound
    assert torch.equal(M.A_log[3], torch.arange(1.0, 17).log()) and torch.equal(M.A_log[0], M.A_log[-1])
    assert 1 <= D.A_log.exp().min() and D.A_log.exp().max() <= 16.001 and D.A_log.exp().std() > 3
    assert 1e-4 <= G.A_log.exp().min() and G.A_log.exp().max() <= 16.001
    assert all(mixer.D.eq(1).all() for mixer in (M, L, D)) and D.norm.weight.eq(1).all()
    if init == "dt_small":
        s = torch.sigmoid(L.dt_head.bias)
        assert s.min() > 0.9e-3 and s.max() < 0.0953
    else:
        assert not L.dt_head.bias.any()


def test_each_tensor_of_a_mixer_goes_to_the_optimizer_that_suits_it():
    cfg = ModelConfig(pattern="MLDG", n_layer=4, d_model=288, vocab_size=32, delta_heads=4, ssm_head=32, n_head=4)
    plan = {d.name: d for d in route(build_model(cfg, "meta")).decisions}
    to_muon = {name for name, d in plan.items() if ".mixer." in name and d.route == "muon"}
    wanted = {f"{i}.{part}" for i in (0, 1) for part in ("in_proj", "x_proj", "out_proj")} | {"2.in_proj", "2.out_proj"}
    wanted |= {f"3.{part}_proj" for part in ("q", "k", "v", "g", "out")}
    assert to_muon == {f"blocks.{i}.mixer.{part}.weight" for i, part in (name.split(".") for name in wanted)}
    assert all(d.role == "scalar" for name, d in plan.items() if name.split(".")[-1] in ("A_log", "D", "dt_bias"))
    assert all(d.role != "matrix" for name, d in plan.items() if "conv1d" in name)
    assert plan["blocks.0.mixer.in_proj.weight"].split == {"split": (0, [576, 576])}
    assert plan["blocks.1.mixer.x_proj.weight"].split == {"split": (0, [18, 16, 16])}
    assert plan["blocks.2.mixer.in_proj.weight"].split == {"split": (0, [576, 576, 128, 128, 18])}
    narrow = route(build_model(ModelConfig(pattern="MD", n_layer=2, vocab_size=32, ssm_head=64), "meta")).decisions
    cuts = {d.name: d.split for d in narrow}
    assert "adamw" not in cuts["blocks.0.mixer.x_proj.weight"]  # R = 16, N = 16: just wide enough
    assert cuts["blocks.1.mixer.in_proj.weight"]["adamw"] == [4]  # 8 rows of step sizes
    per_head = route(build_model(cfg, "meta"), per_head=True).decisions
    assert {d.name: d.split for d in per_head}["blocks.3.mixer.q_proj.weight"] == {"heads": (0, 4)}


# ---------------------------------------------------------------------------------------- precision

# letter: forward, gradients in fp32; forward, gradients under bf16 autocast; against fp64
PRECISION = dict.fromkeys("MmLl", (5e-6, 5e-5, 1e-2, 2e-2)) | dict.fromkeys("Dd", (1e-5, 1e-4, 1e-2, 2e-2))
PRECISION |= dict.fromkeys("Gg", (1e-5, 2e-4, 1e-2, 3e-2)) | {"V": (1e-4, 1e-3, 3e-2, 5e-2)}


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_outputs_and_gradients_are_as_precise_as_promised(letter, kind):
    forward, backward = PRECISION[letter][:2] if kind == "fp32" else PRECISION[letter][2:]
    mixer, x, weigh = make(letter), tokens(2, 64), tokens(2, 64, seed=4)
    y, state = mixer(x)
    want = torch.cat([g.flatten() for g in gradients(mixer, (y * weigh).sum())])
    mixer = mixer.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        z, new = mixer(x.float())
    got = torch.cat([g.flatten() for g in gradients(mixer, (z * weigh.float()).sum())])
    assert gap([z, *new[1:]], [y, *state[1:]]) < forward
    assert gap(got, want) < backward


@pytest.mark.parametrize("letter", "MmLl")
def test_under_autocast_gates_and_writes_are_computed_in_fp32_from_the_bias_on(letter, monkeypatch):
    seen, scan = [], diagonal.diag_scan

    def spy(gate, w, k, q, *rest, **options):
        seen.extend([*gate, w, k, q])
        return scan(gate, w, k, q, *rest, **options)

    monkeypatch.setattr(diagonal, "diag_scan", spy)
    mixer = make(letter, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(tokens(2, 9, dtype=torch.float32))
    assert y.dtype == torch.bfloat16 and state[0].dtype == torch.bfloat16 and state[1].dtype == torch.float32
    assert [t.dtype for t in seen] == [torch.float32] * len(seen)
    delta, w = seen[0], seen[-3]  # values that bf16 cannot hold
    assert all((t != t.bfloat16().float()).float().mean() > 0.9 for t in (delta, w))


@pytest.mark.parametrize("letter", LETTERS)
def test_under_autocast_the_loop_computes_in_fp32_too(letter):
    mixer, loop = make(letter, dtype=torch.float32), make(letter, dtype=torch.float32, scan="reference")
    seen, x = [], tokens(2, 20, dtype=torch.float32)
    for m in (mixer, loop):  # what is read from the state, before W_out rounds it
        m.out_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            seen.append(m(x)[1][1])
    # equal inputs, rounded once at the end: few roundings differ. Products in bf16 give 2e-3 and more
    assert gap(seen[0], seen[2]) < 1e-3 and gap(seen[1], seen[3]) < 1e-5


# ---------------------------------------------------------------------------------------- known failures


@pytest.mark.parametrize("letter", LETTERS)
@pytest.mark.parametrize("which", ["silent tokens", "silent rows", "no keys"])
def test_tokens_that_write_nothing_leave_finite_gradients(letter, which):
    mixer, x = make(letter, dtype=torch.float32), tokens(2, 20, dtype=torch.float32)
    with torch.no_grad():
        if mixer.conv1d.bias is not None:
            mixer.conv1d.bias.zero_()
        if which == "no keys":
            if letter in "MmLl":
                mixer.x_proj.weight[mixer.sizes[0] : -mixer.sizes[2]] = 0
            elif letter in "Dd":
                mixer.in_proj.weight[sum(mixer.sizes[:2]) : sum(mixer.sizes[:3])] = 0
            else:
                mixer.k_proj.weight.zero_()
    if which == "silent tokens":
        x[:, 5:14] = 0
    elif which == "silent rows":
        x[0] = 0
    x.requires_grad_()
    y, state = mixer(x)
    if which == "no keys":
        assert not state[1].any()
    if which == "silent rows":
        assert not state[1][0].any() and not y[0].any()
    loss = y.square().sum() + sum(s.sum() for s in state)
    assert all(g.isfinite().all() for g in [*gradients(mixer, loss), *torch.autograd.grad(loss, x)])


@pytest.mark.parametrize("letter", LETTERS)
def test_a_state_forgotten_at_once_equals_the_loop(letter):
    """One key of 30 (Longhorn), or rates of −exp(6) (the others): gates near 0 for whole chunks."""
    mixer, loop = make(letter), make(letter, scan="reference")
    with torch.no_grad():
        for m in (mixer, loop):
            if letter in "Ll":
                m.x_proj.weight[m.sizes[0]] *= 300
            else:
                m.A_log.fill_(6.0)
            if letter in "DdGgV":
                m.dt_bias.fill_(2.0)
    x = tokens(2, 21)
    (y, state), (want, other) = mixer(x), loop(x)
    assert gap([y, *state], [want, *other]) < FP64[0]
    got, wanted = gradients(mixer, y.square().sum()), gradients(loop, want.square().sum())
    assert all(g.isfinite().all() for g in got)
    got, wanted = (torch.cat([g.flatten() for g in grads]) for grads in (got, wanted))
    assert gap(got, wanted) < FP64[1]


@pytest.mark.parametrize("letter", "mldg")
@pytest.mark.parametrize("remember", [False, True])
def test_eight_thousand_tokens_stay_finite(letter, remember):
    """`remember`: steps of exp(−8), so that hardly anything is forgotten while every write keeps its full size."""
    mixer = make(letter, dtype=torch.float32, scan_chunk=64)
    if remember:
        with torch.no_grad():
            bias = mixer.dt_proj.bias if letter == "m" else mixer.dt_head.bias if letter == "l" else mixer.dt_bias
            bias.fill_(-8.0)
    with torch.no_grad():
        y, state = mixer(tokens(1, 8192, dtype=torch.float32))
    assert y.bfloat16().isfinite().all() and all(s.isfinite().all() for s in state)


# ---------------------------------------------------------------------------------------- code that we did not write


def quiet(module: str):
    return pytest.importorskip(module, reason=f"{module} is not installed, so there is nothing to compare with")


def test_mamba_equals_the_one_of_transformers_on_the_same_weights():
    hf = quiet("transformers")
    theirs = quiet("transformers.models.mamba.modeling_mamba").MambaMixer
    ours = make("M", dt_rank=3)
    cfg = hf.MambaConfig(hidden_size=32, state_size=6, time_step_rank=3, conv_kernel=4, expand=2)
    other = theirs(cfg, 0).double().eval()
    other.load_state_dict(ours.state_dict())
    x = tokens(2, 23)
    # their slow path computes A and D in fp32
    assert gap(ours(x)[0], other(x)) < 1e-6


def test_mamba_equals_the_one_of_mambapy_on_the_same_weights():
    theirs = quiet("mambapy.mamba")
    ours, x = make("M", dt_rank=3, dtype=torch.float32), tokens(2, 23, dtype=torch.float32)
    cfg = theirs.MambaConfig(d_model=32, n_layers=1, dt_rank=3, d_state=6, d_conv=4, expand_factor=2)
    other = theirs.MambaBlock(cfg)
    other.load_state_dict(ours.state_dict())
    y, want = ours(x)[0], other(x)
    assert gap(y, want) < 5e-6  # both fp32
    names = [name for name, _ in ours.named_parameters()]
    got, wanted = gradients(ours, y.square().sum()), gradients(other, want.square().sum())
    wanted = dict(zip((name for name, _ in other.named_parameters()), wanted))
    assert gradient_gap(got, [wanted[name] for name in names]) < 5e-5


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_equals_the_one_of_transformers_on_the_same_weights(groups):
    hf = quiet("transformers")
    theirs = quiet("transformers.models.mamba2.modeling_mamba2").Mamba2Mixer
    ours = make("D", ssm_groups=groups)
    cfg = hf.Mamba2Config(
        hidden_size=32,
        state_size=6,
        head_dim=16,
        num_heads=4,
        n_groups=groups,
        conv_kernel=4,
        expand=2,
        chunk_size=8,
        layer_norm_epsilon=1e-5,
    )
    other = theirs(cfg, 0).double().eval()
    other.load_state_dict(ours.state_dict())
    x = tokens(2, 23)
    assert gap(ours(x)[0], other(x)) < 1e-6  # theirs goes through fp32


def test_gated_deltanet_equals_the_one_of_qwen3_next_on_the_same_weights(monkeypatch):
    hf = quiet("transformers")
    monkeypatch.setitem(sys.modules, "fla", None)  # its kernels want a GPU; without it transformers keeps to PyTorch
    code = quiet("transformers.models.qwen3_next.modeling_qwen3_next")
    for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):  # if it was imported before, with fla
        monkeypatch.setattr(code, name, inspect.unwrap(getattr(code, name)))
    theirs = code.Qwen3NextGatedDeltaNet
    ours = make("G", delta_key=8, delta_value=16)
    cfg = hf.Qwen3NextConfig(
        hidden_size=32,
        linear_num_value_heads=3,
        linear_num_key_heads=3,
        linear_key_head_dim=8,
        linear_value_head_dim=16,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
    )
    other = theirs(cfg, 0).double().eval()
    mine = ours.state_dict()
    # theirs: q|k|v|z of each head in turn
    by_head = [mine.pop(f"{c}_proj.weight").unflatten(0, (3, -1)) for c in "qkvg"]
    gates = [mine.pop(f"{c}_proj.weight").unflatten(0, (3, -1)) for c in "ba"]
    mine["in_proj_qkvz.weight"] = torch.cat(by_head, 1).flatten(0, 1)
    mine["in_proj_ba.weight"] = torch.cat(gates, 1).flatten(0, 1)
    other.load_state_dict(mine)
    x = tokens(2, 23)
    assert gap(ours(x)[0], other(x)) < 1e-5  # theirs goes through fp32, chunk by chunk
