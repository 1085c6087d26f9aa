"""Which Newton-Schulz method and dtype is fastest here for a given shape: measured on a CPU, counted elsewhere.

CPU   Forced bfloat16 is several times slower without native bf16 products, and with them small matrices may still gain
      nothing; the hybrid form saves products with X but adds small ones. So each candidate runs three times on a
      bounded stand-in of the bucket (large shapes are represented by smaller ones of the same aspect): some 50 ms a
      shape, once a process.
GPU   The dtype is bfloat16, where the method allows it, and the method the one with the fewest flops: a stand-in would
      measure launches, the true size would take its time and its memory, and either would wait for the device.
"""

import math
import os
import time

import torch

from .newton_schulz import check_method, orthogonalise, sections

NS_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
ON_DEVICE = {"cpu": ["float32", "bfloat16"], "cuda": ["bfloat16", "float32"]}  # on a GPU the first that is allowed
BF16_GAIN = 1.3  # bf16 must be this much faster than fp32 in the same form to be worth its rounding
LARGEST = 192  # rows of the stand-in
STAND_IN_ENTRIES = 4 * 192 * 768  # of the whole batch

Choice = tuple[str, torch.dtype]  # method, dtype
_measured: dict[tuple, Choice] = {}


def choose(group: dict, A: int, B: int, count: int, dtype: torch.dtype, device: torch.device) -> Choice:
    """Method and dtype for `count` blocks A x B of a group; what "auto" chose is kept in group["ns_chosen"]."""
    method, ns_dtype = group["ns_method"], group["ns_dtype"]
    if ns_dtype == "auto" and (forced := os.environ.get("MUONLM_NS_DTYPE")):
        ns_dtype = dtype_name(forced, "MUONLM_NS_DTYPE")
    if dtype == torch.float64:
        ns_dtype = "float64"
    if "auto" not in (method, ns_dtype):
        check_method(method, group["coefficients"], NS_DTYPES[ns_dtype])  # the environment may have chosen the dtype
        return method, NS_DTYPES[ns_dtype]
    m, n = min(A, B), max(A, B)
    key = f"{m}x{n}" if dtype != torch.float64 else f"{m}x{n} float64"
    options = candidates(m, n, group["coefficients"], group["ns_steps"], method, ns_dtype, device)
    way, _, name = group["ns_chosen"].get(key, "").partition(" ")
    if name in NS_DTYPES and (way, NS_DTYPES[name]) in options:
        return way, NS_DTYPES[name]
    # nothing stored, or it was chosen under settings that have changed since
    if device.type == "cpu":
        chosen = fastest(m, n, count, group["coefficients"], group["ns_steps"], options)
    else:
        chosen = min(options, key=lambda option: flops(option[0], m, n, group["ns_steps"]))
    group["ns_chosen"][key] = f"{chosen[0]} {str(chosen[1]).removeprefix('torch.')}"
    return chosen


def candidates(
    m: int, n: int, coefficients, steps: int, method: str, ns_dtype: str, device: torch.device
) -> list[Choice]:
    """The legal choices among direct, hybrid and gram, float32 and bfloat16, that the settings leave open."""
    methods = [method] if method != "auto" else ["direct"]
    if method == "auto" and 2 * n >= 3 * m and steps >= 3:
        methods += ["hybrid", "gram"]
    dtypes = [ns_dtype] if ns_dtype != "auto" else ON_DEVICE.get(device.type, ["float32"])
    legal: list[Choice] = []
    refusal: ValueError | None = None
    for choice in ((way, NS_DTYPES[name]) for name in dtypes for way in methods):
        try:
            check_method(choice[0], coefficients, choice[1])
            legal.append(choice)
        except ValueError as error:
            refusal = error
    if refusal and not legal:
        raise refusal
    return legal if device.type == "cpu" else [choice for choice in legal if choice[1] == legal[0][1]]


def flops(method: str, m: int, n: int, steps: int) -> float:
    """Of products, for one m x n matrix, m <= n, by direct, hybrid or gram."""
    direct = steps * (4.0 * m * m * n + 2.0 * m**3)
    if method == "hybrid":
        return direct - 4.0 * m * m * n + 6.0 * m**3
    if method == "gram":
        lengths = [len(section) for section in sections([(0.0, 0.0, 0.0)] * steps)]
        return sum(4.0 * m * m * n + (8.0 * k - 6.0) * m**3 for k in lengths)
    return direct


def fastest(m: int, n: int, count: int, coefficients, steps: int, options: list[Choice]) -> Choice:
    """Time the options on an m x n stand-in on the CPU, interleaved so that a noisy neighbour hits all of them."""
    if len(options) == 1:
        return options[0]
    n = math.ceil(min(n / m, 4) * min(m, LARGEST))
    m = min(m, LARGEST)
    batch = max(1, min(count, STAND_IN_ENTRIES // (m * n)))
    key = (m, n, batch, str(coefficients), steps, tuple(options), torch.get_num_threads())
    if key not in _measured:
        U = torch.randn(batch, m, n, generator=torch.Generator().manual_seed(0))
        best = dict.fromkeys(options, math.inf)
        for attempt in range(4):
            for option in options:
                began = time.perf_counter()
                orthogonalise(U.clone(), coefficients, steps, *option)
                if attempt:  # the first one warms up
                    best[option] = min(best[option], time.perf_counter() - began)
        slow = {way: best.get((way, torch.float32), 0.0) for way, _ in options}
        worth = [slow[way] / t for (way, dtype), t in best.items() if dtype == torch.bfloat16 and slow[way]]
        if worth and max(worth) < BF16_GAIN:  # no native bf16 products: not worth the rounding in any form
            options = [option for option in options if option[1] != torch.bfloat16]
        _measured[key] = min(options, key=best.__getitem__)
    return _measured[key]


def dtype_name(value, source: str) -> str:
    name = str(value).removeprefix("torch.")
    if name not in NS_DTYPES:
        raise ValueError(f"{source} = {value!r} is no dtype that can be used here; use one of {', '.join(NS_DTYPES)}")
    return name
