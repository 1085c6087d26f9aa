"""To and from transformers' layouts: the weights of a Mamba or Mamba-2 model are renamed; nothing is recomputed.

    from_transformers(theirs) -> LM                   MambaForCausalLM, Mamba2ForCausalLM
    to_transformers(ours) -> theirs                   LM of one pattern letter, M or D, without MLP

Which mixers have a twin there, and what it needs, their classes say (model/mixers/base.py: Twin).

    theirs                             ours
    backbone.embeddings.weight         embed.weight
    backbone.layers.I.norm.weight      blocks.I.norm1.weight
    backbone.layers.I.mixer.…          blocks.I.mixer.…              the same names and shapes inside
    backbone.norm_f.weight             norm.weight
    lm_head.weight                     head.weight                   absent from ours where the head is tied

Dtypes   the result is in fp32 whatever was given: bf16 and fp16 numbers are exact in it, so that both ways and back
         are bitwise
Differs  theirs keep no length limit, so block_size comes from the caller; ours know no special tokens, so theirs get
         none
Raises   UserError for a model that the other side cannot express, naming the setting; or if transformers is not
         installed
"""

import re

import torch

from muonlm.config.schema import ModelConfig
from muonlm.errors import UserError
from muonlm.model import build_model
from muonlm.model.lm import LM
from muonlm.model.mixers import MIXERS
from muonlm.model.mixers.base import Twin

RENAMED = (  # (theirs, ours); the rest of a name stays
    ("backbone.embeddings.", "embed."),
    (r"backbone.layers.(\d+).norm.", r"blocks.(\d+).norm1."),
    (r"backbone.layers.(\d+).mixer.", r"blocks.(\d+).mixer."),
    ("backbone.norm_f.", "norm."),
    ("lm_head.", "head."),
)
# What theirs may say where we have no setting; what ours must say where they have none. A twin adds to both.
DEMANDS = {"use_conv_bias": [True], "hidden_act": ["silu", "swish"]}
NEEDS = {
    "kind": "lm",
    "mlp": "none",
    "norm": "rmsnorm",
    "positions": "rope",  # unused without attention
    "embed_conv": 0,
    "loops": 1,
    "logit_softcap": 0.0,
    "res_scale": "none",
}


def from_transformers(theirs, *, block_size: int = 2048) -> LM:
    """Our LM with the weights of transformers' MambaForCausalLM or Mamba2ForCausalLM, on the CPU in fp32."""
    model = build_model(read_config(theirs.config, block_size))
    tied = {"lm_head.weight"} if model.cfg.tie else set()
    weights = {_rename(name, 0): w for name, w in theirs.state_dict().items() if name not in tied}
    model.load_state_dict({name: w.detach().to("cpu", torch.float32) for name, w in weights.items()})
    return model


def to_transformers(ours: LM):
    """transformers' MambaForCausalLM or Mamba2ForCausalLM of our LM, on the CPU in fp32, in evaluation mode."""
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
    """Our ModelConfig (with vocab_size) of a configuration of transformers."""
    name = theirs.model_type
    known = {twin.model_type: (letter, twin) for letter, twin in twins().items()}
    if name not in known:
        models = " or ".join(twin.model for _, twin in known.values())
        raise UserError(f"model_type = {name!r} has no counterpart here; a {models} can be loaded.")
    letter, twin = known[name]
    for key, valid in (DEMANDS | twin.demands).items():
        found = getattr(theirs, key)
        if (tuple(found) if isinstance(found, list) else found) not in valid:
            raise UserError(f"{key} = {found!r} of this {name} cannot be expressed here, only {key} = {valid[0]!r}.")
    if theirs.expand != int(theirs.expand):
        raise UserError(f"expand = {theirs.expand} of this {name} must be a whole number.")
    return ModelConfig(
        pattern=letter,
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
        **twin.ours(theirs),
    )


def write_config(cfg: ModelConfig):
    """(transformers' config, its CausalLM class) of our ModelConfig."""
    letters, known = set(cfg.layers), twins()
    if len(letters) > 1 or not letters <= known.keys():
        alone = " or ".join(known)
        raise UserError(
            f"`pattern` = {cfg.pattern!r} is no model of transformers' Mamba family; only {alone} alone is."
        )
    twin = known[letters.pop()]
    for key, needed in (NEEDS | twin.needs).items():
        if getattr(cfg, key) != needed:
            raise UserError(
                f"`{key}` = {getattr(cfg, key)!r} cannot be written as transformers' Mamba; "
                f"it needs `{key}` = {needed!r}."
            )
    try:
        import transformers
    except ImportError as error:
        raise UserError('transformers is not installed; pip install "muonlm[hf]"') from error
    config = getattr(transformers, twin.config)(
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
        **twin.theirs(cfg),
    )
    return config, getattr(transformers, twin.model)


def twins() -> dict[str, Twin]:
    """Letter -> the model of transformers with such layers, where there is one."""
    found = {letter: entry.load().twin for letter, entry in MIXERS.items() if not entry.muon}
    return {letter: twin for letter, twin in found.items() if twin}
