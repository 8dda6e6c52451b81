"""LAMB's update against `optax.lamb`: time, compile time, bytes, interleaved.

The model is a tree of 75 float32 arrays, 25.2 million parameters, shaped like
a transformer of width 384 with 12 layers that are not stacked: the case in
which an optimizer can unroll.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from giantsteps.research import large_batch

WIDTH, DEPTH, VOCABULARY, POSITIONS = 384, 12, 9_728, 512
TRANSFORMS = {
  "lamb": lambda: large_batch.lamb(1e-3),
  "optax.lamb": lambda: optax.lamb(1e-3, weight_decay=0.01),
  "optax.adamw": lambda: optax.adamw(1e-3, weight_decay=0.01),
}
COMPILES = 5  # compilations of each, of which the median is reported
FLOOR = 42  # bytes per parameter of two passes over memory, all float32, with
# a bfloat16 copy of the parameters: x, g, m, v in, m, v out; x, m, v in, x out


def measure(rounds: int = 30) -> dict:
  """Times one step of `lamb`, `optax.lamb` and `optax.adamw` in turns.

  A step takes params, state and gradients to params and state; both are
  donated. AdamW, which has no ratios, is what the three elementwise passes
  alone cost.

  Args:
    rounds: timed steps of each, after one that is not timed; interleaved.

  Returns:
    {"parameters", "leaves", "rounds", "floor_bytes_per_parameter", and for
    each optimizer "update_ms", "compile_s" (tracing and lowering included,
    no cache) as {"median", "quartiles"}, "bytes_per_parameter" and
    "temporary_bytes" of the compiler's analysis; "update_ratio" of lamb to
    optax.lamb in the same round, "compile_ratio"}; bytes with updates applied.

  Raises:
    ValueError: for less than two rounds.
  """
  if rounds < 2:
    raise ValueError(f"rounds={rounds}: a spread needs two")
  params = _transformer(np.random.default_rng(0))
  grads = _transformer(np.random.default_rng(1))
  size = sum(a.size for a in jax.tree.leaves(params))
  compile_s, compiled = _compile_in_turns(params, grads)
  update_s = _run_in_turns(compiled, params, grads, rounds)
  result = {
    "parameters": size,
    "leaves": len(jax.tree.leaves(params)),
    "rounds": rounds,
    "floor_bytes_per_parameter": FLOOR,
    "update_ratio": _spread(
      [
        a / b
        for a, b in zip(update_s["lamb"], update_s["optax.lamb"], strict=True)
      ]
    ),
    "compile_ratio": _spread(
      [
        a / b
        for a, b in zip(compile_s["lamb"], compile_s["optax.lamb"], strict=True)
      ]
    ),
  }
  for name, program in compiled.items():
    memory = program.memory_analysis()
    result[name] = {
      "update_ms": _spread([1e3 * s for s in update_s[name]]),
      "compile_s": _spread(compile_s[name]),
      "bytes_per_parameter": program.cost_analysis()["bytes accessed"] / size,
      "temporary_bytes": memory.temp_size_in_bytes,
    }
  return result


def _transformer(rng: np.random.Generator) -> dict:
  """Random parameters; 6 arrays per block and 3 others."""
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32))
  block = lambda: {
    "qkv": draw(WIDTH, 3 * WIDTH),
    "proj": draw(WIDTH, WIDTH),
    "up": draw(WIDTH, 4 * WIDTH),
    "down": draw(4 * WIDTH, WIDTH),
    "norm_0": draw(WIDTH),
    "norm_1": draw(WIDTH),
  }
  params: dict = {f"block_{i}": block() for i in range(DEPTH)}
  params["embedding"] = draw(VOCABULARY, WIDTH)
  params["positions"] = draw(POSITIONS, WIDTH)
  params["norm"] = draw(WIDTH)
  return params


def _compile_in_turns(params, grads) -> tuple[dict, dict]:
  """Seconds of each compilation, and the last program, by name."""
  seconds, compiled = {name: [] for name in TRANSFORMS}, {}
  cached = jax.config.values["jax_enable_compilation_cache"]
  jax.config.update("jax_enable_compilation_cache", False)
  try:
    for _ in range(COMPILES):
      for name, make in TRANSFORMS.items():
        tx = make()  # anew, so that nothing of it is traced yet
        state = jax.eval_shape(tx.init, params)
        start = time.perf_counter()
        compiled[name] = _jitted_step(tx).lower(params, state, grads).compile()
        seconds[name].append(time.perf_counter() - start)
  finally:
    jax.config.update("jax_enable_compilation_cache", cached)
  return seconds, compiled


def _jitted_step(tx: optax.GradientTransformation):
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(step, donate_argnums=(0, 1))


def _run_in_turns(compiled, params, grads, rounds) -> dict:
  """Seconds of each step by name, after one to warm up."""
  carries = {
    name: (jax.tree.map(jnp.copy, params), jax.jit(make().init)(params))
    for name, make in TRANSFORMS.items()
  }
  seconds = {name: [] for name in TRANSFORMS}
  for i in range(rounds + 1):
    for name, program in compiled.items():
      jax.block_until_ready(carries[name])
      start = time.perf_counter()
      carries[name] = jax.block_until_ready(program(*carries[name], grads))
      if i:
        seconds[name].append(time.perf_counter() - start)
  return seconds


def _spread(values: list[float]) -> dict:
  """Median and the quartiles around it."""
  quartiles = statistics.quantiles(values, n=4, method="inclusive")
  return {
    "median": statistics.median(values),
    "quartiles": [quartiles[0], quartiles[2]],
  }
