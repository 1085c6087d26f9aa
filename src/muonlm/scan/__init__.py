"""Recurrences over time. Knows tensors only.

diag_scan                                     gates of one number per state entry: Mamba-1, Longhorn and their Muon forms
scalar_scan, delta_scan, delta_momentum_scan, velocity_scan      gates of one number per head, and the delta rule
reference                                     the definitions, token by token
"""

from .dispatch import choose_backend, diag_scan
from .writes import gain, implicit_step, write_norm

__all__ = ["choose_backend", "diag_scan", "gain", "implicit_step", "write_norm"]
