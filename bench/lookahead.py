"""`python -m bench.lookahead`: how often the guess at the picks to come is right.

Runs the plain loop of Algorithm 1 and replays beside it which rows of weights are at hand when a pick needs its own,
under the policies of the CPU kernel (csrc/repulsion_select.cpp) and of the CUDA kernel for many tokens
(csrc/repulsion_select.cuh). Needs no timing, so it says the same on every machine. For each kind of tokens: picks per
pass over the features, rows computed per row used, and what picks would share a barrier.
"""

import math
from dataclasses import dataclass

import torch

from sts_kernels import demo, pairwise_sqdist

from . import inputs


@dataclass
class CPU:
    """Guesses the tokens of lowest potential; gives up the rows furthest from being picked."""

    lookahead: int

    def guess(self, potential, rows):
        return potential.argsort(stable=True)[: self.lookahead + len(rows) + 1].tolist()

    def make_room(self, rows, count, potential):
        rows.sort(key=lambda token: float(potential[token]))
        del rows[max(0, 4 * self.lookahead - count) :]


@dataclass
class CUDA:
    """Guesses among the lowest token of every warp, two for each of 32 lanes; gives up the oldest of 64 rows."""

    lookahead: int

    def guess(self, potential, rows):
        warps = torch.nn.functional.pad(potential, (0, -len(potential) % 1024), value=math.inf).view(-1, 32, 32)
        lowest, at = warps.min(2)  # (warps of a lane, lanes)
        tokens = at + 32 * torch.arange(at.numel()).view(at.shape)
        order = lowest.argsort(0)[:2]
        lowest, tokens = lowest.gather(0, order).flatten(), tokens.gather(0, order).flatten()
        return tokens[lowest.argsort(stable=True)].tolist()

    def make_room(self, rows, count, potential):
        del rows[: max(0, len(rows) + count - 64)]


def replay(x, k, policy):
    """(picks per pass, rows computed per row used, picks per barrier if the blocks of a GPU made several at once)

    They could as long as the lowest token with a row at hand is below a bound on all others: the lowest of them at the
    last sweep, plus the smallest weight in the row of every pick since.
    """
    weights = 1 / (pairwise_sqdist(x[None])[0] + 1e-6)
    weights.fill_diagonal_(math.inf)
    potential = torch.zeros(len(x))
    pick, rows, passes, computed, barriers, bound = int((x - x.mean(0)).square().sum(1).argmin()), [], 0, 0, 0, 0.0
    smallest = {}  # weight in a row, of the tokens not picked when it was computed
    for step in range(k - 1):
        if pick not in rows:
            ahead = [pick]
            if step:  # before, the potentials are all equal
                wanted = min(policy.lookahead, k - 1 - step) - 1
                guess = policy.guess(potential, rows)
                ahead += [i for i in guess if i != pick and i not in rows and potential[i] < math.inf][:wanted]
            policy.make_room(rows, len(ahead), potential)
            rows += ahead
            passes, computed = passes + 1, computed + len(ahead)
            smallest |= {i: float(weights[i][potential < math.inf].min()) for i in ahead}
        rows.remove(pick)
        potential = potential + weights[pick]
        bound += smallest[pick]
        pick = int(potential.argmin())
        if pick not in rows or float(potential[pick]) >= bound:
            barriers += 1
            others = potential.clone()
            others[rows] = math.inf
            bound = float(others.min())
    return (k - 1) / passes, computed / (k - 1), (k - 1) / barriers


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
        ("gaussian, 2880", inputs.features(1, 2880, 256, torch.float32, device)[0], 640),
        ("gaussian, 9216", inputs.features(1, 9216, 256, torch.float32, device)[0], 640),
        ("smooth, 2880", inputs.features(1, 2880, 256, torch.float32, device, "smooth")[0], 640),
        ("smooth, 9216", inputs.features(1, 9216, 256, torch.float32, device, "smooth")[0], 640),
    ]
    print(
        "| tokens | K | policy | lookahead | picks a pass | rows computed / used | picks a barrier |\n"
        + "|---" * 7
        + "|"
    )
    for name, x, k in kinds:
        for policy in (CPU(4), CPU(8), CPU(16), CUDA(4), CUDA(8), CUDA(16)):
            if isinstance(policy, CUDA) and len(x) <= 8192:
                continue  # stored weights there
            picks, used, barrier = replay(x, k, policy)
            shared = f"{barrier:.1f}" if isinstance(policy, CUDA) else ""
            cells = name, k, type(policy).__name__, policy.lookahead, f"{picks:.1f}", f"{used:.2f}", shared
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
