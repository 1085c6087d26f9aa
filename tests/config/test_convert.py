"""Values of a config: the type, then the constraint, from whatever side they come."""

import typing
from typing import Annotated, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muonlm.config.convert import Device, Ge, Gt, In, Joined, Matches, Table, convert
from muonlm.config.recipes import load_recipe
from muonlm.config.schema import Config, ModelConfig, OptimConfig, TrainConfig, kinds
from muonlm.errors import UserError


@pytest.mark.parametrize(
    ("given", "kind", "made"),
    [
        ("1e8", int, 100_000_000),
        ("20_000", int, 20_000),
        (3.0, int, 3),
        ("9007199254740993", int, 9007199254740993),  # more digits than a float holds
        ("1e-3", float, 1e-3),
        (2, float, 2.0),
        ("on", bool, True),
        ("No", bool, False),
        (True, bool, True),
        ("a, b,", list[str], ["a", "b"]),
        ([1, 2], list[int], [1, 2]),
        ("0.9,0.95", tuple[float, float], (0.9, 0.95)),
        (["mamba", "attention"], Annotated[str, Joined(",")], "mamba,attention"),
        ("b", Literal["a", "b"], "b"),
        ("cuda:1", Annotated[str, Device(("cpu", "cuda"))], "cuda:1"),
        ("lm", Annotated[str, Table("muonlm.model", "KINDS")], "lm"),
    ],
)
def test_a_value_becomes_what_its_field_wants(given, kind, made):
    found = convert("key", given, kind)
    assert found == made and type(found) is type(made)


@pytest.mark.parametrize(
    ("given", "kind", "told"),
    [
        ("ten", int, "should be a whole number."),
        ("1.5", int, "should be a whole number."),
        (True, int, "should be a whole number."),
        (None, float, "should be a number."),
        ("nan", float, "should be a number."),
        ("inf", float, "should be a number."),
        ("maybe", bool, "should be true or false."),
        (3, str, "should be text."),
        (3, list[int], "should be a list."),
        ("1", tuple[int, int], "should be 2 numbers separated by a comma."),
        (-1, Annotated[int, Ge(0)], "must be at least 0."),
        (0, Annotated[float, Gt(0, usual="0.1")], "must be above 0; 0.1 is usual."),
        (1, Annotated[float, In("[0, 1)")], "must be in [0, 1)."),
        ("big", Annotated[str, Matches("[a-c]", "a grade", "a, b or c")], "is not a grade; write a, b or c."),
        ("bluue", Literal["blue", "red"], "is not known. Did you mean 'blue'?"),
        ("xyz", Literal["blue", "red"], "is not known. Choose one of: blue, red."),
        ("cdua", Annotated[str, Device(("cpu", "cuda"))], "is not known. Did you mean 'cuda'?"),
        ("ml", Annotated[str, Table("muonlm.model", "KINDS")], "is not known. Choose one of: lm, modular."),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(given, kind, told):
    with pytest.raises(UserError) as error:
        convert("some.key", given, kind, "recipe mine")
    assert str(error.value).startswith("some.key = ") and str(error.value).endswith(f" (recipe mine) {told}")


@given(st.floats(-2, 3), st.sampled_from(["[0, 1]", "[0, 1)", "(0, 1]", "(0, 1)"]))
def test_intervals_hold_what_mathematics_says(x, interval):
    inside = 0 < x < 1 or (x == 0 and interval[0] == "[") or (x == 1 and interval[-1] == "]")
    assert (In(interval).problem(x) == "") == inside


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (lambda v: ModelConfig(dropout=v), "model.dropout", 1.0),
        (lambda v: ModelConfig(mlp=v), "model.mlp", "swiglue"),
        (lambda v: OptimConfig(lr=v), "optim.lr", -0.1),
        (lambda v: TrainConfig(steps=v), "train.steps", "ten"),
        (lambda v: TrainConfig(budget=v), "train.budget", "big"),
        (lambda v: Config(track=v), "track", "wandbb"),
    ],
)
def test_python_toml_and_flags_are_answered_alike(make, key, value, tmp_path):
    def told(act, *args) -> str:
        with pytest.raises(UserError) as error:
            act(*args)
        return str(error.value)

    mine = tmp_path / "mine.toml"
    mine.write_text(f"{key} = {value!r}")
    python = told(make, value)
    assert python.startswith(f"{key} = {value!r} ")
    assert told(load_recipe, "quickstart", {key: str(value)}).replace(" (command line)", "") == python
    assert told(load_recipe, str(mine)).replace(f" (recipe {mine})", "") == python


def test_every_constraint_is_one_that_is_checked_and_every_default_meets_its_own():
    for key, kind in kinds().items():
        default = Config()
        for part in key.split("."):
            default = getattr(default, part)
        assert convert(key, default, kind) == default
        for constraint in getattr(kind, "__metadata__", ()):
            assert callable(constraint.problem), key
    assert all(typing.get_origin(kind) is not typing.Union for kind in kinds().values())
