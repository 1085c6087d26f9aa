"""Intervals of shares."""

import pytest

from muonlm.evals.stats import wilson


def test_wilson_intervals_have_the_published_check_values():
    # worked out by hand to four decimals
    assert wilson(0, 100) == pytest.approx((0, 0.0370), abs=5e-5)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=5e-5)
    assert wilson(100, 100) == pytest.approx((0.9630, 1), abs=5e-5)
