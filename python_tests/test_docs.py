"""Quotes, samples, tables and links of README.md and docs/ match the tree."""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch

import sts_kernels
from sts_kernels import methods, ops
from sts_kernels.__main__ import COMMANDS
from sts_kernels._cli import default_picture, load_picture
from sts_kernels._registry import OPS
from sts_kernels.generate import prepare

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = {page.name: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_adding_an_op_quotes_the_files():
    """Each quote names its file on its first line; its parts, separated by "..." lines, are in the file in order."""
    text = DOCS["adding-an-op.md"]
    quotes = blocks(text, "python") + blocks(text, "cpp")
    assert len(quotes) == 9
    for quote in quotes:
        first, rest = quote.split("\n", 1)
        source = (ROOT / re.fullmatch(r"(?:#|//) (\S+)", first)[1]).read_text()
        for part in rest.split("...\n"):
            assert part in source, f"{first} does not have, or not there:\n{part}"
            source = source[source.index(part) + len(part) :]


def test_readme_is_short():
    assert len(README.splitlines()) <= 130
    assert max(map(len, README.splitlines())) <= 110


def test_every_page_is_in_the_navigation_once():
    listed = re.findall(r"^ +- ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(DOCS)


def test_the_sample_of_the_kernels_runs():
    names = {}
    exec(blocks(README, "python")[1], names)
    assert names["kept"].shape == (8, 64)
    assert names["tokens"].shape == (8, 64, 1024)
    first = names["kept"][0].sort().values
    assert torch.equal(names["tokens"][0], names["features"][0, first])


def tiny(dtype=torch.float32):
    """-> model, processor."""
    pytest.importorskip("sts_kernels.integrations.transformers", exc_type=ImportError)
    pytest.importorskip("PIL")
    from sts_kernels.integrations.transformers.random_models import build

    return build("tiny", "cpu", dtype)


def test_the_sample_of_pruning_runs(capsys):
    """README's sample runs as printed, with the model and inputs of docs/getting-started.md's first sample."""
    model, processor = tiny()
    inputs = prepare(processor, [load_picture(default_picture())], "What is this?")
    names = {"model": model, "inputs": inputs}
    exec(blocks(README, "python")[0], names)
    assert names["pruning"].report.rows[0].average == 128
    assert names["ids"].shape[1] > inputs["input_ids"].shape[1]
    assert "128.0" in capsys.readouterr().out


def test_the_sample_of_a_method_runs():
    """The sample of docs/adding-a-method.md runs as printed, with the model and inputs of docs/getting-started.md."""
    model, processor = tiny()
    inputs = prepare(processor, [load_picture(default_picture())], "What is this?")
    names = {"__name__": "script", "model": model, "inputs": inputs}
    exec(blocks(DOCS["adding-a-method.md"], "python")[0], names)
    assert names["pruning"].report.rows[0].kept == [32]
    item = torch.tensor([[[3.0], [math.nan], [-5.0], [3.0], [1.0]]])
    assert names["Norms"]().select(k=5, features=item).order.tolist() == [[2, 0, 3, 4, 1]]


@pytest.mark.parametrize(("index", "kept"), [(0, [48, 16]), (1, [144, 112]), (2, None)])
def test_the_samples_of_getting_started_run(index, kept, monkeypatch, capsys):
    """Each sample runs as printed; the tiny model stands in for the checkpoint."""
    model, processor = tiny(torch.bfloat16)
    transformers = pytest.importorskip("transformers")
    for auto, part in ((transformers.AutoModelForImageTextToText, model), (transformers.AutoProcessor, processor)):
        monkeypatch.setattr(auto, "from_pretrained", lambda *args, part=part, **options: part)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(ROOT)
    samples = blocks(DOCS["getting-started.md"], "python")
    assert len(samples) == 3
    names = {}
    exec(samples[index], names)
    if kept:
        row = names["pruning"].report.rows[0]
        assert (row.tokens, row.kept, row.average) == (144, kept, sum(kept) / 2)
        assert names["ids"].shape[1] > 144
        assert "KV cache" in capsys.readouterr().out
    else:
        assert names["kept"].shape == names["positions"].shape == (2, 64)
        assert names["valid"].all()


def test_try_it_is_two_commands():
    section = README.split("\n## Try it\n", 1)[1].split("\n## ", 1)[0]
    demo, tests = blocks(section, "sh")
    assert [command.count("\n") for command in (demo, tests)] == [1, 1]
    assert demo.startswith("pip install torch && pip install ")
    assert demo.endswith("python -m sts_kernels demo\n")
    assert "demo" in COMMANDS
    assert tests.startswith("pip install torch && pip install ")
    assert tests.endswith("python -m pytest python_tests -n auto --maxprocesses 4\n")


def test_ops_are_listed_with_their_arguments():
    rows = re.findall(r"^\| `(\w+)\((.*?)\)`", DOCS["ops.md"], re.MULTILINE)
    assert set(OPS) == {op for op, _ in rows} | set(re.findall(r"`(\w+_varlen)`", DOCS["ops.md"]))
    assert {op for op in OPS if f"`{op}" in README or op.endswith("_varlen")} == set(OPS)
    for op, arguments in rows:
        assert [a.name for a in torch._C.parse_schema(OPS[op].schema).arguments] == arguments.split(", ")


def test_the_page_of_the_api_lists_what_is_public():
    """Each entry exists; the entries and their members are all public names of the package, its ops and its methods."""
    entries = re.findall(
        r"^::: (\S+)(?:\n    options:(?:\n      .*)*\n      members: \[(.*)\])?", DOCS["api.md"], re.MULTILINE
    )
    members = {name: set(listed.split(", ")) for name, listed in entries if listed}
    assert members == {f"sts_kernels.{part.__name__.split('.')[1]}": set(part.__all__) for part in (ops, methods)}
    named = {name.removeprefix("sts_kernels.") for name, _ in entries}
    assert set(sts_kernels.__all__) - set(ops.__all__) - {"__version__"} <= named
    for name in named:
        if not name.startswith("integrations."):
            assert hasattr(sts_kernels, name), name
    integration = pytest.importorskip("sts_kernels.integrations.transformers", exc_type=ImportError)
    listed = {name.rsplit(".", 1)[1] for name in named if name.startswith("integrations.transformers.")}
    assert listed <= set(integration.__all__)


def test_the_page_of_the_kernels_has_every_op_and_names_files():
    page = DOCS["kernels.md"]
    launches = page.split("| op | kernel launches", 1)[1].split("\n\n", 1)[0]
    assert {op.removesuffix("_varlen") for op in OPS} <= set(re.findall(r"`(\w+)`", launches))
    sources = {file.name for file in (ROOT / "csrc").rglob("*")}
    assert set(re.findall(r"\w+\.(?:cuh|h)\b", page)) <= sources


def test_the_map_of_the_integration_names_every_module():
    package = ROOT / "sts_kernels" / "integrations" / "transformers"
    words = set(re.findall(r"\w+", (package / "__init__.py").read_text().split('"""')[1]))
    assert {file.stem for file in package.glob("*.py")} - {"__init__"} <= words


def test_the_glossary_is_short_and_sorted():
    words = re.findall(r"^\| (\w+) \| ", DOCS["kernels.md"].split("\n## Glossary\n", 1)[1], re.MULTILINE)[1:]
    assert len(words) <= 20
    assert words == sorted(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    for target in targets:
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_variable_that_the_code_reads_is_documented():
    sources = [ROOT / "setup.py", ROOT / "python_tests/conftest.py", *(ROOT / "sts_kernels").rglob("*.py")]
    sources += [*(ROOT / "csrc").rglob("*"), ROOT / "CMakeLists.txt"]
    text = "\n".join(source.read_text() for source in sources if source.is_file())
    read = set(re.findall(r"""(?:environ\.get\(|environ\[|switch\(|getenv\()["'](STS_KERNELS_\w+)""", text))
    assert len(read) >= 5
    assert read == {name for name in re.findall(r"^\| `(STS_KERNELS_\w+)", DOCS["build.md"], re.MULTILINE)} & read


def test_extras_are_those_of_pyproject():
    """Extras are installed from a checkout, as the package is not on PyPI."""
    known = re.findall(
        r"^(\w+) = \[", PYPROJECT.split("[project.optional-dependencies]", 1)[1].split("\n[", 1)[0], re.M
    )
    files = [*PAGES, *(ROOT / "sts_kernels").rglob("*.py"), *(ROOT / "python_tests").rglob("*.py")]
    text = "\n".join(file.read_text() for file in files)
    assert set(re.findall(r'"\.\[(\w+)\]"', text)) <= set(known)
    assert not re.findall(r"sts[-_]kernels\[[a-z]+\]", text)


def test_the_commands_for_installers_name_the_build_requirements():
    requires = re.findall(r'"([^"]+)"', re.search(r"^requires = \[(.*)\]", PYPROJECT, re.M)[1])
    quoted = " ".join(r if r.isalpha() else f'"{r}"' for r in requires)
    assert DOCS["build.md"].count(f" torch {quoted} && ") == 2


SITES = {"encoder": "before the projector", "projected": "after the projector"}
QUERIES = {"last": "last token", "raters": "raters", "keys": "pivots by keys", "text": "text alignment"}
TRANSFORMERS = DOCS["transformers.md"]


def method_row(name: str) -> str:
    """The row of a method in docs/transformers.md."""
    entry = methods.describe(name)
    layers = [str(cut["layer"]) for cut in entry["cuts"]]
    acts = [SITES[entry["site"]]] if entry["site"] else []
    acts += [f"layer {', '.join(layers)}"] if layers else []
    signals = list(entry["signals"])
    for cut in entry["cuts"][:1]:
        signals.append(QUERIES[cut["queries"]] + (" (next)" if cut["score_from"] == "next" else ""))
    takes = ", ".join(f"`{option}`" for option in entry["takes"])
    scope = entry["scope"] if entry["site"] else "-"
    return f"| `{name}` | {'; '.join(acts)} | {', '.join(signals) or '-'} | {takes} | {scope} | {entry['positions']} |"


def test_the_table_of_methods_is_true():
    """A method without a row is allowed: adding one takes no line here."""
    section = TRANSFORMERS.split("\n## Methods\n", 1)[1].split("\n## ", 1)[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert rows == [method_row(name) for name in methods.names() if f"| `{name}` |" in section]


def test_the_table_of_families_is_that_of_the_code():
    adapters = pytest.importorskip("sts_kernels.integrations.transformers", exc_type=ImportError).ADAPTERS
    section = TRANSFORMERS.split("\n## Families\n", 1)[1].split("\n## ", 1)[0].split("\n|---", 1)[1]
    rows = re.findall(r"^\| ([^|]+) \| (`[^|]+`) \|", section, re.MULTILINE)
    known = {(adapter.name, ", ".join(f"`{t}`" for t in adapter.model_types)) for adapter in adapters}
    assert len(rows) == len(known)
    assert set(rows) == known


def test_the_options_of_prune_are_in_the_table():
    integration = pytest.importorskip("sts_kernels.integrations.transformers", exc_type=ImportError)
    section = TRANSFORMERS.split("\n## Options of prune\n", 1)[1].split("\n## ", 1)[0]
    options = re.findall(r"^\| `(\w+)=", section, re.MULTILINE)
    named = inspect.signature(integration.prune).parameters.values()
    assert sorted(options) == sorted(p.name for p in named if p.kind is p.KEYWORD_ONLY)
