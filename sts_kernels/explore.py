"""`python -m sts_kernels explore`: writes one HTML page that shows the tokens each method keeps, with quality measures.

The page holds precomputed numbers; no method runs in it. A nested method is run once, for all tokens: its first k picks
are its selection of k. Other methods are run once for each budget of `ladder`. Distances are L2 of features.
"""

import array
import base64
import io
import json
import math
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import __version__, _vision, analysis, methods
from ._cli import default_picture, describe, find_device, first_line, load_picture
from ._errors import UserError
from ._vision import Source, Tokens
from .methods import Method, Selection
from .methods._pool import ARGUMENTS
from .ops import pairwise_sqdist

if TYPE_CHECKING:
    from PIL.Image import Image

TEMPLATE = Path(__file__).with_name("explore.html")
SLOT = "/*DATA*/null"  # placeholder in the template
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}
GAP = 12  # pixels between a picture and its crops
LEVELS = 65535  # quantisation levels of a distance: 16 bits
MERGED = 0x8000  # flag in `stand_ins`: the token is merged into that slot, which need not be the nearest
MOST_TOKENS = 8192
SIGNALS = {"features": "features", "attention": "attention", "relevance": "prompt", "keys": "keys", "text": "prompt"}
USUAL = (320, 576, 640)  # budgets from papers, added to the ladder


class Subject(NamedTuple):
    """A picture on the page."""

    name: str
    tokens: Tokens


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE|FOLDER",
        help="photographs, and folders of them (default: the photograph that ships)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="which ones, in this order (default: all that the features allow)",
    )
    _vision.add_argument(parser)
    parser.add_argument(
        "--keep", type=int, metavar="K", help="budget shown first (default: 64, or a quarter of the tokens)"
    )
    parser.add_argument(
        "--crops",
        type=int,
        default=1,
        metavar="G",
        help="tokens of G x G crops beside those of the whole square, as LLaVA-NeXT has them (default: no crops)",
    )
    parser.add_argument(
        "--limit", type=int, default=24, metavar="N", help="pictures of the page (default: %(default)s)"
    )
    parser.add_argument("--out", default="explore.html", metavar="FILE", help="page to write (default: %(default)s)")
    parser.add_argument("--device", help="where to run (default: cuda if there is one, else cpu)")


def run(args: Namespace) -> int:
    if args.limit < 1:
        raise UserError(f"--limit must be at least 1, got {args.limit}")
    if args.crops < 1:
        raise UserError(f"--crops must be at least 1, got {args.crops}")
    device = find_device(args.device)
    found = files(args.images)
    names = distinct(found[: args.limit])
    pictures = {name: load_picture(path) for name, path in names.items()}
    source = _vision.source(args.features, device)
    tokens = source.side**2 * (1 + (args.crops**2 if args.crops > 1 else 0))
    if tokens > MOST_TOKENS:
        raise UserError(f"--crops {args.crops} makes {tokens} tokens, and the page takes {MOST_TOKENS}")
    if args.keep is not None and not 1 <= args.keep <= tokens:
        raise UserError(f"--keep must be between 1 and {tokens}, the number of tokens, got {args.keep}")
    subjects = [subject(name, picture, source, args.crops) for name, picture in pictures.items()]
    chosen, left_out = choose(args.methods, subjects[0].tokens)
    first = args.methods[0] if args.methods else "sts"
    data = page_data(subjects, source, chosen, left_out, args.keep or max(1, min(64, tokens // 4)), first)
    size = write(data, args.out)

    some = f" of {len(found)}, the first by name: --limit" if len(names) < len(found) else ""
    print(f"tokens    {subjects[0].tokens.patches}" + (f", {tokens} with the crops" if args.crops > 1 else ""))
    print(f"features  {source.what}, C = {subjects[0].tokens.features.shape[1]}, on {describe(device)}")
    print(f"pictures  {len(names)}{some}")
    print(f"methods   {', '.join(entry['name'] for entry in data['methods'])}")
    for entry in data["left_out"]:
        print(f"left out  {', '.join(entry['names'])}: {entry['why']}")
    if note := source.note():
        print(f"note      {note}")
    print(f"page      {args.out}, {size / 1e6:.1f} MB: open it in a browser; it needs no server and no network")
    return 0


def subject(name: str, picture: "Image", source: Source, crops: int) -> Subject:
    try:
        return Subject(name, _vision.tokens(source, picture, crops))
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def files(given: Sequence[str]) -> list[Path]:
    """Picture paths: files as given; a folder's files with an image suffix, sorted. Default: the shipped photograph."""
    found: list[Path] = []
    for path in [Path(name) for name in given] or [default_picture()]:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        if not inside:
            raise UserError(f"{path} has no pictures ({', '.join(sorted(SUFFIXES))})")
        found += inside
    return found


def distinct(paths: Sequence[Path]) -> dict[str, Path]:
    """Paths by unique name: the file name, or the full path if the file name is taken."""
    names: dict[str, Path] = {}
    for path in paths:
        name = path.name if path.name not in names else str(path)
        while name in names:
            name += " (again)"
        names[name] = path
    return names


def choose(names: Sequence[str] | None, tokens: Tokens) -> tuple[dict[str, Method], dict[str, str]]:
    """Methods with default options that can select from these tokens, and the reason for each one left out.

    names: the requested methods; None: all.

    Raises:
        UserError: a requested method cannot select from these tokens.
    """
    given = given_signals(tokens)
    chosen: dict[str, Method] = {}
    left_out: dict[str, str] = {}
    for name in dict.fromkeys(names or methods.names()):
        try:
            method = methods.create(name)
        except ValueError as error:
            raise UserError(f"--methods: {error}") from error
        missing = sorted({SIGNALS[signal] for signal in method.signals if signal not in given})
        if method.site is None:
            left_out[name] = "only inside the LLM, and no LLM runs here"
        elif missing:
            left_out[name] = f"no {' and '.join(missing)} to go by"
        else:
            chosen[name] = method
        if names and name in left_out:
            hint = "; --features dinov2 or MODEL gives it" if {*missing} & {"attention", "keys"} else ""
            raise UserError(f"--methods: {name} cannot be shown: {left_out[name]}{hint}")
    return chosen, left_out


def given_signals(tokens: Tokens) -> dict[str, Tensor]:
    """The available signals by name. There is no prompt, so no relevance."""
    given = {"features": tokens.features, "attention": tokens.attention, "keys": tokens.keys}
    return {name: value for name, value in given.items() if value is not None}


def ladder(tokens: int) -> list[int]:
    """Budgets of the curve points and of the runs of non-nested methods: 2^i, 3 * 2^(i-1), USUAL and `tokens`."""
    steps = {2**i * odd // 2 for i in range(tokens.bit_length() + 1) for odd in (2, 3)} | {*USUAL}
    return sorted({step for step in steps if step < tokens} | {tokens})


# ---- selections ------------------------------------------------------------------------------------------------------


def select(method: Method, tokens: Tokens, k: int) -> Selection:
    """Selection of one picture: order (k',) and assignment (N,) or None, indices over all its tokens.

    A method of scope "crop" splits k evenly over the squares.
    """
    items = tokens.squares if method.scope == "crop" else 1
    length = tokens.count // items
    budgets = methods.split_evenly(k, [length] * items)
    given = given_signals(tokens)
    arguments = {ARGUMENTS[signal]: given[signal] for signal in method.signals}
    packed = method.select_packed([length] * items, budgets, **arguments)
    device = tokens.features.device
    owner = torch.arange(items, device=device).repeat_interleave(torch.tensor(budgets, device=device))
    order = packed.order + owner * length
    if packed.assignment is not None:
        before = torch.tensor([sum(budgets[:i]) for i in range(items)], device=device).repeat_interleave(length)
        assignment = torch.where(packed.assignment >= 0, packed.assignment + before, -1)
        return Selection(order, assignment)
    if method.nested and items > 1:  # interleave the crops: a prefix of the picks is an even split of a smaller budget
        turn = torch.cat([torch.arange(budget, device=device) for budget in budgets])
        order = order[(turn * items + owner).argsort()]
    return Selection(order)


def replacements(distance: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each token, the picks of `order` that become its nearest kept token.

    Returns:
        number of such picks of each token, (N,); their indices in `order` and their distances, both concatenated over
        all tokens. The last one of a kept token is itself.
    """
    d = distance[:, order].clone()  # (N, picks)
    pick = torch.arange(order.numel(), device=order.device)
    d[order, pick] = -1.0  # below every distance: a kept token's nearest is itself, also among duplicates
    best = d.cummin(1).values
    nearer = torch.ones_like(d, dtype=torch.bool)
    nearer[:, 1:] = best[:, 1:] < best[:, :-1]
    return nearer.sum(1), pick.expand_as(d)[nearer], d[nearer].clamp(min=0)


def stand_ins(distance: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """The slot that represents each token, (N,), and the distance to that slot's token, (N,).

    A merged token has the slot that it is merged into, with the flag MERGED. Otherwise: a kept token's own slot, or the
    nearest kept token's.
    """
    order = selection.order
    d = distance[:, order].clone()
    d[order, torch.arange(order.numel(), device=order.device)] = -1.0
    slot = d.argmin(1)
    flag = torch.zeros_like(slot)
    if selection.assignment is not None:
        merged = selection.assignment >= 0
        slot = torch.where(merged, selection.assignment, slot)
        flag = torch.where(merged, MERGED, 0)
    return slot | flag, d.gather(1, slot[:, None])[:, 0].clamp(min=0)


def curve_point(tokens: Tokens, order: Tensor) -> dict[str, float]:
    """Measures of the kept tokens' own rows, without merging."""
    cover = analysis.coverage(tokens.features[None], order[None])
    point = {
        "erank": analysis.erank(tokens.features[order][None]).item(),
        "mean": cover.mean.item(),
        "largest": cover.largest.item(),
    }
    if tokens.attention is not None:
        point["attention"] = (tokens.attention[order].sum() / tokens.attention.sum()).item()
    return point


# ---- the page --------------------------------------------------------------------------------------------------------


def page_data(
    subjects: Sequence[Subject],
    source: Source,
    chosen: dict[str, Method],
    left_out: dict[str, str],
    keep: int,
    first: str = "sts",
) -> dict[str, Any]:
    """The page's data, ready for JSON. docs/explore.md describes the format."""
    tokens = subjects[0].tokens
    budgets = ladder(tokens.count)
    pixels = cell(subjects)
    pictures: list[dict[str, Any]] = []
    out = dict(left_out)
    for name, own in subjects:
        unit, found, refused = study(own, chosen, budgets)
        out.update(refused)
        pictures.append({"name": name, "jpeg": jpeg(sheet(own, pixels)), "unit": unit, "methods": found})
    shown = [name for name in chosen if name not in out]
    if not shown:
        raise UserError("no method can be shown: " + "; ".join(f"{name}: {why}" for name, why in out.items()))
    for picture in pictures:
        picture["methods"] = {name: picture["methods"][name] for name in shown}
    width, height, grids = layout(tokens, pixels)
    return {
        "version": __version__,
        "features": source.what,
        "note": source.note(),
        "tokens": tokens.count,
        "keep": keep,
        "first": shown.index(first) if first in shown else 0,
        "ladder": budgets,
        "sheet": [width, height],
        "grids": grids,
        "methods": [about(name, chosen[name]) for name in shown],
        "left_out": [{"names": [n for n in out if out[n] == why], "why": why} for why in dict.fromkeys(out.values())],
        "pictures": pictures,
    }


def about(name: str, method: Method) -> dict[str, Any]:
    return {
        "name": name,
        "paper": method.paper,
        "nested": method.nested,
        "scope": method.scope,
        "signals": sorted(method.signals),
    }


def study(
    tokens: Tokens, chosen: dict[str, Method], budgets: Sequence[int]
) -> tuple[float, dict[str, dict[str, Any]], dict[str, str]]:
    """(unit of distances, numbers by method, reason by method that refused)."""
    distance = pairwise_sqdist(tokens.features[None])[0].sqrt()
    unit = distance.max().item() / LEVELS or 1.0
    if not math.isfinite(unit):
        raise UserError("the features of a picture are not finite")
    everything = curve_point(tokens, torch.arange(tokens.count, device=distance.device))
    found: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for name, method in chosen.items():
        try:
            selections = {k: select(method, tokens, k) for k in ([tokens.count] if method.nested else budgets)}
        except (TypeError, ValueError) as error:
            refused[name] = first_line(error)
            continue
        last = selections[tokens.count].order
        points = [
            everything if k == tokens.count else curve_point(tokens, last[:k] if method.nested else selections[k].order)
            for k in budgets
        ]
        found[name] = {key: [float(f"{point[key]:.5g}") for point in points] for key in everything}
        if method.nested:
            counts, pick, away = replacements(distance, last)
            found[name] |= {"order": pack(last), "counts": pack(counts), "picks": pack(pick)}
            found[name]["distances"] = pack((away / unit).round())
        else:
            found[name]["runs"] = [run_of(distance, selections[k], unit) for k in budgets]
    return unit, found, refused


def run_of(distance: Tensor, selection: Selection, unit: float) -> dict[str, str]:
    slots, away = stand_ins(distance, selection)
    return {"order": pack(selection.order), "slots": pack(slots), "distances": pack((away / unit).round())}


def pack(values: Tensor) -> str:
    """Integers below 2^16 as base64 of little-endian 16 bits."""
    numbers = array.array("H", values.int().tolist())
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()


def cell(subjects: Sequence[Subject]) -> int:
    """Side of a token on the page in pixels: that of the picture (or crops) with the highest resolution."""
    shown = [(tokens.crops or (tokens.picture,))[0].width // tokens.side for _, tokens in subjects]
    return max(shown)


def layout(tokens: Tokens, cell: int) -> tuple[int, int, list[dict[str, int]]]:
    """Width and height of the sheet, and the position of each grid: the whole square, with the crops to its right."""
    side, edge = tokens.side, tokens.side * cell
    across = math.isqrt(len(tokens.crops))
    grids = [{"x": 0, "y": 0, "rows": side, "columns": side, "cell": cell}]
    for index in range(len(tokens.crops)):
        row, column = divmod(index, across)
        grids.append({**grids[0], "x": edge + GAP + column * edge, "y": row * edge})
    width = edge + (GAP + across * edge if across else 0)
    return width, max(1, across) * edge, grids


def sheet(tokens: Tokens, cell: int) -> "Image":
    """The picture, and its crops beside it."""
    from PIL import Image

    width, height, grids = layout(tokens, cell)
    canvas = Image.new("RGB", (width, height), "grey")
    for place, picture in zip(grids, (tokens.picture, *tokens.crops), strict=True):
        edge = cell * place["columns"]
        canvas.paste(picture.resize((edge, edge), Image.Resampling.BICUBIC), (place["x"], place["y"]))
    return canvas


def jpeg(picture: "Image") -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def write(data: dict[str, Any], path: str) -> int:
    """Writes the page, and returns its size in bytes."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = TEMPLATE.read_text(encoding="utf-8")
    head, tail = page.split(SLOT)
    encoded = f"{head}{text}{tail}".encode(errors="replace")
    try:
        Path(path).write_bytes(encoded)
    except OSError as error:
        raise UserError(f"cannot write the page {path}: {error.strerror or error}") from error
    return len(encoded)
