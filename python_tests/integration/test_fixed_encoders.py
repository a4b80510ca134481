"""Encoders of fixed shapes: they hand on what the model's own encoder hands on, and read no value."""

import contextlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sts_kernels.integrations.transformers import (
    attention_capture,
    dropped,
    prompt,
    prune,
    vision_attention,
    vision_pruning,
)
from sts_kernels.integrations.transformers.adapters import EncodeCall, adapter_of
from sts_kernels.integrations.transformers.captured.encoder import Encoder
from sts_kernels.integrations.transformers.captured.graphs import Graphs
from sts_kernels.integrations.transformers.random_models import RANDOM

from . import models
from .models import transformers

# Pictures of the rows of a batch; the families that have several take other sizes for each of a row.
BATCHES = {"one": (1,), "several": (3, 1), "many": (4, 2, 1)}
CLIPS = ("video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
KINDS = [(family, "image") for family in models.FAMILIES] + [(family, "video") for family in CLIPS]


def prompts_of(family: str, kind: str, counts: tuple) -> list[models.Prompt]:
    given = {"image": "pictures", "video": "clips"}[kind]
    return [
        models.prompt_of(family, **{"pictures": 0, given: n}, seed=7 + i, after=9 - 2 * i) for i, n in enumerate(counts)
    ]


def call_of(model, inputs: dict, kind: str) -> EncodeCall:
    token = prompt.token_ids(model.model.config)
    return EncodeCall(kind, inputs, lambda which: prompt.runs(inputs["input_ids"], token[which]))


def pixels_of(inputs: dict, kind: str) -> torch.Tensor:
    names = {"image": ("pixel_values", "pixel_values_images"), "video": ("pixel_values_videos",)}[kind]
    return next(inputs[name] for name in names if name in inputs)


def plain(model, inputs: dict):
    """What the projector gets in the model's own forward, and what its deepstack projectors give."""
    seen, base = {}, model.model

    def before_text(module, args, kwargs):
        seen["deepstack"] = kwargs.get("deepstack_visual_embeds") or []

    hooks = [
        adapter_of(base.config.model_type)
        .projector(base)
        .register_forward_pre_hook(lambda module, args: seen.update(rows=args[0])),
        base.language_model.register_forward_pre_hook(before_text, with_kwargs=True),
    ]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen["rows"], seen["deepstack"]


@contextlib.contextmanager
def calls_of(adapter, base, kind: str):
    """Query, key and scale of the encoder's attention that methods look at."""
    module, calls = adapter.vision_attention(base, kind), []
    attention_capture.attach(module, lambda module, q, k, given: calls.extend(vision_attention.calls_of(q, k, given)))
    try:
        yield calls
    finally:
        attention_capture.detach(module)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("counts", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("family", "kind"), KINDS)
@torch.no_grad()
def test_rows_and_signals_are_the_models_own(family, kind, counts, attention, device):
    model = models.shared(family, attention, device)
    inputs, base = models.batch(model, prompts_of(family, kind, counts)), model.model
    adapter = adapter_of(base.config.model_type)
    encoder, call = adapter.fixed_encoder, call_of(model, inputs, kind)
    with calls_of(adapter, base, kind) as own_calls:
        own_rows, own_deepstack = plain(model, inputs)
    shape = encoder.shape(base, call)
    tables = {name: table.to(device) for name, table in encoder.tables(base, shape).items()}
    with calls_of(adapter, base, kind) as calls:
        found = encoder.run(base, tables, pixels_of(inputs, kind))
    close(found.rows, own_rows)
    assert len(found.deepstack) == len(own_deepstack) == (2 if family == "qwen3_vl" else 0)
    for (projector, rows), own in zip(found.deepstack, own_deepstack, strict=True):
        close(projector(rows), own)
    features = adapter.features(adapter.projector(base), found.rows).shape
    assert features[:-1] == shape.features
    calls = encoder.calls(base, shape, calls)
    for find in (adapter.attention, adapter.keys):
        close(find(base, calls, features), find(base, own_calls, features))


def close(found: torch.Tensor, own: torch.Tensor) -> None:
    torch.testing.assert_close(found, own, rtol=0, atol=1e-5)


# --- with what a method drops, against the hooks ---

LLAVA = ("llava", "llava_next", "video_llava")
ONE_ROW_A_FEATURE = tuple(family for family in models.FAMILIES if family != "qwen3_vl")
METHODS = {  # name, options, families
    "sts": ("sts", {"keep": 10}, models.FAMILIES),
    "sts by share": ("sts", {"keep": 0.3, "rho": 1.0}, models.FAMILIES),
    "sts by crop": ("sts", {"keep": 9, "scope": "crop"}, models.FAMILIES),
    "sts from the most attended": ("sts", {"keep": 7, "anchor": "saliency"}, models.FAMILIES),
    "sts, all tokens": ("sts", {"keep": 1.0}, models.FAMILIES),
    "divprune": ("divprune", {"keep": 10}, models.FAMILIES),
    "divprune by crop": ("divprune", {"keep": 11, "scope": "crop"}, models.FAMILIES),
    "fps": ("fps", {"keep": 7}, models.FAMILIES),
    "fastervlm": ("fastervlm", {"keep": 9}, models.FAMILIES),
    "fastervlm of the image": ("fastervlm", {"keep": 0.4, "scope": "image"}, models.FAMILIES),
    "vispruner": ("vispruner", {"keep": 12}, models.FAMILIES),
    "adavtp": ("adavtp", {"keep": 11, "complexity": "participation"}, models.FAMILIES),
    "adavtp in the encoder": ("adavtp", {"keep": 9, "complexity": "entropy", "space": "encoder"}, models.FAMILIES),
    "fastervlm_divprune": ("fastervlm_divprune", {"keep": 13}, models.FAMILIES),
    "uniform": ("uniform", {"keep": 5}, models.FAMILIES),
    "random": ("random", {"keep": 0.5}, models.FAMILIES),
    "visionzip": ("visionzip", {"keep": 13}, ONE_ROW_A_FEATURE),
    "tome": ("tome", {"keep": 10}, ONE_ROW_A_FEATURE),
    "polymorphic": ("polymorphic", {"keep": 11}, ONE_ROW_A_FEATURE),
    "prumerge": ("prumerge", {"keep": 11, "neighbours": 8}, LLAVA),
    "nothing before the LLM": ("fastv", {"layers": [2], "ratios": [3]}, models.FAMILIES),
}


def by_hooks(model, inputs: dict) -> dict:
    """What enters the LLM: rows, the placeholder of each, counted over the batch, and rows of the deepstack layers."""
    base, seen = model.model, {}
    token = prompt.token_ids(base.config)["image"]

    def before_text(module, args, kwargs):
        placed = kwargs["inputs_embeds"][inputs["input_ids"] == token]
        stays = ~dropped.is_dropped(placed)
        deep = [part[stays] for part in kwargs.get("deepstack_visual_embeds") or []]
        seen.update(rows=placed[stays], token=stays.nonzero()[:, 0], deepstack=deep)
        raise Entered

    hook = base.language_model.register_forward_pre_hook(before_text, prepend=True, with_kwargs=True)
    try:
        with pytest.raises(Entered):
            model(**inputs)
    finally:
        hook.remove()
    return seen


class Entered(Exception):
    pass


def encoder_of(model, pruning, inputs: dict, call: EncodeCall, pixels: torch.Tensor) -> Encoder:
    base, adapter = model.model, pruning.adapter
    shape = adapter.fixed_encoder.shape(base, call)
    items = adapter.layout(base, call, torch.Size((*shape.features, 1)))
    items = vision_pruning.with_budgets(items, pruning.plan)
    order = None if adapter.order is None else adapter.order(base, call)
    made = Encoder(base, adapter, pruning.method, pruning.scope, shape, items, order, pixels, axes=0)
    made.pixels.copy_(pixels)
    made.places.copy_(torch.arange(made.places.shape[1]))
    return made


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", models.FAMILIES)
@torch.no_grad()
def test_what_is_kept_is_what_the_hooks_keep(family, name, device):
    method, options, families = METHODS[name]
    if family not in families:
        pytest.skip("the method does not run on this family")
    model = models.shared(family, device=device)
    for counts in BATCHES.values():
        inputs = models.batch(model, prompts_of(family, "image", counts))
        pixels = pixels_of(inputs, "image")
        with prune(model, method, **options) as pruning:
            own = by_hooks(model, inputs)
            encoder = encoder_of(model, pruning, inputs, call_of(model, inputs, "image"), pixels)
            out = encoder.ready(Graphs(device, None)).run()
        assert out["places"][0].tolist() == own["token"].tolist()
        close(out["rows"], own["rows"])
        if family == "llava_next":
            newline = (own["rows"] == model.model.image_newline).all(1)
            assert out["candidate"].tolist() == (~newline).tolist()
        else:
            assert out["candidate"].all()
        assert len(out["deepstack"]) == len(own["deepstack"]) == (2 if family == "qwen3_vl" else 0)
        for found, wanted in zip(out["deepstack"], own["deepstack"], strict=True):
            close(found, wanted)


# --- at true size, on meta tensors: whatever needs a value raises ---


class HostTensors(TorchDispatchMode):
    """Notes every op that meets a tensor on the host; numbers do not count."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if any(x.device.type == "cpu" and x.ndim for x in tensors):
            self.seen.append(str(func))
        return out


GRIDS = [[1, 72, 72], [2, 16, 20], [1, 30, 46]]
PATCHES = sum(math.prod(grid) for grid in GRIDS)


def _qwen3_vl():  # 4.57 has no default for what MROPE3 says
    return transformers.Qwen3VLConfig(text_config={"head_dim": 64, **models.MROPE3})


TRUE_SIZES = {  # configuration, shape of the pixel values, sizes
    "llava": (RANDOM["llava-1.5-7b"].config, (2, 3, 336, 336), {}),
    "llava_next": (RANDOM["llava-next-7b"].config, (2, 5, 3, 336, 336), {"image_sizes": [[672, 672], [300, 500]]}),
    "video_llava": (transformers.VideoLlavaConfig, (2, 8, 3, 224, 224), {}),
    "qwen2_vl": (transformers.Qwen2VLConfig, (PATCHES, 1176), {"image_grid_thw": GRIDS}),
    "qwen2_5_vl": (RANDOM["qwen2.5-vl-7b"].config, (PATCHES, 1176), {"image_grid_thw": GRIDS}),
    "qwen3_vl": (_qwen3_vl, (PATCHES, 1536), {"image_grid_thw": GRIDS}),
    "internvl": (transformers.InternVLConfig, (5, 3, 448, 448), {}),
}


def at_true_size(family: str):
    """The model, its pixel values, and the call of its encoder with sizes on the host."""
    config, pixels, sizes = TRUE_SIZES[family]
    kind = "video" if len(pixels) == 5 and family == "video_llava" else "image"
    name = "pixel_values_videos" if kind == "video" else "pixel_values"
    with torch.device("meta"):
        model = models.class_of(family)._from_config(config(), attn_implementation="sdpa", dtype=torch.bfloat16).eval()
        pixels = torch.empty(pixels, dtype=torch.bfloat16)
    sizes = {key: torch.tensor(value) for key, value in sizes.items()}
    return model, pixels, EncodeCall(kind, {name: pixels, **sizes}, lambda kind: [])


@pytest.mark.parametrize("family", models.FAMILIES)
@torch.no_grad()
def test_nothing_is_read_at_true_size(family):
    model, pixels, call = at_true_size(family)
    adapter, base = adapter_of(model.model.config.model_type), model.model
    encoder = adapter.fixed_encoder
    shape = encoder.shape(base, call)
    tables = {name: table.to("meta") for name, table in encoder.tables(base, shape).items()}
    with HostTensors() as host, calls_of(adapter, base, call.kind) as calls:
        found = encoder.run(base, tables, pixels)
        features = adapter.features(adapter.projector(base), found.rows)
        calls = encoder.calls(base, shape, calls)
        signals = adapter.attention(base, calls, features.shape), adapter.keys(base, calls, features.shape)
        rows = [projector(rows) for projector, rows in [(adapter.projector(base), found.rows), *found.deepstack]]
    assert not host.seen
    assert features.shape[:-1] == shape.features
    count = features.shape[:-1].numel()
    assert [len(signal) for signal in signals] == [count, count]
    assert all(row.shape[:-1].numel() == count for row in rows)


@pytest.mark.parametrize("family", models.FAMILIES)
@torch.no_grad()
def test_the_models_own_forward_reads(family):
    """The control: meta tensors have no values."""
    model, _, call = at_true_size(family)
    inputs = {name: value.to("meta") for name, value in call.arguments.items()}
    ids = torch.zeros(1, 4000, dtype=torch.long, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"), HostTensors():
        model(input_ids=ids, **inputs)
