"""`python -m bench.ways`: execution modes of a model, plain and pruned: time to first token and time per output token.

Full-size models with random weights: times, memory and shapes are real, answers are meaningless. One row per model,
mode ("way"), batch and budget.

eager              plain generate()
captured           PruningHandle.compile(): encoder, prefill and decode step; on a GPU, one CUDA graph each
static             generate(cache_implementation="static"): transformers compiles the decode step on a GPU
captured-inductor  as captured, with each part compiled by Inductor before capture

Rows are made model by model, then in the order of --way, batch by batch. All default rows on an H200 are
estimated at half an hour, most of it compilation: static 30 s a row, captured-inductor 60. --resume continues a run.

build    s until the second answer: includes compilation and capture
encode   ms of vision encoder, selection and projector; prefill: ms of the LLM's forward over the prompt. Both are
         the report's, taken between syncs. So the plain model too runs under `prune`, with all tokens as budget
first    ms to the first token: generate() of one token
token    ms per further token: (generate() of 65 tokens - generate() of one) / 64; tokens/s: of the 65-token answer, all
         rows of the batch together

All rows of a batch have the same picture and question. cuDNN attention is off: it builds a plan for every new key
length, which takes tens of ms.
"""

import argparse
import gc
import itertools
import sys
import time
from pathlib import Path

import torch

from sts_kernels.generate import amount

from . import backends, record, timing
from .prefill import BUDGETS, OPS_TIMED, cudnn_attention, elapsed_ms, picture

COLUMNS = (
    *("timestamp", "commit", "model", "way", "batch", "budget", "dtype", "attention", "prompt", "visual", "keep"),
    *("keep_after", "build_s", "encode_ms", "prefill_ms", "first_p20_ms", "first_p50_ms", "first_p80_ms", "token_ms"),
    *("tokens_per_s", "samples", "peak_gb", "weights_gb", "device", "threads", "torch", "transformers"),
)
WAYS = ("eager", "captured", "static", "captured-inductor")
NEW_TOKENS = 64  # tokens after the first one in a timed answer
# Columns that tell one measurement from another.
IDENTITY = ("commit", "device", "model", "way", "batch", "budget", "dtype", "attention")


class Way:
    """A model set up for one way. `answer(tokens)` generates; `pruning.report` describes the last prompt."""

    def __init__(self, name: str, model, inputs: dict, pruning):
        self.model, self.inputs, self.pruning = model, inputs, pruning
        self.options = {"cache_implementation": "static"} if name == "static" else {}
        if name.startswith("captured"):
            backend = name.removeprefix("captured").removeprefix("-") or None
            batch = len(inputs["input_ids"])
            pruning.compile(batch_size=batch, max_new_tokens=NEW_TOKENS + 1, backend=backend, strict=True)

    def answer(self, tokens: int) -> None:
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, **self.options}
        with torch.inference_mode():
            self.model.generate(**self.inputs, **options)


def check_compiled(device: torch.device) -> None:
    """Raises unless generate() compiled its decode step without a break, and runs it as a CUDA graph."""
    from torch._dynamo.utils import counters

    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    skipped = counters["inductor"]["cudagraph_skips"]
    if device.type == "cuda" and (graphs == 0 or breaks or skipped):
        counts = f"{graphs} graphs, {breaks} breaks, {skipped} without a CUDA graph"
        raise RuntimeError(f"the decode step is not compiled as a whole: {counts}")


def free(device: torch.device) -> None:
    """Frees the memory of the last row: compiled functions hold caches in reference cycles."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(way: Way, device: torch.device, samples: int) -> dict:
    begun = time.perf_counter()
    for _ in range(2):  # graphs are captured at the second call of a shape
        way.answer(1 + NEW_TOKENS)
    out = {"build_s": round(time.perf_counter() - begun, 2), "samples": samples}
    if way.options:
        check_compiled(device)
    gc.collect()  # a compiled answer leaves its cache in a reference cycle
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    way.answer(1 + NEW_TOKENS)
    first, long, clock = [], [], {"encode": [], "prefill": []}
    for _ in range(samples):
        first.append(elapsed_ms(lambda: way.answer(1), device))
        for name, taken in clock.items():
            taken.append(getattr(way.pruning.report, f"{name}_ms"))
    for _ in range(max(3, samples // 4)):
        long.append(elapsed_ms(lambda: way.answer(1 + NEW_TOKENS), device))
    for percent, value in zip((20, 50, 80), timing.percentiles(first), strict=True):
        out[f"first_p{percent}_ms"] = round(value, 3)
    for name, taken in clock.items():
        out[f"{name}_ms"] = round(timing.percentiles(taken)[1], 3)
    whole = timing.percentiles(long)[1]
    out["token_ms"] = round((whole - out["first_p50_ms"]) / NEW_TOKENS, 3)
    out["tokens_per_s"] = round(1e3 * (1 + NEW_TOKENS) * len(way.inputs["input_ids"]) / whole, 1)
    if device.type == "cuda":
        out["peak_gb"] = round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    row = way.pruning.report.rows[0]
    return out | {"prompt": row.prompt, "visual": row.tokens, "keep": row.after_stage1, "keep_after": row.after_stage2}


def rows(name: str, args, done: set):
    """Yields a row for each way, batch and budget of the model `name`; None in place of one that failed.

    done: IDENTITY of the rows to leave out.
    """
    import transformers

    from sts_kernels.generate import prepare
    from sts_kernels.integrations.transformers import prune
    from sts_kernels.integrations.transformers.random_models import RANDOM, build

    dtype = getattr(torch, args.dtype)
    model, processor = build(name, args.device, dtype, args.attn)
    one = dict(
        prepare(processor, [picture(RANDOM[name].image_size)], "What is in this picture?").to(args.device, dtype)
    )
    shared = {**record.environment(args.device, args.commit), "transformers": transformers.__version__}
    shared |= {"model": name, "dtype": args.dtype, "attention": args.attn}
    shared["weights_gb"] = round(sum(p.nbytes for p in model.parameters()) / 1e9, 3)
    for kind, batch, budget in itertools.product(args.way, args.batch, args.budget or (1.0, *BUDGETS[name])):
        row = {**shared, "way": kind, "batch": batch, "budget": "all" if budget == 1.0 else budget}
        if identity(row) in done:
            continue
        inputs = {key: value.repeat(batch, *[1] * (value.ndim - 1)) for key, value in one.items()}
        free(args.device)
        failure = ""
        try:
            with prune(model, "sts", budget=budget, profile=True, cudnn_attention=True) as pruning:
                row |= measure(Way(kind, model, inputs, pruning), args.device, args.samples)
            if budget != 1.0 and row["keep"] == row["visual"]:
                failure = f"it drops none of {row['visual']} tokens"
        except RuntimeError as error:  # out of memory among them
            failure = str(error)
        if failure:
            what = f"{name}, {kind}, batch {batch}, budget {row['budget']}"
            print(f"FAILED: {what}: {failure}", file=sys.stderr, flush=True)
        yield None if failure else {column: row.get(column, "") for column in COLUMNS}


def identity(row: dict) -> tuple:
    return tuple(str(row[name]) for name in IDENTITY)


def show(row: dict) -> None:
    tokens = " -> ".join(f"{row[name]:>4}" for name in ("visual", "keep", "keep_after"))
    times = "  ".join(f"{name} {row[f'{name}_ms']:>8.4g} ms" for name in ("encode", "prefill"))
    print(
        f"{row['model']:<14} {row['way']:<18} batch {row['batch']:>2}  {tokens}  {times}  "
        f"first {row['first_p50_ms']:>7.4g} ms  token {row['token_ms']:>6.4g} ms {row['tokens_per_s']:>7.5g} tokens/s  "
        f"peak {row['peak_gb'] or '-'} GB  built in {row['build_s']:.3g} s",
        flush=True,
    )


PANELS = {"first_p50_ms": "first token, ms", "token_ms": "each further token, ms"}


def title(row: dict) -> str:
    return f"{row['model']}, batch {row['batch']}, {row['dtype']}, {row['attention']}"


def chart(rows: list[dict]):
    """Figure of times against budget: one column of panels per model, batch, dtype and attention, one line per way.

    If a measurement has several rows, the last is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    newest = {(title(row), row["way"], row["budget"]): row for row in rows}
    groups = sorted({title(row): row for row in rows}.values(), key=lambda row: (row["model"], int(row["batch"])))
    figure, panels = pyplot.subplots(
        *(len(PANELS), len(groups)),
        figsize=(1 + 3 * len(groups), 5.5),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for group, column in zip(map(title, groups), panels.T, strict=True):
        column[0].set_title(group, fontsize=10)
        column[-1].set(xlabel="visual tokens, mean over layers")
        for way in dict.fromkeys(key[1] for key in newest if key[0] == group):
            mine = sorted((row for key, row in newest.items() if key[:2] == (group, way)), key=average)
            colour = f"C{WAYS.index(way)}"
            for panel, value in zip(column, PANELS, strict=True):
                points = [(average(row), float(row[value])) for row in mine]
                panel.plot(*zip(*points, strict=True), "o-", color=colour, label=way)
                for at in points:
                    panel.annotate(f"{at[1]:.3g}", at, (0, 5), textcoords="offset points", ha="center", fontsize=8)
    for panel in panels.flat:
        points = [point for line in panel.lines for point in line.get_xydata()]
        across, up = (1.15 * max(values) for values in zip(*points, strict=True))
        panel.set(xlim=(0, across), ylim=(0, up))
        panel.grid(True, alpha=0.2)
    for panel, what in zip(panels[:, 0], PANELS.values(), strict=True):
        panel.set(ylabel=what)
    lines = {line.get_label(): line for panel in panels.flat for line in panel.lines}
    last = rows[-1]
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=len(WAYS), frameon=False)
    figure.suptitle(f"{last['device']}, torch {last['torch']}", fontsize=10)
    return figure


def draw(rows: list[dict], png: Path) -> None:
    """Saves chart() as a PNG whose description names the lines."""
    figure = chart(rows)
    lines = sorted({f"{title(row)}, {row['way']}" for row in rows})
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=100, metadata={"Description": "; ".join(lines)}, pil_kwargs={"optimize": True})


def average(row: dict) -> float:
    """Visual tokens of the prompt averaged over the layers."""
    return (int(row["keep"]) + int(row["keep_after"])) / 2


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ways", description=__doc__.splitlines()[0].split(": ", 1)[1])
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", action="append", choices=BUDGETS, help="default: the LLaVA ones on a GPU, else tiny")
    parser.add_argument("--way", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--batch", nargs="+", type=int, default=(1, 16))
    parser.add_argument("--budget", nargs="+", type=amount, help="tokens or a share; default: 1.0 and the paper's")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda" if cuda else "cpu"))
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--attn", default="sdpa", help="attention implementation (default: sdpa)")
    parser.add_argument("--samples", type=int, default=12, help="first tokens a row (default: 12)")
    parser.add_argument("--seconds", type=float, help="start no further row after so many")
    parser.add_argument("--csv", type=Path, help="default: bench/results/ways.csv")
    parser.add_argument("--resume", action="store_true", help="leave out what --csv has, of this commit and device")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the rows of --csv instead of measuring")
    parser.add_argument("--commit", help="what to record as commit where there is no git checkout")
    backends.add_argument(parser)
    args = parser.parse_args(argv)
    path = args.csv or record.RESULTS / "ways.csv"
    if args.plot:
        measured = record.read(path) if path.exists() else []
        if measured:
            draw(measured, args.plot)
        print(f"drew {args.plot}" if measured else f"{path} has no rows to draw; measure first")
        return 0 if measured else 2
    if args.device.type == "cuda" and not cuda:
        parser.error(f"--device {args.device}: torch {torch.__version__} sees no CUDA GPU")
    args.dtype = args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32")
    backends.stop_unless_compiled(args.device, OPS_TIMED, args.allow_reference)
    done = {identity(row) for row in record.read(path)} if args.resume and path.exists() else set()
    begun, failed = time.monotonic(), False
    with cudnn_attention(False):
        for name in args.model or (["llava-1.5-7b", "llava-next-7b"] if args.device.type == "cuda" else ["tiny"]):
            free(args.device)  # the model before
            print(f"building {name} with random weights", file=sys.stderr, flush=True)
            for row in rows(name, args, done):
                if row is None:
                    failed = True
                else:
                    record.append(path, [row], COLUMNS)
                    show(row)
                if args.seconds and time.monotonic() - begun > args.seconds:
                    print(f"{args.seconds:g} s are over, the rest is left out")
                    return int(failed)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
