"""Rendered scenes against constructions whose answer is known."""

import numpy as np
from absl.testing import absltest, parameterized

from giantsteps.research.test_time_training import novel_views

RNG = np.random.default_rng(0)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def lone_sphere(centre, radius, light=(0.0, 0.0, 1.0)):
  return novel_views.Scene(
    box=np.array([False]),
    centre=np.array([centre]),
    size=np.full((1, 3), radius),
    yaw=np.zeros(1),
    albedo=np.array([[1.0, 0.5, 0.25]]),
    ground=np.array([0.2, 0.4, 0.6]),
    sky=np.array([0.7, 0.8, 0.9]),
    light=np.asarray(light),
  )


class HitTest(parameterized.TestCase):
  def rays_to(self, point, normal):
    """Rays from outside that meet `point` first, and their lengths."""
    direction = unit(RNG.normal(size=point.shape))
    away = np.sum(direction * normal, -1, keepdims=True)
    direction = np.where(away > 0, -direction, direction)  # against the normal
    length = RNG.uniform(0.1, 3.0, size=len(point))
    return point - length[:, None] * direction, direction, length

  def test_sphere(self):
    centre, radius = np.array([0.3, -0.2, 0.5]), 0.4
    normal = unit(RNG.normal(size=(500, 3)))
    origin, direction, length = self.rays_to(centre + radius * normal, normal)
    distance, found = novel_views.hit_sphere(
      origin, direction, centre, np.full(3, radius)
    )
    # grazing rays: the root of a difference near 0 loses half the digits
    np.testing.assert_allclose(distance, length, atol=1e-7)
    np.testing.assert_allclose(found, normal, atol=1e-6)

  def test_sphere_at_impact_parameter(self):
    # a ray along x at distance b of the centre meets at c - sqrt(r^2 - b^2)
    origin = np.array([[-2.0, 0.3, 0.0], [-2.0, 0.5001, 0.0], [2.0, 0.0, 0.0]])
    direction = np.tile([1.0, 0.0, 0.0], (3, 1))
    distance, normal = novel_views.hit_sphere(
      origin, direction, np.zeros(3), np.full(3, 0.5)
    )
    np.testing.assert_allclose(distance, [2 - 0.4, np.inf, np.inf])
    np.testing.assert_allclose(normal[0], [-0.8, 0.6, 0.0])
    np.testing.assert_array_equal(normal[1:], 0)

  @parameterized.parameters(0.0, 0.7)
  def test_box(self, yaw):
    centre, size = np.array([0.1, 0.4, 0.3]), np.array([0.2, 0.3, 0.15])
    axis = RNG.integers(0, 3, 500)
    sign = RNG.choice([-1.0, 1.0], 500)
    local = RNG.uniform(-0.999, 0.999, (500, 3)) * size
    local[np.arange(500), axis] = sign * size[axis]
    cos, sin = np.cos(yaw), np.sin(yaw)
    frame = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    normal = sign[:, None] * frame[axis]
    origin, direction, length = self.rays_to(centre + local @ frame, normal)
    distance, found = novel_views.hit_box(origin, direction, centre, size, yaw)
    np.testing.assert_allclose(distance, length, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found, normal, atol=1e-12)

  def test_box_is_missed_beside_and_behind(self):
    origin = np.array([[-2.0, 0.31, 0.0], [2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]])
    direction = np.tile([1.0, 0.0, 0.0], (3, 1))
    distance, _ = novel_views.hit_box(
      origin, direction, np.zeros(3), np.array([0.2, 0.3, 0.1]), 0.0
    )
    np.testing.assert_allclose(distance, [np.inf, np.inf, 1.8])

  def test_ground(self):
    origin = np.array([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    direction = unit(np.array([[3.0, 0, -4.0], [1.0, 0, 0], [10.0, 0, -1.0]]))
    distance, normal = novel_views.hit_ground(origin, direction)
    np.testing.assert_allclose(distance, [1.25, np.inf, np.inf])
    np.testing.assert_array_equal(normal, [[0, 0, 1]] * 3)


class CameraTest(absltest.TestCase):
  def test_axes_by_hand(self):
    (axes,) = novel_views.axes(novel_views.TARGET + np.array([[1.0, 0, 0]]))
    np.testing.assert_allclose(
      axes, [[0, 1, 0], [0, 0, 1], [-1, 0, 0]], atol=1e-15
    )

  def test_field_of_view(self):
    # A camera on the x axis sees y = +-tan(fov/2) at the image's edges.
    position = novel_views.TARGET + np.array([[1.0, 0, 0]])
    edge = np.tan(np.deg2rad(45) / 2)
    for point, where in (
      ([0, 0, 0], (15.5, 15.5)),
      ([0, edge, 0], (15.5, 31.5)),
      ([0, -edge, 0], (15.5, -0.5)),
      ([0, 0, edge], (-0.5, 15.5)),
    ):
      (found,) = novel_views.project(
        position, novel_views.TARGET + np.array(point), 32
      )
      np.testing.assert_allclose(found, where, atol=1e-12)

  def test_rays_and_projection_are_inverse(self):
    position = novel_views.cameras(3, 5, 6)
    rays = novel_views.rays(position, 8)
    np.testing.assert_allclose(np.linalg.norm(rays[..., 3:], axis=-1), 1)
    for row, column in ((0, 0), (7, 2), (3, 6)):
      origin, direction = np.split(rays[:, row, column], 2, -1)
      for view in range(6):
        (found,) = novel_views.project(
          position[view : view + 1], origin[view] + 0.7 * direction[view], 8
        )
        np.testing.assert_allclose(found, (row, column), atol=1e-9)

  def test_cameras_are_above_the_ground_at_distance_one(self):
    position = novel_views.cameras(0, 0, 1000) - novel_views.TARGET
    np.testing.assert_allclose(np.linalg.norm(position, axis=-1), 1)
    degrees = np.rad2deg(np.arcsin(position[:, 2]))
    self.assertBetween(degrees.min(), 12, 13)
    self.assertBetween(degrees.max(), 64, 65)


class RenderTest(absltest.TestCase):
  def colour(self, scene, point, normal):
    """Colour of the ray that meets `point` along -normal."""
    ray = np.concatenate([np.asarray(point) + normal, -np.asarray(normal)])
    return novel_views.render(scene, ray[None])[0]

  def test_shading(self):
    light = np.array([0.6, 0.0, 0.8])
    centre = np.array([0.0, 0.0, 3.0])
    scene = lone_sphere(centre, 1.0, light)
    albedo, ambient = scene.albedo[0], novel_views.AMBIENT
    half = np.array([-0.8, 0.0, 0.6]) * np.sqrt(3) / 2 + light / 2
    for normal, want in (
      (light, albedo),
      (half, albedo * (ambient + (1 - ambient) / 2)),
      (np.array([-0.8, 0.0, 0.6]), albedo * ambient),  # at right angles
      (-light, albedo * ambient),  # turned away
    ):
      found = self.colour(scene, centre + normal, normal)
      np.testing.assert_allclose(found, want, atol=1e-7)
    ground = self.colour(scene, np.array([1.5, 0, 0]), np.array([0, 0, 1.0]))
    np.testing.assert_allclose(
      ground, scene.ground * (ambient + (1 - ambient) * 0.8)
    )
    up = np.array([[5.0, 0, 1, 0, 0, 1]])
    np.testing.assert_array_equal(novel_views.render(scene, up)[0], scene.sky)

  def test_the_nearest_object_is_seen(self):
    one = lone_sphere((0, 0, 1.0), 0.2)
    two = novel_views.Scene(
      box=np.array([False, True]),
      centre=np.array([[0, 0, 1.0], [0, 0, 2.0]]),
      size=np.array([[0.2] * 3, [0.3] * 3]),
      yaw=np.zeros(2),
      albedo=np.array([[1.0, 0.5, 0.25], [0.1, 0.2, 0.3]]),
      ground=one.ground,
      sky=one.sky,
      light=one.light,
    )
    above = np.array([[0.0, 0, 5, 0, 0, -1]])
    below = np.array([[0.0, 0, 0.1, 0, 0, 1]])
    np.testing.assert_allclose(
      novel_views.render(two, above)[0], [0.1, 0.2, 0.3]
    )
    np.testing.assert_allclose(
      novel_views.render(two, below)[0],
      novel_views.AMBIENT * two.albedo[0],
    )

  def test_a_sphere_is_where_the_camera_says(self):
    centre = np.array([0.1, -0.05, 0.15])
    scene = lone_sphere(centre, 0.05)
    position = novel_views.cameras(1, 2, 8)
    image = novel_views.render(scene, novel_views.rays(position, 128))
    # red > blue only on the sphere
    seen = image[..., 0] > image[..., 2]
    want = novel_views.project(position, centre, 128)
    for view in range(8):
      found = np.argwhere(seen[view]).mean(0)
      # The disc is about 7.7 pixels in radius; seen up to 22 degrees off the
      # axis it is an ellipse whose middle lies up to r^2/d^2 ~ .25 % outside.
      np.testing.assert_allclose(found, want[view], atol=0.3)


class SceneTest(absltest.TestCase):
  def test_pure_function_of_seed_and_index(self):
    image, rays = novel_views.views(0, 7, 3, 8)
    self.assertEqual((image.shape, rays.shape), ((3, 8, 8, 3), (3, 8, 8, 6)))
    self.assertEqual({image.dtype, rays.dtype}, {np.dtype(np.float32)})
    again, _ = novel_views.views(0, 7, 5, 8)
    np.testing.assert_array_equal(again[:3], image)
    for seed, index in ((0, 8), (1, 7)):
      other, _ = novel_views.views(seed, index, 3, 8)
      self.assertGreater(np.abs(other - image).max(), 0.05)

  def test_objects_stand_on_the_ground_and_vary(self):
    counts = set()
    for index in range(60):
      scene = novel_views.scene(0, index)
      counts.add(len(scene.box))
      np.testing.assert_array_equal(scene.centre[:, 2], scene.size[:, 2])
      np.testing.assert_allclose(np.linalg.norm(scene.light), 1)
      for colour in (scene.albedo, scene.ground, scene.sky):
        self.assertTrue(((colour >= 0) & (colour <= 1)).all())
    self.assertEqual(counts, {2, 3, 4})  # missed by chance: 3 (2/3)^60

  def test_float32_pictures_are_those_of_float64(self):
    image, rays = novel_views.views(0, 3, 2, 16)
    exact = novel_views.render(
      novel_views.scene(0, 3),
      novel_views.rays(novel_views.cameras(0, 3, 2), 16),
    )
    # pixels on an edge may fall to the other side
    away = np.abs(image - exact).max(-1) > 1e-3
    self.assertLess(away.mean(), 0.01)


if __name__ == "__main__":
  absltest.main()
