"""The training step and the loop around it.

One compiled program runs several steps; its state is donated. Everything
random in a step comes from fold_in(key, step) and the batch from
`data.batch(seed, step)`, so a run is a function of its config alone and
resuming is exact.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from giantsteps.experiments.harness import (
  checkpointing,
  data,
  metrics,
  processes,
)
from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import mesh as mesh_lib
from giantsteps.experiments.harness import placement as placement_lib
from giantsteps.experiments.harness import tasks as tasks_lib


class State(NamedTuple):
  """Everything a step changes; a pytree, saved whole.

  Attributes:
    step: [] int32, updates tried so far.
    params: the network, in the form of its `Placement`.
    opt_state: of the optax transform.
    ema: averaged parameters, float32; equal to `params` if ema_decay is 0.
    skipped: [] int32, non-finite updates in a row.
  """

  step: jax.Array
  params: Any
  opt_state: Any
  ema: Any
  skipped: jax.Array


class Diverged(RuntimeError):
  """Too many non-finite updates in a row; the parameters are still finite."""


def init_state(
  cfg: config_lib.Config,
  task: tasks_lib.Task,
  tx: optax.GradientTransformation,
  pack: Callable = lambda params: params,
) -> State:
  """The state before step 1, a pure function of the config.

  To be jitted: only then do equal leaves own a buffer each, as donation needs.
  `pack` is the placement's.
  """
  params = pack(task.init(jax.random.fold_in(jax.random.key(cfg.seed), 0)))
  ema = jax.tree.map(lambda p: p.astype(jnp.float32), params)
  zero = jnp.zeros((), jnp.int32)
  return State(zero, params, tx.init(params), ema, zero)


def make_update(
  cfg: config_lib.Config,
  task: tasks_lib.Task,
  tx: optax.GradientTransformation,
  gradient: Callable,
) -> Callable:
  """Builds update(state, batches, n) -> (state, metrics), not yet jitted.

  `batches` holds K steps, leaves [K, B, ...]; the first n are run, n traced,
  so a shorter last call does not recompile. Metrics are float32 [K], zero
  from n on: loss, grad_norm, skipped (in a row, after the step). `gradient`
  is the placement's.
  """
  root = jax.random.fold_in(jax.random.key(cfg.seed), 1)

  def step(state: State, batch: dict) -> tuple[State, dict]:
    key = jax.random.fold_in(root, state.step)
    arrays = task.corrupt(batch, key)
    if task.at_step:
      arrays = task.at_step(arrays, state.step)
    loss, grads = gradient(state.params, arrays)
    norm = optax.tree.norm(grads)
    if cfg.optim.clip_norm:
      scale = jnp.minimum(1.0, cfg.optim.clip_norm / norm)
      grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = _average(cfg.ema_decay, state, params)
    finite = jnp.isfinite(loss + norm + optax.tree.norm(updates))
    keep = functools.partial(jnp.where, finite)
    params, opt_state, ema = jax.tree.map(
      keep,
      (params, opt_state, ema),
      (state.params, state.opt_state, state.ema),
    )
    skipped = jnp.where(finite, 0, state.skipped + 1)
    row = {"loss": loss, "grad_norm": norm, "skipped": skipped}
    return State(state.step + 1, params, opt_state, ema, skipped), row

  def update(state: State, batches: dict, n: jax.Array) -> tuple[State, dict]:
    count = jax.tree.leaves(batches)[0].shape[0]
    names = ("loss", "grad_norm", "skipped")
    rows = {name: jnp.zeros(count, jnp.float32) for name in names}

    def body(i, carry):
      state, rows = carry
      state, row = step(state, jax.tree.map(lambda x: x[i], batches))
      put = lambda all, one: all.at[i].set(one.astype(jnp.float32))
      return state, jax.tree.map(put, rows, row)

    return jax.lax.fori_loop(0, n, body, (state, rows))

  return update


def _average(decay: float, state: State, params: Any) -> Any:
  """Moves the averages; the decay rises as (1 + t)/(10 + t) at the start."""
  t = state.step.astype(jnp.float32)
  d = jnp.minimum(decay, (1 + t) / (10 + t)) if decay else 0.0
  move = lambda e, p: d * e + (1 - d) * p.astype(jnp.float32)
  return jax.tree.map(move, state.ema, params)


def compile_update(
  cfg: config_lib.Config,
  task: tasks_lib.Task,
  tx: optax.GradientTransformation,
  mesh: Mesh,
) -> Callable:
  """`make_update`, jitted for the mesh: the state is donated and lies as its
  placement says, the rows of the batch are spread over the batch axes."""
  placement = placement_lib.make(cfg, task, mesh)
  places = placement.shardings(state_shapes(cfg, task, tx, placement))
  rows = mesh_lib.batch_sharding(mesh, axis=1)
  return jax.jit(
    make_update(cfg, task, tx, placement.gradient),
    in_shardings=(places, rows, None),
    out_shardings=(places, mesh_lib.replicated(mesh)),
    donate_argnums=0,
  )


def compile_evaluate(task: tasks_lib.Task, mesh: Mesh) -> Callable:
  """`task.evaluate` for parameters on the mesh and any number of rows."""
  return jax.jit(mesh_lib.traced_on(mesh, task.evaluate))


def state_shapes(
  cfg: config_lib.Config,
  task: tasks_lib.Task,
  tx: optax.GradientTransformation,
  placement: placement_lib.Placement,
) -> State:
  """Shapes and dtypes of `init_state`, with the placement's shardings."""
  shapes = jax.eval_shape(lambda: init_state(cfg, task, tx, placement.pack))
  put = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  return jax.tree.map(put, shapes, placement.shardings(shapes))


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
  """SIGTERM and Ctrl-C set a flag; yields a function that reads it."""
  seen = []
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = {n: signal.signal(n, lambda n, _: seen.append(n)) for n in numbers}
  try:
    yield lambda: bool(seen)
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def prepare_workdir(
  workdir: pathlib.Path, cfg: config_lib.Config, description: dict
) -> None:
  """Writes config.json, data.json and environment.json, or checks that a
  folder used before belongs to the same config and data.

  Raises:
    InputError: if the folder cannot be written or belongs to another run.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "environment.json").write_text(
      json.dumps(metrics.environment(), indent=2) + "\n"
    )
  except OSError as error:
    raise config_lib.InputError(
      f"--workdir {workdir} cannot be written: {error.strerror}"
    ) from error
  path = workdir / "config.json"
  if path.exists():
    there, described = load_workdir(workdir)
    lines = config_lib.differences(cfg, there)
    if lines:
      raise config_lib.InputError(
        f"--workdir {workdir} belongs to another config: "
        f"{'; '.join(lines[:3])}{'; ...' if lines[3:] else ''}. "
        "Choose another folder or the same settings"
      )
    if described != json.loads(json.dumps(description)):
      raise config_lib.InputError(
        f"--workdir {workdir} was trained on other data: data.json there says "
        f"{json.dumps(described)[:200]}, {cfg.data.source} is now "
        f"{json.dumps(description)[:200]}. Choose another folder"
      )
    return
  (workdir / "data.json").write_text(json.dumps(description, indent=2) + "\n")
  path.write_text(json.dumps(config_lib.to_json(cfg), indent=2) + "\n")


def load_workdir(workdir: pathlib.Path) -> tuple[config_lib.Config, dict]:
  """The config and the data description that a run left in its folder.

  Raises:
    InputError: if the folder is none of a training run.
  """
  found = []
  for name in ("config.json", "data.json"):
    path = workdir / name
    try:
      found.append(json.loads(path.read_text()))
    except OSError as error:
      raise config_lib.InputError(
        f"--workdir {workdir} is no folder of a training run: "
        f"{path}: {error.strerror}"
      ) from error
    except ValueError as error:
      raise config_lib.InputError(f"{path} is no JSON: {error}") from error
  return config_lib.from_json(found[0]), found[1]


def restore(
  workdir: pathlib.Path,
  cfg: config_lib.Config,
  task: tasks_lib.Task,
  mesh: Mesh,
) -> State:
  """The newest intact state of a work folder, its networks unpacked.

  Raises:
    InputError: if there is no checkpoint.
    CorruptCheckpoint: if every checkpoint is damaged.
  """
  placement = placement_lib.make(cfg, task, mesh)
  template = state_shapes(cfg, task, tasks_lib.optimizer(cfg), placement)
  with contextlib.closing(_checkpoints(workdir, cfg)) as checkpoints:
    restored = checkpoints.restore(template)
  if restored is None:
    raise config_lib.InputError(
      f"--workdir {workdir} holds no checkpoint yet; run train first"
    )
  state = restored[1]
  return state._replace(
    params=placement.unpack(state.params), ema=placement.unpack(state.ema)
  )


def _checkpoints(workdir, cfg):
  return checkpointing.Checkpoints(
    workdir / "checkpoints", keep=cfg.keep, keep_every=cfg.keep_every
  )


def train(
  cfg: config_lib.Config,
  workdir: pathlib.Path,
  mesh: Mesh,
  *,
  dataset: data.Dataset | None = None,
  label: str = "train",
  stop: Callable[[], bool] = lambda: False,
  on_eval: Callable[[int, Any], None] | None = None,
) -> tuple[State, tasks_lib.Task]:
  """Trains, or goes on training, in a work folder.

  Args:
    cfg: the run.
    workdir: config.json, metrics.jsonl and checkpoints go there; a run that
      was interrupted goes on from its newest intact checkpoint.
    mesh: devices; batch_size must be a multiple of its data and fsdp axes.
    dataset: what `tasks.load_data(cfg)` returns, if at hand.
    label: beside the progress bar.
    stop: asked before each call of the program; True saves and returns.
    on_eval: called with (step, averaged parameters) at each evaluation.

  Returns:
    The state (state.step < cfg.steps if it was stopped) and the task.

  Raises:
    InputError: if config, data, mesh and folder do not fit together.
    Diverged: after cfg.max_skipped non-finite updates in a row.
  """
  dataset = dataset or tasks_lib.load_data(cfg)
  task = tasks_lib.build(cfg, dataset.description)
  placement = placement_lib.make(cfg, task, mesh)
  if processes.first():
    prepare_workdir(workdir, cfg, dataset.description)
  processes.wait_for_all("work folder")
  tx = tasks_lib.optimizer(cfg)
  with contextlib.closing(_checkpoints(workdir, cfg)) as checkpoints:
    shapes = state_shapes(cfg, task, tx, placement)
    restored = checkpoints.restore(shapes)
    if jax.process_count() > 1:
      processes.agree(
        -1 if restored is None else restored[0],
        f"the processes find other checkpoints in --workdir {workdir}, -1 is"
        " none",
      )
    if restored is not None:
      state = restored[1]
      logging.info("resuming %s from step %d", workdir, int(state.step))
    else:
      make = lambda: init_state(cfg, task, tx, placement.pack)
      places = jax.tree.map(lambda x: x.sharding, shapes)
      state = jax.jit(make, out_shardings=places)()
    if int(state.step) == cfg.steps:
      return state, task
    loop = _Loop(
      cfg, workdir, mesh, task, placement, dataset, checkpoints, on_eval, label
    )
    return loop.run(state, compile_update(cfg, task, tx, mesh), stop), task


class _Loop:
  """The host's side of a run: what happens between two dispatches."""

  def __init__(
    self,
    cfg,
    workdir,
    mesh,
    task,
    placement,
    dataset,
    checkpoints,
    on_eval,
    label,
  ):
    self.cfg, self.workdir, self.mesh, self.task = cfg, workdir, mesh, task
    self.unpack = jax.jit(placement.unpack)
    self.dataset, self.checkpoints, self.on_eval = dataset, checkpoints, on_eval
    self.label, self.longer = label, None
    self.rate = tasks_lib.schedule(cfg, cfg.optim.learning_rate)
    self.evaluate = compile_evaluate(task, mesh)

  def run(self, state: State, update: Callable, stop: Callable) -> State:
    """Steps until the config's end or until `stop()`."""
    cfg, step = self.cfg, int(state.step)
    self.writer = metrics.Metrics(self.workdir, step, write=processes.first())
    self.bar = metrics.Progress(
      self.label, cfg.steps, step, show=processes.first()
    )
    stop_all = processes.Stop(self.mesh)
    batches, pending, saved = self.batches(step), None, step
    try:
      while step < cfg.steps and not stop_all(stop()):
        n = min(cfg.steps_per_dispatch, self.next_mark(step) - step)
        state, rows = update(state, batches, n)
        if pending:
          self.report(*pending)  # while the device works on the next ones
        pending, step = (step, n, rows), step + n
        batches = self.batches(step) if step < cfg.steps else batches
        if self.due(step, cfg.eval_every) or step == cfg.steps:
          pending = self.report(*pending)
          self.evaluation(step, state)
        if self.due(step, cfg.checkpoint_every):
          pending = self.report(*pending) if pending else None
          saved = self.save(step, state)
      if pending:
        self.report(*pending)
      if saved != step:
        self.save(step, state)
      self.checkpoints.wait()
    finally:
      self.bar.close()
      self.writer.close()
    return state

  def due(self, step: int, every: int) -> bool:
    """Whether something that happens each `every` steps happens at `step`."""
    return every > 0 and step % every == 0

  def next_mark(self, step: int) -> int:
    """The next step at which the host has something to do."""
    every = (self.cfg.eval_every, self.cfg.checkpoint_every)
    marks = [(step // k + 1) * k for k in every if k]
    if step < self.cfg.second.start:
      marks.append(self.cfg.second.start)
    return min([*marks, self.cfg.steps])

  def stage(self, step: int) -> tuple[data.Dataset, int, int]:
    """(rows, rows per update, first step) of the stage that `step` is in."""
    cfg, second = self.cfg, self.cfg.second
    if not second.start or step < second.start:
      return self.dataset, cfg.batch_size, 0
    if self.longer is None:
      rows = dataclasses.replace(cfg.data, seq_len=second.seq_len)
      self.longer = tasks_lib.load_data(dataclasses.replace(cfg, data=rows))
    return self.longer, second.batch_size, second.start

  def batches(self, step: int) -> dict:
    """[K, B, ...] arrays on the devices for steps step .. step + K - 1.

    Every process reads the rows of its own devices.
    """
    cfg = self.cfg
    dataset, size, first = self.stage(step)
    sharding = mesh_lib.batch_sharding(self.mesh, axis=1)
    own = mesh_lib.own_rows(self.mesh, size)
    batches = [
      data.batch(dataset.train, size, cfg.seed, step - first + i, own)
      for i in range(cfg.steps_per_dispatch)
    ]

    def place(*rows):
      rows = np.stack(rows)
      whole = (rows.shape[0], size, *rows.shape[2:])
      return jax.make_array_from_process_local_data(sharding, rows, whole)

    return jax.tree.map(place, *batches)

  def report(self, step: int, n: int, rows: dict) -> None:
    """Waits for the metrics of a dispatch and writes those that are due."""
    rows = jax.device_get(rows)
    for i in range(n):
      if self.due(step + i + 1, self.cfg.log_every):
        row = {name: float(values[i]) for name, values in rows.items()}
        row["rate"] = float(self.rate(step + i))
        self.writer.write(step + i + 1, row | {"time": time.time()})
    self.bar.advance(n, loss=float(rows["loss"][n - 1]))
    worst = int(rows["skipped"][:n].max())
    if worst:
      logging.warning(
        "steps %d..%d: up to %d non-finite updates in a row were skipped",
        step + 1,
        step + n,
        worst,
      )
    if worst >= self.cfg.max_skipped:
      raise Diverged(
        f"stopped at step {step + n}: {worst} non-finite updates in a row "
        f"(max_skipped={self.cfg.max_skipped}); lower optim.learning_rate or "
        "look at the data"
      )

  def evaluation(self, step: int, state: State) -> None:
    """Held-out metrics of the averaged parameters."""
    params = self.unpack(state.ema)
    split = self.stage(step)[0].held_out
    values = held_out(self.cfg, self.evaluate, split, params)
    self.writer.write(step, values | {"time": time.time()})
    logging.info(
      "step %d: %s",
      step,
      ", ".join(f"{name} {value:.4g}" for name, value in values.items()),
    )
    if self.on_eval:
      self.on_eval(step, params)

  def save(self, step: int, state: State) -> int:
    """Starts an asynchronous checkpoint of `step`."""
    self.checkpoints.save(step, state, {"config": config_lib.to_json(self.cfg)})
    return step


EVAL_ROWS = 512  # rows of a held-out evaluation, at most


def held_out(
  cfg: config_lib.Config, evaluate: Callable, split: data.Split, params: Any
) -> dict[str, float]:
  """Means of `task.evaluate` over rows spread evenly over a split.

  The rows and the noise are the same at every call, so two figures differ by
  the parameters alone.
  """
  rows = min(split.num_rows, EVAL_ROWS)
  size = min(cfg.batch_size, rows, 128)
  key = jax.random.key(7)
  totals: dict[str, list[float]] = {}
  spread = np.linspace(0, split.num_rows - 1, rows).astype(np.int64)
  for i in range(rows // size):
    batch = split.read(spread[i * size : (i + 1) * size])
    values = evaluate(params, batch, jax.random.fold_in(key, i))
    for name, value in values.items():
      totals.setdefault(name, []).append(float(value))
  return {name: float(np.mean(values)) for name, values in totals.items()}
