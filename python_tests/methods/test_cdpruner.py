"""CDPruner: vectors of the official code, greedy gains in float64, relevance that is given or from the text."""

import math

import pytest
import torch

from sts_kernels import methods

from . import judge, recipe


def unit(x):
    return x.double() / x.double().norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("case", recipe.cases("cdpruner"), ids=recipe.label)
def test_the_official_code(case):
    """An item's picks do not depend on its batch, although the official code scales relevance over the whole batch."""
    rs = recipe.start(case)
    batch = case["batch"]
    if case["recipe"] == "normal":
        x = recipe.normal(rs, batch, case["N"], case["C"])
    else:
        x = recipe.clustered(rs, batch, case["N"], case["C"])
    image, text = recipe.normal(rs, batch, case["N"], case["E"]), recipe.normal(rs, case["texts"], case["E"])
    x, image, text = recipe.tensors(case, x, image, text)
    given = {"features": x, "keys": image, "text": text.expand(batch, -1, -1)}
    order = methods.create("cdpruner", by="text").select(k=case["keep"], **given).order[case["item"]].tolist()
    assert len(set(order)) == case["keep"]
    if "alone" in case:
        assert sorted(order) == sorted(case["alone"])
    else:
        assert order[: len(case["order"])] == case["order"]
        relevance = -(unit(image) @ unit(text).T).mean(-1)
        same = methods.create("cdpruner").select(k=case["keep"], features=x, scores=relevance).order[0]
        assert same.tolist() == order


def gains(kernel, picks):
    """For each pick: its gain in determinant, and the largest gain of any token left."""
    for step, pick in enumerate(picks):
        held = picks[:step]
        block = kernel[held][:, held]
        cross = kernel[:, held]
        gain = kernel.diagonal() - (cross * torch.linalg.solve(block, cross.T).T).sum(1) if held else kernel.diagonal()
        left = [i for i in range(len(kernel)) if i not in held]
        yield gain[pick].item(), gain[left].max().item()


def test_greedy_in_float64(device):
    rng = torch.Generator().manual_seed(0)
    x, relevance = torch.randn(3, 60, 48, generator=rng), torch.rand(3, 60, generator=rng)
    relevance[2] = 7 * relevance[2] - 100
    order = methods.create("cdpruner").select(k=24, features=x.to(device), scores=relevance.to(device)).order
    for item in range(3):
        r = relevance[item].double()
        quality = (r - r.min() + 1e-6) / (r.max() - r.min())
        kernel = quality[:, None] * (1 - judge.cosine_distance(x[item])) * quality
        for gain, best in gains(kernel, order[item].tolist()):
            assert gain >= best * (1 - 1e-3) - 1e-6


def test_relevance_is_scaled_over_an_items_own_tokens(device):
    """Other items, padding and NaN tokens do not change the scale."""
    rng = torch.Generator().manual_seed(1)
    x, relevance = torch.randn(2, 30, 16, generator=rng).to(device), torch.rand(2, 30, generator=rng).to(device)
    method = methods.create("cdpruner")
    alone = method.select(k=8, features=x[:1, :20], scores=relevance[:1, :20]).order[0]
    relevance[0, 20:25], relevance[0, 25:], relevance[1] = 50.0, -50.0, relevance[1] * 1000
    counts = torch.tensor([20, 30], device=device)
    assert torch.equal(method.select(k=8, features=x, scores=relevance, num_tokens=counts).order[0], alone)
    x[0, 20:] = math.nan
    assert torch.equal(method.select(k=8, features=x, scores=relevance).order[0], alone)


def test_equal_relevance_leaves_diversity_alone(device):
    x = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(2)).to(device)
    x[0, 5] = x[0, 3]
    order = methods.create("cdpruner").select(k=8, features=x, scores=torch.zeros(1, 20, device=device)).order[0]
    assert order[0] == 0
    assert not {3, 5} <= set(order.tolist())


def test_the_sign_of_the_cosine(device):
    x = torch.eye(6, device=device)[None]
    text = torch.tensor([[[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]], device=device)
    like = methods.create("cdpruner", by="text", negate=False).select(k=3, features=x, text=text).order
    assert like.tolist() == [[0, 1, 2]]
    assert methods.create("cdpruner", by="text").select(k=3, features=x, text=text).order.tolist() == [[5, 4, 3]]


def test_what_is_missing():
    x = torch.randn(1, 6, 4)
    with pytest.raises(ValueError, match="cdpruner: text must have the 4 channels of features, got 5; give image emb"):
        methods.create("cdpruner", by="text").select(k=2, features=x, text=torch.ones(1, 2, 5))
    with pytest.raises(ValueError, match="cdpruner: text must have the 3 channels of keys, got 5"):
        methods.create("cdpruner", by="text").select(k=2, features=x, keys=x[..., :3], text=torch.ones(1, 2, 5))
    with pytest.raises(ValueError, match="cdpruner: by must be 'scores' or 'text', got 'clip'"):
        methods.create("cdpruner", by="clip")
    with pytest.raises(TypeError, match="cdpruner: negate must be True or False, got int"):
        methods.create("cdpruner", negate=0)
