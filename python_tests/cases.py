"""Input cases of the selection ops and pairwise_sqdist, shared by op tests and emulated-kernel tests.

Values are drawn on the CPU in float32 from a seed, rounded to the dtype, then laid out on the device. So every backend
gets the same numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

FLOATING = (torch.float32, torch.float16, torch.bfloat16)

# Contract of every selection op: a pick's potential, recomputed in float64, is at most 1 + REGRET times the minimum.
REGRET = 1e-3
# Relative tolerance of squared distances and potentials: float32 sums of at most 4097 terms in any order, each term
# accurate to 2^-22. Worst case 4097 * 2^-24 = 2.4e-4 if all roundings align; 2e-6 is typical. Well below REGRET.
VALUE_RTOL = 1e-4
# Max error by rounding of the distance of two unit rows. Each row: 2^-24 of its length, and as much again for the norm.
UNIT_ROUNDING = 4e-7
# Absolute tolerance: smaller values may be float32 subnormals flushed to zero.
VALUE_ATOL = 2e-38


# ---- Values: (B, N, C) float32 -----------------------------------------------------------------------------------


def normal(rng, batch, tokens, channels):
    return torch.randn(batch, tokens, channels, generator=rng)


def wide(rng, batch, tokens, channels):
    """Standard deviation 8: at C = 4096 squared distances reach 5e5, beyond float16's range."""
    return 8 * normal(rng, batch, tokens, channels)


def common_offset(rng, batch, tokens, channels):
    """Mean 20 times the spread: without centring, |a|^2 + |b|^2 - 2ab cancels."""
    return normal(rng, batch, tokens, channels) + 20 * normal(rng, 1, 1, channels).sign()


def far_off(rng, batch, tokens, channels):
    """Mean 5000 times the spread; the differences of the rounded inputs are still exact."""
    return normal(rng, batch, tokens, channels) + 5000


def equal(rng, batch, tokens, channels):
    return normal(rng, batch, 1, channels).expand(batch, tokens, channels).contiguous()


def zeros(rng, batch, tokens, channels):
    return torch.zeros(batch, tokens, channels)


def _groups(rng, batch, tokens, channels, size, jitter):
    """Shuffled groups of `size` tokens, each around a random token; `jitter`, (N, 1) or one, is relative to it."""
    base = normal(rng, batch, math.ceil(tokens / size), channels).repeat_interleave(size, 1)[:, :tokens]
    base = base + jitter * normal(rng, batch, tokens, channels)
    return base[:, torch.randperm(tokens, generator=rng)]


def duplicates(rng, batch, tokens, channels):
    return _groups(rng, batch, tokens, channels, 4, 0.0)


def near_duplicates(rng, batch, tokens, channels):
    """Squared distances within a group about 1e-4 of the squared norms."""
    return _groups(rng, batch, tokens, channels, 4, 0.007)


def nearer_duplicates(rng, batch, tokens, channels):
    """Squared distances within a group about 1e-7 of the squared norms: only differences resolve them."""
    return _groups(rng, batch, tokens, channels, 4, 2e-4)


def clusters(rng, batch, tokens, channels):
    """Eight tight clusters, far apart: no single centre removes the offset of all."""
    centres = 10 * normal(rng, batch, 8, channels)
    pick = torch.randint(8, (tokens,), generator=rng)
    return centres[:, pick] + 0.3 * normal(rng, batch, tokens, channels)


def tree(rng, batch, tokens, channels):
    """Leaves of a binary tree in random order: with eps = 2 every potential is exact, with many ties.

    Two leaves whose lowest common ancestor is 1, 2, 3, ... levels up have squared distance 2, 6, 14, ... So
    1 / (d + 2) is a power of two, and float32 sums are exact in any order. The mean and the distances to it are exact
    up to 128 tokens.
    """
    levels = tokens.bit_length() - 1
    assert tokens == 1 << levels
    assert channels >= tokens * levels, "too few channels for the tree"
    leaf = torch.arange(tokens)
    columns = []
    for level in range(levels):
        # One-hot of the subtree: with one bit per level, d would depend on the number of differing bits.
        subtree = torch.nn.functional.one_hot(leaf >> level, tokens >> level).float()
        columns.append(subtree.repeat(1, 1 << level))
    x = torch.cat(columns, 1)
    x = torch.nn.functional.pad(x, (0, channels - x.shape[1]))
    return torch.stack([x[torch.randperm(tokens, generator=rng)] for _ in range(batch)])


def grid(rng, batch, tokens, channels):
    """Small integers: many equal distances, exact in every dtype."""
    return torch.randint(-2, 3, (batch, tokens, channels), generator=rng).float()


def exact(rng, batch, tokens, channels):
    """Integer rows of norm 256, times powers of two: unit rows and their squared distances are exact in float32.

    Squared distances are multiples of 2^-16; entries have at most 8 bits. Below 8 channels: one nonzero entry per row.
    """
    x = torch.zeros(batch * tokens, channels)
    if channels < 8:
        place = torch.randint(channels, (len(x), 1), generator=rng)
        x.scatter_(1, place, 256.0 * (2 * torch.randint(2, place.shape, generator=rng) - 1))
    else:
        spread = min(100, int(256 / math.sqrt(channels)))
        x[:, 4:] = torch.randint(-spread, spread + 1, (len(x), channels - 4), generator=rng).float()
        for row in x:  # zero channels of a too long row, then entries 0-3 by Lagrange's four-square theorem
            while row.square().sum() > 256**2:
                row[torch.randint(channels, (channels // 8,), generator=rng)] = 0
            row[:4] = torch.tensor(_four_squares(256**2 - int(row.square().sum())))
    scale = torch.randint(-6, 7, (batch, tokens, 1), generator=rng)
    return torch.ldexp(x.view(batch, tokens, channels), scale)


def _four_squares(total):
    for a in range(math.isqrt(total), -1, -1):
        for b in range(math.isqrt(total - a * a), -1, -1):
            rest = total - a * a - b * b
            for c in range(math.isqrt(rest), math.isqrt(rest // 2) - 1, -1):
                d = math.isqrt(rest - c * c)
                if c * c + d * d == rest:
                    return a, b, c, d
    raise AssertionError(f"Lagrange was wrong about {total}")


def line(rng, batch, tokens, channels):
    """0, 1, 2, ... along every channel."""
    return torch.arange(tokens).float()[None, :, None].expand(batch, tokens, channels).contiguous()


def _spoil(x, rng, values):
    """Every fifth token, from token 0 on, gets one of `values` in one channel."""
    batch, tokens, channels = x.shape
    for b in range(batch):
        for j, i in enumerate(range(0, tokens, 5)):
            x[b, i, torch.randint(channels, (), generator=rng)] = values[(b + j) % len(values)]
    return x


def not_finite(rng, batch, tokens, channels):
    return _spoil(normal(rng, batch, tokens, channels), rng, [math.nan, math.inf, -math.inf])


def none_finite(rng, batch, tokens, channels):
    x = normal(rng, batch, tokens, channels)
    x[..., channels // 2] = math.nan
    x[:, ::3, 0] = math.inf
    return x


def huge(rng, batch, tokens, channels):
    """Squared distances and the sum over tokens overflow float32, and the first token is NaN (float32, bfloat16)."""
    return _spoil(normal(rng, batch, tokens, channels).clamp(-3, 3) * 1e38, rng, [math.nan])


def large_norms(rng, batch, tokens, channels):
    """|a|^2 + |b|^2 overflows float32, but not the squared distances within a group of four (float32, bfloat16)."""
    jitter = torch.tensor([0.05, 0.05, 0.6, 0.6]).repeat(math.ceil(tokens / 4))[:tokens, None]
    return 1.4e19 / math.sqrt(channels) * _groups(rng, batch, tokens, channels, 4, jitter)


def tiny(rng, batch, tokens, channels):
    """Squared distances are far below eps, and below float32's normal numbers (float32, bfloat16)."""
    return 1e-21 * normal(rng, batch, tokens, channels)


# ---- Layouts: the same values as a view into a larger buffer of NaN ----------------------------------------------


def _poisoned(x, shape):
    return torch.full(shape, math.nan, dtype=x.dtype, device=x.device)


def contiguous(x):
    return x.contiguous()


def token_slice(x):
    """features[..., 1:, :] of a buffer with one more token, such as a class token."""
    *batch, tokens, channels = x.shape
    view = _poisoned(x, (*batch, tokens + 1, channels))[..., 1:, :]
    return view.copy_(x)


def channel_slice(x):
    """Odd row stride and odd storage offset: no vector load is aligned."""
    *batch, tokens, channels = x.shape
    pitch = channels + 2 - channels % 2 + 1
    view = _poisoned(x, (*batch, tokens, pitch))[..., 1 : channels + 1]
    return view.copy_(x)


def row_gap(x):
    """Aligned row stride larger than the row length."""
    *batch, tokens, channels = x.shape
    view = _poisoned(x, (*batch, tokens, channels + 16))[..., :channels]
    return view.copy_(x)


def storage_offset(x):
    """Contiguous, one element past an aligned address."""
    return _poisoned(x, (x.numel() + 1,))[1:].copy_(x.reshape(-1)).view(x.shape)


def token_major(x):
    """(B, N, C) stored as (N, B, C)."""
    stored = x.movedim(-2, 0).contiguous()
    return stored.movedim(0, -2)


def channel_major(x):
    """Stored as (B, C, N): channels are not contiguous."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def channel_stride(x):
    *batch, tokens, channels = x.shape
    view = _poisoned(x, (*batch, tokens, 2 * channels))[..., ::2]
    return view.copy_(x)


LAYOUTS = (
    contiguous,
    token_slice,
    channel_slice,
    row_gap,
    storage_offset,
    token_major,
    channel_major,
    channel_stride,
)


def expanded(x):
    """Batch stride 0: every item is item 0."""
    return x[:1].contiguous().expand(x.shape)


# ---- Cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A call of `repulsion_select`; other ops use the fields that they need."""

    name: str
    batch: int
    tokens: int
    channels: int
    k: int
    values: Callable = normal
    layout: Callable = contiguous
    eps: float = 1e-6
    anchor: tuple | None = None
    num_tokens: tuple | None = None
    dtypes: tuple = FLOATING
    index_dtype: torch.dtype = torch.int64
    picks: tuple | None = None  # the only correct picks of every item, if known without computing

    def features(self, seed=0, dtype=torch.float32, device="cpu") -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed)
        x = self.values(rng, self.batch, self.tokens, self.channels).to(dtype)
        if self.num_tokens is not None:  # padding values that would change the selection if they were read
            for b, count in enumerate(self.num_tokens):
                x[b, count:] = 0.0
                x[b, count::2] = math.nan
        return self.layout(x.to(device))

    def inputs(self, seed=0, dtype=torch.float32, device="cpu") -> dict:
        """Keyword arguments of `repulsion_select`."""
        return {
            "features": self.features(seed, dtype, device),
            "k": self.k,
            "eps": self.eps,
            "anchor": self._index(self.anchor, device),
            "num_tokens": self._index(self.num_tokens, device),
        }

    def _index(self, values, device):
        return None if values is None else torch.tensor(values, dtype=self.index_dtype, device=device)


WIDE_RANGE = (torch.float32, torch.bfloat16)
DISTINCT = (torch.float32, torch.float16)  # bfloat16 would round small differences to 0

SIZES = [
    Case(f"{b}x{n}x{c}_k{k}", b, n, c, k)
    for b, n, c, k in [
        (1, 1, 1, 1),
        (3, 1, 64, 1),
        (1, 2, 3, 2),
        (5, 2, 1, 1),
        (2, 31, 3, 31),
        (2, 32, 64, 32),
        (1, 33, 1, 33),
        (5, 33, 7, 1),
        (5, 127, 64, 40),
        (2, 257, 1000, 33),
        (1, 300, 2, 300),
        (1, 577, 1024, 64),
        (1, 97, 4096, 97),
        (2, 40, 4097, 9),
        (1, 1024, 17, 513),
        (1, 1225, 64, 1225),
        (1, 2880, 33, 70),
        (1, 9001, 5, 40),
        (1, 131072, 1, 3),
    ]
]

VALUES = [
    Case("wide", 1, 128, 4096, 64, wide),
    Case("wide_many_tokens", 1, 577, 129, 192, wide),
    Case("common_offset", 2, 257, 64, 128, common_offset),
    Case("common_offset_4096", 1, 65, 4096, 65, common_offset),
    Case("far_off", 2, 129, 48, 64, far_off, dtypes=(torch.float32,)),
    Case("near_duplicates", 2, 258, 64, 192, near_duplicates),
    Case("near_duplicates_1024", 1, 130, 1024, 130, near_duplicates),
    Case("nearer_duplicates", 2, 130, 256, 100, nearer_duplicates, dtypes=DISTINCT),
    Case("duplicates", 2, 130, 33, 130, duplicates),
    Case("clusters", 2, 253, 100, 130, clusters),
    Case("grid", 2, 121, 2, 121, grid),
    Case("grid_16", 1, 250, 16, 100, grid),
    Case("line", 1, 101, 3, 101, line),
    Case("tree", 3, 64, 384, 64, tree, eps=2.0, anchor=(5, 0, 63)),
    Case("tree_default_anchor", 2, 32, 161, 32, tree, eps=2.0),
    Case("tree_128", 1, 128, 896, 100, tree, eps=2.0, anchor=(77,)),
    Case("equal", 3, 100, 24, 100, equal, picks=tuple(range(100))),
    Case("equal_anchor", 1, 37, 5, 10, equal, anchor=(4,), picks=(4, 0, 1, 2, 3, 5, 6, 7, 8, 9)),
    Case("zeros", 1, 70, 3, 70, zeros, picks=tuple(range(70))),
    Case("not_finite", 3, 63, 20, 63, not_finite),
    Case("not_finite_anchor", 3, 63, 20, 63, not_finite, anchor=(5, 0, 1)),
    Case("not_finite_1000", 2, 128, 1000, 128, not_finite),
    Case("none_finite", 2, 35, 6, 35, none_finite, picks=tuple(range(35))),
    Case("huge", 2, 41, 8, 41, huge, dtypes=WIDE_RANGE),
    Case("large_norms", 2, 130, 64, 40, large_norms, dtypes=WIDE_RANGE),
    Case("tiny", 1, 41, 8, 41, tiny, dtypes=WIDE_RANGE),
    Case("large_eps", 2, 66, 32, 40, eps=100.0),
    Case("small_eps", 2, 66, 32, 66, duplicates, eps=1e-30),
]

ARGUMENTS = [
    Case("anchor", 4, 65, 16, 20, anchor=(0, 64, 31, 32)),
    Case("anchor_int32", 2, 65, 16, 20, anchor=(64, 1), index_dtype=torch.int32),
    Case("ragged", 5, 70, 32, 40, num_tokens=(70, 0, 1, 39, 41)),
    Case("ragged_int32", 3, 33, 9, 33, num_tokens=(33, 32, 0), index_dtype=torch.int32),
    Case("ragged_anchor", 4, 50, 12, 50, num_tokens=(50, 7, 0, 1), anchor=(49, 6, 0, 0)),
    Case("ragged_not_finite", 3, 60, 8, 60, not_finite, num_tokens=(60, 11, 1)),
    Case("ragged_all_empty", 2, 10, 4, 3, num_tokens=(0, 0), picks=(-1, -1, -1)),
    Case("ragged_common_offset", 2, 130, 32, 130, common_offset, num_tokens=(129, 65)),
    Case("no_items", 0, 5, 4, 2),
]

LAYOUT_CASES = [
    *(Case(layout.__name__, 3, 45, 40, 20, layout=layout) for layout in LAYOUTS[1:]),
    *(Case(f"{layout.__name__}_odd", 2, 37, 13, 37, layout=layout) for layout in LAYOUTS[1:]),
    *(Case(f"{layout.__name__}_wide", 1, 70, 1024, 12, layout=layout) for layout in LAYOUTS[1:]),
    *(Case(f"duplicates_{f.__name__}", 2, 45, 40, 45, duplicates, f) for f in (channel_slice, channel_major)),
    Case("expanded", 4, 45, 40, 20, layout=expanded),
    Case("ragged_slice", 3, 45, 24, 20, layout=channel_slice, num_tokens=(45, 12, 20)),
]

CASES = SIZES + VALUES + ARGUMENTS + LAYOUT_CASES


@dataclass(frozen=True)
class VarlenCase:
    """A call of `repulsion_select_varlen`."""

    name: str
    lengths: tuple
    budgets: tuple
    channels: int
    values: Callable = normal
    layout: Callable = contiguous
    eps: float = 1e-6
    anchor: tuple | None = None
    dtypes: tuple = FLOATING
    index_dtype: torch.dtype = torch.int32

    def inputs(self, seed=0, dtype=torch.float32, device="cpu") -> dict:
        """Keyword arguments of `repulsion_select_varlen`."""
        rng = torch.Generator().manual_seed(seed)
        x = torch.cat([self.values(rng, 1, n, self.channels)[0] for n in self.lengths if n]).to(dtype)
        return {
            "features": self.layout(x.to(device)),
            "cu_seqlens": self._offsets(self.lengths, device),
            "cu_budgets": self._offsets(self.budgets, device),
            "total_k": sum(self.budgets),
            "eps": self.eps,
            "anchor": None if self.anchor is None else torch.tensor(self.anchor, dtype=self.index_dtype, device=device),
        }

    def _offsets(self, sizes, device):
        return torch.tensor([0, *np.cumsum(sizes, dtype=np.int64)], dtype=self.index_dtype, device=device)


VARLEN_CASES = [
    VarlenCase("one_item", (65,), (20,), 32),
    VarlenCase("one_token", (1,), (1,), 5),
    VarlenCase("three", (31, 127, 64), (31, 40, 1), 33),
    VarlenCase("int64", (31, 12, 64), (5, 12, 7), 16, index_dtype=torch.int64),
    VarlenCase("empty_items", (0, 20, 0, 33, 0), (0, 20, 0, 10, 0), 9),
    VarlenCase("no_budget", (20, 17, 12), (0, 9, 0), 9),
    VarlenCase("nothing_kept", (20, 17), (0, 0), 9),
    VarlenCase("anchors", (20, 0, 33, 50), (10, 0, 33, 7), 24, anchor=(19, 0, 32, 0)),
    VarlenCase("anchor_of_no_budget", (20, 5), (3, 0), 24, anchor=(19, 77)),
    VarlenCase("unequal", (1, 577, 2, 100, 1225), (1, 64, 2, 99, 40), 20),
    VarlenCase("channels_1000", (150, 33), (40, 33), 1000),
    VarlenCase("common_offset", (129, 65), (129, 33), 64, common_offset),
    VarlenCase("near_duplicates", (130, 66, 12), (100, 66, 12), 64, near_duplicates),
    VarlenCase("large_eps", (66, 31), (40, 31), 32, eps=100.0),
    VarlenCase("equal", (40, 13), (40, 5), 8, equal),
    VarlenCase("not_finite", (40, 1, 13), (40, 1, 13), 8, not_finite),
    VarlenCase("tree", (64, 32, 16), (64, 20, 16), 384, tree, eps=2.0, anchor=(5, 31, 0)),
    *(
        VarlenCase(layout.__name__, (31, 0, 40, 9), (15, 0, 40, 1), 13, layout=layout)
        for layout in (token_slice, channel_slice, storage_offset, channel_major, channel_stride)
    ),
]


def by_name(name: str, cases=None):
    return next(c for c in (CASES if cases is None else cases) if c.name == name)


def with_dtypes(cases):
    """(case, dtype) pairs with readable ids, for pytest.mark.parametrize."""
    import pytest

    return [
        pytest.param(case, dtype, id=f"{case.name}-{str(dtype).removeprefix('torch.')}")
        for case in cases
        for dtype in case.dtypes
    ]


def as_numpy(x: torch.Tensor) -> np.ndarray:
    """Contiguous NumPy copy; bfloat16, which NumPy lacks, as its uint16 bits."""
    x = x.detach().cpu().contiguous()
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()
