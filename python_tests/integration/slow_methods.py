"""Slow float64 references of methods with their own rule to keep and merge tokens. Near-ties raise NearTie."""

import itertools
import math

import torch

from .oracle import MARGIN, Chosen, Inside, NearTie


def largest(score: dict, count: int) -> list:
    """The `count` keys of largest value, best first."""
    ranked = sorted(score, key=lambda key: (-score[key], key))
    if 0 < count < len(ranked):
        low, high = score[ranked[count]], score[ranked[count - 1]]
        if high != low and high - low <= MARGIN * abs(high):
            raise NearTie("score")
    return ranked[:count]


def density_peaks(rows: dict, clusters: int) -> dict[int, list[int]]:
    """Density peaks clustering -> {center: its tokens}. A density uses the `clusters` nearest neighbours."""
    places = list(rows)
    x = torch.stack([rows[p].double() for p in places])
    distance = ((x[:, None] - x).square().sum(-1) / x.shape[1]).sqrt()
    density = [math.exp(-sum(d * d for d in sorted(row)[:clusters]) / clusters) for row in distance.tolist()]
    ranked = sorted(density)
    if any(0 < b - a < 1e-5 * b for a, b in itertools.pairwise(ranked)):
        raise NearTie("density")
    score = {}
    for i in range(len(places)):
        denser = [float(distance[i, j]) for j in range(len(places)) if density[j] > density[i]]
        score[i] = density[i] * (min(denser) if denser else float(distance.max()))
    centers = largest(score, clusters)
    members = {places[c]: [places[c]] for c in centers}
    for i in set(range(len(places))) - set(centers):
        members[places[largest({c: -float(distance[i, c]) for c in centers}, 1)[0]]].append(places[i])
    return members


def consolidated(score: dict, rows: dict, keep: int, parts: tuple[float, float]) -> dict[int, list[int]]:
    """PolyMorphic -> {pick: its tokens}: the best tokens stay alone, all others are clustered."""
    retained = math.floor(keep * parts[0] / sum(parts) + 0.5)
    picks = largest(score, retained)
    others = {place: row for place, row in rows.items() if place not in picks}
    members = density_peaks(others, keep - retained) if keep > retained else {}
    return {**{pick: [pick] for pick in picks}, **members}


def means(members: dict, rows: dict) -> dict:
    return {pick: torch.stack([rows[m] for m in own]).mean(0) for pick, own in members.items()}


def alignment(visual: list, text: list, scale: float) -> tuple[torch.Tensor, list[int]]:
    """(visual, text) softmax over the text, and the raters: text tokens with an alignment above the mean."""
    aligned = (torch.stack(visual) @ torch.stack(text).T * scale).softmax(1)
    times = aligned.mean(0) * len(text)
    if (times - 1).abs().min() < MARGIN:
        raise NearTie("raters")
    return aligned, (times > 1).nonzero()[:, 0].tolist()


class PolyMorphic:
    def __init__(self, retained: float = 5.4, merged: float = 1.0):
        self.parts = (retained, merged)

    def choose(self, pool, keep: int) -> dict[int, list[int]]:
        score = dict(enumerate(pool.attention.tolist()))
        return consolidated(score, dict(enumerate(pool.features.double())), keep, self.parts)

    def cut(self, inside: Inside, left: int) -> Chosen:
        rows = {c: inside.hidden[c] for c in inside.visual}
        aligned, raters = alignment(list(rows.values()), [inside.hidden[c] for c in inside.text], _width(rows) ** -0.5)
        score = dict(zip(rows, aligned[:, raters].mean(1).tolist(), strict=True))
        members = consolidated(score, rows, left, self.parts)
        return Chosen(list(members), [], means(members, rows))


def _width(rows: dict) -> int:
    return len(next(iter(rows.values())))


def recycled(dropped: int, share: float = 0.3, per_cluster: int = 10) -> tuple[int, int]:
    """Number of dropped tokens that are clustered, and number of clusters."""
    if not dropped or not share:
        return 0, 0
    best = int(dropped * share) + 1
    return best, best // per_cluster + 1


def sparsevlm(inside: Inside, left: int, kept: int, best: int) -> Chosen:
    """Keeps `kept` tokens, and clusters the `best` next ones into left - kept means."""
    visual = [inside.entered[c] for c in inside.first]
    _, raters = alignment(visual, [inside.entered[c] for c in inside.text], 1.0)
    rating = inside.weights[[inside.row[inside.text[r]] for r in raters]].mean(0)
    score = {c: float(rating[inside.row[c]]) for c in inside.visual}
    own, others = largest(score, kept), largest(score, kept + best)[kept:]
    members = density_peaks({c: inside.hidden[c] for c in others}, left - kept) if left > kept else {}
    return Chosen(own, list(members), means(members, inside.hidden))


def dart(inside: Inside, left: int, pivots: int = 4) -> Chosen:
    own = largest({c: inside.norms[c] for c in inside.visual}, min(pivots, left))
    acting = sorted(own) + sorted(largest({c: inside.norms[c] for c in inside.text}, pivots))
    kept, spare = list(own), [c for c in inside.visual if c not in own]
    for n, pivot in enumerate(acting):
        alike = {c: -float(torch.cosine_similarity(inside.normed[c], inside.normed[pivot], 0)) for c in spare}
        for c in largest(alike, (left - len(own)) // len(acting) + (n < (left - len(own)) % len(acting))):
            kept.append(c)
            spare.remove(c)
    return Chosen(kept, [], {})
