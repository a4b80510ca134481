"""The Triton kernels compiled ahead of time, without a GPU. test_attention_received.py runs it in its own process."""

import functools
import re

import pytest
import torch
from last_query_scores_compiled import SHARED_MEMORY, compiled, noting, resources

from sts_kernels.ops import _attention_received_triton as kernels
from sts_kernels.ops._attention_received_plan import Columns, Plan
from sts_kernels.ops._triton_launch import Bound

SHAPES = [(1225, 16, 16, 80), (4096, 28, 4, 128)]  # S, Hq, Hkv, D: an encoder, an LLM
MORE_SHAPES = [(577, 16, 16, 64), (16, 2, 1, 64), (4096, 4, 4, 256), (40, 2, 1, 128)]
DIMS = [8, 72, 96, 160, 320]
MORE_DIMS = [1, 33, 48, 100, 257, 512, 576]
KINDS = ["", "weight position mask"]
MORE_KINDS = ["weight", "position", "mask"]
CASES = [(shape, kinds) for shape in SHAPES for kinds in KINDS]
MORE_CASES = [(shape, KINDS[1]) for shape in MORE_SHAPES] + [(SHAPES[0], kinds) for kinds in MORE_KINDS]


@functools.cache
def launches(shape, dtype, kinds=""):
    """The launches of one call, recorded and not run: (kernel, num_warps, arguments)."""
    keys, heads, kv_heads, dim = shape
    recorded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bound, "launch", noting(recorded))
        query = torch.empty(1, keys, heads, dim, dtype=dtype)
        weight = torch.ones(1, keys) if "weight" in kinds else None
        position = torch.arange(keys)[None] if "position" in kinds else None
        mask = torch.ones(1, keys, dtype=torch.bool) if "mask" in kinds else None
        key = torch.empty(1, keys, kv_heads, dim, dtype=dtype)
        kernels.received(torch.empty(1, keys), query, key, None, weight, position, mask, False)
    return recorded


def check(shape, dtype, kinds, arch, path, allowed):
    """allowed: max bytes of stack. ptxas limits some kernels to 64 or 128 registers and spills two to four more."""
    *passes, _ = launches(shape, dtype, kinds)
    for kernel, warps, arguments in passes:
        binary = compiled(kernel, warps, arguments, arch)
        used = resources(binary.asm["cubin"], path / "kernel.cubin")
        print(f"sm_{arch} {shape} {dtype} {kinds}: {kernel.__name__} {used} shared {binary.metadata.shared}")
        assert 0 < used["REG"] <= 255
        assert used["STACK"] <= allowed, f"{kernel.__name__} spills: {used}"
        assert used["LOCAL"] == 0
        assert binary.metadata.shared <= SHARED_MEMORY[arch]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "kinds"), [*CASES, *(pytest.param(*c, marks=pytest.mark.slow) for c in MORE_CASES)])
def test_registers_hold_everything(shape, kinds, dtype, arch, tmp_path):
    check(shape, dtype, kinds, arch, tmp_path, 16 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("arch", [90, *(pytest.param(a, marks=pytest.mark.slow) for a in (80, 100))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [*DIMS, *(pytest.param(d, marks=pytest.mark.slow) for d in MORE_DIMS)])
def test_any_head_dimension_fits(dim, dtype, arch, tmp_path):
    check((1000, 2, 1, dim), dtype, "weight position mask", arch, tmp_path, 16)


def test_the_mean_compiles(tmp_path):
    *_, (kernel, warps, arguments) = launches(SHAPES[0], torch.float16)
    used = resources(compiled(kernel, warps, arguments, 90).asm["cubin"], tmp_path / "kernel.cubin")
    assert used["STACK"] == used["LOCAL"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_rounding_to_tf32(dtype):
    for one in launches(SHAPES[0], dtype)[:2]:
        for arch in (80, 90, 100):
            ptx = compiled(*one, arch).asm["ptx"]
            assert "tf32" not in ptx
            assert re.search(r"mma.*bf16|tcgen05.mma.*kind::f16", ptx)


@pytest.mark.parametrize("shape", [(4096, 16, 16, 64), (4096, 1, 1, 72)], ids=str)
def test_blocks_are_copied_ahead_in_16_bytes(shape):
    """The loops over keys and rows are pipelined, even if strides are multiples of 8 elements only."""
    for one in launches(shape, torch.bfloat16)[:2]:
        copies = re.findall(r"cp\.async\.\w+\.shared\.global\S* .*?, (0x[0-9a-f]+|\d+),", compiled(*one, 90).asm["ptx"])
        assert "0x10" in copies or "16" in copies


@pytest.mark.parametrize("itemsize", [2, 4])
def test_columns_cover_a_row_in_chunks_that_tl_dot_takes(itemsize):
    for dim in range(1, 1100):
        columns = Columns.of(dim, itemsize)
        covered = columns.width + columns.tail
        assert dim <= covered < dim + max(columns.chunk, dim, 16)
        assert columns.width % columns.chunk == 0
        for size in (columns.chunk, columns.tail or 16):
            assert size >= 16
            assert size & (size - 1) == 0
    assert [Columns.of(dim, 2).width + Columns.of(dim, 2).tail for dim in (64, 72, 80, 96, 128)] == [
        64, 80, 80, 96, 128,
    ]  # fmt: skip


def test_the_plan_depends_on_one_item_alone():
    for itemsize in (2, 4):
        for dim in (1, 64, 72, 128, 256, 576):
            for rows in (1, 17, 576, 131072):
                plan = Plan.of(rows, 300, dim, itemsize, causal=rows == 576)
                for size in (plan.rows, plan.keys, plan.moving_rows, plan.moving_keys):
                    assert size >= 16
                    assert size & (size - 1) == 0
                assert plan.rows % plan.moving_rows == 0


def test_is_compiled():
    assert not kernels.INTERPRETED
