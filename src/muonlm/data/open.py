"""THE table of data: what `data.source` may be, the kind of data it gives, and what opens it.

Nothing here waits for torch. A new source of training data is one file with the two functions of `Source`, and a line.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from muonlm.config.schema import Config
from muonlm.errors import UserError
from muonlm.lazy import load

if TYPE_CHECKING:
    from .batch import Splits


@dataclass(frozen=True)
class Source:
    """`name` is that of data.source; "" stands for any other: a file, a folder, a data set of the hub, …

    The functions are text, "module:function": opens, (cfg, rows, dist) -> Splits; vocabulary, cfg -> (tokens, where the
    number comes from), before any data is read.
    """

    gives: str  # the kind of data, which an objective needs
    opens: str
    vocabulary: str = "muonlm.data.packed:vocabulary"
    name: str = ""


MODULAR, RECALL = "muonlm.data.synthetic.modular", "muonlm.data.synthetic.recall"

SOURCES = [
    Source("text", "muonlm.data.packed:open_text"),
    Source("conversations", "muonlm.data.examples:open_conversations"),
    Source("preferences", "muonlm.data.examples:open_preferences"),
    Source("pairs of numbers", f"{MODULAR}:open_modular", f"{MODULAR}:vocabulary", name="modular"),
    Source("keys and values", f"{RECALL}:open_recall", f"{RECALL}:vocabulary", name="recall"),
]


def source_of(name: str, wanted: str = "") -> Source:
    """The entry of a `data.source` that gives the `wanted` kind of data ("": the first); UserError if none does."""
    entries = [s for s in SOURCES if s.name == name] or [s for s in SOURCES if not s.name]
    for entry in entries:
        if wanted in ("", entry.gives):
            return entry
    others = " or ".join(s.name for s in SOURCES if s.gives == wanted and s.name)
    raise UserError(
        f"`source` {name or 'of this recipe'} gives {' or '.join(e.gives for e in entries)}, and {wanted} are needed; "
        + (f"name `source` {others}" if others else "name a file: `source` FILE.jsonl (docs/data.md shows the forms)")
    )


def open_splits(cfg: Config, wanted: str, rows: int, dist) -> "Splits":
    """The splits of a config whose objective needs the `wanted` kind of data. `rows`: of the global step.

    Files are prepared once, into the cache, by rank 0; the others wait for it.
    """
    return load(source_of(cfg.data.source, wanted).opens)(cfg, rows, dist)


def vocabulary(cfg: Config) -> tuple[int, str]:
    """(tokens, where the number comes from), before any data is read."""
    return load(source_of(cfg.data.source).vocabulary)(cfg)
