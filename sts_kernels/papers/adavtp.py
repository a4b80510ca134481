"""AdaVTP (AgilePruner): FLOPs and the time of erank."""

from typing import Any

from .base import (
    ADAVTP,
    EIGHT,
    LLAVA,
    LLAVA_13B,
    NEXT,
    QWEN,
    SHARE,
    VICUNA_7B,
    Accuracy,
    Number,
    Paper,
    budgets,
    sparsevlm_segments,
    tera,
)

TEXT = 30  # text tokens; not stated in the paper, 29 to 31 fit
FLOPS = f"(4nd^2 + 2n^2d + 2ndm) a layer, visual tokens and {TEXT} others: DivPrune's script"


def numbers() -> list[Number]:
    whole, kept, sparse = (tera(VICUNA_7B, n, TEXT, ADAVTP) for n in (576, 64, sparsevlm_segments(64)))
    rows: list[tuple[Any, ...]] = [
        ("Tab. 9", "LLaVA-1.5-7B", "TFLOPs", "3.14", whole, FLOPS),
        ("Tab. 9", "AdaVTP, DivPrune, VisPruner, 64 tokens", "TFLOPs", "0.48", kept, FLOPS),
        (
            "Tab. 9",
            "SparseVLM, 64 tokens",
            "TFLOPs",
            "0.52",
            sparse,
            f"{FLOPS}; the counts of SparseVLM's code",
            "the paper does not say what it counts",
        ),
        (
            "App. A",
            "64 tokens",
            "fewer FLOPs, %",
            "89",
            100 * (1 - kept / whole),
            FLOPS,
            "3.14 -> 0.48 T is 85 % fewer; 89 % of the tokens are dropped",
        ),
        (
            "App. A",
            "erank in a prediction",
            "share of the time, %",
            "3.2",
            100 * 3.4 / 115,
            "the paper's own 3.4 ms / 115 ms",
            "3.65 ms, of Tab. 10, would be 3.2 %",
        ),
        ("Tab. 10", "erank, batch 10", "times batch 1", "", 33.40 / 3.65, "the paper's own 33.40 ms / 3.65 ms"),
        ("Tab. 16", "256 of 1225 tokens", "fewer tokens, %", "79.1", 100 * (1 - 256 / 1225), SHARE),
        ("Tab. 16", "512 of 1225 tokens", "fewer tokens, %", "60.5", 100 * (1 - 512 / 1225), SHARE, "it is 58.2 %"),
    ]
    return [Number(*row) for row in rows]


def paper() -> Paper:
    nine = (*EIGHT, "mmbench_cn_dev")
    qwen = ("textvqa_val", "chartqa", "ai2d", "ocrbench", "mme", "mmbench_en_dev", "mmbench_cn_dev")
    return Paper(
        numbers(),
        [
            "Tab. 9: latency and memory (one RTX 4090); PDrop's 0.51 T, whose layers are not named",
            "Tab. 10: 3.65 to 33.40 ms of erank (one RTX 4090)",
            "Tab. 1, 4, 12, 13, 17: erank and entropy over data sets; sts_kernels.analysis computes both",
        ],
        [
            Accuracy("Tab. 7", LLAVA, nine, budgets("adavtp", 128, 64, 32)),
            Accuracy("Tab. 14", LLAVA_13B, nine, budgets("adavtp", 128, 64)),
            Accuracy("Tab. 15", NEXT, nine, budgets("adavtp", 640, 320)),
            Accuracy("Tab. 16", QWEN, qwen, budgets("adavtp", 512, 256)),
            Accuracy(
                "Tab. 2, 8", LLAVA, ("amber_g",), budgets("adavtp", 128, 64), "AMBER for CHAIR, which lmms-eval lacks"
            ),
        ],
    )
