"""Every method on every family against the float64 oracle: prompt and decode, alone and in ragged batches."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

from sts_kernels import methods
from sts_kernels.integrations.transformers import (
    cut_selection,
    encoder_hooks,
    handle,
    layer_pruning,
    masks,
    prune,
    vision_pruning,
)
from sts_kernels.integrations.transformers.adapters import internvl
from sts_kernels.methods import Budget, Cut, Method, Plan, Selection

from . import models, oracle, slow_methods, vision_oracle
from . import slow_selection as slow
from .models import output_cache
from .oracle import NearTie, expect_method
from .test_mutants import mutated
from .test_oracle import PROMPTS, STEPS, close
from .test_refusals import one_sentence

SEVERAL_ROWS = (
    "qwen3_vl",
    "qwen3_vl_moe",
    "llava_onevision",
)  # a token is made of several rows of the projector's input
ONE_ROW = tuple(f for f in models.CONFIGS if f not in SEVERAL_ROWS)
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
LLAVA = ("llava", "llava_next", "video_llava")


# --- slow references: the tokens of a pool that each method keeps ---


def farthest(distance: torch.Tensor, first: int, keep: int) -> list[int]:
    picks = [first]
    while len(picks) < keep:
        nearest = distance[picks].min(0).values
        picks.append(slow.best(nearest, [i for i in range(len(distance)) if i not in picks]))
    return picks


def divprune(pool, keep: int) -> list[int]:
    x = pool.projected / pool.projected.norm(dim=1, keepdim=True)
    distance = 1 - x @ x.T
    lonely = (distance + 9 * torch.eye(len(x))).min(0).values
    return farthest(distance, slow.best(lonely, list(range(len(x)))), keep)


def fps(pool, keep: int) -> list[int]:
    x = pool.features.double()
    return farthest((x[:, None] - x).square().sum(-1), 0, keep)


def fastervlm(pool, keep: int) -> list[int]:
    left = list(range(len(pool.attention)))
    for _ in range(keep):
        left.remove(slow.best(pool.attention, left))
    return [i for i in range(len(pool.attention)) if i not in left]


def uniform(pool, keep: int) -> list[int]:
    return [i * len(pool.features) // keep for i in range(keep)]


def murmur(value: int) -> int:
    value = ((value ^ value >> 16) * 0x85EBCA6B) % 2**32
    value = ((value ^ value >> 13) * 0xC2B2AE35) % 2**32
    return value ^ value >> 16


def random(pool, keep: int) -> list[int]:
    drawn = {i: murmur(murmur(i ^ murmur(0)) ^ murmur(1)) for i in range(len(pool.features))}
    return sorted(drawn, key=lambda i: -drawn[i])[:keep]


polymorphic, halves = slow_methods.PolyMorphic(), slow_methods.PolyMorphic(1.0, 1.0)


@dataclass
class Case:
    options: dict
    keep: int = 10**6  # tokens of each image that enter the LLM
    choose: Callable | None = None
    cuts: tuple = ()  # layer, tokens of each image left
    score_from: str = "layer"
    scope: str = "image"
    contiguous: bool = False  # where positions have one axis
    method: str = ""
    cut: Callable | None = None  # a rule of its own inside the LLM
    recycles: tuple | None = None  # share and per_cluster of SparseVLM
    signals: tuple = ()  # attention, last (of the encoder's last layer, all heads as one), relevance
    adaptive: bool = False
    families: tuple = field(default=tuple(models.CONFIGS))  # others refuse it
    refused: str = "rotary positions have three axes|merges features before the projector"


CASES = {
    "divprune": Case({"keep": 10}, 10, divprune),
    "divprune by crop": Case({"keep": 10, "scope": "crop"}, 10, divprune, scope="crop", method="divprune"),
    "fps": Case({"keep": 7}, 7, fps),
    "fastervlm": Case({"keep": 9}, 9, fastervlm, scope="crop", signals=("attention",)),
    "vispruner": Case({"keep": 22}, 22, slow.vispruner, scope="crop", signals=("attention",)),
    "vispruner by erank": Case(
        {"keep": 15, "mixing": "adaptive", "erank_avg": slow.ERANK_AVG, "erank_iqr": 9.0},
        15,
        slow.vispruner_by_erank,
        scope="crop",
        method="vispruner",
        signals=("attention",),
    ),
    "adavtp": Case(
        {"keep": 15, "erank_avg": slow.ERANK_AVG, "tau_max": 0.9}, 15, slow.adavtp, scope="crop", signals=("attention",)
    ),
    "adavtp in the encoder": Case(
        {"keep": 15, "erank_avg": slow.ERANK_AVG, "tau_max": 0.9, "space": "encoder"},
        15,
        slow.adavtp_in_the_encoder,
        scope="crop",
        signals=("attention",),
        method="adavtp",
    ),
    "adavtp, as many as the image needs": Case(
        {"keep": 10, "erank_avg": slow.ERANK_AVG, "tau_max": 0.9, "count": "adaptive"},
        10,
        slow.adavtp_of_any_number,
        scope="crop",
        signals=("attention",),
        method="adavtp",
        adaptive=True,
    ),
    "fastervlm_divprune": Case({"keep": 13}, 13, slow.fastervlm_divprune, scope="crop", signals=("attention",)),
    "cdpruner": Case({"keep": 9, "relevance": slow.content}, 9, slow.cdpruner, scope="crop", signals=("relevance",)),
    "visionzip": Case(
        {"keep": 13},
        13,
        slow.visionzip,
        scope="crop",
        signals=("attention",),
        families=ONE_ROW,
    ),
    "prumerge": Case(
        {"keep": 11, "neighbours": 8},
        11,
        slow.prumerge,
        scope="crop",
        signals=("last",),
        families=LLAVA,
        refused=r"prumerge is defined by the attention of a \[CLS\] token, in the encoder's last layer",
    ),
    "prumerge, plus": Case(
        {"keep": 14, "neighbours": 8, "plus": True},
        14,
        slow.prumerge_plus,
        scope="crop",
        signals=("last",),
        method="prumerge",
        families=LLAVA,
        refused=r"prumerge is defined by the attention of a \[CLS\] token, in the encoder's last layer",
    ),
    "tome": Case(
        {"keep": 10},
        10,
        slow.tome,
        scope="crop",
        signals=("attention",),
        families=ONE_ROW,
    ),
    "random": Case({"keep": 8}, 8, random),
    "uniform": Case({"keep": 5}, 5, uniform),
    "fastv": Case({"layers": [2], "ratios": [3]}, cuts=((2, 3),)),
    "fastv, nothing left": Case({"layers": [3], "ratios": [0]}, cuts=((3, 0),), method="fastv"),
    "pyramiddrop": Case(
        {"layers": [2, 3, 5], "ratios": [11, 6, 2]},
        cuts=((2, 11), (3, 6), (5, 2)),
        score_from="next",
        contiguous=True,
    ),
    "pyramiddrop, positions kept": Case(
        {"layers": [2, 4], "ratios": [8, 3], "positions": "original", "score_from": "layer"},
        cuts=((2, 8), (4, 3)),
        method="pyramiddrop",
    ),
    "sts": Case({"keep": 10, "keep_after": 4, "prune_layer": 3}, 10, oracle.repulsion(), ((3, None),)),
    "sts at a set of layers": Case(
        {"keep": 11, "layers": [2, 3, 5], "ratios": [9, 5, 2]},
        11,
        oracle.repulsion(),
        ((2, 9), (3, 5), (5, 2)),
        method="sts",
    ),
    "sts, numbered anew": Case(
        {"keep": 10, "layers": [3], "ratios": [4], "positions": "contiguous", "score_from": "next"},
        10,
        oracle.repulsion(),
        ((3, 4),),
        score_from="next",
        contiguous=True,
        method="sts",
        families=tuple(f for f in models.FAMILIES if f not in QWEN),
    ),
    "sts, stage 1 alone": Case({"budget": 6, "rho": 1.0}, 6, oracle.repulsion(), method="sts"),
    "polymorphic": Case(
        {"keep": 11, "layers": [2, 4], "ratios": [8, 5]},
        11,
        polymorphic.choose,
        ((2, 8), (4, 5)),
        signals=("attention",),
        cut=polymorphic.cut,
        families=ONE_ROW,
    ),
    "polymorphic, as many merged": Case(
        {"keep": 10, "layers": [3], "ratios": [6], "retained": 1.0, "positions": "contiguous"},
        10,
        halves.choose,
        ((3, 6),),
        signals=("attention",),
        cut=halves.cut,
        contiguous=True,
        method="polymorphic",
        families=tuple(f for f in ONE_ROW if f not in QWEN),
    ),
    "polymorphic, stage 1 alone": Case(
        {"keep": 10},
        10,
        polymorphic.choose,
        signals=("attention",),
        method="polymorphic",
        families=ONE_ROW,
    ),
    "polymorphic, stage 2 alone": Case(
        {"layers": [2, 3, 5], "ratios": [13, 8, 5], "llm_only": True},
        cuts=((2, 13), (3, 8), (5, 5)),
        cut=polymorphic.cut,
        method="polymorphic",
    ),
    "sparsevlm": Case(
        {"layers": [2, 3, 5], "ratios": [14, 9, 4]},
        cuts=((2, 14), (3, 9), (5, 4)),
        recycles=(0.3, 10),
        contiguous=True,
    ),
    "sparsevlm, many clusters": Case(
        {"layers": [2, 4], "ratios": [12, 5], "recycle": 0.6, "per_cluster": 3, "positions": "original"},
        cuts=((2, 12), (4, 5)),
        recycles=(0.6, 3),
        method="sparsevlm",
    ),
    "sparsevlm, nothing recycled": Case(
        {"layers": [2], "ratios": [5], "recycle": 0.0, "score_from": "next"},
        cuts=((2, 5),),
        recycles=(0, 1),
        score_from="next",
        contiguous=True,
        method="sparsevlm",
    ),
    "dart": Case({"layers": [2], "ratios": [15]}, cuts=((2, 15),), cut=slow_methods.dart),
    "sts, stage 2 alone": Case({"layers": [3], "ratios": [4], "llm_only": True}, cuts=((3, 4),), method="sts"),
}


def image_sizes(family: str, prompt) -> list[int]:
    """Visual tokens of each image and clip, separators not counted."""
    if family == "llava_next":
        grids = [models.NEXT_SIZES[size] for size in prompt.image_sizes]
        return [36 + rows * columns for _, rows, columns in grids]
    return [sum(parts) for kind in ("image", "video") for parts in prompt.parts[kind]]


def prompts_of(family: str, seed: int) -> list[models.Prompt]:
    return [
        models.prompt_of(family, pictures, clips, seed=seed + i, before=4 + 3 * i, after=9 - 2 * i)
        for i, (pictures, clips) in enumerate(PROMPTS[family])
    ]


def expected_of(model, family: str, prompt, answer: list[int], case: Case) -> oracle.Expected:
    sizes = image_sizes(family, prompt)
    cuts, before = [], sum(min(case.keep, n) for n in sizes)
    for layer, left in case.cuts:
        left = 4 if left is None else min(before, sum(min(left, case.keep, n) for n in sizes))
        choose = case.cut
        if case.recycles is not None and left < before:
            best, clusters = slow_methods.recycled(before - left, *case.recycles)
            choose, left = functools.partial(slow_methods.sparsevlm, kept=left, best=best), left + clusters
        cuts.append(oracle.Cut(layer, left, case.score_from, choose=choose))
        before = left
    contiguous = case.contiguous and family not in QWEN
    given = {"scope": case.scope, "contiguous": contiguous, "adaptive": case.adaptive}
    if {"attention", "last"} & set(case.signals):
        found = vision_oracle.signals(model, family, prompt, "last" in case.signals)
        given |= {name: {k: getattr(s, name) for k, s in found.items()} for name in ("attention", "keys")}
    if "relevance" in case.signals:
        inputs = models.batch(model, [prompt])
        kinds = [kind for kind in ("image", "video") if prompt.parts[kind]]
        given["attention"] = {kind: slow.content(kind, inputs, family).flatten().cpu() for kind in kinds}
        given["in_token_order"] = family in QWEN
    return expect_method(model, prompt, answer, case.keep, case.choose, cuts, **given)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_generation_is_the_oracles(family, name, device):
    case, model = CASES[name], models.shared(family)
    if family not in case.families:
        with (
            pytest.raises(NotImplementedError, match=case.refused) as e,
            prune(model, case.method or name, **case.options),
        ):
            models.generate(model, prompts_of(family, 4), 1)
        one_sentence(e)
        return
    model = models.shared(family, "eager" if name in ("fastv", "sts at a set of layers") else "sdpa", device)
    options = dict(case.options)
    if "relevance" in options:
        options["relevance"] = functools.partial(slow.content, family=family)
    for seed in range(4, 30):
        prompts = prompts_of(family, seed)
        with prune(model, case.method or name, **options) as pruning:
            alone = [models.generate(model, [prompt], STEPS) for prompt in prompts]
            together = models.generate(model, prompts, STEPS)
            rows = pruning.report.rows
        answers = [one.sequences[0, len(p.ids) :].tolist() for p, one in zip(prompts, alone, strict=True)]
        try:
            expected = [expected_of(model, family, p, a, case) for p, a in zip(prompts, answers, strict=True)]
        except NearTie:
            continue
        break
    else:
        pytest.fail("no prompts without near-ties")
    for row, (want, one) in enumerate(zip(expected, alone, strict=True)):
        close(models.logits_of(one)[0], want.logits)
        close(models.logits_of(together)[row], want.logits)
        assert rows[row].tokens - rows[row].kept[0] == len(want.dropped)
        held = [layer.keys.shape[2] - STEPS + 1 for layer in output_cache(one).layers]
        starts = [0, *(layer for layer, _ in case.cuts), models.LAYERS]
        if len(want.kept) == len(starts) - 1:
            depth = [after - start for start, after in itertools.pairwise(starts)]
            assert held == [len(k) for k, layers in zip(want.kept, depth, strict=True) for _ in range(layers)]


@pytest.mark.parametrize("name", ["pyramiddrop", "sts at a set of layers", "polymorphic", "sparsevlm", "dart"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_other_ways_of_running(family, name, device):
    """Several cuts and renumbered positions: without a cache, with drafts, with beams, in a later turn."""
    case, model = CASES[name], models.shared(family, "sdpa", device)
    for seed in range(4, 20):
        prompt = models.prompt_of(family, 2, seed=seed)
        prompt.ids += models.words(3, 7) * 4  # something to look up
        more = models.words(5, 77)
        with prune(model, case.method or name, **case.options):
            drafted = models.generate(model, [prompt], 8, eos_token_id=[99], prompt_lookup_num_tokens=3)
            fresh = models.generate(model, [prompt], 3, use_cache=False)
            # Before transformers 5, generate() mixes up the images of a prompt that has several when it repeats them.
            one, options = models.prompt_of(family, 1, seed=seed), {"num_beams": 3, "output_logits": False}
            beams = models.generate(model, [one, one], 3, output_scores=True, **options)
            single = models.generate(model, [one], 3, output_scores=True, **options)
            # The later turn runs last, right after its first turn: Qwen-VL's model stores the last prompt's positions.
            plain = models.generate(model, [prompt], 8, eos_token_id=[99])
            talk = models.Prompt([*plain.sequences[0].tolist(), *more])
            inputs = models.batch(model, [talk]) | {models.CACHE: output_cache(plain), "max_new_tokens": 2}
            inputs |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            second = model.generate(**inputs)
        answer = second.sequences[0, len(prompt.ids) :].tolist()
        try:
            want = expected_of(model, family, prompt, answer, case).logits
        except NearTie:
            continue
        break
    else:
        pytest.fail("no prompt without near-ties")
    length = min(plain.sequences.shape[1], drafted.sequences.shape[1])
    assert torch.equal(plain.sequences[:, :length], drafted.sequences[:, :length])
    close(models.logits_of(plain)[0], want[: len(plain.logits)])
    steps = min(3, len(plain.logits))  # the answer may end early
    close(models.logits_of(fresh)[0, :steps], want[:steps])
    close(models.logits_of(second)[0], want[-2:])
    for row in range(2):
        torch.testing.assert_close(beams.sequences_scores[row], single.sequences_scores[0], rtol=1e-4, atol=1e-4)


# name: family, case, module, source text, mutated text
MUTANTS = {
    "the layer before, not the next": (
        "llava",
        "pyramiddrop",
        layer_pruning,
        'if planned.cut.score_from == "next":',
        "if False:",
    ),
    "positions of the full prompt in the first segment": (
        "llava",
        "sts, numbered anew",
        layer_pruning,
        'kwargs["position_ids"] = masks.contiguous_positions(valid, end)',
        "pass",
    ),
    "positions of the first segment in all": (
        "llava",
        "pyramiddrop",
        layer_pruning,
        "        if run.end is not None:\n            rotary",
        "        if False:\n            rotary",
    ),
    "numbers that begin as in the full prompt": (
        "llava",
        "pyramiddrop",
        masks,
        "- number[:, -1:] + number",
        "* 0 + number",
    ),
    "one cut for all": ("qwen2_5_vl", "sts at a set of layers", cut_selection, "[row.left[index]", "[row.left[0]"),
    "pools of all crops as one": (
        "llava_next",
        "fastervlm",
        vision_pruning,
        "[torch.cat(crops)] if scope",
        "[torch.cat(crops)] * len(crops) if True or scope",
    ),
    "attention of the patches in the wrong order": (
        "internvl",
        "fastervlm",
        internvl,
        "joined.flatten(0, 2)",
        "joined.transpose(1, 2).flatten(0, 2)",
    ),
    "attention of rows that are not interpolated": (
        "llava_onevision",
        "fastervlm",
        encoder_hooks,
        "blend(signal.to(features.device))",
        "signal[blend.rows[:, 0]]",
    ),
    "all heads as one": ("llava", "prumerge", encoder_hooks, 'encoder_attention == "last"', 'encoder_attention == ""'),
    "the layer of the features": (
        "llava",
        "prumerge",
        handle,
        "find = self.adapter.last_attention if last else",
        "find =",
    ),
    "relevance in the projector's order": ("qwen2_5_vl", "cdpruner", encoder_hooks, "if order is None", "if True"),
    "counts as they were asked for": (
        "llava",
        "adavtp, as many as the image needs",
        vision_pruning,
        "method.fit_budgets(pools.lengths, pools.budgets, **signals)",
        "pools.budgets",
    ),
    "rows that are not merged": (
        "llava",
        "visionzip",
        encoder_hooks,
        "x = kept.values.to(x.dtype)",
        "pass",
    ),
    "recycled tokens at their centers": ("llava", "sparsevlm", cut_selection, "= last + turn", "= at[:, :1] * 0"),
    "merged tokens as their centers": (
        "llava",
        "polymorphic, stage 2 alone",
        cut_selection,
        "methods.merge(visual, picked)",
        "visual.gather(1, picked.order[..., None].expand(-1, -1, visual.shape[2]))",
    ),
    "the first words do not rate": ("llava", "sparsevlm", masks, "> last_column(marked)", "> last_column(marked) + 3"),
    "keys of one head": ("llava", "dart", layer_pruning, "key.abs().sum(", "key[:, :1].abs().sum("),
    "raters by what is left": (
        "llava",
        "sparsevlm",
        layer_pruning,
        "attention_received(rows, key.transpose(1, 2), scale, raters, asking, slots)",
        "attention_received(rows, key.transpose(1, 2), scale, None, asking, slots)",
    ),
    "features before the projector": (
        "llava",
        "divprune",
        encoder_hooks,
        "self._select(encoding, output, shape, what)",
        "self._select(encoding, output[..., :2], shape, what)",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    family, case, module, old, new = MUTANTS[name]
    with mutated(module, old, new), pytest.raises((AssertionError, AttributeError, RuntimeError, TypeError)):
        test_generation_is_the_oracles(family, case, "cpu")


def test_every_method_of_the_package_is_here():
    shipped = {"adavtp", "cdpruner", "dart", "divprune", "fastervlm", "fastervlm_divprune", "fastv", "fps"}
    shipped |= {"polymorphic", "prumerge", "pyramiddrop", "random", "sparsevlm", "sts", "tome", "uniform"}
    shipped |= {"visionzip", "vispruner"}
    assert shipped <= set(methods.names())
    assert {case.method or name for name, case in CASES.items()} == shipped


# --- code paths that no method above uses, through methods defined here ---


@dataclass(frozen=True)
class Merging(Method):
    """Keeps the first k tokens, and merges token i into the slot i % k."""

    name: ClassVar[str] = "merging"
    merges: ClassVar[bool] = True
    paper: ClassVar[str] = "none"
    signals: ClassVar[frozenset[str]] = frozenset({"features"})

    def pick(self, pool):
        position = torch.arange(pool.tokens, device=pool.device).expand(pool.batch, -1)
        return Selection(position[:, : pool.k], position % pool.k)


@dataclass(frozen=True)
class MergingBehind(Merging):
    site: ClassVar[str] = "projected"


@pytest.mark.parametrize("method", [Merging(), MergingBehind()], ids=["encoder", "projected"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_merged_rows_go_into_the_slots(family, method, device):
    """Each of the first k tokens becomes the projection of its slot's mean, or the mean of its slot's projections."""
    model = models.shared(family, "sdpa", device)
    prompt, keep = models.prompt_of(family, 1, seed=2), 4
    if family in SEVERAL_ROWS and method.site == "encoder":
        with pytest.raises(NotImplementedError, match="merges features before the projector") as e:
            prune(model, method, keep=keep)
        one_sentence(e)
        prune(model, method, keep=1.0).remove()
        return
    plain = oracle.Recording(model, prompt, 2)
    entered = []
    with prune(model, method, keep=keep):
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        models.generate(model, [prompt], 1)
        hook.remove()
    features, projected = plain.features[0].double(), plain.outputs[0].double()
    if family == "llava_next":  # rows that unpadding discards are merged nowhere
        seen = [int((plain.embeds.double() == row).all(1).any()) for row in projected]
        index = torch.tensor(seen).nonzero()[:, 0]
        features, projected = features[index], projected[index]
    mean = lambda x: torch.stack([x[slot::keep].mean(0) for slot in range(keep)])  # noqa: E731
    if method.site == "projected":
        want = mean(projected)
    else:
        want = projector_of(model)(mean(features).float().to(device)).double()
    got = entered[0][0].double()
    for row in want:
        assert (got - row.to(got)).abs().amax(1).min() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("name", ["fastervlm", "visionzip", "vispruner"])
def test_frames_that_are_pooled(name, device):
    test_generation_is_the_oracles("llava_next_video", name, device)


def projector_of(model):
    merger = getattr(getattr(model.model, "visual", None), "merger", None)
    return model.model.multi_modal_projector if merger is None else merger.mlp


@dataclass(frozen=True)
class ByKeys(Method):
    """The tokens whose keys are largest in their first channel."""

    name: ClassVar[str] = "by_keys"
    paper: ClassVar[str] = "none"
    signals: ClassVar[frozenset[str]] = frozenset({"keys"})

    def pick(self, pool):
        return Selection(pool.keys[..., 0].argsort(1, descending=True)[:, : pool.k])


@pytest.mark.parametrize("family", models.FAMILIES)
def test_keys_of_the_encoder(family, device):
    model = models.shared(family, "sdpa", device)
    for seed in range(4, 20):
        prompt = models.prompt_of(family, 2, int(family == "qwen2_vl"), seed=seed)
        keys = {kind: s.keys for kind, s in vision_oracle.signals(model, family, prompt).items()}

        def choose(pool, keep):
            left = list(range(len(pool.attention)))
            for _ in range(keep):
                left.remove(slow.best(pool.attention, left))
            return [i for i in range(len(pool.attention)) if i not in left]

        with prune(model, ByKeys(), keep=5):
            out = models.generate(model, [prompt], 2)
        answer = out.sequences[0, len(prompt.ids) :].tolist()
        try:
            first = {kind: k[:, 0] for kind, k in keys.items()}
            want = expect_method(model, prompt, answer, 5, choose, [], attention=first)
        except NearTie:
            continue
        close(models.logits_of(out)[0], want.logits)
        return
    pytest.fail("no prompts without near-ties")


@dataclass(frozen=True)
class ByText(Method):
    """The projected tokens nearest the mean of the prompt's text."""

    name: ClassVar[str] = "by_text"
    paper: ClassVar[str] = "none"
    site: ClassVar[str] = "projected"
    signals: ClassVar[frozenset[str]] = frozenset({"features", "text"})

    def pick(self, pool):
        score = (pool.features.float() @ pool.text.float().mean(1)[..., None])[..., 0]
        return Selection(score.argsort(1, descending=True)[:, : pool.k])


@pytest.mark.parametrize("family", models.FAMILIES)
def test_text_of_the_prompt(family, device):
    """Each image is seen beside the text of its own row, whatever the lengths of the rows."""
    model = models.shared(family, "sdpa", device)
    prompts = prompts_of(family, 4)
    with prune(model, ByText(), keep=5):
        together = models.generate(model, prompts, 2)
        alone = [models.generate(model, [prompt], 2) for prompt in prompts]
    embedding = model.get_input_embeddings().weight.detach().cpu().double()
    for row, (prompt, one) in enumerate(zip(prompts, alone, strict=True)):
        text = embedding[[i for i in prompt.ids if i not in (models.IMAGE, models.VIDEO)]].mean(0)

        def choose(pool, keep, text=text):
            score = pool.projected @ text
            return score.argsort(descending=True)[:keep].tolist()

        answer = one.sequences[0, len(prompt.ids) :].tolist()
        want = expect_method(model, prompt, answer, 5, choose, [])
        close(models.logits_of(one)[0], want.logits)
        close(models.logits_of(together)[row], want.logits)


def test_text_without_ids_is_refused():
    model = models.shared("llava")
    inputs = models.batch(model, [models.prompt_of("llava", 1)])
    with prune(model, ByText(), keep=5), pytest.raises(NotImplementedError, match="looks at the text") as e:
        model.model.get_image_features(inputs["pixel_values"])
    one_sentence(e)


@dataclass(frozen=True)
class Rated(Method):
    """A cut at layer 3, scored by the attention of all text after the last image."""

    name: ClassVar[str] = "rated"
    paper: ClassVar[str] = "none"
    site: ClassVar[None] = None
    takes: ClassVar[tuple[str, ...]] = ()

    def make_plan(self, budget: Budget, layers: int, default_layer: int | None) -> Plan:
        return Plan(layers, lambda n: n, (Cut(3, lambda images: 4 if images else 0, queries="raters"),))

    def raters(self, visual, text, visual_mask=None, text_mask=None):
        return text_mask.float() / text_mask.sum(1, keepdim=True).clamp(min=1)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_raters(family, device):
    model = models.shared(family, "sdpa", device)
    for seed in range(4, 20):
        prompts = prompts_of(family, seed)
        with prune(model, Rated()):
            together = models.generate(model, prompts, 2)
            alone = [models.generate(model, [prompt], 2) for prompt in prompts]
        try:
            cut = oracle.Cut(3, 4, raters=True)
            answers = [one.sequences[0, len(p.ids) :].tolist() for p, one in zip(prompts, alone, strict=True)]
            want = [expect_method(model, p, a, 10**6, None, [cut]) for p, a in zip(prompts, answers, strict=True)]
        except NearTie:
            continue
        for row, (one, expected) in enumerate(zip(alone, want, strict=True)):
            close(models.logits_of(one)[0], expected.logits)
            close(models.logits_of(together)[row], expected.logits)
        return
    pytest.fail("no prompts without near-ties")


def test_states_are_compared_behind_the_final_norm():
    """The norm's scales must not all be 1: cosines of states before and after the norm would be equal."""
    model = models.build("llava")
    scales = torch.rand(model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0)) ** 4
    model.model.language_model.norm.weight.data.copy_(4 * scales)
    case, compared = CASES["dart"], 0
    for seed in range(4, 8):
        prompt = models.prompt_of("llava", 1, seed=seed)
        with prune(model, "dart", **case.options):
            out = models.generate(model, [prompt], 2)
        answer = out.sequences[0, len(prompt.ids) :].tolist()
        with contextlib.suppress(NearTie):
            close(models.logits_of(out)[0], expected_of(model, "llava", prompt, answer, case).logits)
            compared += 1
    assert compared > 1


@pytest.mark.parametrize("name", ["polymorphic", "sparsevlm", "dart"])
def test_a_prompt_that_ends_with_its_image_is_refused(name):
    """These methods score by the text after the image. A prompt of which nothing is dropped needs no such text."""
    model, case = models.shared("llava"), CASES[name]
    prompt, plain = models.prompt_of("llava", 1, seed=3), models.prompt_of("llava", 0, seed=1)
    prompt.ids = prompt.ids[: max(i for i, token in enumerate(prompt.ids) if token == models.IMAGE) + 1]
    with (
        prune(model, name, **case.options),
        pytest.raises(ValueError, match="text behind the last image, and row 1") as e,
    ):
        models.generate(model, [plain, prompt])
    one_sentence(e)
    everything = {"layers": [2], "ratios": [1.0]}
    with prune(model, name, **everything):
        models.generate(model, [plain, prompt])


# --- arguments ---


@pytest.mark.parametrize(
    ("method", "options", "match"),
    [
        ("nothing", {}, "name must be one of .*divprune, "),
        (3, {}, "method must be a name or a Method, got int"),
        ("divprune", {"budget": 8, "depth": 3}, "divprune: depth is not an option"),
        ("divprune", {}, "divprune: give budget or keep"),
        ("divprune", {"layers": [3]}, "divprune: layers is not an option"),
        ("divprune", {"budget": 8, "scope": "picture"}, "prune: scope must be one of image, crop, got 'picture'"),
        ("divprune", {"budget": 8, "positions": "new"}, "prune: positions must be one of original, contiguous"),
        ("fastv", {"layers": [6]}, "at most 5, the LLM has 6 layers, got 6"),
        ("fastv", {"score_from": "last"}, "prune: score_from must be one of layer, next"),
        ("fastv", {"scope": "crop"}, "prune: scope is not an option of fastv"),
        ("cdpruner", {"keep": 3}, "prune: relevance must be given with cdpruner, as a number for each visual token or"),
        ("uniform", {"keep": 3, "relevance": torch.ones(36)}, "prune: relevance is not an option of uniform"),
        ("dart", {"score_from": "next"}, "prune: score_from is not an option of dart, which goes by no attention"),
        (
            "polymorphic",
            {"budget": 9, "score_from": "next"},
            "score_from is not an option of polymorphic, which goes by",
        ),
        ("uniform", {"keep": 3, "score_from": "next"}, "prune: score_from is not an option of uniform"),
        (methods.create("uniform"), {"keep": 3, "seed": 1}, "options seed belong to the method"),
    ],
)
def test_arguments(method, options, match):
    with pytest.raises((TypeError, ValueError), match=match) as e:
        prune(models.shared("llava"), method, **options)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("name", methods.names())
def test_full_budgets_are_bit_equal(name, family):
    model = models.shared(family)
    prompts = [models.prompt_of(family, 1, seed=1), models.prompt_of(family, 0, seed=2)]
    plain = models.generate(model, prompts)
    everything = {"ratios": [1.0], "layers": [3]} if methods.create(name).site is None else {"keep": 1.0}
    everything |= {"rho": 1.0} if name == "sts" else {}
    everything |= {"relevance": functools.partial(slow.content, family=family)} if name == "cdpruner" else {}
    if family not in LLAVA and name == "prumerge":
        pytest.skip("refused, as test_generation_is_the_oracles sees")
    with prune(model, name, **everything):
        same = models.generate(model, prompts)
    assert torch.equal(models.logits_of(plain), models.logits_of(same))


@pytest.mark.parametrize(
    ("relevance", "error", "match"),
    [
        (torch.ones(35), ValueError, "must have a number for each of the 36 tokens that the images have .*, got 35"),
        ([torch.ones(30), 6], TypeError, "must be a tensor, a list of tensors or a function of one, got Tensor, int"),
        (lambda kind, arguments: None, TypeError, "or a function of one, got NoneType"),
    ],
)
def test_bad_relevance(relevance, error, match):
    model = models.shared("llava")
    with prune(model, "cdpruner", keep=5, relevance=relevance), pytest.raises(error, match=match) as e:
        models.generate(model, [models.prompt_of("llava", 1)])
    assert "\n" not in str(e.value)


def test_relevance_that_is_given_in_advance():
    """A tensor for all images, a tensor for each and a function give equal logits; by="text" gives others."""
    model, prompt = models.shared("llava"), models.prompt_of("llava", 2, seed=3)
    values = slow.content("image", models.batch(model, [prompt]))
    outs = []
    for relevance in (slow.content, values, list(values), lambda kind, arguments: list(values)):
        with prune(model, "cdpruner", keep=5, relevance=relevance):
            outs.append(models.logits_of(models.generate(model, [prompt])))
    assert all(torch.equal(out, outs[0]) for out in outs)
    with prune(model, "cdpruner", keep=5, by="text"):
        assert not torch.equal(models.logits_of(models.generate(model, [prompt])), outs[0])


def test_a_frozen_method_is_reusable():
    model, method = models.shared("llava"), methods.create("sts", prune_layer=3)
    prompt, budget = [models.prompt_of("llava", 1, seed=1)], {"budget": 8}
    outs = []
    for _ in range(2):
        with prune(model, method, **budget):
            outs.append(models.logits_of(models.generate(model, prompt)))
    assert torch.equal(*outs)
    assert dataclasses.is_dataclass(method)
