"""Every solver against the recorded runs of public code.

Driven by the manifests alone (tests/golden/diffusion_samplers/README.md): a
file of the same format, in the folder that DIFFUSION_GOLDEN names, is checked
the same way. All cases of one dimension share a compiled program: the model
is told the angle of the path, tables are padded to one length, and what
differs between the cases (components, path, prediction, guidance) is data.
"""

import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers.diffusion import (
  betas,
  guidance,
  schedules,
  solvers,
  tables,
)
from giantsteps.samplers.diffusion.solvers import exponential

HERE = pathlib.Path(__file__).parents[3] / "golden" / "diffusion_samplers"
GOLDEN = pathlib.Path(os.environ.get("DIFFUSION_GOLDEN", HERE))
FAMILIES = (
  "dpm_solver_pytorch",
  "dpm_solver_jax",
  "unipc_pytorch",
  "deis_jax",
  "k_diffusion",
  "diffusers",
)
FORMS = ("x0", "eps", "v", "flow")
PATHS = ("vp", "ve", "flow")
PREDICTIONS = {
  "noise": "eps",
  "epsilon": "eps",
  "x_start": "x0",
  "sample": "x0",
  "v": "v",
  "v_prediction": "v",
  "flow_prediction": "flow",
}
ROWS = 24  # of the shared program


@functools.lru_cache(None)
def load(family):
  """(settings by case, arrays) of a golden file."""
  path = GOLDEN / f"{family}.npz"
  if not path.exists():
    return {}, {}
  with np.load(path) as file:
    arrays = {name: file[name] for name in file.files}
  return json.loads(bytes(arrays.pop("manifest"))), arrays


@functools.lru_cache(None)
def mixture(name):
  values = np.load(HERE / "mixtures.npz")
  return {k: values[f"{name}_{k}"] for k in ("w", "mu", "var", "label")}


def forms(x, phi, log_w, mu, var, path):
  """All predictions of a mixture, [4, B, D]; log_w [B, K], path traced."""
  cos, sin = jnp.cos(phi), jnp.sin(phi)
  radius = jnp.stack([1.0 + 0 * cos, cos, cos + sin])[path]
  alpha, sigma = cos / radius, sin / radius
  total = (alpha**2 * var + sigma**2)[None]  # [1, K, D]
  d = x[:, None] - alpha * mu[None]
  log_r = log_w - jnp.sum(d**2 / total + jnp.log(2 * jnp.pi * total), -1) / 2
  r = jax.nn.softmax(log_r, -1)[:, :, None]
  x0 = jnp.sum(r * (mu[None] + alpha * var[None] * d / total), 1)
  eps = jnp.sum(r * sigma * d / total, 1)
  return jnp.stack([x0, eps, alpha * eps - sigma * x0, eps - x0])


@jax.jit
def run(x, table, noise, case):
  """(sample, trajectory); every case pays for guidance, most at scale 1."""

  def model(x, t, log_w):
    every = forms(x, t[0], log_w, case["mu"], case["var"], case["path"])
    return every[case["form"]]

  predict = guidance.classifier_free(
    model, case["conditional"], case["null"], case["scale"]
  )
  return tables.sample(predict, x, table, noise=noise, return_trajectory=True)


def schedule_of(case):
  match case["schedule"]:
    case "vp-linear":
      return schedules.vp_linear()
    case "vp-cosine":  # the DEIS file leaves the constant out
      return schedules.vp_cosine(normalize="ab_order" not in case)
    case "discrete-linear":
      return schedules.discrete(betas.linear())
    case "ve-edm":
      return schedules.edm()
  raise ValueError(case["schedule"])


def vp_of_angle():
  """Variance preserving with the angle as time: nodes given by sigma/alpha."""
  return schedules.from_functions(
    lambda t: (np.cos(t), np.sin(t)),
    lambda t: (-np.sin(t), np.cos(t)),
    t_max=np.pi / 2,
  )


# ---- what to run: (path, prediction, schedule, times, table maker), tolerance


def dpm_solver(case, arrays):
  taylor = case["solver_type"] == "taylor"
  settings: dict[str, Any] = dict(
    variant="taylor" if taylor else "midpoint", published=True
  )
  settings["denoise_to_zero"] = case["denoise_to_zero"]
  data = case["algorithm"] == "dpmsolver++"
  if case["method"] == "multistep":
    ramp = case["lower_order_final"] and case["steps"] < 10
    settings["order"] = case["order"]
    settings["final"] = "ramp" if ramp else "none"
  else:
    steps = arrays["t"].size - 1
    fixed = [case["order"]] * steps
    orders = fixed if case["method"] == "singlestep_fixed" else arrays["orders"]
    settings["order"] = [int(k) for k in orders]
    settings["method"] = "singlestep"
    settings["inner"] = {
      "logSNR": "log_snr",
      "time_uniform": "uniform_time",
      "time_quadratic": "quadratic_time",
    }[case["spacing"]]
  limits = case.get("dynamic_threshold")
  if limits:
    settings["threshold"] = limits["ratio"], limits["max_val"]
  make = solvers.dpm_solver_pp if data else solvers.dpm_solver
  return "vp", schedule_of(case), arrays["t"], make, settings, 1e-10


def unipc(case, arrays):
  settings = dict(
    order=case["order"],
    variant=case["variant"],
    gauge=case["algorithm"].removesuffix("_prediction"),
    final="ramp" if case["lower_order_final"] else "none",
  )
  # its discrete nodes are off by 2e-7: alpha and sigma are taken from the file
  angle = np.arctan2(arrays["sigma"], arrays["alpha"])
  return "vp", vp_of_angle(), angle, solvers.unipc, settings, 1e-10


def deis(case, arrays):
  names = {
    "1euler": "euler",
    "2heun": "heun",
    "3kutta": "kutta3",
    "3ral": "ralston3",
    "3heun": "heun3",
    "3vdh": "houwen3",
    "3ssprk": "ssp3",
    "4rk": "rk4",
  }
  schedule, times = schedule_of(case), arrays["t"]
  match case["method"]:
    case "rho_rk":
      settings = dict(method="rk", tableau=names[case["rk_method"]])
      tolerance = 1e-10
    case "ipndm":
      settings, tolerance = dict(method="ipndm"), 1e-10
    case method:  # its coefficients: a left Riemann sum of 10000 points
      variable = method.removesuffix("_ab")
      settings = dict(variable=variable, order=case["ab_order"] + 1)
      tolerance = {"t": 5e-3, "rho": 5e-4}[variable]
      if case["schedule"] == "vp-cosine" and variable == "t":
        # there the sum is off by 2e-3 in the first step, which sends samples
        # to other modes: the same method with that sum
        return "vp", schedule, times, left_riemann_deis, settings, 1e-10
  return "vp", schedule, times, solvers.deis, settings, tolerance


def left_riemann_deis(schedule, times, *, prediction, variable, order):
  """tAB with weights from a left Riemann sum of 10000 points in t."""
  at = exponential.nodes(schedule, times)

  def weights(points, b):
    t, width = np.linspace(
      at.t[b - 1], at.t[b], 10_000, endpoint=False, retstep=True
    )
    (alpha, sigma), (d_alpha, d_sigma) = (
      schedule.alpha_sigma(t),
      schedule.rate(t),
    )
    speed = at.alpha[b] * (d_sigma * alpha - sigma * d_alpha) / alpha**2 * width
    nodes = at.t[points]
    basis = [
      np.prod([(t - v) / (u - v) for v in np.delete(nodes, j)], 0)
      for j, u in enumerate(nodes)
    ]
    return np.array([np.sum(speed * b) for b in basis])

  return exponential.multistep(
    at,
    weights,
    prediction=prediction,
    gauge="noise",
    variable=variable,
    order=order,
    corrected=(),
    final="none",
  )


def k_diffusion(case, arrays):
  eta = case.get("eta") or 0.0
  sigmas = arrays["sigmas"]
  twice = [2] * (sigmas.size - 2) + [1]
  single = dict(method="singlestep", order=twice)
  heun = case.get("solver_type") == "heun"
  make, settings, tolerance = {
    "sample_euler": (solvers.ddim, {}, 1e-11),
    "sample_euler_ancestral": (solvers.ddim, dict(eta=eta), 1e-11),
    "sample_heun": (
      solvers.edm_heun,
      dict(
        churn=case.get("s_churn") or 0.0,
        churn_min=case.get("s_tmin") or 0.0,
        churn_max=case.get("s_tmax") or np.inf,
        churn_noise=case.get("s_noise") or 1.0,
      ),
      1e-11,
    ),
    "sample_dpm_2": (solvers.edm_midpoint, {}, 1e-11),
    "sample_dpm_2_ancestral": (
      solvers.edm_midpoint,
      dict(ancestral_eta=eta),
      1e-11,
    ),
    # its coefficients: adaptive quadrature at a relative 1e-4
    "sample_lms": (
      solvers.deis,
      dict(variable="rho", order=case.get("order")),
      5e-3,
    ),
    "sample_dpmpp_2m": (solvers.dpm_solver_pp, dict(final="none"), 1e-11),
    "sample_dpmpp_2s_ancestral": (
      solvers.dpm_solver_pp,
      dict(ancestral_eta=eta, **single),
      1e-11,
    ),
    "sample_dpmpp_sde": (
      solvers.dpm_solver_pp,
      dict(eta=eta, **single),
      1e-11,
    ),
    "sample_dpmpp_2m_sde": (
      solvers.dpm_solver_pp,
      dict(eta=eta, final="none", variant="taylor" if heun else "midpoint"),
      1e-11,
    ),
    "sample_dpmpp_3m_sde": (
      solvers.dpm_solver_pp,
      dict(eta=eta, order=3, final="none", variant="taylor", published=True),
      1e-11,
    ),
  }[case["sampler"]]
  return "ve", schedules.edm(), sigmas, make, settings, tolerance


def diffusers(case, arrays):
  kwargs, steps = case["kwargs"], case["steps"]
  name = case["scheduler"].removesuffix("Scheduler")
  path = {"ve": "ve", "edm": "ve"}.get(case["state_space"], case["state_space"])
  if "sigmas" in arrays:
    sigmas = arrays["sigmas"].astype(np.float64)
    if "Heun" in name:  # each inner node stands twice
      sigmas = sigmas[np.append(True, np.diff(sigmas) != 0)]
  else:
    last = 0.0 if kwargs.get("set_alpha_to_one", True) else 0.0100013298
    sigmas = np.append(arrays["sigma_at_call"], last)
  for i in range(1, sigmas.size):  # a last step of length 0 stays a step
    sigmas[i] = min(sigmas[i], sigmas[i - 1] * (1 - 1e-9))
  match path:
    case "vp":
      schedule, times = vp_of_angle(), np.arctan(sigmas)
    case "ve":
      schedule, times = schedules.edm(), sigmas
    case _:
      schedule, times = schedules.rectified_flow(), sigmas
  order = kwargs.get("solver_order", 2)
  zero = kwargs.get("final_sigmas_type", "zero") == "zero"
  lower = kwargs.get("lower_order_final", True)
  final = "ramp" if lower and steps < 15 else "none"
  if final == "none" and (zero or kwargs.get("euler_at_final")):
    final = "ddim_last"
  heun = kwargs.get("solver_type") == "heun"
  variant = "taylor" if heun else "midpoint"
  tolerance = 1e-4  # computed in float32
  match name:
    case "DDIM":
      make, settings = solvers.ddim, dict(eta=case["eta"] or 0.0)
    case "Euler" | "EDMEuler" | "FlowMatchEulerDiscrete" | "EulerDiscrete":
      make, settings = solvers.ddim, {}
    case "HeunDiscrete":
      make, settings = solvers.edm_heun, {}
    case "FlowMatchHeunDiscrete":
      make, settings = solvers.runge_kutta, dict(gauge="flow")
    case "LMSDiscrete":  # quadrature at a relative 1e-4
      make, settings = solvers.deis, dict(variable="rho", order=4)
      tolerance = 5e-3
    case "DPMSolverMultistep" | "EDMDPMSolverMultistep":
      algorithm = kwargs.get("algorithm_type", "dpmsolver++")
      settings: dict[str, Any] = dict(
        order=order, variant=variant, final=final, published=True
      )
      settings["eta"] = 1.0 if algorithm.startswith("sde") else 0.0
      data = algorithm.endswith("++")
      make = solvers.dpm_solver_pp if data else solvers.dpm_solver
      if kwargs.get("thresholding"):
        settings["threshold"] = 0.995, 1.0, kwargs["sample_max_value"]
      tolerance = 5e-5
    case "DPMSolverSinglestep":
      settings = dict(method="singlestep", order=order, variant=variant)
      data = kwargs.get("algorithm_type", "dpmsolver++") == "dpmsolver++"
      make = solvers.dpm_solver_pp if data else solvers.dpm_solver
    case "DEISMultistep":
      make = solvers.deis
      final = "ramp" if steps < 15 else "none"
      settings = dict(variable="lambda", order=order, final=final)
      tolerance = 2e-4
    case "UniPCMultistep":
      make = solvers.unipc
      settings = dict(
        order=order,
        variant=kwargs.get("solver_type", "bh2"),
        gauge="data" if kwargs.get("predict_x0", True) else "noise",
        uncorrected=kwargs.get("disable_corrector", ()),
      )
    case _:
      raise ValueError(case["scheduler"])
  return path, schedule, times, make, settings, tolerance


RECIPES = {
  "dpm_solver_pytorch": dpm_solver,
  "dpm_solver_jax": dpm_solver,
  "unipc_pytorch": unipc,
  "deis_jax": deis,
  "k_diffusion": k_diffusion,
  "diffusers": diffusers,
}


def unmatched(family, case):
  """Why a correct solver does not reproduce the case; None if it does."""
  if case.get("variant") == "vary_coeff" and case["order"] > 1:
    return "UniPC vary_coeff of order 2 and 3 is first order in that code"
  if case.get("scheduler") == "PNDMScheduler":
    return "PNDM repeats its second call; iPNDM is what is offered"
  kwargs = case.get("kwargs") or {}
  order = kwargs.get("solver_order", 2)
  if (case.get("scheduler"), kwargs.get("timestep_spacing")) == (
    "DDIMScheduler",
    "linspace",
  ):
    return "steps to level i - 1000 // n but calls the model at the next node"
  if (case.get("scheduler"), order) == ("DPMSolverSinglestepScheduler", 3):
    if kwargs.get("solver_type", "midpoint") == "midpoint":
      return "the inner stage drops its first moment (J_0 / 2 for J_1)"
  if kwargs.get("algorithm_type") == "sde-dpmsolver++" and order == 3:
    return "diffusers' third-order SDE weight tends to -1 as h falls to 0"
  return None


def cases(matched):
  return [
    (family, name)
    for family in FAMILIES
    for name, case in load(family)[0].items()
    if "kind" not in case
    and case.get("method") != "adaptive"
    and (unmatched(family, case) is None) == matched
  ]


def recorded(family, name):
  """(settings, arrays) of one case."""
  manifest, arrays = load(family)
  prefix = f"{name}/"
  return manifest[name], {
    k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)
  }


def replay(family, name):
  """(table, states [N + 1, B, D], arrays, tolerance) of our run."""
  case, arrays = recorded(family, name)
  path, schedule, times, make, settings, tolerance = RECIPES[family](
    case, arrays
  )
  prediction = PREDICTIONS[case.get("prediction") or "noise"]
  prediction = {"ve": "x0", "flow": "flow"}.get(path, prediction)
  told = dataclasses.replace(schedule, model_time=schedule.phi)
  table = make(told, times, prediction=prediction, **settings)
  data = mixture(case["mixture"])
  x_T = arrays["x_T"]
  log_w = np.tile(np.log(data["w"]), (x_T.shape[0], 1))
  wanted = case.get("cfg") or {"label": None, "scale": 1.0}
  keep = data["label"] == wanted["label"] if wanted["label"] is not None else 1
  rows = -(-table.nfe // ROWS) * ROWS
  noise = np.zeros((rows, *x_T.shape))
  stochastic = np.nonzero(table.noise)[0]
  given = arrays.get("noise", np.zeros((0, *x_T.shape)))
  if stochastic.size:
    noise[stochastic] = given[: stochastic.size]
  with jax.enable_x64(True):
    x, bases = run(
      jnp.asarray(x_T),
      tables.pad(tables.resize(table, 5), rows),
      noise,
      {
        "mu": data["mu"],
        "var": data["var"],
        "path": PATHS.index(path),
        "form": FORMS.index(prediction),
        "conditional": np.where(keep, log_w, -np.inf),
        "null": log_w,
        "scale": wanted["scale"],
      },
    )
  inside = (table.anchor == [1, 0]).all(1) & (table.corrector == 0).all(1)
  states = np.concatenate([np.asarray(bases)[: table.nfe][~inside], x[None]])
  return table, states, arrays, tolerance


class GoldenTest(parameterized.TestCase):
  @parameterized.parameters(*cases(matched=True))
  def test_matches(self, family, name):
    table, states, arrays, tolerance = replay(family, name)
    case = recorded(family, name)[0]
    self.assertEqual(table.nfe, case["nfe"])
    final = arrays["final"]
    np.testing.assert_allclose(states[-1], final, rtol=0, atol=tolerance)
    if "traj" in arrays:
      path = arrays["traj"]
      np.testing.assert_allclose(
        states[-len(path) :], path, rtol=0, atol=tolerance
      )

  @parameterized.parameters(
    *(c for c in cases(matched=False) if "pndm" not in c[1])
  )
  def test_known_quirks_are_not_copied(self, family, name):
    _, states, arrays, _ = replay(family, name)
    error = np.abs(states[-1] - arrays["final"]).max()
    self.assertGreater(error, 1e-3)

  @parameterized.parameters(
    *(
      (family, name)
      for family in FAMILIES
      for name, case in load(family)[0].items()
      if case.get("method") == "adaptive"
    )
  )
  def test_adaptive(self, family, name):
    case, arrays = recorded(family, name)
    data = mixture(case["mixture"])
    log_w = np.log(data["w"])

    def predict(x, phi):
      args = data["mu"], data["var"], PATHS.index("vp")
      return forms(x, phi[0], jnp.broadcast_to(log_w, (6, 3)), *args)[1]

    schedule = schedule_of(case)
    sampler = functools.partial(
      solvers.adaptive,
      predict,
      schedule=dataclasses.replace(schedule, model_time=schedule.phi),
      prediction="eps",
      order=case["order"],
      gauge="data" if case["algorithm"] == "dpmsolver++" else "noise",
      t_start=case["t_start"],
      t_end=case["t_end"],
      atol=case["atol"],
      rtol=case["rtol"],
    )
    with jax.enable_x64(True):
      x, nfe = jax.jit(sampler)(jnp.asarray(arrays["x_T"]))
    self.assertEqual(nfe, case["nfe"])
    # they round the factor of h to float32: nodes off by 1e-7, errors of
    # order rtol = .05 times that
    np.testing.assert_allclose(x, arrays["final"], rtol=0, atol=1e-6)


if __name__ == "__main__":
  absltest.main()
