"""Decoding of a LLaDA-shaped model timed beside the loop that is usual: a full
forward pass and all logits in every step.

Both commit the same tokens by the same rule. Weights are random: what is
measured is the cost of a step, not the quality of an answer.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from giantsteps.models import transformer
from giantsteps.samplers import decoding
from giantsteps.samplers.decoding import block_diffusion

# LLaDA-8B's proportions at a sixteenth of its width.
SMALL = transformer.Config(
  vocab_size=7_904,
  width=256,
  depth=4,
  num_heads=8,
  num_kv_heads=8,
  head_dim=32,
  mlp_width=768,
  causal=False,
  rope_theta=500_000.0,
  eps=1e-5,
)
PROMPT, ANSWER, BLOCK = 192, 64, 32


def measure(
  config: transformer.Config = SMALL,
  rows: int = 1,
  rounds: int = 3,
  prompt: int = PROMPT,
  answer: int = ANSWER,
  block: int = BLOCK,
) -> list[dict[str, Any]]:
  """Times one token per step, in blocks, interleaved over `rounds`.

  Args:
    config: a bidirectional transformer; the last token is the mask.
    rows: B requests of one length, as the plain loop wants them.
    rounds: of all methods in turn, after one that compiles.
    prompt, answer, block: positions.

  Returns:
    One dict per method: name, rows, tokens_equal_to_the_plain_loop (share of
    all tokens, of the loop with the same attention), seconds [rounds],
    times_faster [rounds] than that loop, milliseconds_per_token (median),
    temporaries in bytes beside weights and results.
  """
  params = transformer.Transformer(config).init(
    jax.random.key(0), jnp.zeros((1, 8), jnp.int32)
  )["params"]
  bound = transformer.bind(config, dict(params))
  mask = config.vocab_size - 1
  rng = np.random.default_rng(0)
  prompts = rng.integers(mask, size=(rows, prompt)).astype(np.int32)
  lengths = np.full(rows, prompt)
  rule = decoding.top_n(answer)

  def ours(cache, block_causal=None):
    return decoding.generate(
      bound,
      prompts,
      lengths,
      num_tokens=answer,
      block_size=block,
      rule=rule,
      cache=cache,
      block_causal=block_causal,
      mask_token=mask,
    ).tokens

  plain = functools.partial(
    plain_loop, bound, prompts, mask=mask, answer=answer, block=block
  )
  methods = {
    "plain loop": lambda: plain(False),
    "none": lambda: ours("none"),
    "prefix": lambda: ours("prefix"),
    "dual": lambda: ours("dual"),
    "plain loop, block-causal": lambda: plain(True),
    "none, block-causal": lambda: ours("none", True),
    "block": lambda: ours("block"),
  }
  tokens = {name: np.asarray(run()) for name, run in methods.items()}
  seconds: dict[str, list[float]] = {name: [] for name in methods}
  for _ in range(rounds):
    for name, run in methods.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      seconds[name].append(time.perf_counter() - start)
  found = []
  for name, took in seconds.items():
    rival = "plain loop"
    if "block" in name:
      rival = "plain loop, block-causal"
    same = float(np.mean(tokens[name] == tokens[rival]))
    found.append(
      {
        "name": name,
        "rows": rows,
        "tokens_equal_to_the_plain_loop": same,
        "seconds": took,
        "times_faster": [
          a / b for a, b in zip(seconds[rival], took, strict=True)
        ],
        "milliseconds_per_token": 1e3 * float(np.median(took)) / answer / rows,
        "temporaries": _temporaries(
          bound, rows, name, mask, prompt, answer, block
        ),
      }
    )
  return found


def plain_loop(
  bound: transformer.Bound,
  prompts: np.ndarray,
  block_causal: bool,
  *,
  mask: int,
  answer: int,
  block: int,
) -> jax.Array:
  """One token per step: all positions, all logits, their softmax, every time.

  Returns:
    [B, P + answer] int32.
  """
  tokens = jnp.pad(
    jnp.asarray(prompts), ((0, 0), (0, answer)), constant_values=mask
  )
  return _plain(bound, tokens, prompts.shape[1], mask, block, block_causal)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _plain(bound, tokens, prompt, mask, block, block_causal):
  length = tokens.shape[1]
  place = jnp.arange(length)[None]
  limits = jnp.full((1, length), length)
  if block_causal:
    limits = jnp.minimum((place // block + 1) * block, length)

  def step(i, tokens):
    end = prompt + (i // block + 1) * block
    hidden, _ = bound.extend(tokens, place, None, limits)
    logits = transformer.project(hidden, bound.head).at[..., mask].set(-jnp.inf)
    best = jnp.argmax(logits, -1)
    p = jax.nn.softmax(logits, -1)
    sure = jnp.take_along_axis(p, best[..., None], -1)[..., 0]
    open_ = (tokens == mask) & (place < end)
    sure = jnp.where(open_, sure, -jnp.inf)
    chosen = jnp.argmax(sure, -1)
    row = jnp.arange(len(tokens))
    return tokens.at[row, chosen].set(best[row, chosen])

  return jax.lax.fori_loop(0, length - prompt, step, tokens)


def _temporaries(bound, rows, name, mask, prompt, answer, block):
  """Bytes that the compiled program needs beside weights and results."""
  causal = "block" in name
  if name.startswith("plain"):
    tokens = jax.ShapeDtypeStruct((rows, prompt + answer), jnp.int32)
    lowered = _plain.lower(bound, tokens, prompt, mask, block, causal)
  else:
    lowered = block_diffusion.lower(
      bound,
      rows,
      prompt,
      num_tokens=answer,
      block_size=block,
      rule=decoding.top_n(answer),
      cache=name.split(",")[0],
      block_causal=causal,
      mask_token=mask,
    )
  memory = lowered.compile().memory_analysis()
  return None if memory is None else memory.temp_size_in_bytes
