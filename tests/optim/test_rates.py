"""Learning rates and weight decay between lr modes, in Python and by `muonlm info --convert-lr`."""

import json
import math
import shlex

import pytest
import torch

from muonlm.cli.main import main
from muonlm.errors import UserError
from muonlm.optim import Muon
from muonlm.optim.rates import MODES, convert_lr

SHAPES = [(768, 768), (3072, 768), (768, 3072), (7, 1), (1, 7)]


@pytest.mark.parametrize("A, B", SHAPES)
def test_rates_follow_the_table_of_the_specification(A, B):
    """Its column "lr giving the AdamW-like RMS 0.2 lr_adamw", typed again."""
    table = {
        "original": 0.2 * math.sqrt(B),
        "match_rms_adamw": 1.0,
        "spectral": 0.2 * math.sqrt(max(A, B)) * math.sqrt(B / A),
        "none": 0.2 * math.sqrt(max(A, B)),
        "adamw": 1.0,
    }
    for mode, factor in table.items():
        lr, wd = convert_lr(3e-4, 0.1, (A, B), "adamw", mode)
        assert lr == pytest.approx(3e-4 * factor, rel=1e-14) and lr * wd == pytest.approx(3e-5, rel=1e-14)


def test_the_examples_of_the_specification():
    assert round(convert_lr(0.02, 0.0, (768, 768), "original", "match_rms_adamw")[0], 4) == 0.0036
    assert round(convert_lr(0.025, 0.0, (768, 768), "original", "match_rms_adamw")[0], 4) == 0.0045


@pytest.mark.parametrize("shape", [*SHAPES, (4, 32, 16), (8, 4, 3, 3)])
def test_rates_come_back_to_the_last_bits(shape):
    for one in MODES:
        for other in MODES:
            there = convert_lr(0.017, 0.03, shape, one, other, 0.229)
            back = convert_lr(*there, shape, other, one, 0.229)
            assert back == pytest.approx(
                (0.017, 0.03), rel=1e-15 * 2
            )  # two roundings of 1.1e-16 each way, in each factor
    assert convert_lr(0.0, 0.1, shape, "original", "none")[0] == 0.0


def test_a_convolution_counts_flattened_and_experts_by_their_last_two():
    assert convert_lr(0.1, 0.0, (8, 4, 3, 3), "none", "match_rms_adamw") == convert_lr(
        0.1, 0.0, (8, 36), "none", "match_rms_adamw"
    )
    assert convert_lr(0.1, 0.0, (5, 8, 36), "none", "match_rms_adamw") == convert_lr(
        0.1, 0.0, (8, 36), "none", "match_rms_adamw"
    )


@pytest.mark.parametrize("shape", [(16, 16), (32, 16), (16, 32)])
@pytest.mark.parametrize("mode", ["match_rms_adamw", "spectral", "none"])
def test_the_same_weights_come_out_under_the_converted_rate_and_decay(mode, shape):
    """Decay multiplies the unadjusted rate, so without its conversion the weights would part: the second assertion."""

    def trained(lr, wd, lr_mode):
        draw = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.randn(shape, generator=draw) / 4)
        optimizer = Muon([p], lr=lr, weight_decay=wd, lr_mode=lr_mode, ns_dtype="float32")
        for _ in range(20):
            p.grad = 0.3 * p.detach() + torch.randn(shape, generator=draw)  # of full rank, so well conditioned
            optimizer.step()
        return p.detach()

    reference = trained(0.05, 0.5, "original")
    lr, wd = convert_lr(0.05, 0.5, shape, "original", mode)
    # 20 steps of fp32 rounding through Newton-Schulz
    torch.testing.assert_close(trained(lr, wd, mode), reference, rtol=0, atol=2e-5)
    if not math.isclose(lr, 0.05):
        assert (trained(lr, 0.5, mode) - reference).abs().max() > 1e-2


@pytest.mark.parametrize(
    "arguments, what, fix",
    [
        ((0.02, 0.1, (8, 8), "orignal", "none"), "'orignal'", "'original'"),
        ((0.02, 0.1, (8, 8), "original", "muP"), "'muP'", "original, match_rms_adamw, spectral, none, adamw"),
        ((0.02, 0.1, (8,), "original", "none"), "(8,) is no matrix", "(768, 3072)"),
        ((0.02, 0.1, (8, 0), "original", "none"), "(8, 0) is no matrix", "(768, 3072)"),
        ((-1, 0.1, (8, 8), "original", "none"), "lr=-1", ">= 0"),
        ((0.02, math.nan, (8, 8), "original", "none"), "wd=nan", ">= 0"),
        ((0.02, 0.1, (8, 8), "original", "none", 0.0), "rms_target=0.0", "0.2"),
    ],
)
def test_a_rate_that_cannot_be_converted_is_answered_with_the_remedy(arguments, what, fix):
    with pytest.raises(UserError) as error:
        convert_lr(*arguments)
    assert what in str(error.value) and fix in str(error.value)


# --- muonlm info --convert-lr -----------------------------------------------------------------------------------------


def test_info_converts_a_rate_and_says_what_stays_the_same(capsys):
    assert (
        main(shlex.split("info --convert-lr 0.02 --from original --to match_rms_adamw --shape 768x768 --wd 0.05")) == 0
    )
    out = capsys.readouterr().out
    assert "lr 0.02 with wd 0.05 under original  =  lr 0.00360844 with wd 0.277128 under match_rms_adamw" in out
    assert "0.000722 (RMS) a step" in out and "lr x wd = 0.001" in out
    assert main(shlex.split("info --convert-lr 0.02 --from original --to match_rms_adamw --shape 768x768")) == 0
    assert "add --wd" in capsys.readouterr().out


def test_info_without_a_shape_shows_that_the_rate_depends_on_it(capsys):
    assert main(shlex.split("info --convert-lr 0.02 --from original --to match_rms_adamw")) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()[3:6]] == [
        ["768x768", "0.00360844", "0.000721688"],
        ["3072x768", "0.00360844", "0.000721688"],
        ["768x3072", "0.00180422", "0.000360844"],
    ]
    assert "depends on the shape" in out


def test_info_prints_one_json_document_of_the_rates(capsys):
    for shape in ("", "--shape 64x32"):
        assert main(shlex.split(f"info --convert-lr 3e-4 --wd 0.1 --from adamw --to spectral --json {shape}")) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["from"] == {"mode": "adamw", "lr": 3e-4, "wd": 0.1} and facts["to"] == "spectral"
        for one in facts["conversions"]:
            assert (one["lr"], one["wd"]) == convert_lr(3e-4, 0.1, one["shape"], "adamw", "spectral")
            assert one["update_rms"] == pytest.approx(0.2 * 3e-4)
    assert [one["shape"] for one in facts["conversions"]] == [[64, 32]]


@pytest.mark.parametrize(
    "typed, what, fix",
    [
        ("--convert-lr 0.02 --from original", "--convert-lr needs --from and --to", "--to match_rms_adamw"),
        ("--convert-lr fast --from original --to none", "--convert-lr 'fast'", "--convert-lr 0.02"),
        ("--convert-lr nan --from original --to none", "--convert-lr 'nan'", "--convert-lr 0.02"),
        ("--convert-lr 0.02 --wd inf --from original --to none", "--wd 'inf'", "--wd 0.05"),
        ("--convert-lr 0.02 --from original --to non", "'non'", "'none'"),
        ("--convert-lr 0.02 --from original --to none --shape 768", "--shape '768'", "--shape 768x768"),
        ("--convert-lr 0.02 --from original --to none --shape 0x8", "--shape '0x8'", "--shape 768x768"),
        (
            "--convert-lr 0.02 --from original --to none quickstart",
            "takes no recipe and no key, found 'quickstart'",
            "leave it out",
        ),
        ("--convert-lr 0.02 --from original --to none --optim.lr 1", "found '--optim.lr'", "leave it out"),
        ("--from original", "--from belongs to --convert-lr", "--convert-lr 0.02"),
        ("--shape 8x8", "--shape belongs to --convert-lr", "--convert-lr 0.02"),
        ("--convert-rl 0.02", "'--convert-rl'", "'--convert-lr'"),
    ],
)
def test_a_rate_typed_wrongly_is_answered_with_what_to_type(capsys, typed, what, fix):
    assert main(["info", *shlex.split(typed)]) == 2
    err = capsys.readouterr().err
    assert what in err and fix in err and err.count("\n") == 1, err
