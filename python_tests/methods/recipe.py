"""Inputs of vectors/*.json: integers of NumPy's frozen RandomState, divided by powers of two. Exact in float32 on every
platform. Each case holds the first 16 hex digits of SHA-256 over its inputs."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

VECTORS = Path(__file__).parent / "vectors"


def cases(name):
    """The cases of vectors/<name>.json."""
    return json.loads((VECTORS / f"{name}.json").read_text())["cases"]


def label(case):
    """A test's id: the case without its lists and its hash."""
    return "-".join(str(v) for k, v in case.items() if not isinstance(v, list | dict) and k != "inputs_sha")


def start(case):
    return np.random.RandomState(case["seed"])


def normal(rs, *shape):
    """About normal: the sum of four integers of -128 .. 128, over 128."""
    total = rs.randint(-128, 129, (4, *shape)).sum(0)
    return (total / 128).astype(np.float32)


def clustered(rs, batch, tokens, channels, centers=8):
    """Rows around a few centers, with noise of a quarter of a center's size."""
    center = rs.randint(-128, 129, (4, batch, centers, channels)).sum(0)
    which = rs.randint(0, centers, (batch, tokens))[..., None]
    noise = rs.randint(-32, 33, (4, batch, tokens, channels)).sum(0)
    return ((np.take_along_axis(center, which, 1) + noise) / 128).astype(np.float32)


def positive(rs, *shape):
    """Scores j / 2^22, 0 < j < 2^22: their means over 2 or 4 heads are exact in float32."""
    return (rs.randint(1, 1 << 22, shape) / (1 << 22)).astype(np.float32)


def attention(rs, heads, length):
    """(heads, length, length): causal rows of positive weights that sum to 1."""
    weights = positive(rs, heads, length, length) * np.tril(np.ones((length, length), np.float32))
    return (weights / weights.sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def features(case, rs):
    """(N, C), by the case's recipe."""
    if case["recipe"] == "normal":
        return normal(rs, case["N"], case["C"])
    return clustered(rs, 1, case["N"], case["C"])[0]


def tensors(case, *arrays):
    """The arrays as tensors; asserts that their hash is the case's."""
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).astype("<f4").tobytes())
    assert sha.hexdigest()[:16] == case["inputs_sha"], "the recipe makes other inputs than the vectors are of"
    return [torch.from_numpy(array) for array in arrays]
