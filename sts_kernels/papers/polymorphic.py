"""PolyMorphic: its schedule of token counts, and the speedups."""

from collections.abc import Sequence

from ..methods._budget import common_ratio
from .base import (
    LLAVA,
    LLAVA_13B,
    NEXT,
    NEXT_13B,
    VICUNA_7B,
    Accuracy,
    Number,
    Paper,
    budgets,
    sparsevlm_segments,
    tera,
)

CUTS, LAYERS, TEXT = (3, 7, 16), 32, 60
# Table 4: model -> (vanilla prefill ms, {method: (prefill ms, printed speedup)}).
TIMES = {
    "LLaVA-1.5-7B": (
        55.05,
        {"SparseVLM": (36.40, "1.51"), "VisionZip": (24.10, "2.28"), "PolyMorphic": (32.44, "1.70")},
    ),
    "LLaVA-NeXT-7B": (248.02, {"VisionZip": (28.19, "8.80"), "PolyMorphic": (37.02, "6.70")}),
}


def schedule(budget: int, after: Sequence[int] = CUTS, layers: int = LAYERS) -> list[tuple[int, float]]:
    """(layers, tokens) segments: 2 * budget tokens enter, and each prune layer in `after` shrinks them by one factor.

    The factor is solved for an average of `budget` over the layers. The paper states only the average.
    """
    ends, factor = (*after, layers), common_ratio("polymorphic", 0.5, tuple(after), layers)
    return [(end - start, 2 * budget * factor**i) for i, (start, end) in enumerate(zip((0, *after), ends, strict=True))]


def counts() -> list[Number]:
    numbers, shrink = [], "2 B tokens into the LLM, one factor behind layers 3, 7 and 16, B on average"
    for budget in (192, 128, 64):
        for layer, (_, tokens) in zip((0, *CUTS), schedule(budget), strict=True):
            what = f"tokens from layer {layer} on" if layer else "tokens into the LLM"
            numbers.append(Number("Tab. 1", f"budget {budget}", what, "", tokens, shrink))
        retained = round(2 * budget * 5.4 / 6.4)
        numbers.append(Number("Tab. 1", f"budget {budget}", "of them not merged", "", retained, "5.4 of 6.4"))
    return numbers


def efficiency() -> list[Number]:
    numbers = []
    for model, (vanilla, methods) in TIMES.items():
        for method, (ms, printed) in methods.items():
            row = f"{model}, {method}"
            numbers.append(Number("Tab. 4", row, "times faster", printed, vanilla / ms, "the paper's own times"))
    formula = f"2 (4nd^2 + 2n^2d + 3ndm) a layer, visual tokens and {TEXT} others"
    for model, tokens, budget in (("LLaVA-1.5-7B", 576, 64), ("LLaVA-NeXT-7B", 2880, 160)):
        shrinking = [(layers, round(n)) for layers, n in schedule(budget)]
        for method, segments in (("VisionZip", budget), ("PolyMorphic", shrinking)):
            ratio = tera(VICUNA_7B, tokens, TEXT) / tera(VICUNA_7B, segments, TEXT)
            numbers.append(Number("", f"{model}, {method}, budget {budget}", "times fewer FLOPs", "", ratio, formula))
    for budget in (192, 128, 64):
        average = sum(layers * n for layers, n in sparsevlm_segments(budget)) / LAYERS
        note = "what its code keeps at 576 tokens, recycled ones included"
        formula = "the counts of SparseVLM's code"
        numbers.append(
            Number("Tab. 1", f"SparseVLM, budget {budget}", "tokens on average", str(budget), average, formula, note)
        )
    return numbers


def paper() -> Paper:
    six = ("vizwiz_vqa_val", "scienceqa_img", "gqa", "textvqa_val", "mme", "pope")
    return Paper(
        [*counts(), *efficiency()],
        ["Tab. 4: prefill and decode times (A800)"],
        [
            Accuracy("Tab. 1", LLAVA, six, budgets("polymorphic", 192, 128, 64)),
            Accuracy("Tab. 2", LLAVA_13B, six, budgets("polymorphic", 192, 128, 64)),
            Accuracy("Tab. 7", NEXT, six, budgets("polymorphic", 640, 320, 160)),
            Accuracy("Tab. 8", NEXT_13B, six, budgets("polymorphic", 640, 320, 160)),
        ],
        [
            "Tab. 3: no lmms-eval model with pruning for Qwen2-VL",
            "Tab. 5, 6 and Fig. 2: other first counts, and one stage alone",
        ],
    )
