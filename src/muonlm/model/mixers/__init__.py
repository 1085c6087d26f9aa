"""THE table of sequence mixers: which letter of a pattern stands for which class with which options.

A new mixer is a subclass of `Mixer` (base.py) in a file of its own and a line below; everybody else asks this table.
It is read without torch: an entry names its class as text, loaded when it is first built.
"""

from dataclasses import dataclass, field

from muonlm.config.spelling import nearest
from muonlm.errors import UserError
from muonlm.lazy import load


@dataclass(frozen=True)
class Entry:
    letter: str
    name: str
    where: str
    """"module:Class"; a module that begins with a dot is in this package."""
    options: dict = field(default_factory=dict)
    """Keyword arguments of the class beside the ModelConfig."""

    @property
    def muon(self) -> bool:
        """Whether this is the Muon form of a mixer: velocity and normalised writes."""
        return self.options.get("muon", False)

    def load(self) -> type:
        """The class, a subclass of Mixer."""
        return load(self.where, __name__)

    def build(self, cfg):
        """The mixer of a ModelConfig. Raises UserError where the widths do not fit."""
        return self.load()(cfg, **self.options)


# Lower case is the Muon form of the same mixer.
MIXERS = {
    entry.letter: entry
    for entry in (
        Entry("A", "attention", ".attention:Attention"),
        Entry("W", "window_attention", ".attention:Attention", {"windowed": True}),
        Entry("M", "mamba", ".mamba:Mamba"),
        Entry("D", "mamba2", ".mamba2:Mamba2"),
        Entry("L", "longhorn", ".longhorn:Longhorn"),
        Entry("G", "gated_deltanet", ".gated_deltanet:GatedDeltaNet"),
        Entry("m", "muon_mamba", ".mamba:Mamba", {"muon": True}),
        Entry("d", "muon_mamba2", ".mamba2:Mamba2", {"muon": True}),
        Entry("l", "muon_longhorn", ".longhorn:Longhorn", {"muon": True}),
        Entry("g", "muon_gated_deltanet", ".gated_deltanet:GatedDeltaNet", {"muon": True}),
        Entry("V", "gdn_velocity_ns", ".gated_deltanet:GatedDeltaNet", {"muon": True, "norm_velocity": True}),
        Entry("S", "multiscale_attention", ".multiscale:MultiScaleAttention"),
        Entry("R", "stacked_recursion", ".recursion:StackedRecursion"),
    )
}


def known() -> str:
    """The table in a line: letters and names, and the letters of the Muon forms."""
    plain = ", ".join(f"{entry.letter} {entry.name}" for entry in MIXERS.values() if not entry.muon)
    muon = ", ".join(entry.letter for entry in MIXERS.values() if entry.muon)
    return f"Mixers: {plain}; Muon forms: {muon}."


def letters(pattern: str) -> str:
    """A pattern as letters: "MMA" as it is, or names (and letters) separated by commas.

    Raises UserError for what is no mixer.
    """
    by_name = {entry.name: entry.letter for entry in MIXERS.values()}
    if "," in pattern or pattern.strip().lower() in by_name:
        words = [word.strip() for word in pattern.split(",")]
        for word in words:
            if word not in MIXERS and word.lower() not in by_name:
                raise UserError(f"`pattern`: {word!r} is no mixer.{nearest(word, by_name)} {known()}")
        return "".join(word if word in MIXERS else by_name[word.lower()] for word in words)
    found = pattern.replace(" ", "")
    unknown = sorted(set(found) - MIXERS.keys())
    if not found or unknown:
        hint = nearest(found, by_name)
        if not hint and unknown and all(letter.swapcase() in MIXERS for letter in unknown):
            hint = f" Write {', '.join(letter.swapcase() for letter in unknown)} for {', '.join(unknown)}."
        raise UserError(f"`pattern` = {pattern!r} has unknown letters {''.join(unknown)!r}.{hint} {known()}")
    return found
