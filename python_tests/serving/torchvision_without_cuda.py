"""Lets PyPI's torchvision, which is built for CUDA, be imported beside a CPU torch, as vLLM's processors do.

Its library does not load there, and its Python part then registers fake kernels of two ops that do not exist: this
defines them before. bench/serving_check.sh puts it into site-packages, beside a .pth file that imports it.
"""

import sys
from importlib.machinery import PathFinder


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        Finder.library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            Finder.library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return PathFinder.find_spec(name, path)


sys.meta_path.insert(0, Finder())
