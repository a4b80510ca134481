"""Shared by the commands: pictures, devices, one-line errors."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ._errors import UserError, needs

if TYPE_CHECKING:
    from PIL.Image import Image

# Candidates for the value of white, for modes that do not fix it. The smallest that holds all values is taken.
WHITES = {"I": (255, 65535), "F": (1, 255, 65535)}


def default_picture() -> Path:
    """The sample photograph: beside this file if installed, in examples/ of a checkout."""
    installed = Path(__file__).with_name("pictures") / "coffee.jpg"
    return installed if installed.exists() else Path(__file__).parents[1] / "examples" / "pictures" / "coffee.jpg"


def load_picture(path: str | Path) -> "Image":
    """Reads the first frame of `path` as upright RGB, composited on white."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(f"pictures need {needs('pillow')}") from error
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"cannot read the image {path}: {first_line(error)}") from error


def to_rgb(image: "Image") -> "Image":
    """Converts an image of any mode to RGB. Grey values deeper than 8 bits are scaled; Pillow would clip them."""
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if image.mode.partition(";")[0] in ("I", "F"):
        upright = scale_grey(upright, white_of(image))
    elif image.mode in ("La", "RGBa"):  # premultiplied alpha: convert("RGB") does not support it
        upright = upright.convert(image.mode.upper())
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    return upright.convert("RGB")


def white_of(image: "Image") -> int | None:
    """The value of white in a grey image of mode I, I;16 or F; None if unknown."""
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(258, 16)  # BitsPerSample of a TIFF: 12-bit files have this mode too
        return (1 << int(bits[0] if isinstance(bits, tuple) else bits)) - 1
    return 65535 if image.mode == "I" and image.format in ("PNG", "PPM") else None  # Pillow's mode for 16 bits


def scale_grey(image: "Image", white: int | None) -> "Image":
    """Scales a grey image of mode I, I;16 or F to L. Range: 0 to `white` or to a candidate in WHITES, else its own."""
    grey = image.convert("F")
    extrema: Any = grey.getextrema()  # a pair: the image has one band
    low, high = map(float, extrema)
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError("it has values that are not finite")
    if white is None and low >= 0:
        white = next((w for w in WHITES.get(image.mode, ()) if high <= w), None)
    black, top = (low, high) if white is None else (0.0, float(white))
    scale = 255 / max(top - black, 1e-30)
    grey = grey.point(lambda value: value * scale + (0.5 - black * scale)).convert("L")
    grey.info.pop("transparency", None)  # a value before scaling
    return grey


def save(picture: "Image", path: str) -> None:
    try:
        picture.save(path)
    except Exception as error:
        raise UserError(f"cannot write the picture {path}: {first_line(error)}") from error


def find_device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except Exception as error:
        raise UserError(f"--device {name} cannot be used: {first_line(error)}") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {name}")
    return device


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
