"""Prompts for both the engine and transformers: text, and the indices of its images."""

NEW_TOKENS = 8
PLACEHOLDER = {"llava": "<image>", "llava_next": "<image>"}  # others: Qwen's
SIZES = {  # width, height
    "llava": [(336, 336)] * 3,
    "llava_next": [(336, 336), (640, 300), (500, 700)],
    "qwen2_5_vl": [(280, 448), (448, 280), (196, 616)],  # a portrait picture first, and a narrow one
    "qwen3_vl": [(280, 448), (448, 280), (196, 616)],
}
PROMPTS = [
    ("IMAGE What is this? ASSISTANT:", [0]),
    ("IMAGE And this? ASSISTANT:", [1]),
    ("Two: a IMAGE b IMAGE c ASSISTANT:", [2, 0]),
    ("IMAGE IMAGE alike? ASSISTANT:", [0, 0]),
    ("No picture here. ASSISTANT:", []),
    ("A long question about a picture that comes last, after all of this text: ASSISTANT: IMAGE .", [1]),
]


def pictures(family: str) -> list:
    import numpy
    from PIL import Image

    random = numpy.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=numpy.uint8))
        for width, height in SIZES[family]
    ]


def prompts(family: str) -> list[tuple[str, list[int]]]:
    mark = PLACEHOLDER.get(family, "<|vision_start|><|image_pad|><|vision_end|>")
    return [(text.replace("IMAGE", mark), which) for text, which in PROMPTS]
