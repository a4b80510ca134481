"""python -m sts_kernels generate: printed output, drawing and refusals."""

import builtins
import re

import pytest
import torch
from PIL import Image

from sts_kernels import generate
from sts_kernels.__main__ import main
from sts_kernels._cli import default_picture
from sts_kernels.integrations.transformers import random_models

PHOTO = str(default_picture())
ASK = ["--image", PHOTO, "--prompt", "What is on the table?", "--device", "cpu"]


def fails(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["generate", *arguments])
    assert exit_.value.code == 2
    error = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("python -m sts_kernels")]
    assert len(error) == 1
    return error[0]


def test_compare_prints_both_answers_and_the_report(capsys, tmp_path):
    drawn = tmp_path / "tokens.png"
    arguments = ["--random", "tiny", "--budget", "36", "--prune-layer", "2", "--max-new-tokens", "4"]
    assert main(["generate", *ASK, *arguments, "--compare", "--tokens", str(drawn)]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "random weights: the answer means nothing" in lines[0]
    assert [line.split()[0] for line in lines[1:5]] == ["full", "time", "pruned", "time"]
    for line in lines[2:5:2]:
        assert re.search(r"encode [\d.]+ ms, prefill [\d.]+ ms, whole answer [\d.]+ s", line)
    row = next(line for line in lines if re.match(r"\s+0\s+1\s+144\s", line)).split()
    assert row[2:6] == ["144", "54", "18", "36.0"]
    bright = brightness(drawn)
    assert bright[0] > bright[1]  # stage 2 left fewer tokens


def brightness(path) -> list[float]:
    """Mean brightness of the two panels."""
    with Image.open(path) as sheet:
        grey = sheet.convert("L")
        half = grey.width // 2
        panels = (
            grey.crop((10, 40, half - 10, grey.height - 20)),
            grey.crop((half + 10, 40, grey.width - 10, grey.height - 20)),
        )
        return [sum(panel.tobytes()) / (panel.width * panel.height) for panel in panels]


def test_full_budget_answers_as_the_plain_model(capsys):
    arguments = ["--random", "tiny", "--budget", "1.0", "--max-new-tokens", "3", "--compare"]
    torch.manual_seed(0)
    assert main(["generate", *ASK, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    answers = [line.split(maxsplit=1)[1] for line in lines if line.startswith(("full", "pruned"))]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        (["--method", "divprune", "--budget", "16"], ["144", "16", "16.0"]),
        (["--method", "fastervlm"], ["144", "29", "29.0"]),  # a fifth
        (["--method", "fastv", "--layers", "2", "--ratios", "0.25"], ["144", "144", "36", "90.0"]),
        (["--option", "llm_only=True", "--layers", "2", "--ratios", "0.25"], ["144", "144", "36", "90.0"]),
        (["--layers", "1"], ["144", "58", "19", "28.8"]),
        (["--method", "dart"], ["144", "144", "72", "108.0"]),
        (["--method", "polymorphic"], ["144", "58", "29", "15", "29.2"]),
        (["--method", "pyramiddrop"], ["144", "144", "72", "36", "18", "67.5"]),
        (["--method", "sparsevlm", "--budget", "0.6"], ["144", "144", "90", "55", "86.0"]),
        (["--method", "random", "--keep", "9", "--option", "seed=3"], ["144", "9", "9.0"]),
        (["--keep", "12", "--option", "anchor=first", "--option", "rho=0.5"], ["144", "12", "6", "9.0"]),
    ],
)
def test_methods(capsys, arguments, counts):
    assert main(["generate", *ASK, "--random", "tiny", "--max-new-tokens", "1", *arguments]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if re.match(r"\s+0\s+1\s", line)).split()
    assert row[2 : 2 + len(counts)] == counts


def test_several_images(capsys, tmp_path):
    small = tmp_path / "small.png"
    Image.new("RGB", (40, 30), "red").save(small)
    arguments = ["--random", "tiny", "--keep", "10", "--keep-after", "0.05", "--image", str(small)]
    assert main(["generate", *ASK, *arguments, "--max-new-tokens", "1"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if re.match(r"\s+0\s+2\s", line)).split()
    assert row[2:5] == ["288", "20", "14"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--image", "nowhere.png", "--prompt", "x", "--random", "tiny"], "cannot read the image nowhere.png"),
        ([*ASK, "--random", "tiny", "--budget", "0"], "budget must be at least 1 token, got 0"),
        ([*ASK, "--random", "tiny", "--budget", "9", "--keep", "3"], "give either budget or keep"),
        ([*ASK, "--random", "tiny", "--prune-layer", "4"], "prune_layer must be at most 3"),
        ([*ASK, "--random", "tiny", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        ([*ASK, "--random", "huge"], "invalid choice: 'huge'"),
        ([*ASK, "--random", "tiny", "--method", "magic"], "invalid choice: 'magic'"),
        ([*ASK, "--random", "tiny", "--method", "uniform", "--option", "seed=1"], "uniform: seed is not an option"),
        (
            [*ASK, "--random", "tiny", "--method", "uniform", "--prune-layer", "2"],
            "uniform: prune_layer is not an option",
        ),
        ([*ASK, "--random", "tiny", "--option", "seed"], "--option: must be NAME=VALUE, such as anchor=3, got 'seed'"),
        ([*ASK, "--random", "tiny", "--layers", "2,x"], "--layers: must be numbers of layers, with commas, such as"),
        ([*ASK, "--random", "tiny", "--ratios", "2,x"], "--ratios: must be numbers of tokens or shares of them, with"),
        ([*ASK, "--random", "tiny", "--method", "fastv", "--ratios", "2.5"], "ratios as a share must be above 0"),
        (
            [*ASK, "--random", "tiny", "--budget", "many"],
            "--budget: must be a number of tokens or a share of them, such as 128 or 0.25, got 'many'",
        ),
        ([*ASK], "one of the arguments --model --random is required"),
        ([*ASK, "--model", "/nowhere/at/all"], "cannot load /nowhere/at/all: there is no such folder"),
        ([*ASK, "--random", "tiny", "--device", "tpu"], "--device tpu cannot be used"),
    ],
)
def test_refusals_are_one_line(capsys, arguments, match):
    assert match in fails(capsys, *arguments)


def test_a_model_of_no_family(capsys, monkeypatch):
    class Unknown(torch.nn.Linear):
        config = random_models.RANDOM["tiny"].config().text_config

    def load(args, device, dtype):
        return Unknown(1, 1), random_models.build("tiny", "cpu", torch.float32)[1]

    monkeypatch.setattr(generate, "load", load)
    assert "Unknown (model_type 'llama') is not of a supported family: " in fails(capsys, *ASK, "--model", "x")


def test_without_transformers(capsys, monkeypatch):
    original = builtins.__import__

    def missing(name, globals=None, locals=None, fromlist=(), level=0):
        if level and "transformers" in (fromlist or ()):
            raise ImportError("needs the transformers package: pip install it")
        return original(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert "needs the transformers package: pip install it" in fails(capsys, *ASK, "--random", "tiny")


def test_a_checkpoint_from_disk(capsys, tmp_path):
    """As with a real checkpoint: saved, and loaded by AutoProcessor and AutoModelForImageTextToText."""
    model, processor = random_models.build("tiny", "cpu", torch.float32)
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    try:
        processor.save_pretrained(tmp_path)
        random_models.transformers.AutoProcessor.from_pretrained(tmp_path)
    except Exception as error:  # some versions of the library need torchvision for it
        pytest.skip(f"this environment cannot save and load a processor: {error}")
    assert main(["generate", *ASK, "--model", str(tmp_path), "--max-new-tokens", "2", "--budget", "20"]) == 0
    out = capsys.readouterr().out
    assert "random weights" not in out
    assert re.search(r"\s144\s+30\s+10\s+20.0\s", out)


@pytest.mark.parametrize("name", random_models.RANDOM)
def test_processors_of_the_true_sizes(name):
    """An image gives the advertised number of visual tokens, with the right placeholder ids."""
    entry = random_models.RANDOM[name]
    config = entry.config()
    inputs = generate.prepare(entry.processor(config), [Image.new("RGB", entry.image_size, "red")], "What?")
    ids = {getattr(config, n) for n in ("image_token_index", "image_token_id") if getattr(config, n, None) is not None}
    count = int(torch.isin(inputs["input_ids"], torch.tensor(sorted(ids))).sum())
    newlines = {"llava-next-7b": 48, "llava-onevision-7b": 81}.get(name, 0)
    assert count == entry.visual_tokens + newlines
