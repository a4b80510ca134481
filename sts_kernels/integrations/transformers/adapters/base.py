"""What differs between model families: where each signal of a pruning method is found, and how images lie in it.

To support a family write one `ModelAdapter` in a file of its own; docs/adding-a-model.md shows how.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .. import vision_attention
from ..visual_item import VisualItem, square


@dataclass
class EncodeCall:
    """One call of get_image_features or get_video_features: what the layout of its features can be read from."""

    kind: str  # "image" or "video"
    arguments: dict  # by name
    placeholder_runs: Callable[[str], list[int]]  # lengths of the runs of placeholders of a kind in the prompt


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
    prune_layer: default of methods with one prune layer that do not name their own; None: half the layers.
    """

    name: str
    model_types: Sequence[str]
    projector: Callable
    layout: Callable
    vision_attention: Callable
    per_feature: Callable
    prune_layer: int | None = None
    last_attention: Callable | None = None
    order: Callable | None = None
    features: Callable = lambda projector, x: x

    def attention(self, base, calls: list[tuple], shape: torch.Size) -> torch.Tensor:
        """(features,) float32: the attention that [CLS], or all tokens on average, pay each feature."""
        received = _joined([vision_attention.received(*call)[..., None] for call in calls])
        return self.per_feature(base, received, shape)[:, 0]

    def keys(self, base, calls: list[tuple], shape: torch.Size) -> torch.Tensor:
        """(features, D) float32: the keys of that attention, mean over heads."""
        keys = _joined([key.float().mean(1) for _, key, _ in calls])
        return self.per_feature(base, keys, shape)


def _joined(values: list[torch.Tensor]) -> torch.Tensor:
    """Of one call, (n, tokens, D), or of a call for each image, whose sizes differ: (1, tokens of all, D)."""
    return values[0] if len(values) == 1 else torch.cat([x.flatten(0, 1) for x in values])[None]


# --- what several families share ---


def multi_modal_projector(base):
    return base.multi_modal_projector


def tower_attention(tower, layer: int):
    """Attention of the encoder layer whose output is hidden_states[layer]."""
    encoder = getattr(tower, "vision_model", tower).encoder
    layers = encoder.layers if hasattr(encoder, "layers") else encoder.layer
    block = layers[layer if layer < 0 else layer - 1]
    return block.self_attn if hasattr(block, "self_attn") else block.attention


def feature_layer(base) -> int:
    layer = base.config.vision_feature_layer
    return layer if isinstance(layer, int) else layer[-1]


def llava_attention(base, kind):
    return tower_attention(base.vision_tower, feature_layer(base))


def llava_last_attention(base, kind):
    return tower_attention(base.vision_tower, -1)


def without_class_token(base, values, shape):
    """[CLS] may not be a feature itself."""
    return values[:, values.shape[1] - shape[1] :].flatten(0, 1)


def one_item_a_row(base, call, shape):
    """(images, tokens, C): every row is an image."""
    if call.arguments.get("image_sizes") is not None:
        raise NotImplementedError(
            "sts_kernels: LLaVA with a vision tower of variable resolution (Pixtral) is not supported"
        )
    return [VisualItem(call.kind, [shape[1]], [square(shape[1])]) for _ in range(shape[0])]
