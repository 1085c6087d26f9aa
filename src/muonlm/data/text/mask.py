"""What of a conversation is trained, for `muonlm train RECIPE --show-mask`: a batch's text, its targets marked."""

from ..packed import IGNORE, Batch
from .tokenizer import Tokenizer

MARKS, COLOUR = ("[[", "]]"), ("\x1b[1;32m", "\x1b[0m")


def first_example(batch: Batch, tokenizer: Tokenizer) -> list[dict]:
    """[{tokens, trained, pieces: [(text, trained), …]}] of a batch's first example; of a pair, chosen and rejected.

    Read off inputs and targets as the loss reads them, so a mistake anywhere before it would show.
    """
    shown = []
    for number in range(2 if batch.pairs else 1):
        here = batch.segments[0] == number
        inputs, targets = batch.inputs[0][here].tolist(), batch.targets[0][here].tolist()
        flags = [False, *(target != IGNORE for target in targets)]
        ids = [*inputs, targets[-1]]  # the last token is trained: what follows it is never stored
        starts = [i for i, flag in enumerate(flags) if i == 0 or flag != flags[i - 1]]
        pieces = [(tokenizer.decode(ids[a:b]), flags[a]) for a, b in zip(starts, [*starts[1:], len(ids)])]
        shown.append({"tokens": len(ids), "trained": sum(flags), "pieces": pieces})
    return shown


def marked(pieces: list[tuple[str, bool]], colour: bool) -> str:
    """The pieces as one text, the trained ones in colour or between [[ and ]]."""
    begin, end = COLOUR if colour else MARKS
    return "".join(f"{begin}{text}{end}" if trained else text for text, trained in pieces)
