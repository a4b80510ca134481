"""`python -m sts_kernels table`: a paper's printed efficiency numbers beside the same numbers recomputed from sizes."""

import dataclasses
import importlib.util
import json
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from . import methods, papers
from ._errors import UserError

HEAD = ("where", "row", "number", "paper", "here", "off", "how")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--paper", choices=papers.names(), help="whose numbers")
    parser.add_argument("--json", action="store_true", help="print it as one JSON object")


def run(args: Namespace) -> int:
    if args.paper is None:
        *others, last = papers.names()
        raise UserError(f"--paper is required: {', '.join(others)} or {last}")
    paper = papers.load(args.paper)
    if args.json:
        json.dump(as_dict(args.paper, paper), sys.stdout, indent=2)
        print()
    else:
        print("\n\n".join([title(args.paper), *filter(None, (numbers(paper), notes(paper), accuracy(paper)))]))
    return 0


def title(name: str) -> str:
    return f"{name}: {methods.describe(name)['paper']}" if name in methods.names() else name


def as_dict(name: str, paper: papers.Paper) -> dict[str, Any]:
    rows = [{**dataclasses.asdict(number), "off": number.off} for number in paper.numbers]
    tables = [{**dataclasses.asdict(table), "command": table.command()} for table in paper.accuracy]
    return {
        "paper": title(name),
        "numbers": rows,
        "elsewhere": paper.elsewhere,
        "accuracy": tables,
        "accuracy_without_a_command": paper.impossible,
    }


def numbers(paper: papers.Paper) -> str:
    """One line per number, with a letter for its formula; the formulas follow below."""
    formulas = list(dict.fromkeys(number.formula for number in paper.numbers))
    lines = [HEAD]
    for number in paper.numbers:
        off = "" if number.off is None else f"{100 * number.off:+.1f} %"
        letter = chr(ord("a") + formulas.index(number.formula))
        cells = (
            number.table or "-",
            number.row,
            number.what,
            number.printed or "-",
            f"{number.computed:.4g}",
            off,
            letter,
        )
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {"where", "row", "number", "how"}
    table = [
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(HEAD, line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*table, "", *(f"{chr(ord('a') + index)}  {formula}" for index, formula in enumerate(formulas))])


def notes(paper: papers.Paper) -> str:
    rows: dict[str, dict[str, None]] = {}
    for number in paper.numbers:
        if number.note:
            rows.setdefault(number.note, {})[f"{number.table}, {number.row}"] = None
    lines = ["Notes", *(f"  {'; '.join(places)}: {note}" for note, places in rows.items())] if rows else []
    if paper.elsewhere:
        lines += ["", "Not computed: measured on a GPU or over data. `python -m bench.prefill` times ours"]
        lines += [f"  {line}" for line in paper.elsewhere]
    return "\n".join(lines).strip("\n")


def accuracy(paper: papers.Paper) -> str:
    """The lmms-eval commands that would measure accuracy; no results."""
    lines = [
        "Accuracy is not known here. lmms-eval would measure it, with prompts of its own: run the plain model, too"
    ]
    if importlib.util.find_spec("lmms_eval") is None:
        lines.append("lmms-eval is not installed; docs/evaluation.md says how")
    for table in paper.accuracy:
        lines += ["", table.table + (f": {table.note}" if table.note else ""), f"  {table.command()}"]
    if paper.impossible:
        lines += ["", "Without a command", *(f"  {line}" for line in paper.impossible)]
    return "\n".join(lines)
