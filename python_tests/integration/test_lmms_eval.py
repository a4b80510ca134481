"""Pruned models of lmms-eval, with stand-ins for lmms-eval's classes. bench/eval_check.sh runs lmms-eval itself."""

import subprocess
import sys
import types

import pytest
import torch

from sts_kernels import methods, papers
from sts_kernels.integrations import lmms_eval
from sts_kernels.integrations.lmms_eval import models as pruned

from . import models


class Manifest:
    def __init__(self, model_id, chat_class_path):
        self.model_id, self.chat_class_path = model_id, chat_class_path


class Theirs:
    """Like lmms-eval's classes: unknown arguments are refused, and an exception of generate() is an empty answer."""

    is_simple = False

    def __init__(self, pretrained, **kwargs):
        assert kwargs == {}, f"Unexpected kwargs: {kwargs}"
        self._model = pretrained

    @property
    def model(self):
        return self._model

    def generate_until(self, requests):
        answers = []
        for inputs in requests:
            try:
                answers.append(self.model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False))
            except Exception:
                answers.append("")
        return answers

    def loglikelihood(self, requests):
        return [(0.0, False)] * len(requests)


@pytest.fixture
def theirs(monkeypatch):
    """A stand-in for the modules of lmms_eval that are used."""
    registry = types.ModuleType("lmms_eval.models.registry_v2")
    registry.ModelManifest = Manifest
    found = {"lmms_eval.models.registry_v2": registry}
    for family, name in lmms_eval.FAMILIES.items():
        module = types.ModuleType(f"lmms_eval.models.chat.{family}")
        setattr(module, name, type(name, (Theirs,), {}))
        found[module.__name__] = module
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    pruned._pruned.cache_clear()
    yield
    pruned._pruned.cache_clear()


def test_manifests_name_a_class_for_every_family(theirs):
    made = lmms_eval.manifests()
    assert {manifest.model_id for manifest in made} == {
        "sts_llava_hf",
        "sts_qwen2_5_vl",
        "sts_qwen3_vl",
        "sts_internvl_hf",
    }
    for manifest in made:
        module, name = manifest.chat_class_path.rsplit(".", 1)
        kind = getattr(sys.modules[module], name)
        assert issubclass(kind, Theirs)
        assert kind is getattr(sys.modules[module], name)
        assert not kind.is_simple


def test_an_unknown_class_is_an_attribute_error():
    with pytest.raises(AttributeError, match="STSOther"):
        pruned.STSOther  # noqa: B018


def test_the_entry_point_imports_nothing_heavy():
    code = "import sys, sts_kernels.integrations.lmms_eval; print({'transformers', 'lmms_eval'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("given", "name", "options"),
    [
        ({"budget": 64}, "sts", {"budget": 64}),
        ({"method": "divprune", "keep": 0.25, "scope": "crop"}, "divprune", {"keep": 0.25, "scope": "crop"}),
        (
            {"method": "pyramiddrop", "layers": "1+2", "ratios": "0.5+16"},
            "pyramiddrop",
            {"layers": [1, 2], "ratios": [0.5, 16]},
        ),
        ({"method": "fastv", "layers": 2, "ratios": 0.5}, "fastv", {"layers": [2], "ratios": [0.5]}),
        ({"method": "fastv"}, "fastv", {}),
        ({"method": "fastv", "ratio": 0.25}, "fastv", {}),
        ({"method": "dart"}, "dart", {}),
        ({"method": "pyramiddrop"}, "pyramiddrop", {}),
        ({"method": "sparsevlm", "retained_tokens": 192}, "sparsevlm", {}),
        ({"keep_after": 64}, "sts", {}),
        ({"llm_only": True, "budget": 0.3}, "sts", {"budget": 0.3}),
    ],
)
def test_model_args(given, name, options):
    left = {**given, "device_map": "auto"}
    method, found = pruned.configure(left)
    assert (method.name, found, left) == (name, options, {"device_map": "auto"})


def test_options_of_the_method():
    method, _ = pruned.configure({"method": "fps", "keep": 8, "anchor": 3})
    assert method == methods.create("fps", anchor=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "budget=128"),
        ({"layers": 8}, "budget=128"),
        ({"method": "sparsevlm"}, "budget=192"),
        ({"method": "nothing", "budget": 8}, "nothing"),
        ({"method": "fastv", "keep": 8}, "keep"),
        ({"budget": "many"}, "budget must be a number of tokens .* got 'many'"),
        ({"method": "fastv", "layers": "2+x"}, "layers must be .* plus signs, got '2.x'"),
        ({"budget": -1}, "budget"),
    ],
)
def test_a_bad_argument_is_refused_before_weights_are_loaded(theirs, given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        pruned.STSLlavaHf(pretrained=None, **given)


def test_what_is_not_ours_is_left_to_lmms_eval(theirs):
    with pytest.raises(AssertionError, match="Unexpected kwargs"):
        pruned.STSLlavaHf(pretrained=None, budget=8, colour="red")


def test_answers_are_those_of_prune(theirs, capsys):
    from sts_kernels.integrations.transformers import prune, remove_pruning

    model = models.shared("llava")
    inputs = models.batch(model, [models.prompt_of("llava")])
    with prune(model, "divprune", budget=8):
        want = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    wrapped = pruned.STSLlavaHf(pretrained=model, method="divprune", budget=8)
    try:
        got = wrapped.generate_until([inputs, inputs])
    finally:
        remove_pruning(model)
    assert all(torch.equal(answer, want) for answer in got)
    out = capsys.readouterr().out
    assert "divprune" in out
    assert "2 of 2 prompts had images" in out
    assert "-> 8.0" in out


def test_an_error_ends_the_run_instead_of_an_empty_answer(theirs):
    from sts_kernels.integrations.transformers import remove_pruning

    model = models.shared("llava")
    inputs = models.batch(model, [models.prompt_of("llava")])
    wrapped = pruned.STSLlavaHf(pretrained=model, budget=8)
    generate = model.generate
    try:
        with pytest.raises(SystemExit, match="prefill_chunk_size"):
            wrapped.generate_until([{**inputs, "prefill_chunk_size": 4}])
        assert model.generate is generate
    finally:
        remove_pruning(model)


def test_given_answers_are_not_scored(theirs):
    from sts_kernels.integrations.transformers import remove_pruning

    model = models.shared("llava")
    wrapped = pruned.STSLlavaHf(pretrained=model, budget=8)
    try:
        with pytest.raises(SystemExit, match=r"multiple_choice or loglikelihood\).*take a task"):
            wrapped.loglikelihood([])
    finally:
        remove_pruning(model)


def test_the_tables_use_these_models():
    assert {name.removeprefix("sts_") for name in papers.base.LMMS_MODELS.values()} <= set(lmms_eval.FAMILIES)
