"""The diagonal scan on CPU: numba kernels written in vectors of channels, forward and exact backward.

    M_t = γ M_{t−1} + α k_t w_tᵀ      S_t = f_t ⊙ S_{t−1} + M_t      y_t = S_tᵀ q_t       f = 1 − Δ k² or exp(Δ A)
    backward, t = L..1, from Λ = ∂S_L, Π = ∂M_L:   Λ += q_t ∂y_tᵀ;   Π += Λ;   F = Λ ⊙ S_{t−1}
        ∂q_t = S_t ∂y_t;   ∂w_t = α Πᵀ k_t;   ∂k_t = α Π w_t, and for Longhorn − 2 k_t ⊙ F Δ_t
        ∂Δ_t = −Fᵀ k_t² (Longhorn), or Σ_n F f A with ∂A = Σ_t F f Δ (Mamba)
        Λ ← f_t ⊙ Λ;   Π ← γ Π;   and at the start ∂S_0 = Λ, ∂M_0 = Π

Shapes   Δ, w, y (B,L,D) · A (D,N) · k, q (B,L,N) · S, M (B,N,D), all fp32
         Sc, Mc (B,⌈L/C⌉,N,D): the states at the start of each chunk
Method   A tile is LANES channels × ROWS states. Its S, M (Λ, Π) stay in registers over the C tokens of a chunk, so
         a token costs few loads beside the arithmetic. Compilers do not find this form by themselves: the vector
         instructions are written out with llvmlite. The types of the arguments choose the variant (A or k² given,
         M given or None); each is compiled at its first use and cached on disk.
         Backward reruns a chunk from Sc, Mc, keeping S_{t−1} (and Mamba's f) of one tile; it never divides by f.
Memory   beyond inputs and outputs: Sc, Mc, and for dk, dq one (B,L,N) partial sum for each BLOCK channels, added in a
         fixed order, so that results repeat bitwise and do not depend on the number of threads
Threads  The kernels release the GIL and run in torch.get_num_threads() plain Python threads: no OpenMP or numba pool is
         touched, and any number of callers may run at once.
Limits   Δ A ≤ 88 (a gate ≤ 1 is meant); below −87 exp stays at 1.6e-38
Source   muonlm's own, derived from the recurrences of Longhorn 2407.14207, Mamba 2312.00752 and MuonSSM 2606.30461
"""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import pad

from .diagonal import differentiable

try:
    import numba
    import numpy as np
    from llvmlite import binding, ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:  # no wheel for this platform: available() says so, and scan/ then takes the chunked form
    numba = None

    def intrinsic(function):
        return function


def _features() -> dict[str, bool]:
    try:
        return binding.get_host_cpu_features() if numba else {}
    except RuntimeError:  # LLVM does not know this CPU
        return {}


FEATURES = _features()
LANES = 16 if FEATURES.get("avx512f") else 8  # channels of a vector: one register
ROWS = LANES // 2  # states of a tile: S and M take half of the 32 (AVX-512) or 16 (AVX2) registers
BLOCK = 64  # channels of a task: each token's 256 bytes are read together, and share one partial sum of dk and dq
SERIAL = 1 << 18  # states × tokens below which waking a thread (some 50 µs) costs more than it saves


def available(device: torch.device) -> bool:
    """Whether numba is here, and the CPU not one without FMA, where the chunked form is faster (LOG 2026-11-22)."""
    return device.type == "cpu" and numba is not None and FEATURES.get("fma", True)


# ---- vectors of LANES floats, written into LLVM's IR


class Vector:
    def __init__(self, builder, value):
        self.builder, self.value = builder, value

    def __add__(self, other):
        return Vector(self.builder, self.builder.fadd(self.value, other.value))

    def __sub__(self, other):
        return Vector(self.builder, self.builder.fsub(self.value, other.value))

    def __mul__(self, other):
        return Vector(self.builder, self.builder.fmul(self.value, other.value))

    def shuffle(self, other, order):
        mask = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order)
        return Vector(self.builder, self.builder.shuffle_vector(self.value, other.value, mask))


class Writer:
    """Writes vector code at the builder's position. Addresses are i64 bytes; at(address, i, j…) adds 4 i j… to one."""

    def __init__(self, builder):
        self.builder = builder
        self.floats = ir.VectorType(ir.FloatType(), LANES)
        self.ints = ir.VectorType(ir.IntType(32), LANES)
        self.bools = ir.VectorType(ir.IntType(1), LANES)

    def constant(self, x):
        return Vector(self.builder, ir.Constant(self.floats, [x] * LANES))

    def splat(self, scalar, kind=None):
        first = self.builder.insert_element(ir.Constant(kind or self.floats, ir.Undefined), scalar, ir.IntType(32)(0))
        return Vector(self.builder, first).shuffle(Vector(self.builder, first), [0] * LANES)

    def at(self, address, *factors):
        offset = ir.IntType(64)(4)
        for factor in factors:
            offset = self.builder.mul(offset, ir.IntType(64)(factor) if isinstance(factor, int) else factor)
        return self.builder.add(address, offset)

    def _pointer(self, address, kind):
        return self.builder.inttoptr(address, kind.as_pointer())

    def broadcast(self, address):
        pointer = self._pointer(address, ir.FloatType())
        return self.splat(self.builder.load(pointer, align=4))

    def load(self, address):
        return Vector(self.builder, self.builder.load(self._pointer(address, self.floats), align=64))

    def store(self, address, vector):
        self.builder.store(vector.value, self._pointer(address, self.floats), align=64)

    def _call(self, name, result, arguments):
        kind = ir.FunctionType(result, [a.type for a in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def mask(self, count):
        """The first `count` (i64) lanes."""
        count = self.splat(self.builder.trunc(count, ir.IntType(32)), self.ints).value
        return self.builder.icmp_signed("<", ir.Constant(self.ints, list(range(LANES))), count)

    def both(self, mask, condition):
        return self.builder.and_(mask, self.splat(condition, self.bools).value)

    def masks(self, width, rows):
        """The real lanes, and of each state of the tile."""
        lanes = self.mask(width)
        return lanes, [self.both(lanes, self.builder.icmp_signed("<", ir.IntType(64)(n), rows)) for n in range(ROWS)]

    @contextmanager
    def loop(self, count):
        with cgutils.for_range(self.builder, count, intp=ir.IntType(64)) as loop:
            yield loop.index

    def masked_load(self, address, mask):
        """Lanes outside the mask are not touched and read as 0."""
        arguments = [self._pointer(address, self.floats), ir.IntType(32)(4), mask, self.constant(0.0).value]
        name = f"llvm.masked.load.v{LANES}f32.p0"
        return Vector(self.builder, self._call(name, self.floats, arguments))

    def masked_store(self, address, mask, vector):
        arguments = [vector.value, self._pointer(address, self.floats), ir.IntType(32)(4), mask]
        self._call(f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), arguments)

    def fma(self, a, b, c):
        """a b + c, rounded once."""
        return Vector(self.builder, self._call(f"llvm.fma.v{LANES}f32", self.floats, [a.value, b.value, c.value]))

    def add_rows(self, address, sums, first):
        """`sums` (ROWS floats) added to what is at the address; stored there if `first`."""
        kind = ir.VectorType(ir.FloatType(), ROWS)
        pointer = self._pointer(address, kind)
        earlier = self.builder.load(pointer, align=4)
        earlier = self.builder.select(first, ir.Constant(kind, [0.0] * ROWS), earlier)
        self.builder.store(self.builder.fadd(earlier, sums.value), pointer, align=4)

    def variables(self, vectors):
        """Storage that LLVM turns into registers; read() and write() it."""
        slots = [cgutils.alloca_once(self.builder, self.floats) for _ in vectors]
        for slot, vector in zip(slots, vectors):
            self.builder.store(vector.value, slot)
        return slots

    def read(self, slot):
        return Vector(self.builder, self.builder.load(slot))

    def write(self, slot, vector):
        self.builder.store(vector.value, slot)

    def exp(self, x):
        """e^x for x ≤ 88, held at x = −87 from below; a NaN stays one. Relative error < 2e-7.
        x = i ln 2 + r, |r| ≤ ln 2 / 2: e^r by a minimax polynomial (9e-8), 2^i added to the exponent's bits."""
        low = self.constant(-87.0)
        x = Vector(
            self.builder, self.builder.select(self.builder.fcmp_ordered("<", x.value, low.value), low.value, x.value)
        )
        magic = self.constant(12582912.0)  # 1.5·2^23: adding it rounds to an integer, which stands in the low bits
        rounded = self.fma(x, self.constant(1.4426950408889634), magic)
        i = rounded - magic
        r = self.fma(i, self.constant(-0.693145751953125), x)  # ln 2 in two parts, the first exact times i
        r = self.fma(i, self.constant(-1.4286068203094172e-06), r)
        p = self.constant(0.008290306223978697)
        for c in (0.04189797553145321, 0.16667636581875697, 0.499991491916765, 0.9999997070138857, 1.0):
            p = self.fma(p, r, self.constant(c))
        bits = self.builder.shl(self.builder.bitcast(rounded.value, self.ints), ir.Constant(self.ints, [23] * LANES))
        bits = self.builder.add(self.builder.bitcast(p.value, self.ints), bits)
        return Vector(self.builder, self.builder.bitcast(bits, self.floats))

    def row_sums(self, vectors):
        """The ROWS sums over lanes of ROWS vectors, as one vector of ROWS floats: a tree of pairwise additions."""
        while len(vectors) > LANES // 8:
            vectors = [self._fold(a, b) for a, b in zip(vectors[::2], vectors[1::2])]
        # here a vector holds, in each group of 4 lanes, partial sums of the same 4 rows
        if LANES == 8:
            (total,) = vectors
            return total.shuffle(total, [0, 1, 2, 3]) + total.shuffle(total, [4, 5, 6, 7])
        one, two = vectors
        groups = lambda *ids: [4 * g + i for g in ids for i in range(4)]  # noqa: E731
        half = one.shuffle(two, groups(0, 2, 4, 6)) + one.shuffle(two, groups(1, 3, 5, 7))
        return half.shuffle(half, groups(0, 2)) + half.shuffle(half, groups(1, 3))

    def _fold(self, a, b):
        """Neighbours added, within each group of 4 lanes: [a0+a1, a2+a3, b0+b1, b2+b3]."""
        even = [g + i for g in range(0, LANES, 4) for i in (0, 2, LANES, LANES + 2)]
        return a.shuffle(b, even) + a.shuffle(b, [i + 1 for i in even])


# ---- one tile over the tokens of a chunk


def _named(names, args, kinds):
    """The arguments by name; None where None was passed."""
    given = [None if isinstance(kind, types.NoneType) else value for value, kind in zip(args, kinds)]
    return dict(zip(names.split(), given, strict=True))


# fmt: off
FORWARD = "tokens width rows first D K delta k2 A w k q y S M S_next M_next gamma alpha"
BACKWARD = ("tokens width rows first_tile first_group D K delta k2 A w k q gy S M scratch lam pi"
            " d_delta dA dw dk dq gamma alpha")


@intrinsic
def _forward_tile(_, tokens, width, rows, first, D, K, delta, k2, A, w, k, q, y, S, M, S_next, M_next, gamma, alpha):
    """`width` of LANES channels and `rows` of ROWS states are real. Sequences have stride D, or K: k², k, q.
    One of k² and A is None."""
    kinds = (tokens, width, rows, first, D, K, delta, k2, A, w, k, q, y, S, M, S_next, M_next, gamma, alpha)

    def generate(context, builder, signature, args):
        v, a = Writer(builder), _named(FORWARD, args, kinds)
        at, fma, D, K = v.at, v.fma, a["D"], a["K"]
        lanes, real = v.masks(a["width"], a["rows"])
        more = v.both(lanes, builder.not_(a["first"]))  # y holds the sum over earlier tiles
        S = v.variables([v.masked_load(at(a["S"], D, n), real[n]) for n in range(ROWS)])
        M = a["M"] and v.variables([v.masked_load(at(a["M"], D, n), real[n]) for n in range(ROWS)])
        A = a["A"] and [v.masked_load(at(a["A"], D, n), real[n]) for n in range(ROWS)]
        gamma, alpha, zero, one = v.splat(a["gamma"]), v.splat(a["alpha"]), v.constant(0.0), v.constant(1.0)
        with v.loop(a["tokens"]) as t:
            delta = v.masked_load(at(a["delta"], t, D), lanes)
            minus = zero - delta
            write = v.masked_load(at(a["w"], t, D), lanes) * alpha
            y = [v.masked_load(at(a["y"], t, D), more), zero]  # two sums: half the chain of additions
            k, q, k2 = at(a["k"], t, K), at(a["q"], t, K), a["k2"] and at(a["k2"], t, K)
            for n in range(ROWS):
                f = v.exp(delta * A[n]) if A else fma(minus, v.broadcast(at(k2, n)), one)
                new = v.broadcast(at(k, n)) * write
                if M:
                    new = fma(v.read(M[n]), gamma, new)
                    v.write(M[n], new)
                state = fma(f, v.read(S[n]), new)
                v.write(S[n], state)
                y[n % 2] = fma(v.broadcast(at(q, n)), state, y[n % 2])
            v.masked_store(at(a["y"], t, D), lanes, y[0] + y[1])
        for n in range(ROWS):
            v.masked_store(at(a["S_next"], D, n), real[n], v.read(S[n]))
            if M:
                v.masked_store(at(a["M_next"], D, n), real[n], v.read(M[n]))
        return context.get_dummy_value()

    return types.void(*kinds), generate


@intrinsic
def _backward_tile(_, tokens, width, rows, first_tile, first_group, D, K, delta, k2, A, w, k, q, gy, S, M, scratch,
                   lam, pi, d_delta, dA, dw, dk, dq, gamma, alpha):
    """As _forward_tile. lam, pi: Λ and Π after the chunk, replaced by those before it. d_delta and dw are added to
    unless first_tile, dk and dq unless first_group, dA always."""
    kinds = (tokens, width, rows, first_tile, first_group, D, K, delta, k2, A, w, k, q, gy, S, M, scratch, lam, pi,
             d_delta, dA, dw, dk, dq, gamma, alpha)

    def generate(context, builder, signature, args):
        v, a = Writer(builder), _named(BACKWARD, args, kinds)
        at, fma, D, K = v.at, v.fma, a["D"], a["K"]
        lanes, real = v.masks(a["width"], a["rows"])
        more = v.both(lanes, builder.not_(a["first_tile"]))
        load_rows = lambda name: [v.masked_load(at(a[name], D, n), real[n]) for n in range(ROWS)]  # noqa: E731
        velocity, A = a["M"] is not None, a["A"] and load_rows("A")
        gamma, alpha, zero, one = v.splat(a["gamma"]), v.splat(a["alpha"]), v.constant(0.0), v.constant(1.0)
        kept = 2 if A else 1  # vectors of scratch a state and token: S_{t−1}, and f where it is dear

        # the chunk once more, for S_{t−1}, and for dq, which needs S_t
        S = v.variables(load_rows("S"))
        M = velocity and v.variables(load_rows("M"))
        with v.loop(a["tokens"]) as t:
            delta = v.masked_load(at(a["delta"], t, D), lanes)
            minus = zero - delta
            write = v.masked_load(at(a["w"], t, D), lanes) * alpha
            gy = v.masked_load(at(a["gy"], t, D), lanes)
            k, k2, scratch = at(a["k"], t, K), a["k2"] and at(a["k2"], t, K), at(a["scratch"], t, kept * ROWS * LANES)
            dq = []
            for n in range(ROWS):
                before = v.read(S[n])
                v.store(at(scratch, n * LANES), before)
                f = v.exp(delta * A[n]) if A else fma(minus, v.broadcast(at(k2, n)), one)
                if A:
                    v.store(at(scratch, (ROWS + n) * LANES), f)
                new = v.broadcast(at(k, n)) * write
                if velocity:
                    new = fma(v.read(M[n]), gamma, new)
                    v.write(M[n], new)
                state = fma(f, before, new)
                v.write(S[n], state)
                dq.append(state * gy)
            v.add_rows(at(a["dq"], t, K), v.row_sums(dq), a["first_group"])

        lam = v.variables(load_rows("lam"))
        pi = velocity and v.variables(load_rows("pi"))
        dA = A and v.variables(load_rows("dA"))
        with v.loop(a["tokens"]) as i:
            t = builder.sub(builder.sub(a["tokens"], i), ir.IntType(64)(1))
            delta = v.masked_load(at(a["delta"], t, D), lanes)
            minus = zero - delta
            minus2 = minus + minus
            write = v.masked_load(at(a["w"], t, D), lanes) * alpha
            gy = v.masked_load(at(a["gy"], t, D), lanes)
            k, q, k2 = at(a["k"], t, K), at(a["q"], t, K), a["k2"] and at(a["k2"], t, K)
            scratch = at(a["scratch"], t, kept * ROWS * LANES)
            d_delta, dw, dk = zero, zero, []
            for n in range(ROWS):
                to_state = fma(v.broadcast(at(q, n)), gy, v.read(lam[n]))
                to_write = to_state
                if velocity:
                    to_write = v.read(pi[n]) + to_state
                    v.write(pi[n], to_write * gamma)
                before, k_n = v.load(at(scratch, n * LANES)), v.broadcast(at(k, n))
                dw = fma(to_write, k_n, dw)
                if A:
                    to_state = to_state * v.load(at(scratch, (ROWS + n) * LANES))
                    gate = to_state * before  # F f
                    d_delta = fma(gate, A[n], d_delta)
                    v.write(dA[n], fma(gate, delta, v.read(dA[n])))
                    dk.append(to_write * write)
                else:
                    gate, k2_n = to_state * before, v.broadcast(at(k2, n))
                    d_delta = fma(gate, k2_n, d_delta)
                    dk.append(fma(gate * minus2, k_n, to_write * write))
                    to_state = to_state * fma(minus, k2_n, one)
                v.write(lam[n], to_state)
            v.add_rows(at(a["dk"], t, K), v.row_sums(dk), a["first_group"])
            earlier = v.masked_load(at(a["d_delta"], t, D), more)
            v.masked_store(at(a["d_delta"], t, D), lanes, earlier + d_delta if A else earlier - d_delta)
            earlier = v.masked_load(at(a["dw"], t, D), more)
            v.masked_store(at(a["dw"], t, D), lanes, fma(dw, alpha, earlier))
        for n in range(ROWS):
            v.masked_store(at(a["lam"], D, n), real[n], v.read(lam[n]))
            if velocity:
                v.masked_store(at(a["pi"], D, n), real[n], v.read(pi[n]))
            if A:
                v.masked_store(at(a["dA"], D, n), real[n], v.read(dA[n]))
        return context.get_dummy_value()

    return types.void(*kinds), generate


# ---- tasks (row b of the batch, block of channels) from lo to hi; arrays are addresses


def _jit(function):
    if numba is None:
        return function
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither the package nor the user's cache folder can be written: compile in every process
        return numba.njit(nogil=True, error_model="numpy")(function)


@intrinsic
def _at(_, address, offset):
    """The address of the offset-th float; None stays None."""

    def generate(context, builder, signature, args):
        if isinstance(address, types.NoneType):
            return context.get_dummy_value()
        return Writer(builder).at(*args)

    return address(address, offset), generate


@_jit
def _forward_tasks(lo, hi, lengths, L, D, N, K, chunk, delta, k2, A, w, k, q, y, S, M, Sc, Mc, gamma, alpha):
    blocks, chunks = (D + BLOCK - 1) // BLOCK, (L + chunk - 1) // chunk
    for task in range(lo, hi):
        b, c0 = task // blocks, task % blocks * BLOCK
        for j in range(chunks):
            t = b * L + j * chunk
            tokens = max(0, min(chunk, lengths[b] - j * chunk))
            for c in range(c0, min(D, c0 + BLOCK), LANES):
                for n in range(0, N, ROWS):
                    x, z = t * D + c, t * K + n
                    here, end = ((b * chunks + j) * N + n) * D + c, (b * N + n) * D + c
                    S_next, M_next = _at(Sc, here + N * D), _at(Mc, here + N * D)
                    if j == chunks - 1:
                        S_next, M_next = _at(S, end), _at(M, end)
                    _forward_tile(tokens, D - c, N - n, n == 0, D, K, _at(delta, x), _at(k2, z), _at(A, n * D + c),
                                  _at(w, x), _at(k, z), _at(q, z), _at(y, x), _at(Sc, here), _at(Mc, here),
                                  S_next, M_next, np.float32(gamma), np.float32(alpha))


@_jit
def _backward_tasks(lo, hi, lengths, L, D, N, K, chunk, delta, k2, A, w, k, q, Sc, Mc, gy, lam, pi,
                    d_delta, dA, dw, dk, dq, gamma, alpha):
    blocks, chunks = (D + BLOCK - 1) // BLOCK, (L + chunk - 1) // chunk
    batch = len(lengths)
    room = np.empty(chunk * 2 * ROWS * LANES + 16, np.float32)
    scratch = (room.ctypes.data + 63) // 64 * 64
    for task in range(lo, hi):
        b, block = task // blocks, task % blocks
        c0 = block * BLOCK
        for j in range((lengths[b] + chunk - 1) // chunk - 1, -1, -1):
            t = b * L + j * chunk
            part = (block * batch * L + t) * K
            tokens = min(chunk, lengths[b] - j * chunk)
            for c in range(c0, min(D, c0 + BLOCK), LANES):
                for n in range(0, N, ROWS):
                    x, z = t * D + c, t * K + n
                    here, end = ((b * chunks + j) * N + n) * D + c, (b * N + n) * D + c
                    _backward_tile(tokens, D - c, N - n, n == 0, c == c0, D, K, _at(delta, x), _at(k2, z),
                                   _at(A, n * D + c), _at(w, x), _at(k, z), _at(q, z), _at(gy, x),
                                   _at(Sc, here), _at(Mc, here), scratch, _at(lam, end), _at(pi, end),
                                   _at(d_delta, x), _at(dA, end), _at(dw, x), _at(dk, part + n), _at(dq, part + n),
                                   np.float32(gamma), np.float32(alpha))
    room[0] = 0  # a last use: numba frees an array after that, and the tiles know only its address
# fmt: on


# ---- threads


_pool = None


def _forget_pool():
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_pool)  # a child inherits the object but not its threads


def _run(kernel, tasks, cost, tensors, *args):
    """kernel(lo, hi, *args) over 0..tasks, in pieces that torch.get_num_threads() threads take in turn.

    The pieces own `tensors`, whose addresses are among args: an interrupt may leave before the last of them has ended.
    """
    global _pool
    threads = min(torch.get_num_threads(), tasks)
    if threads == 1 or cost < SERIAL:
        kernel(0, tasks, *args)
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), "muonlm-scan")
    pieces = min(tasks, 4 * threads)
    turn = itertools.count()

    def work(held=tensors):
        while (i := next(turn)) < pieces:
            kernel(i * tasks // pieces, (i + 1) * tasks // pieces, *args)

    others = [_pool.submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        wait(others)
    for other in others:
        other.result()  # raises what it raised


# ---- the raw kernels of scan/


def _address(x: Tensor | None) -> int | None:
    if x is None:
        return None
    assert x.dtype == torch.float32 and x.is_contiguous(), (x.dtype, x.shape, x.stride())
    return x.data_ptr()


def _prepare(A, k, q, lengths, L):
    """k² or None, A (N,D) or None, k and q with N padded to whole tiles, the rows' lengths as an array."""
    missing = -k.shape[-1] % ROWS
    if missing:
        k, q = pad(k, (0, missing)), pad(q, (0, missing))
    k2, A = (k.square(), None) if A is None else (None, A.t().contiguous())
    return k2, A, k, q, np.full(len(k), L) if lengths is None else lengths.clamp(0, L).to("cpu", torch.int64).numpy()


def forward(delta, A, w, k, q, S0, M0, gamma, alpha, lengths, chunk):
    """-> y (B,L,D), S (B,N,D), M or None where γ = 0, and Sc, Mc for backward."""
    (B, L, D), N = w.shape, k.shape[-1]
    k2, A, k, q, ends = _prepare(A, k, q, lengths, L)

    def states(start):
        kept = w.new_empty(B, -(-L // chunk), N, D)
        kept[:, 0] = 0 if start is None else start
        return w.new_empty(B, N, D), kept

    S, Sc = states(S0)
    M, Mc = states(M0) if gamma else (None, None)
    y = torch.empty_like(w) if lengths is None else torch.zeros_like(w)
    tensors = (delta, k2, A, w, k, q, y, S, M, Sc, Mc)
    arrays, tasks = [_address(x) for x in tensors], B * -(-D // BLOCK)
    _run(
        _forward_tasks,
        tasks,
        B * L * N * D,
        tensors,
        ends,
        L,
        D,
        N,
        k.shape[-1],
        chunk,
        *arrays,
        float(gamma),
        float(alpha),
    )
    return y, S, M, Sc, Mc


def backward(delta, A, w, k, q, Sc, Mc, gamma, alpha, lengths, chunk, gy, gS, gM):
    """-> dΔ, dA (None for Longhorn), dw, dk, dq, dS0, dM0 (None where γ = 0)."""
    (B, L, D), N = w.shape, k.shape[-1]
    k2, A, k, q, ends = _prepare(A, k, q, lengths, L)
    K, blocks = k.shape[-1], -(-D // BLOCK)
    empty = w.new_empty if lengths is None else w.new_zeros
    d_delta, dw, dk, dq = empty(B, L, D), empty(B, L, D), empty(blocks, B, L, K), empty(blocks, B, L, K)

    def start(g):
        return w.new_zeros(B, N, D) if g is None else g.clone(memory_format=torch.contiguous_format)

    lam, pi = start(gS), start(gM) if gamma else None
    dA = None if A is None else w.new_zeros(B, N, D)
    tensors = (delta, k2, A, w, k, q, Sc, Mc, gy.contiguous(), lam, pi, d_delta, dA, dw, dk, dq)
    arrays = [_address(x) for x in tensors]
    _run(
        _backward_tasks,
        B * blocks,
        4 * B * L * N * D,
        tensors,
        ends,
        L,
        D,
        N,
        K,
        chunk,
        *arrays,
        float(gamma),
        float(alpha),
    )
    dk, dq = dk.sum(0)[..., :N], dq.sum(0)[..., :N]
    return d_delta, None if dA is None else dA.sum(0).t(), dw, dk, dq, lam, pi


diag_scan = differentiable(forward, backward)
