"""From a config to init, loss and evaluation: one `match`, no registry."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import data, map_losses
from giantsteps.models import (
  dit,
  lact,
  lact_views,
  mlp,
  partitioning,
  plain_mlp,
  token_loss,
  transformer,
  unet,
  uvit,
)
from giantsteps.research import flow_maps, large_batch
from giantsteps.research.diffusion_lm import block_diffusion, masked_diffusion

# Networks of images and points: Config -> module.
_DENOISERS = {
  mlp.Config: mlp.Mlp,
  plain_mlp.Config: plain_mlp.PlainMlp,
  dit.Config: dit.Dit,
  uvit.Config: uvit.Uvit,
  unet.Config: unet.Unet,
}


class Task(NamedTuple):
  """What a run learns, as functions of arrays.

  Attributes:
    init: key -> params.
    corrupt: (batch, key) -> arrays with everything random drawn for the
      whole batch, so that micro-batches and devices change nothing.
    loss: (params, arrays) -> [] float32, a mean over the rows.
    evaluate: (params, batch, key) -> {name: [] float32}.
    apply: (params, ...) -> the network's output, as the samplers want it:
      velocity(params, s, t, x) of a flow, the `Bound` model of tokens, the
      images (params, rays, image, known) of a scene.
    at_step: (arrays, step [] int32) -> arrays, for what changes in the course
      of a run; None: nothing does.
  """

  init: Callable
  corrupt: Callable
  loss: Callable
  evaluate: Callable
  apply: Callable
  at_step: Callable | None = None


def build(cfg: config_lib.Config, description: dict) -> Task:
  """The task of a config on data that `description` (data.json) describes.

  Raises:
    InputError: if task, model and data do not fit together.
  """
  fits = dict.fromkeys(_DENOISERS, "flow") | {lact_views.Config: "views"}
  wants = fits.get(type(cfg.model))
  if wants != cfg.task if wants else cfg.task in ("flow", "views"):
    raise config_lib.InputError(
      f"task={cfg.task!r} does not fit the model "
      f"{type(cfg.model).__module__.rpartition('.')[2]!r}: flow wants mlp, "
      "plain_mlp, dit, uvit or unet; masked and autoregressive want "
      "transformer or lact; views wants lact_views"
    )
  kind = description["kind"]
  wanted = {"flow": "image", "views": "views"}.get(cfg.task, "tokens")
  if cfg.task == "flow" and isinstance(
    cfg.model, (mlp.Config, plain_mlp.Config)
  ):
    wanted = "points" if kind == "points" else wanted  # they flatten anything
  if kind != wanted:
    raise config_lib.InputError(
      f"data.source={cfg.data.source!r} holds {kind} rows, task={cfg.task!r} "
      f"with this model wants {wanted} rows"
    )
  match cfg.task:
    case "flow":
      mapped = cfg.flow_map.loss != "none"
      return (flow_map if mapped else flow)(cfg, description)
    case "masked":
      return blocks(cfg) if cfg.block_size else masked(cfg)
    case "views":
      return views(cfg)
    case _:
      return autoregressive(cfg)


def load_data(cfg: config_lib.Config) -> data.Dataset:
  """The rows of a config; tokens beyond the model's vocabulary are refused."""
  match cfg.task:
    case "flow" | "views":
      return data.load(cfg.data)
    case "masked":
      return data.load(cfg.data, mask_token(cfg))
    case _:
      return data.load(cfg.data, cfg.model.vocab_size)


def mask_token(cfg: config_lib.Config) -> int:
  """The last id of a masked model's vocabulary: 256 for bytes."""
  return cfg.model.vocab_size - 1


def optimizer(cfg: config_lib.Config) -> optax.GradientTransformation:
  """The transform of `cfg.optim`, its schedule over `cfg.steps`; weights that
  live on a sphere end every step there."""
  tx = _transform(cfg)
  if not isinstance(cfg.model, unet.Config):
    return tx

  def onto_sphere(updates, params):
    moved = unet.project(optax.apply_updates(params, updates))
    return jax.tree.map(jnp.subtract, moved, params)

  return optax.chain(tx, optax.stateless(onto_sphere))


def _transform(cfg: config_lib.Config) -> optax.GradientTransformation:
  o = cfg.optim
  rate = schedule(cfg, o.learning_rate)
  match o.name:
    case "lamb":
      return large_batch.lamb(
        rate,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        trust_mask=large_batch.matrices,
        decay_mask=large_batch.matrices,
      )
    case "adamw":
      return optax.adamw(
        rate,
        o.b1,
        o.b2,
        o.eps,
        weight_decay=o.weight_decay,
        mask=large_batch.matrices,
      )
    case "radam":
      return optax.chain(
        optax.scale_by_radam(o.b1, o.b2, o.eps),
        optax.add_decayed_weights(o.weight_decay, large_batch.matrices),
        optax.scale_by_learning_rate(rate),
      )
    case "lars":
      return large_batch.lars(
        rate,
        momentum=o.b1,
        trust_coefficient=o.trust_coefficient,
        weight_decay=o.weight_decay,
        trust_mask=large_batch.matrices,
        decay_mask=large_batch.matrices,
      )
    case "nesterov":
      decay = optax.add_decayed_weights(o.weight_decay, large_batch.matrices)
      return optax.chain(decay, optax.sgd(rate, o.b1, nesterov=True))
    case _:  # Muon for the matrices of the stack, AdamW for everything else
      return optax.contrib.muon(
        rate,
        adam_b1=o.b1,
        adam_b2=o.b2,
        weight_decay=o.weight_decay,
        adam_learning_rate=schedule(
          cfg, o.adam_learning_rate or o.learning_rate
        ),
        muon_weight_dimension_numbers=_muon_axes,
      )


def schedule(cfg: config_lib.Config, peak: float) -> Callable:
  """step (from 0) -> rate of `cfg.optim`, risen anew in a second stage."""
  o, second = cfg.optim, cfg.second
  first = _rise_and(o, peak, second.start or cfg.steps, o.warmup)
  if not second.start:
    return first
  peak = peak * second.learning_rate / o.learning_rate
  rest = _rise_and(o, peak, cfg.steps - second.start, second.warmup)
  return optax.join_schedules([first, rest], [second.start])


def _rise_and(o: config_lib.Optim, peak: float, steps: int, warmup: int):
  """Linear rise over the warm-up, then the shape of `o.schedule`."""
  rest = max(steps - warmup, 1)
  match o.schedule:
    case "constant":
      tail = optax.constant_schedule(peak)
    case "cosine":
      tail = optax.cosine_decay_schedule(peak, rest, o.end_factor)
    case "inverse_sqrt":
      tail = lambda t: peak / jnp.sqrt(jnp.maximum(t / o.hold, 1.0))
    case _:
      tail = optax.linear_schedule(peak, peak * o.end_factor, rest)
  # step t (from 0) of w warm-up steps has (t + 1)/w of the peak: never zero
  rise = lambda t: peak * jnp.minimum(1.0, (t + 1) / warmup)
  return optax.join_schedules([rise, tail], [warmup]) if warmup else tail


def _muon_axes(params: Any) -> Any:
  """(input, output) axes of the stacked matrices, else None.

  They are [L, in, out], or [L, E, in, out] of experts. A router is none: it
  scores, it does not map hidden states to hidden states.
  """

  def axes(path, leaf):
    keys = [getattr(key, "key", "") for key in path]
    *_, above, name = ("", *keys)
    stacked = "layers" in keys
    kernel = name == "kernel" and not above.startswith(("conv_", "router"))
    if not stacked or leaf.ndim != (3 if kernel else 4):
      return None
    if kernel or above == "experts":
      return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)
    return None

  return jax.tree_util.tree_map_with_path(axes, params)


def flow(cfg: config_lib.Config, description: dict) -> Task:
  """Flow matching on the linear path (research/flow_maps), time upwards.

  The base has the standard deviation sigma_0 of the data, so the network
  sees unit variance at both ends: velocity = sigma_0 net(x / sigma_0, t).
  """
  path, sigma_0 = flow_maps.linear(), base_std(cfg, description)
  classes = cfg.model.num_classes
  init, apply = _velocity(cfg, description)

  def corrupt(batch, key):
    x1 = _clean(batch)
    noise, time = jax.random.split(key)
    rows = x1.shape[0]
    # stratified: every batch covers [0, 1) evenly
    t = (jnp.arange(rows) + jax.random.uniform(time, (rows,))) / rows
    x0 = sigma_0 * jax.random.normal(noise, x1.shape)
    labels = {"label": batch["label"]} if classes else {}
    return {"x0": x0, "x1": x1, "t": t, **labels, **_dropout(cfg, key, rows)}

  def loss(params, arrays):
    velocity = _with_dropout(apply, params, arrays)
    losses = flow_maps.flow_matching_loss(
      velocity, arrays["x0"], arrays["x1"], arrays["t"], path
    )
    return jnp.mean(losses) / arrays["x1"][0].size

  def evaluate(params, batch, key):
    arrays = corrupt(batch, key)
    arrays.pop("dropout", None)
    return {"held_out_loss": loss(params, arrays)}

  return Task(init, corrupt, loss, evaluate, apply)


def flow_map(cfg: config_lib.Config, description: dict) -> Task:
  """A velocity on the diagonal and jumps off it (research/flow_maps).

  Every batch is split once, before micro-batches and devices: the loss is the
  sum of both parts over the batch, squared norms summed over coordinates (of
  `flow` they are averaged). Dropout acts on the diagonal only. A learned weight
  is one more leaf of the parameters.
  """
  wants, sigma_0 = cfg.flow_map, base_std(cfg, description)
  path, classes = interpolant(cfg), cfg.model.num_classes
  init_network, apply = _velocity(cfg, description)

  def init(key):
    params = init_network(key)
    if wants.weight == "learned":
      key = jax.random.fold_in(key, 1)
      params = {**params, "log_weight": flow_maps.weights.init(key)}
    return params

  def corrupt(batch, key):
    x1 = _clean(batch)
    rows = x1.shape[0]
    noise, time, middle, drop = jax.random.split(key, 4)
    arrays = {"x0": sigma_0 * jax.random.normal(noise, x1.shape), "x1": x1}
    if classes:
      arrays["label"] = batch["label"]
    s, t = map_losses.draw_times(wants, time, rows)
    count = flow_maps.times.diagonal_count(rows, wants.diagonal)
    diagonal, jumps = map_losses.split(arrays, count)
    diagonal |= {"t": t[:count], **_dropout(cfg, drop, count)}
    s, t = s[count:], t[count:]
    r = jax.random.uniform(middle, s.shape)
    return {"diagonal": diagonal, "jumps": {**jumps, "s": s, "t": t, "r": r}}

  def at_step(arrays, step):
    jumps = arrays["jumps"]
    progress = (step + 1) / (wants.anneal * cfg.steps)
    s = flow_maps.times.annealed(jumps["s"], jumps["t"], progress)
    return arrays | {"jumps": jumps | {"s": s}}

  def diagonal_losses(params, arrays):
    velocity = _with_dropout(apply, params, arrays)
    return flow_maps.flow_matching_loss(
      velocity, arrays["x0"], arrays["x1"], arrays["t"], path
    )

  def jump_losses(params, arrays):
    velocity = lambda s, t, x: apply(params, s, t, x, arrays.get("label"))
    x0, x1, s, t, r = (arrays[k] for k in ("x0", "x1", "s", "t", "r"))
    return map_losses.jumps(wants.loss, velocity, x0, x1, s, t, r, path)

  def loss(params, arrays):
    diagonal, jumps = arrays["diagonal"], arrays["jumps"]
    losses = jump_losses(params, jumps)
    s, t = jumps["s"], jumps["t"]
    if wants.diagonal:
      losses = jnp.concatenate([diagonal_losses(params, diagonal), losses])
      s, t = (jnp.concatenate([diagonal["t"], x]) for x in (s, t))
    match wants.weight:
      case "adaptive":
        losses = flow_maps.weights.adaptive(losses)
      case "learned":
        w = flow_maps.weights.log_weight(params["log_weight"], s, t)
        losses = flow_maps.weights.learned(losses, w)
    return jnp.mean(losses)

  def evaluate(params, batch, key):
    # unweighted, per coordinate, every row once of either kind
    x1 = _clean(batch)
    rows, size = x1.shape[0], x1[0].size
    arrays = {"x0": sigma_0 * jax.random.normal(key, x1.shape), "x1": x1}
    if classes:
      arrays["label"] = batch["label"]
    key = jax.random.fold_in(key, 1)
    even = (jnp.arange(rows) + jax.random.uniform(key, (rows,))) / rows
    s, t = flow_maps.times.triangle(key, rows, diagonal=0.0)
    r = jax.random.uniform(jax.random.fold_in(key, 1), (rows,))
    jumps = jump_losses(params, {**arrays, "s": s, "t": t, "r": r})
    diagonal = diagonal_losses(params, {**arrays, "t": even})
    return {
      "held_out_loss": jnp.mean(diagonal) / size,
      "held_out_jump_loss": jnp.mean(jumps) / size,
    }

  changed = at_step if wants.anneal else None
  return Task(init, corrupt, loss, evaluate, apply, changed)


def base_std(cfg: config_lib.Config, description: dict) -> float:
  """sigma_0, the standard deviation of the noise that a flow starts from."""
  return cfg.flow_map.sigma_0 or description["std"]


def interpolant(cfg: config_lib.Config) -> flow_maps.Interpolant:
  """The path of a flow, clock rising."""
  if cfg.flow_map.interpolant == "linear":
    return flow_maps.linear()
  return flow_maps.trigonometric()


def flow_map_rows(cfg: config_lib.Config) -> dict[str, int]:
  """Rows on the diagonal and rows that jump, named for a message; {} where
  no map is learned."""
  wants = cfg.flow_map
  if wants.loss == "none":
    return {}
  count = flow_maps.times.diagonal_count(cfg.batch_size, wants.diagonal)
  of = f"of batch_size={cfg.batch_size}, flow_map.diagonal={wants.diagonal}"
  return {
    f"{of}, the diagonal's share": count,
    f"{of}, the jumps' share": cfg.batch_size - count,
  }


def _velocity(cfg: config_lib.Config, description: dict):
  """init and apply of sigma_0 net(x / sigma_0, s, t): the network sees unit
  variance at both ends."""
  sigma_0, shape = base_std(cfg, description), tuple(description["shape"])
  classes = cfg.model.num_classes
  if classes and classes != description["num_classes"]:
    raise config_lib.InputError(
      f"model.num_classes={classes}: {cfg.data.source!r} has "
      f"{description['num_classes']} classes; 0 ignores them"
    )
  network = _DENOISERS[type(cfg.model)](cfg.model)

  def init(key):
    return network.init(key, jnp.zeros((1, *shape)), jnp.zeros(1))["params"]

  def apply(params, s, t, x, labels=None, dropout=None):
    s = s if cfg.model.two_times else None  # None is the diagonal s = t
    rngs = {} if dropout is None else {"dropout": dropout}
    params = {k: v for k, v in params.items() if k != "log_weight"}
    variables = {"params": params}
    return sigma_0 * network.apply(
      variables, x / sigma_0, t, s, labels, rngs=rngs
    )

  return init, apply


def _clean(batch: dict) -> jax.Array:
  return batch["point"] if "point" in batch else batch["image"]


def _dropout(cfg: config_lib.Config, key: jax.Array, rows: int) -> dict:
  """One key per row, since rows are divided; {} for networks without it."""
  if not getattr(cfg.model, "dropout", 0.0):
    return {}
  key = jax.random.fold_in(key, 2)
  return {"dropout": jax.random.key_data(jax.random.split(key, rows))}


def _with_dropout(apply: Callable, params: Any, arrays: dict) -> Callable:
  """velocity(s, t, x) in training, or in evaluation if no key is there."""
  dropout = None
  if "dropout" in arrays:
    dropout = jax.random.wrap_key_data(arrays["dropout"][0])
  return lambda s, t, x: apply(params, s, t, x, arrays.get("label"), dropout)


def masked(cfg: config_lib.Config) -> Task:
  """Masked diffusion of whole rows (LLaDA, research/diffusion_lm)."""
  init, module = _language_model(cfg, causal=False)
  first = int(_shifted(cfg))  # what is before it is given

  def loss(params, arrays):
    hidden, head, balance = _forward(cfg, module, params, arrays["noisy"])
    hidden = transformer.shifted(hidden) if first else hidden
    losses = token_loss.cross_entropy(hidden, head, arrays["tokens"])
    return balance + masked_diffusion.pretrain_mean(
      *(x[:, first:] for x in (losses, arrays["masked"], arrays["p"]))
    )

  def evaluate(params, batch, key):
    tokens, model = batch["tokens"], module.bind(cfg.model, params)
    nats = masked_diffusion.negative_log_likelihood_bound(
      lambda noisy: transformer.project(model.forward(noisy)[0], model.head),
      tokens,
      key,
      mask_token(cfg),
      scored=_scored(cfg, tokens),
    )
    return {"held_out_bits_per_byte": jnp.mean(nats) / jnp.log(2.0)}

  corrupt = lambda batch, key: _corrupt(
    cfg, batch["tokens"], key, cfg.rate_low, cfg.rate_high
  )
  return Task(init, corrupt, loss, evaluate, _bind(cfg, module))


def blocks(cfg: config_lib.Config) -> Task:
  """Masked diffusion of blocks, each given those before it (BD3-LM)."""
  init, module = _language_model(cfg, causal=False)
  if module is not transformer or not transformer.ragged(cfg.model):
    raise config_lib.InputError(
      f"block_size={cfg.block_size}: wants a transformer without window and "
      "short_conv, such as that of --config code_blocks; 0 trains whole rows"
    )
  double = lambda arrays: block_diffusion.doubled(
    arrays["noisy"], arrays["tokens"], cfg.block_size
  )

  def nats(outputs, head, arrays):
    return block_diffusion.loss(
      outputs,
      head,
      arrays["tokens"],
      arrays["masked"],
      arrays["p"],
      block_size=cfg.block_size,
      shift=_shifted(cfg),
    )

  def loss(params, arrays):
    outputs, head, balance = _forward(cfg, module, params, *double(arrays))
    return balance + nats(outputs, head, arrays)

  def evaluate(params, batch, key):
    # a bound of the likelihood, whatever rates are trained
    arrays = _corrupt(cfg, batch["tokens"], key, 0.0, 1.0)
    outputs, head = _hidden(cfg, module, params, *double(arrays))
    bits = nats(outputs, head, arrays) / jnp.log(2.0)
    return {"held_out_bits_per_byte": bits}

  corrupt = lambda batch, key: _corrupt(
    cfg, batch["tokens"], key, cfg.rate_low, cfg.rate_high
  )
  return Task(init, corrupt, loss, evaluate, _bind(cfg, module))


def _corrupt(cfg, tokens, key, low, high):
  """Noisy rows, what is masked and with which probability, all [B, T].

  Differs from the papers: exactly 1 + floor(t W) of the W bytes of a block, or
  row, are masked, t ~ U[low, high), not each with probability t. The same bound
  (equation 6 of LLaDA), and a block that drew few masks weighs no more than
  the others.
  """
  time, place = jax.random.split(key)
  rows, length = tokens.shape
  size = cfg.block_size or length
  scored = _scored(cfg, tokens).reshape(-1, size)
  total = jnp.sum(scored, 1)
  t = block_diffusion.stratified_times(time, rows, length // size).reshape(-1)
  counts = 1 + ((low + (high - low) * t) * total).astype(jnp.int32)
  counts = jnp.minimum(counts, total)
  hidden = masked_diffusion.exact_count_mask(place, counts, scored)
  p = jnp.maximum(counts, 1) / jnp.maximum(total, 1)  # of none: anything
  p = jnp.broadcast_to(p[:, None], hidden.shape).reshape(tokens.shape)
  hidden = hidden.reshape(tokens.shape)
  noisy = jnp.where(hidden, mask_token(cfg), tokens)
  return {"tokens": tokens, "noisy": noisy, "masked": hidden, "p": p}


def _scored(cfg, tokens):
  """[B, T] bool: of a shifted model nothing scores the first token."""
  scored = jnp.arange(tokens.shape[1]) >= int(_shifted(cfg))
  return jnp.broadcast_to(scored[None], tokens.shape)


def _shifted(cfg: config_lib.Config) -> bool:
  """Whether a masked model scores a token from the one before it (Dream)."""
  return getattr(cfg.model, "shifted", False)


def autoregressive(cfg: config_lib.Config) -> Task:
  """Next-token prediction; the first token of a row is given."""
  init, module = _language_model(cfg, causal=True)

  def cross_entropy(hidden, head, arrays):
    # the last position predicts nothing; without it chunks would be ragged
    following = jnp.roll(arrays["tokens"], -1, axis=1)
    losses = token_loss.cross_entropy(hidden, head, following)[:, :-1]
    weights = arrays.get("weights")
    weights = jnp.ones_like(losses) if weights is None else weights[:, 1:]
    return jnp.sum(losses * weights) / jnp.sum(weights)

  def loss(params, arrays):
    hidden, head, balance = _forward(cfg, module, params, arrays["tokens"])
    return balance + cross_entropy(hidden, head, arrays)

  def evaluate(params, batch, key):
    del key  # nothing is random
    hidden, head = _hidden(cfg, module, params, batch["tokens"])
    nats = cross_entropy(hidden, head, batch)
    return {"held_out_bits_per_byte": nats / jnp.log(2.0)}

  corrupt = lambda batch, key: batch
  return Task(init, corrupt, loss, evaluate, _bind(cfg, module))


def views(cfg: config_lib.Config) -> Task:
  """Unseen views of a scene from 1, 2, 4, ... of its views (LaCT).

  Differs from the paper: mean squared error only, without the perceptual loss
  LPIPS, whose network is not at hand; and the number of input views is drawn
  for every scene, so that one model serves all of them. Views that are not
  given are all asked for.
  """
  model, side = cfg.model, cfg.data.side
  if side % model.patch:
    raise config_lib.InputError(
      f"data.side={side}: not a multiple of model.patch={model.patch}"
    )
  num_inputs = view_counts(cfg.data.views)

  def init(key):
    rays = jnp.zeros((1, cfg.data.views, side, side, 6))
    image = jnp.zeros((1, num_inputs[-1], side, side, 3))
    return lact_views.LactViews(model).init(key, rays, image)["params"]

  def apply(params, rays, image, known=None):
    return lact_views.predict(model, params, rays, image, known)

  def corrupt(batch, key):
    rows = batch["image"].shape[0]
    choices = jnp.asarray(num_inputs)
    # in turns: every batch holds every number of views equally often
    first = jax.random.randint(key, (), 0, len(num_inputs))
    count = choices[(first + jnp.arange(rows)) % len(num_inputs)]
    known = jnp.arange(num_inputs[-1])[None] < count[:, None]
    return {**batch, "known": known}

  def squared_errors(params, arrays):
    """[B] mean squared error over the views that were not given."""
    image, known = arrays["image"], arrays["known"]
    out = apply(params, arrays["rays"], image[:, : known.shape[1]], known)
    error = jnp.mean((out - image) ** 2, (2, 3, 4))  # [B, V]
    asked = jnp.pad(
      ~known, ((0, 0), (0, error.shape[1] - known.shape[1])), constant_values=1
    )
    return jnp.sum(error * asked, 1) / jnp.sum(asked, 1)

  def loss(params, arrays):
    return jnp.mean(squared_errors(params, arrays))

  def evaluate(params, batch, key):
    error = squared_errors(params, corrupt(batch, key))
    return {"held_out_psnr": jnp.mean(-10 * jnp.log10(error))}

  return Task(init, corrupt, loss, evaluate, apply)


def view_counts(num_views: int) -> tuple[int, ...]:
  """The numbers of input views: powers of two below `num_views`."""
  return tuple(2**i for i in range((num_views - 1).bit_length()))


def _language_model(cfg: config_lib.Config, causal: bool):
  """The init function and the module of a token model that fits the task."""
  if cfg.model.causal != causal:
    raise config_lib.InputError(
      f"task={cfg.task!r} wants model.causal={str(causal).lower()}"
    )
  if isinstance(cfg.model, lact.Config):
    module, network = lact, lact.Lact(cfg.model)
  else:
    module, network = transformer, transformer.Transformer(cfg.model)
  tokens = jnp.zeros((1, cfg.data.seq_len), jnp.int32)
  return lambda key: network.init(key, tokens)["params"], module


def _forward(
  cfg: config_lib.Config,
  module: Any,
  params: Any,
  tokens: Any,
  positions: Any = None,
  mask: Any = None,
):
  """Hidden states, the head, and the weighted load-balancing loss summed over
  the layers."""
  if not (getattr(cfg.model, "num_experts", 0) and cfg.balance_weight):
    return *_hidden(cfg, module, params, tokens, positions, mask), 0.0
  hidden, load = module.hidden_and_load(
    cfg.model, params, tokens, None, positions, mask
  )
  losses, _ = large_batch.global_batch_loss(
    load, cfg.model.experts_per_token, partitioning.mapped_axes()
  )
  head = module.bind(cfg.model, params).head
  return hidden, head, cfg.balance_weight * jnp.sum(losses)


def _hidden(
  cfg: config_lib.Config,
  module: Any,
  params: Any,
  tokens: Any,
  positions: Any = None,
  mask: Any = None,
):
  """What the model says before its head, [B, T, D], and the head [D, V]."""
  bound = module.bind(cfg.model, params)
  return bound.outputs(tokens, positions, mask), bound.head


def _bind(cfg: config_lib.Config, module: Any) -> Callable:
  return lambda params: module.bind(cfg.model, params)
