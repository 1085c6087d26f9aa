"""muonlm: train small language models, from raw text to a model that chats.

The names below are loaded on first use: `import muonlm` costs milliseconds, `muonlm --help` does not wait for torch.
"""

from importlib import import_module

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
    if name not in _HOME:
        raise AttributeError(f"module 'muonlm' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
