"""Softmax attention within a window or under a mask that is a function of the
positions: no scores of the whole row at once."""

from giantsteps.kernels_pallas.window_attention.attention import (
  has_kernel,
  streams,
  window_attention,
)
from giantsteps.kernels_pallas.window_attention.reference import Mask

__all__ = ["Mask", "has_kernel", "streams", "window_attention"]
