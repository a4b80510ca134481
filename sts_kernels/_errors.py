"""Errors that end a command, and what to type against them."""

import importlib.util
import shlex
import shutil
import sys

REQUIREMENTS = {"torch": "torch>=2.10", "pillow": "pillow>=10.1", "transformers": "transformers>=4.57"}


class UserError(Exception):
    """What was asked for cannot be done; the command line prints the message as one line and exits with status 2."""


def needs(*packages: str) -> str:
    """Packages that are missing, and the command that installs them."""
    return f"{' and '.join(packages)}: {install(*(REQUIREMENTS[package] for package in packages))}"


def install(*arguments: str) -> str:
    """The command that installs into this environment, as one types it: with pip, or uv where there is no pip."""
    active = shutil.which("python") == sys.executable
    if importlib.util.find_spec("pip") is not None:
        command = ["python" if active else sys.executable, "-m", "pip", "install"]
    else:
        command = ["uv", "pip", "install", *([] if active else ["--python", sys.executable])]
    return shlex.join([*command, *arguments])
