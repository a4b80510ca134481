"""Errors that end a command, and the install commands in their messages."""

import importlib.metadata
import shlex
import shutil
import sys

REQUIREMENTS = {"torch": "torch>=2.10", "pillow": "pillow>=10.1", "transformers": "transformers>=4.57"}


class UserError(Exception):
    """A request that cannot be served. The command line prints the message as one line and exits with status 2."""


def needs(*packages: str) -> str:
    """Text: the missing packages and the command that installs them."""
    return f"{' and '.join(packages)}: {install(*(REQUIREMENTS[package] for package in packages))}"


def has_pip() -> bool:
    """Whether pip is installed.

    Not by find_spec: before Python 3.12 setuptools then disables its distutils, which torch.compile needs.
    """
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def install(*arguments: str) -> str:
    """The shell command that installs into this environment: pip, or uv if pip is missing."""
    active = shutil.which("python") == sys.executable
    if has_pip():
        command = ["python" if active else sys.executable, "-m", "pip", "install"]
    else:
        command = ["uv", "pip", "install", *([] if active else ["--python", sys.executable])]
    return shlex.join([*command, *arguments])
