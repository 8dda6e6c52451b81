"""Decoding against published decodes, a plain Python loop and exact laws."""

import dataclasses
import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.samplers import decoding

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
KEY = jax.random.key(7)


def read_safetensors(path):
  data = path.read_bytes()
  size = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + size])
  header.pop("__metadata__", None)
  body = data[8 + size :]
  return {
    name: np.frombuffer(body[slice(*entry["data_offsets"])], "<f4").reshape(
      entry["shape"]
    )
    for name, entry in header.items()
  }


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["weights"],
  meta_fields=["heads", "theta", "eps", "names"],
)
@dataclasses.dataclass(frozen=True)
class Published:
  """LLaDA and Dream, written from the specification."""

  weights: dict
  heads: int
  theta: float
  eps: float
  names: tuple

  @property
  def head(self):
    return self.weights[self.names[-1]].T

  def forward(self, tokens, positions=None, cache=None):
    w = self.weights
    embed, block, n1, n2, q, k, v, o, gate, up, down, last, _ = self.names
    h, i = w[embed][tokens], 0
    while f"{block}.{i}.{n1}.weight" in w:
      dense = functools.partial(self.dense, f"{block}.{i}")
      y = self.norm(h, w[f"{block}.{i}.{n1}.weight"])
      y = self.attend(dense(q, y), dense(k, y), dense(v, y))
      h = h + dense(o, y)
      y = self.norm(h, w[f"{block}.{i}.{n2}.weight"])
      h = h + dense(down, jax.nn.silu(dense(gate, y)) * dense(up, y))
      i += 1
    h = self.norm(h, w[last])
    if "embed_tokens" in embed:  # Dream predicts the next token
      h = jnp.concatenate([h[:, :1], h[:, :-1]], 1)
    return h, cache

  def dense(self, block, name, x):
    y = x @ self.weights[f"{block}.{name}.weight"].T
    bias = self.weights.get(f"{block}.{name}.bias")
    return y if bias is None else y + bias[None, None]

  def norm(self, x, scale):
    x = x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + self.eps)
    return x * scale[None, None]

  def attend(self, q, k, v):
    b, t, d = q.shape
    size = d // self.heads
    split = lambda x: x.reshape(b, t, -1, size)
    q, k, v = self.rotate(split(q)), self.rotate(split(k)), split(v)
    k, v = (jnp.repeat(x, self.heads // x.shape[2], 2) for x in (k, v))
    score = jnp.einsum("bihk,bjhk->bhij", q, k) / np.sqrt(size)
    out = jnp.einsum("bhij,bjhk->bihk", jax.nn.softmax(score, -1), v)
    return out.reshape(b, t, d)

  def rotate(self, x):
    half = x.shape[-1] // 2
    angle = np.outer(
      np.arange(x.shape[1]), self.theta ** (-np.arange(half) / half)
    ).astype(np.float32)
    cos, sin = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


LLADA = (
  "model.transformer.wte.weight",
  "model.transformer.blocks",
  *("attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out"),
  *("ff_proj", "up_proj", "ff_out"),
  "model.transformer.ln_f.weight",
  "model.transformer.ff_out.weight",
)
DREAM = (
  "model.embed_tokens.weight",
  "model.layers",
  *("input_layernorm", "post_attention_layernorm"),
  *(f"self_attn.{x}_proj" for x in "qkvo"),
  *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
  "model.norm.weight",
  "lm_head.weight",
)


@functools.cache
def published(path, names):
  config = json.loads((GOLDEN / f"{path}.config.json").read_text())
  return Published(
    read_safetensors(GOLDEN / f"{path}.safetensors"),
    config.get("n_heads") or config["num_attention_heads"],
    config["rope_theta"],
    config["rms_norm_eps"],
    names,
  )


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["embed", "head"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Toy:
  """Every position sees its neighbours and the mean of the whole row."""

  embed: jax.Array
  head: jax.Array
  traces = []

  def forward(self, tokens, positions=None, cache=None):
    self.traces.append(tokens.shape)
    e = self.embed[tokens]
    h = jnp.roll(e, 1, 1) - 2 * jnp.roll(e, -1, 1) + e.mean(1, keepdims=True)
    where = jnp.arange(tokens.shape[1])[None, :, None]
    return jnp.tanh(h + 0.1 * where), cache


V, MASK = 12, 11
RNG = np.random.default_rng(3)
TOY = Toy(
  jnp.asarray(RNG.normal(size=(V, 8)), jnp.float32),
  jnp.asarray(RNG.normal(size=(8, V)), jnp.float32),
)
TOKENS = RNG.integers(MASK, size=(5, 14)).astype(np.int32)
MASKED = RNG.random((5, 14)) < np.array([0.2, 0.5, 0.9, 1.1, 0.0])[:, None]


@jax.jit
def toy_logits(tokens):
  logits = TOY.forward(tokens)[0] @ TOY.head
  return logits.at[..., MASK].set(-jnp.inf)


def plain_fill(tokens, masked, choose, block_size):
  """One row, one block after another, one step after another."""
  tokens, masked = np.where(masked, MASK, tokens), masked.copy()
  at, calls = np.full(len(tokens), -1), 0
  for start in range(0, len(tokens), block_size):
    block = np.arange(len(tokens)) // block_size == start // block_size
    total, step = (masked & block).sum(), 0
    while (masked & block).any():
      logits = np.asarray(toy_logits(tokens[None])[0], np.float64)
      p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
      where = np.flatnonzero(masked & block)
      where = where[np.argsort(-p[where].max(-1), kind="stable")]
      where = where[: choose(p[where].max(-1), total, step)]
      tokens[where] = p[where].argmax(-1)
      masked[where], at[where] = False, calls
      calls, step = calls + 1, step + 1
  return tokens, at, calls


class PublishedDecodeTest(parameterized.TestCase):
  @parameterized.product(
    case=[
      ("decoding/tiny_llada_mha", "tiny_llada_mha_decode_p0"),
      ("parallel_decoding/tiny_llada_gqa", "tiny_llada_gqa_decode_p5"),
    ],
    rule=[
      ("steps32", decoding.top_n(32)),
      ("steps8", decoding.top_n(8)),
      ("thr0.6", decoding.threshold(0.6)),
      ("thr1.01", decoding.threshold(1.01)),
    ],
  )
  def test_llada_token_for_token(self, case, rule):
    golden = np.load(GOLDEN / f"decoding/{case[1]}.npz", allow_pickle=False)
    result = decoding.generate(
      published(case[0], LLADA),
      golden["prompt"][None],
      [9],
      num_tokens=32,
      block_size=8,
      rule=rule[1],
      mask_token=95,
      forbid_mask=False,
    )
    want = golden[f"nocache_{rule[0]}__tokens"]
    np.testing.assert_array_equal(result.tokens[0], want)
    np.testing.assert_array_equal(result.answers[0], want[9:])
    self.assertEqual(result.nfe, golden[f"nocache_{rule[0]}__nfe"])
    self.assertEqual(result.exactness, "approximate")

  @parameterized.product(
    confidence=[
      ("maskgit_plus", "probability"),
      ("topk_margin", "margin"),
      ("entropy", "entropy"),
    ],
    steps=[24, 8],
  )
  def test_dream_history(self, confidence, steps):
    path = GOLDEN / "parallel_decoding/tiny_dream_decode.npz"
    golden = np.load(path, allow_pickle=False)
    result = decoding.generate(
      published("parallel_decoding/tiny_dream", DREAM),
      golden["prompt"][None],
      [8],
      num_tokens=24,
      block_size=None,
      rule=decoding.top_n(steps, confidence[1], "linear_time"),
      mask_token=95,
      forbid_mask=False,
    )
    history = golden[f"{confidence[0]}_steps{steps}__history"]
    when = np.arange(steps)[:, None]
    seen = result.committed_at <= when
    np.testing.assert_array_equal(np.where(seen, result.tokens, 95), history)
    self.assertEqual(result.nfe, steps)


class FillTest(parameterized.TestCase):
  @parameterized.product(
    rule=[
      (decoding.threshold(0.5), lambda p, m, i: max((p >= 0.5).sum(), 1)),
      (decoding.top_n(6), lambda p, m, i: m // 3 + (i < m % 3)),
      (decoding.threshold(0.0), lambda p, m, i: len(p)),
    ],
    block_size=[7],
  )
  def test_against_a_plain_loop(self, rule, block_size):
    got = decoding.fill(
      TOY, TOKENS, MASKED, rule=rule[0], mask_token=MASK, block_size=block_size
    )
    for i, (tokens, masked) in enumerate(zip(TOKENS, MASKED, strict=True)):
      want = plain_fill(tokens, masked, rule[1], block_size)
      np.testing.assert_array_equal(got.tokens[i], want[0])
      np.testing.assert_array_equal(got.committed_at[i], want[1])
      self.assertEqual(got.nfe[i], want[2])

  def test_threshold_above_one_is_one_token_per_step(self):
    fill = functools.partial(decoding.fill, TOY, TOKENS, MASKED)
    a = fill(rule=decoding.threshold(1.5), mask_token=MASK)
    b = fill(rule=decoding.top_n(TOKENS.shape[1]), mask_token=MASK)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.nfe, MASKED.sum(-1))
    np.testing.assert_array_equal(b.nfe, MASKED.sum(-1))
    np.testing.assert_array_equal(a.committed_at >= 0, MASKED)
    np.testing.assert_array_equal(np.where(MASKED, TOKENS, a.tokens), TOKENS)

  def test_rows_do_not_depend_on_their_neighbours(self):
    fill = functools.partial(
      decoding.fill,
      TOY,
      rule=decoding.top_n(4, "random"),
      mask_token=MASK,
      key=KEY,
      block_size=5,
    )
    together = fill(TOKENS, MASKED)
    order = np.array([3, 0, 2, 4, 1])
    permuted = fill(TOKENS[order], MASKED[order], seeds=order)
    for i in range(5):
      alone = fill(TOKENS[i, None], MASKED[i, None], seeds=[i])
      j = int(np.flatnonzero(order == i)[0])
      for a, b, c in zip(
        jax.tree.leaves(together),
        jax.tree.leaves(permuted),
        jax.tree.leaves(alone),
        strict=True,
      ):
        np.testing.assert_array_equal(a[i], b[j])
        np.testing.assert_array_equal(a[i], c[0])

  def test_mask_is_predicted_only_on_request(self):
    head = np.array(TOY.head)
    head[:, MASK] = 100  # of a hidden state that is >= 0 and grows with i
    model = Toy(jnp.zeros_like(TOY.embed), jnp.asarray(head))
    args = (model, TOKENS, MASKED)
    rule = decoding.threshold(0.5)
    got = decoding.fill(*args, rule=rule, mask_token=MASK)
    self.assertFalse((got.tokens == MASK).any())
    got = decoding.fill(*args, rule=rule, mask_token=MASK, forbid_mask=False)
    self.assertTrue((got.tokens == MASK).any())  # and it ends


class GenerateTest(parameterized.TestCase):
  @parameterized.parameters(
    (decoding.threshold(np.array([0.0, 0.4, 2.0])), 0.0),
    (decoding.autoregressive(), 0.8),
  )
  def test_mixed_lengths_equal_rows_alone(self, rule, temperature):
    lengths = np.array([6, 0, 6])
    generate = functools.partial(
      decoding.generate,
      TOY,
      num_tokens=7,
      block_size=4,
      mask_token=MASK,
      temperature=temperature,
      key=KEY,
    )
    got = generate(TOKENS[:3, :6], lengths, rule=rule)
    self.assertEqual(got.tokens.shape, (3, 13))
    for i, n in enumerate(lengths):
      own = jax.tree.map(lambda x, i=i: x[i, None], rule)
      alone = generate(TOKENS[i, None, :n], [n], rule=own, seeds=[i])
      np.testing.assert_array_equal(got.answers[i], alone.answers[0])
      np.testing.assert_array_equal(got.tokens[i, : n + 7], alone.tokens[0])
      np.testing.assert_array_equal(got.tokens[i, :n], TOKENS[i, :n])
      np.testing.assert_array_equal(got.tokens[i, n + 7 :], 0)
      np.testing.assert_array_equal(
        got.committed_at[i, : n + 7], alone.committed_at[0]
      )
      self.assertEqual(got.nfe[i], alone.nfe[0])

  def test_blocks_are_finished_in_order(self):
    got = decoding.generate(
      TOY,
      TOKENS[:, :3],
      [3] * 5,
      num_tokens=8,
      block_size=3,
      rule=decoding.threshold(0.3),
      mask_token=MASK,
    )
    at = np.asarray(got.committed_at[:, 3:])
    blocks = np.split(at, [3, 6], axis=1)
    self.assertTrue((blocks[0].max(1) < blocks[1].min(1)).all())
    self.assertTrue((blocks[1].max(1) < blocks[2].min(1)).all())
    np.testing.assert_array_equal(got.nfe, at.max(1) + 1)

  def test_model_stands_once_in_the_program_and_numbers_are_traced(self):
    def run(value, temperature):
      rule = decoding.threshold(value)
      return decoding.fill(
        TOY,
        TOKENS,
        MASKED,
        rule=rule,
        mask_token=MASK,
        temperature=temperature,
        key=KEY,
      ).nfe

    jaxpr = jax.make_jaxpr(
      lambda m: (
        decoding.fill(
          m, TOKENS, MASKED, rule=decoding.threshold(0.9), mask_token=MASK
        ).tokens
      )
    )(TOY)
    self.assertEqual(str(jaxpr).count(" tanh "), 1)
    run(0.9, 1.0)
    before = len(Toy.traces)
    calls = [int(run(value, 0.5).max()) for value in (0.0, 0.3, 2.0)]
    self.assertLen(Toy.traces, before)
    self.assertEqual(calls[0], 1)
    self.assertEqual(calls[2], MASKED.sum(-1).max())

  def test_calls_on_the_host_equal_nfe(self):
    calls = []

    @functools.partial(
      jax.tree_util.register_dataclass, data_fields=["toy"], meta_fields=[]
    )
    @dataclasses.dataclass(frozen=True)
    class Counting:
      toy: Toy

      @property
      def head(self):
        return self.toy.head

      def forward(self, tokens, positions=None, cache=None):
        jax.debug.callback(lambda: calls.append(1))
        return self.toy.forward(tokens)

    rule = decoding.threshold(0.4)
    got = decoding.fill(
      Counting(TOY), TOKENS, MASKED, rule=rule, mask_token=MASK
    )
    jax.effects_barrier()
    self.assertLen(calls, int(got.nfe.max()))


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["head"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Markov:
  """Causal and shifted: position i has law exp(head[tokens[i - 1]])."""

  head: jax.Array

  def forward(self, tokens, positions=None, cache=None):
    before = jnp.concatenate([tokens[:, :1], tokens[:, :-1]], 1)
    return jax.nn.one_hot(before, self.head.shape[0]), cache


class LawTest(parameterized.TestCase):
  def chain(self):
    p = np.array([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.05, 0.05, 0.9]])
    return p, Markov(jnp.asarray(np.log(p), jnp.float32))

  def test_autoregressive_greedy(self):
    p, model = self.chain()
    got = decoding.generate(
      model,
      np.array([[0], [2]]),
      [1, 1],
      num_tokens=4,
      rule=decoding.autoregressive(),
    )
    np.testing.assert_array_equal(got.answers, [[1, 0, 1, 0], [2, 2, 2, 2]])
    np.testing.assert_array_equal(got.nfe, [4, 4])
    self.assertEqual(got.exactness, "greedy")

  @parameterized.parameters(1.0, 2.0)
  def test_autoregressive_sampling_is_exact(self, temperature):
    p, model = self.chain()
    p = p ** (1 / temperature)
    p /= p.sum(-1, keepdims=True)
    n = 20_000
    got = decoding.generate(
      model,
      np.zeros((n, 1), int),
      np.ones(n, int),
      num_tokens=3,
      rule=decoding.autoregressive(),
      temperature=temperature,
      key=KEY,
    )
    self.assertEqual(got.exactness, "distribution")
    codes = np.asarray(got.answers) @ np.array([9, 3, 1])
    law = [
      p[0, a] * p[a, b] * p[b, c]
      for a, b, c in itertools.product(range(3), repeat=3)
    ]
    want = n * np.array(law)
    chi2 = ((np.bincount(codes, minlength=27) - want) ** 2 / want).sum()
    self.assertLess(chi2, 60.1)  # 26 degrees of freedom, p = 1e-4 is 60.1

  def test_shuffle_in_one_step_costs_what_theory_says(self):
    # A uniform permutation has uniform marginals: one parallel step gives a
    # valid one with probability n!/n^n (ParallelBench, arXiv:2510.04767).
    n, rows = 4, 20_000
    got = decoding.fill(
      Markov(jnp.zeros((5, 5))),
      np.zeros((rows, n), int),
      np.ones((rows, n), bool),
      rule=decoding.top_n(1),
      mask_token=4,
      temperature=1.0,
      key=KEY,
    )
    valid = (np.sort(got.tokens, -1) == np.arange(n)).all(-1).mean()
    self.assertAlmostEqual(valid, 24 / 256, delta=4 * np.sqrt(0.085 / rows))
    self.assertTrue((got.nfe == 1).all())


class ErrorTest(parameterized.TestCase):
  def test_fill(self):
    rule = decoding.threshold()
    good = dict(rule=rule, mask_token=MASK)
    for message, tokens, masked, options in [
      (r"float32\[5, 14\]", TOKENS.astype(np.float32), MASKED, {}),
      (r"tokens int32\[14\]", TOKENS[0], MASKED[0], {}),
      (r"masked bool\[5, 13\]", TOKENS, MASKED[:, 1:], {}),
      (r"masked int32", TOKENS, MASKED.astype(np.int32), {}),
      ("mask_token=None", TOKENS, MASKED, {"mask_token": None}),
      ("temperature=-1", TOKENS, MASKED, {"temperature": -1.0}),
      ("give a key", TOKENS, MASKED, {"temperature": 1.0}),
      ("'random'.*key", TOKENS, MASKED, {"rule": decoding.top_n(2, "random")}),
      (r"seeds \(2,\)", TOKENS, MASKED, {"seeds": [1, 2]}),
      ("block_size=0", TOKENS, MASKED, {"block_size": 0}),
    ]:
      with self.assertRaisesRegex(ValueError, message):
        decoding.fill(TOY, tokens, masked, **{**good, **options})

  def test_generate(self):
    for message, lengths, options in [
      ("cache='dual'.*none", [2] * 5, {"cache": "dual"}),
      ("prompt_lengths has 15", [15] + [2] * 4, {}),
      ("prompt_lengths has -1", [-1] + [2] * 4, {}),
      (r"prompt_lengths int64\[1\]", [2], {}),
      ("prompt_lengths float64", [2.0] * 5, {}),
      ("num_tokens=0", [2] * 5, {"num_tokens": 0}),
      ("block_size=-3", [2] * 5, {"block_size": -3}),
    ]:
      options = {"num_tokens": 4, **options}
      with self.assertRaisesRegex(ValueError, message):
        decoding.generate(
          TOY,
          TOKENS,
          lengths,
          rule=decoding.threshold(),
          mask_token=MASK,
          **options,
        )


if __name__ == "__main__":
  absltest.main()
