"""BERT's second stage: longer rows, the rate from 0 again, resumed to the bit."""

import dataclasses

import jax
import numpy as np
import pytest

from giantsteps.experiments.configs import bert_small
from giantsteps.experiments.harness import config, metrics, tasks, training
from giantsteps.experiments.harness import mesh as mesh_lib

STEPS, START = 24, 14


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  for i in range(12):
    (folder / f"{i}.py").write_text("def f(x):\n  return x + 1\n\n" * 60)
  small = bert_small.get_config()
  return dataclasses.replace(
    small,
    model=dataclasses.replace(
      small.model, width=32, depth=1, num_heads=2, num_kv_heads=2, head_dim=16
    ),
    data=dataclasses.replace(small.data, source=f"text:{folder}", seq_len=16),
    optim=dataclasses.replace(small.optim, warmup=4),
    second=config.Stage(
      start=START, seq_len=64, batch_size=4, learning_rate=0.005, warmup=3
    ),
    steps=STEPS,
    batch_size=8,
    log_every=1,
    eval_every=0,
    checkpoint_every=6,
  )


def train(cfg, workdir, stop_after=None):
  calls = []

  def stop():
    calls.append(1)
    return stop_after is not None and len(calls) > stop_after

  return training.train(cfg, workdir, mesh_lib.make({}), stop=stop)[0]


def test_rate_rises_twice(cfg):
  rate = tasks.schedule(cfg, cfg.optim.learning_rate)
  got = [float(rate(t)) for t in range(STEPS)]
  # linear rise to the peak, linear fall to 0 where the stage ends; twice
  first = [0.01 * t / 4 for t in range(1, 5)]
  first += [0.01 * (1 - t / 10) for t in range(10)]
  second = [0.005 * t / 3 for t in range(1, 4)]
  second += [0.005 * (1 - t / 7) for t in range(7)]
  np.testing.assert_allclose(got, first + second, rtol=1e-5, atol=1e-9)


def test_rows_change_and_a_resumed_run_is_the_same(cfg, tmp_path):
  straight = train(cfg, tmp_path / "straight")
  work = tmp_path / "work"
  half = train(cfg, work, stop_after=6)  # calls end at 5, 6, 11, 12, 14, 18
  assert START < int(half.step) < STEPS
  resumed = train(cfg, work)
  for a, b in zip(
    jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  rows = metrics.read(work)
  assert [r["step"] for r in rows if "loss" in r] == [*range(1, STEPS + 1)]
  at = {r["step"]: r["rate"] for r in rows if "rate" in r}
  assert at[START] < at[START + 3] == pytest.approx(0.005)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(start=24), "second.start=24"),
    (dict(seq_len=0), "second.seq_len=0"),
    (dict(batch_size=0), "second.batch_size=0"),
    (dict(learning_rate=0.0), "second.learning_rate=0.0"),
  ],
)
def test_bad_settings(cfg, change, message):
  second = dataclasses.replace(cfg.second, **change)
  with pytest.raises(config.InputError, match=message):
    config.validate(dataclasses.replace(cfg, second=second))
