"""docs/methods.md lists every method, at the site that the code names."""

import re
from pathlib import Path

from sts_kernels import methods

TEXT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
PLACES = {"encoder": "before the projector", "projected": "after the projector"}


def test_every_method_has_two_rows_and_a_formula():
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", TEXT, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    sections = re.findall(r"^## (\w+)\n```\n[^`]+```$", TEXT, re.MULTILINE)
    assert sorted(listed) == sorted(2 * methods.names())
    assert sections == methods.names()


def test_the_first_table_says_where_a_method_acts():
    for name, acts in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", TEXT.split("| paper |")[0], re.MULTILINE):
        entry = methods.describe(name)
        if name == "adavtp":
            assert acts == "after or before the projector"
            continue
        assert acts.startswith(PLACES.get(entry["site"], "LLM, after"))
        numbers = [int(n) for n in re.findall(r"\d+", acts)]
        assert numbers == [cut["layer"] for cut in entry["cuts"]]


def test_options_that_it_names_exist():
    for section in TEXT.split("\n## ")[1:]:
        name = section.split("\n", 1)[0]
        own = {*methods.create(name).options(), "relevance", "by", "start", "budget", "layers", "ratios"}
        for option in re.findall(r"`(\w+)=", section):
            assert option in own, (name, option)
