"""Schedules: exact values at the corners, because they are pure functions. Tolerance 1e-12: a few fp64 roundings."""

from itertools import pairwise

import pytest

from muonlm.errors import UserError
from muonlm.optim.schedule import lr_scale, momentum_at, parse_momentum_warmup

KINDS = ["wsd", "cosine", "linear", "constant"]


def near(x):
    return pytest.approx(x, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_starts_at_one_over_w_and_reaches_one_at_exactly_step_w(kind):
    scale = [lr_scale(t, kind=kind, steps=100, warmup=10) for t in range(100)]
    assert scale[0] == near(0.1)
    assert all(a < b for a, b in pairwise(scale[:11]))
    assert scale[9] < 1.0 and scale[10] == near(1.0)
    assert max(scale) <= 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_without_warmup_the_first_step_is_at_full_rate(kind):
    assert lr_scale(0, kind=kind, steps=100) == 1.0


@pytest.mark.parametrize("kind", ["wsd", "cosine", "linear"])
@pytest.mark.parametrize("end", [0.0, 0.1])
def test_decaying_kinds_end_at_the_end_factor_at_the_last_step_and_stay_there(kind, end):
    assert lr_scale(99, kind=kind, steps=100, warmup=7, end_factor=end) == near(end)
    assert lr_scale(500, kind=kind, steps=100, warmup=7, end_factor=end) == near(end)


def test_wsd_has_three_phases_and_cools_down_over_the_last_forty_percent():
    scale = [lr_scale(t, steps=20_000, warmup=256, cooldown_frac=0.4, end_factor=0.01) for t in range(20_000)]
    assert sum(s < 1.0 for s in scale[256:]) == 8_000
    assert scale[11_999] == 1.0 and scale[12_000] == near(1 - 0.99 / 8_000)
    assert scale[15_999] == near((1.0 + 0.01) / 2)


def test_cosine_and_linear_are_half_way_down_in_the_middle():
    for kind in ("cosine", "linear"):
        assert lr_scale(55, kind=kind, steps=101, warmup=10, end_factor=0.2) == near(0.6)
    assert lr_scale(30, kind="cosine", steps=101) > lr_scale(30, kind="linear", steps=101)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_very_short_runs_have_a_schedule(kind, steps):
    for warmup in range(steps + 1):
        assert all(0.0 <= lr_scale(t, kind=kind, steps=steps, warmup=warmup) <= 1.0 for t in range(steps))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "cosin"}, "`kind` = .cosin. is no schedule: did you mean cosine"),
        ({"steps": 0}, "`steps` = 0"),
        ({"warmup": 11}, "use a value from 0 to 10"),
        ({"warmup": -1}, "use a value from 0 to 10"),
        ({"cooldown_frac": 1.5}, "cooldown_frac"),
        ({"end_factor": -0.1}, "end_factor"),
    ],
)
def test_impossible_schedules_are_refused_with_what_to_change(change, message):
    with pytest.raises(UserError, match=message):
        lr_scale(0, **({"steps": 10} | change))


def test_momentum_warmup_is_85_90_95_at_0_150_300():
    schedule = parse_momentum_warmup("0.85:0.95:300")
    assert schedule == [(0, 0.85), (300, 0.95)]
    assert [momentum_at(schedule, t) for t in (0, 150, 300, 10_000)] == [near(m) for m in (0.85, 0.90, 0.95, 0.95)]


def test_momentum_schedules_may_have_several_pieces():
    schedule = [(10, 0.85), (410, 0.97), (500, 0.90)]
    assert [momentum_at(schedule, t) for t in (0, 10, 210, 410, 455, 500)] == [
        near(m) for m in (0.85, 0.85, 0.91, 0.97, 0.935, 0.90)
    ]


@pytest.mark.parametrize("text", ["0.85:0.95", "a:b:c", "0.85:1.0:300", "0.85:0.95:0", "0.85:0.95:1.5", "", None])
def test_a_bad_momentum_warmup_is_refused(text):
    with pytest.raises(UserError, match="`momentum_warmup` = "):
        parse_momentum_warmup(text)
