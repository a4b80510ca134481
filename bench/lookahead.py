"""`python -m bench.lookahead`: how often the guess at the picks to come is right.

Runs the plain loop of Algorithm 1 and replays beside it the guesses of the CPU kernel (csrc/cpu/select.h) and
of the CUDA kernel for many tokens (csrc/cuda/select_swept.cuh), which both run the plain loop among a few candidates: picks
per pass over the features, and rows of weights computed per row used. Of the CUDA kernel for clusters: picks per
exchange between the warps (csrc/cuda/select_cluster.cuh). Needs no timing, so it says the same on every machine.
"""

import argparse
import math
from dataclasses import dataclass

import torch

from sts_kernels import _vision, pairwise_sqdist
from sts_kernels._cli import default_picture, load_picture

from . import inputs


@dataclass
class CPU:
    """Candidates: the tokens of lowest potential, and those whose rows are kept, as they are until they are picked."""

    lookahead: int
    kept = True

    def candidates(self, potential, rows):
        rank = potential.clone()
        rank[rows] = math.inf
        count = max(2 * self.lookahead, len(rank) // 64)
        return rank.argsort(stable=True)[:count].tolist() + rows


@dataclass
class CUDA:
    """Candidates: of what blocks offer, 256 tokens together or their two lowest each, the four lowest of every lane's
    share. A block has a tile of 128 tokens. No rows are kept."""

    lookahead: int
    kept = False

    def candidates(self, potential, rows):
        potential = torch.nn.functional.pad(potential, (0, -len(potential) % 128), value=math.inf)
        blocks = len(potential) // 128
        offered, at = potential.view(-1, 128).topk(min(max(-(-256 // blocks), 2), 16), largest=False)
        token = (at + 128 * torch.arange(blocks)[:, None]).T.flatten()
        shares = torch.nn.functional.pad(offered.T.flatten(), (0, -len(token) % 32), value=math.inf).view(-1, 32)
        best = shares.topk(min(4, len(shares)), 0, largest=False).indices * 32 + torch.arange(32)
        return token[best[best < len(token)]].tolist()


def guess(policy, weights, potential, rank, rows, pick, wanted, left):
    """`pick`, and what the plain loop would pick after it among the candidates, as far as its rows are not at hand."""
    candidates = [i for i in policy.candidates(rank, rows) if i != pick and potential[i] < math.inf]
    candidates.append(pick)
    value, weight = potential[candidates].clone(), weights[candidates][:, candidates]
    guesses, at = [pick], len(candidates) - 1
    for _ in range(left - 1):
        value = value + weight[at]
        value[at] = math.inf
        at = int(value.argmin())
        if len(guesses) == wanted or value[at] == math.inf:
            break
        if candidates[at] not in rows:
            guesses.append(candidates[at])
    return guesses


def replay(x, k, policy):
    """(picks per pass, rows computed per row used)"""
    weights = 1 / (pairwise_sqdist(x[None])[0] + 1e-6)
    potential = torch.zeros(len(x))
    from_mean = (x - x.mean(0)).square().sum(1)
    pick, rows, passes, computed = int(from_mean.argmin()), [], 0, 0
    for step in range(k - 1):
        if pick not in rows:
            rank = potential if step else -from_mean  # potentials are all equal before the first weights
            left = k - 1 - step
            rows = rows if policy.kept else []
            guesses = guess(policy, weights, potential, rank, rows, pick, min(policy.lookahead, left), left)
            rows = rows + guesses
            passes, computed = passes + 1, computed + len(guesses)
        rows.remove(pick)
        potential = potential + weights[pick]
        potential[pick] = math.inf
        pick = int(potential.argmin())
        if not policy.kept and rows and pick != rows[0]:
            rows = []
    return (k - 1) / passes, computed / (k - 1)


def replay_cluster(x, k, warps=32, of_warp=4, most=8):
    """(picks per exchange between the warps, candidates that come per exchange)"""
    weights = 1 / (pairwise_sqdist(x[None])[0] + 1e-6)
    least = weights.fill_diagonal_(math.inf).min(1).values.tolist()
    potential = weights[(x - x.mean(0)).square().sum(1).argmin()].clone()  # of the first pick: its own is infinite
    warp_of = torch.arange(len(x)) // 32 % warps
    ready, coming = {}, {}  # candidates and their warps
    made, exchanges, came = 1, 1, 0
    while made < k:
        ready.update(coming)
        coming, offers = {}, []
        for warp in range(warps):
            mine = [token for token in ready if ready[token] == warp]
            others = potential.where(warp_of == warp, math.inf).index_fill(
                0, torch.tensor(mine, dtype=torch.long), math.inf
            )
            low, token = float(others.min()), int(others.argmin())
            offers.append((low, token))
            highest = max(mine, key=lambda i: potential[i], default=None)
            if len(mine) == of_warp and low < potential[highest]:
                del ready[highest]
            if low < math.inf and (len(mine) < of_warp or highest not in ready):
                coming[token] = warp
        bound, outsider = min(offers)
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


def pixels(size):
    """(3, size, size) of the demo's picture, from 0 to 1."""
    picture = load_picture(default_picture()).convert("RGB").resize((size, size))
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1) / 255


def photograph(size):
    """Patches of 14 x 14 pixels."""
    side = size // 14
    return pixels(size).view(3, side, 14, side, 14).permute(1, 3, 2, 4, 0).reshape(side * side, -1)


def random_vit(size):
    """What a CLIP vision model of the size of L/14 makes of the patches, with random weights."""
    import transformers
    from transformers import image_utils

    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=size,
        patch_size=14,
    )
    model = transformers.CLIPVisionModel(config).eval()
    mean, std = (torch.tensor(of)[:, None, None] for of in (image_utils.OPENAI_CLIP_MEAN, image_utils.OPENAI_CLIP_STD))
    with torch.inference_mode():
        return model(((pixels(size) - mean) / std)[None], output_hidden_states=True).hidden_states[-2][0, 1:].clone()


def policies(kinds):
    """A table of `replay`: kinds are (name, tokens (N, C), K)."""
    yield "| tokens | K | policy | lookahead | picks a pass | rows computed / used |\n" + "|---" * 6 + "|"
    for name, x, k in kinds:
        for policy in (CPU(8), CPU(16), CUDA(8), CUDA(16)):
            if isinstance(policy, CUDA) and len(x) <= 8192:
                continue  # stored weights there
            picks, used = replay(x, k, policy)
            cells = name, k, type(policy).__name__, policy.lookahead, f"{picks:.1f}", f"{used:.2f}"
            yield "| " + " | ".join(map(str, cells)) + " |"


def clusters(kinds):
    """A table of `replay_cluster`, for the kinds that a cluster runs."""
    yield "| tokens | K | picks an exchange | candidates that come |\n" + "|---" * 4 + "|"
    for name, x, k in kinds:
        if 1024 < len(x) <= 8192:
            picks, came = replay_cluster(x, k)
            yield f"| {name} | {k} | {picks:.1f} | {came:.0f} |"


def main():
    parser = argparse.ArgumentParser(
        prog="python -m bench.lookahead", description=__doc__.split("\n")[0].split(": ")[1]
    )
    parser.add_argument(
        "--vit", action="store_true", help="tokens of a ViT with random weights, too; needs transformers"
    )
    parser.add_argument(
        "--features", help="tokens of this vision model, too: a local directory or hub id, as in the demo"
    )
    options = parser.parse_args()
    device = torch.device("cpu")
    kinds = [
        ("photograph, 576", photograph(336), 192),
        ("photograph, 2304", photograph(672), 480),
        ("photograph, 9216", photograph(1344), 640),
        ("gaussian, 576", inputs.features(1, 576, 256, torch.float32, device)[0], 192),
        ("gaussian, 2880", inputs.features(1, 2880, 256, torch.float32, device)[0], 640),
        ("gaussian, 9216", inputs.features(1, 9216, 256, torch.float32, device)[0], 640),
        ("smooth, 576", inputs.features(1, 576, 256, torch.float32, device, "smooth")[0], 192),
        ("smooth, 2880", inputs.features(1, 2880, 256, torch.float32, device, "smooth")[0], 640),
        ("smooth, 9216", inputs.features(1, 9216, 256, torch.float32, device, "smooth")[0], 640),
    ]
    if options.vit:
        kinds += [("random ViT, 576", random_vit(336), 192), ("random ViT, 2304", random_vit(672), 480)]
    if options.features:
        x = _vision.tokens(_vision.source(options.features, device), load_picture(default_picture())).features
        kinds.append((f"{options.features}, {len(x)}", x, len(x) // 3))
    print("\n".join(policies(kinds)))
    kinds.append(("gaussian, 8192", inputs.features(1, 8192, 256, torch.float32, device)[0], 640))
    print("\n" + "\n".join(clusters(kinds)))


if __name__ == "__main__":
    main()
