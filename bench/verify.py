"""Picks are judged before they are timed, by the float64 oracle of the tests.

The tests are no package, so that pytest runs them against an installed one as well; so their folder goes on the path.
"""

import sys

from .record import ROOT

sys.path.append(str(ROOT / "python_tests"))

import oracle

EFFORT = 10**9  # multiply-adds the oracle may spend on one result: a second or two on two cores


def selections(pairs, error_of=lambda item, features, picks: oracle.greedy_error(features, picks, 1e-6)) -> None:
    """The picks (K,) of each (features (N, C), picks) are distinct, in range, and by error_of(item, features, picks)
    what the op promises. Where that would take too long only the first picks are recomputed in float64, as many as
    EFFORT buys: they are a shorter run's picks."""
    pairs = list(pairs)
    for item, (features, picks) in enumerate(pairs):
        assert picks.unique().numel() == picks.numel(), f"item {item}: a token is picked twice"
        assert 0 <= picks.min() <= picks.max() < len(features), f"item {item}: a pick is out of range"
        affordable = max(4, EFFORT // (len(pairs) * features.numel()))
        error = error_of(item, features, picks[:affordable])
        assert not error, f"item {item}: {error}"
