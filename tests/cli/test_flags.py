"""Errors of libraries, told in the flags of the verb that was typed."""

import pytest

from muonlm.cli.flags import in_flags
from muonlm.cli.main import main
from muonlm.cli.parser import Parser
from muonlm.config.schema import keys
from muonlm.errors import UserError


def parser_of(verb: str, takes_keys: bool = False) -> Parser:
    parser = Parser(verb, "", takes_keys=takes_keys)
    parser.add_argument("sources", nargs="*")
    parser.add_argument("--val")
    parser.add_argument("--num-tokens", "--tokens")
    parser.add_argument("--as", dest="layout")
    parser.add_argument("--raw-only", dest="layout", action="store_const", const="raw")
    return parser


def raised_in(module: str, text: str) -> UserError:
    """An error as a module of that name would raise it."""
    try:
        exec("raise UserError(text)", {"__name__": f"muonlm.{module}", "UserError": UserError, "text": text})
    except UserError as error:
        return error


@pytest.mark.parametrize(
    "text, told",
    [
        ("`val` tail:0.1 is too little", "--val tail:0.1 is too little"),
        ("use `num_tokens` 100 or `layout` raw", "use --num-tokens 100 or --as raw"),
        ("`num_tokens` = 1: at least 2 are needed", "--num-tokens 1: at least 2 are needed"),
        ("`window` = 3 and `sources` are no flags here", "window = 3 and sources are no flags here"),
        ("name another: `source` sotu, or save it", "name another: sotu, or save it"),
        ("`muonlm info --keys` lists all", "`muonlm info --keys` lists all"),
    ],
)
def test_an_argument_becomes_the_flag_that_carries_it(text, told):
    assert in_flags(UserError(text), parser_of("prep")) == told


@pytest.mark.parametrize(
    "room, text, told",
    [
        ("model.lm", "`block_size` 256 is short", "--model.block_size 256 is short"),
        ("data.open", "name some: `source` FILE", "name some: --data FILE"),
        ("data.sources.hub", "choose another `name`", "choose another --data.name"),
        ("scan.dispatch", "`backend` = 'cpu' needs numba", "--model.scan 'cpu' needs numba"),
        ("optim.build", "use `name` adamw", "use --optim.name adamw"),
        ("model.mixers.mamba", "`ns_steps` = 0", "--model.ns_steps 0"),
        ("optim.schedule", "unknown `kind`", "unknown --sched.kind"),
        ("training.loop", "`init_from` and `seed`", "--init-from and --seed"),
    ],
)
def test_where_keys_are_flags_the_room_that_raised_decides_among_keys_of_one_name(room, text, told):
    assert in_flags(raised_in(room, text), parser_of("train", takes_keys=True)) == told


def test_every_key_is_told_as_a_flag_that_exists():
    for key in keys():
        told = in_flags(UserError(f"`{key.rpartition('.')[2]}`"), parser_of("train", takes_keys=True))
        assert told == "--data" or told.removeprefix("--").replace("-", "_") in keys()


@pytest.mark.parametrize(
    "typed, told",
    [("generate runs --max-tokens 0", "--max-tokens 0 must be at least 1"), ("generate runs --top-k -1", "--top-k -1")],
)
def test_what_the_engine_refuses_is_told_in_flags_of_generate(typed, told, capsys):
    assert main(typed.split()) == 2
    assert told in capsys.readouterr().err
