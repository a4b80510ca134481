"""Unsupported uses raise an error of one sentence before anything runs."""

import copy

import pytest
import torch

from sts_kernels import STSConfig, methods
from sts_kernels.integrations.transformers import (
    VisualItem,
    apply_sts,
    compat,
    dropped,
    prune,
    unsupported,
    vision_pruning,
)

from . import flash, models
from .models import CACHE, output_cache

CONFIG = STSConfig(keep=8, keep_after=3, prune_layer=3)


def one_sentence(error) -> None:
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(("sts_kernels: ", "apply_sts: ", "prune: "))


def test_a_model_of_no_family():
    config = models.transformers.LlamaConfig(**models._text())
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM \(model_type 'llama'\) is not of a supported family: .*LLaVA-1.5"
    ) as e:
        apply_sts(models.transformers.LlamaForCausalLM(config), CONFIG)
    one_sentence(e)
    with pytest.raises(ValueError, match="Linear"):
        apply_sts(torch.nn.Linear(2, 2), CONFIG)


def test_a_config_of_the_wrong_type():
    with pytest.raises(TypeError, match="config must be an STSConfig, got int"):
        apply_sts(models.shared("llava"), 128)


def test_twice_on_one_model():
    model = models.shared("llava")
    with apply_sts(model, CONFIG), pytest.raises(ValueError, match="active on this model already") as e:
        apply_sts(model, CONFIG)
    one_sentence(e)
    apply_sts(model, CONFIG).remove()


def test_layers_that_are_not_there():
    with pytest.raises(ValueError, match="the LLM has 6 layers, got 6"):
        apply_sts(models.shared("llava"), STSConfig(keep=8, prune_layer=6))


def test_deepstack_layers():
    with pytest.raises(NotImplementedError, match="must be at least 2 for this model") as e:
        apply_sts(models.shared("qwen3_vl"), STSConfig(keep=8, prune_layer=1))
    one_sentence(e)
    apply_sts(models.shared("qwen3_vl"), STSConfig(keep=8, prune_layer=2)).remove()


@pytest.mark.parametrize(
    ("setting", "value", "match"),
    [
        ("layer_types", ["full_attention"] * 5 + ["sliding_attention"], "sliding_attention"),
        ("sliding_window", 16, "a sliding window of 16"),
        ("_attn_implementation_internal", "flex_attention", "attention 'flex_attention' is not supported"),
        ("_attn_implementation_internal", "paged|flash_attention_2", "only eager, sdpa and flash_attention_2/3 are"),
    ],
)
def test_settings_of_the_model(setting, value, match):
    model = models.build("llava")
    config = model.model.language_model.config
    if setting == "sliding_window":
        config.layer_types = None
    setattr(config, setting, value)
    with pytest.raises(NotImplementedError, match=match) as e:
        apply_sts(model, CONFIG)
    one_sentence(e)


def test_tensor_parallel():
    model = models.build("llava")
    model._tp_size = 2
    with pytest.raises(NotImplementedError, match="tensor parallel") as e:
        apply_sts(model, CONFIG)
    one_sentence(e)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"cache_implementation": "offloaded_static"}, "static caches are not supported with offloading"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size is not supported"),
    ],
)
@pytest.mark.parametrize("where", ["argument", "generation_config", "model"])
def test_options_of_generate(options, match, where):
    model = models.shared("llava")
    prompt = models.prompt_of("llava", 1)
    seen = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda *args: seen.append(1))
    mine = model.generation_config
    try:
        with apply_sts(model, CONFIG):
            given = options
            if where == "generation_config":
                config = copy.deepcopy(mine)
                config.update(**options)
                given = {"generation_config": config}
            elif where == "model":
                model.generation_config = copy.deepcopy(mine)
                model.generation_config.update(**options)
                given = {}
            with pytest.raises(NotImplementedError, match=match) as e:
                model.generate(**models.batch(model, [prompt]), max_new_tokens=2, **given)
            one_sentence(e)
            assert not seen
    finally:
        model.generation_config = mine
        hook.remove()


def test_a_static_cache_that_has_its_memory():
    model, text = models.shared("llava"), models.prompt_of("llava", 0)
    inputs = models.batch(model, [models.prompt_of("llava", 1)])
    cache = models.transformers.StaticCache(config=model.config.text_config, max_cache_len=64)
    with apply_sts(model, CONFIG), torch.no_grad():
        model(**models.batch(model, [text]), **{CACHE: cache})
        with pytest.raises(NotImplementedError, match="new images on a non-empty cache"):
            model(**inputs, **{CACHE: cache})
        cache.reset()
        with pytest.raises(NotImplementedError, match="and this one has its memory already") as e:
            model(**inputs, **{CACHE: cache})
        one_sentence(e)


def test_static_caches_with_flash_attention():
    model = flash.use(models.build("llava"))
    with apply_sts(model, CONFIG):
        with pytest.raises(NotImplementedError, match="static caches are not supported with FlashAttention") as e:
            models.generate(model, [models.prompt_of("llava", 1)], cache_implementation="static")
        one_sentence(e)


def test_static_caches_of_a_model_that_pruning_was_not_given():
    """Only the base model was given to apply_sts: the model's generate() makes masks for a single cache length."""
    model, prompt = models.shared("llava"), models.prompt_of("llava", 1)
    with apply_sts(model.model, CONFIG):
        # Before transformers 5 a static generate() that fails leaves a cache on the model that breaks the next one.
        with (
            compat.without_kept_cache(model),
            pytest.raises(NotImplementedError, match="give LlavaForConditionalGeneration itself to prune") as e,
        ):
            models.generate(model, [prompt], cache_implementation="static")
        one_sentence(e)
        models.generate(model, [prompt])


def test_new_images_on_a_cache():
    model = models.shared("llava")
    prompt = models.prompt_of("llava", 1)
    with apply_sts(model, CONFIG), torch.no_grad():
        for start in (prompt, models.prompt_of("llava", 0)):  # a pruned cache, and a plain one
            out = models.generate(model, [start])
            talk = models.Prompt(out.sequences[0].tolist(), images=list(prompt.images))
            talk.ids += [*[models.IMAGE] * 36, 5]
            with pytest.raises(NotImplementedError, match="new images on a non-empty cache") as e:
                models.generate(model, [talk], **{CACHE: output_cache(out)})
            one_sentence(e)
            with pytest.raises(NotImplementedError, match="new images on a non-empty cache"):
                model(**models.batch(model, [prompt]), **{CACHE: output_cache(out)})


def test_training():
    model = models.build("llava").train()
    inputs = models.batch(model, [models.prompt_of("llava", 1)])
    with apply_sts(model, CONFIG):
        with pytest.raises(NotImplementedError, match="is for inference") as e:
            model(**inputs)
        one_sentence(e)
        with torch.no_grad():
            model(**inputs)


def test_a_four_dimensional_mask():
    model = models.shared("llava")
    inputs = models.batch(model, [models.prompt_of("llava", 1)])
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with (
        apply_sts(model, CONFIG),
        torch.no_grad(),
        pytest.raises(NotImplementedError, match="only attention masks") as e,
    ):
        model(**inputs)
    one_sentence(e)


def test_a_mask_that_is_too_short_for_a_later_turn():
    model = models.shared("llava")
    inputs = models.batch(model, [models.prompt_of("llava", n, seed=n) for n in (1, 2)])
    with apply_sts(model, CONFIG), torch.no_grad():
        cache = output_cache(model(**inputs, use_cache=True))
        with pytest.raises(ValueError, match=r"attention_mask must cover the [0-9]+ columns") as e:
            model(input_ids=torch.full((2, 3), 5), attention_mask=inputs["attention_mask"], **{CACHE: cache})
        one_sentence(e)


def test_a_pruned_cache_outside_the_handle():
    """Without the handle, the cache would be continued with masks of the wrong length."""
    model = models.shared("llava")
    prompt = models.prompt_of("llava", 1)
    with apply_sts(model, CONFIG):
        out = models.generate(model, [prompt])
    assert output_cache(out).get_seq_length() == out.sequences.shape[1] - 1  # reading the length is allowed
    with pytest.raises(RuntimeError, match="only while the pruning"), torch.no_grad():
        model(input_ids=torch.tensor([[5]]), **{CACHE: output_cache(out)})


def test_features_of_another_batch():
    model = models.shared("llava")
    if "mm_encoder_outputs" not in models.model_arguments(model):
        pytest.skip(f"transformers {models.transformers.__version__} takes no mm_encoder_outputs")
    one, two = models.prompt_of("llava", 1), models.prompt_of("llava", 2)
    with apply_sts(model, CONFIG), torch.no_grad():
        inputs = models.batch(model, [two])
        encoded = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
        models.generate(model, [one])
        with pytest.raises(RuntimeError, match="encode and run one batch at a time"):
            model(**inputs, mm_encoder_outputs={"image": encoded})


@pytest.mark.parametrize("family", ["llava", "llava_next", "video_llava", "internvl"])  # Qwen-VL itself refuses it
def test_a_mask_with_holes_in_an_image(family):
    """With such a mask, the prompt's token count would be wrong and text tokens would be cut off."""
    model = models.shared(family)
    inputs = models.batch(model, [models.prompt_of(family, 1, seed=1)])
    first = int((inputs["input_ids"][0] == models.IMAGE).int().argmax())
    inputs["attention_mask"][0, first : first + 2] = 0
    with apply_sts(model, CONFIG), torch.no_grad(), pytest.raises(ValueError, match="must be 1 at every visual") as e:
        model(**inputs)
    one_sentence(e)


def test_features_encoded_without_the_pruning():
    model = models.shared("llava")
    if "mm_encoder_outputs" not in models.model_arguments(model):
        pytest.skip(f"transformers {models.transformers.__version__} takes no mm_encoder_outputs")
    inputs = models.batch(model, [models.prompt_of("llava", 1, seed=1)])
    pixels = inputs.pop("pixel_values")
    with torch.no_grad():
        encoded = {"plain": model.model.get_image_features(pixels, return_dict=True)}
        with apply_sts(model, STSConfig(keep=12)):
            encoded["other"] = model.model.get_image_features(pixels, return_dict=True)
        with apply_sts(model, CONFIG):
            models.generate(model, [models.prompt_of("llava", 1, seed=1)])
            for features in encoded.values():
                with pytest.raises(RuntimeError, match="encoded without it or with other options") as e:
                    model(**inputs, mm_encoder_outputs={"image": features})
                one_sentence(e)


@pytest.mark.parametrize("columns", [0, -4, 2.0, True])
def test_a_prompt_length_that_is_none(columns):
    with (
        apply_sts(models.shared("llava"), CONFIG) as sts,
        pytest.raises(ValueError, match="prompt_length must be") as e,
    ):
        sts.prompt_length = columns
    one_sentence(e)


def test_a_prompt_length_before_the_image():
    model = models.shared("llava")
    inputs = models.batch(model, [models.prompt_of("llava", 1, seed=1)])
    with apply_sts(model, CONFIG) as sts, torch.no_grad():
        sts.prompt_length = 7
        with pytest.raises(ValueError, match="prompt_length must lie behind the last visual token") as e:
            model(**inputs)
    one_sentence(e)


def test_a_cache_cropped_into_its_prompt():
    model = models.shared("llava")
    inputs = models.batch(model, [models.prompt_of("llava", 1, seed=1)])
    length = inputs["input_ids"].shape[1]
    with apply_sts(model, CONFIG), torch.no_grad():
        want = model(**inputs).logits
        cache = output_cache(model(**inputs, use_cache=True))
        with pytest.raises(
            NotImplementedError, match=f"its pruned prompt of {length} columns, got {length - 3} to"
        ) as e:
            cache.crop(-3)
        one_sentence(e)
        model(input_ids=torch.tensor([[5, 6]]), **{CACHE: cache})
        cache.crop(-1)
        assert cache.get_seq_length() == length + 1
        cache.crop(-length - 1)  # all of it
        assert torch.equal(model(**inputs, **{CACHE: cache}).logits, want)


def test_options_and_marks_are_looked_at_once_a_prompt(monkeypatch):
    seen = []

    def counted(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: seen.append(name) or original(*args))

    counted(unsupported, "check_generation")
    counted(dropped, "is_dropped")
    model = models.shared("llava")
    with apply_sts(model, CONFIG) as sts:
        models.generate(model, [models.prompt_of("llava", 1, seed=1)], 3)
        assert sts.report.rows
    assert sorted(seen) == ["check_generation", "is_dropped"]


def test_methods_of_a_class_token_refuse_an_encoder_without_one():
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = models.CONFIGS["llava"]()
    config.vision_config = models.transformers.SiglipVisionConfig(image_size=24, patch_size=4, **vision)
    config.vision_feature_select_strategy = "full"
    model = models.class_of("llava")._from_config(config).eval()
    with pytest.raises(NotImplementedError, match=r"prumerge is defined by the attention of a \[CLS\] token") as e:
        prune(model, "prumerge", budget=8)
    one_sentence(e)
    prune(model, "vispruner", budget=8).remove()  # takes the mean over all tokens


def test_an_encoder_whose_attention_cannot_be_seen(monkeypatch):
    """Its attention module calls no attention function of the library, so it has no query and key to score with."""
    model = models.shared("llava")
    for layer in model.model.vision_tower.modules():
        if type(layer).__name__ == "CLIPAttention":
            monkeypatch.setattr(layer, "forward", lambda hidden_states, **rest: (hidden_states, None))
    with prune(model, "fastervlm", budget=8), pytest.raises(RuntimeError, match="fastervlm saw no attention") as e:
        models.generate(model, [models.prompt_of("llava", 1)], 1)
    one_sentence(e)


def test_features_of_another_number_than_the_prompts_images_have():
    with pytest.raises(RuntimeError, match="expected the features of 9 patches or groups, got 8"):
        vision_pruning.select(methods.create("sts"), "image", torch.rand(8, 4), [VisualItem("image", [9], [(3, 3)])])


@pytest.mark.parametrize("family", ["llava", "internvl"])
@pytest.mark.parametrize("where", ["call", "config"])
def test_features_of_another_layer_than_the_attention(family, where, monkeypatch):
    models.skip_unless_layers_are_chosen(family)
    model, inputs = models.shared(family), models.batch(models.shared(family), [models.prompt_of(family, 1)])
    own = model.config.vision_feature_layer
    call = {"vision_feature_layer": own - 1} if where == "call" else {}
    for name in ("vispruner", "sts"):  # by attention; by features alone
        with prune(model, name, budget=8), monkeypatch.context() as patch, torch.no_grad():
            model(**inputs, vision_feature_layer=own)
            if where == "config":
                patch.setattr(model.config, "vision_feature_layer", own - 1)
            if name == "sts":
                model(**inputs, **call)
                continue
            with pytest.raises(
                NotImplementedError, match=rf"attention of vision_feature_layer {own}, .* {own - 1};"
            ) as e:
                model(**inputs, **call)
            one_sentence(e)


@pytest.mark.parametrize("layer", [0, -4])
def test_features_that_no_attention_made(layer, monkeypatch):
    """The configuration has three layers, so layers 0 and -4 are the embeddings."""
    model = models.shared("llava")
    monkeypatch.setattr(model.config, "vision_feature_layer", layer)
    with pytest.raises(NotImplementedError, match=f"vision_feature_layer {layer}, the encoder's embeddings") as e:
        prune(model, "vispruner", budget=8)
    one_sentence(e)
    prune(model, "sts", budget=8).remove()
