"""Scenes of spheres and boxes and their exact images, by index.

A small stand-in for the data sets of novel view synthesis ("Test-Time Training
Done Right", arXiv:2505.23884, section 5): scene i is a pure function of (seed,
i), so there is nothing to download and no end to it. All is NumPy on the host;
random numbers come from raw bits, which NumPy keeps the same from version to
version.

The world is right-handed, z up, the ground is z = 0. A pinhole camera looks at
the middle of the scene from distance 1; pixel (row, column) of a picture of S x S pixels is the
ray through ((column + 1/2)/S - 1/2, 1/2 - (row + 1/2)/S) times 2 tan(fov/2) at
distance 1. Colour is albedo * (AMBIENT + (1 - AMBIENT) max(0, n.l)), n the
normal and l the direction to the light; there are no shadows.
"""

from typing import NamedTuple

import numpy as np

AMBIENT = 0.35
FIELD_OF_VIEW = np.deg2rad(45.0)
TARGET = np.array([0.0, 0.0, 0.1])  # the cameras are at distance 1 from it
GROUND = 2.0  # radius of the ground
MAX_OBJECTS = 4


class Scene(NamedTuple):
  """K objects on a ground plane under one far light.

  Attributes:
    box: [K] bool; the others are spheres.
    centre: [K, 3].
    size: [K, 3], half sides of a box, the radius of a sphere three times.
    yaw: [K], rotation of a box about z, in radians.
    albedo: [K, 3] in [0, 1].
    ground, sky: [3] in [0, 1]; the sky is not shaded.
    light: [3], unit, towards the light.
  """

  box: np.ndarray
  centre: np.ndarray
  size: np.ndarray
  yaw: np.ndarray
  albedo: np.ndarray
  ground: np.ndarray
  sky: np.ndarray
  light: np.ndarray


def views(
  seed: int, index: int, num_views: int, side: int
) -> tuple[np.ndarray, np.ndarray]:
  """Pictures of scene `index` from random cameras on a hemisphere.

  Args:
    seed: of all scenes.
    index: 0 or more.
    num_views: V; the first of V views are those of fewer views.
    side: S pixels.

  Returns:
    image [V, S, S, 3] float32 in [0, 1] and rays [V, S, S, 6] float32, origin
    and unit direction.
  """
  ray = rays(cameras(seed, index, num_views), side).astype(np.float32)
  return render(scene(seed, index), ray), ray


def scene(seed: int, index: int) -> Scene:
  """Scene `index`: 2 to MAX_OBJECTS objects standing on the ground."""
  u = _uniform(seed, index, 0, MAX_OBJECTS * 10 + 9)
  own, u = u[:-9].reshape(MAX_OBJECTS, 10), u[-9:]
  count = 2 + int(u[0] * (MAX_OBJECTS - 1))
  own = own[:count]
  box = own[:, 0] < 0.5
  size = np.where(
    box[:, None],
    0.08 + 0.09 * own[:, 1:4],
    np.repeat(0.1 + 0.08 * own[:, 1:2], 3, 1),
  )
  place = 0.5 * own[:, 4:6] - 0.25
  centre = np.concatenate([place, size[:, 2:]], 1)
  azimuth, height = 2 * np.pi * u[1], 0.5 + 0.45 * u[2]
  flat = np.sqrt(1 - height**2)
  light = np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), height])
  return Scene(
    box,
    centre,
    size,
    yaw=np.pi / 2 * own[:, 6],
    albedo=0.05 + 0.95 * own[:, 7:10],
    ground=0.3 + 0.5 * u[3:6],
    sky=0.5 + 0.5 * u[6:9],
    light=light,
  )


def cameras(seed: int, index: int, num_views: int) -> np.ndarray:
  """Camera positions [V, 3], 12 to 65 degrees above the horizon."""
  u = _uniform(seed, index, 1, 2 * num_views).reshape(num_views, 2)
  azimuth = 2 * np.pi * u[:, 0]
  elevation = np.deg2rad(12 + 53 * u[:, 1])
  direction = np.stack(
    [
      np.cos(elevation) * np.cos(azimuth),
      np.cos(elevation) * np.sin(azimuth),
      np.sin(elevation),
    ],
    -1,
  )
  return TARGET + direction


def axes(position: np.ndarray) -> np.ndarray:
  """Right, up and forward of a camera at [V, 3] that looks at TARGET.

  Returns:
    [V, 3, 3], orthonormal rows.
  """
  forward = TARGET - position
  forward = forward / np.linalg.norm(forward, axis=-1, keepdims=True)
  right = np.cross(forward, [0.0, 0.0, 1.0])
  right = right / np.linalg.norm(right, axis=-1, keepdims=True)
  return np.stack([right, np.cross(right, forward), forward], 1)


def rays(position: np.ndarray, side: int) -> np.ndarray:
  """Rays of all pixels of cameras at [V, 3]: [V, S, S, 6]."""
  across = (
    ((np.arange(side) + 0.5) / side - 0.5) * 2 * np.tan(FIELD_OF_VIEW / 2)
  )
  column, row = np.meshgrid(across, -across)
  local = np.stack([column, row, np.ones_like(row)], -1)  # [S, S, 3]
  direction = np.einsum("xyi,vij->vxyj", local, axes(position))
  direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
  origin = np.broadcast_to(position[:, None, None], direction.shape)
  return np.concatenate([origin, direction], -1)


def project(position: np.ndarray, point: np.ndarray, side: int) -> np.ndarray:
  """Where cameras at [V, 3] see a point [3]: (row, column), [V, 2].

  In pixels; the middle of the first pixel is (0, 0). The point lies in front.
  """
  local = np.einsum("vij,vj->vi", axes(position), point - position)
  across = local[:, :2] / local[:, 2:] / (2 * np.tan(FIELD_OF_VIEW / 2))
  column, row = 0.5 + across[:, 0], 0.5 - across[:, 1]
  return np.stack([row, column], -1) * side - 0.5


def render(scene: Scene, rays: np.ndarray) -> np.ndarray:
  """Colour of each ray [..., 6] in the dtype of the rays: [..., 3]."""
  shape, dtype = rays.shape[:-1], rays.dtype
  scene = Scene(*(np.asarray(x) for x in scene))
  origin, direction = np.split(rays.reshape(-1, 6), 2, -1)
  nearest, normal = hit_ground(origin, direction)
  albedo = np.broadcast_to(scene.ground.astype(dtype), normal.shape)
  for i in range(len(scene.box)):
    hit = hit_box if scene.box[i] else hit_sphere
    arguments = [scene.centre[i].astype(dtype), scene.size[i].astype(dtype)]
    if scene.box[i]:
      arguments.append(float(scene.yaw[i]))
    distance, own = hit(origin, direction, *arguments)
    closer = distance < nearest
    nearest = np.where(closer, distance, nearest)
    normal = np.where(closer[:, None], own, normal)
    albedo = np.where(closer[:, None], scene.albedo[i].astype(dtype), albedo)
  facing = np.maximum(normal @ scene.light.astype(dtype), 0)
  colour = albedo * (AMBIENT + (1 - AMBIENT) * facing)[:, None]
  sky = scene.sky.astype(dtype)
  colour = np.where(np.isfinite(nearest)[:, None], colour, sky)
  return colour.reshape(*shape, 3).astype(dtype)


def hit_ground(
  origin: np.ndarray, direction: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """z = 0 within GROUND of the middle: distance [N], inf for none, normal [N, 3]."""
  with np.errstate(divide="ignore", invalid="ignore"):
    distance = -origin[:, 2] / direction[:, 2]
    point = origin[:, :2] + distance[:, None] * direction[:, :2]
    hit = (distance > 0) & (np.sum(point**2, -1) < GROUND**2)
  normal = np.zeros_like(origin)
  normal[:, 2] = 1
  return np.where(hit, distance, np.inf).astype(origin.dtype), normal


def hit_sphere(
  origin: np.ndarray,
  direction: np.ndarray,
  centre: np.ndarray,
  size: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """|o + s d - c| = r, the nearer s > 0.

  Args:
    origin: [N, 3], outside the sphere.
    direction: [N, 3], unit.
    centre: [3].
    size: [3], the radius r three times.

  Returns:
    s [N], inf where the ray passes, and the unit normal [N, 3], 0 there.
  """
  away = origin - centre
  along = np.sum(away * direction, -1)
  # |o - c|^2 - (d.(o - c))^2 would cancel: the distance of the line itself
  offset = away - along[:, None] * direction
  left = size[0] ** 2 - np.sum(offset**2, -1)
  distance = -along - np.sqrt(np.maximum(left, 0))
  hit = (left > 0) & (distance > 0)
  normal = (away + distance[:, None] * direction) / size[0]
  return (
    np.where(hit, distance, np.inf).astype(origin.dtype),
    np.where(hit[:, None], normal, 0),
  )


def hit_box(
  origin: np.ndarray,
  direction: np.ndarray,
  centre: np.ndarray,
  size: np.ndarray,
  yaw: float,
) -> tuple[np.ndarray, np.ndarray]:
  """Entry into a box by the slabs of its three axes.

  Args:
    origin: [N, 3], outside the box.
    direction: [N, 3], unit.
    centre: [3].
    size: [3], half sides.
    yaw: rotation about z; the box's first axis is (cos yaw, sin yaw, 0).

  Returns:
    Distance [N], inf where the ray passes, and the unit normal [N, 3], 0
    there.
  """
  cos, sin = np.cos(yaw), np.sin(yaw)
  turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], origin.dtype)
  local_origin, local = (origin - centre) @ turn.T, direction @ turn.T
  safe = np.where(np.abs(local) < 1e-12, 1e-12, local)
  middle = -local_origin / safe
  half = np.abs(size / safe)
  entry, leave = middle - half, np.min(middle + half, -1)
  axis = np.argmax(entry, -1)
  distance = np.take_along_axis(entry, axis[:, None], -1)[:, 0]
  hit = (distance > 0) & (distance < leave)
  sign = -np.sign(np.take_along_axis(safe, axis[:, None], -1))
  normal = sign * turn[axis]
  return (
    np.where(hit, distance, np.inf).astype(origin.dtype),
    np.where(hit[:, None], normal, 0).astype(origin.dtype),
  )


def _uniform(seed: int, index: int, stream: int, count: int) -> np.ndarray:
  """[count] float64 in [0, 1), the same on every machine."""
  sequence = np.random.SeedSequence([seed, index, stream])
  bits = np.random.PCG64(sequence).random_raw(count)
  return (bits >> np.uint64(11)) * 2.0**-53
