"""Code and files that docs/adding-a-method.md quotes and lists are in the tree."""

import re
from pathlib import Path

from sts_kernels.methods import Method

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "adding-a-method.md").read_text()


def test_it_quotes_the_files():
    quotes = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert len(quotes) == 1
    for file, quote in quotes:
        source = (ROOT / file).read_text()
        for part in quote.split("...\n"):
            assert part in source, f"{file} does not have, or not there:\n{part}"
            source = source[source.index(part) + len(part) :]


def test_it_lists_every_class_attribute():
    listed = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert listed == [name for name, kind in Method.__annotations__.items() if "ClassVar" in str(kind)]


def test_it_names_files_that_exist():
    folders = [ROOT / "sts_kernels" / "methods", ROOT / "python_tests" / "methods"]
    for name in re.findall(r"`(\w+\.py)`", TEXT):
        assert any((folder / name).exists() for folder in folders), name
