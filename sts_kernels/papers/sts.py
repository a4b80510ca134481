"""STS: budgets, cache and FLOPs."""

from ..methods.sts import STSConfig
from .base import CACHE, EIGHT, LLAVA, LLAVA_13B, NEXT, QWEN, STS, VICUNA_7B, Accuracy, Number, Paper, budgets, tera

SOLVED = "keep = B L / (p + (L - p) / 3), and what is left for an average of B from layer p on"
# (table, model, layers, prune layer, tokens, budgets)
BUDGETS = (
    ("Tab. 1", "LLaVA-1.5-7B", 32, 16, 576, (128, 64, 32)),
    ("Tab. 2", "LLaVA-NeXT-7B", 32, 16, 2880, (640, 320, 160)),
    ("Tab. 4", "LLaVA-1.5-13B", 40, 16, 576, (128, 64, 32)),
    ("Tab. 5", "Qwen2.5-VL-7B, of 1000 tokens", 28, 14, 1000, (0.2, 0.1)),
)
PRINTED: dict[tuple[str, float], tuple[str, str]] = {("Tab. 1", 128): ("192", "64")}  # in Sec. 5.1
SWEEP = (4, 8, 12, 16, 20)  # L_prune of App. B.3: half the tokens before it, 37.5 % on average


def solved() -> list[Number]:
    numbers = []
    for table, model, layers, layer, tokens, values in BUDGETS:
        for value in values:
            plan, printed = STSConfig(budget=value).plan(layers, layer), PRINTED.get((table, value), ("", ""))
            row, after = f"{model}, budget {value}", plan.keep_after([tokens])
            numbers.append(Number(table, row, "tokens into the LLM", printed[0], plan.keep(tokens), SOLVED))
            numbers.append(Number(table, row, f"tokens from layer {layer} on", printed[1], after, SOLVED))
    return numbers


def efficiency() -> list[Number]:
    plan, row = STSConfig(budget=320).plan(32, 16), "LLaVA-NeXT-7B, budget 320"
    segments = [(16, plan.keep(2880)), (16, plan.keep_after([2880]))]
    full_kv, kv = (VICUNA_7B.kv_mb(sum(n * tokens for n, tokens in part)) for part in ([(32, 2880)], segments))
    formula = "4nd^2 + 2n^2d + 3ndm a layer, visual tokens alone; the paper gives no formula"
    visual = tera(VICUNA_7B, 2880, 0, STS) / tera(VICUNA_7B, segments, 0, STS)
    prompt = tera(VICUNA_7B, 2880, 40) / tera(VICUNA_7B, segments, 40)
    times = "the paper's own 246 ms / 38 ms"
    return [
        Number("Tab. 3", "LLaVA-NeXT-7B", "KV cache, MB", "1440.0", full_kv, CACHE),
        Number("Tab. 3", row, "KV cache, MB", "160.0", kv, CACHE),
        Number("Tab. 3", row, "less cache, %", "88.9", 100 * (1 - kv / full_kv), CACHE),
        Number("Tab. 3", row, "times fewer FLOPs", "9.9", visual, formula),
        Number(
            "",
            f"{row}, 40 text tokens",
            "times fewer FLOPs",
            "",
            prompt,
            "4nd^2 + 2n^2d + 3ndm a layer, the whole prompt",
        ),
        Number("Sec. 5.4", row, "times faster prefill", "6.6", 246 / 38, times, "the two times give 6.5"),
    ]


def sweep() -> list[Number]:
    formula = "(24 - p) / (32 - p): half the tokens before layer p, 37.5 % on average"
    return [Number("Tab. 6", f"L_prune {p}", "rho_intra", "", (24 - p) / (32 - p), formula) for p in SWEEP]


def paper() -> Paper:
    variants = [
        *(line for method in ("sts", "divprune", "fastervlm") for line in budgets(method, 128, 64, 32)),
        *(f"{line},rho=1.0" for line in budgets("sts", 128, 64, 32)),
        *budgets("fastv", 128, 64),
    ]
    swept = [f"method=sts,keep=0.5,keep_after={(12 - p / 2) / (32 - p):.4g},prune_layer={p}" for p in SWEEP]
    figure = "the caption says LLaVA-NeXT-7B, the text LLaVA-1.5-7B; FastV cannot reach 32 tokens on average"
    return Paper(
        [*solved(), *efficiency(), *sweep()],
        ["Tab. 3: prefill 246 -> 38 ms, peak memory 13.8 GB (GPU not named)"],
        [
            Accuracy("Tab. 1", LLAVA, EIGHT, budgets("sts", 128, 64, 32)),
            Accuracy("Tab. 2", NEXT, EIGHT, budgets("sts", 640, 320, 160)),
            Accuracy("Tab. 4", LLAVA_13B, EIGHT, budgets("sts", 128, 64, 32)),
            Accuracy("Tab. 5", QWEN, ("gqa", "mmbench_en_dev", "mme", "pope"), budgets("sts", 0.2, 0.1)),
            Accuracy("Tab. 6", LLAVA, ("gqa", "textvqa_val", "pope"), swept),
            Accuracy("Fig. 4", LLAVA, ("gqa", "pope", "textvqa_val"), variants, figure),
        ],
    )
