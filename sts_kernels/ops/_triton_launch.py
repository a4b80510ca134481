"""Launches of Triton kernels from the host.

What: `kernel[grid](...)` binds, specializes and hashes all arguments on every call: 50 to 70 us of host time. A `Bound`
kernel does so once per variant. Later calls pass their arguments straight to the compiled kernel.
Chosen when: the Triton version is in `KNOWN`, no launch hook is set (a profiler must see all launches), and the kernel
is compiled, not interpreted. Otherwise the launch is `kernel[grid](...)`.
Steps:
    (1) key of the variant: all that Triton specializes on besides constexpr parameters and options. That is the device,
        the dtype and 16-byte alignment of each tensor, and the width of integers;
    (2) first launch of a variant: `kernel[grid](...)` compiles, launches and returns the compiled kernel;
    (3) later launches: run the compiled kernel.
Synchronisation: none. The dict of variants only grows. Two threads may both take step (2), which Triton allows.
"""

import functools
import importlib.metadata
import logging
import math
import re
from collections.abc import Hashable
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

KNOWN = (3, 4), (3, 10)  # versions [first, end) whose compiled kernels take these arguments
# Of a launch. Triton multiplies the sides of a grid in 32 bits, and launches nothing where the product wraps.
MOST_PROGRAMS = (1 << 31) - 1
WIDE = 1 << 31  # smaller integers are passed as 32 bits

_log = logging.getLogger("sts_kernels")


def knows(version: str) -> bool:
    """Whether compiled kernels of this version of Triton can be launched without `kernel[grid]`."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and KNOWN[0] <= (int(numbers[1]), int(numbers[2])) < KNOWN[1]


def how() -> str:
    """How kernels are launched, for the user. Does not import Triton."""
    for name in ("triton", "pytorch-triton"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return "triton is installed" if knows(version) else f"triton is installed; {_unknown(version)}"
    return "triton is installed, its version unknown"


def _unknown(version: str) -> str:
    first, end = (".".join(map(str, numbers)) for numbers in KNOWN)
    return (
        f"version {version} launches kernels by kernel[grid], which takes the host about 60 us a launch longer than "
        f"versions from {first} up to and without {end}"
    )


class Launcher:
    """Decorator of a `triton.jit` kernel. Parameter order: tensors, numbers, constexpr. Integers are in
    do_not_specialize."""

    def __init__(self, kernel: "JITFunction"):
        import triton
        from triton.compiler import CompiledKernel
        from triton.runtime import driver

        functools.update_wrapper(self, kernel.fn)  # type: ignore[arg-type]
        self.kernel, self.driver, self.knobs, self.compiled_type = kernel, driver, triton.knobs.runtime, CompiledKernel
        self.direct = not self.knobs.interpret and knows(triton.__version__)
        if not self.direct and not self.knobs.interpret:
            _log.debug("triton: %s", _unknown(triton.__version__))

    def bind(self, num_warps: int, launch_pdl: bool = False, **constants: int | str) -> "Bound":
        """The kernel with all its constexpr parameters. Keep the result: it caches the compiled kernels.

        Args:
            launch_pdl: programmatic dependent launch. The kernel may start before the previous kernel ends and calls
                gdc_wait itself.
        """
        # Fusion is set explicitly: its default depends on the version of Triton.
        options = {"num_warps": num_warps, "enable_fp_fusion": True} | ({"launch_pdl": True} if launch_pdl else {})
        return Bound(self, constants, options)

    def observed(self) -> bool:
        """Whether a hook must see every launch."""
        for hook in (self.knobs.launch_enter_hook, self.knobs.launch_exit_hook):
            if hook is not None and getattr(hook, "calls", True):  # a chain of hooks; in older versions one hook
                return True
        return bool(self.kernel.pre_run_hooks)


class Bound:
    def __init__(self, launcher: Launcher, constants: dict[str, int | str], options: dict[str, int]):
        self.launcher, self.constants, self.options = launcher, constants, options
        names = launcher.kernel.arg_names
        self._in_order = [constants[name] for name in names[len(names) - len(constants) :]]
        self._compiled: dict[tuple[Hashable, ...], CompiledKernel] = {}

    def launch(self, grid: tuple[int, ...], tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...]) -> None:
        """Launches on the current device and stream.

        Args:
            tensors: the kernel's tensor parameters in order; None for an absent tensor.
            numbers: its number parameters in order; integers are at least 0.
        """
        if math.prod(grid) > MOST_PROGRAMS:
            sides = " x ".join(map(str, grid))
            raise ValueError(
                f"{sides} programs are more than a launch may have, {MOST_PROGRAMS}: pass fewer or shorter items"
            )
        launcher = self.launcher
        if not launcher.direct or launcher.observed():
            self.launch_by_triton(grid, tensors, numbers)
            return
        driver = launcher.driver.active
        device = driver.get_current_device()
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        wide = max(numbers) >= WIDE and tuple(number >= WIDE for number in numbers)
        kinds = [None if tensor is None else tensor.dtype for tensor in tensors]
        aligned = [address is not None and address % 16 == 0 for address in addresses]
        variant = (device, wide, *kinds, *aligned)  # (1)
        compiled = self._compiled.get(variant)
        if compiled is None:
            compiled = self.launch_by_triton(grid, tensors, numbers)  # (2)
            if type(compiled) is launcher.compiled_type:  # not a future of async compilation, nor None
                self._compiled[variant] = compiled
            return
        x, y, z = (*grid, 1, 1)[:3]
        stream = driver.get_current_stream(device)
        function, metadata = compiled.function, compiled.packed_metadata
        # None: launch metadata, enter hook, exit hook.
        compiled.run(
            x, y, z, stream, function, metadata, None, None, None, *addresses, *numbers, *self._in_order
        )  # (3)

    def launch_by_triton(
        self, grid: tuple[int, ...], tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...]
    ) -> "CompiledKernel | None":
        return self.launcher.kernel[grid](*tensors, *numbers, **self.constants, **self.options)
