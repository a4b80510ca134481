"""Calls of kernels by name: what goes in, how they are run, what must come out.

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
class Workspace:
    """An array of as many bytes as the kernel table's function `question` answers."""

    question: str
    args: tuple


@dataclass(frozen=True)
class Call:
    name: str
    kernel: str
    args: tuple  # int, float, None, NumPy array, At or Workspace, as the launcher takes them
    judge: Callable[..., None]  # of the arguments after the call, arrays only; asserts

    def __str__(self):
        return f"{self.kernel}-{self.name}"


def run_in(module, call: Call) -> list[np.ndarray]:
    """Runs `call` in the Python module, judges the arrays that come out, and returns them."""
    arrays = []

    def given(arg):
        if isinstance(arg, Workspace):
            return np.full(module.run(arg.question, *map(given, arg.args)), 0xFF, np.uint8)
        if not isinstance(arg, np.ndarray | At):
            return arg
        at = arg if isinstance(arg, At) else At(arg, 0)
        arrays.append(np.array(at.array, order="C"))
        return arrays[-1], at.offset

    args = [given(arg) for arg in call.args]
    arrays[:] = [arg[0] for arg in args if isinstance(arg, tuple)]
    module.run(call.kernel, *args)
    call.judge(*arrays)
    return arrays


class Failure(AssertionError):
    """The program did not end well; the message is what it said."""


def run_program(command: Sequence[str], calls: Sequence[Call], folder: Path, timeout: float = 300, env=None) -> None:
    """Runs all `calls` in one run of the smoke program `command` and judges what comes out of each."""
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
            env=env and {**os.environ, **env},
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
    entries = [entry for call in calls for entry in _entries(call)]
    parts = [b"STSCALLS", struct.pack("Q", len(entries))]
    for name, args in entries:
        parts += [struct.pack("Q", len(name)), name.encode(), struct.pack("Q", len(args)), *map(_encode_argument, args)]
    return b"".join(parts)


def _entries(call: Call) -> list[tuple[str, tuple]]:
    """A call in the file, after the question about its workspace if it has one."""
    questions = [(arg.question, arg.args) for arg in call.args if isinstance(arg, Workspace)]
    assert len(questions) <= 1, "the file can hold one workspace a call"
    return [*questions, (call.kernel, call.args)]


def _encode_argument(arg) -> bytes:
    if arg is None:
        return struct.pack("Q", 0)
    if isinstance(arg, int):
        return struct.pack("Qq", 1, arg)
    if isinstance(arg, float):
        return struct.pack("Qd", 2, arg)
    if isinstance(arg, Workspace):
        return struct.pack("Q", 4)
    at = arg if isinstance(arg, At) else At(arg, 0)
    array = np.ascontiguousarray(at.array)
    return struct.pack("QQQQ", 3, array.itemsize, array.size, at.offset) + array.tobytes()


def decode(calls: Sequence[Call], output: bytes) -> list[list[np.ndarray]]:
    """The arrays of each call as the program left them."""
    results, position = [], 0
    for call in calls:
        for _, args in _entries(call):
            position += 8  # the answer
            arrays = []
            for arg in args:
                if not isinstance(arg, np.ndarray | At):
                    continue
                array = arg.array if isinstance(arg, At) else arg
                data = np.frombuffer(output, array.dtype, array.size, position)
                arrays.append(data.reshape(array.shape).copy())
                position += array.nbytes
        results.append(arrays)
    assert position == len(output), f"the program wrote {len(output)} bytes, expected {position}"
    return results
