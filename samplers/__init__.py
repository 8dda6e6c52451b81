"""Loops: continuous-time samplers and token decoders, which know no model."""
