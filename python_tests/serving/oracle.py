"""The engine's oracle: answers of transformers under prune() with one stage."""

import functools

import torch
import transformers

from sts_kernels.integrations.transformers import prune

from .prompts import NEW_TOKENS, pictures, prompts


@functools.cache
def loaded(path: str):
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    return model, transformers.AutoProcessor.from_pretrained(path)


def answers(family: str, path: str, method: str = "sts", **options) -> tuple[list[list[int]], list[int]]:
    """Greedy tokens and number of prompt tokens left, for each prompt. Without keep and budget nothing is pruned."""
    model, processor = loaded(str(path))
    images, out, left = pictures(family), [], []
    options = {"rho": 1.0, **options} if method == "sts" else options
    handle = prune(model, method, **options) if "keep" in options or "budget" in options else None
    try:
        for text, which in prompts(family):
            inputs = processor(images=[images[i] for i in which] or None, text=text, return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            length = inputs["input_ids"].shape[1]
            out.append(ids[0, length:].tolist())
            row = handle.report.rows[0] if handle and which else None
            left.append(length - (row.tokens - row.kept[0] if row else 0))
    finally:
        if handle:
            handle.remove()
    return out, left
