"""`python -m sts_kernels demo`: splits a photograph into visual tokens, selects some, and shows the selection."""

import json
import math
import random
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _vision, analysis
from ._cli import default_picture, describe, find_device, load_picture, save
from ._errors import UserError
from ._registry import OPS
from ._vision import Tokens
from .ops import repulsion_select

if TYPE_CHECKING:
    from PIL.Image import Image

DIMMED = 0.25  # brightness of a dropped patch
PANEL, MARGIN, CAPTION = 336, 12, 28  # pixels
MEASURES = {  # measure of the kept tokens -> column title
    "erank": "effective rank",
    "mean": "mean distance",
    "largest": "largest distance",
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "image",
        nargs="?",
        metavar="IMAGE",
        help="a photograph (default: the one that ships); what is transparent in it is taken as white",
    )
    parser.add_argument("--keep", type=int, default=64, metavar="K", help="tokens to keep (default: %(default)s)")
    _vision.add_argument(parser)
    parser.add_argument("--out", default="kept.png", metavar="FILE", help="picture to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice (default: %(default)s)")
    parser.add_argument("--device", help="where to run (default: cuda if there is one, else cpu)")
    parser.add_argument("--json", action="store_true", help="print it as one JSON object")


def run(args: Namespace) -> int:
    device = find_device(args.device)
    picture = load_picture(args.image or default_picture())
    source = _vision.source(args.features, device)
    tokens = _vision.tokens(source, picture)
    if not 1 <= args.keep <= tokens.count:
        raise UserError(f"--keep must be between 1 and {tokens.count}, the number of tokens, got {args.keep}")

    batch = tokens.features[None]
    kept = repulsion_select(batch, args.keep)[0]
    choices = {
        "repulsion_select": kept.cpu(),
        "uniform grid": uniform_choice(tokens.side, args.keep),
        "random": random_choice(tokens.count, args.keep, args.seed),
    }
    save(draw(tokens, choices), args.out)
    result = {
        "tokens": tokens.count,
        "grid": [tokens.side, tokens.side],
        "keep": args.keep,
        "features": tokens.what,
        "trained": source.trained,
        "channels": tokens.features.shape[1],
        "backend": OPS["repulsion_select"].backend(device.type.upper()),
        "device": describe(device),
        "milliseconds": {
            "repulsion_select": median_ms(lambda: repulsion_select(batch, args.keep), device),
            "pytorch_loop": median_ms(lambda: pytorch_loop(tokens.features, args.keep), device),
        },
        "choices": {
            name: {"kept": choice.tolist(), **measures(tokens.features, choice.to(device))}
            for name, choice in choices.items()
        },
        "picture": args.out,
        "note": source.note(),
    }
    if args.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        print(text(result, tokens))
    return 0


def text(result: dict[str, Any], tokens: Tokens) -> str:
    ours, loop = result["milliseconds"].values()
    head = [
        f"tokens    {tokens.patches} in the centre crop, {result['keep']} kept",
        f"features  {result['features']}, C = {result['channels']}, float32",
        f"backend   {result['backend']}, on {result['device']}",
        f"time      {ours:.4g} ms; the direct PyTorch loop takes {loop:.4g} ms, {loop / ours:.1f}x (medians)",
    ]
    table = [f"{'kept tokens':<24}" + "".join(f"{title:>18}" for title in MEASURES.values())]
    for name, choice in result["choices"].items():
        table.append(f"  {name:<22}" + "".join(f"{choice[key]:>18.4g}" for key in MEASURES))
    tail = [
        "effective rank: how many directions the kept tokens span. Distances: L2, of a token to its nearest kept one",
        f"picture   {result['picture']}: kept tokens bright, dropped ones dimmed",
    ]
    if result["note"]:
        tail.append(f"note      {result['note']}")
    return "\n\n".join("\n".join(lines) for lines in (head, table, tail))


def measures(features: Tensor, kept: Tensor) -> dict[str, float]:
    """Values of `MEASURES` by name. A kept token's nearest kept token is itself."""
    cover = analysis.coverage(features[None], kept[None])
    return {
        "erank": analysis.erank(features[kept][None]).item(),
        "mean": cover.mean.item(),
        "largest": cover.largest.item(),
    }


def uniform_choice(side: int, keep: int) -> Tensor:
    """`keep` distinct tokens spread evenly over the grid: equally spaced rows, each with an equal share."""
    rows = min(side, max(math.isqrt(keep), -(-keep // side)))
    chosen = []
    for row in range(rows):
        y = (2 * row + 1) * side // (2 * rows)
        share = (row + 1) * keep // rows - row * keep // rows
        chosen += [y * side + (2 * column + 1) * side // (2 * share) for column in range(share)]
    return torch.tensor(chosen)


def random_choice(tokens: int, keep: int, seed: int) -> Tensor:
    return torch.tensor(random.Random(seed).sample(range(tokens), keep))


def pytorch_loop(features: Tensor, keep: int, eps: float = 1e-6) -> Tensor:
    """Algorithm 1 of STS for one item in plain PyTorch: the baseline that `repulsion_select` is timed against."""
    potential = features.new_zeros(features.shape[0])
    token = (features - features.mean(0)).square().sum(-1).argmin()
    picked = []
    for _ in range(keep):
        picked.append(token)
        potential += 1 / ((features - features[token]).square().sum(-1) + eps)
        potential[token] = math.inf
        token = potential.argmin()
    return torch.stack(picked)


def median_ms(function: Callable[[], object], device: torch.device, runs: int = 9, seconds: float = 1.0) -> float:
    """Median wall time of a call, kernels included. Slow calls run fewer times than `runs`, at least 3.

    The first run may be slow; the median is robust to it.
    """

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times: list[float] = []
    while len(times) < 3 or (len(times) < runs and sum(times) < seconds):
        finish()
        start = time.perf_counter()
        function()
        finish()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def draw(tokens: Tokens, choices: dict[str, Tensor], columns: int | None = None, panel: int = PANEL) -> "Image":
    """Draws the choices as panels in rows of `columns`, dropped patches dimmed. Panels are at least `panel` px wide."""
    from PIL import Image, ImageDraw, ImageFont

    columns = columns or len(choices)
    rows = -(-len(choices) // columns)
    panel = tokens.picture.width * -(-panel // tokens.picture.width)
    bright = tokens.picture.resize((panel, panel), Image.Resampling.NEAREST)
    dark = bright.point(lambda value: int(DIMMED * value))
    width, height = panel + MARGIN, CAPTION + panel
    canvas = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=16)
    for index, (name, kept) in enumerate(choices.items()):
        left, top = MARGIN + index % columns * width, index // columns * height
        caption = f"{name}: {kept.numel()} of {tokens.count} tokens"
        caption = caption if font.getlength(caption) <= panel else name
        pen.text((left + panel // 2, top + CAPTION // 2), caption, fill="black", font=font, anchor="mm")
        mask = Image.new("L", (tokens.side, tokens.side))
        for token in kept.tolist():
            mask.putpixel((token % tokens.side, token // tokens.side), 255)
        mask = mask.resize((panel, panel), Image.Resampling.NEAREST)
        canvas.paste(Image.composite(bright, dark, mask), (left, top + CAPTION))
    return canvas
