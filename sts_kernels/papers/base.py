"""Data types and shared constants of the papers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..flops import CONVENTIONS, REPORT, Convention, LLMSize
from ..methods.sparsevlm import TABLES

VICUNA_7B = LLMSize(32, 4096, 4096, 4096, 11008, 2)
VICUNA_13B = LLMSize(40, 5120, 5120, 5120, 13824, 2)
VISUAL, STS, ADAVTP = (CONVENTIONS[name] for name in ("vispruner", "sts", "adavtp"))
LLAVA, LLAVA_13B = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-13b-hf"
NEXT, NEXT_13B = "llava-hf/llava-v1.6-vicuna-7b-hf", "llava-hf/llava-v1.6-vicuna-13b-hf"
QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
LMMS_MODELS = {"llava-hf": "sts_llava_hf", "Qwen": "sts_qwen2_5_vl"}  # owner of a checkpoint -> pruned lmms-eval model
EIGHT = ("gqa", "mmbench_en_dev", "mme", "pope", "scienceqa_img", "vqav2_val", "textvqa_val", "vizwiz_vqa_val")
CACHE = "2 L d 2 bytes a token, MB of 2^20 bytes"
SHARE = "1 - K / N"
SPARSEVLM_DEPTH = (3, 4, 9, 16)  # layers of each segment of SparseVLM's code


@dataclass(frozen=True)
class Number:
    """One efficiency number of a paper, printed and recomputed.

    Attributes:
        table: the paper's table or section; "" if the paper does not print the number.
        row: row of the table.
        what: quantity and unit.
        printed: the number as printed; "" if the paper does not print it.
        computed: the number recomputed from sizes, or from other numbers of the paper.
        formula: formula of `computed`.
        note: why the two differ.
    """

    table: str
    row: str
    what: str
    printed: str
    computed: float
    formula: str
    note: str = ""

    @property
    def off(self) -> float | None:
        """Relative difference computed / printed - 1; None if nothing is printed."""
        return self.computed / float(self.printed) - 1 if self.printed else None


@dataclass(frozen=True)
class Accuracy:
    """An accuracy table of a paper. Holds no results, only the lmms-eval runs that would measure them.

    Attributes:
        variants: pruning arguments in `--model_args`, one string for each row with a pruned model.
    """

    table: str
    model: str
    tasks: Sequence[str]
    variants: Sequence[str]
    note: str = ""

    def command(self) -> str:
        """One shell line that runs lmms-eval once for each variant."""
        model = LMMS_MODELS[self.model.split("/")[0]]
        return (
            f"for pruning in {' '.join(self.variants)}; do lmms-eval --model {model} "
            f"--model_args pretrained={self.model},device_map=auto,$pruning "
            f"--tasks {','.join(self.tasks)} --batch_size 1; done"
        )


@dataclass(frozen=True)
class Paper:
    """All numbers of a paper.

    Attributes:
        numbers: recomputed here.
        elsewhere: efficiency numbers that need a GPU or data.
        accuracy: tables with a command that would measure them.
        impossible: tables without such a command, and why.
    """

    numbers: list[Number]
    elsewhere: list[str]
    accuracy: list[Accuracy]
    impossible: list[str] = field(default_factory=list)


def budgets(method: str, *values: int | float) -> list[str]:
    return [f"method={method},budget={value}" for value in values]


def tera(size: LLMSize, segments: Any, text: int = 0, convention: Convention = REPORT) -> float:
    """Prefill TFLOPs. segments: (layers, visual tokens) pairs, or one int for all layers."""
    if isinstance(segments, int):
        segments = [(size.layers, segments)]
    return size.prefill_flops(segments, text, convention) / 1e12


def sparsevlm_segments(budget: int, tokens: int = 576) -> list[tuple[int, int]]:
    """(layers, visual tokens) segments of SparseVLM's code: the table's kept tokens plus the recycled clusters."""
    counts = [tokens]
    for kept in TABLES[budget]:
        recycled = int(0.3 * (counts[-1] - kept)) + 1
        counts.append(kept + recycled // 10 + 1)
    return list(zip(SPARSEVLM_DEPTH, counts, strict=True))
