"""`python -m sts_kernels generate`: runs a vision-language model on images with pruned visual tokens."""

import ast
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ._cli import describe, find_device, first_line, load_picture, save
from ._errors import UserError
from .methods import Budget, Method, create, names
from .methods._budget import AMOUNT, parse_amount

RANDOM_NAMES = ("tiny", "llava-1.5-7b", "llava-next-7b", "llava-onevision-7b", "qwen2.5-vl-7b")
DTYPES = ("float32", "float16", "bfloat16")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


def parsed(parse: Callable[[str], Any], expected: str) -> Callable[[str], Any]:
    """`parse` as the type of an argument: where it raises ValueError, the error says what was `expected`."""

    def checked(text: str) -> Any:
        try:
            return parse(text)
        except ValueError:
            raise ArgumentTypeError(f"must be {expected}, got {text!r}") from None

    return checked


def listed(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [parse(part) for part in text.split(",")]


def pair(text: str) -> tuple[str, object]:
    """Parses NAME=VALUE; a value that is not a Python literal is a string."""
    name, found, value = text.partition("=")
    if not (name and found):
        raise ValueError(text)
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


amount = parsed(parse_amount, AMOUNT)
amounts = parsed(listed(parse_amount), "numbers of tokens or shares of them, with commas, such as 0.5,0.25,64")
layers = parsed(listed(int), "numbers of layers, with commas, such as 8,16,24")
option = parsed(pair, "NAME=VALUE, such as anchor=3")


def add_arguments(parser: ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="ID_OR_PATH", help="a checkpoint: hub id or local directory")
    source.add_argument(
        "--random",
        choices=RANDOM_NAMES,
        help="no checkpoint: a model with random weights, built from its configuration, and an in-memory tokenizer",
    )
    parser.add_argument("--image", action="append", required=True, metavar="FILE", help="a picture; may be repeated")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to ask")
    parser.add_argument(
        "--method", choices=names(), default="sts", help="`python -m sts_kernels methods` tells of them (default: sts)"
    )
    for name, what in (
        (
            "budget",
            "visual tokens of an image, averaged over the LLM's layers (default of methods that select before it: 0.2)",
        ),
        ("keep", "visual tokens of each image that enter the LLM, instead of --budget"),
        ("keep-after", "of sts: visual tokens of the prompt that stage 2 keeps"),
    ):
        parser.add_argument(f"--{name}", type=amount, metavar="N", help=f"{what}; a number, or a share like 0.2")
    parser.add_argument(
        "--prune-layer", type=int, metavar="N", help="of sts, fastv and dart: layers before the pruning in the LLM"
    )
    parser.add_argument("--layers", type=layers, metavar="N,N,..", help="layers before each pruning in the LLM")
    parser.add_argument("--ratios", type=amounts, metavar="N,N,..", help="what each of them keeps; numbers or shares")
    parser.add_argument(
        "--option",
        type=option,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the method; may be repeated",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="length of the answer (default: 64)"
    )
    parser.add_argument("--compare", action="store_true", help="run the plain model too, and print both answers")
    parser.add_argument("--tokens", metavar="FILE", help="draw the tokens that each stage left")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    parser.add_argument("--attn", choices=ATTENTIONS, default="sdpa", help="attention implementation (default: sdpa)")
    parser.add_argument("--device", help="where to run (default: cuda if there is one, else cpu)")


def run(args: Namespace) -> int:
    images = [load_picture(path) for path in args.image]
    device, (method, amounts) = find_device(args.device), configure(args)
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    try:
        from .integrations import transformers as integration
    except ImportError as error:
        raise UserError(str(error)) from error
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")

    model, processor = load(args, device, dtype)
    inputs = prepare(processor, images, args.prompt).to(device, dtype)
    answers = {}
    try:
        if args.compare:
            everything = create("uniform"), {"budget": 1.0}
            answers["full"] = ask(integration, model, processor, inputs, *everything, args.max_new_tokens)
        answers["pruned"] = ask(integration, model, processor, inputs, method, amounts, args.max_new_tokens)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise UserError(first_line(error)) from error

    what = args.model or f"{args.random} with random weights: the answer means nothing"
    print(f"model     {what}; {str(dtype).removeprefix('torch.')}, {args.attn}, on {describe(device)}")
    for name, (text, report, seconds) in answers.items():
        label = name if args.compare else "answer"
        print(f"{label:<10}{text!r}")
        times = f"encode {report.encode_ms:.1f} ms, prefill {report.prefill_ms:.1f} ms, whole answer {seconds:.2f} s"
        print(f"{'time':<10}{times} (one run, the first of its shapes)")
    _, report, _ = answers["pruned"]
    print(f"\n{report}")
    if args.tokens:
        from .integrations.transformers.visualize import draw

        save(draw(report, inputs, images, processor), args.tokens)
        print(f"\npicture   {args.tokens}: tokens that are left bright, dropped ones dimmed")
    return 0


def configure(args: Namespace) -> tuple[Method, dict[str, Any]]:
    """The method and the token amounts, checked as far as possible without a model."""
    options = dict(args.option)
    options |= {n: v for n in ("keep_after", "prune_layer") if (v := getattr(args, n)) is not None}
    amounts = {name: getattr(args, name) for name in ("budget", "keep", "layers", "ratios")}
    try:
        method = create(args.method, **options)
        given = [v for name, v in amounts.items() if name != "layers" and v is not None]
        if "keep" in method.takes and not given and not {"keep_after", "llm_only"} & set(options):
            amounts["budget"] = 0.2
        Budget(**amounts).check(method.name, method.takes, sys.maxsize)
        return method, amounts
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def load(args: Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    name, start = args.model or args.random, time.perf_counter()
    if name.startswith((".", "/")) and not Path(name).is_dir():  # not an id of the hub
        raise UserError(f"cannot load {name}: there is no such folder")
    print(f"loading {name} ...", file=sys.stderr, flush=True)
    try:
        if args.random:
            from .integrations.transformers.random_models import build

            model, processor = build(args.random, device, dtype, args.attn)
        else:
            import transformers

            processor = transformers.AutoProcessor.from_pretrained(name)
            model = transformers.AutoModelForImageTextToText.from_pretrained(
                name, dtype=dtype, attn_implementation=args.attn
            )
            model = model.eval().to(device)
    except Exception as error:  # hub, files, configurations and missing packages raise different types
        raise UserError(f"cannot load {name}: {first_line(error)}") from error
    print(f"loaded in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return model, processor


def prepare(processor: Any, images: list[Any], prompt: str) -> Any:
    turn = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
    try:
        text = processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
        return processor(text=[text], images=images, return_tensors="pt")
    except Exception as error:
        raise UserError(
            f"the model's processor cannot use this prompt and these images: {first_line(error)}"
        ) from error


def ask(
    integration: Any, model: Any, processor: Any, inputs: Any, method: Method, amounts: dict[str, Any], new_tokens: int
) -> Any:
    """Returns the answer, the report and the seconds taken."""
    with integration.prune(model, method, profile=True, **amounts) as pruning:
        start = time.perf_counter()
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        answer = ids[0, inputs["input_ids"].shape[1] :].tolist()
        return processor.decode(answer, skip_special_tokens=True).strip(), pruning.report, time.perf_counter() - start
