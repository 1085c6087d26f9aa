"""Where triton_kernels.py is used: on a GPU, outside the graphs of torch.compile, which fuses the plain forms.

    fast = kernels_for(x);  if fast: y = fast.swiglu(x)          the module, or None

Triton takes half a second to import: nobody waits for it on a CPU.
"""

import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(x: Tensor) -> ModuleType | None:
    """The kernels, if they can run on x and should."""
    return _kernels() if x.is_cuda and x.dtype in DTYPES and not torch.compiler.is_compiling() else None


@cache
def _kernels() -> ModuleType | None:
    """Triton may not be there, or not the C compiler that it needs, or no driver for this card: tried once."""
    try:
        from . import triton_kernels

        logits, targets = torch.zeros(1, 128, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")
        triton_kernels.cross_entropy(logits, targets)
        return triton_kernels
    except Exception as error:  # whatever it is, PyTorch can do without
        warnings.warn(f"Triton cannot run here ({error}); training is slower without its kernels", stacklevel=2)
        return None
