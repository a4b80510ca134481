"""`ModelAdapter`: where a model family has each signal of a pruning method, and how images lie in its features.

To support a family, write one `ModelAdapter` in its own file; docs/adding-a-model.md shows how.
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
    """One call of get_image_features or get_video_features. `ModelAdapter.layout` reads the layout of the features from
    it."""

    kind: str  # "image" or "video"
    arguments: Kwargs
    placeholder_runs: Callable[[str], list[int]]  # kind -> lengths of the runs of placeholders in the prompt


@dataclass(frozen=True)
class EncoderShape:
    """Fixes every shape inside an encoder, together with the shape of the pixel values. Graphs are cached by both."""

    features: tuple[int, ...]  # shape of the features as `layout` gets it, without channels
    sizes: Any = None  # hashable: all else that the family's tables depend on, such as grids or image sizes


@dataclass(frozen=True)
class Features:
    """Output of an encoder. `rows` is the input of `ModelAdapter.projector`, as the model itself would call it.

    deepstack: further projectors, each with its input. An input has one row (or run of rows) for each of `rows`, in the
    same order. The output of projector i is added after layer i of the LLM.
    """

    rows: torch.Tensor
    deepstack: list[tuple[torch.nn.Module, torch.Tensor]] = field(default_factory=list)


class FixedEncoder:
    """How a family's encoder runs with fixed shapes: captured in a CUDA graph, or compiled whole.

    A family overrides `shape` and `run`; `usual`, `tables`, `calls` and `separator` where they apply. The caller does
    the rest, which is common to all families. It selects from `adapter.features(projector, rows)` and projects the kept
    rows (all rows, if the method selects projected features). It places each row by `adapter.layout` and
    `adapter.order`, and puts separators between them.
    """

    def shape(self, base: Model, call: EncodeCall) -> EncoderShape:
        """Shape of one batch of prompts, computed on the host.

        `call.arguments` holds the arguments of the model by name. Sizes and ids are host tensors. Pixel values may be
        on a device; only their shape may be read.

        Raises:
            NotImplementedError: the input cannot run with fixed shapes; the message names the reason.
        """
        raise NotImplementedError

    def usual(self, base: Model, images: int) -> tuple[EncoderShape, tuple[int, ...]] | None:
        """(EncoderShape, shape of the pixel values) of this number of images, where all images of the family have one
        size. None: image sizes vary, so no graph can be made before the first prompt."""
        return None

    def tables(self, base: Model, shape: EncoderShape) -> dict[str, torch.Tensor]:
        """Host tensors that depend on sizes alone: index tables, positions, bounds of windows.

        They are made once for each shape; `run` gets them on the device. A table whose name starts with "host_" stays
        on the host, for bounds that a kernel takes as Python numbers.
        """
        return {}

    def run(self, base: Model, tables: dict[str, torch.Tensor], pixel_values: torch.Tensor) -> Features:
        """Pixel values -> the projector's input, with fixed shapes.

        It reads no value back, makes no tensor from host values and copies nothing between devices.
        torch.compile(fullgraph=True) can trace it.
        """
        raise NotImplementedError

    def calls(self, base: Model, shape: EncoderShape, calls: list[AttentionCall]) -> list[AttentionCall]:
        """Splits attention calls into sets of tokens that attend to each other, by host sizes only.

        calls: (query, key, scale) of each call of `adapter.vision_attention` in `run` -> one call for all images of one
        size, or one call for each image.
        """
        return calls

    def separator(self, base: Model) -> torch.Tensor | None:
        """(D,): LLM input at tokens that stand for no feature (`feature_of_token` -1). None: the family has none."""
        return None


@dataclass(frozen=True)
class ModelAdapter:
    """Where a model family has each signal, and how images lie in its features.

    name, model_types: common name of the family, and `config.model_type` of its models.
    projector: base model -> the module that turns features into LLM tokens, each from its own rows.
    layout: (base model, call, shape of the features) -> the images in them, in order.
    vision_attention: (base model, kind) -> the encoder's attention module whose query and key methods use.
    per_feature: (base model, values (n, tokens, D) of encoder tokens, shape of the features) -> (features, D): the
        values mapped to the features.
    features: (the projector, its input) -> the features that methods select from, one row per token. The input rows of
        a token are adjacent.
    last_attention: as `vision_attention`, of the encoder's last layer, for methods defined by its [CLS] token. None:
        the family has no [CLS] token, or its features are not the encoder's tokens.
    order: (base model, call) -> (features,) int64: for each row of the projector's input, its index in the order in
        which the tokens of an image enter the LLM. None: the same order.
    fixed_encoder: how the encoder runs inside a graph. None: the models cannot be compiled.
    blends: whether `layout` gives items with a `blend`: the model interpolates between projector and LLM.
    prune_layer: default of methods with one prune layer that do not name their own. None: half the layers.
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
    blends: bool = False

    @property
    def one_row(self) -> bool:
        """Whether a token is one row of the projector's input."""
        return self.features is ModelAdapter.features and not self.blends

    def attention(self, base: Model, calls: list[AttentionCall], shape: torch.Size) -> torch.Tensor:
        """(features,) float32: attention that each feature receives from [CLS], or from all tokens on average."""
        received = _joined([vision_attention.received(*call)[..., None] for call in calls])
        return self.per_feature(base, received, shape)[:, 0]

    def keys(self, base: Model, calls: list[AttentionCall], shape: torch.Size) -> torch.Tensor:
        """(features, D) float32: keys of these attention calls, mean over heads."""
        keys = _joined([key.float().mean(1) for _, key, _ in calls])
        return self.per_feature(base, keys, shape)


def _joined(values: list[torch.Tensor]) -> torch.Tensor:
    """One call: (n, tokens, D). One call per image, of different sizes: (1, tokens of all images, D)."""
    return values[0] if len(values) == 1 else torch.cat([x.flatten(0, 1) for x in values])[None]


# --- what several families share ---


def multi_modal_projector(base: Model) -> torch.nn.Module:
    return base.multi_modal_projector


def vision_model(tower: Model) -> Model:
    """The encoder itself. Some versions of transformers wrap it in another class."""
    return getattr(tower, "vision_model", tower)


def tower_attention(tower: Model, layer: int) -> torch.nn.Module:
    """Attention of the encoder layer whose output is hidden_states[layer]."""
    encoder = vision_model(tower).encoder
    layers = encoder.layers if hasattr(encoder, "layers") else encoder.layer
    if layer == 0 or layer < -len(layers):
        raise NotImplementedError(
            f"sts_kernels: no attention made the features of vision_feature_layer {layer}, the encoder's embeddings; "
            "choose a method that looks at features alone"
        )
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
    """(n, tokens, D) -> (features, D), without a [CLS] token that is no feature."""
    return values[:, values.shape[1] - shape[1] :].flatten(0, 1)


def one_item_a_row(base: Model, call: EncodeCall, shape: torch.Size) -> list[VisualItem]:
    """(images, tokens, C): every row is an image."""
    if call.arguments.get("image_sizes") is not None:
        raise NotImplementedError(
            "sts_kernels: LLaVA with a vision tower of variable resolution (Pixtral) is not supported"
        )
    return [VisualItem(call.kind, [shape[1]], [square(shape[1])]) for _ in range(shape[0])]


def frames_of(call: EncodeCall) -> int:
    """Frames of each clip, from pixel values (clips, frames, 3, H, W). Some models of transformers 4 call them
    pixel_values."""
    pixels = call.arguments.get("pixel_values_videos")
    return int((call.arguments["pixel_values"] if pixels is None else pixels).shape[1])


def clips_of_frames(call: EncodeCall, shape: torch.Size) -> list[VisualItem]:
    """(frames of all clips, tokens, C): every frame is a crop."""
    frames, (rows, tokens) = frames_of(call), shape[:2]
    return [VisualItem("video", [tokens] * frames, [square(tokens)] * frames) for _ in range(rows // frames)]


class FixedLlavaEncoder(FixedEncoder):
    """Pixel values (images, 3, H, W): every row is an image."""

    def shape(self, base: Model, call: EncodeCall) -> EncoderShape:
        has_embeddings = hasattr(vision_model(base.vision_tower), "embeddings")
        if call.arguments.get("image_sizes") is not None or not has_embeddings:
            raise NotImplementedError("images of variable resolution (Pixtral)")
        return EncoderShape((call.arguments["pixel_values"].shape[0], tower_tokens(base, base.vision_tower)))

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


def tower_tokens(base: Model, tower: Model) -> int:
    """Features of a crop."""
    return vision_model(tower).embeddings.num_positions - class_token_dropped(base)


def tower_features(base: Model, tower: Model, pixel_values: torch.Tensor, whole: bool = False) -> torch.Tensor:
    """(n, 3, H, W) -> (n, tokens, C): hidden states of the projector's feature layers, concatenated along C.

    whole: keep [CLS], whatever the configuration says.
    """
    layers = base.config.vision_feature_layer
    states = tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    first = int(not whole and class_token_dropped(base))
    found = [states[layer][:, first:] for layer in ([layers] if isinstance(layers, int) else layers)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)
