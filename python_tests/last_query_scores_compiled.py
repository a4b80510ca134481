"""The Triton kernels compiled ahead of time, without a GPU. test_last_query_scores.py runs it in its own process."""

import functools
import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sts_kernels.ops import _last_query_scores_triton as kernels
from sts_kernels.ops._last_query_scores_plan import MAX_SPLITS, Plan, columns
from sts_kernels.ops._triton_launch import Bound

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # max bytes per block
POINTER = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
SHAPES = [(128, 16, 1, 128), (4096, 28, 4, 128)]  # S, Hq, Hkv, D: one launch, two launches
MORE_SHAPES = [  # every padded size of head and group
    (64, 8, 8, 64),
    (4096, 32, 32, 64),
    (4096, 16, 1, 128),
    (4096, 64, 1, 128),
    (4096, 96, 1, 80),
    (4096, 8, 8, 256),
    (4096, 64, 4, 192),
]
USUAL_DIMS = [1, 8, 16, 32, 48, 100, 160, 512, 576]
DIMS = [*USUAL_DIMS, 257]
MORE_DIMS = [2, 33, 129, 255, 320, 1000, 1024]


def noting(recorded):
    """A stand-in for Bound.launch: appends (kernel, num_warps, arguments by name) to `recorded`."""

    def launch(bound, grid, tensors, numbers):
        kernel = bound.launcher.kernel
        arguments = dict(zip(kernel.arg_names, (*tensors, *numbers), strict=False)) | bound.constants
        recorded.append((kernel, bound.options["num_warps"], arguments))

    return launch


@functools.cache
def launches(shape, dtype, masked, varlen):
    """The launches of one call, recorded and not run: (kernel, num_warps, arguments)."""
    keys, heads, kv_heads, dim = shape
    recorded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bound, "launch", noting(recorded))
        query, key = torch.empty(2, heads, dim, dtype=dtype), torch.empty(2, keys, kv_heads, dim, dtype=dtype)
        plan = Plan.of(kv_heads, heads // kv_heads, keys, dim, dtype.itemsize, 132)
        if varlen:
            kernels.scores_varlen(query, key.flatten(0, 1), torch.zeros(3, dtype=torch.int32), keys, None, plan)
        else:
            kernels.scores(query, key, None, torch.ones(2, keys, dtype=torch.bool) if masked else None, plan)
    return recorded


def compiled(kernel, warps, arguments, arch):
    arguments = arguments | ({"OVERLAP": arch >= 90} if "OVERLAP" in arguments else {})
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(index,)] = POINTER[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )


def resources(cubin: bytes, path: Path) -> dict:
    path.write_bytes(cubin)
    out = subprocess.run([CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", out)}


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(s, marks=pytest.mark.slow) for s in MORE_SHAPES)], ids=str)
def test_registers_hold_everything(shape, dtype, arch, tmp_path):
    for kernel, warps, arguments in launches(shape, dtype, masked=True, varlen=False):
        binary = compiled(kernel, warps, arguments, arch)
        used = resources(binary.asm["cubin"], tmp_path / "kernel.cubin")
        assert 0 < used["REG"] <= 255
        assert used["STACK"] == used["LOCAL"] == 0, f"{kernel.__name__} spills: {used}"
        assert binary.metadata.shared <= SHARED_MEMORY[arch]


@pytest.mark.parametrize("arch", [90, *(pytest.param(a, marks=pytest.mark.slow) for a in (80, 100))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [*DIMS, *(pytest.param(d, marks=pytest.mark.slow) for d in MORE_DIMS)])
def test_any_head_dimension_fits(dim, dtype, arch, tmp_path):
    """With the max number of query heads per tile, and with a short item, which may take one launch."""
    for shape in [(4096, 32, 1, dim), (16, 16, 1, dim)]:
        for kernel, warps, arguments in launches(shape, dtype, masked=True, varlen=False):
            if kernel is kernels.mean_kernel.kernel:  # does not depend on D
                continue
            binary = compiled(kernel, warps, arguments, arch)
            used = resources(binary.asm["cubin"], tmp_path / "kernel.cubin")
            # For sm_100 ptxas limits some unusual D to 128 registers and spills two more.
            spilled = 8 if arch == 100 and dim not in USUAL_DIMS else 0
            assert used["STACK"] <= spilled, f"{kernel.__name__} spills: {used}"
            assert used["LOCAL"] == 0
            assert binary.metadata.shared <= SHARED_MEMORY[arch]
            assert binary.metadata.shared <= 64 << 10 or dim <= 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [64, 4096])
def test_varlen_compiles(keys, dtype, tmp_path):
    for kernel, warps, arguments in launches((keys, 28, 4, 128), dtype, masked=False, varlen=True):
        used = resources(compiled(kernel, warps, arguments, 90).asm["cubin"], tmp_path / "kernel.cubin")
        assert used["STACK"] == used["LOCAL"] == 0, f"{kernel.__name__} spills: {used}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_rounding_to_tf32(dtype):
    (split, *rest), _ = launches((4096, 28, 4, 128), dtype, masked=True, varlen=False)
    for arch in (80, 90, 100):
        ptx = compiled(split, *rest, arch).asm["ptx"]
        assert "tf32" not in ptx
        assert re.search(r"mma.*bf16|tcgen05.mma.*kind::f16", ptx)


def test_keys_are_copied_ahead_in_16_bytes():
    """The loop over keys is pipelined, even if strides are multiples of 8 elements only."""
    for shape in [(4096, 32, 8, 128), (4096, 1, 1, 72)]:
        (split, *rest), _ = launches(shape, torch.bfloat16, masked=True, varlen=False)
        copies = re.findall(
            r"cp\.async\.\w+\.shared\.global\S* .*?, (0x[0-9a-f]+|\d+),", compiled(split, *rest, 90).asm["ptx"]
        )
        assert copies
        assert {int(size, 0) for size in copies} == {16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 108, 132])
@pytest.mark.parametrize("group", [1, 4, 7, 17, 71, 128])
def test_plan_covers_every_key_and_head_once(dtype, multiprocessors, group):
    for kv_heads in (1, 8):
        for dim in (1, 8, 48, 64, 72, 128, 256, 257, 576):
            for keys in (1, 63, 320, 4097, 131072):
                plan = Plan.of(kv_heads, group, keys, dim, dtype.itemsize, multiprocessors)
                assert plan.tiles * plan.heads == group
                assert (plan.splits - 1) * plan.span < keys <= plan.splits * plan.span
                assert 1 <= plan.splits <= MAX_SPLITS
                assert plan.block & (plan.block - 1) == 0
                assert plan.span % plan.block == 0 or (plan.whole and plan.span <= plan.block)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_columns_cover_a_row_in_chunks_that_tl_dot_takes(itemsize):
    for dim in range(1, 1100):
        width, chunk = columns(dim, itemsize)
        assert dim <= width < dim + max(chunk, dim, 16)
        assert width % chunk == 0
        assert chunk >= 16
        assert chunk & (chunk - 1) == 0


def test_one_long_item_fills_the_gpu():
    for heads, kv_heads in [(32, 32), (32, 8), (28, 4)]:
        plan = Plan.of(kv_heads, heads // kv_heads, 32768, 128, 2, 132)
        assert plan.splits * kv_heads * plan.tiles >= 1.9 * 132


def test_is_compiled():
    assert not kernels.INTERPRETED
