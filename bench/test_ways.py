"""bench.ways on the tiny model: measures every way, and plots the rows."""

import pytest
import torch

pytest.importorskip("transformers")

from . import record, ways

ARGS = [
    "--model",
    "tiny",
    "--batch",
    "1",
    "2",
    "--budget",
    "1.0",
    "32",
    "--samples",
    "2",
    "--device",
    "cpu",
    "--allow-reference",
]


@pytest.mark.parametrize("way", ["eager", "static", "captured"])
def test_rows(tmp_path, way, capsys):
    path = tmp_path / "ways.csv"
    assert ways.main([*ARGS, "--csv", str(path), "--way", way]) == 0
    rows = record.read(path)
    assert [(row["way"], row["batch"], row["budget"]) for row in rows] == [
        (way, batch, budget) for batch in "12" for budget in ("all", "32")
    ]
    assert [(row["visual"], row["keep"], row["keep_after"]) for row in rows] == 2 * [
        ("144", "144", "144"),
        ("144", "48", "16"),
    ]
    for row in rows:
        first = [float(row[f"first_p{percent}_ms"]) for percent in (20, 50, 80)]
        assert first == sorted(first)
        assert min(*first, float(row["encode_ms"]), float(row["prefill_ms"]), float(row["tokens_per_s"])) > 0
    assert way in capsys.readouterr().out


def test_a_run_goes_on_where_it_was_cut_off(tmp_path, capsys):
    path = tmp_path / "ways.csv"
    command = [*ARGS, "--csv", str(path), "--way", "eager", "--resume", "--commit", "a"]
    assert ways.main([*command, "--seconds", "1e-9"]) == 0  # one row
    assert ways.main(command) == 0
    assert ways.main(command) == 0  # nothing is left
    rows = record.read(path)
    assert [(row["batch"], row["budget"]) for row in rows] == [(b, budget) for b in "12" for budget in ("all", "32")]
    assert ways.main([*command[:-1], "b", "--seconds", "1e-9"]) == 0
    assert [row["commit"] for row in record.read(path)] == [*"aaaab"]
    assert ways.main([*command, "--attn", "eager", "--seconds", "1e-9"]) == 0
    assert ways.main([*command, "--dtype", "bfloat16", "--seconds", "1e-9"]) == 0
    assert [(row["dtype"], row["attention"]) for row in record.read(path)[-2:]] == [
        ("float32", "eager"),
        ("bfloat16", "sdpa"),
    ]


def test_a_row_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def measure(way, device, samples, whole=ways.measure):
        if len(way.inputs["input_ids"]) == 1:
            raise torch.OutOfMemoryError("no memory is left")
        return whole(way, device, samples)

    monkeypatch.setattr(ways, "measure", measure)
    path = tmp_path / "ways.csv"
    assert ways.main([*ARGS, "--csv", str(path), "--way", "eager"]) == 1
    assert [row["batch"] for row in record.read(path)] == ["2", "2"]
    assert "FAILED: tiny, eager, batch 1, budget 32: no memory is left" in capsys.readouterr().err


def test_a_budget_that_drops_nothing_is_no_row(tmp_path, capsys):
    path = tmp_path / "ways.csv"
    arguments = ["--model", "tiny", "--batch", "1", "--device", "cpu", "--allow-reference", "--budget", "640"]
    assert ways.main([*arguments, "--csv", str(path), "--way", "eager", "--samples", "1"]) == 1
    assert not path.exists()
    assert "budget 640: it drops none of 144 tokens" in capsys.readouterr().err


def test_a_decode_step_that_is_not_one_graph_is_no_row():
    torch._dynamo.utils.counters.clear()
    ways.check_compiled(torch.device("cpu"))  # not compiled there
    with pytest.raises(RuntimeError, match="not compiled as a whole: 0 graphs, 0 breaks"):
        ways.check_compiled(torch.device("cuda"))


def lines_of(rows):
    return {(ways.title(row), row["way"]) for row in rows}


def test_the_plot_has_a_line_for_each_way_that_has_rows(tmp_path):
    pytest.importorskip("matplotlib")
    base = dict.fromkeys(ways.COLUMNS, "1") | {"device": "a device"}
    rows = [
        {**base, "model": model, "way": way, "batch": batch, "budget": budget, "keep": keep, "keep_after": keep}
        for model, way, batch in [("a", way, "1") for way in ways.WAYS] + [("a", "eager", "16"), ("b", "static", "1")]
        for budget, keep in (("all", "144"), ("32", "32"))
    ]
    rows += [{**row, "dtype": "2"} for row in rows[:2]] + [{**row, "attention": "2"} for row in rows[:2]]
    panels = ways.chart([*rows, {**rows[0], "token_ms": "7"}]).axes
    columns = len(panels) // len(ways.PANELS)
    for top, bottom in zip(panels[:columns], panels[columns:], strict=True):
        assert [line.get_label() for line in top.lines] == [line.get_label() for line in bottom.lines]
    drawn = [(panel.get_title(), line.get_label()) for panel in panels[:columns] for line in panel.lines]
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == lines_of(rows)
    assert {len(line.get_xdata()) for panel in panels for line in panel.lines} == {2}
    assert list(panels[columns].lines[0].get_ydata()) == [1, 7]  # the newest row of each measurement


def test_the_picture_of_the_docs_has_every_way_that_was_measured():
    """To update the figure: python -m bench.ways --plot docs/ways.png"""
    image = pytest.importorskip("PIL.Image")
    picture = record.ROOT / "docs" / "ways.png"
    assert picture.stat().st_size < 120_000
    drawn = image.open(picture).text["Description"].split("; ")
    assert set(drawn) == {", ".join(line) for line in lines_of(record.read(record.RESULTS / "ways.csv"))}


def test_nothing_to_draw(tmp_path, capsys):
    assert ways.main(["--csv", str(tmp_path / "none.csv"), "--plot", str(tmp_path / "none.png")]) == 2
    assert "measure first" in capsys.readouterr().out


def test_no_gpu_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        ways.main(["--device", "cuda"])
