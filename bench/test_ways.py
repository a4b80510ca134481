"""bench.ways measures the tiny model in every way, and draws what it measured."""

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


def test_a_plot_has_a_line_for_each_way(tmp_path):
    pytest.importorskip("matplotlib")
    base = dict.fromkeys(ways.COLUMNS, "1") | {"model": "tiny", "device": "a device"}
    rows = [
        {**base, "way": way, "batch": batch, "budget": budget, "keep": keep, "keep_after": keep}
        for way in ("eager", "captured")
        for batch in ("1", "16")
        for budget, keep in (("all", "144"), ("32", "32"))
    ]
    assert ways.draw(rows, tmp_path / "ways.png") == 4
    assert (tmp_path / "ways.png").stat().st_size > 1000
    assert ways.draw([], tmp_path / "none.png") == 0


def test_nothing_to_draw(tmp_path, capsys):
    assert ways.main(["--csv", str(tmp_path / "none.csv"), "--plot", str(tmp_path / "none.png")]) == 2
    assert "measure first" in capsys.readouterr().out


def test_no_gpu_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        ways.main(["--device", "cuda"])
