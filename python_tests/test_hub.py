"""The package as a kernel of the Hugging Face hub: loaded by its loader, beside the installed package."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_build_toml_names_every_source():
    text = (ROOT / "build.toml").read_text()
    cpu, cuda = text.split("[kernel.cpu]")[1].split("[kernel.cuda]")

    def sources(*folders):
        paths = [path for folder in folders for path in (ROOT / "csrc" / folder).rglob("*") if path.is_file()]
        return sorted(str(path.relative_to(ROOT)) for path in paths)

    def listed(kernel):
        return sorted(line.strip(' ",') for line in kernel.splitlines() if '"csrc/' in line and "." in line)

    assert listed(cpu) == sources("common", "cpu")
    assert listed(cuda) == sources("common", "cpu", "cuda")


@pytest.mark.slow
def test_a_copy_of_the_hub_loads_beside_the_installed_one(tmp_path):
    pytest.importorskip("kernels")
    for tool in ("cmake", "ninja", "git"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    environment = {**os.environ, "STS_KERNELS_CUDA": "0"}
    subprocess.run(["bash", ROOT / ".ci/hub", tmp_path], check=True, env=environment)
    code = """
    import sys, importlib, torch
    from pathlib import Path
    from kernels import get_local_kernel

    hub = get_local_kernel(Path(sys.argv[1]))
    import sts_kernels

    part = lambda name: importlib.import_module(f"{hub.__name__}.{name}")
    assert part("_native").status().loaded, part("_native").status()
    assert part("_registry").NAMESPACE == hub.__name__ != "sts_kernels"
    assert part("_registry").OPS["repulsion_select"].backend("CPU") == "native"
    x = torch.randn(2, 50, 8)
    want = sts_kernels.repulsion_select(x, 7)
    assert torch.equal(hub.repulsion_select(x, 7), want)
    assert torch.equal(torch.compile(hub.repulsion_select, fullgraph=True, backend="eager")(x, 7), want)
    """
    run = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    subprocess.run(run, check=True, env={**environment, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"})
