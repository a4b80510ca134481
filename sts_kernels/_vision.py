"""Visual tokens of a picture, from pixels or from a trained vision model, for the commands that show selections."""

import functools
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _dinov2
from ._cli import first_line
from ._errors import UserError, needs

if TYPE_CHECKING:
    from PIL.Image import Image

PATCH_SIZE, PATCH_GRID = 14, 24  # 336 pixels per side, as in CLIP ViT-L/14 at 336 pixels
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VISION_MODELS = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}
DINOV2_LAYER = 10  # penultimate of layers 0..11, as in LLaVA
PATCHES = "{side} x {side} = {count} patches of {size} x {size} pixels"
SHOWN = 576  # pixels per side of a shown picture, if the photograph has as many
PIXELS_ARE_NOT_FEATURES = (
    "raw pixels say how a selection spreads over a picture, not what a model would keep; features of a trained model: "
)


class Signals(NamedTuple):
    """Signals of the N patches of one square, in row-major order."""

    features: Tensor  # (N, C) float32
    attention: Tensor | None = None  # (N,) float32, from [CLS], else mean over all patches; mean over heads
    keys: Tensor | None = None  # (N, D) float32, mean over heads


@dataclass(frozen=True)
class Source:
    """Encoder of a square picture into tokens.

    Attributes:
        side: the grid is side x side.
        patch: pixels per side of a token.
        size: pixels per side of the input square; patches cover its top left side * patch.
        what: description of the features, for the user.
        trained: the features come from a trained model, not from pixels.
        encode: maps a square of `size` pixels to its signals.
    """

    side: int
    patch: int
    size: int
    what: str
    trained: bool
    encode: "Callable[[Image], Signals]"

    def note(self) -> str:
        """The caveat to show beside a picture, or ""."""
        return "" if self.trained else PIXELS_ARE_NOT_FEATURES + _dinov2.commands()


@dataclass(frozen=True)
class Tokens:
    """Tokens of the central square of a photograph, then of its crops, square by square.

    Attributes:
        features: (N, C) float32.
        picture: the square that the grid covers, in the resolution of `_shown`.
        side: a square's grid is side x side.
        what: description of the features, for the user.
        patch: pixels per side of a token at the model's resolution.
        crops: pictures of the crops, in row-major order.
        attention, keys: as in `Signals`; None if the source has none.
    """

    features: Tensor
    picture: "Image"
    side: int
    what: str
    patch: int = 0
    crops: "tuple[Image, ...]" = ()
    attention: Tensor | None = None
    keys: Tensor | None = None

    @property
    def count(self) -> int:
        return self.features.shape[0]

    @property
    def squares(self) -> int:
        return 1 + len(self.crops)

    @property
    def patches(self) -> str:
        return PATCHES.format(side=self.side, count=self.side**2, size=self.patch)


def add_argument(parser: ArgumentParser) -> None:
    """Adds --features, for commands that take a picture."""
    patches = PATCHES.format(side=PATCH_GRID, count=PATCH_GRID**2, size=PATCH_SIZE)
    parser.add_argument(
        "--features",
        default="auto",
        metavar="dinov2|patches|MODEL",
        help=f"dinov2: layer {DINOV2_LAYER} of a trained DINOv2-S, of the package {_dinov2.WEIGHTS}; patches: "
        f"normalised RGB values of {patches}; else a local directory or hub id of a CLIP or SigLIP vision model, whose "
        "penultimate layer is taken (default: dinov2 where it is installed, else patches)",
    )


def source(name: str, device: torch.device) -> Source:
    """The source named by --features."""
    if name == "auto":
        name = "dinov2" if _dinov2.is_there() else "patches"
    if name == "patches":
        what = "normalised RGB values: pixels, not a model's features"
        encode = functools.partial(_encode_patches, device)
        return Source(PATCH_GRID, PATCH_SIZE, PATCH_GRID * PATCH_SIZE, what, False, encode)
    return _dinov2_source(device) if name == "dinov2" else _model_source(name, device)


def tokens(source: Source, picture: "Image", crops: int = 0) -> Tokens:
    """Tokens of the central square of a picture. With crops > 1 also of its crops x crops parts, each at the model's
    resolution, as in LLaVA-NeXT for a square picture."""
    squares = [centre_crop(picture, source.size, source.side)]
    tiles: list[Image] = []
    if crops > 1:
        squares += _tiles(
            centre_crop(picture, crops * source.size, crops * source.side), crops, source.size, source.size
        )
        tiles = _shown(source, picture, crops)
    found = [source.encode(square) for square in squares]
    features, attention, keys = (_joined(column) for column in zip(*found, strict=True))
    assert features is not None
    (whole,) = _shown(source, picture, 1)
    return Tokens(features, whole, source.side, source.what, source.patch, tuple(tiles), attention, keys)


def _joined(parts: tuple[Tensor | None, ...]) -> Tensor | None:
    return None if parts[0] is None else torch.cat([part for part in parts if part is not None])


def centre_crop(picture: "Image", size: int, side: int) -> "Image":
    """The central square of the picture, scaled to size x size pixels."""
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


def _tiles(square: "Image", crops: int, size: int, seen: int) -> "list[Image]":
    """crops x crops parts of `size` pixels in row-major order, each cut to its top left `seen` pixels."""
    corners = [(x * size, y * size) for y in range(crops) for x in range(crops)]
    return [square.crop((x, y, x + seen, y + seen)) for x, y in corners]


def _shown(source: Source, picture: "Image", crops: int) -> "list[Image]":
    """Pictures of the squares under the grids. crops > 1: at the model's resolution. Else at the photograph's, at least
    the model's, at most SHOWN pixels per side."""
    short = min(picture.size) * source.side * source.patch // source.size
    most = max(source.patch, SHOWN // source.side) if crops == 1 else source.patch
    cell = min(max(short // (crops * source.side), source.patch), most)
    size = round(source.size * cell / source.patch)
    square = centre_crop(picture, crops * size, crops * source.side)
    return _tiles(square, crops, size, source.side * cell)


# ---- sources ---------------------------------------------------------------------------------------------------------


def _encode_patches(device: torch.device, square: "Image") -> Signals:
    side, patch = PATCH_GRID, PATCH_SIZE
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    pixels = pixels.view(side, patch, side, patch, 3).to(device)
    values = (pixels / 255 - torch.tensor(CLIP_MEAN, device=device)) / torch.tensor(CLIP_STD, device=device)
    return Signals(values.transpose(1, 2).reshape(side * side, -1))


def _dinov2_source(device: torch.device) -> Source:
    encoder = _dinov2.Encoder()

    def encode(square: "Image") -> Signals:
        a = encoder(_dinov2.pixels(square)[None])
        return Signals(*(kind[DINOV2_LAYER][0].to(device) for kind in (a.hidden, a.cls, a.keys)))

    what = f"layer {DINOV2_LAYER} of a trained DINOv2-S ({_dinov2.WEIGHTS})"
    return Source(_dinov2.SIDE, _dinov2.PATCH, _dinov2.SIZE, what, True, encode)


def _model_source(name: str, device: torch.device) -> Source:
    """A CLIP or SigLIP vision model: penultimate layer without the [CLS] token, as in LLaVA."""
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
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # else it lists the unused weights of the text tower
    try:
        model_class = getattr(transformers, VISION_MODELS[config.model_type])
        model, loaded = model_class.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
        )
        if loaded["missing_keys"]:
            raise ValueError(f"it lacks weights, {sorted(loaded['missing_keys'])[0]} for one")
        processor = transformers.AutoImageProcessor.from_pretrained(name)
        model.eval().to(device)
        key = _key_projection(model, vision.num_hidden_layers)
    except Exception as error:
        raise UserError(f"cannot take features from the model {name}: {first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)

    def encode(square: "Image") -> Signals:
        caught: list[Tensor] = []
        hook = key.register_forward_hook(lambda module, args, output: caught.append(output[0]))
        try:
            inputs = processor(images=square, return_tensors="pt").to(device)
            with torch.inference_mode():
                output = model(**inputs, output_hidden_states=True, output_attentions=True)
        except Exception as error:
            raise UserError(f"cannot take features from the model {name}: {first_line(error)}") from error
        finally:
            hook.remove()
        return _of_output(output, caught[0], name, side, vision.num_attention_heads)

    return Source(side, vision.patch_size, vision.image_size, f"penultimate layer of {name}", True, encode)


def _key_projection(model: torch.nn.Module, layers: int) -> torch.nn.Module:
    """Key projection of the penultimate layer, whose output is the features."""
    ending = f"layers.{max(0, layers - 2)}.self_attn.k_proj"
    return model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith(ending)))


def _of_output(output: Any, key: Tensor, name: str, side: int, heads: int) -> Signals:
    """Signals from the forward of one square. CLIP has a [CLS] token first, SigLIP has none."""
    features = output.hidden_states[-2][0]
    extra = features.shape[0] - side * side
    if extra not in (0, 1):
        raise UserError(f"{name} gives {features.shape[0]} tokens where {side} x {side} patches were expected")
    attention = output.attentions[max(-2, -len(output.attentions))][0].float().mean(0)  # over heads: (1 + N, 1 + N)
    paid = attention[0] if extra else attention.mean(0)
    keys = key.float().unflatten(-1, (heads, -1)).mean(1)
    return Signals(*(value[extra:].float().contiguous() for value in (features, paid, keys)))
