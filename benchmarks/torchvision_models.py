"""torchvision's model definitions, also where its compiled operators do not fit this build of torch."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

# What torchvision registers gradients and fakes for as it is imported, whether it could load them or not.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_KEPT: list[torch.library.Library] = []  # a schema lives as long as its library


@functools.cache
def video_swin() -> ModuleType | None:
    """``torchvision.models.video.swin_transformer``; None where torchvision is not installed."""
    name = "torchvision.models.video.swin_transformer"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    _KEPT.append(library)
    for operator, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, operator):
            library.define(schema)
    return importlib.import_module(name)
