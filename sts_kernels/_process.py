"""How Ctrl-C, a closed pipe and a failed write end `python -m sts_kernels`. Imports no torch."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

NAME = "python -m sts_kernels"


def starts_here() -> bool:
    """Whether `python -m sts_kernels` is starting: argv[0] is "-m" until Python has found __main__."""
    return sys.argv[:1] == ["-m"] and "sts_kernels" in sys.orig_argv


def end_on_interrupt() -> None:
    """Ctrl-C ends this process with one line and status 130.

    It exits at once, without KeyboardInterrupt: an import of torch or transformers may catch that exception, or a
    callback may print and drop it.
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
    """Runs `main` and flushes stdout -> exit status. A failed write prints one line, a closed pipe nothing."""
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
