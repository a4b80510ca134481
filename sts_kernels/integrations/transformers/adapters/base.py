"""What differs between model families: where each signal of a pruning method is found, and how images lie in it.

To support a family write one `ModelAdapter` in a file of its own; docs/adding-a-model.md shows how.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import vision_attention
from ..untyped import Kwargs, Model
from ..vision_attention import AttentionCall
from ..visual_item import VisualItem, square


@dataclass
class EncodeCall:
    """One call of get_image_features or get_video_features: what the layout of its features can be read from."""

    kind: str  # "image" or "video"
    arguments: Kwargs
    placeholder_runs: Callable[[str], list[int]]  # lengths of the runs of placeholders of a kind in the prompt


@dataclass(frozen=True)
class EncoderShape:
    """What fixes every shape inside an encoder, beside the shape of the pixel values. Graphs are kept by it."""

    features: tuple[int, ...]  # of what the projector gets, as `layout` is told it, without channels
    sizes: Any = None  # whatever else the family's tables are made from, hashable: grids, sizes of images


@dataclass(frozen=True)
class Features:
    """What an encoder hands on. `rows` is the input of `ModelAdapter.projector`, as the model itself would call it.

    deepstack: further projectors, each with its input: one row (or run of rows) for each of `rows`, in the same order.
    The i-th one's output is added behind the LLM's i-th layer.
    """

    rows: torch.Tensor
    deepstack: list[tuple[torch.nn.Module, torch.Tensor]] = field(default_factory=list)


class FixedEncoder:
    """How a family's encoder runs where shapes never change: captured in a CUDA graph, or compiled whole.

    A family writes `shape` and `run`; `tables`, `calls` and `separator` where it has any. Everything else is common to
    all families and done by the caller: it selects from `adapter.features(projector, rows)`, projects the kept rows
    alone, gives each the place that `adapter.layout` and `adapter.order` say, and puts separators between them.
    """

    def shape(self, base: Model, call: EncodeCall) -> EncoderShape:
        """Of one batch of prompts, on the host. `call.arguments` has what the model is called with, by name: sizes and
        ids are host tensors, pixel values may be on a device, and only their shape may be looked at.

        Raises:
            NotImplementedError: one sentence that says what cannot run with fixed shapes.
        """
        raise NotImplementedError

    def usual(self, base: Model, images: int) -> tuple[EncoderShape, tuple[int, ...]] | None:
        """The shape of so many images, and of their pixel values, where all images have one size. None: they have any,
        and graphs are made when a size is first met."""
        return None

    def tables(self, base: Model, shape: EncoderShape) -> dict[str, torch.Tensor]:
        """Host tensors that follow from sizes alone: index tables, positions, bounds of windows. Made once for each
        shape; `run` gets them on the device. A table whose name starts with "host_" stays on the host: for bounds
        that a kernel is given as Python numbers."""
        return {}

    def run(self, base: Model, tables: dict[str, torch.Tensor], pixel_values: torch.Tensor) -> Features:
        """Pixels to the projector's input, with fixed shapes: no value is read, no tensor is made from host values or
        copied between devices, and torch.compile(fullgraph=True) can trace it."""
        raise NotImplementedError

    def calls(self, base: Model, shape: EncoderShape, calls: list[AttentionCall]) -> list[AttentionCall]:
        """(query, key, scale) as the attention of `adapter.vision_attention` was called in `run` -> the same for what
        attends to itself in it: one for all images of one size, or one for each image. By sizes on the host only."""
        return calls

    def separator(self, base: Model) -> torch.Tensor | None:
        """(D,): what the LLM gets at tokens that are no piece of an image (`feature_of_token` -1)."""
        return None


@dataclass(frozen=True)
class ModelAdapter:
    """
    name, model_types: what people call the family, and `config.model_type` of its models.
    projector: base model -> the module that turns features into LLM tokens, each from rows of its own.
    layout: (base model, call, shape of the features) -> the images in them, in order.
    vision_attention: (base model, kind) -> the attention module of the encoder that methods look at.
    per_feature: (base model, values (n, tokens, D) of its tokens, shape of the features) -> (features, D): values of
        the encoder's tokens, brought to the rows that the projector gets.
    features: (the projector, its input) -> what methods select from, one row for each token; the rows of the input that
        make up a token follow one another.
    last_attention: the same of the encoder's last layer, for methods that are defined by its [CLS] token. None: the
        family has none, or its features are not the encoder's tokens.
    order: (base model, call) -> (features,) int64: for each row that the projector gets, its number in the order in
        which the tokens of an image enter the LLM. None: the same order.
    fixed_encoder: how the encoder runs inside a graph. None: such a model cannot be compiled.
    prune_layer: default of methods with one prune layer that do not name their own; None: half the layers.
    """

    name: str
    model_types: Sequence[str]
    projector: Callable[[Model], torch.nn.Module]
    layout: Callable[[Model, EncodeCall, torch.Size], list[VisualItem]]
    vision_attention: Callable[[Model, str], torch.nn.Module]
    per_feature: Callable[[Model, torch.Tensor, torch.Size], torch.Tensor]
    prune_layer: int | None = None
    last_attention: Callable[[Model, str], torch.nn.Module] | None = None
    order: Callable[[Model, EncodeCall], torch.Tensor] | None = None
    features: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor] = lambda projector, x: x
    fixed_encoder: FixedEncoder | None = None

    def attention(self, base: Model, calls: list[AttentionCall], shape: torch.Size) -> torch.Tensor:
        """(features,) float32: the attention that [CLS], or all tokens on average, pay each feature."""
        received = _joined([vision_attention.received(*call)[..., None] for call in calls])
        return self.per_feature(base, received, shape)[:, 0]

    def keys(self, base: Model, calls: list[AttentionCall], shape: torch.Size) -> torch.Tensor:
        """(features, D) float32: the keys of that attention, mean over heads."""
        keys = _joined([key.float().mean(1) for _, key, _ in calls])
        return self.per_feature(base, keys, shape)


def _joined(values: list[torch.Tensor]) -> torch.Tensor:
    """Of one call, (n, tokens, D), or of a call for each image, whose sizes differ: (1, tokens of all, D)."""
    return values[0] if len(values) == 1 else torch.cat([x.flatten(0, 1) for x in values])[None]


# --- what several families share ---


def multi_modal_projector(base: Model) -> torch.nn.Module:
    return base.multi_modal_projector


def vision_model(tower: Model) -> Model:
    """The encoder itself: some versions have a class around it."""
    return getattr(tower, "vision_model", tower)


def tower_attention(tower: Model, layer: int) -> torch.nn.Module:
    """Attention of the encoder layer whose output is hidden_states[layer]."""
    encoder = vision_model(tower).encoder
    layers = encoder.layers if hasattr(encoder, "layers") else encoder.layer
    block = layers[layer if layer < 0 else layer - 1]
    return block.self_attn if hasattr(block, "self_attn") else block.attention


def feature_layer(base: Model) -> int:
    layer = base.config.vision_feature_layer
    return layer if isinstance(layer, int) else layer[-1]


def llava_attention(base: Model, kind: str) -> torch.nn.Module:
    return tower_attention(base.vision_tower, feature_layer(base))


def llava_last_attention(base: Model, kind: str) -> torch.nn.Module:
    return tower_attention(base.vision_tower, -1)


def without_class_token(base: Model, values: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[CLS] may not be a feature itself."""
    return values[:, values.shape[1] - shape[1] :].flatten(0, 1)


def one_item_a_row(base: Model, call: EncodeCall, shape: torch.Size) -> list[VisualItem]:
    """(images, tokens, C): every row is an image."""
    if call.arguments.get("image_sizes") is not None:
        raise NotImplementedError(
            "sts_kernels: LLaVA with a vision tower of variable resolution (Pixtral) is not supported"
        )
    return [VisualItem(call.kind, [shape[1]], [square(shape[1])]) for _ in range(shape[0])]


class FixedLlavaEncoder(FixedEncoder):
    """(images, 3, H, W): every row is an image."""

    def shape(self, base: Model, call: EncodeCall) -> EncoderShape:
        has_embeddings = hasattr(vision_model(base.vision_tower), "embeddings")
        if call.arguments.get("image_sizes") is not None or not has_embeddings:
            raise NotImplementedError("images of variable resolution (Pixtral)")
        return EncoderShape((call.arguments["pixel_values"].shape[0], tower_tokens(base, call, base.vision_tower)))

    def usual(self, base: Model, images: int) -> tuple[EncoderShape, tuple[int, ...]] | None:
        side = base.config.vision_config.image_size
        pixels = torch.empty(images, 3, side, side, device="meta")
        try:
            return self.shape(base, EncodeCall("image", {"pixel_values": pixels}, _no_prompt)), tuple(pixels.shape)
        except NotImplementedError:
            return None

    def run(self, base: Model, tables: dict[str, torch.Tensor], pixel_values: torch.Tensor) -> Features:
        return Features(tower_features(base, base.vision_tower, pixel_values))


def _no_prompt(kind: str) -> list[int]:
    return []


def class_token_dropped(base: Model) -> bool:
    return base.config.vision_feature_select_strategy == "default"


def tower_tokens(base: Model, call: EncodeCall, tower: Model) -> int:
    """Features of a crop, if they are those of the configuration."""
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        given, own = call.arguments.get(name), getattr(base.config, name)
        if given is not None and given != own:
            raise NotImplementedError(f"{name} {given!r}, where the configuration has {own!r}")
    return vision_model(tower).embeddings.num_positions - class_token_dropped(base)


def tower_features(base: Model, tower: Model, pixel_values: torch.Tensor, whole: bool = False) -> torch.Tensor:
    """(n, 3, H, W) -> (n, tokens, C): of the layers that the projector takes its features from, side by side. whole:
    with [CLS], whatever the configuration says."""
    layers = base.config.vision_feature_layer
    states = tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    first = int(not whole and class_token_dropped(base))
    found = [states[layer][:, first:] for layer in ([layers] if isinstance(layers, int) else layers)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)
