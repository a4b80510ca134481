"""Workers: vLLM's models, which select image features before these become tokens of the LLM.

A token's position within its image is appended to its embedding, as vLLM does for pruned videos: DIGITS extra channels,
digits that every dtype holds exactly. `get_mrope_input_positions` gives all tokens of an image the position of its
first token. `embed_input_ids` writes the offsets of a step into a buffer; `forward` adds them to the positions. Neither
needs to know the request of a token. Buffer and sum keep their addresses, as piecewise CUDA graphs require.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from vllm.distributed import get_pp_group, get_tp_group
from vllm.model_executor.models import llava, llava_next, qwen2_5_vl, qwen3_vl

from ... import __version__
from ...methods._packed import offsets
from ..transformers import vision_attention, vision_pruning
from ..transformers.adapters import adapter_of
from ..transformers.untyped import Args, Kwargs, Model
from ..transformers.vision_attention import AttentionCall
from . import layouts, logger
from .layouts import Layout
from .processor import serves
from .settings import Settings, read, refuse

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.models.interfaces import SupportsMultiModal as MixedInto
    from vllm.multimodal.inputs import MultiModalFeatureSpec
    from vllm.sequence import IntermediateTensors
else:
    MixedInto = object

ImageInput: TypeAlias = Any  # a vLLM model's own input type: tensors of a batch of images, by name

BASE, DIGITS = 128, 6  # two digits per axis, three axes: positions below 2^15; bfloat16 is exact for 0 to 256
ROTATIONS = ("default", "linear", "llama3")  # rope types whose cos/sin table may have any length


def batches(sizes: Sequence[int], budget: int) -> Iterator[slice]:
    """Splits items into consecutive slices of total size <= budget; a larger item gets a slice of its own."""
    start, total = 0, 0
    for i, size in enumerate([*sizes, budget + 1]):  # the extra item closes the last slice
        total += size
        if i > start and total > budget:
            yield slice(start, i)
            start, total = i, size


def numbered(parts: list[torch.Tensor], sizes: Sequence[int], device: torch.device) -> torch.Tensor:
    """Concatenates per-item indices, shifted by the items' offsets; -1 stays -1."""
    shifted = [torch.where(part < 0, part, part + start) for part, start in zip(parts, offsets(sizes), strict=False)]
    return torch.cat(shifted).to(device, non_blocking=True)


def captures(asked: Settings) -> bool:
    """Whether the method looks at query and key of the encoder's attention."""
    return bool(asked.method.signals & {"attention", "keys"})


class Prunes(MixedInto):
    """Mixin before a vLLM model in the MRO. `processor.serves` sets `family`."""

    family: layouts.Family
    places: torch.Tensor | None  # (2, 3, tokens) int64: position offsets of a step, and positions + offsets
    supports_tower_connector_lora = False  # that LoRA path infers encoder rows from prompt tokens

    def __init__(self, *, vllm_config: "VllmConfig", prefix: str = ""):
        self.check(vllm_config, asked := read(vllm_config.model_config.hf_config))
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        adapter = adapter_of(self.family.adapter)
        assert adapter is not None  # each family in `layouts` has one
        self.asked, self.adapter = asked, adapter
        # vLLM counts pruned tokens against this budget, but the encoder runs on whole images: so a call is split.
        self.encoder_budget = vllm_config.scheduler_config.max_num_encoder_input_tokens
        tokens = vllm_config.scheduler_config.max_num_batched_tokens + 1
        places = torch.zeros(2, 3, tokens, dtype=torch.int64) if asked.positions == "original" else None
        self.register_buffer("places", places, persistent=False)
        self.calls: list[AttentionCall] = []  # captured attention calls of the encoder
        if captures(asked):
            self.attention_module().register_forward_pre_hook(self.capture, with_kwargs=True)
        if get_tp_group().rank_in_group == 0 and get_pp_group().is_first_rank:
            logger.info("sts_kernels %s: %s", __version__, asked)

    def check(self, vllm_config: "VllmConfig", asked: Settings) -> None:
        """Raises Refused for configurations that would be pruned wrongly."""
        config, multimodal = vllm_config.model_config.hf_config, vllm_config.model_config.multimodal_config
        parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
        text = config.get_text_config()
        rotation = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
        moved = asked.positions == "contiguous"
        connector = vllm_config.kv_transfer_config or vllm_config.ec_transfer_config
        backend = getattr(multimodal.mm_encoder_attn_backend, "name", None)
        turned_on = ", which this KV or encoder cache connector turns on" if connector else ""
        flashinfer = backend == "FLASHINFER" and captures(asked)
        reasons = {
            f"--enable-mm-embeds{turned_on}": multimodal.enable_mm_embeds,
            f"--mm-encoder-attn-backend {backend} for {asked.method.name}": flashinfer,
            "VLLM_USE_RUST_FRONTEND": os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"),
            "--video-pruning-rate": multimodal.is_multimodal_pruning_enabled(),
            "--mm-encoder-tp-mode data": multimodal.mm_encoder_tp_mode == "data",
            "compile_mm_encoder": compilation.compile_mm_encoder,
            "cudagraph_mm_encoder": compilation.cudagraph_mm_encoder,
            f"{asked.method.name}, which merges features,": asked.method.merges and self.family is layouts.QWEN3_VL,
            'positions="contiguous"': moved and self.family.grid,
        }
        original = {
            f"an LLM with a sliding window of {window}": window is not None,
            f"an LLM with rotary positions of type {rotation}": not self.family.grid and rotation not in ROTATIONS,
            "--pipeline-parallel-size above 1": parallel.pipeline_parallel_size > 1,
            "microbatching (--enable-dbo, --ubatch-size)": parallel.use_ubatching,
            "speculative decoding": vllm_config.speculative_config is not None,
            "--enable-prompt-embeds": vllm_config.model_config.enable_prompt_embeds,
        }
        refuse("the vLLM plugin does not support %s", reasons)
        refuse('the vLLM plugin does not support %s with positions="original"', {} if moved else original)

    def attention_module(self) -> torch.nn.Module:
        attention: Model = self.adapter.vision_attention(self, "image")
        return attention.attn

    def capture(self, module: Model, args: Args, kwargs: Kwargs) -> None:
        query, key = args[:2] if args else (kwargs["query"], kwargs["key"])
        query, key = (x.reshape(*x.shape[:2], -1, module.head_size).transpose(1, 2) for x in (query, key))
        about = {"scaling": module.scale, "cu_seq_lens_q": kwargs.get("cu_seqlens")}
        self.calls += vision_attention.calls_of(query, key, about)

    # --- from pixels to tokens ---

    def project(self, features: torch.Tensor) -> torch.Tensor:
        return self.adapter.projector(self)(features)

    def encode(
        self, image_input: ImageInput, part: slice, found: list[Layout]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Encodes a part of the images; `found` holds their layouts.

        Returns:
            The projector's input features, and the projected tokens; None if only kept features are projected.
        """
        raise NotImplementedError

    def _process_image_input(self, image_input: ImageInput) -> Sequence[torch.Tensor]:
        sizes = image_input[self.family.size].tolist() if self.family.size else [()] * len(image_input["pixel_values"])
        found = [self.family.layout(self.config, *size) for size in sizes]
        parts = batches([layout.item.num_features for layout in found], self.encoder_budget)
        return [embeds for part in parts for embeds in self.pruned(image_input, part, found[part])]

    def pruned(self, image_input: ImageInput, part: slice, found: list[Layout]) -> Sequence[torch.Tensor]:
        """Encodes a part of the images and selects from them together -> the tokens of each; `found`: their layouts."""
        items = vision_pruning.with_budgets([layout.item for layout in found], self.asked.plan)
        features, tokens = self.encode(image_input, part, found)
        attention, keys = self.signals(features)
        features = features.flatten(0, -2)
        before = self.asked.method.site == "encoder"  # the projector
        if before:
            pool = features
        else:
            tokens = self.project(features) if tokens is None else tokens
            pool = tokens[:, : self.config.get_text_config().hidden_size]
        kept = vision_pruning.select(self.asked.method, self.asked.scope, pool, items, attention, keys)
        if kept is None:
            used = [torch.cat(item.candidates()) for item in items]
            kept = vision_pruning.Kept(numbered(used, [item.num_features for item in items], pool.device))
        group = get_tp_group()  # all ranks select from equal features; broadcasting rank 0's picks guarantees agreement
        rows = group.broadcast(kept.rows, src=0)
        if kept.values is None:
            embeds = self.project(features[rows]) if tokens is None else tokens[rows]
        else:
            embeds = group.broadcast(kept.values, src=0).to(features.dtype)
            embeds = self.project(embeds) if before else embeds
        return self.laid_out(embeds, rows, found)

    def signals(self, features: torch.Tensor) -> list[torch.Tensor | None]:
        """[attention, keys] of the encoder call that gave `features`. None: the method does not need it."""
        group, (calls, self.calls) = get_tp_group(), (self.calls, [])
        found: list[torch.Tensor | None] = []
        for name, find in (("attention", self.adapter.attention), ("keys", self.adapter.keys)):
            signal = None
            if name in self.asked.method.signals:  # mean over heads; each rank has equally many
                signal = group.all_reduce(find(self, calls, features.shape).contiguous()) / group.world_size
            found.append(signal)
        return found

    def laid_out(self, embeds: torch.Tensor, rows: torch.Tensor, found: list[Layout]) -> Sequence[torch.Tensor]:
        """Tokens of each image in image order, separators inserted. rows: feature index of each embedding."""
        sizes = [layout.item.num_tokens for layout in found]
        separators = [(layout.feature_of_token < 0).nonzero()[:, 0] for layout in found]
        tokens = numbered([layout.token_of_feature for layout in found], sizes, rows.device)[rows]
        if any(map(len, separators)):
            tokens = torch.cat([tokens, numbered(separators, sizes, rows.device)])
            embeds = torch.cat([embeds, self.image_newline.to(embeds.dtype).expand(len(tokens) - len(rows), -1)])
        tokens, order = tokens.sort()
        embeds = embeds[order]
        if self.places is not None:
            place = torch.cat([layout.positions for layout in found]).to(rows.device, non_blocking=True)[tokens]
            embeds = torch.cat([embeds, (place // BASE).to(embeds.dtype), (place % BASE).to(embeds.dtype)], 1)
        return embeds.split([layout.kept(self.asked.plan) for layout in found])

    # --- from tokens to the LLM ---

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list["MultiModalFeatureSpec"]
    ) -> tuple[torch.Tensor, int]:
        """Positions of the prompt's tokens in the unpruned prompt; all tokens of an image get its first position."""
        whole: list[int] = []  # the unpruned prompt
        source: list[int] = []  # index into `whole` of each token of the pruned prompt
        spread, at = [], 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            start, length = feature.mm_position.offset, feature.mm_position.length
            layout = self.family.of(self.config, feature.data)
            if length != layout.kept(self.asked.plan):
                raise RuntimeError(
                    f"sts_kernels: the front end sent {length} tokens of an image where {layout.kept(self.asked.plan)} "
                    f"are kept: is the plugin loaded there?"
                )
            tokens = layout.item.num_tokens
            source += range(len(whole), len(whole) + start - at)
            whole += input_tokens[at:start]
            source += [len(whole)] * length
            spread.append(replace(feature, mm_position=replace(feature.mm_position, offset=len(whole), length=tokens)))
            whole += [input_tokens[start]] * tokens
            at = start + length
        source += range(len(whole), len(whole) + len(input_tokens) - at)
        whole += input_tokens[at:]
        plain = torch.arange(len(whole)).expand(3, -1), 0
        positions, delta = super().get_mrope_input_positions(whole, spread) if self.family.grid else plain
        return positions[:, source], delta + len(whole) - len(input_tokens)

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor] | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.places is not None:
            added = self.places[0].zero_()
            if multimodal_embeddings is not None and len(multimodal_embeddings):
                high, low = torch.cat([x[:, -DIGITS:] for x in multimodal_embeddings]).long().chunk(2, 1)
                added[:, : len(input_ids)][:, is_multimodal] = (high * BASE + low).T
                multimodal_embeddings = [x[:, :-DIGITS] for x in multimodal_embeddings]
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: "IntermediateTensors | None" = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> "torch.Tensor | IntermediateTensors":
        if self.places is not None:
            added, total = self.places[:, :, : positions.shape[1]]
            torch.add(positions, added, out=total)
            positions = total if self.family.grid else total[0]
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)


# --- families ---


class Llava(Prunes):
    """Families with one-axis rotary positions. supports_mrope lets vLLM ask the model for its positions."""

    supports_mrope = True

    def check(self, vllm_config: "VllmConfig", asked: Settings) -> None:
        """Also lengthens the cos/sin table to the longest prompt before pruning."""
        super().check(vllm_config, asked)
        model, config = vllm_config.model_config, vllm_config.model_config.hf_config
        sizes = config.image_grid_pinpoints if self.family.size else [()]
        found = [self.family.layout(config, *size) for size in sizes]
        most, least = max(x.item.num_tokens for x in found), min(x.kept(asked.plan) for x in found)
        images = min(model.max_model_len // least, model.multimodal_config.get_limit_per_prompt("image"))
        text = config.get_text_config()
        text.max_position_embeddings = max(text.max_position_embeddings, model.max_model_len + images * most)

    def attention_module(self) -> torch.nn.Module:
        return self.vision_tower.vision_model.encoder.layers[-1].self_attn.attn  # the last layer that vLLM builds

    def encode(self, image_input: ImageInput, part: slice, found: list[Layout]) -> tuple[torch.Tensor, None]:
        pixels = image_input["pixel_values"][part]
        if self.family.size:  # vLLM may pad a request's images to an equal number of crops
            pixels = torch.cat([x[: len(layout.item.crops)] for x, layout in zip(pixels, found, strict=True)])
        return self._image_pixels_to_features(self.vision_tower, pixels), None


class Qwen(Prunes):
    """The features are the merger's input. The merger is part of the encoder and runs on all features."""

    def encode(self, image_input: ImageInput, part: slice, found: list[Layout]) -> tuple[torch.Tensor, torch.Tensor]:
        grids = image_input["image_grid_thw"]
        features: list[torch.Tensor] = []
        ends = offsets(grids.prod(-1).tolist())
        pixels = image_input["pixel_values"][ends[part.start] : ends[part.stop]]
        given = {"type": "pixel_values", "pixel_values": pixels, "image_grid_thw": grids[part]}
        projector, read_features = self.adapter.projector(self), self.adapter.features
        with projector.register_forward_pre_hook(lambda module, args: features.append(read_features(module, args[0]))):
            images = super(Prunes, self)._process_image_input(given)
        return features[0], torch.cat([x[y.token_of_feature.to(x.device)] for x, y in zip(images, found, strict=True)])


@serves(layouts.LLAVA)
class STSLlava(Llava, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5."""


@serves(layouts.LLAVA_NEXT)
class STSLlavaNext(Llava, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""


@serves(layouts.QWEN2_5_VL)
class STSQwen2_5_VL(Qwen, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


@serves(layouts.QWEN3_VL)
class STSQwen3VL(Qwen, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL."""
