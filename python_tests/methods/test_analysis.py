"""The analyses: recorded numbers, float64 written out per item, ragged batches, bad values, errors."""

import math

import pytest
import torch

from sts_kernels import analysis

from . import recipe

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = [(1, 1), (1, 7), (2, 3), (37, 5), (64, 200), (200, 64)]  # N, C


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def attention(*shape, seed=0):
    return noise(*shape, seed=seed).softmax(-1)


# ---- float64, one item at a time ---------------------------------------------------------------------------------


def erank(x):
    s = torch.linalg.svdvals(x.double())
    q = (s / s.sum())[s > 0]
    return float((-(q * q.log()).sum()).exp())


def participation_ratio(x):
    s = torch.linalg.svdvals(x.double())
    return float(s.square().sum() ** 2 / s.pow(4).sum())


def entropy(scores):
    p = [s / sum(scores) for s in scores]
    return -sum(v * math.log(v) for v in p if v > 0)


def spread(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


def consistency(x, scores, k):
    x = x.double()
    cosine = torch.nn.functional.normalize(x, dim=1, eps=0) @ torch.nn.functional.normalize(x, dim=1, eps=0).T
    local = []
    for i, row in enumerate(cosine.tolist()):
        near = sorted((j for j in range(len(x)) if j != i), key=lambda j: (-row[j], j))[:k]
        local.append(spread([scores[j] for j in near]))
    return 1 - sum(local) / len(local) / spread(scores)


def best(scores, share):
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: max(1, round(share * len(scores)))]


def quarters(scores, share):
    top = best(scores, share)
    return [sum(i * 4 // len(scores) == q for i in top) / len(top) for q in range(4)]


def distances(x, kept):
    difference = x.double()[:, None] - x.double()[kept]
    return difference.square().sum(-1).sqrt().min(1).values


def close(got, expected, rel=2e-6):
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx(expected, rel=rel, abs=1e-7, nan_ok=True)


# ---- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", recipe.cases("analysis"), ids=recipe.label)
def test_the_reference(case, device):
    rs = recipe.start(case)
    x, scores = recipe.tensors(case, recipe.features(case, rs), recipe.positive(rs, case["N"]))
    x, scores, kept = x[None].to(device), scores[None].to(device), torch.tensor([case["sts_mean"]], device=device)
    close(analysis.erank(x), [case["erank"]])
    close(analysis.erank(x[:, kept[0]]), [case["erank_kept"]])
    close(analysis.attention_entropy(scores), [case["entropy"]])
    for k, value in case["knn_consistency"].items():
        close(analysis.knn_consistency(x, scores, int(k)), [value], rel=2e-5)  # 1 minus nearly 1
    close(analysis.share_of_top(scores), [case["share_of_top_20"]])
    close(analysis.quartile_shares(scores)[0], case["quartiles"])
    largest, mean = case["cover"]
    cover = analysis.coverage(x, kept)
    close(cover.largest, [largest])
    close(cover.mean, [mean])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "channels"), SIZES)
def test_float64(device, tokens, channels, dtype):
    x = noise(3, tokens, channels, seed=1).to(dtype)
    scores = attention(3, tokens, seed=2)
    order = torch.stack([torch.randperm(tokens, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    order = order[:, : -(-tokens // 3)]
    rows = scores.double().tolist()
    on, weights, kept = x.to(device), scores.to(device), order.to(device)
    close(analysis.erank(on), [erank(item) for item in x])
    close(analysis.participation_ratio(on), [participation_ratio(item) for item in x])
    close(analysis.attention_entropy(weights), [entropy(row) for row in rows])
    cover = analysis.coverage(on, kept)
    d = [distances(item, picks) for item, picks in zip(x, order, strict=True)]
    close(cover.mean, [float(item.mean()) for item in d])
    close(cover.largest, [float(item.max()) for item in d])
    for share in (0.01, 0.2, 0.5, 1):
        top = [sum(row[i] for i in best(row, share)) / sum(row) for row in rows]
        close(analysis.share_of_top(weights, share), top)
        got = analysis.quartile_shares(weights, share)
        for item, row in enumerate(rows):
            close(got[item], quarters(row, share))
    for k in {1, 5, tokens - 1} & set(range(1, tokens)):
        expected = [consistency(item, row, k) for item, row in zip(x, rows, strict=True)]
        close(analysis.knn_consistency(on, weights, k), expected, rel=1e-4)


def test_erank_is_not_centred_and_has_known_values(device):
    eye = torch.eye(16, device=device)
    assert analysis.erank(eye[None]).item() == pytest.approx(16)
    assert analysis.participation_ratio(eye[None]).item() == pytest.approx(16)
    assert analysis.erank((eye + 10)[None]).item() < 5
    shuffled = noise(1, 40, 8)
    assert analysis.erank(1e-20 * shuffled).item() == pytest.approx(erank(shuffled[0]), rel=1e-5)
    assert analysis.erank(1e18 * shuffled).item() == pytest.approx(erank(shuffled[0]), rel=1e-5)


@pytest.mark.parametrize(("tokens", "channels"), [(576, 1024), (1024, 96)])
def test_features_of_rank_one_have_erank_one(device, tokens, channels):
    """A float32 Gram matrix would give 1.5 and more."""
    x = noise(1, tokens, 1, seed=3) * noise(1, 1, channels, seed=4)
    for rows in (x, noise(1, 1, channels).expand(1, tokens, channels)):
        assert analysis.erank(rows.to(device)).item() == pytest.approx(1, rel=0.01)
        assert analysis.participation_ratio(rows.to(device)).item() == pytest.approx(1, rel=1e-4)


def test_erank_under_a_large_common_offset(device):
    x = noise(1, 300, 64, seed=5) + 20
    close(analysis.erank(x.to(device)), [erank(x[0])])


def test_coverage_of_near_duplicates_and_of_what_is_kept(device):
    x = 20 + 1e-3 * noise(1, 90, 32, seed=6)
    kept = torch.arange(0, 90, 2)[None]
    d = distances(x[0], kept[0])
    cover = analysis.coverage(x.to(device), kept.to(device))
    close(cover.mean, [float(d.mean())], rel=1e-5)
    close(cover.largest, [float(d.max())], rel=1e-5)
    everything = analysis.coverage(x.to(device), torch.arange(90, device=device)[None])
    assert everything.mean.item() == everything.largest.item() == 0


def test_coverage_in_parts(monkeypatch, device):
    x, kept = noise(2, 50, 8).to(device), torch.tensor([[3, 7, 1], [0, 49, 20]], device=device)
    whole = analysis.coverage(x, kept)
    monkeypatch.setattr(analysis, "CHUNK", 20)
    assert all(torch.equal(a, b) for a, b in zip(whole, analysis.coverage(x, kept), strict=True))


def test_equal_scores_and_equal_tokens(device):
    same = torch.ones(1, 8, device=device)
    assert analysis.attention_entropy(same).item() == pytest.approx(math.log(8))
    assert analysis.share_of_top(same, 0.25).item() == 0.25
    assert analysis.quartile_shares(same, 0.25).tolist() == [[1, 0, 0, 0]]
    assert analysis.knn_consistency(noise(1, 8, 4).to(device), same, 3).isnan().all()
    scores = torch.arange(8.0, device=device)[None]
    # Neighbours: 1 and 2 of token 0, 0 and 2 of token 1, 0 and 1 of all others.
    value = analysis.knn_consistency(torch.ones(1, 8, 4, device=device), scores, 2).item()
    assert value == pytest.approx(1 - (7 * 0.5 + 1) / 8 / spread(list(range(8))))


def test_neighbours_of_equal_tokens_are_the_lowest(device):
    """9 tokens, repeated 7 times: a token's 3 neighbours are the copies of lowest index."""
    x, scores = noise(9, 13, seed=14).repeat(7, 1), attention(63, seed=15)
    local = []
    for i in range(63):
        copies = [j for j in range(i % 9, 63, 9) if j != i][:3]
        local.append(spread([scores[j].item() for j in copies]))
    expected = 1 - sum(local) / 63 / spread(scores.double().tolist())
    assert analysis.knn_consistency(x[None].to(device), scores[None].to(device), 3).item() == pytest.approx(expected)


# ---- batches -----------------------------------------------------------------------------------------------------

CALLS = {
    "erank": lambda x, s, n: analysis.erank(x, n),
    "participation_ratio": lambda x, s, n: analysis.participation_ratio(x, n),
    "attention_entropy": lambda x, s, n: analysis.attention_entropy(s, n),
    "knn_consistency": lambda x, s, n: analysis.knn_consistency(x, s, 4, n),
    "share_of_top": lambda x, s, n: analysis.share_of_top(s, 0.2, n),
    "quartile_shares": lambda x, s, n: analysis.quartile_shares(s, 0.25, n),
    "coverage": lambda x, s, n: torch.stack(
        analysis.coverage(x, torch.arange(3, device=x.device).expand(len(x), 3), n), 1
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_ragged_item_is_as_alone(device, name):
    counts = [40, 9, 5, 3]
    x, scores = noise(4, 40, 12, seed=7), attention(4, 40, seed=8)
    for item, count in enumerate(counts):  # non-finite padding
        x[item, count:] = torch.nan
        scores[item, count:] = torch.inf
    x, scores = x.to(device), scores.to(device)
    got = CALLS[name](x, scores, torch.tensor(counts, device=device, dtype=torch.int32))
    for item, count in enumerate(counts):
        rows, weights = x[item : item + 1, :count], scores[item : item + 1, :count]
        if name == "knn_consistency":
            alone = analysis.knn_consistency(rows, weights, min(4, count - 1))
        else:
            alone = CALLS[name](rows, weights, None)
        torch.testing.assert_close(got[item], alone[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_item_spoils_no_other(device, name, value):
    x, scores = noise(3, 20, 6, seed=9).to(device), attention(3, 20, seed=10).to(device)
    good = CALLS[name](x, scores, None)
    x[1, 4, 2] = value
    scores[1, 4] = value
    got = CALLS[name](x, scores, None)
    assert got[1].isnan().all()
    assert torch.equal(got[::2], good[::2])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_bad_features_or_bad_scores_alone_give_nan(device, value):
    x, scores = noise(2, 20, 6, seed=9).to(device), attention(2, 20, seed=10).to(device)
    for bad in (x, scores):
        one, other = x.clone(), scores.clone()
        (one if bad is x else other)[1, 4] = value
        got = analysis.knn_consistency(one, other, 4)
        assert got.isnan().tolist() == [False, True]


@pytest.mark.parametrize("name", ["attention_entropy", "knn_consistency", "share_of_top", "quartile_shares"])
def test_a_negative_score_gives_nan(device, name):
    x, scores = noise(2, 20, 6, seed=9).to(device), attention(2, 20, seed=10).to(device)
    scores[1] = scores[1].log()  # logits in place of attention
    got = CALLS[name](x, scores, None)
    assert got[1].isnan().all()
    assert got[0].isfinite().all()


@pytest.mark.parametrize("name", CALLS)
def test_nothing_gives_zero(device, name):
    x, scores = torch.zeros(2, 6, 4, device=device), torch.zeros(2, 6, device=device)
    zeros = CALLS[name](x, scores, None)
    if name == "knn_consistency":
        assert zeros.isnan().all()
    elif name != "quartile_shares":
        assert not zeros.any()
    counts = torch.tensor([0, 6], device=device)
    assert not CALLS[name](noise(2, 6, 4).to(device), attention(2, 6).to(device), counts)[0].nan_to_num(posinf=1).any()
    assert CALLS[name](x[:0], scores[:0], None).shape[0] == 0


@pytest.mark.parametrize("name", CALLS)
def test_strides_and_gradients_make_no_difference(device, name):
    x, scores = noise(2, 15, 6, seed=11).to(device), attention(2, 15, seed=12).to(device)
    strided = x.mT.contiguous().mT.requires_grad_()
    got = CALLS[name](strided, scores.T.contiguous().T, None)
    assert not got.requires_grad
    torch.testing.assert_close(got, CALLS[name](x, scores, None))


def test_minus_one_in_an_order_is_no_pick(device):
    x = noise(2, 10, 3, seed=13).to(device)
    padded = analysis.coverage(x, torch.tensor([[4, -1, 2], [-1, -1, -1]], device=device))
    plain = analysis.coverage(x[:1], torch.tensor([[4, 2]], device=device))
    assert padded.mean[0] == plain.mean[0]
    assert padded.largest[0] == plain.largest[0]
    assert padded.mean[1] == padded.largest[1] == math.inf
    counts = torch.tensor([5, 10], device=device)  # token 7 is padding of item 0
    ragged = analysis.coverage(x, torch.tensor([[4, 7, 2], [0, 1, 2]], device=device), counts)
    assert float(ragged.mean[0]) == pytest.approx(
        float(distances(x[0, :5].cpu(), torch.tensor([4, 2])).mean()), rel=1e-6
    )


def test_without_a_sync(cuda):
    """No analysis synchronises but erank, whose eigenvalues do."""
    x, scores, counts = noise(2, 30, 8).to(cuda), attention(2, 30).to(cuda), torch.tensor([30, 12], device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for name in set(CALLS) - {"erank"}:
            CALLS[name](x, scores, counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- errors ------------------------------------------------------------------------------------------------------

X, S = noise(2, 6, 4), attention(2, 6)
BAD = [
    (lambda: analysis.erank([1.0]), TypeError, "erank: features must be a tensor of shape (B, N, C), got list"),
    (lambda: analysis.erank(X[0]), ValueError, "erank: features must have shape (B, N, C), got (6, 4)"),
    (lambda: analysis.erank(X.long()), TypeError, "erank: features must be float32, float16, bfloat16, got int64"),
    (lambda: analysis.erank(X[:, :0]), ValueError, "erank: features must have at least one token and one channel"),
    (lambda: analysis.erank(X, torch.tensor([7, 1])), ValueError, "erank: num_tokens[0] must be between 0 and 6"),
    (lambda: analysis.erank(X, torch.tensor([1])), ValueError, "erank: num_tokens must have shape (B,) = (2,), got"),
    (lambda: analysis.participation_ratio(X[0]), ValueError, "participation_ratio: features must have shape"),
    (lambda: analysis.attention_entropy(X), ValueError, "attention_entropy: scores must have shape (B, N), got"),
    (lambda: analysis.attention_entropy(S[:, :0]), ValueError, "scores must have at least one token"),
    (lambda: analysis.knn_consistency(X, S, 6), ValueError, "knn_consistency: k must be between 1 and 5 (the other"),
    (lambda: analysis.knn_consistency(X, S, 0), ValueError, "knn_consistency: k must be between 1 and 5"),
    (lambda: analysis.knn_consistency(X, S[:, 1:], 2), ValueError, "scores must have shape (B, N) = (2, 6), got"),
    (lambda: analysis.share_of_top(S, 0), ValueError, "share_of_top: share must be above 0 and at most 1, got 0"),
    (lambda: analysis.share_of_top(S, True), TypeError, "share_of_top: share must be a float, got bool"),
    (lambda: analysis.quartile_shares(S, 1.5), ValueError, "quartile_shares: share must be above 0 and at most 1"),
    (lambda: analysis.coverage(X, torch.tensor([[6], [0]])), ValueError, "order must be between -1 and 5, got 6"),
    (lambda: analysis.coverage(X, torch.tensor([[0], [-2]])), ValueError, "order must be between -1 and 5, got -2"),
    (lambda: analysis.coverage(X, torch.tensor([[0]])), ValueError, "order must have shape (B, K) with B = 2"),
    (lambda: analysis.coverage(X, X[..., 0]), TypeError, "coverage: order must be int64, int32, got float32"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message[:50] for _, _, message in BAD])
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
