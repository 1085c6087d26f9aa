"""Every scan, by every backend that the device can run, against the definition in fp64: outputs, states, gradients.

Inputs are fresh in every run: a failure names the MUONLM_SEED that repeats it. Memory is poisoned (conftest.py).
Truth   the loop of scan/reference.py in fp64 on the device; beyond 200 tokens, where a loop would take minutes, the
        chunked backend in fp64, which is held to the loop here. velocity_scan is nothing but a loop, so it stops at
        4,096 tokens.
Error   relative Frobenius. Tolerances of outputs and states, and of gradients: fp32 arithmetic differs from fp64 by
        rounding and the order of sums, 3e-7 seen on a CPU; bf16 inputs are the same rounded numbers on both sides, so
        gradients are off by their own rounding to bf16, 3e-3 seen, and outputs are not, but where a backend takes
        factors of products in bf16 (4e-3 seen). velocity_scan's iteration amplifies.
"""

import math
import os
import random
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F

from muonlm import scan
from muonlm.config.schema import ModelConfig
from muonlm.errors import UserError
from muonlm.model import build_model
from muonlm.model.mixers import MIXERS
from muonlm.model.mixers.base import Recurrent
from muonlm.scan import BACKENDS, backends, choose_backend, dispatch, reference

REHEARSAL = os.environ.get("MUONLM_REHEARSE") == "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
SEED = int(os.environ.get("MUONLM_SEED") or random.SystemRandom().randrange(2**31))
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore")]  # poison warns of what is not deterministic


@dataclass(frozen=True)
class Form:
    """A scan with its options and its tolerances of outputs and states, of gradients, and of gradients in bf16."""

    scan: str
    fp32: tuple[float, float]
    bf16: float
    options: dict = field(default_factory=dict)
    mamba: bool = False

    @property
    def momentum(self) -> bool:
        return self.options.get("gamma", 0.0) != 0.0


def momentum(gamma: float) -> dict:
    return {"gamma": gamma, "alpha": 0.7}


DIAGONAL, SCALAR, DELTA = ((5e-6, 5e-5), 2e-2), ((1e-5, 1e-4), 2e-2), ((1e-5, 2e-4), 3e-2)
VELOCITY = momentum(0.9) | {"norm": "newton_schulz", "steps": 1, "poly": "quintic", "eps": 1e-6}
FORMS = {
    "longhorn": Form("diag_scan", *DIAGONAL, momentum(0.0)),
    "muon longhorn": Form("diag_scan", *DIAGONAL, momentum(0.9)),
    "mamba": Form("diag_scan", *DIAGONAL, momentum(0.0), mamba=True),
    "muon mamba": Form("diag_scan", *DIAGONAL, momentum(0.9), mamba=True),
    "mamba2": Form("scalar_scan", *SCALAR, momentum(0.0)),
    "muon mamba2": Form("scalar_scan", *SCALAR, momentum(0.9)),
    "delta rule": Form("delta_scan", *DELTA),
    "open delta rule": Form("delta_momentum_scan", *DELTA, momentum(0.0)),
    "muon delta rule": Form("delta_momentum_scan", *DELTA, momentum(0.9)),
    "velocity": Form("velocity_scan", (1e-4, 1e-3), 5e-2, VELOCITY),
}
BF16_FACTORS = {("scalar_scan", "triton"): 1e-2, ("delta_scan", "triton"): 1e-2}  # -> their tolerance of outputs


BF16_VALUES = {"scalar_scan": 1, "delta_scan": 2}  # where among the tensors a mixer in bf16 hands such values over


@dataclass(frozen=True)
class Size:
    """Rows, heads, groups of heads, widths of keys and values; diag_scan has heads x P channels."""

    B: int
    H: int
    G: int
    N: int
    P: int


ODD = Size(1, 2, 1, 5, 12) if REHEARSAL else Size(2, 2, 1, 5, 20)  # no width a multiple of 8 or 16
TRAINED = {  # as models have them: MuonLonghorn-97m, Mamba-2 130M, Gated DeltaNet 170M, with fewer heads
    "diag_scan": Size(1, 7, 1, 16, 192),
    "scalar_scan": Size(1, 4, 1, 128, 64),
    "delta_scan": Size(1, 3, 3, 56, 112),
}
CHUNK, HOW = (16, {"chunk": 16}) if REHEARSAL else (64, {})  # training leaves the choice of a chunk to the backend
SHORT = (1, CHUNK, CHUNK + 1) if REHEARSAL else (1, 7, CHUNK - 1, CHUNK, CHUNK + 1)
LONG = (5,) if REHEARSAL else (4096, 8192)
LONGEST = 6 if REHEARSAL else 32768


def size_of(form: Form, trained: bool) -> Size:
    if not trained or REHEARSAL:
        return ODD
    return TRAINED.get(form.scan, TRAINED["delta_scan"])


def runnable(name: str) -> list[str]:
    """The backends of a scan that this device can run; not those that "auto" would take on a CPU alone."""
    found = []
    for row in BACKENDS:
        if row.scan == name and row.device != "cpu":
            try:
                found.append(choose_backend(name, row.name, DEVICE, torch.float32))
            except UserError:
                continue
    return found


FAST = [(form, name) for form in FORMS for name in runnable(FORMS[form].scan) if name != "reference"]
each = pytest.mark.parametrize("form, backend", FAST, ids=lambda value: value)


def inputs(form: Form, L: int, *, trained: bool = False, B: int = 0) -> dict:
    """Tensors of the scan, in fp32: gates spread over (0, 1), keys of the delta rules of norm 1."""
    size = size_of(form, trained)
    B, H, G, N, P = B or size.B, size.H, size.G, size.N, size.P
    draw = torch.Generator().manual_seed(SEED)

    def normal(*shape):
        return torch.randn(*shape, generator=draw).to(DEVICE)

    def uniform(*shape):
        return torch.rand(*shape, generator=draw).to(DEVICE)

    if form.scan == "diag_scan":
        D, k = H * P, normal(B, L, N)
        s = uniform(B, L, D)
        delta = s if form.mamba else s / (1 + s * k.square().sum(-1, keepdim=True))
        # the slowest state remembers 100 tokens; with T of them, an ulp in its gate is T ulp in the state
        every = {"delta": delta, "A": -0.02 - 3 * uniform(D, N)} if form.mamba else {"delta": delta}
        every |= {"w": normal(B, L, D), "k": k, "q": normal(B, L, N), "S0": normal(B, N, D)}
        return every | ({"M0": normal(B, N, D)} if form.momentum else {})
    every = {"lg": -0.3 * normal(B, L, H).abs(), "b": torch.sigmoid(normal(B, L, H))}
    every["u" if form.scan in ("delta_scan", "velocity_scan") else "w"] = normal(B, L, H, P)
    every |= {"k": F.normalize(normal(B, L, G, N), dim=-1), "q": normal(B, L, G, N) / math.sqrt(N)}
    every["S0"] = normal(B, H, N, P)
    if form.scan == "scalar_scan":
        del every["b"]
    return every | ({"M0": normal(B, H, N, P)} if form.momentum else {})


def call(form: Form, tensors: dict, **how) -> dict:
    """-> y, S and, where there is one, M."""
    given = dict(tensors)
    if form.scan == "diag_scan":
        given["gate"] = tuple(given.pop(name) for name in ("delta", "A") if name in given)
    outputs = getattr(scan, form.scan)(**given, **form.options, **HOW, **how)
    assert form.momentum or len(outputs) == 2 or outputs[2] is None
    return {name: out for name, out in zip("ySM", outputs) if out is not None}


def run(form: Form, tensors: dict, **how) -> dict:
    """call, and the gradients of a random linear function of all outputs, named d_<tensor>."""
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    outputs = call(form, leaves, **how)
    draw = torch.Generator().manual_seed(SEED + 1)
    weights = [torch.randn(out.shape, generator=draw).to(DEVICE, out.dtype) for out in outputs.values()]
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    found = {name: out.detach() for name, out in outputs.items()}
    return found | {f"d_{name}": g for name, g in zip(leaves, grads)}


def doubled(tensors: dict) -> dict:
    return {name: x.double() for name, x in tensors.items()}


def truth(form: Form, tensors: dict, **how) -> dict:
    short = tensors["k"].shape[1] <= 200
    return run(form, doubled(tensors), backend="reference" if short else "chunked", **how)


def agree(within, what: str, got: dict, want: dict, tolerances: tuple[float, float]) -> None:
    """The quantity nearest to its tolerance; if it is too far off, all of them."""
    assert got.keys() == want.keys()
    assert all(got[name].shape == want[name].shape for name in want)
    errors = {n: ((got[n].double() - x).norm() / x.norm().clamp(min=1e-6)).item() for n, x in want.items()}
    allowed = {name: tolerances[name.startswith("d_")] for name in want}
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name] / allowed[name])
    try:
        within(f"{what}: {worst}", errors[worst], allowed[worst])
    except AssertionError as error:
        every = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
        raise AssertionError(f"{error}; MUONLM_SEED={SEED}; {every}") from None


@pytest.mark.parametrize("L", SHORT)
@each
def test_outputs_states_and_gradients_equal_the_loop(form, backend, L, within):
    one = FORMS[form]
    given = inputs(one, L)
    agree(within, f"{form} {backend} L {L}", run(one, given, backend=backend), truth(one, given), one.fp32)


@each
def test_padding_writes_nothing_copies_the_states_and_has_no_gradient(form, backend, within):
    """Rows of all lengths: full, empty, exactly a chunk, one token."""
    one, L = FORMS[form], CHUNK + 5
    given, lengths = inputs(one, L, B=4), torch.tensor([L, 0, CHUNK, 1], device=DEVICE)
    got = run(one, given, backend=backend, lengths=lengths)
    agree(within, f"{form} {backend} padded", got, truth(one, given, lengths=lengths), one.fp32)
    for name, x in got.items():
        if x.shape[:2] == (4, L):
            assert all(x[row, real:].eq(0).all() for row, real in enumerate(lengths.tolist())), f"{name} at padding"
    assert torch.equal(got["S"][1], given["S0"][1])


@pytest.mark.parametrize("trained", [False] if REHEARSAL else [False, True])
@each
def test_bf16_inputs_give_fp32_outputs_and_bf16_gradients(form, backend, trained, within):
    one = FORMS[form]
    given = inputs(one, 3 * CHUNK + 1 if trained else CHUNK + 1, trained=trained)
    given = {name: x if name in ("A", "S0", "M0") else x.bfloat16() for name, x in given.items()}
    got = run(one, given, backend=backend)
    assert got["y"].dtype == got["S"].dtype == torch.float32
    assert all(got[f"d_{name}"].dtype == x.dtype for name, x in given.items())
    tolerances = BF16_FACTORS.get((one.scan, backend), one.fp32[0]), one.bf16
    agree(within, f"{form} {backend} bf16", got, truth(one, given), tolerances)


@each
def test_strong_gates_are_finite_and_equal_to_the_loop(form, backend, within):
    """Where quotients of decays are 0/0: a chunk of closed gates, a gate of 1e-30; zero keys; Longhorn's f near 0."""
    one, C = FORMS[form], CHUNK
    given = inputs(one, 2 * C + 3)
    if one.scan == "diag_scan" and one.mamba:
        given["A"][:, ::2] *= 100.0
        given["delta"][:, 1 : C + 1] = 1.0
    elif one.scan == "diag_scan":
        given["k"] *= 1e-3
        given["k"][:, ::3, 1] = 30.0
        given["delta"] = torch.ones_like(given["w"]) / (1 + given["k"].square().sum(-1, keepdim=True))
        given["delta"][:, -1] = 1 / 900
    else:
        given["lg"][:, 1 : C + 1] = -80.0
        given["lg"][:, C + 1] = math.log(1e-30)
        given["lg"][:1, C + 2 :] = -torch.inf
    given["k"][:, C - 3 : C - 1] = 0.0
    agree(within, f"{form} {backend} strong gates", run(one, given, backend=backend), truth(one, given), one.fp32)


@each
def test_strided_inputs_and_missing_states_equal_the_loop(form, backend, within):
    """k and q cut from one projection, the values transposed, the gates from a longer row; NaN between what is read."""
    one, L = FORMS[form], CHUNK + 1
    given = inputs(one, L, B=2)
    N = given["k"].shape[-1]
    between = torch.full_like(given["k"][..., :3], torch.nan)
    given["k"], given["q"] = torch.cat([given["k"], between, given["q"]], -1).split([N, 3, N], -1)[::2]
    for name in ("u", "w"):
        if name in given:
            given[name] = given[name].mT.contiguous().mT
    gate = "delta" if "delta" in given else "lg"
    given[gate] = torch.cat([given[gate], torch.full_like(given[gate][:, :4], torch.nan)], 1)[:, :L]
    assert not any(given[name].is_contiguous() for name in ("k", "q", gate))
    for name in ("S0", "M0"):
        given.pop(name, None)
    agree(within, f"{form} {backend} strided", run(one, given, backend=backend), truth(one, given), one.fp32)


@pytest.mark.parametrize("L", LONG)
@each
def test_long_rows_of_trained_widths_equal_the_fp64_form(form, backend, L, within):
    one = FORMS[form]
    if one.scan == "velocity_scan" and L > 4096:
        pytest.skip("a loop over tokens: 4,096 are enough of it")
    given = inputs(one, L, trained=True)
    agree(within, f"{form} {backend} L {L}", run(one, given, backend=backend), truth(one, given), one.fp32)


@each
def test_the_longest_rows_equal_the_fp64_form_forward(form, backend, within):
    one = FORMS[form]
    if one.scan == "velocity_scan" and LONGEST > 4096:
        pytest.skip("a loop over tokens: 4,096 are enough of it")
    given = inputs(one, LONGEST, trained=True)
    with torch.no_grad():
        got, want = call(one, given, backend=backend), call(one, doubled(given), backend="chunked")
    agree(within, f"{form} {backend} L {LONGEST}", got, want, one.fp32)


@each
def test_open_gates_over_a_long_row_stay_finite_in_bf16(form, backend):
    """Nothing is forgotten: the states are as large as they can get."""
    one = FORMS[form]
    given = inputs(one, LONG[0])
    given["delta" if "delta" in given else "lg"] *= 1e-4
    got = run(one, given, backend=backend)
    assert all(x.bfloat16().isfinite().all() for x in got.values()), [
        n for n, x in got.items() if not x.isfinite().all()
    ]


@each
def test_a_repeated_backward_pass_gives_the_same_bits(form, backend):
    one = FORMS[form]
    given = inputs(one, CHUNK + 1)
    first, second = (run(one, given, backend=backend) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", [form for form in FORMS if "chunked" in backends(FORMS[form].scan)])
def test_the_chunked_form_in_fp64_which_judges_long_rows_equals_the_loop(form, within):
    one = FORMS[form]
    given = inputs(one, 2 * CHUNK + 3)
    got = run(one, doubled(given), backend="chunked")
    agree(within, f"{form} fp64", got, truth(one, given), (1e-11, 1e-10))


@pytest.mark.parametrize("letter", [x for x, entry in MIXERS.items() if issubclass(entry.load(), Recurrent)])
def test_under_autocast_a_mixer_hands_its_scan_fp32_and_gets_what_the_loop_gives(letter, monkeypatch, within):
    """What is really called: each layer's scan is run again by the loop in fp64, on the very tensors it was given.
    All are fp32, but on a GPU the values of some: they tell that products may take bf16 factors."""
    calls, run_scan = [], dispatch._run

    def listen(name, backend, value, k, *tensors, **options):
        outputs = run_scan(name, backend, value, k, *tensors, **options)
        chosen = choose_backend(name, backend, DEVICE, torch.float32, k.shape[-1])
        calls.append((name, chosen, tensors, options, outputs))
        return outputs

    monkeypatch.setattr(dispatch, "_run", listen)
    torch.manual_seed(SEED)
    cfg = ModelConfig(pattern=letter, n_layer=1, d_model=32, vocab_size=64, n_head=2, ssm_head=16, d_state=16)
    model = build_model(cfg).to(DEVICE)
    tokens = torch.randint(64, (2, CHUNK + 2), device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert calls and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for name, backend, tensors, options, outputs in calls:
        gate, *others = tensors
        flat = [*(gate if isinstance(gate, tuple) else (gate,)), *others]
        values = tensors[BF16_VALUES[name]] if name in BF16_VALUES and DEVICE.type == "cuda" else None
        assert values is None or values.dtype == torch.bfloat16
        assert {x.dtype for x in [*flat, *outputs] if x is not None and x is not values} == {torch.float32}
        wide = [x if x is None else x.double() for x in flat]
        if isinstance(gate, tuple):
            wide = [tuple(wide[: len(gate)]), *wide[len(gate) :]]
        options.pop("chunk")
        with torch.no_grad():
            want = getattr(reference, name)(*wide, **options)
        pairs = [(out, exact) for out, exact in zip(outputs, want) if exact is not None]
        tolerances = next(form.fp32 for form in FORMS.values() if form.scan == name)
        tolerances = BF16_FACTORS.get((name, backend), tolerances[0]), tolerances[1]
        got, want = ({n: x for n, x in zip("ySM", xs)} for xs in zip(*pairs))
        agree(within, f"{letter} under autocast", {n: x.detach() for n, x in got.items()}, want, tolerances)


@pytest.mark.parametrize(
    "row", [row for row in BACKENDS if row.device != "cpu"], ids=lambda row: f"{row.scan}-{row.name}"
)
def test_every_row_of_the_table_runs_on_this_device(row):
    """Else the tests above would pass for want of cases."""
    assert row.name in runnable(row.scan)


def test_a_missing_write_is_seen():
    """The poison works: an output that torch.empty made and nobody wrote is NaN, which no tolerance allows."""
    y = torch.empty(2, 3, device=DEVICE)
    y[:, :2] = 1.0
    assert y[:, :2].eq(1).all() and y[:, 2].isnan().all()
    assert torch.empty_like(y).isnan().all() and y.new_empty(7).isnan().all()
