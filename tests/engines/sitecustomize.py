"""Lets a torchvision that was built for CUDA be imported beside a torch that was built for the CPU.

Python imports this file at its start if its folder stands in PYTHONPATH, in child processes too. Such a torchvision cannot load
its own operators and stumbles over the first one that it describes; nobody calls them here, so their names will do.
"""

import importlib.abc
import importlib.metadata
import sys


class _Names(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and "+cpu" not in importlib.metadata.version("torchvision"):
                self.library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                sys.torchvision_names = self.library  # it lives as long as the process
        return None


sys.meta_path.insert(0, _Names())
