"""Checks picks with the tests' float64 oracle before they are timed.

sys.path gets the folder python_tests: it is not a package, so that pytest can also test an installed sts_kernels.
"""

import sys

from .record import ROOT

sys.path.append(str(ROOT / "python_tests"))

import oracle

EFFORT = 10**9  # max multiply-adds of the oracle per result: a second or two on two cores


def selections(pairs, error_of=lambda item, features, picks: oracle.greedy_error(features, picks, 1e-6)) -> None:
    """Asserts that the picks (K,) of each (features (N, C), picks) pair are distinct, in range and correct.

    error_of(item, features, picks) checks in float64 and returns an error message, or "". For a large item it gets a
    prefix of the picks, as long as EFFORT allows: a prefix is the selection of a smaller K.
    """
    pairs = list(pairs)
    for item, (features, picks) in enumerate(pairs):
        assert picks.unique().numel() == picks.numel(), f"item {item}: a token is picked twice"
        assert 0 <= picks.min() <= picks.max() < len(features), f"item {item}: a pick is out of range"
        affordable = max(4, EFFORT // (len(pairs) * features.numel()))
        error = error_of(item, features, picks[:affordable])
        assert not error, f"item {item}: {error}"


def greedy_map(features, quality, order, gain) -> None:
    """Asserts that the picks (K,) of features (N, C) and quality (N,) are distinct, in range and a greedy MAP.

    Recomputes a prefix of the picks in float64, as long as EFFORT allows.
    """
    assert order.unique().numel() == order.numel(), "a token is picked twice"
    assert 0 <= order.min() <= order.max() < len(features), "a pick is out of range"
    affordable = max(4, EFFORT // features.numel())
    given = (t.cpu() for t in (order[:affordable], gain[:affordable], features, quality))
    error = oracle.dpp_error(*given, floor=1e-7)
    assert not error, error
