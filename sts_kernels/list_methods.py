"""`python -m sts_kernels methods`: lists the pruning methods, where each acts, its signals and its options."""

import json
import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from . import methods

SITES = {"encoder": "before the projector", "projected": "after the projector"}
QUERIES = {
    "last": "the attention of the prompt's last token",
    "raters": "the attention of rater tokens",
    "keys": "likeness to pivots, the tokens of largest keys",
    "text": "likeness to rater tokens",
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print it as one JSON object")


def run(args: Namespace) -> int:
    described = [methods.describe(name) for name in methods.names()]
    if args.json:
        json.dump({entry["name"]: entry for entry in described}, sys.stdout, indent=2, default=str)
        print()
        return 0
    print("\n\n".join(map(text, described)))
    return 0


def text(entry: dict[str, Any]) -> str:
    lines = [entry["name"], f"  paper      {entry['paper']}", f"  acts       {'; '.join(places(entry))}"]
    if entry["signals"]:
        lines.append(f"  looks at   {', '.join(entry['signals'])} of the visual tokens")
    lines.append(f"  takes      {', '.join(entry['takes'])}")
    if entry["site"]:
        lines.append(f"  selects    from one {entry['scope']} at once")
    if entry["positions"] == "contiguous":
        lines.append("  positions  numbered anew")
    width = max(map(len, entry["options"]), default=0)
    for index, (name, option) in enumerate(entry["options"].items()):
        label = "options" if not index else ""
        lines.append(f"  {label:<9}  {name:<{width}}  {option['default']}: {option['doc']}")
    return "\n".join(lines)


def places(entry: dict[str, Any]) -> list[str]:
    """Where the method acts, for an LLM of 32 layers."""
    found = [SITES[entry["site"]]] if entry["site"] else []
    if cuts := entry["cuts"]:
        layers = ", ".join(str(cut["layer"]) for cut in cuts)
        ahead = ", by the next layer's query and key" if cuts[0]["score_from"] == "next" else ""
        found.append(f"after {layers} of 32 layers by {QUERIES[cuts[0]['queries']]}{ahead}")
    return found
