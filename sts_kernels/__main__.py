"""Command line: `python -m sts_kernels COMMAND`."""

import argparse
import importlib
import sys
from types import ModuleType
from typing import NoReturn

from . import __version__, _process, _torch_error
from ._errors import UserError

# Each command is a module of this package with add_arguments(parser) and run(args), imported on use.
COMMANDS = {
    "info": "show which backend serves each op and why, versions and build",
    "demo": "choose visual tokens of a photograph and draw them",
    "explore": "write a page that shows what each method keeps of your pictures",
    "methods": "list the pruning methods, where each acts, and its options",
    "table": "print the efficiency numbers of a paper beside those that sizes alone give",
    "generate": "ask a vision-language model about pictures, with pruned visual tokens",
}
MODULES = {"methods": "list_methods"}  # modules not named like their command


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog=_process.NAME, description="Visual-token pruning for vision-language models.")
    parser.add_argument("--version", action="version", version=f"sts_kernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    command: ModuleType | None = None
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        if argv[:1] == [name]:
            if _torch_error and name != "info":
                subparser.error(_torch_error)
            try:
                command = importlib.import_module(f".{MODULES.get(name, name)}", __package__)
            except ImportError as error:
                subparser.error(str(error))
            command.add_arguments(subparser)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        assert command is not None  # argparse has found its name
        return int(command.run(args))
    except UserError as error:
        parser.exit(2, f"{parser.prog} {args.command}: {error}\n")


if __name__ == "__main__":
    sys.exit(_process.run(main))
