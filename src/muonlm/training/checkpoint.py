"""Checkpoints: directories that are whole or absent.

    RUN/checkpoints/step-00000120/  model.safetensors   fp32 masters, by parameter name
                                    state.safetensors   optimizer state, `<parameter>/<buffer>`
                                    meta.json           step, counters, content hash of every file, checksum of itself
    RUN/checkpoints/latest, best    files that hold the name of one

Save     everything is written aside, synced, then renamed: a kill at any moment leaves the old ones whole.
Load     every file is hashed before it is read. `latest_valid` names a damaged directory and takes the one before it.
         Nothing is unpickled: safetensors and JSON only. (The metadata of torch.distributed.checkpoint is a pickle.)
Raises   UserError: no checkpoint, damaged checkpoint (which file, and what else could be used), full disk.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from muonlm.config.runs import checkpoints, locate, read_config
from muonlm.errors import UserError
from muonlm.storage import digest, folder_aside, not_written, write, write_atomically

FORMAT_VERSION = 1


def save(
    run: Path, step: int, model: Mapping[str, Tensor], state: Mapping[str, Tensor], meta: dict, *, best: bool, keep: int
) -> Path:
    """Write one checkpoint, point `latest` (and `best`) at it, drop all but the newest `keep` and the best."""
    root = Path(run) / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    target = root / f"step-{step:08d}"
    try:
        with folder_aside(target) as work:  # a run resumed from before this step writes the same step again
            for name, tensors in (("model.safetensors", model), ("state.safetensors", state)):
                save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, work / name)
            files = {path.name: _digest(path) for path in sorted(work.iterdir())}
            body = {"format_version": FORMAT_VERSION, "step": step, **meta, "files": files}
            write(work / "meta.json", json.dumps(body | {"checksum": _checksum(body)}, indent=1))
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors in its own
        remedy = f"Free some space, then go on with: muonlm train --resume {run}"
        raise not_written(target, error, remedy) from None
    for pointer in ["latest"] + ["best"] * best:
        write_atomically(root / pointer, target.name)
    protected = {(root / "best").read_text().strip() if (root / "best").exists() else ""}
    for old in checkpoints(run)[:-keep]:
        if old.name not in protected:
            shutil.rmtree(old, ignore_errors=True)
    for leftover in root.glob(".step-*"):  # of a process that was killed while it wrote
        shutil.rmtree(leftover, ignore_errors=True)
    return target


def read(path: Path, *, state: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """(model tensors, optimizer tensors, meta) of a checkpoint, verified; UserError names the damaged file."""
    path = Path(path)
    meta = read_meta(path)
    for name, recorded in meta["files"].items():
        if name == "state.safetensors" and not state:
            continue
        try:
            found = _digest(path / name)
        except OSError:
            raise UserError(f"checkpoint {path} is damaged: {name} is missing.") from None
        if found != recorded:
            raise UserError(f"checkpoint {path} is damaged: {name} does not match its recorded hash.")
    return load_file(path / "model.safetensors"), load_file(path / "state.safetensors") if state else {}, meta


def read_meta(path: Path) -> dict:
    try:
        meta = json.loads((path / "meta.json").read_text())
        checksum = meta.pop("checksum")
        if checksum != _checksum(meta):
            raise ValueError
    except OSError:
        how = "is damaged: meta.json is missing" if Path(path).is_dir() else "is gone"
        raise UserError(f"checkpoint {path} {how}.") from None
    except (ValueError, KeyError, AttributeError, TypeError):  # no JSON, no object, no checksum, or another one
        raise UserError(f"checkpoint {path} is damaged: meta.json does not match its checksum.") from None
    if meta["format_version"] != FORMAT_VERSION:
        raise UserError(f"checkpoint {path} has format {meta['format_version']}; this muonlm reads {FORMAT_VERSION}.")
    return meta


def latest_valid(run: Path, warn=print):
    """The newest checkpoint of `run` that reads whole, as `read` returns it, or None. `warn` hears of damaged ones."""
    for path in reversed(checkpoints(run)):
        try:
            return read(path)
        except UserError as error:
            warn(f"{error} Skipped; looking for an older one.")
    return None


def load(source: str | Path, device="cpu", which: str = "best"):
    """(model in eval mode, tokenizer or None) of a run or checkpoint directory: all that generation needs."""
    from muonlm.data.text.tokenizer import Tokenizer
    from muonlm.model import build_model

    run, path = locate(source, which)
    tensors, _, _ = read(path, state=False)
    cfg = dataclasses.replace(read_config(run).model, scan="auto")  # a run of another machine may name what is not here
    model = build_model(cfg, "cpu")
    load_weights(model, tensors, str(path))
    tokenizer = Tokenizer.load(run) if (run / "tokenizer.json").exists() else None
    return model.to(device).eval(), tokenizer


def load_weights(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy `tensors` into the model; UserError names what is missing, extra, or of another shape."""
    own = dict(model.named_parameters())
    for name in sorted(own.keys() ^ tensors.keys()):
        side = "lacks" if name in own else "has an unexpected"
        raise UserError(f"the weights in {where} do not fit this model: the file {side} {name!r}.")
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise UserError(
                f"the weights in {where} do not fit this model: {name} is {tuple(tensors[name].shape)} in the file, "
                f"{tuple(parameter.shape)} in the model."
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def _digest(path: Path) -> str:
    return digest(path, lambda: hashlib.blake2b(digest_size=16))


def _checksum(body: dict) -> str:
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()
