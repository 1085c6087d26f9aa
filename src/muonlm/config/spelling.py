"""The valid word that a user meant: spelled almost so, or called by the name that other trainers give it."""

import difflib
from collections.abc import Iterable

ELSEWHERE = {  # what other trainers call it -> the last part of our key, or all of it where several end so
    "learning_rate": "lr",
    "weight_decay": "wd",
    "batch_size": "micro_batch",
    "gradient_accumulation_steps": "accum",
    "max_iters": "steps",
    "max_steps": "train.steps",
    "num_epochs": "epochs",
    "n_embd": "d_model",
    "hidden_size": "d_model",
    "num_layers": "n_layer",
    "dataset": "source",
    "eval_interval": "eval.every",
    "save_interval": "save_every",
    "logging_steps": "log.every",
    "warmup_iters": "warmup",
    "warmup_steps": "warmup",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
    "max_grad_norm": "grad_clip",
    "context_length": "block_size",
    "seq_len": "block_size",
    "local_window": "window",
    "mixer": "pattern",
    "gated_delta_per_layer": "pattern",
    "muon_longhorn_per_layer": "pattern",
    "longhorn_per_layer": "pattern",
    "use_newton_schulz": "write_norm",
    "intermediate_size": "d_ff",
    "state_size": "d_state",
    "conv_kernel": "d_conv",
    "d_inner": "expand",
    "headdim": "ssm_head",
    "head_dim": "ssm_head",
    "ngroups": "ssm_groups",
    "n_groups": "ssm_groups",
    "time_step_rank": "dt_rank",
    "ns_mode": "scan",
    "use_fast_path": "scan",
    "mamba_init": "tie",
    "chunk_size": "scan_chunk",
    "recursion": "recursion_depth",
}


def nearest(word: str, valid: Iterable[str]) -> str:
    """' Did you mean …?' with the closest valid word, or an empty text.

    Of a dotted key the last part decides first: almost the same in the section that was typed, else anywhere.
    """
    valid = list(valid)
    section = word.replace("-", "_").lstrip("_").rpartition(".")[0] + "."
    own = [v for v in valid if v.lstrip("-").startswith(section)] if section != "." else []
    return _nearest(word, own, cutoff=0.75) or _nearest(word, valid)


def _nearest(word: str, valid: list[str], cutoff: float = 0.6) -> str:
    leaf, leaves = _leaf(word).replace("-", "_"), {_leaf(v) for v in valid}
    ours = ELSEWHERE.get(leaf, leaf) if leaf not in leaves else leaf
    if _leaf(ours) in leaves:
        word, leaf = ours if "." in ours else word.replace(_leaf(word), ours), _leaf(ours)
    near = [leaf] if leaf in leaves else difflib.get_close_matches(leaf, leaves, n=3, cutoff=cutoff)
    same = [v for v in valid if _leaf(v) in near]
    close = difflib.get_close_matches(word, same, n=1, cutoff=0.35)
    return f" Did you mean {close[0]!r}?" if close else ""


def _leaf(key: str) -> str:
    return key.lstrip("-").rpartition(".")[2]
