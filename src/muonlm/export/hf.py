"""To and from transformers' layouts: a Mamba or Mamba-2 language model is renamed, number by number; nothing is recomputed.

    from_transformers(theirs) -> LM                   MambaForCausalLM, Mamba2ForCausalLM
    to_transformers(ours) -> theirs                   LM of one pattern letter, M or D, without MLP

    theirs                             ours
    backbone.embeddings.weight         embed.weight
    backbone.layers.I.norm.weight      blocks.I.norm1.weight
    backbone.layers.I.mixer.…          blocks.I.mixer.…              the same names and shapes inside
    backbone.norm_f.weight             norm.weight
    lm_head.weight                     head.weight                   absent from ours where the head is tied

Dtypes   the result is in fp32 whatever was given: bf16 and fp16 numbers are exact in it, so that both ways and back are bitwise
Differs  theirs keep no length limit, so block_size comes from the caller; ours know no special tokens, so theirs get none
Raises   UserError for a model that the other side cannot express, naming the setting; or if transformers is not installed
"""

import re

import torch

from muonlm.config.schema import ModelConfig
from muonlm.errors import UserError
from muonlm.model import build_model
from muonlm.model.lm import LM

RENAMED = (  # (theirs, ours); the rest of a name stays
    ("backbone.embeddings.", "embed."),
    (r"backbone.layers.(\d+).norm.", r"blocks.(\d+).norm1."),
    (r"backbone.layers.(\d+).mixer.", r"blocks.(\d+).mixer."),
    ("backbone.norm_f.", "norm."),
    ("lm_head.", "head."),
)
LETTERS = {"mamba": "M", "mamba2": "D"}  # transformers' model_type -> ours


def from_transformers(theirs, *, block_size: int = 2048) -> LM:
    """Our LM with the weights of transformers' MambaForCausalLM or Mamba2ForCausalLM, on the CPU in fp32."""
    model = build_model(read_config(theirs.config, block_size))
    tied = {"lm_head.weight"} if model.cfg.tie else set()
    weights = {_rename(name, 0): w for name, w in theirs.state_dict().items() if name not in tied}
    model.load_state_dict({name: w.detach().to("cpu", torch.float32) for name, w in weights.items()})
    return model


def to_transformers(ours: LM):
    """transformers' MambaForCausalLM or Mamba2ForCausalLM with the weights of our LM, on the CPU in fp32, in evaluation mode."""
    config, cls = write_config(ours.cfg)
    theirs = cls(config)
    weights = {_rename(name, 1): w.detach().to("cpu", torch.float32) for name, w in ours.state_dict().items()}
    if ours.cfg.tie:
        weights["lm_head.weight"] = weights["backbone.embeddings.weight"]
    theirs.load_state_dict(weights)
    return theirs.eval()


def _rename(name: str, side: int) -> str:
    for pair in RENAMED:
        target = re.sub(r"\(.*?\)", r"\\1", pair[1 - side])
        if match := re.match(pair[side], name):
            return match.expand(target) + name[match.end() :]
    raise AssertionError(f"no name for {name}")


def read_config(theirs, block_size: int) -> ModelConfig:
    """Our ModelConfig (with vocab_size) of a transformers MambaConfig or Mamba2Config."""
    if theirs.model_type not in LETTERS:
        raise UserError(
            f"model_type = {theirs.model_type!r} has no counterpart here; a MambaForCausalLM or Mamba2ForCausalLM can be loaded."
        )
    second = theirs.model_type == "mamba2"
    demands = [  # (setting, what we can express)
        ("use_conv_bias", [True]),
        ("hidden_act", ["silu", "swish"]),
        *([("time_step_limit", [(0.0, float("inf"))]), ("layer_norm_epsilon", [1e-5])] if second else []),
    ]
    for key, valid in demands:
        found = getattr(theirs, key)
        if (tuple(found) if isinstance(found, list) else found) not in valid:
            raise UserError(
                f"{key} = {found!r} of this {theirs.model_type} cannot be expressed here, only {key} = {valid[0]!r}."
            )
    if theirs.expand != int(theirs.expand):
        raise UserError(f"expand = {theirs.expand} of this {theirs.model_type} must be a whole number.")
    only = (
        {"ssm_head": theirs.head_dim, "ssm_groups": theirs.n_groups}
        if second
        else {"dt_rank": int(theirs.time_step_rank)}
    )
    return ModelConfig(
        pattern=LETTERS[theirs.model_type],
        n_layer=theirs.num_hidden_layers,
        d_model=theirs.hidden_size,
        n_head=1,
        vocab_size=theirs.vocab_size,
        block_size=block_size,
        tie=bool(theirs.tie_word_embeddings),
        bias=theirs.use_bias,
        mlp="none",
        norm_eps=theirs.layer_norm_epsilon,
        d_state=theirs.state_size,
        d_conv=theirs.conv_kernel,
        expand=int(theirs.expand),
        init="lm",
        **only,
    )


def write_config(cfg: ModelConfig):
    """(transformers' config, its CausalLM class) of our ModelConfig."""
    letters = set(cfg.layers)
    if len(letters) > 1 or not letters <= set(LETTERS.values()):
        raise UserError(
            f"model.pattern = {cfg.pattern!r} is no model of transformers' Mamba family; only M or D alone is."
        )
    demands = {
        "kind": "lm",
        "mlp": "none",
        "norm": "rmsnorm",
        "positions": "rope",  # unused without attention
        "embed_conv": 0,
        "loops": 1,
        "logit_softcap": 0.0,
        "res_scale": "none",
        **({"norm_eps": 1e-5} if letters == {"D"} else {}),  # theirs has one epsilon, our gated norm has 1e-5
    }
    for key, needed in demands.items():
        if getattr(cfg, key) != needed:
            raise UserError(
                f"model.{key} = {getattr(cfg, key)!r} cannot be written as transformers' Mamba; it needs model.{key} = {needed!r}."
            )
    try:
        from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM
    except ImportError as error:
        raise UserError('transformers is not installed; pip install "muonlm[hf]"') from error
    common = dict(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.d_model,
        num_hidden_layers=cfg.n_layer,
        layer_norm_epsilon=cfg.norm_eps,
        expand=cfg.expand,
        conv_kernel=cfg.d_conv,
        use_bias=cfg.bias,
        tie_word_embeddings=cfg.tie,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    if letters == {"M"}:
        return MambaConfig(state_size=cfg.d_state or 16, time_step_rank=cfg.step_rank, **common), MambaForCausalLM
    heads = {"head_dim": cfg.ssm_head, "num_heads": cfg.inner_width // cfg.ssm_head, "n_groups": cfg.ssm_groups}
    return Mamba2Config(state_size=cfg.d_state or 128, **heads, **common), Mamba2ForCausalLM
