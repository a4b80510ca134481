"""`python -m bench.features`: analyses on a trained encoder's features, written to docs/analyses.md with figures.

Topics: agreement of attention and features by layer, tokens kept by each method, picks that change in 16 bits, and the
selection's look-ahead. Requires the packages of bench/trained.py.
"""

import argparse
import itertools
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch

from sts_kernels import analysis, demo, methods
from sts_kernels._errors import UserError

from . import lookahead, trained

DOCS = Path(__file__).parents[1] / "docs"
LAYER = 10  # of layers 0 .. 11: the penultimate, as in LLaVA
NEIGHBOURS = (5, 10, 20)
BUDGETS = (16, 32, 64, 128)
ROUNDED = {"bfloat16": torch.bfloat16, "float16": torch.float16}
PICTURE, PICTURE_BUDGET = "coffee", 40
SWEPT, GRID = "coffee", 2  # photograph of the look-ahead section; crops per side
COLOURS = ("#0072b2", "#d55e00", "#009e73")
# Style of a method's curves, by (uses features or keys, uses attention).
KINDS = {
    (True, False): ("blue and green", "features", ("#08519c", "#4a9fd8", "#1b8a5a", "#86c66c", "#17becf")),
    (False, True): ("red", "attention", ("#a50f15", "#ef5b4c", "#f4a29a")),
    (True, True): (
        *("purple and orange", "both"),
        ("#6a3d9a", "#e08214", "#c51b7d", "#8c510a", "#b589d6", "#fdb863", "#e377c2"),
    ),
    (False, False): ("grey", "neither", ("#555555", "#aaaaaa")),
}
MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Kept:
    """Measures of one method's selection at one K; (B,) each, one value per photograph."""

    order: torch.Tensor  # (B, K)
    erank: torch.Tensor
    mean: torch.Tensor
    largest: torch.Tensor
    attention: torch.Tensor


@dataclass(frozen=True)
class Study:
    names: list[str]  # photographs
    activations: trained.Activations
    chosen: dict[str, methods.Method]
    left_out: dict[str, str]  # method -> reason
    kept: dict[str, dict[int, Kept]]

    @property
    def features(self):
        return self.activations.hidden[LAYER]

    @property
    def scores(self):
        return self.activations.cls[LAYER]


def choose(complexity: float) -> tuple[dict[str, methods.Method], dict[str, str]]:
    """The methods that select before the LLM, and the reason for each one left out."""
    chosen, left_out = {}, {}
    for name in methods.names():
        options = {"erank_avg": complexity} if "erank_avg" in methods.describe(name)["options"] else {}
        method = methods.create(name, **options)
        if method.site is None:
            left_out[name] = "prunes inside the LLM"
        elif "text" in method.signals:
            left_out[name] = "needs a prompt"
        else:
            chosen[name] = method
    return chosen, left_out


def select(method, activations, k: int, dtype=torch.float32) -> torch.Tensor:
    """(B, K): picks at layer LAYER, with features and keys rounded to `dtype`."""
    x, keys = (value[LAYER].to(dtype) for value in (activations.hidden, activations.keys))
    return method.select(k=k, features=x, scores=activations.cls[LAYER], keys=keys).order


def describe(x, scores, order) -> Kept:
    """Measures of the kept tokens' own rows, without merging."""
    rows = methods.merge(x, methods.Selection(order))
    cover = analysis.coverage(x, order)
    seen = torch.where(order >= 0, scores.gather(1, order.clamp(min=0)), 0).sum(1) / scores.sum(1)
    return Kept(order, analysis.erank(rows), cover.mean, cover.largest, seen)


def study(photographs, activations) -> Study:
    x, scores = activations.hidden[LAYER], activations.cls[LAYER]
    chosen, left_out = choose(analysis.erank(x).mean().item())
    kept = {}
    for name, method in list(chosen.items()):
        try:
            kept[name] = {k: describe(x, scores, select(method, activations, k)) for k in BUDGETS}
        except (TypeError, ValueError) as error:
            left_out[name] = str(error)
            del chosen[name]
    return Study(list(photographs), activations, chosen, left_out, kept)


def table(head, rows) -> str:
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def prose(text: str) -> str:
    """Re-wraps text as one paragraph."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def mean(values) -> float:
    return values.mean().item()


# ---- sections ----------------------------------------------------------------------------------------------------


def consistencies(activations, scores) -> dict[int, torch.Tensor]:
    """Consistency of features and attention by k: (layers, B)."""
    return {
        k: torch.stack([analysis.knn_consistency(x, s, k) for x, s in zip(activations.hidden, scores, strict=True)])
        for k in NEIGHBOURS
    }


def section_layers(found: Study) -> list[str]:
    a = found.activations
    by_cls, by_received = consistencies(a, a.cls), consistencies(a, a.received)
    rows = []
    for layer in range(a.layers):
        x, s = a.hidden[layer], a.cls[layer]
        rows.append(
            [
                layer,
                *(f"{mean(value[layer]):.2f}" for value in by_cls.values()),
                *(f"{mean(value[layer]):.2f}" for value in by_received.values()),
                f"{mean(analysis.erank(x)):.1f}",
                f"{mean(analysis.attention_entropy(s)):.2f}",
                f"{mean(analysis.share_of_top(s)):.0%}",
            ]
        )
    curve = by_cls[10].mean(1)
    low, high = int(curve[1:].argmin()) + 1, int(curve[1:].argmax()) + 1
    first, lowest, highest = (f"{curve[layer]:.2f}" for layer in (0, low, high))
    head = ["layer", *(f"[CLS], k = {k}" for k in NEIGHBOURS), *(f"received, k = {k}" for k in NEIGHBOURS)]
    return [
        "## Attention over the layers",
        "![KNN consistency and the share of the most attended tokens, by layer](analyses-layers.png)",
        prose(
            f"""KNN consistency (`analysis.knn_consistency`, STS Fig. 2) says how alike the attention of similar tokens
            is: 0 where a token's k nearest by cosine differ in attention as much as all tokens do, 1 where they are
            equal. By [CLS] attention at k = 10 it is {first} in layer 0, after that lowest in layer {low}
            ({lowest}) and highest in layer {high} ({highest}). Means over the photographs; the bands span all of
            them. "received" is the mean attention that patches pay."""
        ),
        table([*head, "erank", "entropy, nats", "attention of the top 20 %"], rows),
    ]


def section_kept(found: Study) -> list[str]:
    fields = {
        "erank": ("Effective rank of the kept tokens", ".1f", max),
        "mean": ("Mean distance of a token to its nearest kept one", ".2f", min),
        "largest": ("Largest distance of a token to its nearest kept one", ".2f", min),
        "attention": ("Share of the [CLS] attention on kept tokens", ".0%", max),
    }
    parts = []
    for field, (title, form, best) in fields.items():
        values = {name: [mean(getattr(kept[k], field)) for k in BUDGETS] for name, kept in found.kept.items()}
        winners = [f"{best(column):{form}}" for column in zip(*values.values(), strict=True)]
        rows = []
        for name, row in values.items():
            shown = [f"{value:{form}}" for value in row]
            marked = (f"**{cell}**" if cell == w else cell for cell, w in zip(shown, winners, strict=True))
            rows.append([f"`{name}`", *marked])
        parts.append(f"{title}, {'largest' if best is max else 'smallest'} in bold:\n\n")
        parts[-1] += table(["method", *(f"K = {k}" for k in BUDGETS)], rows)
    x, reasons = found.features, {}
    for name, why in found.left_out.items():
        reasons.setdefault(why, []).append(f"`{name}`")
    left_out = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    prompted = ", ".join(f"`{name}`" for name, method in found.chosen.items() if "relevance" in method.signals)
    stand_in = f"There is no prompt: the [CLS] attention stands for the relevance of {prompted}." if prompted else ""
    colours = ", ".join(f"{colour}: {what}" for colour, what, _ in KINDS.values())
    tokens, rank, norm = x.shape[1], f"{mean(analysis.erank(x)):.1f}", f"{mean(x.norm(dim=2)):.1f}"
    return [
        "## What each method keeps",
        "![Effective rank and coverage of what each method keeps, by K](analyses-kept.png)",
        prose(
            f"""Of {tokens} tokens of layer {LAYER}; scores are the [CLS] attention of that layer. Means over the
            photographs. All tokens together have an effective rank of {rank}; the norm of a token is {norm} on
            average. Only the rows of kept tokens count, as they are: what a method merges into them does not.
            `uniform` takes every {tokens} / K-th token, one column of the picture at K = {trained.SIDE}. {stand_in}
            Left out: {left_out}. In the picture the colour says what a method looks at ({colours})."""
        ),
        *parts,
    ]


def section_shares(found: Study) -> list[str]:
    rows = []
    for name, s in (("[CLS]", found.scores), ("received", found.activations.received[LAYER])):
        quarters = analysis.quartile_shares(s).mean(0)
        rows.append([name, f"{mean(analysis.share_of_top(s)):.0%}", *(f"{q:.0%}" for q in quarters.tolist())])
    middle = f"{analysis.quartile_shares(found.scores).mean(0)[1:3].sum():.0%}"
    return [
        "## Where attention lies",
        prose(
            f"""Attention in layer {LAYER}: what the top 20 % of the tokens take, and how the most attended quarter of
            them spreads over the rows of the picture. The two middle quarters of the rows hold {middle} of the
            tokens that [CLS] attends to most."""
        ),
        table(["attention", "top 20 %", "top rows", "second quarter", "third quarter", "bottom rows"], rows),
    ]


def changes(found: Study, k: int) -> dict[str, dict[str, torch.Tensor]]:
    """By method and dtype: (B,) number of picks that float32 does not pick."""
    changed = {}
    for name, method in found.chosen.items():
        plain = found.kept[name][k].order
        changed[name] = {}
        for dtype_name, dtype in ROUNDED.items():
            rounded = select(method, found.activations, k, dtype)
            common = (rounded[:, :, None] == plain[:, None]).any(2)
            changed[name][dtype_name] = (~common).sum(1).float()
    return changed


def section_rounding(found: Study) -> list[str]:
    rows, shown = {name: [f"`{name}`"] for name in found.chosen}, (64, 128)
    for k in shown:
        for name, by_dtype in changes(found, k).items():
            rows[name] += [f"{mean(value):.1f} ({int(value.max())})" for value in by_dtype.values()]
    return [
        "## Features in 16 bits",
        prose(
            """Picks that change when features and keys are rounded: mean over the photographs, in brackets the most in
            one of them. Scores stay in float32. All arithmetic inside is float32 too, so only the rounding of the
            input shows."""
        ),
        table(["method", *(f"{dtype}, K = {k}" for k in shown for dtype in ROUNDED)], list(rows.values())),
    ]


def section_lookahead(encoder, photographs) -> list[str]:
    x = encoder(trained.crops(photographs[SWEPT], GRID)).hidden[LAYER].flatten(0, 1)
    return [
        "## Look-ahead",
        prose(
            f"""Picks that `repulsion_select` makes an exchange between the warps of a cluster (`bench.lookahead`) on
            tokens of layer {LAYER}: of the photograph `{SWEPT}` and its {GRID} x {GRID} crops, all in one pool."""
        ),
        "\n".join(lookahead.table([(f"{SWEPT}, {len(x)}", x, len(x) // 4)])),
    ]


def section_photographs(found: Study) -> list[str]:
    rows = zip(
        found.names,
        (f"{v:.1f}" for v in analysis.erank(found.features).tolist()),
        (f"{v:.1f}" for v in analysis.participation_ratio(found.features).tolist()),
        (f"{v:.2f}" for v in analysis.attention_entropy(found.scores).tolist()),
        (f"{v:.0%}" for v in analysis.share_of_top(found.scores).tolist()),
        (f"{v:.2f}" for v in analysis.knn_consistency(found.features, found.scores, 10).tolist()),
        strict=True,
    )
    pair = torch.stack([analysis.erank(found.features), analysis.attention_entropy(found.scores)])
    correlation = f"{pair.corrcoef()[0, 1]:.2f}"
    head = ["photograph", "erank", "participation ratio", "entropy, nats", "top 20 %", "consistency, k = 10"]
    return [
        "## The photographs",
        prose(
            f"""Layer {LAYER}. Over the photographs erank and attention entropy have a correlation of {correlation}."""
        ),
        table(head, rows),
    ]


# ---- pictures ----------------------------------------------------------------------------------------------------


def figure(width, height, panels):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(width, height), layout="constrained")


def finish(canvas, path: Path) -> None:
    from PIL import Image

    canvas.savefig(path, dpi=110, metadata={"Software": None})
    with Image.open(path) as image:  # palette image: a third of the size
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def draw_layers(found: Study, path: Path) -> None:
    canvas, (left, right) = figure(10, 3.6, 2)
    a = found.activations
    for k, colour in zip(NEIGHBOURS, COLOURS, strict=False):
        curve = consistencies(a, a.cls)[k]
        left.plot(curve.mean(1), "o-", color=colour, label=f"k = {k}", markersize=4)
        if k == 10:
            left.fill_between(range(a.layers), curve.amin(1), curve.amax(1), color=colour, alpha=0.15, linewidth=0)
    left.set(xlabel="layer", ylabel="KNN consistency", title="[CLS] attention against features", ylim=(0, 1))
    for name, scores, colour in (("[CLS]", a.cls, COLOURS[0]), ("received", a.received, COLOURS[1])):
        shares = torch.stack([analysis.share_of_top(s) for s in scores])
        right.plot(shares.mean(1), "o-", color=colour, label=name, markersize=4)
        right.fill_between(range(a.layers), shares.amin(1), shares.amax(1), color=colour, alpha=0.15, linewidth=0)
    right.axhline(0.2, color="grey", linestyle=":", linewidth=1)
    right.set(xlabel="layer", ylabel="share of attention", title="top 20 % of the tokens", ylim=(0, 1))
    for axes in (left, right):
        axes.set_xticks(range(a.layers))
        axes.grid(True, alpha=0.2)
        axes.legend(frameon=False, loc="lower right")
    finish(canvas, path)


def looks(method) -> tuple[bool, bool]:
    """(uses features or keys, uses attention)."""
    return bool(method.signals & {"features", "keys"}), bool(method.signals & {"attention", "relevance"})


def draw_kept(found: Study, path: Path) -> None:
    canvas, panels = figure(12, 4.8, 3)
    base = found.kept["random"]
    titles = {
        "erank": "effective rank of the kept tokens over random's",
        "mean": "mean distance to the nearest kept token",
        "largest": "largest distance to the nearest kept token",
    }
    for kind, (_, _, colours) in KINDS.items():
        names = [name for name, method in found.chosen.items() if looks(method) == kind]
        for index, name in enumerate(names):
            style = {"color": colours[index % len(colours)], "marker": MARKERS[index % len(MARKERS)]}
            for axes, field in zip(panels, titles, strict=True):
                values = [mean(getattr(found.kept[name][k], field)) for k in BUDGETS]
                if field == "erank":
                    values = [value / mean(base[k].erank) for value, k in zip(values, BUDGETS, strict=True)]
                axes.plot(BUDGETS, values, label=name, linewidth=1.3, markersize=4.5, **style)
    for axes, title in zip(panels, titles.values(), strict=True):
        axes.set_xscale("log", base=2)
        axes.set_xticks(BUDGETS, map(str, BUDGETS))
        axes.set(xlabel=f"tokens kept of {found.features.shape[1]}, K")
        axes.set_title(title, fontsize=10)
        axes.grid(True, alpha=0.2)
    handles, labels = panels[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7), frameon=False)
    finish(canvas, path)


def draw_picture(found: Study, photographs, path: Path) -> None:
    """One photograph, and the tokens that each method keeps."""
    x, index = found.features, found.names.index(PICTURE)
    tokens = demo.Tokens(x[index], trained.square(photographs[PICTURE]), trained.SIDE, "")
    choices = {"all": torch.arange(x.shape[1])}
    for name, method in found.chosen.items():
        order = select(method, found.activations, PICTURE_BUDGET)[index]
        choices[name] = order[order >= 0]
    columns = min((6, 5, 4), key=lambda columns: -len(choices) % columns)  # the fewest empty panels
    demo.draw(tokens, choices, columns, trained.SIZE).save(path, quality=88, optimize=True)


# ---- all of it ---------------------------------------------------------------------------------------------------


def page(found: Study, sections) -> str:
    layers, (photographs, tokens, channels) = found.activations.layers, found.features.shape
    blocks = [
        "# Analyses on trained features",
        prose(
            f"""Written by `python -m bench.features`. Features and attention are those of a trained DINOv2-S ({layers}
            layers, {channels} channels, {trained.SIZE} pixels, {tokens} patches) from the wheel
            `{trained.WEIGHTS}`, for {photographs} photographs that scikit-image and scikit-learn ship. No VLM runs
            here: nothing below says how well a pruned model answers. The functions are those of
            `sts_kernels.analysis`. The methods have their defaults, except that `erank_avg`, where a method has it,
            is the mean of these photographs."""
        ),
        *itertools.chain.from_iterable(sections),
        "## One photograph",
        "![What each method keeps of one photograph](analyses-methods.jpg)",
        prose(
            f"""`{PICTURE}` of scikit-image (CC0, by Rachel Michetti): {PICTURE_BUDGET} of {tokens} tokens kept by each
            method."""
        ),
    ]
    return "\n\n".join(blocks) + "\n"


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.features", description=__doc__.split(": ", 1)[1].split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=DOCS, metavar="FOLDER", help="where to write (default: docs)")
    options = parser.parse_args(argv)
    try:
        encoder, photographs = trained.Encoder(), trained.photographs()
        squares = torch.stack([trained.pixels(trained.square(picture)) for picture in photographs.values()])
        found = study(photographs, encoder(squares))
        options.out.mkdir(parents=True, exist_ok=True)
        draw_layers(found, options.out / "analyses-layers.png")
        draw_kept(found, options.out / "analyses-kept.png")
        draw_picture(found, photographs, options.out / "analyses-methods.jpg")
        sections = [
            section_layers(found),
            section_kept(found),
            section_shares(found),
            section_rounding(found),
            section_photographs(found),
            section_lookahead(encoder, photographs),
        ]
        (options.out / "analyses.md").write_text(page(found, sections))
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"wrote {options.out / 'analyses.md'}: {len(found.names)} photographs, {len(found.chosen)} methods")
    return 0


if __name__ == "__main__":
    sys.exit(main())
