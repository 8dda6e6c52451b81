"""Commit rules against published masks, schedules and plain NumPy."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers import decoding
from giantsteps.samplers.decoding import commit_rules, rule_memory

GOLDEN = pathlib.Path(__file__).parents[2] / "golden/decoding"
RULES = np.load(GOLDEN / "transfer_rules.npz", allow_pickle=False)
SCHEDULES = json.loads((GOLDEN / "unmask_schedules.json").read_text())
ALL = (
  decoding.threshold(0.5),
  decoding.entropy_threshold(1.0),
  decoding.factor(1.0),
  decoding.top_n(3),
  decoding.top_n(3, "margin"),
  decoding.top_n(3, "entropy", "linear_time"),
  decoding.top_n(3, "random"),
  decoding.autoregressive(),
)
KEY = jax.random.key(0)
commit = jax.jit(decoding.commit)


@jax.jit
def transfer(rule, confidence, eligible, step, total):
  progress = commit_rules.Progress(step, total, 0, 1)
  return rule.transfer(confidence, eligible, progress)


def logits_of(*probabilities):
  """One row of positions over V = 8 whose best token has probability p."""
  p = np.asarray(probabilities)[:, None]
  rest = np.repeat((1 - p) / 7, 7, axis=1)
  return np.log(np.concatenate([p, rest], 1))[None].astype(np.float32)


def committed(rule, logits, masked=None, key=None):
  masked = np.ones(logits.shape[:2], bool) if masked is None else masked
  return np.flatnonzero(commit(rule, logits, masked, key)[0]).tolist()


class GoldenTest(parameterized.TestCase):
  @parameterized.parameters(
    ("threshold_0.5", decoding.threshold(0.5)),
    ("threshold_0.9", decoding.threshold(0.9)),
    ("entropy_0.3", decoding.entropy_threshold(0.3)),
    ("entropy_0.8", decoding.entropy_threshold(0.8)),
    ("factor_0.5", decoding.factor(0.5)),
    ("factor_1.0", decoding.factor(1.0)),
    ("hierarchy_0.9_0.3", decoding.hierarchical(0.9, 0.3)),
  )
  def test_published_masks(self, name, rule):
    got = commit(rule, RULES["logits"], RULES["mask"])
    np.testing.assert_array_equal(got, RULES[f"{name}__transfer"])

  def test_published_credit(self):
    rule, (rows, size, _) = decoding.credit(), RULES["logits"].shape
    kept = rule_memory.memory(rule, rows, size, 1)
    for step, scale in enumerate((1.0, 0.9)):
      logits, kept = rule_memory.fuse(
        rule,
        jnp.asarray(RULES["logits"] * scale),
        jnp.asarray(RULES["mask"]),
        kept,
        jnp.full(rows, step),
      )
      want = RULES[f"credit_step{step + 1}"]
      np.testing.assert_allclose(logits, want, atol=1e-6)

  def test_published_top_n(self):
    for row, n in enumerate(RULES["topn__n"]):
      masked = RULES["mask"][row]
      rule = decoding.top_n(-(-masked.sum() // n))  # its first step takes n
      got = commit(rule, RULES["logits"][row][None], masked[None])[0]
      self.assertEqual(got.sum(), n)
      np.testing.assert_array_equal(got, RULES["topn__transfer"][row])

  @parameterized.parameters(
    ("llada_even", "even"), ("dream_linear_time", "linear_time")
  )
  def test_published_schedules(self, name, schedule):
    for case in SCHEDULES[name]:
      total, steps = case["mask_count"], case["steps"]
      rule = decoding.top_n(steps, schedule=schedule)
      eligible, counts = np.ones((1, total), bool), []
      for i in range(steps):
        now = transfer(rule, np.zeros((1, total)), eligible, i, total)
        counts.append(int(now.sum()))
        eligible &= ~np.asarray(now)
      self.assertEqual(counts, case["tokens_per_step"])


class CommitTest(parameterized.TestCase):
  @parameterized.parameters(*ALL)
  def test_commits_masked_positions_and_at_least_one(self, rule):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(64, 7, 5), scale=3).astype(np.float32)
    masked = rng.random((64, 7)) < 0.4
    got = np.asarray(commit(rule, logits, masked, KEY))
    self.assertFalse((got & ~masked).any())
    np.testing.assert_array_equal(got.any(-1), masked.any(-1))

  @parameterized.parameters(*ALL)
  def test_not_a_number_still_commits(self, rule):
    got = commit(rule, np.full((2, 4, 5), np.nan), np.ones((2, 4), bool), KEY)
    self.assertTrue(got.any(-1).all())

  def test_ties_go_to_the_lowest_position(self):
    same = logits_of(0.6, 0.6, 0.6, 0.6)
    self.assertEqual(committed(decoding.threshold(2.0), same), [0])
    self.assertEqual(committed(decoding.entropy_threshold(0.0), same), [0])
    self.assertEqual(committed(decoding.factor(0.0), same), [0])
    self.assertEqual(committed(decoding.top_n(2), same), [0, 1])
    self.assertEqual(committed(decoding.top_n(2, "margin"), same), [0, 1])
    given = np.array([[False, True, True, True]])
    self.assertEqual(committed(decoding.threshold(2.0), same, given), [1])

  def test_threshold_is_inclusive_and_per_row(self):
    logits = np.concatenate([logits_of(0.3, 0.75, 0.9)] * 3)
    p = jax.nn.softmax(logits, -1).max(-1)
    rule = decoding.threshold(jnp.stack([p[0, 1], p[0, 0], p[0, 2] + 1]))
    got = commit(rule, logits, np.ones((3, 3), bool))
    np.testing.assert_array_equal(got, [[0, 1, 1], [1, 1, 1], [0, 0, 1]])

  def test_factor_by_hand(self):
    # Falling: .9 >= 1/2, .8 >= 2/3, .7 < 3/4 ends it, though .85 >= 4/5 would.
    logits = logits_of(0.7, 0.9, 0.3, 0.8)
    self.assertEqual(committed(decoding.factor(1.0), logits), [1, 3])
    self.assertEqual(committed(decoding.factor(0.1), logits), [1])
    self.assertEqual(committed(decoding.factor(9.0), logits), [0, 1, 2, 3])

  def test_autoregressive_is_leftmost(self):
    masked = np.array([[False, True, False, True]])
    logits = logits_of(0.3, 0.4, 0.5, 0.9)
    self.assertEqual(committed(decoding.autoregressive(), logits, masked), [1])

  def test_random_confidence_is_uniform(self):
    keys = jax.random.split(KEY, 4000)
    rows = jax.vmap(commit, (None, None, None, 0))(
      decoding.top_n(4, "random"),
      jnp.zeros((1, 4, 3)),
      jnp.ones((1, 4), bool),
      keys,
    )
    counts = np.asarray(rows).sum((0, 1))
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    self.assertLess(chi2, 21.1)  # 3 degrees of freedom, p = 1e-4

  def test_total_steps_are_shared_out_over_blocks(self):
    rule = decoding.top_n(8)  # 3 + 3 + 2 over three blocks
    for block, steps in enumerate([3, 3, 2]):
      progress = commit_rules.Progress(0, 6, block, 3)
      got = rule.transfer(jnp.zeros((1, 6)), jnp.ones((1, 6), bool), progress)
      self.assertEqual(got.sum(), 6 // steps)


class ConfidenceTest(parameterized.TestCase):
  def test_against_numpy(self):
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(3, 4, 9)).astype(np.float32)
    logits[0, 0, 3] = -np.inf  # a forbidden token adds nothing, not NaN
    token = rng.integers(9, size=(3, 4))
    token[0, 0] = 1
    wide = np.exp(logits.astype(np.float64))
    p = wide / wide.sum(-1, keepdims=True)
    top = np.sort(p, -1)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), -1)
    for kind, want in {
      "probability": np.take_along_axis(p, token[..., None], -1)[..., 0],
      "margin": top[..., -1] - top[..., -2],
      "entropy": -entropy,
    }.items():
      got = commit_rules.confidence(
        kind, jnp.asarray(logits), jnp.asarray(token)
      )
      np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6, err_msg=kind)

  def test_float64_stays_float64(self):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
      logits = jnp.asarray(RULES["logits"], jnp.float64)
      token = jnp.argmax(logits, -1)
      got = commit_rules.confidence("entropy", logits, token)
      self.assertEqual(got.dtype, jnp.float64)


class ErrorTest(parameterized.TestCase):
  def test_messages_hold_the_value(self):
    with self.assertRaisesRegex(ValueError, "'loud'.*probability"):
      decoding.top_n(4, confidence="loud")
    with self.assertRaisesRegex(ValueError, "'cosine'.*linear_time"):
      decoding.top_n(4, schedule="cosine")
    with self.assertRaisesRegex(ValueError, "steps=0"):
      decoding.top_n(0)
    with self.assertRaisesRegex(ValueError, r"\(1, 3\)"):
      decoding.commit(
        decoding.threshold(), jnp.zeros((1, 2, 4)), jnp.ones((1, 3), bool)
      )
    with self.assertRaisesRegex(ValueError, "needs a key"):
      decoding.commit(
        decoding.top_n(2, "random"),
        jnp.zeros((1, 2, 4)),
        jnp.ones((1, 2), bool),
      )

  def test_rules_are_hashable_values(self):
    self.assertEqual(decoding.threshold(0.9), decoding.threshold(0.9))
    self.assertLen({hash(rule) for rule in ALL}, len(ALL))


if __name__ == "__main__":
  absltest.main()
