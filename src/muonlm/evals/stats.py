"""Shares and their intervals.

    Wilson   centre (p + z²/2n) / (1 + z²/n), half-width z·√(p(1 − p)/n + z²/4n²) / (1 + z²/n), z = 1.96

Source   E. B. Wilson, JASA 22 (1927)
"""


def wilson(correct: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share: 0 of 100 -> (0, 0.0370), 50 of 100 -> (0.4038, 0.5962)."""
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def score(right: list[bool]) -> dict:
    n, correct = len(right), sum(right)
    return {"n": n, "correct": correct, "accuracy": correct / n, "interval": list(wilson(correct, n))}


def percent(score: dict) -> str:
    """'50.0% [40.4%, 59.6%]'"""
    low, high = score["interval"]
    return f"{score['accuracy']:.1%} [{low:.1%}, {high:.1%}]"
