"""The plugin without an engine: token counts, layouts, picks, positions, registration and refusals."""

import dataclasses
import importlib
import json
import logging
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from integration import models as tiny

from sts_kernels import info, methods
from sts_kernels.integrations import vllm as plugin
from sts_kernels.integrations.transformers import vision_pruning
from sts_kernels.integrations.transformers.adapters import EncodeCall, adapter_of
from sts_kernels.integrations.transformers.visual_item import VisualItem
from sts_kernels.integrations.vllm import layouts, settings
from sts_kernels.integrations.vllm.settings import Refused

from . import fake_vllm

FAMILIES = {
    "llava": layouts.LLAVA,
    "llava_next": layouts.LLAVA_NEXT,
    "qwen2_5_vl": layouts.QWEN2_5_VL,
    "qwen3_vl": layouts.QWEN3_VL,
}
CLASSES = {"llava": "STSLlava", "llava_next": "STSLlavaNext", "qwen2_5_vl": "STSQwen2_5_VL", "qwen3_vl": "STSQwen3VL"}
CHANNELS = 16
SIZES = {  # as vLLM's processors give them: height and width, or a grid of patches
    "llava": [()] * 3,
    "llava_next": [(40, 24), (20, 44), (40, 40)],
    "qwen2_5_vl": [(1, 8, 4), (1, 4, 12), (1, 6, 6)],
    "qwen3_vl": [(1, 8, 4), (1, 4, 12), (1, 6, 6)],
}


def config_of(family: str, **sts):
    config = tiny.CONFIGS[family]()
    config.architectures = [fake_vllm.MODELS[family]]
    if sts:
        config.sts = sts
    return config


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv(settings.VARIABLE, raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)


@pytest.fixture
def vllm():
    with fake_vllm.installed() as module:
        yield module


def built(family: str, changes: dict | None = None, **sts):
    """A model of the plugin on the fake vLLM."""
    models = importlib.import_module("sts_kernels.integrations.vllm.models")
    config = config_of(family, **sts)
    model = getattr(models, CLASSES[family])(vllm_config=fake_vllm.configuration(config, **(changes or {})))
    return model


# ---- token counts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sts", [{"keep": 1}, {"keep": 128}, {"keep": 0.25}, {"budget": 192}, {"keep": 1.0}], ids=str)
def test_both_sides_count_alike(sts):
    """The front end's number of placeholders equals the worker's number of picks, for every token count."""
    asked = settings.read(config_of("llava", method="uniform", **sts))
    found = [layouts.Layout(VisualItem("image", [n], [(1, n)], torch.arange(n)), None) for n in range(1, 3001)]
    placeholders = [layout.kept(asked.plan) for layout in found]
    assert all(1 <= kept <= n for n, kept in enumerate(placeholders, 1))
    items = vision_pruning.with_budgets([layout.item for layout in found], asked.plan)
    picked = vision_pruning.select(asked.method, "image", torch.zeros(sum(range(3001)), 1), items)
    if picked is None:
        assert placeholders == list(range(1, 3001))
        return
    owner = torch.repeat_interleave(torch.arange(3000), torch.arange(1, 3001))[picked.rows]
    assert owner.bincount(minlength=3000).tolist() == placeholders


@pytest.mark.parametrize("height", [7, 20, 24, 40, 100])
@pytest.mark.parametrize("width", [9, 24, 44, 48, 333])
def test_crops_are_packed_as_transformers_packs_them(height, width):
    model, config = tiny.shared("llava_next").model, tiny.CONFIGS["llava_next"]()
    call = EncodeCall("image", {"image_sizes": torch.tensor([[height, width]])}, lambda kind: [])
    (theirs,) = adapter_of("llava_next").layout(model, call, torch.Size([1, 36, 8]))
    ours = layouts.llava_next(config, height, width).item
    assert torch.equal(ours.feature_of_token, theirs.feature_of_token)
    assert (ours.crops, ours.grids) == (theirs.crops, theirs.grids)


@pytest.mark.parametrize("grid", [(1, 8, 4), (1, 4, 12), (1, 6, 6), (1, 2, 2), (1, 22, 10)])
def test_features_lie_window_by_window(grid):
    """Windows of 16 pixels are 2 x 2 groups of 2 x 2 patches of 4 pixels."""
    rows, columns = grid[1] // 2, grid[2] // 2
    groups = sorted(
        ((y, x) for y in range(rows) for x in range(columns)), key=lambda group: [n // 2 for n in group] + list(group)
    )
    expected = [y * columns + x for y, x in groups]
    assert layouts.qwen_vl(tiny.CONFIGS["qwen2_5_vl"](), *grid).token_of_feature.tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_invert(family):
    config = tiny.CONFIGS[family]()
    for size in SIZES[family]:
        layout = FAMILIES[family].layout(config, *size)
        order, tokens = layout.item.feature_of_token, layout.token_of_feature
        used = (order >= 0).nonzero()[:, 0]
        assert torch.equal(tokens[order[used]], used)
        assert int((tokens >= 0).sum()) == len(used) == layout.item.num_visual
        assert layout.positions.shape == (layout.item.num_tokens, 3)


# ---- the front end -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Update:
    modality: str
    replacement: object


def front_end(family: str, **sts):
    models = importlib.import_module("sts_kernels.integrations.vllm.models")
    config = config_of(family, **sts)
    factory = getattr(models, CLASSES[family])._processor_factory
    information = factory.info(SimpleNamespace(model_config=SimpleNamespace(hf_config=config)))
    return factory.processor(information, None), information, config


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_get_as_many_placeholders_as_are_kept(vllm, family):
    processor, _, config = front_end(family, keep=5)
    name = FAMILIES[family].size
    data = [{name: SimpleNamespace(data=torch.tensor(size))} for size in SIZES[family]]
    whole = [FAMILIES[family].layout(config, *size).item for size in SIZES[family]]
    text = Update("video", "as it was")
    updates = [Update("image", lambda i: [9] * whole[i].num_tokens), text]
    image, other = processor._get_prompt_updates(updates, {}, {"image": data})
    assert other is text
    for i, item in enumerate(whole):
        separators = item.num_tokens - item.num_visual
        assert image.replacement(i) == [9] * (5 + separators)
    (broken,) = processor._get_prompt_updates([Update("image", lambda i: [9] * 3)], {}, {"image": data})
    with pytest.raises(RuntimeError, match="tokens of an image, got 3"):
        broken.replacement(0)


def test_hashes_tell_what_is_kept(vllm):
    hashes = {}
    for sts in ({"keep": 5}, {"keep": 6}, {"keep": 5, "method": "divprune"}, {"keep": 5, "positions": "contiguous"}):
        (value,) = front_end("llava", **sts)[0]._get_mm_hashes(["abc"])["image"]
        assert value.startswith("abc-sts-")
        assert re.fullmatch(r"[\w.=-]+", value)
        hashes[value] = sts
        assert front_end("llava", **sts)[0]._get_mm_hashes(["abc"])["image"] == [value]
    assert len(hashes) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_tells_all_processes(vllm, monkeypatch, family):
    """A worker without the variable finds the options and the pruned model's name in the configuration that it gets."""
    monkeypatch.setenv(settings.VARIABLE, "7")
    _, information, config = front_end(family)
    monkeypatch.delenv(settings.VARIABLE)
    assert config.sts == {"keep": 7}
    assert config.architectures == [f"STS{fake_vllm.MODELS[family]}"]
    assert settings.read(config).plan.keep(1000) == 7
    front_end_again = information.get_supported_mm_limits()
    assert front_end_again == (
        {"image": None, "video": 0} if family.startswith("qwen") else {"image": None, "video": None}
    )
    assert (getattr(config, "rope_parameters", None) == {"mrope_section": [1, 0, 0]}) is not family.startswith("qwen")


# ---- the workers -------------------------------------------------------------------------------------------------


def pruned(family: str, sizes, device="cpu", dtype=torch.float32, **sts):
    """Runs the worker's part on random features. Returns the model, layouts, features and its output."""
    model = built(family, **sts)
    found = [FAMILIES[family].layout(model.config, *size) for size in sizes]
    generator = torch.Generator().manual_seed(0)
    features = [
        torch.randn(layout.item.num_features, CHANNELS, generator=generator).to(device, dtype) for layout in found
    ]
    model.image_newline = torch.full((CHANNELS,), 7.0, device=device)
    parts = []

    def encode(image_input, part, layouts_of_part):
        parts.append(part)
        return torch.cat(features[part]), None

    model.encode, model.project = encode, lambda x: x
    name = FAMILIES[family].size
    images = {"pixel_values": [None] * len(sizes)} | ({name: torch.tensor(sizes)} if name else {})
    return model, found, features, model._process_image_input(images), parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", settings.POSITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_one_call_are_picked_from_each_for_itself(vllm, device, family, positions, dtype):
    """Ragged images of one call give the same rows as each image alone, in token order, with all newlines."""
    if family.startswith("qwen") and positions == "contiguous":
        pytest.skip("refused")
    sizes = SIZES[family]
    model, found, features, together, _ = pruned(family, sizes, device, dtype, keep=6, positions=positions)
    for layout, feature, tokens in zip(found, features, together, strict=True):
        order = (
            methods.create("sts", rho=1.0)
            .select(k=6, features=feature[torch.cat(layout.item.candidates())][None])
            .order[0]
        )
        rows = torch.cat(layout.item.candidates())[order.cpu()]
        kept = torch.zeros(layout.item.num_features, dtype=torch.bool).index_fill_(0, rows, True)
        expected, places = [], []
        for token, row in enumerate(layout.item.feature_of_token.tolist()):
            if row < 0 or kept[row]:
                expected.append(model.image_newline.to(dtype) if row < 0 else feature[row])
                places.append(token)
        assert len(tokens) == layout.kept(model.asked.plan) == len(expected)
        assert torch.equal(tokens[:, :CHANNELS], torch.stack(expected))
        if positions == "original":
            high, low = tokens[:, CHANNELS:].long().chunk(2, 1)
            assert torch.equal((high * 128 + low).cpu(), layout.positions[places])
        else:
            assert tokens.shape[1] == CHANNELS
    assert all(x.dtype == torch.int64 for x in vllm.group.sent)  # picks, from the first rank
    batches = importlib.import_module("sts_kernels.integrations.vllm.models").batches
    calls = batches([x.item.num_features for x in found], model.encoder_budget)  # of the encoder
    assert len(vllm.group.sent) == len([*calls])


def test_keeping_all_keeps_all(vllm):
    for family, sizes in SIZES.items():
        _, found, _, together, _ = pruned(family, sizes, keep=1.0)
        assert [len(x) for x in together] == [layout.item.num_tokens for layout in found]


def test_the_encoder_runs_on_as_many_tokens_as_vllm_allows_unpruned(vllm):
    """36 tokens an image and a budget of 100: two images at a time, though the prompt has two tokens of each."""
    *_, together, parts = pruned("llava", [()] * 5, keep=2)
    assert parts == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert [len(x) for x in together] == [2] * 5
    models = importlib.import_module("sts_kernels.integrations.vllm.models")
    assert list(models.batches([150, 20, 70, 90], 100)) == [slice(0, 1), slice(1, 3), slice(3, 4)]
    assert list(models.batches([150], 100)) == [slice(0, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_positions_survive_every_dtype(vllm, dtype):
    model = built("llava", keep=2)
    digits = torch.tensor([0, 1, 127, 128, 575, 2879, 32767])
    place = digits[:, None].expand(-1, 3)
    embeds = torch.cat([torch.zeros(7, 4), place // 128, place % 128], 1).to(dtype)
    mask = torch.tensor([True] * 7 + [False])
    stripped = model.embed_input_ids(torch.zeros(8, dtype=torch.int64), [embeds], is_multimodal=mask)
    assert [x.shape[1] for x in stripped] == [4]
    assert model.forward(None, torch.full((3, 8), 10)).tolist() == [*(10 + digits).tolist(), 10]
    model.embed_input_ids(torch.zeros(8, dtype=torch.int64), [], is_multimodal=mask)
    assert model.forward(None, torch.full((3, 8), 10)).tolist() == [10] * 8  # no offsets of the previous step


def test_positions_keep_their_address(vllm):
    """A piecewise CUDA graph reads the positions at the address that they had at capture."""
    for family in ("llava", "qwen2_5_vl"):
        model = built(family, keep=2)
        first, second = (model.forward(None, torch.full((3, n), n)) for n in (8, 5))
        assert first.data_ptr() == second.data_ptr()
        assert second.tolist() == ([5] * 5 if family == "llava" else [[5] * 5] * 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_those_of_the_whole_prompt(vllm, family):
    """Text and image tokens have the positions that transformers gives them in the unpruned prompt."""
    image, start = tiny.IMAGE, [tiny.VISION_START]
    model = built(family, keep=5)
    grids = SIZES[family][:2]
    wholes = [FAMILIES[family].layout(model.config, *size) for size in grids]
    kept = [layout.kept(model.asked.plan) for layout in wholes]
    ids, short, features = [1, 4, 5], [1, 4, 5], []
    for size, layout, k in zip(grids, wholes, kept, strict=True):
        ids += start + [image] * layout.item.num_tokens + [6]
        place = Place(len(short) + 1, k)
        features.append(Feature({FAMILIES[family].size: SimpleNamespace(data=torch.tensor(size))}, place))
        short += start + [image] * k + [6]
    ids, short = [*ids, 8, 9], [*short, 8, 9]
    if family.startswith("qwen"):
        whole = transformers_positions(family, ids, grids)
        monkey = lambda self, tokens, features: (whole, int(whole.max()) + 1 - len(tokens))  # noqa: E731
        type(model).__mro__[3].get_mrope_input_positions = monkey
    else:
        whole = torch.arange(len(ids)).expand(3, -1)
    positions, delta = model.get_mrope_input_positions(short, features[::-1])
    assert positions.shape == (3, len(short))
    assert delta == int(whole.max()) + 1 - len(short)
    columns, at = [], 0
    for layout, feature, k in zip(wholes, features, kept, strict=True):
        first = ids.index(image, at)
        at = first + layout.item.num_tokens
        columns.append((feature.mm_position.offset, k, first, layout))
    for offset, k, first, layout in columns:
        assert torch.equal(positions[:, offset : offset + k], whole[:, [first] * k])
        assert torch.equal(whole[:, first : first + layout.item.num_tokens].T - whole[:, first], layout.positions)
    text, full_text = (torch.tensor(x) != image for x in (short, ids))
    assert torch.equal(positions[:, text], whole[:, full_text])


@dataclasses.dataclass
class Place:
    offset: int
    length: int


@dataclasses.dataclass
class Feature:
    data: dict
    mm_position: Place


def transformers_positions(family: str, ids: list[int], grids) -> torch.Tensor:
    model = tiny.shared(family).model
    tensor = torch.tensor([ids])
    arguments = {"image_grid_thw": torch.tensor(grids), "attention_mask": torch.ones_like(tensor)}
    if "mm_token_type_ids" in model.get_rope_index.__code__.co_varnames:
        arguments["mm_token_type_ids"] = (tensor == tiny.IMAGE).int()
    return model.get_rope_index(tensor, **arguments)[0][:, 0]


# ---- registration ------------------------------------------------------------------------------------------------


def test_installing_it_changes_nothing(vllm):
    for _ in range(2):
        plugin.register()
        assert set(vllm.ModelRegistry.models) == {f"STS{name}" for name in fake_vllm.MODELS.values()}
    for path in vllm.ModelRegistry.models.values():
        module, name = path.split(":")
        assert hasattr(importlib.import_module(module), name)


def test_the_variable_takes_over_vllms_names(vllm, monkeypatch, caplog):
    monkeypatch.setenv(settings.VARIABLE, "128")
    with caplog.at_level(logging.INFO, plugin.logger.name):
        for _ in range(2):
            plugin.register()
    names = set(fake_vllm.MODELS.values())
    assert set(vllm.ModelRegistry.models) == names | {f"STS{name}" for name in names}
    assert "others run as they are" in caplog.text


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0", "unknown"])
def test_other_versions_are_refused(monkeypatch, caplog, version):
    with fake_vllm.installed(version) as vllm:
        plugin.register()
        assert not vllm.ModelRegistry.models
        assert f"supports vLLM 0.32 to 0.33, and this is {version}" in caplog.text
        monkeypatch.setenv(settings.VARIABLE, "128")
        with pytest.raises(Refused, match="unset STS_KERNELS_KEEP"):
            plugin.register()
        assert not vllm.ModelRegistry.models


@pytest.mark.parametrize("version", ["0.32.0", "0.33.0", "0.33.1.dev5+gabc"])
def test_supported_versions(version):
    assert plugin.unsupported(version) == ""


@pytest.mark.parametrize("text", ["none", "0", "-1", "1.5", "0.0", "nan", "null", "1e400", "128 tokens"])
def test_a_bad_variable_stops_the_server(vllm, monkeypatch, text):
    monkeypatch.setenv(settings.VARIABLE, text)
    with pytest.raises(Refused, match="must be a number of tokens or a share") as error:
        plugin.register()
    assert not isinstance(error.value, ValueError)  # on a ValueError vLLM would go on and serve text alone


def test_the_package_imports_neither_it_nor_vllm():
    code = (
        "import sys, sts_kernels, sts_kernels.integrations.transformers\n"
        "assert not any(x == 'vllm' or 'integrations.vllm' in x for x in sys.modules)\n"
        "before = set(sys.modules)\n"
        "import sts_kernels.integrations.vllm\n"
        "new = {x.split('.')[0] for x in set(sys.modules) - before}\n"
        "assert new <= {'sts_kernels'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sts", "sentence"),
    [
        ({"keep": 8, "rho": 0.5}, "sts prunes inside the LLM, which vLLM cannot serve"),
        ({"keep": 8, "keep_after": 4}, "sts prunes inside the LLM"),
        ({"keep": 8, "prune_layer": 2}, "prune_layer is about pruning inside the LLM"),
        ({"keep": 8, "layers": [2]}, "layers is about pruning inside the LLM"),
        ({"keep": 8, "ratios": [0.5]}, "ratios is about pruning inside the LLM"),
        ({"keep": 8, "score_from": "next"}, "score_from is about pruning inside the LLM"),
        ({"keep": 8, "llm_only": True}, "llm_only is about pruning inside the LLM"),
        ({"method": "fastv", "budget": 0.9}, "fastv prunes inside the LLM"),
        ({"method": "dart", "budget": 0.9}, "dart prunes inside the LLM"),
        ({"method": "polymorphic", "budget": 0.9}, "polymorphic prunes inside the LLM"),
        ({"method": "adavtp", "count": "adaptive", "keep": 8}, "adavtp keeps a number of tokens that depends on them"),
        ({"method": "cdpruner", "keep": 8}, "cdpruner looks at the relevance of a prompt"),
        ({"method": "cdpruner", "by": "text", "keep": 8}, "cdpruner looks at the text of a prompt"),
        ({"method": "prumerge", "keep": 8}, "prumerge looks at the vision encoder's last layer"),
        ({"method": "nonsense", "keep": 8}, "name must be one of"),
        ({"method": 3, "keep": 8}, "name must be a str"),
        ({"keep": 0}, "keep must be at least 1 token"),
        ({"keep": "8"}, "keep must be a number of tokens"),
        ({"keep": 8, "budget": 8}, "give either budget or keep"),
        ({"method": "divprune"}, "give budget or keep"),
        ({"keep": 8, "epsilon": 1}, "epsilon is not an option"),
        ({"keep": 8, "scope": "pixel"}, "scope must be one of image, crop, got 'pixel'"),
        ({"keep": 8, "positions": "kept"}, "positions must be one of original, contiguous, got 'kept'"),
        ({}, 'say how many tokens to keep, such as STS_KERNELS_KEEP=128, or "sts"'),
    ],
    ids=str,
)
def test_options_are_refused_in_one_sentence(sts, sentence):
    with pytest.raises(Refused) as error:
        settings.read(config_of("llava", **sts))
    message = str(error.value)
    assert message.startswith("sts_kernels: ")
    assert sentence in message
    assert "\n" not in message


def test_every_method_is_served_or_refused():
    """A served method has no cuts, keeps the count asked for, and needs only features, attention and keys."""
    served = set()
    for name in methods.names():
        try:
            asked = settings.read(config_of("llava", method=name, keep=8))
        except Refused:
            continue
        served.add(name)
        assert not asked.plan.cuts
        assert asked.plan.keep(576) == 8
        assert asked.method.signals <= {"features", "attention", "keys"}
    by_attention = {"adavtp", "fastervlm", "fastervlm_divprune", "polymorphic", "tome", "visionzip", "vispruner"}
    assert served >= by_attention | {"divprune", "fps", "random", "sts", "uniform"}
    assert not served & {"cdpruner", "dart", "fastv", "prumerge", "pyramiddrop", "sparsevlm"}


@pytest.mark.parametrize(
    ("family", "sts", "changes", "sentence"),
    [
        ("llava", {}, {"enable_mm_embeds": True}, "--enable-mm-embeds"),
        (
            *("llava", {}, {"enable_mm_embeds": True, "kv_transfer_config": "both"}),
            "--enable-mm-embeds, which this KV or encoder cache connector turns on",
        ),
        ("llava", {}, {"enable_prompt_embeds": True}, '--enable-prompt-embeds with positions="original"'),
        (
            *("qwen2_5_vl", {"method": "fastervlm"}, {"mm_encoder_attn_backend": SimpleNamespace(name="FLASHINFER")}),
            "--mm-encoder-attn-backend FLASHINFER for fastervlm",
        ),
        ("qwen2_5_vl", {}, {"video_pruning_rate": 0.5}, "--video-pruning-rate"),
        ("qwen2_5_vl", {}, {"mm_encoder_tp_mode": "data"}, "--mm-encoder-tp-mode data"),
        ("llava", {}, {"compile_mm_encoder": True}, "compile_mm_encoder"),
        ("qwen3_vl", {}, {"cudagraph_mm_encoder": True}, "cudagraph_mm_encoder"),
        ("llava", {}, {"pipeline_parallel_size": 2}, '--pipeline-parallel-size above 1 with positions="original"'),
        ("llava", {}, {"use_ubatching": True}, "microbatching"),
        ("llava", {}, {"speculative_config": "eagle"}, "speculative decoding"),
        ("qwen2_5_vl", {"positions": "contiguous"}, {}, 'positions="contiguous"'),
        *(("qwen3_vl", {"method": x}, {}, f"{x}, which merges features") for x in ("polymorphic", "tome", "visionzip")),
    ],
    ids=str,
)
def test_settings_of_the_engine_are_refused(vllm, family, sts, changes, sentence):
    with pytest.raises(Refused) as error:
        built(family, changes, keep=8, **sts)
    assert f"sts_kernels: the vLLM plugin does not support {sentence}" in str(error.value)


@pytest.mark.parametrize("method", ["adavtp", "divprune", "fastervlm", "fastervlm_divprune", "random", "vispruner"])
def test_methods_that_merge_nothing_are_served_on_qwen3_vl(vllm, monkeypatch, method):
    models = importlib.import_module("sts_kernels.integrations.vllm.models")
    monkeypatch.setattr(models.Prunes, "attention_module", lambda self: torch.nn.Identity())
    assert built("qwen3_vl", keep=8, method=method).asked.method.name == method


def test_a_front_end_without_the_plugin_is_refused(vllm, monkeypatch):
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(Refused, match="does not support VLLM_USE_RUST_FRONTEND"):
        built("llava", keep=8)


def test_contiguous_positions_need_less(vllm):
    changes = {"pipeline_parallel_size": 2, "use_ubatching": True, "speculative_config": "eagle"}
    assert built("llava", changes, keep=8, positions="contiguous").places is None


def test_language_models_are_refused(vllm):
    models = importlib.import_module("sts_kernels.integrations.vllm.models")
    for change, sentence in (
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary positions of type yarn"),
        ({"sliding_window": 64}, "a sliding window of 64"),
    ):
        config = config_of("llava", keep=8)
        for name, value in change.items():
            setattr(config.text_config, name, value)
        with pytest.raises(Refused, match=sentence):
            models.STSLlava(vllm_config=fake_vllm.configuration(config))
    config = config_of("llava", keep=8)
    config.vision_config.model_type = "pixtral"
    with pytest.raises(Refused, match="Pixtral"):
        layouts.llava(config)


def test_the_table_of_rotations_reaches_the_longest_prompt(vllm):
    """2048 tokens hold at most 256 images of which 8 tokens are kept, of 36 each."""
    model = built("llava", keep=8)
    assert model.config.text_config.max_position_embeddings == 2048 + 256 * 36


def test_one_line_says_what_is_pruned(vllm, caplog):
    with caplog.at_level(logging.INFO, plugin.logger.name):
        built("llava", keep=128)
        built("llava", method="divprune", keep=0.25, positions="contiguous")
    assert "sts keeps 128 tokens of each image before the LLM, at original positions" in caplog.text
    assert "divprune keeps 0.25 of the tokens of each image before the LLM, at contiguous positions" in caplog.text


# ---- info --------------------------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch):
    """info's line for a given version of vLLM and a given entry point."""

    def tell(version="0.32.0", entry="sts_kernels.integrations.vllm:register", name="vllm"):
        found = {name: version}
        monkeypatch.setattr(info, "distribution", lambda asked: found.get(asked, "not installed"))
        points = [SimpleNamespace(value=entry)] if entry else []
        monkeypatch.setattr(info.importlib.metadata, "entry_points", lambda group: points)
        return info.probe(info.vllm)

    return tell


def test_info_tells_what_the_plugin_would_do(told, monkeypatch):
    assert told(version="not installed") == "not installed"
    assert told().startswith("0.32.0; plugin installed, STS_KERNELS_KEEP not set")
    assert "the plugin is not installed" in told(entry=None)
    assert "supports vLLM 0.32 to 0.33, and this is 0.31.0" in told(version="0.31.0")
    monkeypatch.setenv(settings.VARIABLE, "0.25")
    assert "plugin installed, keeps 0.25 of an image's tokens in LlavaForConditionalGeneration" in told()
    monkeypatch.setenv(settings.VARIABLE, "many")
    assert "must be a number of tokens" in told()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "left out by VLLM_PLUGINS=other" in told()


def test_the_entry_point_is_declared():
    try:
        import tomllib
    except ImportError:
        pytest.skip("needs Python 3.11")
    from pathlib import Path

    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["sts_kernels"].split(":")
    assert getattr(importlib.import_module(module), function) is plugin.register
    assert "vllm" not in json.dumps(project["dependencies"]) + json.dumps(project["optional-dependencies"])
