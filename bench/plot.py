"""Plots the rows of a CSV: time against K, N and B, and a bar chart of the main shapes."""

from pathlib import Path

from . import record

OP = "repulsion_select"
# Varied field -> fixed fields: the B=1, float32 cases of the sweeps.
GROWTH = {
    "K": ("tokens kept, K", {"B": "1", "N": "2880", "C": "1024"}),
    "N": ("tokens, N", {"B": "1", "C": "1024", "K": "192"}),
    "B": ("items, B", {"N": "576", "C": "1024", "K": "192"}),
}


def newest(rows, **wanted):
    """The last row of each (provider, shape) among those with the wanted columns."""
    found = {}
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            found[(row["provider"], *(row[name] for name in record.SHAPE))] = row
    return list(found.values())


def us(row):
    return float(row["p50_us"])


def providers(rows):
    """Provider -> colour, the same in every panel. The package's own come first, the others follow by name."""
    names = sorted({row["provider"] for row in rows}, key=lambda name: (name not in ("native", "triton"), name))
    return {name: f"C{index % 10}" for index, name in enumerate(names)}


def growth(axes, rows, colours, field, label, fixed):
    family = newest(rows, **fixed)
    for name, colour in colours.items():
        points = sorted((int(row[field]), us(row)) for row in family if row["provider"] == name)
        if len(points) > 1:
            axes.loglog(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=3, linewidth=1)
    axes.set(xlabel=label, title=" ".join(f"{name}={value}" for name, value in fixed.items()))
    axes.set_xticks(shown := sorted({line_x for line in axes.lines for line_x in line.get_xdata()}), map(str, shown))
    axes.set_xticks([], minor=True)
    axes.grid(True, which="both", alpha=0.2)


def bars(axes, rows, colours):
    rows = newest(rows, group="main", B="1", C="1024")
    shapes = sorted({(int(row["N"]), int(row["K"])) for row in rows})
    width = 0.8 / max(1, len(colours))
    for place, (name, colour) in enumerate(colours.items()):
        mine = {(int(row["N"]), int(row["K"])): us(row) for row in rows if row["provider"] == name}
        at = [index + (place + 0.5) * width - 0.4 for index, shape in enumerate(shapes) if shape in mine]
        axes.bar(at, [mine[shape] for shape in shapes if shape in mine], width, color=colour, label=name)
    axes.set_xticks(range(len(shapes)), [f"{n}/{k}" for n, k in shapes])
    axes.set(xlabel="N/K", yscale="log", title="B=1 C=1024")
    axes.grid(True, axis="y", alpha=0.2)


def draw(rows: list[dict], png: Path) -> int:
    """Plots the float32 selection rows; returns the number of series."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["op"] == OP and row["dtype"] == "float32" and row["data"] == "gaussian"]
    # All panels use one clock: graph replay with a cold L2 if there are such rows, else the host clock.
    for mode, cold in (("graph", "1"), ("eager", "0")):
        timed = [row for row in rows if (row["mode"], row["cold_l2"]) == (mode, cold)]
        if timed:
            break
    if not timed:
        return 0
    colours = providers(timed)
    figure, panels = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axes, (field, (label, fixed)) in zip(panels.flat, GROWTH.items(), strict=False):
        growth(axes, timed, colours, field, label, fixed)
    bars(panels[1][1], timed, colours)
    for axes in panels.flat:
        axes.set_ylabel("median time, us")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(handles, colours, loc="outside lower center", ncols=4, frameon=False)
    last = timed[-1]
    clock = "CUDA-graph replay, cold L2" if mode == "graph" else f"eager, {last['threads']} threads"
    figure.suptitle(f"{OP}, float32: {last['device']}, {clock}, torch {last['torch']}", fontsize=10)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120)
    pyplot.close(figure)
    return len(colours)


def main(csv: Path, png: Path) -> int:
    if not csv.exists():
        print(f"{csv} does not exist; measure first, or name another file with --csv")
        return 2
    if not draw(record.read(csv), png):
        print(f"{csv} has no float32 rows of {OP} to draw")
        return 2
    print(f"drew {png}")
    return 0
