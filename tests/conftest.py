"""Settings all tests share: one CPU platform, a compilation cache, no
silent rank promotion."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax  # noqa: E402  (after the environment that it reads)

jax.config.update("jax_numpy_rank_promotion", "raise")
