"""THE table of objectives: what is minimised, on which kind of data, by which kind of model, and what is told of it.

    loss(model, batch) -> (loss_sum, count, metrics)

`loss_sum` is the differentiable sum over what is trained (nats), `count` how many units that is (tokens, rows, pairs),
and `metrics` are detached sums over the same. The loop divides by the count of the whole global step: accumulation and
data parallelism equal one big batch. A new objective is one file with its loss, and one line. No torch is needed here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from muonlm.lazy import load

HERE = __name__


@dataclass(frozen=True)
class Objective:
    loss: str
    """The function above, as text "module:function". Of an objective with `begin`: what takes as long, for timings."""
    data: str
    """The kind of data that it needs, as data/open.py calls them."""
    unit: str = "token"
    """What the loss is a mean over."""
    model: str = "lm"
    """The model.kind that it trains."""
    metrics: Mapping[str, str] = field(default_factory=dict)
    """Of the metrics, those in the live line, and how: {"acc": "acc {:.1%}"}."""
    begin: str = ""
    """begin(cfg, model, data, run, started=, dist=, log=) -> the loss of a run, where a function alone will not do."""
    report: str = ""
    """report(means, count) -> what else an evaluation tells of a split."""
    converses: bool = False
    """Trains a model to answer turns: its runs are for chat, and of its rows only some tokens are trained."""
    more: str = ""
    """Flags for another run of the kind, and what they try."""

    def function(self) -> Callable:
        return load(self.loss)

    def start(self, cfg, model, data, run, *, started: bool, dist, log) -> Callable:
        """The loss of a run that begins, or was `started` before and goes on."""
        if not self.begin:
            return self.function()
        return load(self.begin)(cfg, model, data, run, started=started, dist=dist, log=log)

    def extras(self, means: dict[str, float], count: float) -> dict[str, float]:
        return load(self.report)(means, count) if self.report else {}


OBJECTIVES = {
    "next_token": Objective(f"{HERE}.next_token:next_token", "text"),
    "sft": Objective(f"{HERE}.next_token:next_token", "conversations", converses=True),
    "dpo": Objective(
        f"{HERE}.next_token:next_token",
        "preferences",
        unit="pair",
        metrics={"acc": "acc {:.1%}", "margin": "margin {:.3f}"},
        begin=f"{HERE}.dpo:begin",
        report=f"{HERE}.dpo:number_of_pairs",
        converses=True,
    ),
    "classify": Objective(
        f"{HERE}.answers:classify",
        "pairs of numbers",
        model="modular",
        metrics={"acc": "acc {:.1%}"},
        more="--data.op x+y --data.prime 97     another task",
    ),
    "recall": Objective(
        f"{HERE}.answers:recall",
        "keys and values",
        metrics={"acc": "acc {:.1%}"},
        more="--data recall --train.objective recall --data.pairs 16     more to remember",
    ),
}
