"""Numbers of the papers against formulas written out here, and commands against the options of the methods."""

import json
import re

import pytest

from sts_kernels import methods, papers, table
from sts_kernels.__main__ import main

D7, M7, L7 = 4096, 11008, 32
TASKS = {
    *("gqa", "mmbench_en_dev", "mmbench_cn_dev", "mme", "pope", "scienceqa_img", "textvqa_val", "vqav2_val"),
    *("vizwiz_vqa_val", "mmvet", "chartqa", "ai2d", "ocrbench", "amber_g"),
}  # of lmms-eval 0.7.2


def number(paper, table, row, what):
    (found,) = [n for n in papers.load(paper).numbers if (n.table, n.row, n.what) == (table, row, what)]
    return found


def layer(n, matrices=3, d=D7, m=M7):
    return 4 * n * d * d + 2 * n * n * d + matrices * n * d * m


def test_each_paper_has_its_file():
    assert papers.names() == ["adavtp", "polymorphic", "sts", "vispruner"]


@pytest.mark.parametrize("name", papers.names())
def test_what_is_off_has_a_note(name):
    for found in papers.load(name).numbers:
        assert found.formula
        if found.printed and abs(found.off) > 0.01:
            assert found.note, found


def test_sts():
    found = number("sts", "Tab. 3", "LLaVA-NeXT-7B, budget 320", "times fewer FLOPs")
    assert found.computed == pytest.approx(32 * layer(2880) / (16 * layer(480) + 16 * layer(160)))
    assert round(found.computed, 1) == float(found.printed)
    whole = number("sts", "", "LLaVA-NeXT-7B, budget 320, 40 text tokens", "times fewer FLOPs").computed
    assert whole == pytest.approx(32 * layer(2920) / (16 * layer(520) + 16 * layer(200)))
    assert number("sts", "Tab. 4", "LLaVA-1.5-13B, budget 64", "tokens into the LLM").computed == 107
    assert number("sts", "Tab. 6", "L_prune 12", "rho_intra").computed == pytest.approx(0.6)


@pytest.mark.parametrize(("kept", "flops", "cache"), [(432, 6.20, 220.5), (58, 1.57, 45.31), (29, 1.22, 31.72)])
def test_vispruners_rows_of_fastv(kept, flops, cache):
    encoder = 24 * 2 * layer(577, 2, 1024, 4096) / 1e12
    before = 576 if kept > 58 else 580
    expected = 2 * (2 * layer(before) + 30 * layer(kept)) / 1e12 + encoder
    found = number("vispruner", "Tab. 6", f"FastV, {kept} tokens", "TFLOPs")
    assert found.computed == pytest.approx(expected)
    assert found.computed == pytest.approx(flops, rel=0.005)
    found = number("vispruner", "Tab. 6", f"FastV, {kept} tokens", "KV cache, MB")
    assert found.computed == pytest.approx((2 * before + 30 * kept) / 64)
    assert round(found.computed, 2) == cache


def test_vispruners_cache_is_exact_but_where_noted():
    for found in papers.load("vispruner").numbers:
        if found.what == "KV cache, MB" and found.table != "Tab. 5":
            assert abs(found.computed - float(found.printed)) <= 0.011, found


def test_the_two_rows_of_table_5_are_those_of_table_8():
    for label, tokens in ((640, 720), (160, 145)):
        for method in ("VisPruner", "FastV"):
            repeated = number("vispruner", "Tab. 5", f"{method}, {label} tokens", "TFLOPs").printed
            source = number("vispruner", "Tab. 8", f"{method}, {tokens} tokens", "TFLOPs").printed
            assert repeated == f"{float(source):.1f}"


def test_adavtp():
    whole = number("adavtp", "Tab. 9", "LLaVA-1.5-7B", "TFLOPs").computed
    kept = number("adavtp", "Tab. 9", "AdaVTP, DivPrune, VisPruner, 64 tokens", "TFLOPs").computed
    assert whole == pytest.approx(32 * layer(606, 2) / 1e12)
    assert kept == pytest.approx(32 * layer(94, 2) / 1e12)
    assert number("adavtp", "App. A", "64 tokens", "fewer FLOPs, %").computed == pytest.approx(100 * (1 - kept / whole))


def test_polymorphic():
    from sts_kernels.papers.polymorphic import schedule

    tokens = [found for _, found in schedule(64)]
    assert tokens == pytest.approx([128, 90.5559, 64.0654, 45.3242], abs=1e-3)
    assert sum(n * t for n, t in schedule(64)) / 32 == pytest.approx(64)
    assert [t for _, t in schedule(64, (3, 7, 13), 28)] == pytest.approx([128, 90.0257, 63.3175, 44.5328], abs=1e-3)
    ratio = number("polymorphic", "", "LLaVA-1.5-7B, VisionZip, budget 64", "times fewer FLOPs").computed
    assert ratio == pytest.approx(layer(636) / layer(124))
    averages = [
        number("polymorphic", "Tab. 1", f"SparseVLM, budget {b}", "tokens on average").computed for b in (192, 128, 64)
    ]
    assert averages == pytest.approx([206.5, 145.4, 82.3], abs=0.06)


@pytest.mark.parametrize("name", papers.names())
def test_the_commands_have_options_that_the_methods_take(name):
    for accuracy in papers.load(name).accuracy:
        assert set(accuracy.tasks) <= TASKS
        assert f"--tasks {','.join(accuracy.tasks)} " in accuracy.command()
        for variant in accuracy.variants:
            assert variant in accuracy.command()
            options = dict(pair.split("=") for pair in variant.split(","))
            method = options.pop("method")
            if method not in methods.names():
                continue
            values = {key: float(v) if "." in v else int(v) for key, v in options.items()}
            budget = methods.Budget(**{key: values.pop(key) for key in ("budget", "keep") if key in values})
            plan = methods.create(method, **values).plan(budget, 32, 16)
            tokens = 2880 if "v1.6" in accuracy.model else 576
            wanted = budget.budget or 0.375
            wanted = wanted if isinstance(wanted, int) else wanted * tokens
            assert plan.average([tokens]) == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("name", papers.names())
def test_the_command_line(capsys, name):
    assert main(["table", "--paper", name]) == 0
    out = capsys.readouterr().out
    paper = papers.load(name)
    lines = out.splitlines()
    for found in paper.numbers:
        assert any(found.row in line and found.what in line and f"{found.computed:.4g}" in line for line in lines)
        assert found.note in out
    assert all(accuracy.command() in out for accuracy in paper.accuracy)
    letters = re.findall(r"^([a-z])  (.+)$", out, re.MULTILINE)
    assert [formula for _, formula in letters] == list(dict.fromkeys(n.formula for n in paper.numbers))
    assert main(["table", "--paper", name, "--json"]) == 0
    given = json.loads(capsys.readouterr().out)
    assert len(given["numbers"]) == len(paper.numbers)
    assert given["numbers"][0]["computed"] == paper.numbers[0].computed
    assert given["accuracy"][0]["command"] == paper.accuracy[0].command()


def test_it_says_whether_lmms_eval_is_there(capsys, monkeypatch):
    for spec, said in ((None, True), (object(), False)):
        monkeypatch.setattr(table.importlib.util, "find_spec", lambda name, spec=spec: spec)
        main(["table", "--paper", "sts"])
        assert ("lmms-eval is not installed" in capsys.readouterr().out) == said


@pytest.mark.parametrize("argv", [["table"], ["table", "--paper", "other"]])
def test_an_unknown_paper_is_one_line(capsys, argv):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--paper" in err
