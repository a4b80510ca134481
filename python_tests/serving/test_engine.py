"""vLLM's own engine and server against transformers under prune() with one stage: greedy tokens are the same.

The tests take minutes, and a Python with vllm: bench/serving_check.sh makes one. STS_KERNELS_TEST_VLLM=1 runs them.
"""

import base64
import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .checkpoints import write
from .prompts import PROMPTS, pictures

pytestmark = [pytest.mark.usefixtures("engine"), pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
CHUNKED = {"max_num_batched_tokens": 64, "block_size": 32}
TALKS = {"VLLM_LOGGING_LEVEL": "INFO"}
TWO_RANKS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}

# {process: (environment, {case: (family, options of the plugin, options of the engine)})}
# Options of the plugin None: STS_KERNELS_KEEP sets them, or nothing is pruned.
PROCESSES: dict[str, tuple[dict, dict]] = {
    "plain": (TALKS, {"llava": ("llava", None, {}), "qwen2_5_vl": ("qwen2_5_vl", None, {})}),
    "variable": ({"STS_KERNELS_KEEP": "32", **TALKS}, {
        "llava": ("llava", None, {}), "qwen3_vl": ("qwen3_vl", None, {})}),
    "ranks": (TWO_RANKS, {
        "llava": ("llava", {"keep": 32}, {"tensor_parallel_size": 2}),
        "qwen2_5_vl": ("qwen2_5_vl", {"keep": 40, "method": "fastervlm"}, {"tensor_parallel_size": 2}),
    }),
    "llava": ({}, {
        "keep": ("llava", {"keep": 32}, {}),
        "share": ("llava", {"keep": 0.25}, {}),
        "all": ("llava", {"keep": 1.0}, {}),
        "saliency": ("llava", {"keep": 32, "anchor": "saliency"}, {}),
        "contiguous": ("llava", {"keep": 32, "positions": "contiguous"}, {}),
        "chunked": ("llava", {"keep": 32}, CHUNKED),
        "split": ("llava", {"keep": 32}, {"max_num_batched_tokens": 300}),
        "compiled": ("llava", {"keep": 32}, {"enforce_eager": False}),
    }),
    "methods": ({}, {
        **{name: ("llava", {"keep": 32, "method": name}, {}) for name in (
            "adavtp", "divprune", "fastervlm", "fastervlm_divprune", "fps", "polymorphic", "random", "tome", "uniform",
            "visionzip", "vispruner")},
    }),
    "llava_next": ({}, {
        "keep": ("llava_next", {"keep": 20}, {}),
        "chunked": ("llava_next", {"keep": 20}, CHUNKED),
        "all": ("llava_next", {"keep": 1.0}, {}),
        "crops": ("llava_next", {"keep": 20, "scope": "crop"}, {}),
        "divprune": ("llava_next", {"keep": 20, "method": "divprune"}, {}),
        "fastervlm": ("llava_next", {"keep": 20, "method": "fastervlm"}, {}),
    }),
    "qwen2_5_vl": ({}, {
        "keep": ("qwen2_5_vl", {"keep": 40}, {}),
        "chunked": ("qwen2_5_vl", {"keep": 40}, CHUNKED),
        "all": ("qwen2_5_vl", {"keep": 1.0}, {}),
        "divprune": ("qwen2_5_vl", {"keep": 40, "method": "divprune"}, {}),
        "fastervlm": ("qwen2_5_vl", {"keep": 40, "method": "fastervlm"}, {}),
        "tome": ("qwen2_5_vl", {"keep": 40, "method": "tome"}, {}),
        "uniform": ("qwen2_5_vl", {"keep": 40, "method": "uniform"}, {}),
    }),
    "qwen3_vl": ({}, {
        "keep": ("qwen3_vl", {"keep": 40}, {}),
        "chunked": ("qwen3_vl", {"keep": 0.3}, CHUNKED),
        "divprune": ("qwen3_vl", {"keep": 40, "method": "divprune"}, {}),
        "vispruner": ("qwen3_vl", {"keep": 40, "method": "vispruner"}, {}),
    }),
}  # fmt: skip
CASES = [(process, case) for process, (_, cases) in PROCESSES.items() for case in cases]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return Path(os.environ.get("STS_KERNELS_TEST_CHECKPOINTS") or tmp_path_factory.mktemp("checkpoints"))


@functools.cache
def results(process: str, folder: Path) -> dict:
    """The engine's answers in all cases of a process."""
    changes, cases = PROCESSES[process]
    asked = [
        {"family": family, "path": str(write(family, folder)), "sts": sts, "options": options}
        for family, sts, options in cases.values()
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STS_KERNELS_KEEP")}
    done = subprocess.run(
        [sys.executable, "-m", "serving.engine"],
        input=json.dumps(asked),
        env=environment | changes,
        cwd=ROOT / "python_tests",
        capture_output=True,
        text=True,
    )
    lines = [
        json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if line.startswith("RESULT ")
    ]
    assert len(lines) == len(cases), done.stderr[-5000:]
    return dict(zip(cases, lines, strict=True)) | {"log": done.stdout + done.stderr}


@pytest.mark.parametrize(("process", "case"), CASES, ids=["-".join(case) for case in CASES])
def test_the_engine_answers_as_transformers_does(folder, process, case):
    from .oracle import answers

    changes, cases = PROCESSES[process]
    family, sts, _ = cases[case]
    keep = changes.get("STS_KERNELS_KEEP")
    options = sts or ({"keep": int(keep)} if keep else {})
    found = results(process, folder)[case]
    assert "error" not in found, found["error"]
    expected, lengths = answers(family, str(write(family, folder)), **options)
    assert found["lengths"] == lengths
    first, again = found["answers"]
    assert first == expected
    assert again == expected  # with prefix cache hits on blocks of the first round
    whole, _ = answers(family, str(write(family, folder)))
    if options and options.get("keep") != 1.0:
        assert sum(a != b for a, b in zip(expected, whole, strict=True)) >= 3  # else nothing was tested
    else:
        assert expected == whole


def test_a_prompt_comes_in_chunks_and_its_blocks_are_found_again(folder):
    for family in ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl"):
        cached = results(family, folder)["chunked"]["cached"]
        pictured = [bool(which) for _, which in PROMPTS]
        assert all(n >= 32 for n, has in zip(cached, pictured, strict=True) if has), (family, cached)


def test_ragged_images_are_picked_from_in_one_call(folder):
    (call,) = results("llava_next", folder)["keep"]["encoded"]
    assert sorted(call) == [26, 26, 32]  # 20 tokens, and a newline for each row


def test_it_says_what_is_pruned(folder):
    log = results("variable", folder)["log"]
    assert "sts keeps 32 tokens of each image before the LLM, at original positions" in log
    assert "tokens of each image before the LLM" not in results("plain", folder)["log"]


@pytest.mark.parametrize(
    ("environment", "sts", "sentence"),
    [
        ({"STS_KERNELS_KEEP": "many"}, None, "must be a number of tokens or a share"),
        ({}, {"keep": 32, "rho": 0.5}, "sts prunes inside the LLM"),
        ({}, {"keep": 32, "layers": [2]}, "layers is about pruning inside the LLM"),
        ({}, {}, "say how many tokens to keep"),
    ],
    ids=str,
)
def test_the_server_does_not_start(folder, environment, sts, sentence):
    case = {"family": "llava", "path": str(write("llava", folder)), "sts": sts}
    done = subprocess.run(
        [sys.executable, "-m", "serving.engine"],
        input=json.dumps([case]),
        env=os.environ | environment,
        cwd=ROOT / "python_tests",
        capture_output=True,
        text=True,
    )
    assert sentence in done.stdout + done.stderr
    assert '"answers"' not in done.stdout


def test_the_openai_server(folder):
    """The server has several processes, and takes an image as a data URL. It logs the line, and refuses a video."""
    sys.path.insert(0, str(ROOT))
    from bench import serving

    from .oracle import answers, loaded

    path = str(write("llava", folder))
    file = io.BytesIO()
    pictures("llava")[0].save(file, "PNG")
    image = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    log = folder / "server.log"
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "8"]
    with serving.server(path, log, "32", options) as url:
        found = serving.ask(url, path, image, " What is this?", 8)
    (expected, *_), (length, *_) = answers("llava", path, keep=32)
    assert found["text"] == loaded(path)[1].decode(expected, skip_special_tokens=True)
    assert found["prompt"] == length
    told = re.findall(r"sts_kernels [\d.]+: (.*)", log.read_text())
    assert told == ["sts keeps 32 tokens of each image before the LLM, at original positions"]
