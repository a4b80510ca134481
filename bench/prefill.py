"""`python -m bench.prefill`: savings and cost of pruning in whole models.

Full-size models with random weights: times, memory and shapes are real, answers are meaningless. A GPU runs the 7B
models at the paper's budgets, the CPU the tiny model. One row per model, budget and cuDNN attention setting.

prefill   the LLM's forward over the prompt, until the logits are ready, on an idle device
encode    vision encoder, stage 1 and projector, measured the same way
stages    stage 1 (selection) and stage 2 (scores, top K', cutting) alone, between syncs, in separate runs; their share
          is relative to encode + prefill
hooks     a decode step with hooks against a step of the plain model on a text prompt. All layers of both have the same
          cache length (rho = 1). The two alternate at one key length that both have seen before
fresh     ms per token of generate() with the default rho (budget "all": plain model), at key lengths that no decode
          step of this process has seen before; "again": the same lengths once more

cuDNN attention builds an execution plan for every new key length, which takes tens of ms. Where torch prefers cuDNN,
everything is measured with and without cuDNN attention (--cudnn). Compare rows of one setting only: otherwise pruning
gets the credit for torch's default.
"""

import argparse
import contextlib
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch.nn.attention import SDPBackend

from sts_kernels import STSConfig
from sts_kernels.generate import amount

from . import backends, record, timing

COLUMNS = (
    *("timestamp", "commit", "model", "budget", "dtype", "attention", "prompt", "visual", "keep", "keep_after"),
    *(
        "encode_p20_ms",
        "encode_p50_ms",
        "encode_p80_ms",
        "prefill_p20_ms",
        "prefill_p50_ms",
        "prefill_p80_ms",
        "samples",
    ),
    *("stage1_ms", "stage2_ms", "share_percent", "decode_ms", "plain_decode_ms", "hooks_percent"),
    *("peak_gb", "weights_gb", "kv_mb", "tflops", "device", "threads", "torch", "transformers"),
    *("decode_lengths", "fresh_ms", "again_ms", "cudnn_attention", "sdpa_backend"),
)
STEPS = 16  # decode steps of a timed generate()
OPS_TIMED = ("repulsion_select", "repulsion_select_varlen", "last_query_scores")
BUDGETS = {
    "tiny": (32, 16),
    "llava-1.5-7b": (128, 64, 32),
    "llava-next-7b": (640, 320, 160),
    "qwen2.5-vl-7b": (0.2, 0.1),
    "llava-onevision-7b": (0.2, 0.1),
}


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed_ms(call, device: torch.device) -> float:
    sync(device)
    start = time.perf_counter()
    call()
    sync(device)
    return 1e3 * (time.perf_counter() - start)


@contextlib.contextmanager
def timed(targets: dict, device: torch.device):
    """Yields {name: accumulated ms}. targets: name -> (object, attribute) of a function to time between syncs."""
    spent = dict.fromkeys(targets, 0.0)

    def around(name, function):
        def run(*args, **kwargs):
            out = None

            def call():
                nonlocal out
                out = function(*args, **kwargs)

            spent[name] += elapsed_ms(call, device)
            return out

        return run

    with contextlib.ExitStack() as stack:
        for name, (target, attribute) in targets.items():
            stack.enter_context(mock.patch.object(target, attribute, around(name, getattr(target, attribute))))
        yield spent


def prefill(model, inputs):
    with torch.inference_mode():
        return model(**inputs, use_cache=True, logits_to_keep=1)


@contextlib.contextmanager
def cudnn_attention(allowed: bool | None):
    """Enables or disables cuDNN attention in SDPA for the whole process. None: unchanged."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before if allowed is None else allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def sdpa_backend(model, device: torch.device, dtype: torch.dtype) -> str:
    """SDPA backend of a decode step of `model`: "cudnn", "flash", "efficient" or "math"."""
    text = model.config.get_text_config()
    heads, size = text.num_attention_heads, getattr(text, "head_dim", None)
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    size = size or text.hidden_size // heads
    query, key = (torch.empty(1, h, n, size, device=device, dtype=dtype) for h, n in ((heads, 1), (key_heads, 200)))
    choice = torch._fused_sdp_choice(query, key, key, enable_gqa=key_heads != heads)
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()


def settings(asked: str | None, backend: str) -> list[bool | None]:
    """cuDNN attention setting of each pass; None: unchanged. backend: of sdpa_backend(); "" without SDPA on a GPU."""
    asked = asked or ("both" if backend == "cudnn" else None)
    return {None: [None], "on": [True], "off": [False], "both": [True, False]}[asked]


def pruning(model, config: STSConfig | None, **options):
    """apply_sts that leaves the benchmark's cuDNN attention setting unchanged. config=None: no pruning."""
    from sts_kernels.integrations.transformers import apply_sts

    if config is None:
        return contextlib.nullcontext()
    return apply_sts(model, config, cudnn_attention=True, **options)


def cache_of(model, inputs):
    """KV cache of a prompt."""
    from sts_kernels.integrations.transformers.compat import output_cache

    return output_cache(prefill(model, inputs))


def decode_step(model, token: torch.Tensor, cache) -> None:
    from sts_kernels.integrations.transformers.compat import CACHE

    with torch.inference_mode():
        model(input_ids=token, use_cache=True, **{CACHE: cache})


def measure(model, inputs, config: STSConfig, device: torch.device, samples: int) -> dict:
    """Numbers of one row, from `samples` runs after two warm-up runs."""
    from sts_kernels.integrations.transformers import layer_pruning, vision_pruning

    times = {"encode": [], "prefill": []}
    with pruning(model, config, measure=True) as sts:
        for run in range(samples + 2):
            prefill(model, inputs)
            if run >= 2:
                for name, taken in times.items():
                    taken.append(getattr(sts.report, f"{name}_ms"))
        row = sts.report.rows[0]
    out = {"prompt": row.prompt, "visual": row.tokens, "keep": row.after_stage1, "keep_after": row.after_stage2}
    out |= {"kv_mb": round(row.kv_mb[1], 1), "tflops": float(f"{row.prefill_tflops[1]:.4g}"), "samples": samples}
    for name, taken in times.items():
        for percent, value in zip((20, 50, 80), timing.percentiles(taken), strict=True):
            out[f"{name}_p{percent}_ms"] = round(value, 3)

    with pruning(model, config):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            prefill(model, inputs)
            out["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
        targets = {
            "stage1": (vision_pruning, "select"),
            "score": (layer_pruning, "last_query_scores"),
            "cut": (layer_pruning.LayerPruner, "_cut"),
        }
        spent = []
        for _ in range(max(3, samples // 4)):
            with timed(targets, device) as run:
                prefill(model, inputs)
            spent.append(run)
    out["stage1_ms"] = round(statistics.median(s["stage1"] for s in spent), 3)
    out["stage2_ms"] = round(statistics.median(s["score"] + s["cut"] for s in spent), 3)
    whole = out["encode_p50_ms"] + out["prefill_p50_ms"]
    out["share_percent"] = round(100 * (out["stage1_ms"] + out["stage2_ms"]) / whole, 2)
    return out


def decode(model, inputs, config: STSConfig, device: torch.device, steps: int, met: set[int]) -> dict:
    """A decode step on a pruned prompt, against a step of the plain model at the same key length."""
    uniform = STSConfig(budget=config.budget, rho=1.0, prune_layer=config.prune_layer)
    token = torch.full((1, 1), 5, device=device)
    with pruning(model, uniform):
        pruned = cache_of(model, inputs)
    length = pruned.layers[0].keys.shape[2]
    plain = cache_of(model, {"input_ids": torch.full((1, length), 5, device=device)})

    def second(cache):
        """Times the second of two steps at one key length. The first pays for the new length and the changed hooks."""
        for _ in range(2):
            taken = elapsed_ms(lambda: decode_step(model, token, cache), device)
            cache.crop(-1)
        return taken

    met.add(length + 1)
    times = {"decode": [], "plain_decode": []}
    for turn in range(steps + 3):  # alternate, so that noise affects both
        with pruning(model, uniform):
            mine = second(pruned)
        theirs = second(plain)
        if turn >= 3:
            times["decode"].append(mine)
            times["plain_decode"].append(theirs)
    mine, theirs = (statistics.median(taken) for taken in times.values())
    return {
        "decode_ms": round(mine, 3),
        "plain_decode_ms": round(theirs, 3),
        "hooks_percent": round(100 * (mine / theirs - 1), 2),
        "decode_lengths": "met",
    }


def unmet(lengths: set[int], met: set[int]) -> int:
    """Tokens to add to a prompt so that its next STEPS decode steps see only new key lengths.

    lengths: cache lengths of the prompt. met: key lengths seen so far; updated with those of the steps.
    """
    extra = 0
    while met & (steps := {length + extra + step for length in lengths for step in range(1, STEPS + 1)}):
        extra += 1
    met |= steps
    return extra


def lengthened(inputs: dict, extra: int) -> dict:
    """The prompt with `extra` text tokens appended."""
    shape, fill = inputs["input_ids"].shape, {"input_ids": 5, "attention_mask": 1}
    return {
        name: torch.nn.functional.pad(value, (0, extra), value=fill.get(name, 0)) if value.shape == shape else value
        for name, value in inputs.items()
    }


def per_token(model, inputs: dict, device: torch.device) -> tuple[float, float]:
    """ms per token of generate() after the first token: in a first run, and again at the same key lengths."""

    def run(tokens):
        with torch.inference_mode():
            model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    run(1)
    first, fresh, again = (elapsed_ms(lambda n=n: run(n), device) for n in (1, STEPS + 1, STEPS + 1))
    return (fresh - first) / STEPS, (again - first) / STEPS


def generation(model, inputs: dict, row: dict, config: STSConfig | None, device: torch.device, met: set[int]) -> dict:
    """ms per token of the plain model (config=None), or of the pruned model, whose cache lengths are in `row`."""
    text = row["prompt"] - row["visual"]
    lengths = {text + row["keep"], text + row["keep_after"]} if config else {row["prompt"]}
    longer = lengthened(inputs, unmet(lengths, met))
    with pruning(model, config):
        fresh, again = per_token(model, longer, device)
    return {"fresh_ms": round(fresh, 3), "again_ms": round(again, 3)}


def picture(size: tuple[int, int]):
    """A smooth picture: neighbouring patches are similar, as in a photograph."""
    from PIL import Image

    noise = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0)).mul(255).to(torch.uint8)
    small = Image.frombytes("RGB", (16, 16), noise.numpy().tobytes())
    return small.resize(size, Image.Resampling.BICUBIC)


def rows(name: str, args, met: set[int]):
    """Yields a row for the plain model and one for each budget, for every cuDNN attention setting.

    met: key lengths that decode steps of this process have seen.
    """
    import transformers

    from sts_kernels.generate import prepare
    from sts_kernels.integrations.transformers.random_models import RANDOM, build

    dtype = getattr(torch, args.dtype)
    model, processor = build(name, args.device, dtype, args.attn)
    inputs = prepare(processor, [picture(RANDOM[name].image_size)], "What is in this picture?").to(args.device, dtype)
    inputs = dict(inputs)
    shared = {**record.environment(args.device, args.commit), "transformers": transformers.__version__}
    shared |= {"model": name, "dtype": args.dtype, "attention": args.attn}
    shared["weights_gb"] = round(sum(p.nbytes for p in model.parameters()) / 1e9, 3)
    on_gpu = args.device.type == "cuda" and args.attn == "sdpa"
    for allowed in settings(args.cudnn, sdpa_backend(model, args.device, dtype) if on_gpu else ""):
        with cudnn_attention(allowed):
            if on_gpu:
                shared["cudnn_attention"] = "on" if torch.backends.cuda.cudnn_sdp_enabled() else "off"
                shared["sdpa_backend"] = sdpa_backend(model, args.device, dtype)
            for budget in (1.0, *(args.budget or BUDGETS[name])):
                config = STSConfig(budget=budget)
                row = {**shared, "budget": "all" if budget == 1.0 else budget}
                row |= measure(model, inputs, config, args.device, args.samples)
                if budget == 1.0:
                    row |= generation(model, inputs, row, None, args.device, met)
                else:
                    row |= decode(model, inputs, config, args.device, args.samples * 2, met)
                    row |= generation(model, inputs, row, config, args.device, met)
                yield {column: row.get(column, "") for column in COLUMNS}
    del model
    if args.device.type == "cuda":
        torch.cuda.empty_cache()


def show(row: dict, full: dict) -> None:
    def against(name: str) -> str:
        mine, all_ = float(row[name]), float(full[name])
        return f"{mine:>9.4g} ({all_ / mine:.2f}x)" if row is not full and mine else f"{mine:>9.4g}        "

    print(
        f"{row['model']:<14} {row['budget']!s:>6} {row['visual']:>6} -> {row['keep']:>5} -> {row['keep_after']:>5}  "
        f"encode {row['encode_p50_ms']:>8.4g} ms  prefill {against('prefill_p50_ms')} ms  KV {against('kv_mb')} MB  "
        f"{against('tflops')} TFLOP  peak {row['peak_gb'] or '-'!s:>6} GB  pruning {row['stage1_ms']:.3g} + "
        f"{row['stage2_ms']:.3g} ms, {row['share_percent']} %  hooks {row['hooks_percent'] or '-'} %  "
        f"token {row['fresh_ms']:.4g} ms, again {row['again_ms']:.4g} ms  cuDNN {row['cudnn_attention'] or '-'}",
        flush=True,
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.prefill", description=__doc__.splitlines()[0].split(": ")[1])
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", action="append", choices=BUDGETS, help="default: the 7B models on a GPU, else tiny")
    parser.add_argument("--budget", action="append", type=amount, help="tokens or a share; default: the paper's")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if cuda else "cpu"))
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--attn", default="sdpa", help="attention implementation (default: sdpa)")
    parser.add_argument(
        "--cudnn",
        choices=("on", "off", "both"),
        help="let torch take cuDNN's attention, or not (default: both where torch would take it, else as it is)",
    )
    parser.add_argument("--samples", type=int, default=20, help="prefills a row (default: 20)")
    parser.add_argument("--seconds", type=float, help="start no further model or budget after so many")
    parser.add_argument("--csv", type=Path, help="default: bench/results/prefill.csv")
    parser.add_argument("--commit", help="what to record as commit where there is no git checkout")
    backends.add_argument(parser)
    args = parser.parse_args(argv)
    if args.device.type == "cuda" and not cuda:
        parser.error(f"--device {args.device}: torch {torch.__version__} sees no CUDA GPU")
    if args.cudnn and (args.device.type != "cuda" or args.attn != "sdpa"):
        parser.error(f"--cudnn is about --attn sdpa on a GPU, got --attn {args.attn} on {args.device.type}")
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    backends.stop_unless_compiled(args.device, OPS_TIMED, args.allow_reference)
    path, begun, met = args.csv or record.RESULTS / "prefill.csv", time.monotonic(), set()
    for name in args.model or (list(BUDGETS)[1:] if args.device.type == "cuda" else ["tiny"]):
        print(f"building {name} with random weights", file=sys.stderr, flush=True)
        full = None
        for row in rows(name, args, met):
            full = row if row["budget"] == "all" else full
            record.append(path, [row], COLUMNS)
            show(row, full)
            if args.seconds and time.monotonic() - begun > args.seconds:
                print(f"{args.seconds:g} s are over, the rest is left out")
                return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
