"""Report of a prompt: kept tokens and patches, and the savings in KV cache and FLOPs."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import torch

from ...flops import CONVENTIONS, LLMSize
from ...methods import Plan
from .prompt import KINDS, Row
from .untyped import Config

Left: TypeAlias = dict[int, tuple[torch.Tensor, torch.Tensor]]  # first layer of a segment -> columns, slots

UNITS = {"TFLOPs": 1.0, "GFLOPs": 1e3, "MFLOPs": 1e6}  # unit of a prefill -> units per TFLOP


@dataclass(frozen=True, eq=False)
class ImageReport:
    """One image or clip. Patches are (n, 3) int64 on the CPU: crop (tile or frame), row and column in its grid.

    kept[0]: patches that entered the LLM. kept[i]: patches left after the i-th cut inside it.
    """

    kind: str
    tokens: int
    grids: list[tuple[int, int]]
    kept: list[torch.Tensor]

    @property
    def after_stage1(self) -> torch.Tensor:
        return self.kept[0]

    @property
    def after_stage2(self) -> torch.Tensor:
        return self.kept[-1]


@dataclass(frozen=True, eq=False)
class RowReport:
    """One prompt of the batch. Separators such as newlines are never pruned and do not count as visual tokens."""

    tokens: int  # visual tokens before pruning
    kept: list[int]  # visual tokens that entered the LLM, and those after each cut inside it
    average: float  # visual tokens per layer, mean over the LLM's layers
    prompt: int  # all tokens of the prompt before pruning
    kv_mb: tuple[float, float]  # KV cache of the prompt in MB: without and with pruning
    visual_kv_mb: tuple[float, float]  # part of `kv_mb` that visual tokens take
    tflops: dict[str, tuple[float, float]]  # prefill of the LLM's layers, by convention: without and with pruning
    images: list[ImageReport]

    @property
    def prefill_tflops(self) -> tuple[float, float]:
        """Prefill of the whole prompt: without and with pruning."""
        return self.tflops["report"]

    @property
    def visual_tflops(self) -> tuple[float, float]:
        """Prefill counted as if the prompt were its visual tokens alone: without and with pruning."""
        return self.tflops["vispruner"]

    @property
    def after_stage1(self) -> int:
        return self.kept[0]

    @property
    def after_stage2(self) -> int:
        return self.kept[-1]


@dataclass(eq=False)
class Report:
    """Report of the last prompt with images; `print` it for a table. `rows` reads positions from the device on first
    access."""

    prune_layers: list[int]
    size: LLMSize
    # With profile=True, ms by phase: "encode image", "encode video", "prefill".
    measured: dict[str, float] = field(default_factory=dict)
    _rows: list[Row] = field(default_factory=list, repr=False)
    _modality: torch.Tensor | None = field(default=None, repr=False)
    _dropped: torch.Tensor | None = field(default=None, repr=False)
    _left: Left = field(default_factory=dict, repr=False)

    def finish(self, left: Left, measured: dict[str, float]) -> None:
        """Completes the report after the prefill. left: what each cut left, by layer.

        An entry of layer 0 says what entered the LLM; the report then has no `dropped`.
        """
        self.measured, self._left = measured, left

    @property
    def encode_ms(self) -> float | None:
        """Time of vision encoder, pruning before the LLM, and projector, in ms. None without profile."""
        times = [ms for phase, ms in self.measured.items() if phase.startswith("encode")]
        return sum(times) if times else None

    @property
    def prefill_ms(self) -> float | None:
        """Time of the LLM's forward over the prompt, cuts included, in ms. None without profile."""
        return self.measured.get("prefill")

    @cached_property
    def rows(self) -> list[RowReport]:
        assert self._modality is not None  # `describe` sets it
        modality = self._modality.cpu()
        everything = torch.ones(modality.shape, dtype=torch.bool, device="cpu")
        kept = [self._left_at(0, everything) if self._dropped is None else ~self._dropped.cpu()]
        for layer in self.prune_layers:
            kept.append(self._left_at(layer, kept[-1]))
        return [self._row(row, modality[i], [mask[i] for mask in kept]) for i, row in enumerate(self._rows)]

    def _left_at(self, layer: int, before: torch.Tensor) -> torch.Tensor:
        """(B, S) bool: columns that the layers from `layer` on see."""
        if layer not in self._left:
            return before
        columns, slots = (t.cpu() for t in self._left[layer])
        mask = before.new_zeros(before.shape[0], before.shape[1] + 1)
        return mask.scatter(1, columns.masked_fill(~slots, before.shape[1]), True)[:, :-1] & before

    def _row(self, row: Row, modality: torch.Tensor, kept: Sequence[torch.Tensor]) -> RowReport:
        images, seen = [], dict.fromkeys(KINDS, 0)
        for item in row.items:
            columns = (modality == 1 + KINDS.index(item.kind)).nonzero()[:, 0]
            columns = columns[seen[item.kind] : seen[item.kind] + item.num_tokens]
            seen[item.kind] += item.num_tokens
            patches = item.patches()
            piece = patches[:, 0] >= 0
            images.append(
                ImageReport(item.kind, item.num_visual, item.grids, [patches[piece & mask[columns]] for mask in kept])
            )
        size, length, tokens = self.size, row.length, row.num_visual
        counts = [sum(len(image.kept[i]) for image in images) for i in range(len(kept))]
        starts = [0, *self.prune_layers, size.layers]
        depth = [after - start for start, after in itertools.pairwise(starts)]
        other = length - tokens
        plain, pruned = [(size.layers, tokens)], list(zip(depth, counts, strict=True))
        before, after = (sum(layers * n for layers, n in segments) for segments in (plain, pruned))
        text = size.layers * other
        flops = {
            name: (
                size.prefill_flops(plain, other, convention) / 1e12,
                size.prefill_flops(pruned, other, convention) / 1e12,
            )
            for name, convention in CONVENTIONS.items()
        }
        return RowReport(
            tokens,
            counts,
            after / size.layers,
            length,
            (size.kv_mb(before + text), size.kv_mb(after + text)),
            (size.kv_mb(before), size.kv_mb(after)),
            flops,
            images,
        )

    def __str__(self) -> str:
        largest = max((row.prefill_tflops[0] for row in self.rows), default=0.0)
        unit = next((name for name, scale in UNITS.items() if largest * scale >= 0.1), "MFLOPs")
        head = ["row", "images", "visual tokens", "into the LLM", *(f"from layer {n}" for n in self.prune_layers)]
        table = [[*head, "average", "KV cache MB", "of it visual", unit, "visual alone"]]
        for index, row in enumerate(self.rows):
            pairs = [f"{a:.4g} -> {b:.4g}" for a, b in (row.kv_mb, row.visual_kv_mb)]
            for pair in (row.prefill_tflops, row.visual_tflops):
                a, b = (value * UNITS[unit] for value in pair)
                pairs.append(f"{a:.4g} -> {b:.4g}" + (f" ({a / b:.1f}x)" if b else ""))
            counts = map(str, (row.tokens, *row.kept))
            table.append([str(index), str(len(row.images)), *counts, f"{row.average:.1f}", *pairs])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        times = [f"{name} {ms:.1f} ms" for name, ms in self.measured.items()]
        cuts = " and ".join(f"layer {n} of {self.size.layers}" for n in self.prune_layers)
        foot = [f"pruned before {cuts}"] if cuts else []
        foot += [f"{unit}: prefill of the LLM's layers, of the prompt and as if it were visual tokens alone"]
        return "\n".join([*lines, "; ".join([*foot, *times])])


def describe(
    plan: Plan,
    config: Config,
    dtype: torch.dtype,
    rows: list[Row],
    modality: torch.Tensor,
    dropped: torch.Tensor | None,
) -> Report:
    """Starts the report of a prompt; nothing is read back."""
    report = Report([cut.layer for cut in plan.cuts], LLMSize.of(config, dtype))
    report._rows, report._modality, report._dropped = rows, modality, dropped
    return report
