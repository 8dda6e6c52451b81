"""Softmax attention within a window: no scores of the whole row at once."""

from giantsteps.kernels_pallas.window_attention.attention import (
  has_kernel,
  streams,
  window_attention,
)

__all__ = ["has_kernel", "streams", "window_attention"]
