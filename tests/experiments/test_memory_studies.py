"""Loss by position, equal budgets, and a study that goes on where it stopped."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from giantsteps.experiments.harness import config, data, memory_studies, tasks
from giantsteps.models import lact, transformer
from giantsteps.research.test_time_training import associative_recall

TINY = ["model.width=16", "model.depth=1", "model.mlp_width=16", "steps=2"]


class Remembers:
  """Knows the row's tokens so far and nothing else: a perfect memory of
  associative recall, and a uniform guess for keys that are new."""

  head = jnp.eye(16)

  def forward(self, tokens):
    def row(tokens):
      before = jnp.tri(tokens.shape[0], k=-1, dtype=bool)
      key = jnp.roll(tokens, 1)  # of each value
      same = before & (key[:, None] == key[None])  # pairs (t, s < t)
      known = jax.nn.one_hot(tokens, 16)
      seen = jnp.einsum("ts,sv->tv", same.astype(jnp.float32), known)
      values = (jnp.arange(16) >= 8)[None]
      guess = jnp.where(values, 0.0, -50.0)
      sure = jnp.where(seen > 0, 0.0, -50.0)
      return jnp.where(seen.any(1, keepdims=True), sure, guess)

    return jax.vmap(row)(tokens), None


jax.tree_util.register_static(Remembers)


def test_a_perfect_memory_has_the_best_loss():
  dataset = data.load(config.Data(source="recall:8", seq_len=64), 16)
  nats = memory_studies.losses_by_position(Remembers(), dataset, 8, rows=256)
  assert nats.shape == (256, 8)
  best = associative_recall.best_nats(32, 8).reshape(8, 4).mean(1)
  error = nats.std(0, ddof=1) / 16
  assert (np.abs(nats.mean(0) - best) < 4 * error + 1e-3).all()


def test_budgets_are_equal():
  configs = memory_studies.long_text([])
  costs = [
    memory_studies.forward_flops(cfg.model, cfg.data.seq_len)
    for cfg in configs.values()
  ]
  assert max(costs) < 1.02 * min(costs)
  kinds = [type(cfg.model) for cfg in configs.values()]
  assert kinds == [lact.Config, transformer.Config, transformer.Config]
  assert [cfg.model.window for cfg in configs.values()] == [8, 8, None]


def test_a_budget_below_attention_is_refused():
  tiny = ["model.mlp_width=8", "data.seq_len=4096", "model.muon=false"]
  with pytest.raises(config.InputError, match="attention alone costs more"):
    memory_studies.long_text(tiny)


def test_inner_optimizers_differ_in_nothing_else():
  configs = memory_studies.recall([])
  plain = {"muon": True, "momentum": False, "prenorm": False, "ns_dtype": None}
  settings = {
    tuple(getattr(c.model, name) for name in plain) for c in configs.values()
  }
  assert len(settings) == len(configs)
  same = [dataclasses.replace(c.model, **plain) for c in configs.values()]
  assert len(set(same)) == 1


def test_a_study_trains_once_and_reports_every_run(tmp_path):
  overrides = [*TINY, "batch_size=2", "data.seq_len=64", "optim.name=adamw"]
  configs = memory_studies.recall(overrides)
  configs = {name: configs[name] for name in ("gradient descent", "momentum")}
  lines = []
  first = memory_studies.run(configs, tmp_path, 1, 32, lines.append)
  assert len(first) == len(lines) == 2
  assert [row["seed"] for row in first] == [0, 0]
  for row in first:
    assert row["steps"] == 2 and len(row["nats"]) == 2
    # untrained: near the entropy of 64 tokens
    assert all(abs(x - math.log(64)) < 1 for x in row["nats"])
  again = memory_studies.run(configs, tmp_path, 1, 32, lines.append)
  assert first == again
  (one, two) = memory_studies.summary(first)
  assert one["name"] == "gradient descent" and two["name"] == "momentum"
  assert one["lowest"][0] <= one["nats"][0] <= one["highest"][0]


def test_only_weighted_tokens_count():
  cfg = config.load("recall", [*TINY, "data.seq_len=64"])
  task = tasks.build(cfg, {"kind": "tokens"})
  params = task.init(jax.random.key(0))
  batch = tasks.load_data(cfg).train.read(np.arange(3))
  logits = lact.logits(cfg.model, params, jnp.asarray(batch["tokens"]))
  log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
  rows, at = np.arange(3)[:, None], np.arange(0, 63, 2)
  want = -log_p[rows, at, batch["tokens"][:, 1::2]].mean()
  np.testing.assert_allclose(task.loss(params, batch), want, rtol=1e-5)
