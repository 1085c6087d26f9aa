# type: ignore  (numba and LLVM compile this: Python's types do not apply)
"""The compiled part of diagonal_cpu.py: vectors of channels, one tile over a chunk, and the tasks that threads take.

All that is compiled stays in this file: numba's cache on disk notices changes of a compiled function's own file alone.
"""

from contextlib import contextmanager

try:
    import numba
    import numpy as np
    from llvmlite import binding, ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:  # no wheel for this platform: available() says so, and the table's next form is taken
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


class Tile(Writer):
    """A tile's arguments (None where None was passed), masks and constants. `kinds`: name -> numba's type of it."""

    def __init__(self, builder, kinds, args):
        super().__init__(builder)
        absent = [isinstance(kind, types.NoneType) for kind in kinds.values()]
        self.args = a = dict(zip(kinds, (None if no else value for value, no in zip(args, absent)), strict=True))
        self.lanes, self.real = self.masks(a["width"], a["rows"])
        self.more = self.both(self.lanes, builder.not_(a["first"]))  # where the sum over earlier tiles already is
        self.A = a["A"] and self.rows("A")
        self.gamma, self.alpha = self.splat(a["gamma"]), self.splat(a["alpha"])
        self.zero, self.one = self.constant(0.0), self.constant(1.0)
        self.kept = 2 if self.A else 1  # vectors of scratch a state and token: S_{t−1}, and f where it is dear

    def rows(self, name):
        """The states' rows of an array whose rows have stride D."""
        return [self.masked_load(self.at(self.args[name], self.args["D"], n), self.real[n]) for n in range(ROWS)]

    def put_rows(self, name, slots):
        for n in range(ROWS):
            self.masked_store(self.at(self.args[name], self.args["D"], n), self.real[n], self.read(slots[n]))

    def channels(self, name, t):
        """Token t of a sequence of channels."""
        return self.masked_load(self.at(self.args[name], t, self.args["D"]), self.lanes)

    def states(self, name, t):
        """The address of token t of a sequence of states; None stays None."""
        return self.args[name] and self.at(self.args[name], t, self.args["K"])

    def scratch(self, t):
        return self.at(self.args["scratch"], t, self.kept * ROWS * LANES)

    def gate(self, n, delta, minus, k2):
        """f of state n; minus = −Δ."""
        if self.A:
            return self.exp(delta * self.A[n])
        return self.fma(minus, self.broadcast(self.at(k2, n)), self.one)


@intrinsic
def _forward_tile(_, tokens, width, rows, first, D, K, delta, k2, A, w, k, q, y, S, M, S_next, M_next, gamma, alpha):
    """`width` of LANES channels and `rows` of ROWS states are real. Sequences have stride D, or K: k², k, q.
    One of k² and A is None."""
    kinds = {name: kind for name, kind in locals().items() if name != "_"}

    def generate(context, builder, signature, args):
        v = Tile(builder, kinds, args)
        at, fma = v.at, v.fma
        S, M = v.variables(v.rows("S")), v.args["M"] and v.variables(v.rows("M"))
        with v.loop(v.args["tokens"]) as t:
            delta = v.channels("delta", t)
            minus = v.zero - delta
            write = v.channels("w", t) * v.alpha
            here = at(v.args["y"], t, v.args["D"])
            y = [v.masked_load(here, v.more), v.zero]  # two sums: half the chain of additions
            k, q, k2 = v.states("k", t), v.states("q", t), v.states("k2", t)
            for n in range(ROWS):
                f = v.gate(n, delta, minus, k2)
                new = v.broadcast(at(k, n)) * write
                if M:
                    new = fma(v.read(M[n]), v.gamma, new)
                    v.write(M[n], new)
                state = fma(f, v.read(S[n]), new)
                v.write(S[n], state)
                y[n % 2] = fma(v.broadcast(at(q, n)), state, y[n % 2])
            v.masked_store(here, v.lanes, y[0] + y[1])
        v.put_rows("S_next", S)
        if M:
            v.put_rows("M_next", M)
        return context.get_dummy_value()

    return types.void(*kinds.values()), generate


@intrinsic
def _backward_tile(
    _, tokens, width, rows, first, first_group, D, K, delta, k2, A, w, k, q, gy, S, M, scratch, lam, pi,
    d_delta, dA, dw, dk, dq, gamma, alpha,
):  # fmt: skip
    """As _forward_tile. lam, pi: Λ and Π after the chunk, replaced by those before it. d_delta and dw are added to
    unless first, dk and dq unless first_group, dA always."""
    kinds = {name: kind for name, kind in locals().items() if name != "_"}

    def generate(context, builder, signature, args):
        v = Tile(builder, kinds, args)
        _rerun(v)
        _walk_back(v)
        return context.get_dummy_value()

    return types.void(*kinds.values()), generate


def _rerun(v):
    """The chunk once more, for what the way back needs, S_{t−1} and Mamba's f, and for dq, which needs S_t."""
    at, fma = v.at, v.fma
    S, M = v.variables(v.rows("S")), v.args["M"] and v.variables(v.rows("M"))
    with v.loop(v.args["tokens"]) as t:
        delta = v.channels("delta", t)
        minus = v.zero - delta
        write = v.channels("w", t) * v.alpha
        gy = v.channels("gy", t)
        k, k2, scratch = v.states("k", t), v.states("k2", t), v.scratch(t)
        dq = []
        for n in range(ROWS):
            before = v.read(S[n])
            v.store(at(scratch, n * LANES), before)
            f = v.gate(n, delta, minus, k2)
            if v.A:
                v.store(at(scratch, (ROWS + n) * LANES), f)
            new = v.broadcast(at(k, n)) * write
            if M:
                new = fma(v.read(M[n]), v.gamma, new)
                v.write(M[n], new)
            state = fma(f, before, new)
            v.write(S[n], state)
            dq.append(state * gy)
        v.add_rows(v.states("dq", t), v.row_sums(dq), v.args["first_group"])


def _walk_back(v):
    """From the last token of the chunk to its first: Λ, Π and all other gradients."""
    at, fma, a = v.at, v.fma, v.args
    lam, pi = v.variables(v.rows("lam")), a["M"] and v.variables(v.rows("pi"))
    dA = v.A and v.variables(v.rows("dA"))
    with v.loop(a["tokens"]) as i:
        t = v.builder.sub(v.builder.sub(a["tokens"], i), ir.IntType(64)(1))
        delta = v.channels("delta", t)
        minus = v.zero - delta
        minus2 = minus + minus
        write = v.channels("w", t) * v.alpha
        gy = v.channels("gy", t)
        k, q, k2, scratch = v.states("k", t), v.states("q", t), v.states("k2", t), v.scratch(t)
        d_delta, dw, dk = v.zero, v.zero, []
        for n in range(ROWS):
            to_state = fma(v.broadcast(at(q, n)), gy, v.read(lam[n]))
            to_write = to_state
            if pi:
                to_write = v.read(pi[n]) + to_state
                v.write(pi[n], to_write * v.gamma)
            before, k_n = v.load(at(scratch, n * LANES)), v.broadcast(at(k, n))
            dw = fma(to_write, k_n, dw)
            if dA:
                to_state = to_state * v.load(at(scratch, (ROWS + n) * LANES))
                gate = to_state * before  # F f
                d_delta = fma(gate, v.A[n], d_delta)
                v.write(dA[n], fma(gate, delta, v.read(dA[n])))
                dk.append(to_write * write)
            else:
                gate, k2_n = to_state * before, v.broadcast(at(k2, n))
                d_delta = fma(gate, k2_n, d_delta)
                dk.append(fma(gate * minus2, k_n, to_write * write))
                to_state = to_state * fma(minus, k2_n, v.one)
            v.write(lam[n], to_state)
        v.add_rows(v.states("dk", t), v.row_sums(dk), a["first_group"])
        here = at(a["d_delta"], t, a["D"])
        earlier = v.masked_load(here, v.more)
        v.masked_store(here, v.lanes, earlier + d_delta if dA else earlier - d_delta)
        here = at(a["dw"], t, a["D"])
        v.masked_store(here, v.lanes, fma(dw, v.alpha, v.masked_load(here, v.more)))
    for name, slots in (("lam", lam), ("pi", pi), ("dA", dA)):
        if slots:
            v.put_rows(name, slots)


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
def forward_tasks(lo, hi, lengths, L, D, N, K, chunk, delta, k2, A, w, k, q, y, S, M, Sc, Mc, gamma, alpha):
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
                                  S_next, M_next, np.float32(gamma), np.float32(alpha))  # fmt: skip


@_jit
def backward_tasks(
    lo,
    hi,
    lengths,
    L,
    D,
    N,
    K,
    chunk,
    delta,
    k2,
    A,
    w,
    k,
    q,
    Sc,
    Mc,
    gy,
    lam,
    pi,
    d_delta,
    dA,
    dw,
    dk,
    dq,
    gamma,
    alpha,
):
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
                                   np.float32(gamma), np.float32(alpha))  # fmt: skip
    room[0] = 0  # a last use: numba frees an array after that, and the tiles know only its address
