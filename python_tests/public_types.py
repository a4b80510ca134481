"""The types of the public names, as a type checker infers them. mypy checks this file; nothing runs it."""

import torch
from torch import Tensor
from typing_extensions import assert_type

import sts_kernels
from sts_kernels import STSConfig, STSPlan, analysis, keep_top, methods, nearest, repulsion_select, scatter_mean
from sts_kernels.integrations.transformers import PruningHandle, apply_sts, prune

x = torch.zeros(2, 9, 4)
assert_type(sts_kernels.__version__, str)
assert_type(repulsion_select(x, 3), Tensor)
assert_type(sts_kernels.pairwise_sqdist(x), Tensor)
assert_type(nearest(x, x), tuple[Tensor, Tensor])
assert_type(scatter_mean(x, torch.zeros(2, 9, dtype=torch.int64), 3), tuple[Tensor, Tensor])
assert_type(keep_top(torch.zeros(2, 9), torch.arange(9), 3), tuple[Tensor, Tensor])
assert_type(analysis.coverage(x, torch.zeros(2, 3, dtype=torch.int64)).mean, Tensor)
assert_type(methods.create("sts").select(k=3, features=x).order, Tensor)
assert_type(methods.names(), list[str])
assert_type(STSConfig(budget=128).plan(32), STSPlan)


def of_models(model: torch.nn.Module) -> None:
    assert_type(prune(model, "divprune", budget=128), PruningHandle)
    assert_type(apply_sts(model, STSConfig(budget=128)), PruningHandle)
