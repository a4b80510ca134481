"""`python -m sts_kernels demo`: cuts a photograph into visual tokens, keeps some of them, and shows which."""

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import repulsion_select
from ._cli import default_picture, describe, find_device, first_line, load_picture, save
from ._errors import UserError, needs
from ._registry import OPS

PATCH_SIZE, PATCH_GRID = 14, 24  # 336 pixels a side, as CLIP ViT-L/14 at 336 pixels sees a picture
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VISION_MODELS = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}
PATCHES = "{side} x {side} = {count} patches of {size} x {size} pixels"
DIMMED = 0.25  # brightness of a dropped patch
PANEL, MARGIN, CAPTION = 336, 12, 28  # pixels


@dataclass(frozen=True)
class Tokens:
    features: torch.Tensor  # (N, C) float32, row by row over the grid
    picture: "PIL.Image.Image"  # the square that the grid covers  # noqa: F821
    side: int  # the grid is side x side = N tokens
    what: str  # what the features are, for people

    @property
    def count(self) -> int:
        return self.features.shape[0]

    @property
    def patches(self) -> str:
        return PATCHES.format(side=self.side, count=self.count, size=self.picture.width // self.side)


def add_arguments(parser) -> None:
    patches = PATCHES.format(side=PATCH_GRID, count=PATCH_GRID**2, size=PATCH_SIZE)
    parser.add_argument(
        "image",
        nargs="?",
        metavar="IMAGE",
        help="a photograph (default: the one that ships); what is transparent in it is taken as white",
    )
    parser.add_argument("--keep", type=int, default=64, metavar="K", help="tokens to keep (default: %(default)s)")
    parser.add_argument(
        "--features",
        default="patches",
        metavar="patches|MODEL",
        help=f"patches: normalised RGB values of {patches} (default); else a local directory or hub id of a CLIP or "
        "SigLIP vision model, whose penultimate layer is taken",
    )
    parser.add_argument("--out", default="kept.png", metavar="FILE", help="picture to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice (default: %(default)s)")
    parser.add_argument("--device", help="where to run (default: cuda if there is one, else cpu)")


def run(args) -> int:
    device = find_device(args.device)
    picture = load_picture(args.image or default_picture())
    if args.features == "patches":
        tokens = patch_tokens(picture, device)
    else:
        tokens = model_tokens(picture, args.features, device)
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

    ours = median_ms(lambda: repulsion_select(batch, args.keep), device)
    loop = median_ms(lambda: pytorch_loop(tokens.features, args.keep), device)
    backend = OPS["repulsion_select"].backend(device.type.upper())
    print(f"tokens    {tokens.patches} in the centre crop, {args.keep} kept")
    print(f"features  {tokens.what}, C = {tokens.features.shape[1]}, float32")
    print(f"backend   {backend}, on {describe(device)}")
    print(f"time      {ours:.4g} ms; the direct PyTorch loop takes {loop:.4g} ms, {loop / ours:.1f}x (medians)")
    print()
    print(f"{'L2 distance of a dropped token to its nearest kept one':<56}{'mean':>10}{'largest':>10}")
    for name, choice in choices.items():
        mean, largest = coverage(tokens.features, choice.to(device))
        print(f"  {name:<54}{mean:>10.4g}{largest:>10.4g}")
    print(f"\npicture   {args.out}: kept tokens bright, dropped ones dimmed")
    return 0


def centre_crop(picture, size: int, side: int):
    """The square in the middle of the picture, scaled to size x size pixels."""
    from PIL import Image

    width, height = picture.size
    short = min(width, height)
    if short < side:
        raise UserError(
            f"the image is too small: its shorter side must have at least {side} pixels, one for each token of the "
            f"{side} x {side} grid, got {width} x {height}"
        )
    left, top = (width - short) / 2, (height - short) / 2
    return picture.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + short, top + short))


def patch_tokens(picture, device: torch.device) -> Tokens:
    side, patch = PATCH_GRID, PATCH_SIZE
    crop = centre_crop(picture, side * patch, side)
    pixels = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8).view(side, patch, side, patch, 3).to(device)
    values = (pixels / 255 - torch.tensor(CLIP_MEAN, device=device)) / torch.tensor(CLIP_STD, device=device)
    features = values.transpose(1, 2).reshape(side * side, -1)
    return Tokens(features, crop, side, "normalised RGB values: pixels, not a model's features")


def model_tokens(picture, name: str, device: torch.device) -> Tokens:
    """Tokens as LLaVA takes them from its vision model: the penultimate layer, without the CLS token."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"--features MODEL needs {needs('transformers', 'pillow')}") from error
    if Path(name).is_dir() and not Path(name, "config.json").exists():
        raise UserError(f"cannot load the model {name}: the folder has no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:
        raise UserError(f"cannot load the model {name}: {first_line(error)}") from error
    if config.model_type not in VISION_MODELS:
        raise UserError(f"{name} must be a CLIP or SigLIP vision model, got model type {config.model_type!r}")
    vision = getattr(config, "vision_config", config)
    side = vision.image_size // vision.patch_size
    crop = centre_crop(picture, vision.image_size, side)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # else it lists the weights of the text half, left out here
    try:
        model_class = getattr(transformers, VISION_MODELS[config.model_type])
        model, loaded = model_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        if loaded["missing_keys"]:
            raise ValueError(f"it lacks weights, {sorted(loaded['missing_keys'])[0]} for one")
        inputs = transformers.AutoImageProcessor.from_pretrained(name)(images=crop, return_tensors="pt").to(device)
        with torch.inference_mode():
            features = model.eval().to(device)(**inputs, output_hidden_states=True).hidden_states[-2][0]
    except Exception as error:
        raise UserError(f"cannot take features from the model {name}: {first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    features = features[-side * side :].contiguous()  # CLIP puts its CLS token first, SigLIP has none
    if features.shape[0] != side * side:
        raise UserError(f"{name} gives {features.shape[0]} tokens where {side} x {side} patches were expected")
    seen = side * vision.patch_size  # SigLIP's 384 pixels are not a multiple of its 14-pixel patches
    return Tokens(features, crop.crop((0, 0, seen, seen)), side, f"penultimate layer of {name}")


def uniform_choice(side: int, keep: int) -> torch.Tensor:
    """`keep` distinct tokens spread evenly over the grid: rows at equal distances, each with its share."""
    rows = min(side, max(math.isqrt(keep), -(-keep // side)))
    chosen = []
    for row in range(rows):
        y = (2 * row + 1) * side // (2 * rows)
        share = (row + 1) * keep // rows - row * keep // rows
        chosen += [y * side + (2 * column + 1) * side // (2 * share) for column in range(share)]
    return torch.tensor(chosen)


def random_choice(tokens: int, keep: int, seed: int) -> torch.Tensor:
    return torch.tensor(random.Random(seed).sample(range(tokens), keep))


def pytorch_loop(features: torch.Tensor, keep: int, eps: float = 1e-6) -> torch.Tensor:
    """Algorithm 1 of STS for one item, as one writes it in PyTorch: what `repulsion_select` is timed against."""
    potential = features.new_zeros(features.shape[0])
    token = (features - features.mean(0)).square().sum(-1).argmin()
    picked = []
    for _ in range(keep):
        picked.append(token)
        potential += 1 / ((features - features[token]).square().sum(-1) + eps)
        potential[token] = math.inf
        token = potential.argmin()
    return torch.stack(picked)


def median_ms(function: Callable, device: torch.device, runs: int = 9, seconds: float = 1.0) -> float:
    """Median wall time of a call with its kernels finished; fewer runs, but three, where they take long.

    The first run may be slow: the median leaves it out.
    """

    def finish():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    while len(times) < 3 or (len(times) < runs and sum(times) < seconds):
        finish()
        start = time.perf_counter()
        function()
        finish()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def coverage(features: torch.Tensor, kept: torch.Tensor) -> tuple[float, float]:
    """Mean and largest distance of a dropped token to its nearest kept one; zeros where none is dropped."""
    dropped = torch.ones(features.shape[0], dtype=torch.bool, device=features.device)
    dropped[kept] = False
    if not dropped.any():
        return 0.0, 0.0
    mode = "donot_use_mm_for_euclid_dist"  # differences: near-duplicates keep their distance
    nearest = torch.cdist(features[dropped], features[kept], compute_mode=mode).min(1).values
    return nearest.mean().item(), nearest.max().item()


def draw(tokens: Tokens, choices: dict[str, torch.Tensor], columns: int | None = None, panel: int = PANEL):
    """The choices side by side, in rows of `columns`: kept patches as they are, the others dimmed. Panels are at least
    `panel` pixels a side."""
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
