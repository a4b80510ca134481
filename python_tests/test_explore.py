"""`explore`: the numbers on the page against the methods' own selections, and the page in a real browser."""

import base64
import dataclasses
import itertools
import json
import re
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from conftest import REQUIRED
from PIL import Image

from sts_kernels import _vision, analysis, explore, methods
from sts_kernels.__main__ import main
from sts_kernels._errors import UserError
from sts_kernels._vision import Source, Tokens

SIDE, CELL = 6, 20
NESTED = ("adavtp", "divprune", "fastervlm", "fps", "random", "sts")
OTHERS = ("fastervlm_divprune", "polymorphic", "prumerge", "tome", "uniform", "visionzip", "vispruner")
SOURCE = Source(SIDE, CELL, SIDE * CELL, "made up", True, None)


def noise_picture(seed, side=SIDE):
    """Cells of one bright colour each."""
    cells = np.random.default_rng(seed).integers(120, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(cells.repeat(CELL, 0).repeat(CELL, 1))


def made_up(seed=0, crops=0):
    g = torch.Generator().manual_seed(seed)
    count = SIDE**2 * (1 + crops**2)
    features, keys = torch.randn(count, 8, generator=g), torch.randn(count, 4, generator=g)
    features[7] = features[3]  # equal tokens
    attention = torch.rand(count, generator=g)
    tiles = tuple(noise_picture(seed + 1 + i) for i in range(crops**2))
    return Tokens(features, noise_picture(seed), SIDE, "made up", CELL, tiles, attention / attention.sum(), keys)


def data_of(*subjects, names=None, keep=9):
    chosen, left_out = explore.choose(names, subjects[0])
    pairs = [explore.Subject(f"picture {i}.png", tokens) for i, tokens in enumerate(subjects)]
    return explore.page_data(pairs, SOURCE, chosen, left_out, keep)


def embedded(path):
    """The JSON data of a written page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())[1])


def unpack(text):
    return np.frombuffer(base64.b64decode(text), "<u2").astype(int)


def selection(name, tokens, k):
    """(budgets, selections) by the method's own `select`: per square if its scope is "crop", else over all tokens."""
    method = methods.create(name)
    items = tokens.squares if method.scope == "crop" else 1
    signals = {"features": tokens.features, "scores": tokens.attention, "keys": tokens.keys}
    signals = {key: value.unflatten(0, (items, -1)) for key, value in signals.items()}
    budgets = methods.split_evenly(k, [tokens.count // items] * items)
    found = [
        method.select(k=budget, **{key: value[i : i + 1] for key, value in signals.items()}) if budget else None
        for i, budget in enumerate(budgets)
    ]
    return budgets, found


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crops", [0, 2])
@pytest.mark.parametrize("name", NESTED)
def test_the_first_picks_of_a_nested_method_are_its_selection(name, crops):
    tokens = made_up(crops=crops)
    length = SIDE**2
    entry = data_of(tokens, names=[name])["pictures"][0]["methods"][name]
    order = unpack(entry["order"])
    assert sorted(order) == list(range(tokens.count))
    crop = methods.create(name).scope == "crop"
    for k in (1, 2, 7, 8, 20, tokens.count):
        _, found = selection(name, tokens, k)
        if not crop:
            assert order[:k].tolist() == found[0].order[0].tolist()
            continue
        for i, own in enumerate(found):
            mine = [token % length for token in order[:k].tolist() if token // length == i]
            assert mine == ([] if own is None else own.order[0].tolist())


@pytest.mark.parametrize("crops", [0, 2])
@pytest.mark.parametrize("name", OTHERS)
def test_the_runs_of_the_others_are_their_selections(name, crops):
    tokens = made_up(crops=crops)
    data = data_of(tokens, names=[name])
    entry = data["pictures"][0]["methods"][name]
    items = tokens.squares if methods.create(name).scope == "crop" else 1
    length = tokens.count // items
    for k, run in zip(data["ladder"], entry["runs"], strict=True):
        budgets, found = selection(name, tokens, k)
        order = [i * length + t for i, own in enumerate(found) if own is not None for t in own.order[0].tolist()]
        assert unpack(run["order"]).tolist() == order
        slots = unpack(run["slots"])
        x = tokens.features.double()
        for i, own in enumerate(found):
            if own is None or own.assignment is None:
                continue
            for token, slot in enumerate(own.assignment[0].tolist()):
                if slot >= 0:
                    assert slots[i * length + token] == (sum(budgets[:i]) + slot) | explore.MERGED
        for token, slot in enumerate(slots):
            distance = (x[token] - x[order[slot & (explore.MERGED - 1)]]).norm().item()
            assert unpack(run["distances"])[token] * data["pictures"][0]["unit"] == pytest.approx(distance, abs=2e-4)
            if slot < explore.MERGED and token not in order:
                assert distance == pytest.approx((x[order] - x[token]).norm(dim=1).min().item(), abs=1e-5)
            if slot < explore.MERGED and token in order:
                assert order[slot] == token


def nearest(x, order, token):
    """(place in `order`, distance) of the pick that stands for a token: itself, else the nearest; ties to the first."""
    if token in order:
        return order.index(token), 0.0
    away = [(x[token] - x[other]).norm().item() for other in order]
    return min(range(len(order)), key=lambda i: (round(away[i], 6), i)), min(away)


def test_a_token_changes_its_stand_in_when_a_nearer_one_is_picked():
    tokens = made_up()
    data = data_of(tokens, names=["sts", "random"])
    x, unit = tokens.features.double(), data["pictures"][0]["unit"]
    for entry in data["pictures"][0]["methods"].values():
        order, counts, picks, away = (unpack(entry[key]) for key in ("order", "counts", "picks", "distances"))
        starts = np.concatenate([[0], counts.cumsum()])
        for k in (1, 5, 11, 36):
            for token in range(tokens.count):
                own = slice(starts[token], starts[token + 1])
                last = np.flatnonzero(picks[own] < k)[-1]
                pick, distance = nearest(x, order[:k].tolist(), token)
                assert picks[own][last] == pick
                assert away[own][last] * unit == pytest.approx(distance, abs=2e-4)


def test_curves_are_those_of_the_kept_rows():
    tokens = made_up()
    data = data_of(tokens)
    x = tokens.features.double()
    shown = data["pictures"][0]["methods"]
    assert {*NESTED, *OTHERS} <= set(shown)  # a method of yours may be shown too
    for name, entry in shown.items():
        for i, k in enumerate(data["ladder"]):
            _, (own,) = selection(name, tokens, k)
            rows = x[own.order[0]]
            s = torch.linalg.svdvals(rows)
            q = s[s > 0] / s.sum()
            away = torch.stack([(rows - token).norm(dim=1).min() for token in x])
            expected = {
                "erank": (-(q * q.log()).sum()).exp().item(),
                "mean": away.mean().item(),
                "largest": away.max().item(),
                "attention": tokens.attention[own.order[0]].sum().item(),
            }
            for key, value in expected.items():
                assert entry[key][i] == pytest.approx(value, rel=1e-3, abs=1e-4), (name, key, k)


def test_tokens_on_a_device(device):
    tokens = made_up()
    moved = {name: getattr(tokens, name).to(device) for name in ("features", "attention", "keys")}
    tokens = dataclasses.replace(tokens, **moved)
    shown = data_of(tokens)["pictures"][0]["methods"]
    for name in NESTED:
        order = selection(name, tokens, tokens.count)[1][0].order[0].tolist()
        assert unpack(shown[name]["order"]).tolist() == order
    assert unpack(shown["visionzip"]["runs"][4]["order"]).tolist() == (
        selection("visionzip", tokens, explore.ladder(36)[4])[1][0].order[0].tolist()
    )


def test_equal_tokens_stand_for_themselves():
    x = torch.zeros(3, 2)
    counts, picks, away = explore.replacements(torch.cdist(x, x), torch.tensor([2, 0, 1]))
    assert counts.tolist() == [2, 2, 1]
    assert picks.tolist() == [0, 1, 0, 2, 0]
    assert away.tolist() == [0.0] * 5


def test_the_ladder():
    assert explore.ladder(1) == [1]
    assert explore.ladder(5) == [1, 2, 3, 4, 5]
    for tokens in (256, 576, 2880):
        steps = explore.ladder(tokens)
        assert steps[0] == 1
        assert steps[-1] == tokens
        assert all(a < b <= 2 * a for a, b in itertools.pairwise(steps))
        assert {64, 128, 192} <= set(steps)
    assert {320, 640} <= set(explore.ladder(2880))


def test_what_is_left_out_says_why():
    data = data_of(made_up())
    why = {name: entry["why"] for entry in data["left_out"] for name in entry["names"]}
    assert (
        why.items()
        >= {
            "cdpruner": "no prompt to go by",
            **dict.fromkeys(("dart", "fastv", "pyramiddrop", "sparsevlm"), "only inside the LLM, and no LLM runs here"),
        }.items()
    )
    assert not {*NESTED, *OTHERS} & set(why)
    chosen, left_out = explore.choose(None, Tokens(torch.randn(4, 3), noise_picture(0), 2, ""))
    assert {*NESTED, *OTHERS} & set(chosen) == {"divprune", "fps", "random", "sts", "uniform"}
    assert left_out["visionzip"] == "no attention and keys to go by"


def test_a_method_that_refuses_is_left_out(monkeypatch):
    def refuse(self, pool):
        raise ValueError("uniform: not today\nnor tomorrow")

    monkeypatch.setattr(type(methods.create("uniform")), "pick", refuse)
    data = data_of(made_up(), made_up(1), names=["sts", "uniform"])
    assert [m["name"] for m in data["methods"]] == ["sts"]
    assert data["left_out"] == [{"names": ["uniform"], "why": "uniform: not today"}]
    with pytest.raises(UserError, match="no method can be shown: uniform: uniform: not today"):
        data_of(made_up(), names=["uniform"])


def test_features_that_are_not_finite_are_refused():
    tokens = made_up()
    tokens.features[4, 2] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        data_of(tokens, names=["sts"])


def test_the_sheet_has_every_grid_in_its_place():
    tokens = made_up(crops=2)
    width, height, grids = explore.layout(tokens, CELL)
    sheet = explore.sheet(tokens, CELL)
    assert sheet.size == (width, height)
    for grid, picture in zip(grids, (tokens.picture, *tokens.crops), strict=True):
        edge = grid["cell"] * grid["columns"]
        box = (grid["x"], grid["y"], grid["x"] + edge, grid["y"] + edge)
        assert sheet.crop(box).tobytes() == picture.tobytes()


def test_pictures_of_one_page_have_cells_of_one_size():
    small = made_up()
    large = Tokens(small.features, noise_picture(3).resize((SIDE * 50, SIDE * 50)), SIDE, "")
    data = data_of(small, large, names=["sts"])
    assert data["sheet"] == [SIDE * 50, SIDE * 50]


# ---- the command -----------------------------------------------------------------------------------------------------


def run(tmp_path, *arguments):
    out = tmp_path / "page.html"
    assert main(["explore", *map(str, arguments), "--features", "patches", "--device", "cpu", "--out", str(out)]) == 0
    return out


def test_explore_end_to_end(tmp_path, capsys):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    (tmp_path / "folder").mkdir()
    for name in ("b.PNG", "a.jpg", "c.png"):
        photo.save(tmp_path / "folder" / name)
    (tmp_path / "folder" / "notes.txt").write_text("no picture")
    page = run(tmp_path, tmp_path / "folder", "--methods", "sts", "uniform", "--limit", "2", "--keep", "5")
    printed = capsys.readouterr().out
    assert "pictures  2 of 3, the first by name: --limit\n" in printed
    assert "methods   sts, uniform\n" in printed
    assert f"page      {page}, " in printed
    data = embedded(page)
    assert [picture["name"] for picture in data["pictures"]] == ["a.jpg", "b.PNG"]
    assert (data["tokens"], data["keep"], data["first"]) == (576, 5, 0)
    assert data["note"].startswith("raw pixels say")
    tokens = _vision.tokens(_vision.source("patches", torch.device("cpu")), photo)
    assert unpack(data["pictures"][1]["methods"]["sts"]["order"]).tolist() == (
        methods.create("sts").select(k=576, features=tokens.features[None]).order[0].tolist()
    )
    cover = analysis.coverage(tokens.features[None], torch.arange(576)[None, :1])
    assert 0 < data["pictures"][1]["methods"]["sts"]["mean"][0] <= 2 * cover.mean.item()
    assert page.stat().st_size < 500_000


def test_the_page_asks_for_nothing_and_a_name_is_no_markup(tmp_path):
    template = explore.TEMPLATE.read_text()
    assert template.count(explore.SLOT) == 1
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", template)
    assert re.sub(r"http://www\.w3\.org/2000/svg", "", template).count("http:") == 0
    name = "</script><script>alert(1)</script>\u2028&.png"
    data = data_of(made_up(), names=["sts"])
    data["pictures"][0]["name"] = name
    out = tmp_path / "page.html"
    size = explore.write(data, str(out))
    assert size == out.stat().st_size
    assert out.read_text().count("</script>") == template.count("</script>")
    assert embedded(out)["pictures"][0]["name"] == name


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["explore", "--features", "patches", "--device", "cpu", *map(str, arguments)])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_explore_refuses(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} has no pictures (" in refusal(capsys, tmp_path / "empty")
    assert "cannot read the image nowhere.png: " in refusal(capsys, "nowhere.png")
    assert "--methods: methods: name must be one of adavtp, " in refusal(capsys, "--methods", "sts", "best")
    assert "--methods: fastv cannot be shown: only inside the LLM" in refusal(capsys, "--methods", "fastv")
    assert "--methods: visionzip cannot be shown: no attention and keys" in refusal(capsys, "--methods", "visionzip")
    assert "--keep must be between 1 and 576, the number of tokens, got 0" in refusal(capsys, "--keep", 0)
    assert "--crops must be at least 1, got 0" in refusal(capsys, "--crops", 0)
    assert "--crops 4 makes 9792 tokens, and the page takes 8192" in refusal(capsys, "--crops", 4)
    assert "--limit must be at least 1, got 0" in refusal(capsys, "--limit", 0)
    Image.new("RGB", (23, 99)).save(tmp_path / "small.png")
    assert "small.png: the image is too small: " in refusal(capsys, tmp_path / "small.png")
    out = tmp_path / "no" / "page.html"
    assert f"cannot write the page {out}: No such file" in refusal(capsys, "--methods", "uniform", "--out", out)


def test_names_on_a_page_differ():
    paths = [Path("a/x.png"), Path("b/x.png"), Path("a/x.png"), Path("b/x.png"), Path("y.png")]
    names = explore.distinct(paths)
    assert list(names.values()) == paths
    assert list(names) == ["x.png", "b/x.png", "a/x.png", "b/x.png (again)", "y.png"]


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subjects():
    return [made_up(), made_up(1), made_up(2)]


@pytest.fixture(scope="module")
def page(tmp_path_factory, subjects):
    if browser.find() is None:
        reason = f"needs a browser: none of {', '.join(browser.NAMES)} is on PATH"
        pytest.fail(reason) if "browser" in REQUIRED else pytest.skip(reason)
    path = tmp_path_factory.mktemp("page") / "page.html"
    explore.write(data_of(*subjects), str(path))
    with browser.Page(path) as opened:
        yield opened
        assert [url for url in opened.requests if not url.startswith("data:")] == [path.as_uri()]
        assert opened.complaints == []


def bright(page, canvas="#picture"):
    """Tokens that a canvas shows undimmed; all other tokens must be dark."""
    pixels = page(
        f"(() => {{ const c = document.querySelector('{canvas}'); "
        "return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data) })()"
    )
    side = SIDE * CELL
    values = np.array(pixels, dtype=int).reshape(side, side, 4)[..., :3]
    cells = values.reshape(SIDE, CELL, SIDE, CELL, 3).mean((1, 3, 4)).reshape(-1)
    assert not ((cells > 70) & (cells < 100)).any()
    return set(np.flatnonzero(cells >= 100).tolist())


def picks(name, tokens, k):
    return selection(name, tokens, k)[1][0].order[0].tolist()


def start(page, **state):
    """Resets the page to its initial state, except for `state`."""
    method = [m["name"] for m in page("DATA.methods")].index(state.pop("method", "sts"))
    state = {"picture": 0, "method": method, "k": 9, "view": "kept", "format": "json", "token": -1, **state}
    page(f"(Object.assign(state, {json.dumps(state)}), document.activeElement.blur(), draw())")


def test_the_page_opens_with_the_first_picks_of_sts(page, subjects):
    start(page)
    assert page("document.querySelector('#title').textContent") == "picture 0.png: sts, 9 of 36 tokens"
    assert bright(page) == set(picks("sts", subjects[0], 9))


def test_the_slider_moves_the_number_of_tokens(page, subjects):
    start(page)
    left, top, width, height = page.box("#slider")
    page.mouse("mousePressed", left + 0.9 * width, top + height / 2)
    page.mouse("mouseReleased", left + 0.9 * width, top + height / 2)
    moved = page("state.k")
    assert 20 < moved < 36
    assert bright(page) == set(picks("sts", subjects[0], moved))
    for key, expected in (("ArrowRight", moved + 1), ("ArrowLeft", moved), ("Home", 1), ("ArrowDown", 1), ("End", 36)):
        page.key(key)
        assert page("state.k") == expected
        assert page("document.querySelector('#of').textContent").startswith("of 36 tokens, ")
        assert page("Number(document.querySelector('#number').value)") == expected
        assert bright(page) == set(picks("sts", subjects[0], expected))


def test_a_budget_is_typed_or_clicked(page, subjects):
    start(page)
    page.click("#ticks button:nth-child(2)")
    assert page("state.k") == 16
    assert bright(page) == set(picks("sts", subjects[0], 16))
    page("document.querySelector('#number').focus()")
    page("document.querySelector('#number').select()")
    page.key("7")
    assert page("state.k") == 7
    assert bright(page) == set(picks("sts", subjects[0], 7))


@pytest.mark.parametrize("name", ["fps", "visionzip", "uniform"])
def test_a_tab_shows_its_method(page, subjects, name):
    start(page, k=12)
    page.click(f"#tabs [data-value={name}]")
    assert bright(page) == set(picks(name, subjects[0], 12))
    assert page(f"document.querySelector('#tabs [data-value={name}]').getAttribute('aria-selected')") == "true"
    assert page("document.querySelector('tr[aria-current]').dataset.method") == name


def test_tabs_by_the_keyboard(page):
    start(page, method="random")
    page("document.querySelector('#tabs [aria-selected=true]').focus()")
    page.key("ArrowRight")
    assert page("DATA.methods[state.method].name") == "sts"
    assert page("document.activeElement.dataset.value") == "sts"
    page.key("End")
    page.key("ArrowRight")
    assert page("state.method") == 0


def test_a_method_that_is_not_nested_is_shown_where_it_ran(page, subjects):
    start(page, method="vispruner", k=11)
    assert page("document.querySelector('#title').textContent") == "picture 0.png: vispruner, 8 of 36 tokens"
    assert "it ran for 1, 2, 3, 4, 6, 8, 12, " in page("document.querySelector('#snapped').textContent")
    assert bright(page) == set(picks("vispruner", subjects[0], 8))
    start(page, method="vispruner", k=12)
    assert page("document.querySelector('#snapped').hidden")


def point_at(page, token):
    page.click("#picture", (token % SIDE + 0.5) / SIDE, (token // SIDE + 0.5) / SIDE)
    return page("document.querySelector('#token').textContent")


def test_pointing_at_a_token_names_its_stand_in(page, subjects):
    start(page)
    x, order = subjects[0].features.double(), picks("sts", subjects[0], 9)
    stands = [nearest(x, order, token)[0] for token in range(36)]
    for token in [order[4], *(t for t in range(36) if t not in order)][:6]:
        text = point_at(page, token)
        pick, distance = nearest(x, order, token)
        others = stands.count(pick) - 1
        assert text.startswith(f"Token {token} (row {token // SIDE}, column {token % SIDE}) is ")
        assert (f"stands for {others} other" if others else "stands for no other") in text
        if token in order:
            assert f" is kept, pick {order.index(token) + 1};" in text
        else:
            assert f" is dropped; nearest kept is token {order[pick]} (row {order[pick] // SIDE}, " in text
            assert float(re.search(r"at a distance of (\S+)\. ", text)[1]) == pytest.approx(distance, abs=0.006)


def test_pointing_at_a_merged_token_names_where_it_went(page, subjects):
    start(page, method="tome", k=12)
    own = selection("tome", subjects[0], 12)[1][0]
    order, assignment = own.order[0].tolist(), own.assignment[0].tolist()
    token = next(t for t in range(36) if t not in order)
    assert f"is merged into kept token {order[assignment[token]]} (row " in point_at(page, token)


def test_pointing_by_the_keyboard(page):
    start(page)
    page("document.querySelector('#picture').focus()")
    for key in ("ArrowRight", "ArrowDown", "ArrowRight"):
        page.key(key)
    assert page("state.token") == SIDE + 1
    assert "Token 7 (row 1, column 1)" in page("document.querySelector('#token').textContent")
    page.key("Escape")
    assert page("state.token") == -1


def test_the_table_and_the_charts_have_the_analyses_numbers(page, subjects):
    start(page, k=12)
    x = subjects[0].features
    assert page("document.querySelectorAll('#charts svg path[data-method]').length") == 4 * 13
    for k, exact in ((12, True), (11, False)):
        page(f"setK({k})")
        for name in ("sts", "fps", "random"):
            order = torch.tensor(picks(name, subjects[0], k))
            cover = analysis.coverage(x[None], order[None])
            expected = [analysis.erank(x[order][None]), cover.mean, cover.largest]
            row = f"document.querySelector('tr[data-method={name}]')"
            got = page(f"[...{row}.children].slice(1, 4).map((cell) => Number(cell.dataset.value))")
            assert got[1:] == pytest.approx([value.item() for value in expected[1:]], abs=2e-4)
            assert got[0] == pytest.approx(expected[0].item(), rel=1e-3 if exact else 0.05)
            assert page(f"{row}.children[1].textContent.startsWith('\u2248')") != exact


def test_a_click_on_a_chart_sets_the_number_of_tokens(page):
    start(page)
    page.click("#charts figure:nth-child(2) svg", down=0.5)
    assert page("state.k") == round(36 ** ((150 - 34) / (300 - 34 - 6)))  # the axis is logarithmic, inside its margins


def test_numbers_to_copy(page, subjects):
    start(page)
    text = json.loads(page("document.querySelector('#text').value"))
    assert text == {
        "picture": "picture 0.png",
        "features": "made up",
        "method": "sts",
        "tokens": 36,
        "k": 9,
        "indices": picks("sts", subjects[0], 9),
    }
    page.click("#formats [data-value=python]")
    names = {}
    exec(page("document.querySelector('#text').value"), names)
    assert names["kept"] == text["indices"]
    page.click("#formats [data-value=csv]")
    lines = page("document.querySelector('#text').value").splitlines()
    assert lines[0] == "method,k,erank,mean,largest,attention"
    assert len(lines) == 1 + 13 * len(explore.ladder(36))
    page.click("#copy")
    page.until("document.querySelector('#copy').textContent !== 'Copy'")


def test_views(page, subjects):
    start(page)
    page.click("#views [data-value=order]")
    assert page("state.view") == "order"
    page.key("ArrowRight")
    assert page("state.view") == "standins"
    assert bright(page) == set(range(36))
    order = picks("sts", subjects[0], 9)
    pick, _ = nearest(subjects[0].features.double(), order, 0)
    both = [
        page(
            f"Array.from(document.querySelector('#picture').getContext('2d').getImageData("
            f"{token % SIDE * CELL + CELL // 2}, {token // SIDE * CELL + CELL // 2}, 1, 1).data)"
        )
        for token in (0, order[pick])
    ]
    assert both[0] == both[1]


def test_the_contact_sheet(page, subjects):
    start(page)
    for index, tokens in enumerate(subjects):
        assert bright(page, f"#sheet button:nth-child({index + 1}) canvas") == set(picks("sts", tokens, 9))
    page.click("#sheet button:nth-child(2)")
    assert page("document.querySelector('#title').textContent") == "picture 1.png: sts, 9 of 36 tokens"
    assert bright(page) == set(picks("sts", subjects[1], 9))
    page.key("n")
    page.key("n")
    assert page("state.picture") == 0
    page.key("p")
    assert page("state.picture") == 2


def test_light_and_dark(page):
    start(page)
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page(colour)
    page.click("#theme")
    dark = page(colour)
    page.key("t")
    assert page(colour) == light != dark


def test_play_goes_through_all_budgets(page):
    start(page, k=30)
    page.key("Space")
    page.until("state.k === 36 && !playing")
    assert page("document.querySelector('#play').getAttribute('aria-label')") == "Play"


def test_the_address_says_what_is_shown(page):
    start(page, method="fps", k=17, picture=1, view="standins")
    page.until("location.hash.includes('k=17')")
    start(page)
    page("(location.hash = '#picture=picture+2.png&method=divprune&k=5&view=order')")
    page.until("state.k === 5")
    assert page("[state.picture, DATA.methods[state.method].name, state.view]") == [2, "divprune", "order"]
    page("(location.hash = '#picture=nowhere&method=none&k=1e9&view=constructor')")
    page.until("state.k === 36")
    assert page("[state.picture, DATA.methods[state.method].name, state.view]") == [2, "divprune", "order"]


def test_a_small_dark_screen_has_no_sideways_scroll(tmp_path, page, subjects):
    path = tmp_path / "page.html"
    explore.write(data_of(subjects[0]), str(path))
    with browser.Page(path, "#method=fps&k=4", width=390, height=800, dark=True) as small:
        assert small("document.documentElement.scrollWidth") <= 390
        assert small("document.querySelector('#contact').hidden")
        assert bright(small) == set(picks("fps", subjects[0], 4))
        assert small("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 24)"
