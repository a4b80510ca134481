"""bench.prefill and bench.decode_plans on the tiny model: the contents of the rows."""

import contextlib
import csv

import pytest
import torch

pytest.importorskip("transformers")

from sts_kernels import STSConfig
from sts_kernels.integrations import transformers as integration

from . import decode_plans, prefill, record

CPU = torch.device("cpu")


@pytest.fixture
def builds(monkeypatch):
    """Fake attention that builds a plan per key length: 1 ms per call, and 1 ms more at each new key length."""
    plans, attend = set(), torch.nn.functional.scaled_dot_product_attention

    def planned(query, key, *args, **kwargs):
        if query.shape[2] == 1:
            plans.add(key.shape[2])
        return attend(query, key, *args, **kwargs)

    def elapsed(call, device):
        before = len(plans)
        call()
        return 1.0 + len(plans) - before

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", planned)
    monkeypatch.setattr(prefill, "elapsed_ms", elapsed)
    return plans


@pytest.fixture(scope="module")
def tiny():
    from sts_kernels.generate import prepare
    from sts_kernels.integrations.transformers.random_models import build

    model, processor = build("tiny", CPU, torch.float32)
    return model, dict(prepare(processor, [prefill.picture((336, 336))], "What is in this picture?"))


def test_neither_side_of_the_decode_step_meets_a_new_length(builds, tiny):
    met = set()
    row = prefill.decode(*tiny, STSConfig(budget=32), CPU, 3, met)
    assert row == {"decode_ms": 1.0, "plain_decode_ms": 1.0, "hooks_percent": 0.0, "decode_lengths": "met"}
    assert met == builds


def test_fresh_lengths_are_fresh(builds, tiny):
    """Plans per token: one in the plain model, two in the pruned model, none at key lengths seen before."""
    met = set()
    row = {"prompt": 179, "visual": 144, "keep": 48, "keep_after": 16}
    for _ in range(2):
        assert prefill.generation(*tiny, row, None, CPU, met) == {"fresh_ms": 1.0, "again_ms": 0.0}
        assert prefill.generation(*tiny, row, STSConfig(budget=32), CPU, met) == {"fresh_ms": 2.0, "again_ms": 0.0}
        assert met == builds


def test_unmet():
    met = {11}
    assert prefill.unmet({10, 20}, met) == 1  # 11 is in `met`
    assert met == {11, *range(12, 28), *range(22, 38)}
    assert prefill.unmet({11}, met) == 26


@pytest.mark.parametrize(
    ("asked", "backend", "passes"),
    [
        (None, "", [None]),
        (None, "flash", [None]),
        (None, "cudnn", [True, False]),
        ("on", "cudnn", [True]),
        ("off", "cudnn", [False]),
        ("both", "flash", [True, False]),
    ],
)
def test_settings(asked, backend, passes):
    assert prefill.settings(asked, backend) == passes


def test_cudnn_attention_is_put_back():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for allowed in (True, False, None):
        with contextlib.suppress(KeyError), prefill.cudnn_attention(allowed):
            assert torch.backends.cuda.cudnn_sdp_enabled() == (before if allowed is None else allowed)
            raise KeyError
        assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_the_benchmark_decides_about_cudnn(monkeypatch):
    monkeypatch.setattr(integration, "apply_sts", lambda model, config, cudnn_attention=False: cudnn_attention)
    assert prefill.pruning(None, STSConfig(budget=32)) is True


def test_sdpa_backend(tiny):
    assert prefill.sdpa_backend(tiny[0], CPU, torch.float32) in ("flash", "math")


def test_decode_plans(builds, monkeypatch, capsys):
    """If attention builds a plan per key length, the side that sees it first pays, with or without hooks."""
    monkeypatch.setattr(decode_plans, "elapsed_ms", prefill.elapsed_ms)
    monkeypatch.setattr(decode_plans, "LAYERS", 2)
    monkeypatch.setattr(prefill, "STEPS", 4)
    assert decode_plans.main(["--device", "cpu", "--allow-reference"]) == 0
    lines = capsys.readouterr().out.splitlines()[3:]
    once = [
        "A 32 / 32 heads, flash_attention      first call    2.000 ms  second    1.000 ms",
        "A 28 / 4  heads, flash_attention      first call    2.000 ms  second    1.000 ms",
        "B plain 2.00 ms a step, then plain 1.00 ms a step",
        "C hooks 2.00 ms a step, then plain 1.00 ms a step",
        "C plain 2.00 ms a step, then hooks 1.00 ms a step",
        "D plain 1.00 ms a token, again 0.00 ms",
        "D pruned 2.00 ms a token, again 0.00 ms",
    ]
    assert lines == ["cuDNN attention on", *once, "cuDNN attention off", *once]


def test_cudnn_is_for_gpus(capsys):
    with pytest.raises(SystemExit):
        prefill.main(["--device", "cpu", "--cudnn", "on"])
    assert "--cudnn is about --attn sdpa on a GPU, got --attn sdpa on cpu" in capsys.readouterr().err


def test_recorded_decode_steps_say_which_lengths_they_met():
    rows = record.read(record.RESULTS / "prefill.csv")
    assert all(row["decode_lengths"] in (("new", "met") if row["decode_ms"] else ("",)) for row in rows)


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
    assert [row["decode_lengths"] for row in (full, pruned)] == ["", "met"]
    assert all(row["fresh_ms"] and row["again_ms"] for row in (full, pruned))
    assert not full["cudnn_attention"] + full["sdpa_backend"]  # columns filled on a GPU only
    out = capsys.readouterr().out
    assert out.count("tiny") == 3
    assert "the rest is left out" in out
