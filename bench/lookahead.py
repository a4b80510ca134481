"""`python -m bench.lookahead`: how often the guess at the picks to come is right.

Runs the plain loop of Algorithm 1 and replays beside it which rows of weights are at hand when a pick needs its own, under the
policies of the CPU kernel (csrc/repulsion_select.cpp) and of the CUDA kernel for many tokens (csrc/repulsion_select.cuh).
Needs no timing, so it says the same on every machine. For each kind of tokens: picks per pass over the features, and rows
computed per row used.
"""

import math

import torch

from sts_kernels import demo, pairwise_sqdist

from . import inputs

CPU_ROWS_PER_POINT = 4  # the CPU kernel keeps 4 * lookahead rows
GPU_ROWS = 32
GPU_BLOCK_TOKENS = 256


def cpu_guess(potential, pick, cached, count):
    """The tokens of lowest potential."""
    order = potential.argsort(stable=True).tolist()
    return [i for i in order[: count + len(cached) + 1] if i != pick and i not in cached][:count]


def gpu_guess(potential, pick, cached, count):
    """The lowest token of each block, lowest first: what the blocks tell each other anyway."""
    blocks = torch.nn.functional.pad(potential, (0, -len(potential) % GPU_BLOCK_TOKENS), value=math.inf)
    lowest, at = blocks.view(-1, GPU_BLOCK_TOKENS).min(1)
    tokens = (at + torch.arange(len(at)) * GPU_BLOCK_TOKENS)[lowest.argsort(stable=True)].tolist()
    return [i for i in tokens if i != pick and i not in cached][:count]


def replay(x, k, lookahead, guess):
    """(picks per pass, rows computed per row used)"""
    weights = 1 / (pairwise_sqdist(x[None])[0] + 1e-6)
    potential = torch.zeros(len(x))
    pick, cached, passes, computed = int((x - x.mean(0)).square().sum(1).argmin()), [], 0, 0
    for step in range(k - 1):
        if pick not in cached:
            ahead = [pick]
            if step:
                ahead += guess(potential, pick, cached, min(lookahead, k - 1 - step) - 1)
            ahead = [i for i in ahead if potential[i] < math.inf]
            passes, computed = passes + 1, computed + len(ahead)
            cached += ahead
            if guess is cpu_guess:  # drops the rows furthest from being picked
                cached.sort(key=lambda i: (i not in ahead, float(potential[i])))
                cached = cached[: CPU_ROWS_PER_POINT * lookahead]
            else:  # overwrites the oldest, used or not
                cached = cached[-GPU_ROWS:]
        potential = potential + weights[pick]
        potential[pick] = math.inf
        if guess is cpu_guess:
            cached.remove(pick)
        pick = int(potential.argmin())
    return (k - 1) / passes, computed / (k - 1)


def photograph(size):
    """Patches of 14 x 14 pixels of the demo's picture, whose shorter side is `size` pixels."""
    picture = demo.load_picture(demo.default_picture()).convert("RGB").resize((size, size))
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 3) / 255
    side = size // 14
    return values.view(side, 14, side, 14, 3).permute(0, 2, 1, 3, 4).reshape(side * side, -1)


def main():
    device = torch.device("cpu")
    kinds = [
        ("photograph, 576", photograph(336), 192),
        ("photograph, 2304", photograph(672), 480),
        ("photograph, 9216", photograph(1344), 640),
        ("gaussian, 576", inputs.features(1, 576, 256, torch.float32, device)[0], 192),
        ("gaussian, 2880", inputs.features(1, 2880, 256, torch.float32, device)[0], 640),
        ("smooth, 2880", inputs.features(1, 2880, 256, torch.float32, device, "smooth")[0], 640),
        ("smooth, 9216", inputs.features(1, 9216, 256, torch.float32, device, "smooth")[0], 640),
    ]
    print(
        f"{'tokens':18s} {'K':>4s} {'policy':6s} {'lookahead':>9s} {'picks a pass':>12s} {'rows computed / used':>20s}"
    )
    for name, x, k in kinds:
        for policy, guess in (("CPU", cpu_guess), ("CUDA", gpu_guess)):
            for lookahead in (4, 8, 16):
                picks, rows = replay(x, k, lookahead, guess)
                print(f"{name:18s} {k:4d} {policy:6s} {lookahead:9d} {picks:12.1f} {rows:20.2f}")


if __name__ == "__main__":
    main()
