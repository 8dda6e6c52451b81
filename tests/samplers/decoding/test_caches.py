"""Caches, batches of mixed lengths and whole decodes with the real models."""
# pyright: reportArgumentType=false

import dataclasses
import functools
import itertools
import pathlib
import shutil
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from giantsteps.models import partitioning, pretrained, transformer
from giantsteps.samplers import decoding
from giantsteps.samplers.decoding import block_diffusion

GOLDEN = pathlib.Path(__file__).parents[2] / "golden"
PLACES = {"tiny_llada_mha": "decoding"}
MASK, EOS = 95, 94
KEY = jax.random.key(5)
CACHES = ("none", "prefix", "dual", "refresh", "vicinity", "block")
RULES = {
  "threshold": decoding.threshold(0.3),
  "entropy": decoding.entropy_threshold(2.0),
  "factor": decoding.factor(1.5),
  "top_n": decoding.top_n(5),
  "margin": decoding.top_n(6, "margin"),
  "random": decoding.top_n(6, "random"),
  "linear_time": decoding.top_n(9, "probability", "linear_time"),
  "hierarchical": decoding.hierarchical(0.5, 0.1),
  "credit": decoding.credit(0.4),
  "smoothing": decoding.smoothing(0.4),
  "remasking": decoding.remasking(decoding.threshold(0.3), 2, 2, 2),
  "editing": decoding.editing(0.3, 0.2, 3),
  "autoregressive": decoding.autoregressive(),
}
RNG = np.random.default_rng(1)
PROMPTS = RNG.integers(MASK - 1, size=(5, 11)).astype(np.int32)
LENGTHS = np.array([11, 3, 7, 1, 8])


@functools.cache
def model(name="tiny_llada_mha"):
  place = GOLDEN / PLACES.get(name, "parallel_decoding")
  with tempfile.TemporaryDirectory() as folder:
    shutil.copy(place / f"{name}.config.json", f"{folder}/config.json")
    shutil.copy(place / f"{name}.safetensors", f"{folder}/model.safetensors")
    return transformer.bind(*pretrained.load(folder))


generate = functools.partial(
  decoding.generate, num_tokens=12, block_size=4, mask_token=MASK
)


def leaves(result, row):
  """Of one row, without the positions that other prompts make longer."""
  return [np.asarray(x)[row] for x in (result.answers, result.nfe)]


class PublishedTest(parameterized.TestCase):
  @parameterized.product(
    case=[
      ("tiny_llada_mha", "tiny_llada_mha_decode_p0"),
      ("tiny_llada_gqa", "tiny_llada_gqa_decode_p5"),
    ],
    cache=[("none", "nocache"), ("prefix", "prefix"), ("dual", "dual")],
  )
  def test_fast_dllm_token_for_token(self, case, cache):
    golden = np.load(GOLDEN / f"decoding/{case[1]}.npz", allow_pickle=False)
    for name, rule in (
      ("steps32", decoding.top_n(32)),
      ("steps8", decoding.top_n(8)),
      ("thr0.6", decoding.threshold(0.6)),
      ("thr1.01", decoding.threshold(1.01)),
    ):
      got = generate(
        model(case[0]),
        golden["prompt"][None],
        [9],
        num_tokens=32,
        block_size=8,
        rule=rule,
        cache=cache[0],
        forbid_mask=False,
      )
      name = f"{cache[1]}_{name}"
      np.testing.assert_array_equal(got.tokens[0], golden[f"{name}__tokens"])
      self.assertEqual(got.nfe, golden[f"{name}__nfe"])

  def test_guidance(self):
    path = GOLDEN / "decoding/tiny_llada_mha_decode_p0.npz"
    golden = np.load(path, allow_pickle=False)
    got = generate(
      model(),
      golden["prompt"][None],
      [9],
      num_tokens=32,
      block_size=8,
      rule=decoding.top_n(16),
      guidance=1.5,
      forbid_mask=False,
    )
    want = golden["llada_cfg1.5_steps16__tokens"]
    np.testing.assert_array_equal(got.tokens[0], want)


class ExactTest(parameterized.TestCase):
  """Where a cache changes nothing, as each says of itself."""

  @parameterized.parameters("tiny_llada_gqa", "tiny_dream")
  def test_refresh_in_every_step_is_no_cache(self, name):
    go = functools.partial(generate, model(name), PROMPTS, LENGTHS)
    for rule in ("threshold", "random", "remasking", "smoothing"):
      options = dict(rule=RULES[rule], key=KEY, temperature=0.7)
      plain = go(**options)
      cached = go(cache="refresh", refresh_every=1, **options)
      np.testing.assert_array_equal(plain.tokens, cached.tokens)
      np.testing.assert_array_equal(plain.nfe, cached.nfe)

  @parameterized.parameters("tiny_llada_gqa", "tiny_dream")
  def test_one_step_per_block_is_no_cache(self, name):
    # The first step of a block sees a cache that is fresh.
    go = functools.partial(generate, model(name), PROMPTS, LENGTHS)
    plain = go(rule=decoding.threshold(0.0))
    for cache in ("prefix", "dual", "vicinity", "refresh"):
      cached = go(rule=decoding.threshold(0.0), cache=cache)
      np.testing.assert_array_equal(plain.tokens, cached.tokens)

  @parameterized.product(
    name=["tiny_llada_gqa", "tiny_dream"],
    rule=["threshold", "top_n", "random", "editing"],
  )
  def test_block_causal_cached_equals_uncached(self, name, rule):
    options = dict(rule=RULES[rule], key=KEY)
    go = functools.partial(generate, model(name), PROMPTS, LENGTHS, **options)
    cached, plain = go(cache="block"), go(cache="none", block_causal=True)
    np.testing.assert_array_equal(cached.tokens, plain.tokens)
    # A final block is read once more where another follows; editing does that
    # without a cache, too.
    extra = np.asarray(cached.nfe - plain.nfe)
    blocks = -(-(LENGTHS % 4 + 12) // 4)
    if rule != "editing":
      np.testing.assert_array_equal(extra, blocks - 1)
    self.assertTrue((extra <= blocks - 1).all())

  @parameterized.parameters("tiny_llada_gqa", "tiny_dream")
  def test_block_causal_every_cache_is_exact(self, name):
    go = functools.partial(
      generate, model(name), PROMPTS, LENGTHS, rule=RULES["threshold"]
    )
    plain = go(cache="none", block_causal=True)
    for cache in ("prefix", "dual", "refresh", "vicinity"):
      cached = go(cache=cache, block_causal=True)
      np.testing.assert_array_equal(cached.tokens, plain.tokens)

  @parameterized.parameters("tiny_llada_gqa", "tiny_dream")
  def test_block_causal_answers_shorter_than_a_block(self, name):
    options = dict(rule=RULES["threshold"], block_size=8, mask_token=MASK)
    row, given = PROMPTS[:1, :9], np.arange(12)[None] < 9
    filled = decoding.fill(
      model(name),
      np.pad(row, ((0, 0), (0, 3))),
      ~given,
      block_causal=True,
      **options,
    )
    for cache in ("none", "block"):
      got = generate(
        model(name),
        row,
        [9],
        num_tokens=3,
        cache=cache,
        block_causal=True,
        **options,
      )
      np.testing.assert_array_equal(got.tokens, filled.tokens)

  @parameterized.parameters("tiny_llama", "tiny_qwen3")
  def test_autoregression_with_a_cache(self, name):
    go = functools.partial(
      decoding.generate,
      model(name),
      PROMPTS,
      LENGTHS,
      num_tokens=12,
      rule=decoding.autoregressive(),
    )
    plain = go()
    for cache in ("block", "dual"):
      cached = go(cache=cache)
      np.testing.assert_array_equal(plain.tokens, cached.tokens)
      self.assertEqual(cached.exactness, "greedy")
      np.testing.assert_array_equal(plain.nfe, 12)
    np.testing.assert_array_equal(go(cache="block").nfe, 12)

  def test_published_greedy_continuation(self):
    for name in ("tiny_llama", "tiny_llama3rope", "tiny_qwen2", "tiny_qwen3"):
      path = GOLDEN / f"parallel_decoding/{name}_logits.npz"
      golden = np.load(path, allow_pickle=False)
      prompt, want = golden["greedy_prompt"], golden["greedy_out"]
      prompt = np.atleast_2d(prompt)
      got = decoding.generate(
        model(name),
        prompt,
        [prompt.shape[1]] * len(prompt),
        num_tokens=24,
        rule=decoding.autoregressive(),
        cache="block",
      )
      np.testing.assert_array_equal(got.answers, np.atleast_2d(want)[:, -24:])

  def test_threshold_above_one_is_one_token_per_step(self):
    for cache in ("none", "prefix", "dual", "block"):
      go = functools.partial(generate, model(), PROMPTS, [8] * 5, cache=cache)
      a, b = go(rule=decoding.threshold(1.01)), go(rule=decoding.top_n(12))
      np.testing.assert_array_equal(a.tokens, b.tokens)
      np.testing.assert_array_equal(a.nfe, b.nfe)


class BatchTest(parameterized.TestCase):
  """A row alone, in a mixed batch and in another order is the same row."""

  @parameterized.parameters(
    *zip(
      sorted(RULES), itertools.cycle(("dual", "block", "none")), strict=False
    ),
    *(("threshold", cache) for cache in CACHES),
  )
  def test_rows_do_not_know_their_neighbours(self, rule, cache):
    self.check(rule, cache)

  @parameterized.product(rule=sorted(RULES), cache=CACHES)
  @pytest.mark.slow
  def test_whatever_rule_and_cache(self, rule, cache):
    self.check(rule, cache)

  def check(self, rule, cache):
    sampled = dict(temperature=np.array([0.0, 0.8, 1.0, 0.5, 0.9]))
    if rule in ("credit", "editing", "entropy"):
      sampled = {}
    go = functools.partial(
      generate, model("tiny_llada_gqa"), rule=RULES[rule], cache=cache, key=KEY
    )
    together = go(PROMPTS, LENGTHS, **sampled)
    order = np.array([3, 0, 4, 2, 1])
    turned = {name: x[order] for name, x in sampled.items()}
    moved = go(PROMPTS[order], LENGTHS[order], seeds=order, **turned)
    for new, old in enumerate(order):
      for a, b in zip(leaves(together, old), leaves(moved, new), strict=True):
        np.testing.assert_array_equal(a, b)
    for row in (1, 4):
      own = {name: x[row, None] for name, x in sampled.items()}
      prompt = PROMPTS[row, None, : LENGTHS[row]]
      alone = go(prompt, LENGTHS[row, None], seeds=[row], **own)
      for a, b in zip(leaves(together, row), leaves(alone, 0), strict=True):
        np.testing.assert_array_equal(a, b)

  def test_other_seeds_other_tokens(self):
    go = functools.partial(
      generate, model(), PROMPTS, LENGTHS, rule=RULES["top_n"], key=KEY
    )
    a, b = go(temperature=1.0), go(temperature=1.0, seeds=range(9, 14))
    self.assertTrue((np.asarray(a.answers) != b.answers).any(1).all())

  def test_guidance_in_a_batch(self):
    for cache in ("none", "dual", "block"):
      go = functools.partial(
        generate, model(), rule=RULES["threshold"], cache=cache, guidance=1.0
      )
      together = go(PROMPTS, LENGTHS)
      for row in (0, 3):
        alone = go(PROMPTS[row, None, : LENGTHS[row]], LENGTHS[row, None])
        np.testing.assert_array_equal(together.answers[row], alone.answers[0])

  def test_one_program_per_bucket(self):
    traced = []

    @functools.partial(
      jax.tree_util.register_dataclass, data_fields=["inner"], meta_fields=[]
    )
    @dataclasses.dataclass(frozen=True)
    class Counting:
      inner: transformer.Bound
      ragged, causal, shift = True, False, False

      @property
      def head(self):
        return self.inner.head

      def init_cache(self, rows, slots):
        return self.inner.init_cache(rows, slots)

      def extend(self, tokens, *rest):
        traced.append(tokens.shape)
        return self.inner.extend(tokens, *rest)

    counted = Counting(model())
    rng = np.random.default_rng(0)
    for _ in range(100):
      length = int(rng.integers(1, 100))
      decoding.generate(
        counted,
        rng.integers(MASK - 1, size=(1, length)),
        [length],
        num_tokens=28,
        block_size=14,
        rule=decoding.threshold(0.1),
        cache="dual",
        mask_token=MASK,
      )
    slots = {shape[1] for shape in traced if shape[1] > 14}
    self.assertEqual(slots, {64, 96, 128})
    # the refresh (its shapes are asked for once) and the window
    self.assertLen(traced, 3 * len(slots))


class EndTest(parameterized.TestCase):
  @parameterized.parameters("none", "dual", "block")
  def test_eos_ends_a_row_after_its_block(self, cache):
    bound = model()
    free = generate(
      bound, PROMPTS, LENGTHS, rule=RULES["threshold"], cache=cache
    )
    stop = int(free.answers[0, 5])  # in the second block of row 0
    got = generate(
      bound,
      PROMPTS,
      LENGTHS,
      rule=RULES["threshold"],
      cache=cache,
      eos_token=stop,
    )
    for row in range(5):
      own, before = np.asarray(got.answers[row]), np.asarray(free.answers[row])
      where = np.flatnonzero(before == stop)
      if not len(where):
        np.testing.assert_array_equal(own, before)
        continue
      np.testing.assert_array_equal(own[: where[0]], before[: where[0]])
      np.testing.assert_array_equal(own[where[0] :], stop)
      self.assertLessEqual(got.nfe[row], free.nfe[row])
    self.assertLess(got.nfe[0], free.nfe[0])

  def test_forbidden_and_late_tokens(self):
    go = functools.partial(generate, model(), PROMPTS, LENGTHS)
    free = go(rule=decoding.top_n(12))
    bad = np.unique(np.asarray(free.answers))[:3].tolist()
    banned = go(rule=decoding.top_n(12), forbidden=bad)
    self.assertFalse(np.isin(banned.answers, bad).any())
    late = go(rule=decoding.top_n(12), late=bad)
    at = np.asarray(late.committed_at)
    self.assertTrue(np.isin(late.answers, bad).any())
    for row, n in enumerate(LENGTHS):
      for start in range(n, n + 12, 4):
        block = slice(start, start + 4)
        first = at[row, block].argmin()  # committed while others were masked
        if np.isin(late.tokens[row, block], bad).all():
          continue
        self.assertNotIn(int(late.tokens[row, block][first]), bad)

  @parameterized.parameters(*CACHES)
  def test_a_model_that_predicts_mask_ends(self, cache):
    bound = model()
    head = np.array(bound.params["head"])
    head[:, MASK] = 0
    head[:, :MASK] = -1e3 * np.sign(1e-9 + head[:, :MASK].mean())
    params = {**bound.params, "head": jnp.asarray(head)}
    bound = dataclasses.replace(bound, params=params)
    for forbid in (False, True):
      got = generate(
        bound,
        PROMPTS,
        LENGTHS,
        rule=RULES["threshold"],
        cache=cache,
        forbid_mask=forbid,
      )
      self.assertEqual((np.asarray(got.answers) == MASK).any(), not forbid)

  def test_nan_ends(self):
    bound = model()
    params = {**bound.params, "head": bound.params["head"] * jnp.nan}
    bound = dataclasses.replace(bound, params=params)
    for rule in RULES.values():
      got = generate(bound, PROMPTS, LENGTHS, rule=rule, key=KEY)
      self.assertLessEqual(int(got.nfe.max()), 40)

  def test_callback_sees_tokens_appear(self):
    seen = []
    go = functools.partial(
      generate, model(), PROMPTS, LENGTHS, rule=RULES["top_n"], cache="dual"
    )
    got = go(callback=seen.append, every=2)
    np.testing.assert_array_equal(got.tokens, go().tokens)
    self.assertLen(seen, -(-int(got.nfe.max()) // 2))
    masked = [x.masked.sum() for x in seen]
    self.assertEqual(masked, sorted(masked, reverse=True))
    self.assertEqual(masked[-1], 0)
    self.assertTrue((seen[0].tokens[seen[0].masked] == MASK).all())
    np.testing.assert_array_equal(seen[-1].tokens, got.tokens)

  def test_a_schedule_of_the_temperature(self):
    # Zero from the fourth token on: those are the best ones.
    frozen = lambda position: jnp.where(position < 3, 1.0, 0.0)
    go = functools.partial(
      decoding.generate,
      model("tiny_llama"),
      PROMPTS,
      LENGTHS,
      rule=decoding.autoregressive(),
      cache="block",
      key=KEY,
    )
    got = go(num_tokens=9, temperature=1.0, schedule=frozen)
    longer = np.zeros((5, 14), np.int32)
    for row, n in enumerate(LENGTHS):
      longer[row, : n + 3] = got.tokens[row, : n + 3]
    rest = (
      go(num_tokens=6)
      if False
      else decoding.generate(
        model("tiny_llama"),
        longer,
        LENGTHS + 3,
        num_tokens=6,
        rule=decoding.autoregressive(),
      )
    )
    np.testing.assert_array_equal(got.answers[:, 3:], rest.answers)

  def test_transforms_restrict_what_is_drawn(self):
    best = lambda logits: decoding.logits.top_k(logits, 1)
    go = functools.partial(
      generate, model(), PROMPTS, LENGTHS, rule=decoding.top_n(12), key=KEY
    )
    got = go(temperature=1.0, transform=best)
    np.testing.assert_array_equal(got.tokens, go().tokens)

  def test_gaps_are_filled_with_a_cache(self):
    tokens = RNG.integers(MASK - 1, size=(3, 24)).astype(np.int32)
    masked = RNG.random((3, 24)) < 0.4
    masked[:, 8:16] = False  # a block with nothing to do
    for cache in CACHES:
      got = decoding.fill(
        model(),
        tokens,
        masked,
        rule=RULES["threshold"],
        mask_token=MASK,
        block_size=8,
        cache=cache,
      )
      kept = np.where(masked, tokens, got.tokens)
      np.testing.assert_array_equal(kept, tokens)
      np.testing.assert_array_equal(np.asarray(got.committed_at) >= 0, masked)
    plain = decoding.fill(
      model(),
      tokens,
      masked,
      rule=RULES["threshold"],
      mask_token=MASK,
      block_size=8,
      block_causal=True,
    )
    np.testing.assert_array_equal(got.tokens, plain.tokens)  # cache "block"


class ProgramTest(parameterized.TestCase):
  @parameterized.parameters("none", "dual", "block")
  def test_no_logits_in_the_program(self, cache):
    size, rows, block = 126_464, 3, 5
    config = dataclasses.replace(
      transformer.Config(causal=False, vocab_size=size),
      **dict(width=16, depth=1, num_heads=2, num_kv_heads=2, head_dim=8),
      mlp_width=16,
    )
    shapes = jax.eval_shape(
      lambda: transformer.Transformer(config).init(
        jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
      )["params"]
    )
    bound = transformer.bind(config, shapes)
    program = block_diffusion.lower(
      bound,
      rows,
      4,
      num_tokens=10,
      block_size=block,
      rule=decoding.threshold(),
      cache=cache,
      mask_token=9,
      temperature=1.0,
    ).compile()
    text = program.as_text()
    assert text is not None
    for shape in (f"{rows},{block},{size}", f"{rows * block},{size}"):
      self.assertNotIn(f"[{shape}]", text)
      self.assertNotIn(f"[{shape[::-1]}]", text)
    self.assertNotIn(f"[{rows},64,{size}]", text)
    self.assertIn(f"{size}", text)  # the head is there


def on_a_mesh():
  """Run on eight devices: answers of a model that lies on four of them."""
  devices = np.array(jax.devices()[:4]).reshape(1, 1, 4)
  kinds = (jax.sharding.AxisType.Auto,) * 3
  mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "model"), axis_types=kinds)
  bound, found = model(), {}
  places = partitioning.specs(bound.params, mesh)
  put = lambda x, place: jax.device_put(
    x, jax.sharding.NamedSharding(mesh, place)
  )
  spread = dataclasses.replace(
    bound, params=jax.tree.map(put, bound.params, places)
  )
  for cache in ("dual", "block"):
    answers = [
      generate(x, PROMPTS, LENGTHS, rule=RULES["threshold"], cache=cache)
      for x in (bound, spread)
    ]
    found[cache] = [np.asarray(x.answers).tolist() for x in answers]
  split = jax.tree.leaves(jax.tree.map(lambda x: tuple(x), places))
  return found, "model" in split


def test_a_model_on_a_mesh(on_devices):
  found, is_split = on_devices(8, __file__, "on_a_mesh()")
  assert is_split
  for cache, (alone, spread) in found.items():
    assert alone == spread, cache


class HostileTest(parameterized.TestCase):
  @parameterized.parameters(
    (r"expected \[B, P\]", dict(prompts=PROMPTS[0])),
    ("float", dict(prompts=PROMPTS.astype(np.float32))),
    ("prompt_lengths has 12", dict(lengths=[12, 1, 1, 1, 1])),
    ("prompt_lengths has -1", dict(lengths=[-1, 1, 1, 1, 1])),
    ("expected 5 integers", dict(lengths=[1, 1])),
    ("prompt_lengths float64", dict(lengths=[1.5] * 5)),
    (r"prompts\[2, 1\]=96", dict(at=96)),
    (r"prompts\[2, 1\]=-1", dict(at=-1)),
    (r"prompts\[2, 1\] is the mask token 95.*fill", dict(at=MASK)),
    ("num_tokens=0", dict(num_tokens=0)),
    ("block_size=0", dict(block_size=0)),
    ("block_size=-4", dict(block_size=-4)),
    ("cache='duel': one of", dict(cache="duel")),
    ("refresh_every=0", dict(cache="refresh", refresh_every=0)),
    ("mask_token=None", dict(mask_token=None)),
    ("temperature=-0.5", dict(temperature=-0.5)),
    ("temperature=nan", dict(temperature=np.nan)),
    ("give a key", dict(temperature=1.0)),
    ("give a key", dict(rule=RULES["random"])),
    (r"seeds \(2,\)", dict(seeds=[1, 2])),
    ("guidance=-1", dict(guidance=-1.0)),
    ("forbidden=96", dict(forbidden=[96])),
    ("late=-3", dict(late=[-3])),
    ("eos_token=1000", dict(eos_token=1000)),
    ("every=0", dict(every=0)),
    ("block_causal=False", dict(cache="block", block_causal=False)),
  )
  def test_one_clear_error(self, message, options):
    options = {"rule": RULES["threshold"], **options}
    prompts = np.array(options.pop("prompts", PROMPTS))
    if "at" in options:
      prompts[2, 1] = options.pop("at")
    lengths = options.pop("lengths", LENGTHS)
    with self.assertRaisesRegex(ValueError, message):
      generate(model(), prompts, lengths, **options)

  def test_of_models(self):
    with self.assertRaisesRegex(ValueError, "needs a first token"):
      generate(model("tiny_dream"), PROMPTS, [0] * 5, rule=RULES["threshold"])
    config = transformer.Config(causal=False, window=4, vocab_size=96)
    params = jax.eval_shape(
      transformer.Transformer(config).init,
      jax.random.key(0),
      jax.ShapeDtypeStruct((1, 4), jnp.int32),
    )["params"]
    with self.assertRaisesRegex(ValueError, "takes none"):
      generate(
        transformer.bind(config, params),
        PROMPTS,
        LENGTHS,
        rule=RULES["threshold"],
        cache="dual",
      )

  def test_of_rules(self):
    for message, make in (
      ("steps=0", lambda: decoding.top_n(0)),
      ("confidence='luck'", lambda: decoding.top_n(2, "luck")),
      ("schedule='odd'", lambda: decoding.top_n(2, schedule="odd")),
      ("every=0", lambda: decoding.remasking(decoding.top_n(2), 1, 0, 1)),
      ("count=-1", lambda: decoding.remasking(decoding.top_n(2), -1, 1, 1)),
      ("Editing", lambda: decoding.remasking(decoding.editing(), 1, 1, 1)),
    ):
      with self.assertRaisesRegex(ValueError, message):
        make()

  def test_an_empty_prompt_and_an_empty_batch(self):
    got = generate(model(), PROMPTS[:2], [0, 2], rule=RULES["threshold"])
    self.assertEqual(got.answers.shape, (2, 12))
    alone = generate(
      model(), PROMPTS[:1, :0], [0], rule=RULES["threshold"], cache="dual"
    )
    self.assertTrue((np.asarray(alone.answers) < MASK).all())
    none = generate(model(), PROMPTS[:0], LENGTHS[:0], rule=RULES["threshold"])
    self.assertEqual(none.answers.shape, (0, 12))


if __name__ == "__main__":
  absltest.main()
