"""Messages for a library that is missing or does not load, and the commands in them."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import sts_kernels
from sts_kernels import _errors, _native
from sts_kernels._registry import OPS

PACKAGE = Path(sts_kernels.__file__).parent


def direct_url(**content):
    """A stand-in for the metadata of an installation that pip made from `content`, as direct_url.json has it."""
    text = json.dumps(content) if content else None
    return lambda name: type("Distribution", (), {"read_text": lambda self, file: text})()


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An installed package without a library, in an environment that has pip and is active."""
    package = tmp_path / "site/sts_kernels"
    package.mkdir(parents=True)
    monkeypatch.delenv("STS_KERNELS_DISABLE", raising=False)
    monkeypatch.setattr(_native, "LIBRARY", package / "libsts_kernels.so")
    monkeypatch.setattr(_native, "BUILD_INFO", package / "build_info.json")
    monkeypatch.setattr(_native, "ROOT", tmp_path / "site")
    monkeypatch.setattr(_native.importlib.metadata, "distributions", lambda name: [])
    monkeypatch.setattr(_native.importlib.metadata, "distribution", direct_url())
    monkeypatch.setattr(_errors.shutil, "which", lambda name: sys.executable)
    monkeypatch.setattr(_errors, "has_pip", lambda: True)
    return package.parent


def build_info(site, **content):
    (site / "sts_kernels/build_info.json").write_text(json.dumps(content))


def warned() -> tuple[str, _native.Status]:
    """The import's warning, or "", and the status."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        status = _native.status.__wrapped__()
    return "".join(str(warning.message) for warning in caught), status


AGAIN = "python -m pip install --no-deps --force-reinstall"


def test_not_built(site):
    message, status = warned()
    assert status.reason == "the compiled library was not built"
    assert message == (
        f"sts_kernels runs on its slow PyTorch reference: {status.reason}. To fix it: in a checkout, {AGAIN} ."
    )
    build_info(site, reason="the compiled library is for Linux, and this is darwin")  # carried here in a wheel
    assert "was not built (the compiled library is for Linux, and this is darwin)" in warned()[0]


def test_a_checkout_that_was_never_built(site):
    (site / "setup.py").touch()
    assert _native.load().remedies() == [f"{AGAIN} {site}"]


def test_left_out_on_purpose(site, monkeypatch):
    build_info(site, reason="STS_KERNELS_NATIVE=0")
    message, status = warned()
    assert (message, status.chosen, status.remedies()) == ("", True, [])
    assert status.why("CPU") == "the package was built with STS_KERNELS_NATIVE=0"
    monkeypatch.setenv("STS_KERNELS_DISABLE", "1")
    message, status = warned()
    assert (message, status.reason, status.remedies()) == ("", "STS_KERNELS_DISABLE=1 is set", [])


def test_elsewhere_than_on_linux(site, monkeypatch):
    monkeypatch.setattr(_native.sys, "platform", "darwin")
    message, status = warned()
    assert message.endswith(": the compiled library is for Linux, and this is darwin")
    assert status.remedies() == []


def test_a_checkout_hides_an_installed_package(site, tmp_path, monkeypatch):
    (site / "setup.py").touch()
    installed = tmp_path / "installed/sts_kernels"
    installed.mkdir(parents=True)
    copies = [
        type("Distribution", (), {"locate_file": lambda self, file, folder=folder: folder / file})()
        for folder in (site, installed.parent)
    ]
    monkeypatch.setattr(_native.importlib.metadata, "distributions", lambda name: copies)
    assert "hides" not in _native.load().reason  # the installed package has no library either
    (installed / "libsts_kernels.so").touch()
    status = _native.load()
    assert status.reason == (
        f"{site / 'sts_kernels'} hides the installed package in {installed}, which has the compiled library"
    )
    assert status.remedy == f"start Python in another folder than {site}, or build here: {AGAIN} {site}"


def test_a_library_that_does_not_load(site, monkeypatch):
    _native.LIBRARY.write_text("no library")
    message, status = warned()
    assert "the compiled library does not load: " in message
    assert "invalid ELF header" in message or "file too short" in message  # the linker's words
    assert status.remedy == f"in a checkout, {AGAIN} ."
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    status = _native.load()
    assert status.reason.endswith("; torch is 2.9.1+cu128")
    assert status.remedy == "python -m pip install --upgrade 'torch>=2.10'"


def test_built_without_cuda_where_there_is_a_gpu(site, monkeypatch):
    status = _native.Status(True, "", {"cuda": "", "reason": "no nvcc was found"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert status.remedies() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert status.remedies() == [
        f"for the CUDA kernels, with nvcc 12.1 or newer: in a checkout, STS_KERNELS_CUDA=1 {AGAIN} ."
    ]
    assert _native.Status(True, "", {"cuda": "13.0"}).remedies() == []


def test_why_an_op_is_not_served_by_a_library_that_is_loaded():
    with_cuda, without = (_native.Status(True, "", {"cuda": version, "reason": "no nvcc"}) for version in ("13.0", ""))
    assert with_cuda.why("CUDA") == without.why("CPU") == "the compiled library is loaded"
    for status, key in ((with_cuda, "CUDA"), (with_cuda, "CPU"), (without, "CPU")):
        assert status.why(key, has_kernel=False) == "the compiled library has no kernel for it"
    assert without.why("CUDA", has_kernel=False) == "the compiled library was built without CUDA (no nvcc)"


@pytest.mark.parametrize(
    ("direct", "arguments"),
    [
        ({"url": "file://{}", "dir_info": {}}, "{}"),
        ({"url": "file://{}", "dir_info": {"editable": True}}, "-e {}"),
        (
            {"url": "https://a.example/x.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            "--no-cache-dir git+https://a.example/x.git@abc",
        ),
        (
            {"url": "https://a.example/sts_kernels-0.1.0.tar.gz"},
            "--no-cache-dir https://a.example/sts_kernels-0.1.0.tar.gz",
        ),
        ({"url": "file:///nowhere/any.whl"}, None),
        ({"url": "file:///nowhere"}, None),
        ({}, None),
    ],
)
def test_it_is_built_again_from_where_it_was_installed_from(site, tmp_path, monkeypatch, direct, arguments):
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    (checkout / "setup.py").touch()
    if "dir_info" in direct and direct["dir_info"].get("editable"):
        monkeypatch.setattr(_native, "ROOT", checkout)
    direct = direct | {"url": direct.get("url", "").replace("{}", checkout.as_uri().removeprefix("file://"))}
    monkeypatch.setattr(_native.importlib.metadata, "distribution", direct_url(**direct))
    wanted = f"in a checkout, {AGAIN} ." if arguments is None else f"{AGAIN} {arguments}"
    assert _native.rebuild() == wanted.replace("{}", shlex.quote(str(checkout)))


def test_uv_is_told_where_torch_is(site, monkeypatch):
    monkeypatch.setattr(_errors, "has_pip", lambda: False)
    assert _native.rebuild() == "in a checkout, uv pip install --no-deps --force-reinstall ."
    monkeypatch.setattr(_errors.shutil, "which", lambda name: None)
    include = Path(torch.__file__).parent / "include"
    assert _native.rebuild() == (
        f"in a checkout, STS_KERNELS_TORCH_INCLUDE={include} uv pip install --python {sys.executable} "
        "--no-deps --force-reinstall ."
    )


def test_the_warning_points_at_the_import(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "sts_kernels", ignore=shutil.ignore_patterns("*.so", "build_info.json"))
    (tmp_path / "use.py").write_text("\nimport sts_kernels\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STS_KERNELS_")}
    run = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.stderr.startswith(f"{tmp_path / 'use.py'}:2: RuntimeWarning: sts_kernels runs on its slow")
    assert run.stderr.count("RuntimeWarning") == 1


def test_all_is_what_there_is():
    """`__all__` is written out, for type checkers, and is complete."""
    assert sorted(sts_kernels.ops.__all__) == sorted(OPS)
    others = ["STSConfig", "STSPlan", "analysis", "keep_top", "methods"]
    assert sts_kernels.__all__ == ["__version__", *sts_kernels.ops.__all__, *others]
    assert (PACKAGE / "py.typed").exists()


def test_the_requirements_are_those_of_the_package():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    for requirement in _errors.REQUIREMENTS.values():
        assert f'"{requirement}' in text


def test_looking_for_pip_leaves_distutils_alone():
    """Before Python 3.12 a search for pip makes setuptools drop its distutils, which torch.compile needs."""
    code = "import setuptools, sts_kernels; from sts_kernels import _errors; _errors.install('x'); "
    code += "import _distutils_hack; _distutils_hack.do_override()"
    subprocess.run([sys.executable, "-c", code], check=True)
