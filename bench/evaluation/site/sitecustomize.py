"""torchvision beside CPU torch. PyPI's torchvision for Linux is a CUDA build: its library does not load there, and its
Python part then names two ops that nobody defined. They are defined here before it is imported; nothing calls them.

Python runs this file at its start where its folder is on PYTHONPATH.
"""

import importlib.machinery
import sys


class DefineOps:
    """Finds torchvision once, and defines the ops first."""

    library = None  # torch keeps its ops as long as it lives

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        if not torch.version.cuda:
            DefineOps.library = torch.library.Library("torchvision", "FRAGMENT")
            for op in ("nms", "qnms"):
                self.library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return importlib.machinery.PathFinder.find_spec(name, path)


sys.meta_path.insert(0, DefineOps())
