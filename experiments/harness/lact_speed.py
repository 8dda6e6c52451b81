"""Tokens per second of LaCT's operator, by size of its chunks.

Forward and backward of the language model's form (Muon and momentum), for each
implementation on the devices of this process and, given the authors' source,
for theirs under torch.compile: all in turns, in one process.
"""

import functools
import importlib
import importlib.util
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.experiments.harness import config as config_lib
from giantsteps.models import lact

CHUNKS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
# The authors' file, below the folder of their source.
OFFICIAL = "lact_llm/lact_model/ttt_operation.py"
# bfloat16 products per second, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "v5 lite": 197e12}
PEAKS |= {"v5p": 459e12, "v5": 459e12, "v6": 918e12}


class Shape(NamedTuple):
  """Heads of one sequence.

  Attributes:
    name: of the model whose layer it is.
    heads: H.
    d: width of a head; the memory has as many hidden units.
    tokens: L.
    dtype: of q, k, v.
  """

  name: str
  heads: int
  d: int
  tokens: int
  dtype: str


SHAPES = {  # by platform; a CPU takes a layer that it can bear
  "cpu": (Shape("small", 4, 64, 8_192, "float32"),),
  "other": (
    Shape("760M", 4, 384, 32_768, "bfloat16"),
    Shape("3B", 4, 768, 32_768, "bfloat16"),
  ),
}


def flops(shape: Shape, chunk: int, muon: bool) -> float:
  """Of one sequence forwards: 18 d^2 per token and head (6 read, 12 write), and
  90 d^3 per written chunk and head for Newton-Schulz (arXiv:2505.23884)."""
  written = (shape.tokens - 1) // chunk
  rest = 6 * shape.tokens + 12 * written * chunk
  newton_schulz = 90 * shape.d**3 * written if muon else 0
  return shape.heads * (rest * shape.d**2 + newton_schulz)


def measure(
  shapes: Sequence[Shape],
  chunks: Sequence[int] = CHUNKS,
  rounds: int = 5,
  official: pathlib.Path | None = None,
  report: Callable[[str], Any] = lambda line: None,
) -> list[dict]:
  """Times every implementation at every chunk size.

  Args:
    shapes: what is run.
    chunks: sizes; those above a shape's tokens are left out.
    rounds: timed runs of each, interleaved, after two that are not timed.
    official: folder of the authors' source, read and run; needs torch.
    report: takes a line of text per result.

  Returns:
    One row per shape, chunk, inner optimizer ("gradient descent", "Muon") and
    implementation: seconds of forward, or of forward and backward, as
    {"median", "quartiles"}; tokens_per_second; flops forwards with and without
    Newton-Schulz; utilization of the device's peak by both where the peak is
    known; of the official one also whether it was compiled and the relative L2
    distance of its outputs and of its gradient of q from ours.

  Raises:
    InputError: if the source or torch is missing.
  """
  peer = _official(official) if official else None
  kind = jax.devices()[0].device_kind
  peak = next((p for name, p in PEAKS.items() if name in kind), None)
  rows = []
  for shape in shapes:
    for chunk in (c for c in chunks if c <= shape.tokens):
      for muon in (False, True):
        rows += _compare(shape, chunk, muon, rounds, peer, peak)
        for row in rows[-(2 if peer else 1) :]:
          report(line(row))
  return rows


def line(row: dict) -> str:
  """One row as text."""
  train = row["train_seconds"]
  text = (
    f"{row['shape']:6s} chunk {row['chunk']:5d} {row['inner']:16s} "
    f"{row['implementation']:10s} {row['tokens_per_second']:12,.0f} tokens/s "
    f"forward and backward, {1e3 * train['median']:.1f} "
    f"[{1e3 * train['quartiles'][0]:.1f}, {1e3 * train['quartiles'][1]:.1f}] ms"
  )
  if row["utilization"] is not None:
    text += f", {100 * row['utilization']:.1f} % of the peak forwards"
  if "output_distance" in row:
    text += f", output off by {row['output_distance']:.1e}"
  return text


def _compare(shape, chunk, muon, rounds, peer, peak) -> list[dict]:
  inputs = _inputs(shape)
  cotangent = _normal(
    np.random.default_rng(1), shape.heads, shape.tokens, shape.d
  )
  runs = {"giantsteps": _ours(shape, chunk, muon, inputs, cotangent)}
  if peer:
    runs["official"] = _theirs(peer, shape, chunk, muon, inputs, cotangent)
  seconds = {name: ([], []) for name in runs}
  results: dict[str, Any] = {}
  for i in range(rounds + 2):
    for name, (forward, train) in runs.items():
      for times, function in zip(seconds[name], (forward, train), strict=True):
        start = time.perf_counter()
        results[name] = function()
        if i > 1:
          times.append(time.perf_counter() - start)
  useful, plain = flops(shape, chunk, muon), flops(shape, chunk, False)
  rows = []
  for name, (forward, train) in seconds.items():
    row = {
      "shape": shape.name,
      **shape._asdict(),
      "chunk": chunk,
      "inner": "Muon" if muon else "gradient descent",
      "implementation": name,
      "forward_seconds": _spread(forward),
      "train_seconds": _spread(train),
      "tokens_per_second": shape.tokens / statistics.median(train),
      "forward_flops": useful,
      "forward_flops_without_newton_schulz": plain,
      "utilization": None,
      "utilization_without_newton_schulz": None,
    }
    if peak:
      rate = 1 / (peak * statistics.median(forward))
      row["utilization"] = useful * rate
      row["utilization_without_newton_schulz"] = plain * rate
    if name == "official":
      row["compiled"] = _compiles()
      distance = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))
      pairs = zip(results[name](), results["giantsteps"](), strict=True)
      names = ("output_distance", "gradient_distance")
      row |= {n: distance(a, b) for n, (a, b) in zip(names, pairs, strict=True)}
    rows.append(row)
  return rows


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
  return rng.standard_normal(shape, np.float32)


def _inputs(shape: Shape) -> dict[str, np.ndarray]:
  """Tokens as the layers make them: |q| = |k| = 1, rates near 1e-3."""
  rng, d = np.random.default_rng(0), shape.d
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  token = lambda size: _normal(rng, shape.heads, shape.tokens, size)
  weight = lambda: _normal(rng, shape.heads, d, d) / np.float32(np.sqrt(d))
  return (
    {"w0": weight(), "w1": weight(), "w2": weight()}
    | {"q": unit(token(d)), "k": unit(token(d)), "v": token(d)}
    | {f"rate{i}": 1e-3 * np.exp(0.3 * token(1)) for i in range(3)}
    | {"momentum": 1 / (1 + np.exp(-token(1)))}
  )


def _ours(shape, chunk, muon, inputs, cotangent):
  """(forward, train): each runs once; train's result, called, is (output,
  gradient of q) on the host."""
  x = {name: jnp.asarray(value) for name, value in inputs.items()}
  for name in "qkv":
    x[name] = x[name].astype(shape.dtype)
  target = jnp.asarray(cotangent, shape.dtype)

  @jax.jit
  def forward(x):
    out, _ = lact.fast_weight_scan(
      x["q"],
      x["k"],
      x["v"],
      (x["rate0"], x["rate1"], x["rate2"]),
      (x["w0"], x["w1"], x["w2"]),
      chunk_size=chunk,
      muon=muon,
      momentum=x["momentum"],
      ns_dtype="bfloat16",  # as in the authors' code
    )
    return out

  @jax.jit
  def train(x, target):
    def loss(x):
      out = forward(x)
      return jnp.sum(out.astype(jnp.float32) * target), out

    grads, out = jax.grad(loss, has_aux=True)(x)
    return out, grads

  def result():
    out, grads = jax.block_until_ready(train(x, target))
    return lambda: tuple(np.asarray(y, np.float32) for y in (out, grads["q"]))

  return lambda: jax.block_until_ready(forward(x)), result


def _official(folder: pathlib.Path) -> Any:
  """Imports the authors' module from a folder that the user names."""
  path = folder / OFFICIAL
  if not path.is_file():
    raise config_lib.InputError(
      f"--official {folder}: no file {OFFICIAL} there; give a checkout of the "
      "authors' repository"
    )
  if importlib.util.find_spec("torch") is None:
    raise config_lib.InputError(
      "--official needs torch: pip install 'giantsteps[peers]'"
    )
  spec = importlib.util.spec_from_file_location("official_lact", path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _compiles() -> bool:
  """False under TORCHDYNAMO_DISABLE=1."""
  return not importlib.import_module("torch._dynamo").config.disable


def _theirs(module, shape, chunk, muon, inputs, cotangent):
  """`_ours` with the authors' function; its own decorators compile it."""
  torch = importlib.import_module("torch")
  device = "cuda" if torch.cuda.is_available() else "cpu"
  dtype = getattr(torch, shape.dtype)
  names = ("w0", "w1", "w2", "q", "k", "v", "rate0", "rate1", "rate2")
  x = {n: torch.tensor(v, device=device) for n, v in inputs.items()}
  for name in "qkv":
    x[name] = x[name].to(dtype)
  leaves = [x[name].requires_grad_() for name in (*names, "momentum")]
  target = torch.tensor(cotangent, device=device).to(dtype)
  wait = torch.cuda.synchronize if device == "cuda" else lambda: None
  run = functools.partial(
    module.block_causal_lact_swiglu,
    *(x[name] for name in names),
    chunk_size=chunk,
    use_muon=muon,
    momentum=x["momentum"],
  )

  def forward():
    with torch.no_grad():
      run()
    wait()

  def train():
    out = run()
    grads = torch.autograd.grad((out * target).sum(), leaves)
    wait()
    host = lambda y: y.detach().float().cpu().numpy()
    return lambda: (host(out), host(grads[names.index("q")]))

  return forward, train


def _spread(values: list[float]) -> dict:
  quartiles = statistics.quantiles(values, n=4, method="inclusive")
  return {
    "median": statistics.median(values),
    "quartiles": [quartiles[0], quartiles[2]],
  }
