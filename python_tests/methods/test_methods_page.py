"""docs/methods.md lists the methods that README.md counts, at the sites that the code names."""

import re
from pathlib import Path

from sts_kernels import methods

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TEXT = (ROOT / "docs" / "methods.md").read_text()
PLACES = {"encoder": "before the projector", "projected": "after the projector"}


def test_every_listed_method_has_two_rows_and_a_formula():
    """A method may be left out of the page: adding one takes no line here."""
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", TEXT, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    sections = re.findall(r"^## (\w+)\n```\n[^`]+```$", TEXT, re.MULTILINE)
    assert sorted(listed) == sorted(2 * sections)
    assert sections == [name for name in methods.names() if name in sections]
    assert f"\n{len(sections)} pruning methods, " in README
    assert re.findall(r"`(\w+)`", README.split("\n## Methods\n")[1].split(":\n")[0]) == sections


def test_the_first_table_says_where_a_method_acts():
    for name, acts in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", TEXT.split("| paper |")[0], re.MULTILINE):
        entry = methods.describe(name)
        if name == "adavtp":
            assert acts == "after or before the projector"
            continue
        assert acts.startswith(PLACES.get(entry["site"], "LLM, after"))
        numbers = [int(n) for n in re.findall(r"\d+", acts)]
        assert numbers == [cut["layer"] for cut in entry["cuts"]]


def test_which_to_take():
    """A method that the page does not list is none of its advice."""
    rows = dict(re.findall(r"^\| (.+?) \| (.*`.*) \|$", TEXT.split("\n## Which to take\n")[1].split("\n## ")[0], re.M))
    named = {need: set(re.findall(r"`(\w+)`", row)) for need, row in rows.items()}
    found = {name: methods.describe(name) for name in methods.names() if f"\n## {name}\n" in TEXT}
    queries = {name: {cut["queries"] for cut in entry["cuts"]} for name, entry in found.items()}
    weights = {name for name in found if "attention" in found[name]["signals"] or queries[name] & {"last", "raters"}}
    assert named["no attention weights"] == found.keys() - weights | {"sts"}
    prompt = {name for name in found if queries[name] or "relevance" in found[name]["signals"]}
    assert named["tokens chosen by the prompt"] == prompt
    late = {name for name in found if found[name]["site"] is None}
    assert named["fewer tokens in all layers of the LLM"] == late
    assert named["text after the last image"] == {name for name in found if queries[name] - {"last"}}


def test_options_that_it_names_exist():
    for section in TEXT.split("\n## ")[1:]:
        name = section.split("\n", 1)[0]
        if name not in methods.names():
            continue
        own = {*methods.create(name).options(), "relevance", "by", "start", "budget", "layers", "ratios"}
        for option in re.findall(r"`(\w+)=", section):
            assert option in own, (name, option)
