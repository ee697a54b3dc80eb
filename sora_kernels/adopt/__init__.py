"""What changes how a whole model runs, without changing the model."""

from .save_memory import save_memory

__all__ = ["save_memory"]
