"""Pictures of the tokens that each pruning step leaves."""

from typing import TYPE_CHECKING, Any

import torch

from .report import Report

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from transformers import ProcessorMixin

DIMMED = 0.25  # brightness of a dropped token
SIDE, MARGIN, CAPTION = 336, 10, 22  # pixels


def draw(report: Report, inputs: dict[str, Any], images: list["Picture"], processor: "ProcessorMixin") -> "Picture":
    """One row of panels per image: tokens that entered the LLM, then tokens after each cut inside it. Dropped tokens
    are dimmed.

    Args:
        report: of a prompt with these images, batch size 1.
        inputs: output of the processor for these images.
        images: the PIL images.
        processor: the processor of the model; its image processor knows how pixels were normalised.
    """
    from PIL import Image, ImageDraw

    reports = report.rows[0].images
    rows = []
    for index, (image, seen) in enumerate(zip(images, reports, strict=True)):
        parts = _parts(inputs, index, image, [r.grids for r in reports], processor)
        places = ["into the LLM", *(f"from layer {layer}" for layer in report.prune_layers)]
        rows.append(
            [
                (f"{len(kept)} of {seen.tokens} tokens {place}", _panel(parts, seen.grids, kept))
                for place, kept in zip(places, seen.kept, strict=True)
            ]
        )
    width = max(sum(panel.width + MARGIN for _, panel in row) for row in rows) + MARGIN
    height = sum(row[0][1].height + CAPTION + MARGIN for row in rows) + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    pen, top = ImageDraw.Draw(sheet), MARGIN
    for row in rows:
        left = MARGIN
        for caption, panel in row:
            pen.text((left, top + 4), caption, fill="black")
            sheet.paste(panel, (left, top + CAPTION))
            left += panel.width + MARGIN
        top += row[0][1].height + CAPTION + MARGIN
    return sheet


def _parts(
    inputs: dict[str, Any],
    index: int,
    image: "Picture",
    grids: list[list[tuple[int, int]]],
    processor: "ProcessorMixin",
) -> list["Picture"]:
    """Pictures of one image as the model saw them: its crops or tiles, or the whole image where the model takes any
    size, or makes one grid of all crops but the first."""
    from PIL import Image

    if "pixel_values" not in inputs or "image_grid_thw" in inputs:
        return [image]
    pixels, counts = inputs["pixel_values"].detach().float().cpu(), list(map(len, grids))
    pixels = pixels[index, : counts[index]] if pixels.ndim == 5 else pixels[sum(counts[:index]) :][: counts[index]]
    mean, std = (
        torch.tensor(getattr(processor.image_processor, f"image_{name}"), device="cpu") for name in ("mean", "std")
    )
    colours = (pixels * std[:, None, None] + mean[:, None, None]).clamp(0, 1).mul(255).round().to(torch.uint8)
    return [
        Image.frombytes("RGB", (part.shape[2], part.shape[1]), part.permute(1, 2, 0).contiguous().numpy().tobytes())
        if grid == grids[index][0]
        else image
        for part, grid in zip(colours, grids[index], strict=True)
    ]


def _panel(parts: list["Picture"], grids: list[tuple[int, int]], kept: torch.Tensor) -> "Picture":
    from PIL import Image, ImageEnhance

    panels = []
    for number, (part, (rows, columns)) in enumerate(zip(parts, grids, strict=True)):
        mask = Image.new("L", (columns, rows))
        for _, row, column in kept[(kept[:, 0] == number) & (kept[:, 1] >= 0)].tolist():
            mask.putpixel((column, row), 255)
        scale = SIDE / max(rows, columns)
        size = (round(columns * scale), round(rows * scale))
        part = part.resize(size)
        dimmed = ImageEnhance.Brightness(part).enhance(DIMMED)
        panels.append(Image.composite(part, dimmed, mask.resize(size, Image.Resampling.NEAREST)))
    sheet = Image.new("RGB", (sum(p.width for p in panels), max(p.height for p in panels)), "white")
    left = 0
    for panel in panels:
        sheet.paste(panel, (left, 0))
        left += panel.width
    return sheet
