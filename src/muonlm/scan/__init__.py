"""Recurrences over time. Knows tensors only.

diag_scan             gates of one number per state entry: Mamba-1, Longhorn and their Muon forms
scalar_scan           gates of one number per head: Mamba-2
delta_scan            the gated delta rule: Gated DeltaNet
delta_momentum_scan   the delta rule whose write does not see the state: its Muon form
velocity_scan         the delta rule with a normalised velocity: nonlinear

reference.py defines them, one token at a time; BACKENDS lists all that computes them; dispatch.py chooses from it.
The names below are loaded on first use: whoever reads the table does not wait for torch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from muonlm.lazy import public

if TYPE_CHECKING:
    from .dispatch import backends as backends
    from .dispatch import choose_backend as choose_backend
    from .dispatch import delta_momentum_scan as delta_momentum_scan
    from .dispatch import delta_scan as delta_scan
    from .dispatch import diag_scan as diag_scan
    from .dispatch import keep_out_of_graphs as keep_out_of_graphs
    from .dispatch import scalar_scan as scalar_scan
    from .dispatch import velocity_scan as velocity_scan
    from .writes import gain as gain
    from .writes import implicit_step as implicit_step
    from .writes import write_norm as write_norm


@dataclass(frozen=True)
class Backend:
    """One way to compute one scan.

    `module` exports a function with the scan's name and the arguments of reference.py's, and `chunk`, the number of
    tokens between two kept states (0: what suits it). It is differentiable and takes tensors of any float type.
    """

    scan: str
    name: str
    module: str  # imported when it is first asked about
    device: str = ""  # the type of device on which "auto" takes it; "": any
    fp64: bool = True  # whether it computes in fp64; all do in fp32
    max_states: int = 0  # the widest key; 0: any
    needs: str = ""  # what must be there; then `module` exports available(device) -> bool


_TRITON = "a CUDA device (or TRITON_INTERPRET=1) and the package triton"
_NUMBA = "a CPU with FMA and the package numba"

# THE table. "auto" takes the first row of a scan that can run.
BACKENDS = [
    Backend("diag_scan", "triton", ".diagonal_triton", "cuda", fp64=False, max_states=256, needs=_TRITON),
    Backend("diag_scan", "cpu", ".diagonal_cpu", "cpu", fp64=False, needs=_NUMBA),
    Backend("diag_scan", "chunked", ".diagonal_torch"),
    Backend("diag_scan", "reference", ".reference"),
    Backend("scalar_scan", "triton", ".scalar_triton", "cuda", fp64=False, needs=_TRITON),
    Backend("scalar_scan", "chunked", ".heads"),
    Backend("scalar_scan", "reference", ".reference"),
    Backend("delta_scan", "triton", ".delta_triton", "cuda", fp64=False, max_states=256, needs=_TRITON),
    Backend("delta_scan", "chunked", ".delta"),
    Backend("delta_scan", "reference", ".reference"),
    Backend("delta_momentum_scan", "chunked", ".delta"),
    Backend("delta_momentum_scan", "reference", ".reference"),
    Backend("velocity_scan", "chunked", ".heads"),
    Backend("velocity_scan", "reference", ".reference"),
]
CHOICES = ("auto", *dict.fromkeys(row.name for row in BACKENDS))  # what a user may ask for

_HOME = {  # public name -> file that defines it
    "choose_backend": "dispatch",
    "backends": "dispatch",
    "diag_scan": "dispatch",
    "scalar_scan": "dispatch",
    "delta_scan": "dispatch",
    "delta_momentum_scan": "dispatch",
    "velocity_scan": "dispatch",
    "keep_out_of_graphs": "dispatch",
    "gain": "writes",
    "implicit_step": "writes",
    "write_norm": "writes",
}


def __getattr__(name: str):
    return public(name, __name__, _HOME)
