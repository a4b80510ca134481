"""Front end: one placeholder for each kept token, and image hashes that include the pruning options.

vLLM sizes a prompt before it encodes the image, so the number of kept tokens depends on the image size only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from vllm.multimodal import MULTIMODAL_REGISTRY

from . import layouts, settings

if TYPE_CHECKING:
    from vllm.inputs import MultiModalHashes
    from vllm.multimodal.inputs import MultiModalKwargsItems
    from vllm.multimodal.parse import MultiModalDataItems
    from vllm.multimodal.processing import (
        BaseDummyInputsBuilder,
        BaseProcessingInfo,
        InputProcessingContext,
        ProcessorInputs,
        PromptUpdate,
    )
    from vllm.multimodal.processing import BaseMultiModalProcessor as MixedInto
else:
    MixedInto = object

ModelClass: TypeAlias = Any  # a class in vLLM's model registry


class Prunes(MixedInto):
    """Mixin before a family's multimodal processor in the MRO."""

    family: layouts.Family

    def _get_prompt_updates(
        self,
        mm_items: "MultiModalDataItems",
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: "MultiModalKwargsItems",
    ) -> "Sequence[PromptUpdate]":
        config = self.info.get_hf_config()
        plan = settings.read(config).plan

        def kept(whole: Callable[[int], list[int]], index: int) -> list[int]:
            layout, tokens = self.family.of(config, out_mm_kwargs["image"][index]), whole(index)
            if len(tokens) != layout.item.num_tokens:
                raise RuntimeError(
                    f"sts_kernels: expected {layout.item.num_tokens} tokens of an image, got {len(tokens)}"
                )
            return tokens[: layout.kept(plan)]

        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return [x if x.modality != "image" else replace(x, replacement=partial(kept, x.replacement)) for x in updates]

    def _get_mm_hashes(self, inputs: "ProcessorInputs") -> "MultiModalHashes":
        """Adds the pruning options to each hash: servers may share a cache of encoder outputs or KV blocks."""
        tag = settings.read(self.info.get_hf_config()).tag()
        hashes = super()._get_mm_hashes(inputs)
        return {kind: [f"{value}-{tag}" for value in values] for kind, values in hashes.items()}


class ImagesOnly:
    """Mixin before a family's processing info in the MRO. Refuses videos, whose tokens would not be pruned."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None, "video": 0}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> None:
        return None  # None: vLLM counts the pruned tokens of a dummy image


def serves(family: layouts.Family) -> Callable[[ModelClass], ModelClass]:
    """Class decorator: registers the vLLM model's processor with the `Prunes` mixin for the pruned model class."""

    def decorate(model: ModelClass) -> ModelClass:
        vllm = model._processor_factory

        def information(ctx: "InputProcessingContext") -> "BaseProcessingInfo":
            """Writes the pruning options and the pruned architecture's name into the model's configuration.

            vLLM calls it while it builds the configuration, which it sends to all its processes. So processes without
            STS_KERNELS_KEEP in their environment prune too. Idempotent.
            """
            config = ctx.model_config.hf_config
            asked = settings.read(config)
            config.sts = asked.options
            config.architectures = [name if name.startswith("STS") else f"STS{name}" for name in config.architectures]
            if asked.positions == "original" and not family.grid:
                # vLLM calls get_mrope_input_positions if any part of the configuration has M-RoPE. The text
                # configuration is left unchanged.
                config.rope_parameters = {"mrope_section": [1, 0, 0]}
            found = vllm.info(ctx)
            return type("STSInformation", (ImagesOnly, type(found)), {})(ctx) if family.grid else found

        def processor(info: "BaseProcessingInfo", dummy_inputs: "BaseDummyInputsBuilder") -> Prunes:
            found = type(vllm.processor(info, dummy_inputs))
            return type(f"STS{found.__name__}", (Prunes, found), {"family": family})(info, dummy_inputs)

        model.family = family
        return MULTIMODAL_REGISTRY.register_processor(processor, info=information, dummy_inputs=vllm.dummy_inputs)(
            model
        )

    return decorate
