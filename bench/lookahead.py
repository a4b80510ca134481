"""`python -m bench.lookahead`: picks per exchange of CUDA kernels, in clusters and by drafts.

Simulates the candidate table and the bound of select_cluster.cuh, and the drafts of select_drafted.cuh, in Python.
Involves no timing: results are the same on every machine. python_tests/test_lookahead.py compares the emulated kernels
with this simulation.
"""

import argparse
import math

import torch

from sts_kernels import pairwise_sqdist
from sts_kernels._cli import default_picture, load_picture

from . import inputs


def replay(x, k, warps=32, of_warp=7, most=12, groups=4, of_group=3):
    """(picks per exchange, inserted candidates per exchange) for x (N, C).

    warps: warps of the cluster. of_warp: max candidates per warp. most: max picks per exchange. of_group: max
    candidates per exchange that the warps w, w + groups, w + 2 groups, ... insert together.
    """
    weights = 1 / (pairwise_sqdist(x[None])[0] + 1e-6)
    least = weights.fill_diagonal_(math.inf).min(1).values.tolist()
    potential = weights[(x - x.mean(0)).square().sum(1).argmin()].clone()  # the first pick's row; inf at the pick
    warp_of = torch.arange(len(x)) // 32 % warps
    ready, coming = {}, {}  # candidate -> warp
    made, exchanges, came = 1, 1, 0
    while made < k:
        ready_before = dict(ready)  # a candidate that has just come is not evicted
        ready.update(coming)
        in_table = torch.tensor(list(ready), dtype=torch.long)
        outside = potential.index_fill(0, in_table, math.inf)
        offers = []
        for warp in range(warps):
            others = outside.where(warp_of == warp, math.inf)
            offers.append((float(others.min()), warp, int(others.argmin())))
        coming = {}
        for group in range(groups):
            for low, warp, token in sorted(offers[group::groups])[:of_group]:
                mine = [i for i in ready if ready[i] == warp]
                highest = max((i for i in mine if i in ready_before), key=lambda i: potential[i], default=None)
                if low == math.inf or (len(mine) == of_warp and not low < potential[highest]):
                    continue
                if len(mine) == of_warp:
                    del ready[highest]
                coming[token] = warp
        bound, _, outsider = min(offers, key=lambda offer: (offer[0], offer[2]))
        picks = 0
        while picks < min(most, k - made):
            best = min(((float(potential[i]), i) for i in ready), default=(math.inf, -1))
            if picks and not best[0] < bound:
                break
            alone = not picks and not best < (bound, outsider)
            pick = outsider if alone else best[1]
            potential, bound, picks = potential + weights[pick], bound + least[pick], picks + 1
            ready.pop(pick, None)
            coming.pop(pick, None)
            if alone:
                break
        made, exchanges, came = made + picks, exchanges + 1, came + len(coming)
    return made / exchanges, came / exchanges


def drafts(x, k, most=12, warps=4, of_warp=16, steps=4.0, below=0.5):
    """Picks per batch of drafts for x (N, C).

    most: max drafts. warps: warps that pick, of_warp candidates each. steps: the scale of the codes. below: where they
    begin below the lowest weight, in units of the typical weight less the lowest.
    """
    weights = (1 / (pairwise_sqdist(x[None])[0] + 1e-6)).fill_diagonal_(math.inf)
    tokens = len(x)
    thread = torch.arange(384)
    columns = (thread * 11 % (tokens // 4) * 4)[:, None] + torch.arange(4)
    sample = weights[(thread * 37 % tokens)[:, None], columns].sort().values
    lowest, typical = float(sample.min()), float(1 / (1 / sample[:, 1]).mean())
    factor = steps / (typical - lowest) if typical > lowest else 0.0
    scaled = ((weights - lowest) * factor + 1 + steps * below).nan_to_num().clamp(1, 252)
    exponent = scaled.log2().floor()
    codes = (scaled / 2**exponent * 32).round() * 2**exponent * 4
    warp_of = torch.arange(tokens) // 32 % warps

    potential = torch.zeros(tokens)
    pick = int((x - x.mean(0)).square().sum(1).argmin())
    made, batches, drafted = 0, 0, 1
    while made < k:
        key = ((potential - potential.min()) * (factor * 32 * 4)).clamp(max=2**21).nan_to_num().round()
        key[potential == math.inf] = math.inf
        inside = torch.zeros(tokens, dtype=torch.bool)
        for warp in range(warps):
            inside[key.where(warp_of == warp, math.inf).argsort(stable=True)[:of_warp]] = True
        key[~inside] = math.inf
        drafted = min(drafted, k - made)
        accepted = 0
        for _ in range(drafted):
            if accepted and int(potential.argmin()) != pick:
                break
            potential, key, accepted = potential + weights[pick], key + codes[pick], accepted + 1
            key[pick] = math.inf
            pick = int(key.argmin())
        pick = int(potential.argmin())
        made, batches = made + accepted, batches + 1
        drafted = 2 if accepted == 1 and drafted > 1 else min(accepted + 4, most)
    return made / batches


def photograph(size):
    """Patches of 14 x 14 pixels of the demo's picture, from 0 to 1."""
    picture = load_picture(default_picture()).convert("RGB").resize((size, size))
    side = size // 14
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) / 255
    return pixels.view(side, 14, side, 14, 3).permute(0, 2, 1, 3, 4).reshape(side * side, -1)


def table(kinds):
    """Markdown lines. kinds: (name, tokens (N, C), K) triples."""
    yield "| tokens | K | picks an exchange | candidates that come |\n" + "|---" * 4 + "|"
    for name, x, k in kinds:
        picks, came = replay(x, k)
        yield f"| {name} | {k} | {picks:.1f} | {came:.0f} |"


def drafts_table(kinds):
    """The same for drafts."""
    yield "| tokens | K | picks a batch of drafts |\n" + "|---" * 3 + "|"
    for name, x, k in kinds:
        yield f"| {name} | {k} | {drafts(x, k):.1f} |"


def main(argv=None):
    argparse.ArgumentParser(
        prog="python -m bench.lookahead", description=__doc__.split("\n")[0].split(": ")[1]
    ).parse_args(argv)

    def features(tokens, data="gaussian"):
        return inputs.features(1, tokens, 256, torch.float32, torch.device("cpu"), data)[0]

    kinds = [
        ("photograph, 2304", photograph(672), 480),
        ("gaussian, 2880", features(2880), 640),
        ("smooth, 2880", features(2880, "smooth"), 640),
        ("gaussian, 8192", features(8192), 640),
    ]
    print("\n".join(table(kinds)), end="\n\n")
    kinds = [
        ("photograph, 576", photograph(336), 192),
        ("gaussian, 576", features(576), 192),
        ("smooth, 576", features(576, "smooth"), 192),
    ]
    print("\n".join(drafts_table(kinds)))


if __name__ == "__main__":
    main()
