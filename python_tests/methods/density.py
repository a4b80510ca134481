"""Density peaks clustering in float64, one token at a time. It shares no code with the package."""

import itertools
import math

import torch


def clusters_of(x, clusters, neighbors):
    """-> centers, best first; the cluster of each token of x (N, C); the smallest relative margin of any decision.

    Scores are logarithms: densities of widely spread features would underflow.
    """
    distance = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    near = distance.square().sort(dim=1).values[:, :neighbors].mean(1).tolist()
    score, margins = [], [math.inf]
    for i, own in enumerate(near):
        denser = [float(distance[i, j]) for j, other in enumerate(near) if other < own]
        margins += [abs(other - own) / own for other in near if other != own]
        smallest = min(denser) if denser else math.inf
        score.append(-own + (math.log(smallest) if smallest else -math.inf))
    ranked = sorted(range(len(x)), key=lambda i: (-score[i], i))
    centers = ranked[:clusters]
    margins += [abs(score[a] - score[b]) for a, b in itertools.pairwise(ranked[1 : clusters + 1])]
    belongs = []
    for i in range(len(x)):
        if i in centers:
            belongs.append(centers.index(i))
            continue
        to = sorted((float(distance[i, c]), n) for n, c in enumerate(centers))
        belongs.append(to[0][1])
        margins += [(b - a) / b for (a, _), (b, _) in itertools.pairwise(to[:2]) if b > a]
    return centers, belongs, min(margins)
