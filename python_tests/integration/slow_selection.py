"""Slow float64 references of the methods before the LLM: tokens kept and merged. Near-ties raise NearTie."""

import itertools

import torch

from . import models
from .oracle import MARGIN, NearTie

ERANK_AVG = 12.0


def best(values: torch.Tensor, among: list[int]) -> int:
    """The index of the largest value; a near-tie raises."""
    ranked = sorted(among, key=lambda i: -float(values[i]))
    if len(ranked) > 1 and values[ranked[0]] - values[ranked[1]] <= MARGIN * values[ranked[0]].abs():
        raise NearTie("choice")
    return ranked[0]


def ranked(values: torch.Tensor, among, best: int | None = None) -> list[int]:
    """Indices, largest value first; near-ties raise. best: only the set of the first `best` indices has to be clear."""
    order = sorted(among, key=lambda i: -float(values[i]))
    for a, b in itertools.pairwise(order if best is None else order[best - 1 : best + 1]):
        if values[a] - values[b] <= MARGIN * values[a].abs():
            raise NearTie("rank")
    return order


def cosines(x: torch.Tensor) -> torch.Tensor:
    x = x.double() / x.double().norm(dim=1, keepdim=True)
    return x @ x.T


def vispruner(pool, keep: int) -> list[int]:
    return by_rounds(pool, keep, 0.5)


def by_rounds(pool, keep: int, ratio: float) -> list[int]:
    order, cosine = ranked(pool.attention, range(len(pool.attention))), cosines(pool.features)
    important, rest = order[: int(keep * ratio)], order[int(keep * ratio) :]
    while len(rest) > keep - len(important):
        even, odd = rest[::2], rest[1::2]
        closest = cosine[:, odd].max(1).values
        remove = min(8, len(rest) - keep + len(important), len(even))
        rest = ranked(closest, even)[remove:] + odd
    return important + rest


def erank(x: torch.Tensor) -> float:
    s = torch.linalg.svdvals(x.double())
    q = s / s.sum()
    return float((-(q * q.log()).sum()).exp())


def adavtp(pool, keep: int) -> list[int]:
    return walk(pool.projected, pool.attention, keep)


def walk(x: torch.Tensor, attention: torch.Tensor, keep: int) -> list[int]:
    order, distance, slope = ranked(attention, range(len(x))), 1 - cosines(x), 0.01 * erank(x) / ERANK_AVG
    picks, left = [], list(order)
    for rank, token in enumerate(order, 1):
        if token in left and len(picks) < keep:
            tau = min(rank * slope, 0.9)
            if any((distance[token, i] - tau).abs() < MARGIN for i in left):
                raise NearTie("threshold")
            picks.append(token)
            left = [i for i in left if distance[token, i] >= tau and i != token]
    return picks + [i for i in order if i not in picks][: keep - len(picks)]


def adavtp_of_any_number(pool, keep: int) -> list[int]:
    wanted = keep * min(max(erank(pool.projected) / ERANK_AVG, 0.8), 1.2) + 0.5
    if abs(wanted - round(wanted)) < 0.01:
        raise NearTie("count")
    return walk(pool.projected, pool.attention, min(int(wanted), len(pool.projected)))


def adavtp_in_the_encoder(pool, keep: int) -> list[int]:
    return walk(pool.features, pool.attention, keep)


def vispruner_by_erank(pool, keep: int) -> list[int]:
    share = min(max(0.5 + 0.5 * (ERANK_AVG - erank(pool.features)) / 9.0, 0.1), 0.9)
    if abs(keep * share - round(keep * share)) < 0.01 and 0.1 < share < 0.9:
        raise NearTie("share")
    return by_rounds(pool, keep, share)


def fastervlm_divprune(pool, keep: int) -> list[int]:
    picks = ranked(pool.attention, range(len(pool.attention)))[: max(1, keep // 2)]
    distance = 1 - cosines(pool.projected)
    while len(picks) < keep:
        nearest = distance[picks].min(0).values
        picks.append(best(nearest, [i for i in range(len(distance)) if i not in picks]))
    return picks


def cdpruner(pool, keep: int) -> list[int]:
    """Greedy: each pick has the largest ratio det(S + pick) / det(S)."""
    r = pool.attention.double()
    quality = (r - r.min() + 1e-6) / (r.max() - r.min())
    kernel, picks = quality[:, None] * cosines(pool.projected) * quality, []
    while len(picks) < keep:
        gain = kernel.diagonal().clone()
        if picks:
            block = kernel[picks][:, picks]
            gain -= (kernel[:, picks] * torch.linalg.solve(block, kernel[picks]).T).sum(1)
        if gain.max() < 1e-5:
            raise NearTie("rank")
        picks.append(best(gain, [i for i in range(len(gain)) if i not in picks]))
    return picks


def visionzip(pool, keep: int) -> dict[int, torch.Tensor]:
    dominant = (2 * keep * 54 + 64) // 128
    order = ranked(pool.attention, range(len(pool.attention)))
    rest = sorted(order[dominant:])
    step = max(1, len(rest) // max(1, keep - dominant))
    targets, cosine = rest[::step][: keep - dominant], cosines(pool.keys)
    x, joined = pool.features.double(), {target: [] for target in targets}
    for token in rest:
        if targets and token not in targets:
            joined[best(cosine[token], targets)].append(token)
    rows = {i: x[i] for i in order[:dominant]}
    return rows | {t: x[t] + (x[group].mean(0) if group else 0) for t, group in joined.items()}


def prumerge(pool, keep: int) -> dict[int, torch.Tensor]:
    wanted = max(1, keep - 1)
    return around(pool, ranked(pool.attention, range(len(pool.attention)), wanted)[:wanted], keep)


def prumerge_plus(pool, keep: int) -> dict[int, torch.Tensor]:
    wanted = max(1, keep - 1)
    few = max(1, (wanted + 2) // 4)
    order = ranked(pool.attention, range(len(pool.attention)), few)
    left = sorted(order[few:])
    return around(pool, order[:few] + [left[i * len(left) // (wanted - few)] for i in range(wanted - few)], keep)


def around(pool, picks: list[int], keep: int) -> dict[int, torch.Tensor]:
    x, a, cosine = pool.features.double(), pool.attention[:, None], cosines(pool.keys)
    near = {i: ranked(cosine[i], set(range(len(x))) - {i}, 8)[:8] for i in picks}
    rows = {i: x[i] + sum(a[j] * x[j] for j in near[i]) for i in picks}
    others = [i for i in range(len(x)) if i not in picks]
    return rows | ({others[0]: (a[others] * x[others]).sum(0)} if len(picks) < keep else {})


def tome(pool, keep: int) -> dict[int, torch.Tensor]:
    x, keys, groups = pool.features.double(), pool.keys.double(), [[i] for i in range(len(pool.keys))]
    while len(groups) > keep:
        cosine = cosines(torch.stack([keys[group].mean(0) for group in groups]))
        even, odd = range(0, len(groups), 2), range(1, len(groups), 2)
        target = {i: best(cosine[i], list(odd)) for i in even}
        order = ranked(cosine[:, 1::2].max(1).values, even)
        merged = min(len(groups) - keep, len(groups) // 2)
        joined = [groups[j] + [t for i in order[:merged] if target[i] == j for t in groups[i]] for j in odd]
        groups = [groups[i] for i in order[merged:]] + joined
    return {group[0]: x[group].mean(0) for group in groups}


def content(kind: str, arguments: dict, family: str = "") -> torch.Tensor:
    """A relevance for each token of the encoder, computed from the pixels of the token's patch. LLaVA-OneVision has one
    for each token that is interpolated."""
    names = ("pixel_values_videos", "pixel_values") if kind == "video" else ("pixel_values_images", "pixel_values")
    x = next(arguments[name] for name in names if name in arguments)
    if x.ndim == 2:  # Qwen-VL: 4 patches in a row make a token
        return x.view(-1, 4 * x.shape[1]).mean(1)
    if kind == "image" and (sizes := arguments.get("image_sizes")) is not None:
        sizes, table = list(map(tuple, sizes.tolist())), models.NEXT_SIZES
        if family == "llava_onevision":
            only = [count == 1 for count in arguments["batch_num_images"].tolist() for _ in range(count)]
            sizes, table = list(zip(sizes, only, strict=True)), {(s, True): n for s, n in models.MOSAICS.items()}
            table |= {(size, False): (1, 0, 0) for size in models.MOSAICS}
        sizes = [table[size] for size in sizes]
        x = torch.cat([one[:crops] for one, (crops, _, _) in zip(x, sizes, strict=True)])
    side = x.shape[-1] // (4 if x.shape[-1] == 32 else 6)
    x = x.reshape(-1, *x.shape[-3:]).mean(1)
    tokens = x.unfold(1, side, side).unfold(2, side, side).mean((-1, -2)).flatten(1)
    if family == "llava_onevision":
        if kind == "video":
            return tokens[:, :9]
        images = tokens.split([crops for crops, _, _ in sizes])
        return torch.cat(
            [x.flatten()[: 36 + rows * columns] for x, (_, rows, columns) in zip(images, sizes, strict=True)]
        )
    return torch.nn.functional.pad(tokens, (1, 0), value=0.05) if kind == "video" else tokens  # frames have a [CLS]
