"""Settings all tests share: one CPU platform, a compilation cache, no
silent rank promotion."""

import json
import os
import pathlib
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# libtpu compiles for TPUs that are not here, from several processes
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
CACHE = pathlib.Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax  # noqa: E402  (after the environment that it reads)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).parents[1]
CHILD = """
import sys
sys.path.insert(0, {root!r})
import conftest  # giantsteps, where it is not installed
sys.path.insert(0, {folder!r})
import json
import {module} as test
print(json.dumps(test.{call}))
"""


MAPS = pathlib.Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def few_programs():
  """Lets compiled programs go before Linux's 65,530 memory maps of a process
  are used up: each program takes several, and XLA dies without a word."""
  yield
  if MAPS.exists():
    with MAPS.open("rb") as file:
      if sum(1 for _ in file) > 30_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def on_devices():
  """on_devices(8, __file__, "f(1)"): what f of that test file returns, as JSON,
  in a process with 8 fake devices."""

  def run(count: int, file: str, call: str):
    path = pathlib.Path(file)
    script = CHILD.format(
      root=str(ROOT), folder=str(path.parent), module=path.stem, call=call
    )
    flags = f"--xla_force_host_platform_device_count={count}"
    done = subprocess.run(
      [sys.executable, "-c", script],
      capture_output=True,
      text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
      check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

  return run
