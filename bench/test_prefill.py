"""bench.prefill measures the tiny model, and its rows say what they should."""

import csv

import pytest

pytest.importorskip("transformers")

from . import prefill


def test_rows(tmp_path, capsys):
    path = tmp_path / "prefill.csv"
    common = ["--model", "tiny", "--device", "cpu", "--samples", "2", "--csv", str(path), "--allow-reference"]
    assert prefill.main([*common, "--budget", "32"]) == 0
    assert prefill.main([*common, "--budget", "16", "--seconds", "0.001"]) == 0
    with path.open(newline="") as file:
        full, pruned, again = csv.DictReader(file)
    assert [row["budget"] for row in (full, pruned, again)] == ["all", "32", "all"]
    assert [pruned[name] for name in ("visual", "keep", "keep_after")] == ["144", "48", "16"]
    assert full["visual"] == full["keep"] == full["keep_after"] == "144"
    assert float(full["stage2_ms"]) == 0 < float(pruned["stage2_ms"])
    for row in (full, pruned):
        assert 0 < float(row["prefill_p20_ms"]) <= float(row["prefill_p50_ms"]) <= float(row["prefill_p80_ms"])
        assert row["samples"] == "2"
    assert float(pruned["kv_mb"]) < float(full["kv_mb"])
    assert float(pruned["decode_ms"]) > 0
    out = capsys.readouterr().out
    assert out.count("tiny") == 3
    assert "the rest is left out" in out
