"""What a prompt kept and what that saved: the content of the paper's Table 3, for the last prompt."""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from .marks import marked
from .prompt import KINDS, Row

MB = 2**20


@dataclass(frozen=True)
class LLMSize:
    """The numbers of an LLM that its cost follows from."""

    layers: int
    hidden: int
    query: int  # heads times head dimension
    key: int
    mlp: int
    bytes: int  # of one cached number

    @classmethod
    def of(cls, config, dtype: torch.dtype) -> "LLMSize":
        heads = config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            heads * dim,
            kv_heads * dim,
            config.intermediate_size,
            dtype.itemsize,
        )

    def kv_mb(self, token_layers: int) -> float:
        """Cache of so many (token, layer) pairs: 2 * key * bytes each, in units of 2**20 bytes."""
        return 2 * self.key * self.bytes * token_layers / MB

    def layer_flops(self, tokens: int) -> int:
        """Prefill of one layer, a multiply-add counting as two: projections 4 n d (q + k), attention over the full
        square 4 n^2 q, gated MLP 6 n d m."""
        projections = 4 * tokens * self.hidden * (self.query + self.key)
        attention = 4 * tokens * tokens * self.query
        return projections + attention + 6 * tokens * self.hidden * self.mlp


@dataclass(frozen=True)
class ImageReport:
    """One image or clip. The patches are (n, 3) int64 on the CPU: part (crop, tile or frame), row and column in its
    grid."""

    kind: str
    tokens: int
    grids: list[tuple[int, int]]
    after_stage1: torch.Tensor
    after_stage2: torch.Tensor


@dataclass(frozen=True)
class RowReport:
    """One prompt of the batch. Visual tokens do not count structure such as newlines; those are never pruned."""

    tokens: int  # visual tokens before pruning
    after_stage1: int
    after_stage2: int
    average: float  # over the layers
    prompt: int  # all tokens of the prompt before pruning
    kv_mb: tuple[float, float]  # cache of the prompt: without and with pruning
    visual_kv_mb: tuple[float, float]  # the part of it that visual tokens take
    prefill_tflops: tuple[float, float]  # of the LLM's layers, without and with pruning
    images: list[ImageReport]


@dataclass
class Report:
    """Of the last prompt with images. `print` it for a table; the positions are read from the device when asked for."""

    prune_layer: int
    size: LLMSize
    measured: dict[str, float] = field(default_factory=dict)  # ms by "encode" and "prefill", with measure=True
    pending: bool = True
    _rows: list[Row] = field(default_factory=list, repr=False)
    _extra: int = field(default=0, repr=False)
    _found: torch.Tensor | None = field(default=None, repr=False)
    _dropped: torch.Tensor | None = field(default=None, repr=False)
    _left: tuple | None = field(default=None, repr=False)

    def finish(self, run, measured: dict[str, float]) -> None:
        """Once the prompt went through: what is left of it after stage 2."""
        self.pending, self.measured = False, measured
        if run is not None and run.prefill and run.candidates is not None and run.scores is not None:
            self._left = (run.columns, run.slots)

    @property
    def encode_ms(self) -> float | None:
        """Vision encoder, stage 1 and projector."""
        return self.measured.get("encode")

    @property
    def prefill_ms(self) -> float | None:
        """The LLM's forward over the prompt, stage 2 included."""
        return self.measured.get("prefill")

    @cached_property
    def rows(self) -> list[RowReport]:
        found, alive1 = self._found.cpu(), ~self._dropped.cpu()
        alive2 = alive1
        if self._left is not None:
            columns, slots = (t.cpu() for t in self._left)
            alive2 = alive1.new_zeros(found.shape[0], found.shape[1] + 1)
            alive2 = alive2.scatter(1, columns.masked_fill(~slots, found.shape[1]), True)[:, :-1] & alive1
        return [self._row(row, found[i], alive1[i], alive2[i]) for i, row in enumerate(self._rows)]

    def _row(self, row: Row, found, alive1, alive2) -> RowReport:
        images, seen = [], {kind: 0 for kind in KINDS}
        for item in row.images:
            columns = (found == 1 + KINDS.index(item.kind)).nonzero()[:, 0]
            columns = columns[seen[item.kind] : seen[item.kind] + item.tokens]
            seen[item.kind] += item.tokens
            patches = item.patches()
            piece = patches[:, 0] >= 0
            images.append(
                ImageReport(
                    item.kind,
                    item.candidates,
                    item.grids,
                    patches[piece & alive1[columns]],
                    patches[piece & alive2[columns]],
                )
            )
        before, kept, after = (
            row.before,
            sum(len(i.after_stage1) for i in images),
            sum(len(i.after_stage2) for i in images),
        )
        size, shallow = self.size, self.prune_layer
        length = row.length - self._extra
        deep, other = size.layers - shallow, length - before
        visual = (size.layers * before, shallow * kept + deep * after)
        whole = tuple(v + size.layers * other for v in visual)
        flops = (
            size.layers * size.layer_flops(length),
            shallow * size.layer_flops(other + kept) + deep * size.layer_flops(other + after),
        )
        return RowReport(
            before,
            kept,
            after,
            visual[1] / size.layers,
            length,
            tuple(map(size.kv_mb, whole)),
            tuple(map(size.kv_mb, visual)),
            tuple(f / 1e12 for f in flops),
            images,
        )

    def __str__(self) -> str:
        head = [
            "row",
            "images",
            "visual tokens",
            "stage 1",
            "stage 2",
            "average",
            "KV cache MB",
            "of it visual",
            "TFLOPs",
        ]
        table = [head]
        for index, row in enumerate(self.rows):
            pairs = (f"{a:.4g} -> {b:.4g}" for a, b in (row.kv_mb, row.visual_kv_mb, row.prefill_tflops))
            counts = (row.tokens, row.after_stage1, row.after_stage2)
            table.append([str(index), str(len(row.images)), *map(str, counts), f"{row.average:.1f}", *pairs])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        times = [f"{name} {ms:.1f} ms" for name, ms in self.measured.items()]
        foot = f"stage 2 before layer {self.prune_layer} of {self.size.layers}; TFLOPs: prefill of the LLM's layers"
        return "\n".join([*lines, "; ".join([foot, *times])])


def describe(plan, config, rows: list[Row], found: torch.Tensor, embeds: torch.Tensor, extra: int) -> Report:
    """Starts the report of a prompt, whose last `extra` columns are not the prompt's; nothing is read back."""
    report = Report(plan.prune_layer, LLMSize.of(config, embeds.dtype))
    report._rows, report._extra, report._found, report._dropped = rows, extra, found, marked(embeds)
    return report
