"""`python -m sts_kernels` as a process among others: how Ctrl-C and a closed pipe end it. Needs no torch."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

NAME = "python -m sts_kernels"


def starts_here() -> bool:
    """This is `python -m sts_kernels`, and not yet at its __main__: while Python looks for it, argv[0] is "-m"."""
    return sys.argv[:1] == ["-m"] and "sts_kernels" in sys.orig_argv


def end_on_interrupt() -> None:
    """Ctrl-C ends this process with one line and status 130.

    At once, and not by KeyboardInterrupt: while torch or transformers are imported that may be caught, or printed from
    a callback and forgotten.
    """

    def end(signum: Any, frame: Any) -> None:
        try:
            sys.stdout.flush()
        finally:
            newline = "\n" if os.isatty(2) else ""  # a terminal has echoed ^C
            os.write(2, f"{newline}{NAME}: interrupted\n".encode())
            os._exit(128 + signum)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as under nohup
        signal.signal(signal.SIGINT, end)


def run(main: Callable[[], int]) -> int:
    """The exit status of `main`, with its output written: what stops that is one line, and a reader who left none."""
    try:
        try:
            return main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more at exit
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        print(f"{NAME}: cannot write the output: {error.strerror or error}", file=sys.stderr)
        return 2
