"""`python -m bench.decode_plans`: whether attention builds a new plan in a decode step for every new key length.

A  SDPA alone: first and second call at a key length
B  no hooks: decode steps on two equal caches alternate; the first cache sees every key length first
C  decode steps with hooks and of the plain model alternate; in two runs, so that each side is first once
D  generate(): ms per token at new key lengths and at the same lengths again, plain and pruned

Every experiment runs with and without cuDNN attention, in less than a minute on a GPU. Results: "Second run on a GPU",
NOTES.md. The model is a LLaVA of 32 thin layers: a decode step is host-bound, as in the full-size model.
"""

import argparse
import statistics
import sys
from functools import partial
from unittest import mock

import torch
from torch.nn.attention import SDPBackend

from sts_kernels import STSConfig

from . import backends, prefill, record
from .prefill import cudnn_attention, elapsed_ms

LAYERS = 32
HEADS = ((32, 32), (28, 4))  # (query heads, key heads): LLaVA-7B, Qwen2.5-VL-7B
CONFIG, UNIFORM = STSConfig(budget=32), STSConfig(budget=32, rho=1.0)  # two cache lengths; one (rho = 1)


def attention(heads, key_heads, device, dtype, met):
    """Experiment A."""
    first = 200 + prefill.unmet({200}, met)
    times = []
    for length in range(first + 1, first + prefill.STEPS + 1):
        shapes = (heads, 1), (key_heads, length), (key_heads, length)
        query, key, value = (torch.randn(1, h, n, 128, device=device, dtype=dtype) for h, n in shapes)
        options = {"enable_gqa": heads != key_heads}
        call = partial(torch.nn.functional.scaled_dot_product_attention, query, key, value, **options)
        times.append([elapsed_ms(call, device) for _ in range(2)])
    choice = SDPBackend(torch._fused_sdp_choice(query, key, value, **options)).name.lower()
    once, again = map(statistics.median, zip(*times[1:], strict=True))  # the first call also loads libraries
    print(f"A {heads:>2} / {key_heads:<2} heads, {choice:<20} first call {once:8.3f} ms  second {again:8.3f} ms")


def thin_llava(device, dtype):
    """A LLaVA of 32 thin layers, and a prompt."""
    import transformers

    from sts_kernels.generate import prepare
    from sts_kernels.integrations.transformers import random_models

    tiny = random_models.RANDOM["tiny"]
    config = tiny.config()
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    config.text_config = transformers.LlamaConfig(
        vocab_size=1024, max_position_embeddings=4096, pad_token_id=0, num_key_value_heads=4, **sizes
    )
    thin = random_models.RandomModel(lambda: config, tiny.processor, tiny.image_size, tiny.visual_tokens)
    with mock.patch.dict(random_models.RANDOM, thin=thin):
        model, processor = random_models.build("thin", device, dtype)
    return model, dict(prepare(processor, [prefill.picture(tiny.image_size)], "What is it?").to(device, dtype))


def alternate(sides, model, inputs, device, met):
    """Experiments B and C: all sides decode at the same key lengths; the first side runs first at each length."""
    with prefill.pruning(model, UNIFORM):
        length = prefill.cache_of(model, inputs).layers[0].keys.shape[2]
    extra = prefill.unmet({length}, met)
    text = {"input_ids": torch.full((1, length + extra), 5, device=device)}
    token = torch.full((1, 1), 5, device=device)
    caches, times = [], [[] for _ in sides]
    for config in sides:
        prompt = prefill.lengthened(inputs, extra) if config else text
        with prefill.pruning(model, config):
            caches.append(prefill.cache_of(model, prompt))
    for _ in range(prefill.STEPS // 2):
        for config, cache, taken in zip(sides, caches, times, strict=True):
            step = partial(prefill.decode_step, model, token, cache)
            with prefill.pruning(model, config):
                step()  # untimed: the first step after the hooks' (un)installation
                taken.append(elapsed_ms(step, device))
    results = [
        f"{'hooks' if config else 'plain'} {statistics.median(taken[1:]):.2f} ms a step"
        for config, taken in zip(sides, times, strict=True)
    ]
    print("C" if any(sides) else "B", ", then ".join(results))


def generation(config, model, inputs, device, met):
    """Experiment D."""
    with prefill.pruning(model, CONFIG) as sts:
        prefill.prefill(model, inputs)
        found = sts.report.rows[0]
    row = {"prompt": found.prompt, "visual": found.tokens, "keep": found.after_stage1, "keep_after": found.after_stage2}
    times = prefill.generation(model, inputs, row, config, device, met)
    print(f"D {'pruned' if config else 'plain'} {times['fresh_ms']:.2f} ms a token, again {times['again_ms']:.2f} ms")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.decode_plans", description=__doc__.split(": ", 1)[1])
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    backends.add_argument(parser)
    args = parser.parse_args(argv)
    device, met = torch.device(args.device), set()
    backends.stop_unless_compiled(device, prefill.OPS_TIMED, args.allow_reference)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = record.device_name(device)
    print(f"{name}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}", flush=True)
    shared = (*thin_llava(device, dtype), device, met)
    for allowed in (True, False):
        print(f"cuDNN attention {'on' if allowed else 'off'}", flush=True)
        with cudnn_attention(allowed):
            for heads in HEADS:
                attention(*heads, device, dtype, met)
            for sides in ((None, None), (UNIFORM, None), (None, UNIFORM)):
                alternate(sides, *shared)
            for config in (None, CONFIG):
                generation(config, *shared)
    return 0


if __name__ == "__main__":
    sys.exit(main())
