"""muonlm: train small language models, from raw text to a model that chats.

The names below are loaded on first use: `import muonlm` costs milliseconds, `muonlm --help` does not wait for torch.
"""

from .lazy import public

__version__ = "0.1.0"

_HOME = {  # public name -> module that defines it
    "Config": "config.schema",
    "UserError": "errors",
    "load_recipe": "config.recipes",
    "build_model": "model",
    "Muon": "optim",
    "train": "training.loop",
    "load": "training.checkpoint",
    "generate": "engine",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    return public(name, __name__, _HOME)
