"""`python -m pytest -m smoke`: does this installation work? Ops and methods once each, pruned models, `info`."""

import json

import pytest
import torch
from op_inputs import OPS, outputs, sized

from sts_kernels import __main__ as command_line
from sts_kernels import _native, _registry, methods

pytestmark = pytest.mark.smoke


def test_the_library_is_there():
    status = _native.status()
    assert status.loaded or status.chosen, f"{status.reason}. To fix it: {status.remedy}"


@pytest.mark.parametrize("op", OPS)
def test_op_agrees_with_its_reference(device, op):
    got = outputs(getattr(torch.ops.sts_kernels, op)(**sized(op, 1, device)))
    want = outputs(_registry.OPS[op].reference(**sized(op, 1, device)))
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", methods.names())
def test_method_keeps_distinct_tokens(device, name):
    method = methods.create(name)
    if method.site is None:
        plan = method.plan(methods.Budget(budget=0.5), 32)
        assert 0 < plan.average([64]) <= 33
        return
    rng = torch.Generator().manual_seed(0)
    signals = {"features": (2, 64, 16), "scores": (2, 64), "keys": (2, 64, 8), "text": (2, 5, 16)}
    named = {"attention": "scores", "relevance": "scores"}
    wanted = {named.get(signal, signal) for signal in method.signals} | {"features"}
    given = {name: torch.rand(signals[name], generator=rng).to(device) for name in sorted(wanted)}
    order = method.select(k=16, **given).order
    for row in order.tolist():
        picks = [token for token in row if token >= 0]
        assert len(set(picks)) == len(picks) > 0
        assert max(picks) < 64


@pytest.mark.parametrize("name", ["sts", "divprune", "fastv"])
def test_pruned_model_generates(name):
    pytest.importorskip("transformers")
    from PIL import Image

    from sts_kernels.generate import prepare
    from sts_kernels.integrations.transformers import prune
    from sts_kernels.integrations.transformers.random_models import build

    model, processor = build("tiny", "cpu", torch.float32)
    inputs = prepare(processor, [Image.new("RGB", (336, 336), (200, 120, 40))], "What is in this picture?")
    with prune(model, name, budget=0.75) as pruning:
        ids = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert ids.shape[1] == inputs["input_ids"].shape[1] + 3
    row = pruning.report.rows[0]
    assert row.after_stage2 < row.tokens


def test_info(capsys):
    command_line.main(["info", "--json"])
    assert set(json.loads(capsys.readouterr().out)["ops"]) == set(OPS)
