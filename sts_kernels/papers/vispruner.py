"""VisPruner: FLOPs and KV cache, compared with FastV."""

from typing import Any

from ..flops import Convention, LLMSize
from .base import (
    CACHE,
    EIGHT,
    LLAVA,
    NEXT,
    SHARE,
    VICUNA_7B,
    VICUNA_13B,
    VISUAL,
    Accuracy,
    Number,
    Paper,
    budgets,
    tera,
)

CLIP_L = LLMSize(24, 1024, 1024, 1024, 4096, 2)  # 336 px: 577 tokens per crop
ENCODER = tera(CLIP_L, 577, 0, Convention(2, 2, False))  # TFLOPs per crop
FASTV_LAYERS = 2  # layers that run on all tokens
LAYER = "2 (4nd^2 + 2n^2d + 3ndm) a layer, visual tokens alone"
FLOPS = f"{LAYER}, and {ENCODER:.3f} T a crop for the vision encoder; the paper gives no formula"
FASTV = f"; {FASTV_LAYERS} layers on all tokens"
# table -> ((model, size, crops, tokens, TFLOPs, cache), {kept tokens: (VisPruner TFLOPs, cache, FastV TFLOPs, cache)}).
TABLES = {
    "Tab. 6": (
        ("LLaVA-1.5-7B", VICUNA_7B, 1, 576, "8.02", "288.00"),
        {
            432: ("6.08", "216.00", "6.20", "220.50"),
            288: ("4.16", "144.00", "4.40", "153.00"),
            144: ("2.26", "72.00", "2.62", "85.50"),
            58: ("1.13", "29.00", "1.57", "45.31"),
            29: ("0.76", "14.50", "1.22", "31.72"),
        },
    ),
    "Tab. 7": (
        ("LLaVA-1.5-13B", VICUNA_13B, 1, 576, "15.28", "450.00"),
        {
            432: ("11.50", "337.50", "11.69", "343.13"),
            288: ("7.76", "225.00", "8.14", "236.25"),
            144: ("4.05", "112.50", "4.62", "129.38"),
            58: ("1.86", "45.31", "2.53", "65.70"),
            29: ("1.12", "22.66", "1.83", "44.19"),
        },
    ),
    "Tab. 8": (
        ("LLaVA-NeXT-7B", VICUNA_7B, 5, 2880, "43.58", "1440.00"),
        {
            2160: ("32.35", "1080.00", "33.05", "1102.50"),
            1440: ("21.66", "720.00", "23.04", "765.00"),
            720: ("11.51", "360.00", "13.53", "427.50"),
            290: ("5.71", "145.00", "8.10", "226.56"),
            145: ("3.80", "72.50", "6.30", "158.59"),
        },
    ),
}
# FastV's rows at 90 and 95 %: tokens before pruning are K / (1 - share), a round number, not the model's token count.
FASTV_BEFORE = {58: 580, 29: 580, 290: 2900, 145: 2900}
# Table 5: (tokens in the row label, kept tokens of the Table 8 row that it repeats, printed values as in TABLES).
REPEATED = ((640, 720, ("11.5", "360", "13.5", "380")), (160, 145, ("3.8", "80", "6.3", "95")))
FASTV_CACHE = {640: 2560, 160: 640}  # row label -> tokens before pruning implied by FastV's printed cache in Table 5


def pair(
    table: Any, row: Any, size: Any, crops: Any, segments: Any, printed: Any, notes: Any = ("", ""), tail: str = ""
) -> list[Number]:
    """The FLOPs and KV cache numbers of one table row."""
    flops = tera(size, segments, 0, VISUAL) + crops * ENCODER
    cache = size.kv_mb(sum(layers * tokens for layers, tokens in segments))
    return [
        Number(table, row, "TFLOPs", printed[0], flops, FLOPS + tail, notes[0]),
        Number(table, row, "KV cache, MB", printed[1], cache, CACHE + tail, notes[1]),
    ]


def fastv(size: Any, before: Any, kept: Any) -> Any:
    return [(FASTV_LAYERS, before), (size.layers - FASTV_LAYERS, kept)]


def table_5() -> list[Number]:
    numbers, size = [], VICUNA_7B
    for label, tokens, printed in REPEATED:
        repeats = f"Tab. 8 prints this for {tokens} tokens"
        notes = repeats, repeats if label == 640 else ""
        own = [(size.layers, label)]
        numbers += pair("Tab. 5", f"VisPruner, {label} tokens", size, 5, own, printed[:2], notes)
        notes = repeats, f"{printed[3]} MB follow from {FASTV_CACHE[label]} tokens before pruning, not 2880"
        numbers += pair(
            "Tab. 5", f"FastV, {label} tokens", size, 5, fastv(size, 2880, label), printed[2:], notes, FASTV
        )
    return numbers


def tables_6_to_8() -> list[Number]:
    numbers = []
    for table, ((model, size, crops, tokens, *whole), rows) in TABLES.items():
        numbers += pair(table, model, size, crops, [(size.layers, tokens)], whole)
        for kept, printed in rows.items():
            numbers += pair(table, f"VisPruner, {kept} tokens", size, crops, [(size.layers, kept)], printed[:2])
            before = FASTV_BEFORE.get(kept, tokens)
            note = "" if before == tokens else f"from {before} tokens before pruning; the model has {tokens}"
            segments = fastv(size, before, kept)
            numbers += pair(table, f"FastV, {kept} tokens", size, crops, segments, printed[2:], (note, note), FASTV)
    return numbers


def claims() -> list[Number]:
    whole, few, fewest = (tera(VICUNA_7B, tokens, 0, VISUAL) for tokens in (576, 32, 29))
    with_encoder = 100 * (1 - (few + ENCODER) / (whole + ENCODER))
    model = "LLaVA-1.5-7B, {} tokens"
    return [
        *(
            Number("Tab. 1", model.format(kept), "fewer tokens, %", printed, 100 * (1 - kept / 576), SHARE)
            for kept, printed in ((128, "77.8"), (64, "88.9"), (32, "94.4"))
        ),
        Number(
            "Sec. 1",
            model.format(32),
            "fewer FLOPs, %",
            "95",
            100 * (1 - few / whole),
            LAYER,
            f'"more than 95 %"; {with_encoder:.0f} % with the encoder',
        ),
        Number(
            "Abstract",
            model.format(29),
            "fewer FLOPs, %",
            "91",
            100 * (1 - (fewest + ENCODER) / (whole + ENCODER)),
            FLOPS,
        ),
        Number(
            "Abstract",
            model.format(29),
            "less latency, %",
            "75",
            100 * (1 - 77.15 / 107.26),
            "the paper's own times, Tab. 6",
            "75 % is LLaVA-NeXT-7B's: 313 -> 78 ms, Tab. 5",
        ),
        Number("Sec. 5.7", "LLaVA-NeXT-7B", "times less latency", "4", 313 / 78, "the paper's own times, Tab. 5"),
    ]


def paper() -> Paper:
    ten, five = (*EIGHT, "mmbench_cn_dev", "mmvet"), ("vqav2_val", "gqa", "textvqa_val", "pope", "mme")
    return Paper(
        [*table_5(), *tables_6_to_8(), *claims()],
        ["Tab. 5 to 8: GPU memory and CUDA time (one A100-80GB)"],
        [
            Accuracy("Tab. 1", LLAVA, ten, budgets("vispruner", 128, 64, 32), "mmvet asks an OpenAI model to judge"),
            Accuracy("Tab. 2", NEXT, five, budgets("vispruner", 640, 320, 160)),
        ],
        [
            "Tab. 3: answers about videos, judged by gpt-3.5-turbo",
            "Tab. 4: Qwen-VL, InternVL-Chat and CogVLM are not among the families",
        ],
    )
