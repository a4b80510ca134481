"""FLOPs and KV cache against values computed by hand, in each convention."""

import types

import pytest
import torch

from sts_kernels.flops import CONVENTIONS, Convention, LLMSize

SIZE = LLMSize(layers=3, hidden=8, query=6, key=2, mlp=10, bytes=2)
PROJECTIONS = [(5, 8, 6), (5, 8, 2), (5, 8, 2), (5, 6, 8)]
ATTENTION = [(5, 6, 5), (5, 5, 6)]
GATED_MLP = [(5, 8, 10), (5, 8, 10), (5, 10, 8)]


def multiply_adds(products):
    return sum(a * b * c for a, b, c in products)


def test_a_layer_by_its_matrix_products():
    assert SIZE.layer_flops(5) == 2 * multiply_adds(PROJECTIONS + ATTENTION + GATED_MLP)
    once = Convention(1, 2, False)
    assert SIZE.layer_flops(5, once) == multiply_adds(PROJECTIONS + ATTENTION + GATED_MLP[1:])


def test_the_formulas_of_the_papers():
    n, d, m = 7, 4096, 11008
    size = LLMSize(32, d, d, d, m, 2)
    assert size.layer_flops(n, CONVENTIONS["sts"]) == 4 * n * d * d + 2 * n * n * d + 3 * n * d * m
    assert size.layer_flops(n, CONVENTIONS["adavtp"]) == 4 * n * d * d + 2 * n * n * d + 2 * n * d * m
    assert (
        size.layer_flops(n)
        == size.layer_flops(n, CONVENTIONS["vispruner"])
        == 2 * size.layer_flops(n, CONVENTIONS["sts"])
    )


@pytest.mark.parametrize("name", CONVENTIONS)
def test_text_counts_where_the_convention_says_so(name):
    convention = CONVENTIONS[name]
    got = SIZE.prefill_flops([(1, 5), (2, 3)], 4, convention)
    other = 4 if convention.text else 0
    assert got == SIZE.layer_flops(5 + other, convention) + 2 * SIZE.layer_flops(3 + other, convention)
    assert SIZE.prefill_flops([(1, 5), (2, 3)], convention=convention) <= got


def test_conventions_by_name():
    for name, convention in CONVENTIONS.items():
        assert SIZE.layer_flops(5, name) == SIZE.layer_flops(5, convention)
        assert SIZE.prefill_flops([(1, 5)], 4, name) == SIZE.prefill_flops([(1, 5)], 4, convention)
    for bad in ("paper", None, ["sts"]):
        with pytest.raises(ValueError, match=r"convention must be a Convention or one of report, .*, got"):
            SIZE.prefill_flops([(1, 5)], 4, bad)


class Experts(types.SimpleNamespace):
    """A configuration of 8 layers: experts in every second, but for the last."""

    def get_text_config(self):
        return self


def test_experts():
    """A token takes two of the experts in three layers, and the dense MLP in five."""
    sizes = {"num_hidden_layers": 8, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 40}
    chosen = {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "num_experts": 16}
    config = Experts(**sizes, **chosen, decoder_sparse_step=2, mlp_only_layers=[7])
    size = LLMSize.of(config, torch.float16)
    assert size.mlp == (3 * 2 * 12 + 5 * 40) / 8
    dense = LLMSize.of(Experts(**sizes), torch.float16)
    assert dense.mlp == 40
    gap = dense.prefill_flops([(8, 5)]) - size.prefill_flops([(8, 5)])
    assert gap == 3 * (2 * 3 * 5 * 8 * (40 - 2 * 12))


def test_cache():
    assert LLMSize(32, 4096, 4096, 4096, 11008, 2).kv_mb(32 * 2880) == 1440.0
    assert LLMSize(28, 3584, 3584, 512, 18944, 2).kv_mb(28) == 2 * 28 * 512 * 2 / 2**20
