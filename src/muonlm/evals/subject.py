"""What a task measures: one checkpoint of a run."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from muonlm.config.runs import locate, read_config
from muonlm.config.schema import Config
from muonlm.errors import UserError


@dataclass(frozen=True)
class Subject:
    folder: Path
    """The run's directory."""
    checkpoint: Path
    """The checkpoint's directory."""
    device: str
    """auto, cpu, cuda or mps."""

    @classmethod
    def find(cls, run: str | Path, which: str = "best", device: str = "auto") -> "Subject":
        return cls(*locate(run, which), device)

    @property
    def config(self) -> Config:
        """The run's config, anew each time: it may be changed."""
        return read_config(self.folder)

    @cached_property
    def meta(self) -> dict:
        from muonlm.training import checkpoint

        return checkpoint.read_meta(self.checkpoint)

    def names(self) -> dict:
        """What every result says of where it comes from."""
        return {"run": str(self.folder), "checkpoint": self.checkpoint.name, "step": self.meta["step"]}

    def load(self):
        """(model in eval mode on the device, tokenizer) of a run that reads text."""
        from muonlm.training import checkpoint
        from muonlm.training.parallel import pick_device

        self.need_tokenizer()
        return checkpoint.load(self.checkpoint, pick_device(self.device))

    def need_tokenizer(self) -> Path:
        """Where the run keeps its tokenizer."""
        if (path := self.folder / "tokenizer.json").exists():
            return path
        raise UserError(f"run {self.folder} has no tokenizer, so it reads no text; evaluate a run trained on text")

    def room(self, model, prompt: int, answer: int, shorter: str) -> int:
        """Tokens that a reply may have: twice the longest right one, `answer`, as far as the context goes.

        prompt    tokens of the longest prompt        shorter   what to type for shorter ones
        """
        if model.context is None:
            return 2 * answer
        if prompt + answer > model.context:
            raise UserError(
                f"the questions have up to {prompt} + {answer} tokens with their answers, and run {self.folder} sees "
                f"{model.context}; ask shorter ones ({shorter}), or train with --model.block_size {prompt + answer}"
            )
        return min(2 * answer, model.context - prompt)
