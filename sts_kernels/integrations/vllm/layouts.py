"""Maps an image's tokens to rows of its encoder's features, from the image size alone. Does not import vLLM.

Front end and workers call the same functions, so they agree on all token counts.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from ...methods import Plan
from ..transformers.adapters.qwen_vl import window_order
from ..transformers.untyped import Config
from ..transformers.visual_item import VisualItem, square
from .settings import refuse


@dataclass(frozen=True)
class Layout:
    """Token layout of one image.

    Attributes:
        item: the image as a `VisualItem` of the transformers integration.
        grid: (rows, columns) of the tokens, for LLMs with three-axis rotary positions (M-RoPE). None: one axis.
    """

    item: VisualItem
    grid: tuple[int, int] | None = None

    @property
    def feature_of_token(self) -> torch.Tensor:
        """(num_tokens,) int64: feature of each token, -1: separator."""
        assert self.item.feature_of_token is not None  # all layout functions below set it
        return self.item.feature_of_token

    @functools.cached_property
    def token_of_feature(self) -> torch.Tensor:
        """(num_features,) int64: token of each feature, -1: the model discards the feature."""
        order = self.feature_of_token
        used = (order >= 0).nonzero()[:, 0]
        return torch.full((self.item.num_features,), -1).index_copy_(0, order[used], used)

    @functools.cached_property
    def positions(self) -> torch.Tensor:
        """(num_tokens, 3) int64: rotary positions relative to the image's first token."""
        token = torch.arange(self.item.num_tokens)
        if self.grid is None:
            return token[:, None].expand(-1, 3)
        return torch.stack([torch.zeros_like(token), token // self.grid[1], token % self.grid[1]], 1)

    def kept(self, plan: Plan) -> int:
        """Tokens of the image after pruning; separators are always kept."""
        return plan.keep(self.item.num_visual) + self.item.num_tokens - self.item.num_visual


def side(config: Config) -> int:
    return config.vision_config.image_size // config.vision_config.patch_size


def llava(config: Config) -> Layout:
    refuse("%s is not supported", {"LLaVA with a Pixtral tower": config.vision_config.model_type == "pixtral"})
    class_token = config.vision_config.model_type == "clip_vision_model"
    tokens = side(config) ** 2 + class_token - (config.vision_feature_select_strategy == "default")
    return Layout(VisualItem("image", [tokens], [square(tokens)], torch.arange(tokens)))


def llava_next(config: Config, height: int, width: int) -> Layout:
    """Base image first, then the grid of crops without padding, with a newline token after each row."""
    n, pixels = side(config), config.vision_config.image_size
    rows, columns = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, pixels)
    crops = 1 + rows * columns
    numbers = torch.arange(crops * n * n).view(crops, n, n)
    picture = numbers[1:].view(rows, columns, n, n).transpose(1, 2).reshape(1, rows * n, columns * n)
    picture = torch.nn.functional.pad(unpad_image(picture, (height, width))[0], (0, 1), value=-1)
    order = torch.cat([numbers[0].flatten(), picture.flatten()])
    return Layout(VisualItem("image", [n * n] * crops, [(n, n)] * crops, order))


def qwen_vl(config: Config, frames: int, height: int, width: int) -> Layout:
    """One image of Qwen-VL. Qwen2.5-VL orders its features by attention window."""
    vision = config.vision_config
    grid = height // vision.spatial_merge_size, width // vision.spatial_merge_size
    tokens, windowed = grid[0] * grid[1], hasattr(vision, "window_size")
    order = window_order(vision, [[frames, height, width]]).argsort() if windowed else torch.arange(tokens)
    return Layout(VisualItem("image", [tokens], [grid], order), grid)


class Family(NamedTuple):
    """A model family.

    Attributes:
        adapter: `config.model_type`, the key of the transformers integration's adapter.
        layout: (config, *size) -> Layout.
        size: field of vLLM's processor output that holds an image's size. None: all images have one layout.
        grid: whether the LLM has three-axis rotary positions (M-RoPE). These families also accept videos.
    """

    adapter: str
    layout: Callable[..., Layout]
    size: str | None = None
    grid: bool = False

    def of(self, config: Config, data: Mapping[str, Any]) -> Layout:
        """Layout of one image. data: output of vLLM's processor for the image."""
        return self.layout(config, *(data[self.size].data.flatten().tolist() if self.size else ()))


LLAVA = Family("llava", llava)
LLAVA_NEXT = Family("llava_next", llava_next, "image_sizes")
QWEN2_5_VL = Family("qwen2_5_vl", qwen_vl, "image_grid_thw", True)
QWEN3_VL = Family("qwen3_vl", qwen_vl, "image_grid_thw", True)
