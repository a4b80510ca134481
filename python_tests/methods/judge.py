"""Float64 checks of the methods' picks. They share no code with the package."""

import math

import torch


def sqdist(x):
    return torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def cosine_distance(x):
    x = x.double()
    norm = x.norm(dim=1, keepdim=True)
    unit = x / torch.where(norm > 0, norm, 1.0)
    return 1 - unit @ unit.T


def maxmin_error(distance, picks, slack):
    """The reason why `picks` are no max-min selection under distance (N, N); "" if they are one.

    Invariant: nearest >= best * (1 - slack) - slack**2. nearest: distance of a pick to the picks before it; best: the
    largest such distance of any token left.
    """
    nearest, left = torch.full((len(distance),), math.inf, dtype=torch.float64), torch.ones(len(distance), dtype=bool)
    for step, pick in enumerate(picks):
        if not left[pick]:
            return f"step {step} repeats {pick}"
        if step:
            best = nearest[left].max()
            if nearest[pick] < best * (1 - slack) - slack**2:
                return f"step {step} picked {pick} at {nearest[pick]:.9g} from the picks, the largest is {best:.9g}"
        left[pick] = False
        nearest = torch.minimum(nearest, distance[pick])
    return ""


def best_first(scores, k):
    """Indices of the k largest of a list of numbers; ties to the lowest index, NaN and infinities last."""
    return sorted(range(len(scores)), key=lambda i: (not math.isfinite(scores[i]), -scores[i], i))[:k]
