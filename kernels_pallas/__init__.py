"""Pallas kernels: reference, TPU body, GPU body of one operation each."""
