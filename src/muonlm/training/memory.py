"""Out of memory: a run says what it tried, how much the device has, and which size to try instead.

    with told(device, run, step(cfg)): …        RunFailed in place of what torch and Python raise

Whether a size fits is known only by trying it: nothing is refused beforehand.
"""

import contextlib
import os
import traceback
from pathlib import Path
from typing import NamedTuple

import torch

from muonlm.config.runs import checkpoints
from muonlm.config.schema import Config
from muonlm.errors import RunFailed, out_of_memory

GIB = 2**30


class Work(NamedTuple):
    what: str
    flag: str
    """Makes it smaller, also in a run that has begun; empty if its model would be another."""
    more: str
    """What that changes, or what else there is to type."""


def step(cfg: Config) -> Work:
    """A micro-batch of a resolved config."""
    rows, block = cfg.train.micro_batch, cfg.model.block_size
    what = f"forward and backward of {rows} {'row' if rows == 1 else 'rows'} × {block:,} tokens"
    if rows > 1:
        return Work(what, f"--train.micro_batch {rows // 2}", "(half the rows at a time, the same losses)")
    if not cfg.train.recompute:
        return Work(what, "--train.recompute true", f"(a third more time), {_smaller(cfg)}")
    return Work(what, "", _smaller(cfg))


def evaluation(cfg: Config, rows: int) -> Work:
    """A batch of `rows` held-out rows."""
    what = f"the held-out loss of {rows} {'row' if rows == 1 else 'rows'} × {cfg.model.block_size:,} tokens"
    if rows > 1:
        return Work(what, f"--eval.rows {rows // 2}", "(half the rows at a time, the same loss)")
    return Work(what, "", _smaller(cfg))


def weights(cfg: Config) -> Work:
    """The model and what its optimizer keeps, which the size of a batch does not change."""
    return Work("the weights, and what the optimizer keeps of them,", "", _smaller(cfg))


def _smaller(cfg: Config) -> str:
    m = cfg.model
    width = max(m.n_head, m.d_model // 2 // m.n_head * m.n_head)
    model = f"--model.n_layer {m.n_layer // 2}" if m.n_layer > 1 else f"--model.d_model {width}"
    return f"a shorter block (--model.block_size {max(1, m.block_size // 2)}) or a smaller model ({model})"


@contextlib.contextmanager
def told(device: torch.device, run: Path | None, work: Work):
    """RunFailed says that `work` of a run (None: one without a directory yet) did not fit into the device's memory."""
    message = ""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        good = checkpoints(run) if run else []
        kept = f"The last checkpoint is {good[-1]}" if good else "No checkpoint was written yet"
        on = f"; go on with: muonlm train --resume {run} {work.flag}" if good and work.flag else ""
        message = (
            f"out of memory: {work.what} did not fit on {device}, {size(device)}. "
            f"Try {f'{work.flag} {work.more}'.strip()}. {kept}{on}."
        )
        traceback.clear_frames(error.__traceback__)  # the tensors of its frames: a process may go on
    if message:
        raise RunFailed(message)


def size(device: torch.device) -> str:
    """How much memory a device has, and what this process may have of it or held."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.max_memory_allocated(device)
        return f"which has {total / GIB:.1f} GiB (this run held {held / GIB:.2f}, {free / GIB:.1f} are free)"
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return "which is full"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    allowed = f" (this process may have {limit / GIB:.1f})" if 0 <= limit < total else ""
    return f"which has {total / GIB:.1f} GiB{allowed}"
