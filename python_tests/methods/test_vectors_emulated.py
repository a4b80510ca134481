"""Vectors of official code and float64 references on emulated CUDA kernels: each method's own test, ops replaced."""

import inspect
import sys

import pytest
import torch
from emulator import build, calls, operations

import sts_kernels
from sts_kernels import methods

from . import recipe, test_adavtp, test_cdpruner, test_divprune, test_fps, test_tome, test_visionzip, test_vispruner

RESULTS = {
    "farthest_select": 1,
    "suppress_select": 1,
    "dpp_select": 2,
    "dedup_select": 1,
    "nearest": 2,
    "scatter_mean": 2,
}
OFFICIAL = {  # tests whose only argument is a case of the vectors
    "adavtp": test_adavtp.test_the_reference,
    "cdpruner": test_cdpruner.test_the_official_code,
    "divprune": test_divprune.test_the_official_code,
    "fps": test_fps.test_the_reference,
    "tome": test_tome.test_a_matching_of_the_official_code,
    "vispruner": test_vispruner.test_the_official_code,
    "visionzip": test_visionzip.test_the_official_code,
}
AFFORDABLE = 160  # max tokens of an emulated case


@pytest.fixture(scope="module")
def emulated():
    if reason := build.missing_tool():
        pytest.skip(reason)
    return build.module()


@pytest.fixture
def called(emulated, monkeypatch):
    """The ops that ran emulated so far."""
    names = []
    for method in OFFICIAL:  # imported when first created
        methods.create(method)

    def emulate(name):
        op = getattr(sts_kernels, name)

        def run(*args, **kwargs):
            given = inspect.signature(op).bind(*args, **kwargs)
            given.apply_defaults()
            options = given.arguments | ({"exact": False} if name == "dedup_select" else {})
            call = getattr(operations, name)("vector", **options)
            out = [torch.from_numpy(array) for array in calls.run_in(emulated, call)[-RESULTS[name] :]]
            if name == "scatter_mean":
                out[0] = out[0].view(given.arguments["features"].dtype)
            names.append(name)
            return out[0] if len(out) == 1 else tuple(out)

        users = [
            m
            for m in sys.modules.values()
            if getattr(m, "__name__", "").startswith(("sts_kernels.methods", __package__))
        ]
        for module in users:
            if getattr(module, name, None) is op:
                monkeypatch.setattr(module, name, run)

    for name in RESULTS:
        emulate(name)
    return names


@pytest.mark.parametrize("method", OFFICIAL)
def test_vectors_on_emulated_kernels(called, method):
    for case in recipe.cases(method):
        if case["N"] <= AFFORDABLE:
            OFFICIAL[method](case)
    assert called
