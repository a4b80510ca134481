"""Calls of the kernels of primitives.cuh: device.cuh against NumPy, in the emulator and on a GPU."""

import numpy as np

from .calls import Call

RNG_SEED = 7


def _equal(expected):
    def judge(*arrays):
        np.testing.assert_array_equal(arrays[-1], expected)

    return judge


def _bfloat16_to_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(x):
    """bfloat16 bits of x, rounded to nearest, ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def conversions():
    """Every number of the 16-bit types, and float32s around every rounding boundary."""
    with np.errstate(invalid="ignore", over="ignore"):
        bits = np.arange(1 << 16, dtype=np.uint16)
        for name, values in (
            ("float16", bits.view(np.float16).astype(np.float32)),
            ("bfloat16", _bfloat16_to_float(bits)),
        ):
            out = np.zeros(bits.size, np.float32)
            yield Call("all", f"primitive_to_{name}", (bits, out, bits.size), _equal(values))
            middle = values[np.isfinite(values)]
            neighbours = np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))
            halfway = ((np.sort(middle)[1:].astype(np.float64) + np.sort(middle)[:-1]) / 2).astype(np.float32)
            around = np.concatenate(
                [middle, *neighbours, halfway, np.float32([np.inf, -np.inf, 1e38, 3.4e38, 65519, 65520])]
            )
            rounded = around.astype(np.float16).view(np.uint16) if name == "float16" else _to_bfloat16(around)
            yield Call(
                "boundaries",
                f"primitive_round_{name}",
                (around, np.zeros(around.size, np.uint16), around.size),
                _equal(rounded),
            )
    x = np.random.default_rng(RNG_SEED).standard_normal(1000).astype(np.float32)
    yield Call("copy", "primitive_to_float32", (x, np.zeros_like(x), x.size), _equal(x))


def _factors(rng, name, *shapes):
    """Random matrices in the dtype `name`, and the same values in float64."""
    values = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    if name == "float16":
        elements = [x.astype(np.float16) for x in values]
        return elements, [x.astype(np.float64) for x in elements]
    elements = [_to_bfloat16(x) for x in values]
    return elements, [_bfloat16_to_float(x).astype(np.float64) for x in elements]


def _near(expected):
    def judge(_a, _b, got):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)  # a tensor core truncates its sums

    return judge


def matmuls():
    rng = np.random.default_rng(RNG_SEED)
    for name in ("float16", "bfloat16"):
        for m, n, k in ((16, 8, 16), (1, 1, 8), (33, 17, 40), (70, 24, 136)):
            (a, b), (x, y) = _factors(rng, name, (m, k), (n, k))
            args = (a, b, np.full((m, n), np.nan, np.float32), m, n, k)
            yield Call(f"{m}x{n}x{k}", f"primitive_matmul_{name}", args, _near(x @ y.T))
        for items, m, n, k, columns, cluster in (
            (1, 64, 64, 64, 64, 1),
            (1, 1, 1, 8, 64, 1),
            (2, 70, 100, 264, 128, 1),
            (3, 33, 70, 136, 64, 1),
            (1, 64, 128, 64, 64, 2),
            (2, 70, 150, 392, 64, 2),
        ):
            (a, b), (x, y) = _factors(rng, name, (items, m, k), (items, n, k))
            args = (a, b, np.full((items, m, n), np.nan, np.float32), items, m, n, k, columns, cluster)
            case = f"{items}x{m}x{n}x{k}-{columns}" + ("-multicast" if cluster > 1 else "")
            yield Call(case, f"primitive_hopper_matmul_{name}", args, _near(x @ y.transpose(0, 2, 1)))


def barriers():
    for groups, blocks, turns in ((1, 2, 5), (2, 4, 7), (1, 8, 9), (3, 2, 5)):
        values = np.arange(groups * blocks * 64, dtype=np.float32).reshape(groups, blocks, 64)
        turned = np.roll(values, -turns, axis=1)

        def judge(got, _arrived, expected=turned):
            np.testing.assert_array_equal(got, expected)

        args = (values, np.full(groups, 9, np.uint32), groups, blocks, turns)
        yield Call(f"{groups}x{blocks}", "primitive_turn", args, judge)


def collectives():
    for n in (32, 128):
        values = np.random.default_rng(RNG_SEED).integers(-1000, 1000, n).astype(np.int32)
        tid = np.arange(n)
        lane, first = tid % 32, tid // 32 * 32
        warps = values.reshape(-1, 32)
        even, odd = warps[:, ::2].sum(1), warps[:, 1::2].min(1)
        ballot = ((warps > 0).astype(np.int64) << np.arange(32)).sum(1).astype(np.uint32).view(np.int32)
        expected = np.stack(
            [
                values[first + (tid + 5) % 32],
                values[np.where((lane ^ 6) // 8 > lane // 8, tid, first + (lane ^ 6))],
                values[np.where(tid % 16 < 3, tid, tid - 3)],
                values[np.where(tid % 16 > 12, tid, np.minimum(tid + 3, n - 1))],
                ballot[tid // 32],
                np.where(tid % 2, odd[tid // 32], even[tid // 32]),
                np.full(n, (values > 0).sum()),
                np.full(n, values.sum()),
            ]
        )

        def judge(_values, got, largest, expected=expected, values=values):
            np.testing.assert_array_equal(got, expected)
            assert largest[0] == values.max()

        args = (values, np.zeros((8, n), np.int32), np.full(1, -5000, np.int32), n)
        yield Call(str(n), "primitive_collectives", args, judge)


def clusters():
    values = np.random.default_rng(RNG_SEED).integers(-100, 100, (3, 4 * 32)).astype(np.float32)
    args = (values, np.zeros(3, np.float32), 3)
    yield Call("3", "primitive_cluster", args, _equal(values.sum(1)))
    for turns in (1, 2, 7):
        values = np.random.default_rng(RNG_SEED).integers(-3, 4, (3, 4, 64)).astype(np.float32)
        expected = values
        for _ in range(turns):
            told = np.fmod(expected.reshape(3, 8, 32).sum(2), 8).sum(1)
            expected = np.roll(expected, 1, axis=1) + told[:, None, None]
        args = (values, np.zeros_like(values), 3, turns)
        yield Call(str(turns), "primitive_letters", args, _equal(expected))


def calls():
    return [*conversions(), *matmuls(), *barriers(), *collectives(), *clusters()]
