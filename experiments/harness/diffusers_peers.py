"""The schedulers of diffusers, run on a model given as a formula.

What our solvers are compared with, side by side in one process. Optional:
pip install 'giantsteps[peers]' (diffusers and torch).
"""

import importlib.metadata
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from giantsteps.experiments.harness import config as config_lib


class Run(NamedTuple):
  """What a scheduler did."""

  x: np.ndarray  # [B, D] float64, the sample
  scale: float  # the run started at scale x_T
  start: tuple[float, float]  # (alpha, sigma) of the first call
  end: tuple[float, float]  # (alpha, sigma) where it stopped
  calls: int


class Peer(NamedTuple):
  """A scheduler and its options."""

  name: str
  scheduler: str  # class of diffusers
  options: dict[str, Any]
  path: str  # of its state: "vp", "ve" or "flow"
  calls_per_step: int = 1


def versions() -> dict[str, str] | None:
  """Of diffusers and torch, or None where one is missing."""
  try:
    return {k: importlib.metadata.version(k) for k in ("diffusers", "torch")}
  except importlib.metadata.PackageNotFoundError:
    return None


def _dpm(order: int, **options: Any) -> dict[str, Any]:
  return dict(solver_order=order, **options)


def _ddim(spacing: str) -> dict[str, Any]:
  return dict(timestep_spacing=spacing, clip_sample=False)


def vp_peers() -> list[Peer]:
  """On the 1,000 linear betas that all of them default to."""
  multistep, unipc = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
  karras, exponential = (
    dict(use_karras_sigmas=True),
    dict(use_exponential_sigmas=True),
  )
  to_min = dict(final_sigmas_type="sigma_min")
  rows = [
    ("DDIM trailing", "DDIMScheduler", _ddim("trailing")),
    ("DDIM linspace", "DDIMScheduler", _ddim("linspace")),
    ("PNDM", "PNDMScheduler", dict(skip_prk_steps=True)),
    ("DPM++ 2M", multistep, _dpm(2)),
    ("DPM++ 3M", multistep, _dpm(3)),
    ("DPM++ 2M to sigma_min", multistep, _dpm(2, **to_min)),
    ("DPM++ 3M to sigma_min", multistep, _dpm(3, **to_min)),
    ("DPM++ 2M karras", multistep, _dpm(2, **karras)),
    ("DPM++ 3M karras", multistep, _dpm(3, **karras)),
    ("DPM++ 2M exponential", multistep, _dpm(2, **exponential)),
    ("DPM++ 3M exponential", multistep, _dpm(3, **exponential)),
    ("DPM++ 3S", "DPMSolverSinglestepScheduler", _dpm(3)),
    ("DEIS 2", "DEISMultistepScheduler", _dpm(2)),
    ("DEIS 3", "DEISMultistepScheduler", _dpm(3)),
    ("UniPC 2", unipc, _dpm(2)),
    ("UniPC 3", unipc, _dpm(3)),
    ("UniPC 2 to sigma_min", unipc, _dpm(2, **to_min)),
    ("UniPC 3 to sigma_min", unipc, _dpm(3, **to_min)),
    ("UniPC 3 karras", unipc, _dpm(3, **karras)),
  ]
  return [Peer(*row, path="vp") for row in rows] + [
    Peer("Heun karras", "HeunDiscreteScheduler", karras, "ve", 2),
    Peer("LMS 4 karras", "LMSDiscreteScheduler", karras, "ve"),
  ]


def flow_peers(shifts: tuple[float, ...] = (0.5, 1.0, 3.0)) -> list[Peer]:
  """On the straight path."""
  peers = []
  for shift in shifts:
    flow: dict[str, Any] = dict(use_flow_sigmas=True, flow_shift=shift)
    flow["prediction_type"] = "flow_prediction"
    rows = [
      ("Euler", "FlowMatchEulerDiscreteScheduler", dict(shift=shift), 1),
      ("Heun", "FlowMatchHeunDiscreteScheduler", dict(shift=shift), 2),
      ("DPM++ 2M", "DPMSolverMultistepScheduler", _dpm(2, **flow), 1),
      ("DPM++ 3M", "DPMSolverMultistepScheduler", _dpm(3, **flow), 1),
      ("UniPC 2", "UniPCMultistepScheduler", _dpm(2, **flow), 1),
      ("UniPC 3", "UniPCMultistepScheduler", _dpm(3, **flow), 1),
      ("DEIS 2", "DEISMultistepScheduler", _dpm(2, **flow), 1),
      ("DEIS 3", "DEISMultistepScheduler", _dpm(3, **flow), 1),
    ]
    peers += [
      Peer(f"{name} shift {shift:g}", scheduler, options, "flow", calls)
      for name, scheduler, options, calls in rows
    ]
  return peers


def make(peer: Peer, num_steps: int) -> Any:
  """The scheduler, its timesteps set.

  Raises:
    InputError: diffusers or torch is missing.
  """
  try:
    import diffusers  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise config_lib.InputError(
      "the peers are not installed: pip install 'giantsteps[peers]'"
    ) from error
  diffusers.utils.logging.set_verbosity_error()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scheduler = getattr(diffusers, peer.scheduler)(**peer.options)
    scheduler.set_timesteps(num_steps)
  return scheduler


def run(peer: Peer, forms: Callable, x_T: np.ndarray, calls: int) -> Run:
  """Samples with as many calls as fit, at most `calls`.

  Args:
    peer: which scheduler.
    forms: (x [B, D] float64, alpha, sigma) -> (x0, eps), exact at the noise
      level the scheduler means, never at a rounded timestep.
    x_T: [B, D] float64 unit noise.
    calls: of the model.

  Raises:
    InputError: diffusers or torch is missing.
  """
  if peer.scheduler == "PNDMScheduler":  # repeats its second call
    steps = calls - 1
  else:
    steps = -(-calls // peer.calls_per_step)  # the last step is one call
  scheduler = make(peer, steps)
  import torch  # pyright: ignore[reportMissingImports]

  scale = float(scheduler.init_noise_sigma) if peer.path == "ve" else 1.0
  x = torch.tensor(scale * x_T, dtype=torch.float32)
  sigmas = getattr(scheduler, "sigmas", None)

  def point(i):
    if sigmas is None:  # DDIM, PNDM: the level is the timestep
      return _discrete(scheduler, int(scheduler.timesteps[i]))
    return _point(peer.path, float(sigmas[i]))

  for i, t in enumerate(scheduler.timesteps):
    x0, eps = forms(x.double().numpy(), *point(i))
    out = eps - x0 if peer.path == "flow" else eps
    out = torch.tensor(out, dtype=torch.float32)
    if peer.path == "ve":
      scheduler.scale_model_input(x, t)  # demanded; the formula takes x
    x = scheduler.step(out, t, x).prev_sample
  if sigmas is not None:
    end = _point(peer.path, float(sigmas[-1]))
  elif peer.scheduler == "PNDMScheduler":
    end = _discrete(scheduler, 0)
  else:  # DDIM's set_alpha_to_one
    end = 1.0, 0.0
  x = x.double().numpy()
  return Run(x, scale, point(0), end, len(scheduler.timesteps))


def microseconds_per_step(
  peer: Peer, shape: tuple[int, ...], num_steps: int
) -> float:
  """Time of `scheduler.step` alone, the model's output given (free)."""
  import torch  # pyright: ignore[reportMissingImports]

  scheduler = make(peer, num_steps)
  x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
  out = 0.3 * x
  start = time.perf_counter()
  for t in scheduler.timesteps:
    x = scheduler.step(out, t, x, return_dict=False)[0]
  return (time.perf_counter() - start) / num_steps * 1e6


def _point(path: str, sigma: float) -> tuple[float, float]:
  match path:
    case "vp":
      alpha = 1 / np.sqrt(1 + sigma**2)
      return alpha, sigma * alpha
    case "ve":
      return 1.0, sigma
  return 1.0 - sigma, sigma


def _discrete(scheduler: Any, i: int) -> tuple[float, float]:
  square = float(scheduler.alphas_cumprod[i])
  return square**0.5, (1 - square) ** 0.5
