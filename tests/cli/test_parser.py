"""Flags that are made of the fields of a dataclass."""

from dataclasses import dataclass

import pytest

from muonlm.cli.parser import Parser, field_docs, values
from muonlm.errors import UserError
from muonlm.sampling import OF_CHAT, Sampling


@dataclass(frozen=True, kw_only=True)
class Sauce:
    hot_peppers: int = 2
    """how many; 10 % of guests ask for none"""
    name: str = ""
    """of the sauce"""


def test_a_field_is_a_flag_with_the_string_below_it_as_its_help(capsys):
    parser = Parser("cook", "")
    parser.add_fields(Sauce(hot_peppers=3), prefix="sauce: ")
    assert values(Sauce(), parser.parse([])) == Sauce(hot_peppers=3)
    assert values(Sauce(), parser.parse(["--hot-peppers", "5", "--name", "red"])) == Sauce(hot_peppers=5, name="red")
    assert field_docs(Sauce) == {"hot_peppers": "how many; 10 % of guests ask for none", "name": "of the sauce"}
    assert "sauce: how many; 10 % of guests ask for none (default 3)" in " ".join(parser.format_help().split())
    with pytest.raises(UserError, match="--hot-peppers"):
        parser.parse(["--hot-peppers", "some"])


@pytest.mark.parametrize("verb, defaults", [("generate", Sampling()), ("chat", OF_CHAT)])
def test_generate_and_chat_draw_as_their_defaults_say(verb, defaults):
    from importlib import import_module

    parser = import_module(f"muonlm.cli.{verb}").parser()
    assert values(defaults, parser.parse(["run"])) == defaults
    assert values(defaults, parser.parse(["run", "--top-k", "7"])).top_k == 7
