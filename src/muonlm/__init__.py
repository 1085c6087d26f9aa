"""muonlm: train small language models, from raw text to a model that chats.

The names below are loaded on first use, so that `import muonlm` costs milliseconds and `muonlm --help` does not wait for torch.
"""

import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_HOME = {  # public name -> module that defines it
    "Config": "config",
    "UserError": "config",
    "load_recipe": "stages",
    "build_model": "model",
    "Muon": "optim",
    "train": "train",
    "load": "checkpoint",
    "generate": "generate",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'muonlm' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    def __setattr__(self, name, value):
        # Importing muonlm/train.py would bind the *module* to `muonlm.train`; the public name is the function.
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
