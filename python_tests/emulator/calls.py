"""Calls of kernels by name: their arguments, how they run, and the judges of their results.

A call runs in the emulator's Python module, or, through a file, in the smoke program: on a GPU, or emulated under a
sanitizer. smoke.cpp describes the file.
"""

import os
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class At:
    """The address of element `offset` of an array."""

    array: np.ndarray
    offset: int


@dataclass(frozen=True)
class Call:
    name: str
    kernel: str
    args: tuple  # int, float, None, NumPy array or At, as the launcher takes them
    judge: Callable[..., None]  # asserts on the arrays among the arguments, after the call
    way: str = ""  # the kernel's algorithm, if the arguments choose one

    def __str__(self):
        return f"{self.kernel}-{self.name}"


def run_in(module, call: Call) -> list[np.ndarray]:
    """Runs `call` in the Python module, judges the arrays that come out, and returns them."""
    args, arrays = [], []
    for arg in call.args:
        if isinstance(arg, np.ndarray | At):
            at = arg if isinstance(arg, At) else At(arg, 0)
            arrays.append(np.array(at.array, order="C"))
            arg = arrays[-1], at.offset
        args.append(arg)
    module.run(call.kernel, *args)
    call.judge(*arrays)
    return arrays


# The first report ends the program.
SANITIZERS = {
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66 atexit_sleep_ms=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}


class Failure(AssertionError):
    """The program failed; the message is its output."""


def run_program(command: Sequence[str], calls: Sequence[Call], folder: Path, timeout: float = 300, env=None) -> None:
    """Runs all `calls` in one run of the smoke program `command` and judges each result."""
    given, output = folder / "calls.bin", folder / "output.bin"
    given.write_bytes(encode(calls))
    output.unlink(missing_ok=True)
    try:
        run = subprocess.run(
            [*command, str(given), str(output)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env={**os.environ, **SANITIZERS, **(env or {})},
        )
    except subprocess.TimeoutExpired as error:
        raise Failure(f"still running after {timeout} s:\n{(error.stdout or b'')[-500:].decode()}") from None
    if run.returncode != 0:
        raise Failure(f"exit status {run.returncode}\n{run.stdout[-500:]}\n{run.stderr[:8000]}")
    for call, arrays in zip(calls, decode(calls, output.read_bytes()), strict=True):
        try:
            call.judge(*arrays)
        except AssertionError as error:
            raise AssertionError(f"{call}: {error}") from error


def encode(calls: Sequence[Call]) -> bytes:
    parts = [b"STSCALLS", struct.pack("Q", len(calls))]
    for call in calls:
        name = call.kernel.encode()
        parts += [struct.pack("Q", len(name)), name, struct.pack("Q", len(call.args))]
        parts += map(_encode_argument, call.args)
    return b"".join(parts)


def _encode_argument(arg) -> bytes:
    if arg is None:
        return struct.pack("Q", 0)
    if isinstance(arg, int):
        return struct.pack("Qq", 1, arg)
    if isinstance(arg, float):
        return struct.pack("Qd", 2, arg)
    at = arg if isinstance(arg, At) else At(arg, 0)
    array = np.ascontiguousarray(at.array)
    return struct.pack("QQQQ", 3, array.itemsize, array.size, at.offset) + array.tobytes()


def decode(calls: Sequence[Call], output: bytes) -> list[list[np.ndarray]]:
    """The arrays of each call as the program left them."""
    results, position = [], 0
    for call in calls:
        position += 8  # the i64 answer (smoke.cpp)
        arrays = []
        for arg in call.args:
            if not isinstance(arg, np.ndarray | At):
                continue
            array = arg.array if isinstance(arg, At) else arg
            data = np.frombuffer(output, array.dtype, array.size, position)
            arrays.append(data.reshape(array.shape).copy())
            position += array.nbytes
        results.append(arrays)
    assert position == len(output), f"the program wrote {len(output)} bytes, expected {position}"
    return results
