"""Pictures as PNG files: image grids, points and labelled curves
(matplotlib)."""

import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from giantsteps.experiments.harness import config as config_lib

Curve = tuple[Sequence[float], Sequence[float]]


def _pyplot():
  try:
    import matplotlib
  except ImportError as error:
    raise config_lib.InputError(
      "plots need matplotlib, which is not installed: "
      "pip install 'giantsteps[demo]'"
    ) from error
  matplotlib.use("Agg")
  from matplotlib import pyplot

  return pyplot


def image_grid(
  images: np.ndarray,
  path: pathlib.Path,
  *,
  columns: int = 16,
  row_labels: Sequence[str] = (),
  title: str = "",
) -> None:
  """Writes images [N, H, W, C] in [-1, 1] as one grid; row_labels go left."""
  pyplot = _pyplot()
  n, height, width, channels = images.shape
  columns = min(columns, n)
  rows = math.ceil(n / columns)
  canvas = np.full((rows * (height + 1), columns * (width + 1), channels), 1.0)
  for i, image in enumerate(np.clip(images, -1, 1) / 2 + 0.5):
    y, x = i // columns * (height + 1), i % columns * (width + 1)
    canvas[y : y + height, x : x + width] = image
  figure, axes = pyplot.subplots(
    figsize=(0.45 * columns + 1.5 * bool(row_labels), 0.47 * rows + 0.3),
    dpi=110,
  )
  shown = canvas[..., 0] if channels == 1 else canvas
  axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
  axes.set_xticks([])
  axes.set_yticks(
    [(i + 0.5) * (height + 1) for i in range(len(row_labels))], row_labels
  )
  axes.set_title(title, fontsize=10)
  for spine in axes.spines.values():
    spine.set_visible(False)
  figure.savefig(path, bbox_inches="tight")
  pyplot.close(figure)


def scatter(points: np.ndarray, path: pathlib.Path) -> None:
  """Writes points [N, 2] as dots, or [N, 1] as a histogram.

  Raises:
    InputError: points of more dimensions.
  """
  pyplot = _pyplot()
  if points.ndim != 2 or points.shape[1] > 2:
    raise config_lib.InputError(f"cannot draw points {list(points.shape)}")
  figure, axes = pyplot.subplots(figsize=(4, 4), dpi=110)
  if points.shape[1] == 1:
    axes.hist(points[:, 0], bins=100, density=True)
  else:
    axes.plot(*points.T, ".", ms=1)
    axes.set_aspect("equal")
  figure.savefig(path, bbox_inches="tight")
  pyplot.close(figure)


def curves(
  lines: Mapping[str, Curve],
  path: pathlib.Path,
  *,
  x_label: str,
  y_label: str,
  title: str,
  levels: Mapping[str, float] | None = None,
  log_x: bool = False,
  log_y: bool = False,
  markers: bool = True,
  ticks: Sequence[float] = (),
) -> None:
  """Draws named lines (x, y) and named horizontal levels into `path`."""
  pyplot = _pyplot()
  figure, axes = pyplot.subplots(figsize=(5.6, 3.7), dpi=110)
  for name, (x, y) in lines.items():
    axes.plot(x, y, marker="o" if markers else None, ms=4, lw=1.5, label=name)
  styles = ["--", ":", "-."]
  for i, (name, y) in enumerate((levels or {}).items()):
    axes.axhline(y, color="0.4", lw=1, ls=styles[i % 3], label=name)
  if log_x:
    axes.set_xscale("log")
  if log_y:
    axes.set_yscale("log")
  if ticks:
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
  axes.set(xlabel=x_label, ylabel=y_label, title=title)
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  figure.savefig(path, bbox_inches="tight")
  pyplot.close(figure)


def error_curves(
  problems: Mapping[str, Sequence[dict]], path: pathlib.Path
) -> None:
  """Median error against calls, one panel per problem.

  Args:
    problems: name -> rows of `samplers_quality.measure`.
    path: PNG to write.
  """
  pyplot = _pyplot()
  columns = min(4, len(problems))
  lines = math.ceil(len(problems) / columns)
  figure, panels = pyplot.subplots(
    lines, columns, figsize=(3.6 * columns, 3.2 * lines), dpi=75, squeeze=False
  )
  colors = {"giantsteps": "C3", "authors": "C0", "diffusers": "0.6"}
  for axes in panels.flat[len(problems) :]:
    axes.axis("off")
  for axes, (title, rows) in zip(panels.flat, problems.items(), strict=False):
    drawn = set()
    for name, source in dict.fromkeys((r["name"], r["source"]) for r in rows):
      own = [r for r in rows if (r["name"], r["source"]) == (name, source)]
      bold = source == "giantsteps"
      axes.plot(
        [r["calls"] for r in own],
        [r["median"] for r in own],
        color=colors[source],
        lw=2.5 if bold else 0.8,
        marker="o" if bold else None,
        zorder=3 if bold else 2,
        label=None if source in drawn else source,
      )
      drawn.add(source)
    axes.set(title=title, yscale="log", xlabel="model calls", ylim=(None, 1))
    axes.grid(alpha=0.3)
  panels[0, 0].set_ylabel("median distance to the exact sample")
  panels[0, 0].legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path, bbox_inches="tight")
  pyplot.close(figure)
