"""What is refused before anything is allocated, and what setup makes of a config."""

import pytest

from muonlm.config.recipes import load_recipe
from muonlm.config.schema import Config
from muonlm.errors import UserError
from muonlm.training.resolve import check


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ({"model.kind": "modular"}, ["model.kind = lm, and this one is modular", "--train.objective classify"]),
        ({"model.kind": "modular", "train.objective": "classify"}, ["pairs of numbers are needed", "`source` modular"]),
        ({"train.objective": "classify"}, ["model.kind = modular, and this one is lm", "--model.kind modular"]),
        ({"train.objective": "recall"}, ["keys and values are needed", "`source` recall"]),
        ({"data.source": "recall"}, ["gives keys and values, and text"]),
        ({"data.source": "modular"}, ["gives pairs of numbers, and text"]),
        ({"data.source": "modular", "train.objective": "sft"}, ["conversations are needed", "`source` FILE.jsonl"]),
        ({"train.global_batch": "100"}, ["not a multiple of model.block_size"]),
        ({"model.pattern": "M", "model.scan": "triton", "train.device": "cpu"}, ["needs a CUDA device", "use auto"]),
        ({"train.repeatable": True, "train.compile": True}, ["leave one out", "--train.compile false"]),
        ({"sched.warmup": "300", "train.steps": "200"}, ["300 does not fit into 200 steps"]),
    ],
)
def test_parts_of_a_config_that_do_not_go_together_are_refused(flags, fragments):
    with pytest.raises(UserError) as error:
        check(load_recipe("quickstart", flags))
    for fragment in fragments:
        assert fragment in str(error.value)


def test_a_default_config_goes_together():
    check(Config())
