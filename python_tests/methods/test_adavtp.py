"""AdaVTP: a float64 reference's picks, the walk in float64, complexity, counts that follow it, calibration."""

import math

import pytest
import torch

from sts_kernels import analysis, methods
from sts_kernels.ops import suppress_select

from . import judge, recipe


def inputs(case):
    rs = recipe.start(case)
    x, scores = recipe.tensors(case, recipe.features(case, rs), recipe.positive(rs, case["N"]))
    return {"features": x[None], "scores": scores[None]}


@pytest.mark.parametrize("case", recipe.cases("adavtp"), ids=recipe.label)
def test_the_reference(case):
    given = inputs(case)
    for average, want in case["adavtp"].items():
        method = methods.create("adavtp", erank_avg=float(average))
        assert method.select(k=case["keep"], **given).order[0].tolist() == want["order"]
    assert float(analysis.erank(given["features"])) == pytest.approx(case["erank"], rel=1e-5)
    rank = given["scores"].argsort(1, descending=True).argsort(1)
    for tau, want in case["adavtp_tau"].items():  # one distance for all ranks, as in the paper's Tab. 12
        order = suppress_select(given["features"], rank, torch.full(rank.shape, float(tau)), case["keep"])
        assert order[0].tolist() == want["order"]


def walked(x, scores, k, complexity, average, tau_max):
    """Picks of the paper's loop in float64, and whether every decision had a margin."""
    distance, ranked = judge.cosine_distance(x), judge.best_first(scores.tolist(), len(scores))
    left, picks, clear = set(range(len(x))), [], True
    for rank, token in enumerate(ranked, 1):
        if token not in left or len(picks) == k:
            continue
        tau = min(rank * complexity / average * 0.01, tau_max)
        picks.append(token)
        left -= {j for j in left if distance[token, j] < tau} | {token}
        clear &= all(abs(distance[token, j] - tau) > 1e-5 for j in range(len(x)) if j != token)
    picks += [token for token in ranked if token not in picks][: k - len(picks)]
    return picks, clear


@pytest.mark.parametrize("complexity", ["erank", "participation", "entropy"])
@pytest.mark.parametrize("tau_max", [0.0, 0.25, 0.9, 2.0])
def test_the_walk_in_float64(device, complexity, tau_max):
    rng, judged = torch.Generator().manual_seed(0), 0
    method = methods.create("adavtp", complexity=complexity, erank_avg=2.0, tau_max=tau_max)
    for n, k in ((90, 30), (60, 60), (33, 32), (5, 2), (1, 1), (70, 1)):
        center, noise = torch.randn(6, 16, generator=rng), torch.randn(n, 16, generator=rng)
        x = center[torch.randint(6, (n,), generator=rng)] + 0.5 * noise
        scores = torch.rand(n, generator=rng)
        if complexity == "entropy":
            p = scores.double() / scores.double().sum()
            value = -(p * p.log()).sum().item()
        else:
            s = torch.linalg.svdvals(x.double())
            q = s / s.sum()
            value = (-(q * q.log()).sum()).exp().item()
            value = value if complexity == "erank" else (s.square().sum() ** 2 / s.pow(4).sum()).item()
        want, clear = walked(x, scores, k, value, 2.0, tau_max)
        order = method.select(k=k, features=x[None].to(device), scores=scores[None].to(device)).order[0].tolist()
        if clear:
            judged += 1
            assert order == want
    assert judged >= 5


def test_simple_images_are_pruned_by_attention_complex_ones_by_diversity(device):
    """The larger the erank against the average, the more tokens similar to a pick are removed."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(1, 80, 32, generator=rng)
    x[:, 40:] = x[:, :40] + 0.2 * torch.randn(1, 40, 32, generator=rng)
    scores = torch.rand(1, 80, generator=rng)
    best, overlap = set(judge.best_first(scores[0].tolist(), 40)), []
    for average in (1e6, 300.0, 3.0):
        method = methods.create("adavtp", erank_avg=average)
        order = method.select(k=40, features=x.to(device), scores=scores.to(device)).order[0].tolist()
        overlap.append(len(best & set(order)))
    assert overlap[0] == 40 > overlap[1] > overlap[2]


def test_a_score_or_a_feature_that_is_no_number(device):
    """Tokens with a non-finite score or feature come last, by index, and add nothing to the erank."""
    rng = torch.Generator().manual_seed(2)
    x, scores = torch.randn(1, 20, 8, generator=rng), torch.rand(1, 20, generator=rng)
    finite = [i for i in range(20) if i not in (3, 11)]
    method = methods.create("adavtp", erank_avg=0.5, tau_max=0.9)
    alone = method.select(k=18, features=x[:, finite].to(device), scores=scores[:, finite].to(device)).order[0]
    assert alone.tolist() != judge.best_first(scores[0, finite].tolist(), 18)  # some tokens are removed
    x[0, 11, 2], scores[0, 3] = math.nan, math.inf
    order = method.select(k=20, features=x.to(device), scores=scores.to(device)).order[0].tolist()
    assert order == [*(finite[i] for i in alone.tolist()), 3, 11]


@pytest.mark.parametrize("complexity", ["erank", "entropy"])
def test_counts_that_follow_the_image(device, complexity):
    """K = round(k * clip(e / average, 0.8, 1.2)), and the picks are those of a fixed count, padded and packed."""
    rng = torch.Generator().manual_seed(3)
    lengths, k = [60, 60, 60, 50, 11, 0], 20
    x, scores = torch.randn(6, 60, 24, generator=rng), torch.rand(6, 60, generator=rng) ** 3
    x[1] *= torch.logspace(0, -2, 24)
    x[2] *= torch.logspace(0, -0.6, 24)
    scores[1] **= 8
    x, scores, counts = x.to(device), scores.to(device), torch.tensor(lengths, device=device)
    find = {"erank": lambda i, n: analysis.erank(x[i : i + 1, :n]), "entropy": None}[complexity]
    find = find or (lambda i, n: analysis.attention_entropy(scores[i : i + 1, :n]))
    values = [float(find(i, n)) if n else 0.0 for i, n in enumerate(lengths)]
    average = sorted(values)[3]
    method = methods.create("adavtp", complexity=complexity, erank_avg=average, count="adaptive")
    fixed = methods.create("adavtp", complexity=complexity, erank_avg=average)
    want = [math.floor(k * min(max(v / average, 0.8), 1.2) + 0.5) for v in values]
    want = [min(count, n) if n > k else n for count, n in zip(want, lengths, strict=True)]
    assert len(set(want[:4])) > 1
    order = method.select(k=k, features=x, scores=scores, num_tokens=counts).order
    assert order.shape == (6, 24)
    most = fixed.select(k=24, features=x, scores=scores, num_tokens=counts).order
    for item, count in enumerate(want):
        assert (order[item] >= 0).sum() == count
        assert torch.equal(order[item, :count], most[item, :count])
    rows = {
        "features": torch.cat([x[i, :n] for i, n in enumerate(lengths)]),
        "scores": torch.cat([scores[i, :n] for i, n in enumerate(lengths)]),
    }
    asked = [min(k, n) for n in lengths]
    budgets = method.fit_budgets(lengths, asked, **rows)
    assert budgets == want  # an item of no more tokens than asked for keeps them all
    flat = method.select_packed(lengths, budgets, **rows).order.split(budgets)
    for item, count in enumerate(budgets):
        assert torch.equal(flat[item], most[item, :count])
    assert fixed.fit_budgets(lengths, asked, **rows) == asked


def test_counts_read_nothing_back():
    method = methods.create("adavtp", complexity="entropy", erank_avg=4.8, count="adaptive")
    x, scores = torch.empty(2, 30, 8, device="meta"), torch.empty(2, 30, device="meta")
    assert method.select(k=10, features=x, scores=scores).order.shape == (2, 12)
    assert method.select(k=28, features=x, scores=scores).order.shape == (2, 30)


def test_the_papers_numbers():
    """88 tokens become 70 to 106 (App. B.5)."""
    method = methods.create("adavtp", count="adaptive")
    assert (method.widest(88), method.widest(1)) == (106, 1)
    rng = torch.Generator().manual_seed(4)
    x, scores = torch.randn(1, 120, 100, generator=rng), torch.rand(1, 120, generator=rng)
    for average, count in ((1e6, 70), (1.0, 106)):
        order = methods.create("adavtp", count="adaptive", erank_avg=average).select(k=88, features=x, scores=scores)
        assert (order.order >= 0).sum() == count


def test_where_it_acts():
    assert methods.create("adavtp").site == "projected"
    assert methods.create("adavtp", space="encoder").site == "encoder"
    assert methods.create("adavtp").scope == "crop"


def test_calibration():
    """erank_avg becomes the mean over all images of all batches; complexity="entropy" needs scores."""
    rng = torch.Generator().manual_seed(5)
    images = [torch.randn(2, 20, 16, generator=rng), torch.randn(1, 30, 16, generator=rng)]
    values = torch.cat([analysis.erank(x) for x in images]).double()
    own = methods.create("adavtp", tau_max=0.4).calibrate(images)
    assert own == methods.create("adavtp", tau_max=0.4, erank_avg=float(values.mean()))
    with pytest.raises(ValueError, match="adavtp: calibrate needs scores of at least one image"):
        methods.create("adavtp", complexity="entropy").calibrate(images)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"tau_max": -0.1}, ValueError, "adavtp: tau_max must be between 0 and 2, got -0.1"),
        ({"tau_max": None}, TypeError, "adavtp: tau_max must be a float, got NoneType"),
        ({"tau_max": math.nan}, ValueError, "adavtp: tau_max must be between 0 and 2, got nan"),
        ({"erank_avg": -5.0}, ValueError, "adavtp: erank_avg must be above 0 and finite, got -5.0"),
        ({"space": "llm"}, ValueError, "adavtp: space must be 'projected' or 'encoder', got 'llm'"),
        ({"count": 88}, TypeError, "adavtp: count must be a str, got int"),
        ({"complexity": "rank"}, ValueError, "adavtp: complexity must be 'erank' or 'participation' or 'entropy', got"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        methods.create("adavtp", **options)
