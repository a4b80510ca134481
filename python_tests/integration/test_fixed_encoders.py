"""Encoders of fixed shapes: outputs equal those of the model's own encoder, and no value is read."""

import contextlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sts_kernels import methods
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
from sts_kernels.integrations.transformers.captured.refusals import unselectable
from sts_kernels.integrations.transformers.random_models import RANDOM

from . import flash, models
from .models import transformers

# A family without a fixed encoder cannot be compiled: docs/adding-a-model.md.
FAMILIES = tuple(family for family in models.FAMILIES if adapter_of(family).fixed_encoder is not None)
# Number of images in each row of a batch; families with several image sizes vary the size within a row.
BATCHES = {"one": (1,), "several": (3, 1), "many": (4, 2, 1)}
CLIPS = ("video_llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
KINDS = [(family, "image") for family in FAMILIES] + [(family, "video") for family in CLIPS]


def test_families_of_the_package_have_a_fixed_encoder():
    shipped = {
        "llava",
        "llava_next",
        "video_llava",
        "qwen2_vl",
        "qwen2_5_vl",
        "qwen3_vl",
        "internvl",
        "llava_onevision",
    }
    assert shipped <= set(FAMILIES)


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
    """In the model's own forward: the projector's input, and the outputs of the deepstack projectors."""
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
    """Query, key and scale of the encoder's attention that methods read."""
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
    """On a GPU, matrix products of other shapes are summed in another order."""
    torch.testing.assert_close(found, own, rtol=0, atol=1e-5 if found.device.type == "cpu" else 5e-5)


# --- encoder and selection, against the hooks ---

LLAVA = ("llava", "llava_next", "video_llava")
ONE_ROW_A_FEATURE = tuple(family for family in FAMILIES if family not in ("qwen3_vl", "llava_onevision"))
METHODS = {  # name, options, families
    "sts": ("sts", {"keep": 10}, FAMILIES),
    "sts by share": ("sts", {"keep": 0.3, "rho": 1.0}, FAMILIES),
    "sts by crop": ("sts", {"keep": 9, "scope": "crop"}, FAMILIES),
    "sts from the most attended": ("sts", {"keep": 7, "anchor": "saliency"}, FAMILIES),
    "sts, all tokens": ("sts", {"keep": 1.0}, FAMILIES),
    "divprune": ("divprune", {"keep": 10}, FAMILIES),
    "divprune by crop": ("divprune", {"keep": 11, "scope": "crop"}, FAMILIES),
    "fps": ("fps", {"keep": 7}, FAMILIES),
    "fastervlm": ("fastervlm", {"keep": 9}, FAMILIES),
    "fastervlm of the image": ("fastervlm", {"keep": 0.4, "scope": "image"}, FAMILIES),
    "vispruner": ("vispruner", {"keep": 12}, FAMILIES),
    "adavtp": ("adavtp", {"keep": 11, "complexity": "participation"}, FAMILIES),
    "adavtp in the encoder": ("adavtp", {"keep": 9, "complexity": "entropy", "space": "encoder"}, FAMILIES),
    "fastervlm_divprune": ("fastervlm_divprune", {"keep": 13}, FAMILIES),
    "uniform": ("uniform", {"keep": 5}, FAMILIES),
    "random": ("random", {"keep": 0.5}, FAMILIES),
    "visionzip": ("visionzip", {"keep": 13}, ONE_ROW_A_FEATURE),
    "tome": ("tome", {"keep": 10}, ONE_ROW_A_FEATURE),
    "polymorphic": ("polymorphic", {"keep": 11}, ONE_ROW_A_FEATURE),
    "prumerge": ("prumerge", {"keep": 11, "neighbours": 8}, LLAVA),
    "attention that nothing asks for": ("fastervlm", {"keep": 1.0}, FAMILIES),
    "nothing before the LLM": ("fastv", {"layers": [4], "ratios": [3]}, FAMILIES),
}


def by_hooks(model, inputs: dict) -> dict:
    """The LLM's input: rows, index of each row's placeholder in the batch, and rows of the deepstack layers."""
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


def encoder_of(pruning, call: EncodeCall, pixels: torch.Tensor) -> Encoder:
    """An encoder whose `places` are the indices of the placeholders."""
    base, adapter = pruning.base, pruning.adapter
    shape = adapter.fixed_encoder.shape(base, call)
    items = adapter.layout(base, call, torch.Size((*shape.features, 1)))
    items = vision_pruning.with_budgets(items, pruning.plan)
    order = None if adapter.order is None else adapter.order(base, call)
    made = Encoder(base, adapter, pruning.method, pruning.scope, shape, items, order, pixels, axes=0)
    made.places.copy_(torch.arange(made.places.shape[1]))
    return made


def ready(model, pruning, inputs: dict, backend: str | None):
    encoder = encoder_of(pruning, call_of(model, inputs, "image"), pixels_of(inputs, "image"))
    return encoder, encoder.ready(Graphs(model.device, backend))


def check(found: dict, own: dict, newline: torch.Tensor | None) -> None:
    assert found["places"][0].tolist() == own["token"].tolist()
    close(found["rows"], own["rows"])
    separates = torch.zeros_like(found["candidate"]) if newline is None else (own["rows"] == newline).all(1)
    assert found["candidate"].tolist() == (~separates).tolist()
    for rows, wanted in zip(found["deepstack"], own["deepstack"], strict=True):
        close(rows, wanted)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_is_kept_is_what_the_hooks_keep(family, name, device):
    """On a CUDA device the encoder runs as a captured graph, also on other pixels than at capture."""
    method, options, families = METHODS[name]
    if family not in families:
        pytest.skip("the method does not run on this family")
    keeps_the_same(models.shared(family, device=device), family, method, options)


@pytest.mark.parametrize("method", ["sts", "fastervlm"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_flash_attention(family, method):
    keeps_the_same(flash.use(models.build(family)), family, method, {"keep": 10})


def keeps_the_same(model, family: str, method: str, options: dict) -> None:
    for counts in BATCHES.values():
        inputs = models.batch(model, prompts_of(family, "image", counts))
        with prune(model, method, **options) as pruning:
            encoder, graph = ready(model, pruning, inputs, None)
            for turn in range(2):
                pixels_of(inputs, "image").mul_(1 - 2 * turn)
                encoder.pixels.copy_(pixels_of(inputs, "image"))
                check(graph.run(), by_hooks(model, inputs), getattr(model.model, "image_newline", None))


COMPILED = {
    "llava": "visionzip",
    "llava_next": "sts by crop",
    "video_llava": "sts",
    "qwen2_vl": "attention that nothing asks for",
    "qwen2_5_vl": "vispruner",
    "qwen3_vl": "sts by crop",
    "internvl": "fastervlm",
    "llava_onevision": "adavtp in the encoder",
}


@pytest.mark.parametrize(("family", "name"), COMPILED.items())
@torch.no_grad()
def test_compiled_whole(family, name, device):
    method, options, _ = METHODS[name]
    model = models.shared(family, device=device)
    inputs = models.batch(model, prompts_of(family, "image", BATCHES["several"]))
    with prune(model, method, **options) as pruning:
        encoder, graph = ready(model, pruning, inputs, "eager")
        encoder.pixels.copy_(pixels_of(inputs, "image"))
        check(graph.run(), by_hooks(model, inputs), getattr(model.model, "image_newline", None))
        torch.compiler.reset()


REASONS = [
    ("cdpruner", {}, "numbers of the caller's"),
    ("cdpruner", {"by": "text"}, "the text of the prompt"),
    ("adavtp", {"count": "adaptive"}, "how many tokens it keeps"),
    ("adavtp", {}, "waits for the device"),
    ("vispruner", {"mixing": "adaptive"}, "waits for the device"),
    ("vispruner", {"mixing": "adaptive", "complexity": "entropy"}, None),
    ("vispruner", {}, None),
]


@pytest.mark.parametrize(("method", "options", "why"), REASONS)
def test_what_a_graph_cannot_select(method, options, why):
    reason = unselectable(methods.create(method, **options), torch.device("cuda"))
    assert reason is None if why is None else why in reason


# --- at true size, on meta tensors: every read of a value raises ---


class HostTensors(TorchDispatchMode):
    """Records every op that touches a tensor on the host; scalars do not count."""

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


def _qwen3_vl():  # 4.57 has no defaults for the fields of MROPE3
    return transformers.Qwen3VLConfig(text_config={"head_dim": 64, **models.MROPE3})


TRUE_SIZES = {  # configuration, shape of the pixel values, sizes
    "llava": (RANDOM["llava-1.5-7b"].config, (2, 3, 336, 336), {}),
    "llava_next": (RANDOM["llava-next-7b"].config, (2, 5, 3, 336, 336), {"image_sizes": [[672, 672], [300, 500]]}),
    "video_llava": (transformers.VideoLlavaConfig, (2, 3, 224, 224), {}),
    "qwen2_vl": (transformers.Qwen2VLConfig, (PATCHES, 1176), {"image_grid_thw": GRIDS}),
    "qwen2_5_vl": (RANDOM["qwen2.5-vl-7b"].config, (PATCHES, 1176), {"image_grid_thw": GRIDS}),
    "qwen3_vl": (_qwen3_vl, (PATCHES, 1536), {"image_grid_thw": GRIDS}),
    "internvl": (transformers.InternVLConfig, (5, 3, 448, 448), {}),
    "llava_onevision": (
        transformers.LlavaOnevisionConfig,
        (2, 16, 3, 384, 384),
        {"image_sizes": [[1080, 1920], [700, 1000]]},
    ),
}


def at_true_size(family: str):
    """The model, its pixel values, and the call of its encoder with sizes on the host."""
    config, pixels, sizes = TRUE_SIZES[family]
    with torch.device("meta"):
        model = models.class_of(family)._from_config(config(), attn_implementation="sdpa", dtype=torch.bfloat16).eval()
        pixels = torch.empty(pixels, dtype=torch.bfloat16)
    sizes = {key: torch.tensor(value) for key, value in sizes.items()}
    name = next(name for name in ("pixel_values", "pixel_values_images") if name in models.model_arguments(model))
    return model, pixels, EncodeCall("image", {name: pixels, **sizes}, lambda kind: [])


AT_TRUE_SIZE = [
    (family, name)
    for name, (_, _, families) in METHODS.items()
    for family in families
    if family == "llava_next" or name in ("sts", "fastervlm", "visionzip", "divprune by crop")
]


@pytest.mark.parametrize(("family", "name"), AT_TRUE_SIZE)
@torch.no_grad()
def test_nothing_is_read_at_true_size(family, name):
    """No value is read from the pixels to the LLM's input. The first run may copy lists of numbers to the device."""
    method, options, _ = METHODS[name]
    model, pixels, call = at_true_size(family)
    with prune(model, method, **options) as pruning:
        encoder = encoder_of(pruning, call, pixels)
        graph = encoder.ready(Graphs(pixels.device, None))
        graph.run()
        with HostTensors() as host:
            out = graph.run()
    assert not host.seen
    assert len(out["rows"]) == len(out["candidate"]) == out["places"].shape[1] == encoder.rows


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_models_own_forward_reads(family):
    """Control: the model's own forward reads values, which meta tensors do not have."""
    model, _, call = at_true_size(family)
    inputs = {name: value.to("meta") for name, value in call.arguments.items()}
    ids = torch.zeros(1, 4000, dtype=torch.long, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"), HostTensors():
        model(input_ids=ids, **inputs)
