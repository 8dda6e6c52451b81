"""What the losses of flow maps ask of every network: derivatives in (s, t, x)
and gradients of them, in float64 against central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from giantsteps.models import dit, mlp, plain_mlp, unet, uvit

WIDE = {"dtype": "float64", "param_dtype": "float64", "two_times": True}
NETS = {
  "mlp": mlp.Mlp(mlp.Config(width=6, depth=2, **WIDE)),
  "plain_mlp": plain_mlp.PlainMlp(plain_mlp.Config(width=6, depth=2, **WIDE)),
  "dit": dit.Dit(dit.Config(width=8, depth=2, heads=2, qk_norm=True, **WIDE)),
  "uvit": uvit.Uvit(uvit.Config(width=8, depth=3, heads=2, **WIDE)),
  "unet": unet.Unet(
    unet.Config(channels=4, multipliers=(1,), head_dim=4, remat="full", **WIDE)
  ),
}


def directional(f, at, along, step=1e-5):
  """Central difference; the error is of order step^2 = 1e-10."""
  move = lambda h: jax.tree.map(lambda a, b: a + h * b, at, along)
  return (f(move(step)) - f(move(-step))) / (2 * step)


@pytest.mark.parametrize("name", NETS)
def test_tangent_and_its_gradient(name):
  net, rng = NETS[name], np.random.default_rng(0)
  normal = lambda like: 0.5 * rng.normal(size=like.shape)
  with jax.enable_x64(True):
    x, s, t = rng.normal(size=(2, 4, 4, 1)), rng.uniform(size=2), np.ones(2)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, t)["params"]
    params, other = (jax.tree.map(normal, shapes) for _ in range(2))
    inputs, along = (s, t, x), tuple(normal(a) for a in (s, t, x))

    @jax.jit
    def velocity(params, inputs):
      s, t, x = inputs
      return net.apply({"params": params}, x, t, s)

    weights = normal(x)

    @jax.jit
    def slope(params):
      push = lambda inputs: velocity(params, inputs)
      return jnp.vdot(weights, jax.jvp(push, (inputs,), (along,))[1])

    found = slope(params)
    assert found.dtype == jnp.float64
    value = lambda inputs: np.vdot(weights, velocity(params, inputs))
    want = directional(value, inputs, along)
    assert abs(want) > 1e-5
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-9)
    grads = jax.jit(jax.grad(slope))(params)
    found = sum(
      np.vdot(a, b)
      for a, b in zip(*map(jax.tree.leaves, (grads, other)), strict=True)
    )
    want = directional(slope, params, other)
    assert abs(want) > 1e-5
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-8)
