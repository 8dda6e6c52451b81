"""What a run says of itself: metrics.jsonl, environment.json, a progress bar."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

import jax
from absl import logging

PACKAGES = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax-checkpoint",
  "numpy",
  "tensorstore",
)


class Metrics:
  """Appends rows to `metrics.jsonl`, each flushed, and to TensorBoard events
  where tensorboardX is installed.

  A resumed run first drops the rows after the step it resumes from, so the
  file reads as if the run had never stopped.
  """

  def __init__(
    self, workdir: pathlib.Path, resume_step: int, *, write: bool = True
  ):
    """Opens the files in `workdir`; rows with step > resume_step go.

    With write=False (a process that is not the first) nothing happens, ever.
    """
    self._file = self._events = None
    if not write:
      return
    path = workdir / "metrics.jsonl"
    kept = [row for row in read(workdir) if row["step"] <= resume_step]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    self._file = path.open("a", buffering=1)
    try:
      import tensorboardX  # pyright: ignore[reportMissingImports]
    except ImportError:
      return
    self._events = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"), purge_step=resume_step + 1
    )

  def write(self, step: int, row: dict[str, float]) -> None:
    """One line {"step": step, **row}, on disk when this returns."""
    if self._file is None:
      return
    self._file.write(json.dumps({"step": step, **row}) + "\n")
    self._file.flush()
    if self._events:
      for name, value in row.items():
        self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Closes the files."""
    if self._file:
      self._file.close()
    if self._events:
      self._events.close()


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of `metrics.jsonl`; a last line cut by a kill is left out."""
  path = workdir / "metrics.jsonl"
  rows = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      logging.warning("%s: dropped an incomplete line", path)
  return rows


def environment() -> dict[str, Any]:
  """Versions, device, command and git revision (None outside a checkout)."""
  git = subprocess.run(
    ["git", "rev-parse", "HEAD"],
    cwd=pathlib.Path(__file__).parent,
    capture_output=True,
    text=True,
    check=False,
  )
  devices = jax.devices()
  return {
    "python": platform.python_version(),
    **{name: importlib.metadata.version(name) for name in PACKAGES},
    "device": devices[0].device_kind,
    "device_count": len(devices),
    "platform": devices[0].platform,
    "machine": f"{platform.system()} {platform.machine()}",
    "command": " ".join([pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]]),
    "git_revision": git.stdout.strip() or None,
    "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
  }


class Progress:
  """A bar with the metrics and the time left (tqdm), or a log line now and
  then where tqdm is not installed."""

  def __init__(
    self, label: str, total: int, initial: int = 0, *, show: bool = True
  ):
    """Shows `label` and counts from `initial` to `total` steps."""
    self._label, self._total, self._done = label, total, initial
    self._start, self._first, self._told = time.time(), initial, time.time()
    try:
      from tqdm import tqdm

      self._bar = tqdm(
        desc=label,
        total=total,
        initial=initial,
        unit="step",
        mininterval=0.5,
        disable=not show,
      )
    except ImportError:
      self._bar = None

  def advance(self, steps: int, **values: float) -> None:
    """`steps` more are done; `values` stand beside the bar."""
    self._done += steps
    text = " ".join(f"{k}={v:.4g}" for k, v in values.items())
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update(steps)
    elif time.time() - self._told > 10:
      self._told = time.time()
      rate = (self._done - self._first) / (self._told - self._start)
      left = (self._total - self._done) / max(rate, 1e-9)
      logging.info(
        "%s: step %d of %d, %s, %.0f s left",
        self._label,
        self._done,
        self._total,
        text,
        left,
      )

  def close(self) -> None:
    """Ends the bar's line."""
    if self._bar is not None:
      self._bar.close()
