"""Five reference Sora models, built from ``sora_kernels`` or from plain PyTorch.

    import sora_models

    model = sora_models.build("crnn", backend="sora") # or backend="torch": same keys, same numbers
    logits = model(clip) # clip: float [B, 3, T, H, W] in [0, 1]

This package depends on ``sora_kernels``, never the reverse; the torch builds do not import it.
"""

from __future__ import annotations

from sora_models.registry import build, from_pretrained, list_models, parameter_count

__all__ = ["build", "from_pretrained", "list_models", "parameter_count"]
