"""Checkpoints: Orbax, asynchronous, with a manifest of checksums.

Orbax commits by rename and survives a kill, but does not notice a flipped bit.
So a step is written in two stages: Orbax commits it to `.partial/<step>`, then
every file and every leaf is entered with its sha256 in manifest.json, beside
the digest of the manifest itself, all is synced, and one rename makes it
`<step>`. A folder named by a step is therefore complete; one that does not
agree with its manifest was damaged later, is refused loudly, and the step
before it is used.

With several processes each writes the shards it holds, through Orbax; the
first one does the rest, and all of them read. The folder is one they share.

On disk: `<step>/` is an Orbax PyTree checkpoint of nested dictionaries (fields
of tuples by name or position; arrays of size 0 stand in the manifest only) with
one more file, manifest.json.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from giantsteps.experiments.harness import config as config_lib
from giantsteps.experiments.harness import processes

Tree = TypeVar("Tree")

MANIFEST = "manifest.json"


class CorruptCheckpoint(config_lib.InputError):
  """A checkpoint does not agree with its checksums, and no older one does."""


class Checkpoints:
  """The checkpoints of one run: at most one save is in flight.

  Nothing is created before the first `save`, so a reader needs no write access.
  With several processes all of them make the same calls.

  Args:
    directory: holds one folder per step.
    keep: newest steps that stay, 1 or more.
    keep_every: multiples of it stay too; 0: none.
  """

  def __init__(
    self, directory: str | os.PathLike, keep: int = 2, keep_every: int = 0
  ):
    self._directory = pathlib.Path(directory).absolute()
    self._partial = self._directory / ".partial"
    self._keep, self._keep_every = keep, keep_every
    self._intact: set[int] = set()  # written or verified by this object
    self._damaged: set[int] = set()
    self._orbax: ocp.AsyncCheckpointer | None = None
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._pending: concurrent.futures.Future | None = None

  def steps(self) -> list[int]:
    """Steps on disk, rising, damaged ones included."""
    try:
      found = list(self._directory.iterdir())
    except FileNotFoundError:
      return []
    except OSError as error:
      raise config_lib.InputError(
        f"checkpoints in {self._directory} cannot be read: {error.strerror}"
      ) from error
    names = [p.name for p in found if p.is_dir()]
    return sorted(int(n) for n in names if n.isdecimal() and n == str(int(n)))

  def save(self, step: int, state: Any, metadata: dict) -> None:
    """Copies `state` to the host and returns; the rest happens behind.

    The arrays may be donated as soon as this returns. An error of the save
    before is raised here, or by `wait`.

    Args:
      step: names the folder; nothing happens if it was saved or restored here.
      state: a pytree of arrays of any dtype.
      metadata: plain JSON, kept in the manifest.

    Raises:
      InputError: if the folder cannot be written.
    """
    self.wait()
    if step in self._intact:
      return
    json.dumps(metadata)  # fails here and not behind
    for leaf in jax.tree.leaves(state):
      if isinstance(leaf, jax.Array):
        leaf.copy_to_host_async()
    host = [(path, _copy(leaf)) for path, leaf in _named_leaves(state)]
    tree = _nested((path, leaf) for path, leaf in host if leaf.size)
    try:
      orbax = self._prepare()
      orbax.save(self._partial / str(step), args=ocp.args.PyTreeSave(tree))
    except OSError as error:
      raise self._unwritable(error) from error
    self._pending = self._thread.submit(
      self._commit, orbax, step, dict(host), metadata
    )

  def wait(self) -> None:
    """Blocks until the save in flight is on disk; raises what went wrong."""
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()
      processes.wait_for_all("checkpoint")

  def close(self) -> None:
    """Waits and frees the threads."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      if self._orbax is not None:
        self._orbax.close()
        if processes.first():
          shutil.rmtree(self._partial, ignore_errors=True)

  def restore(self, template: Tree) -> tuple[int, Tree, dict] | None:
    """The newest intact step, bit for bit as it was saved.

    Each leaf is read whole on the host, compared with its checksum and placed
    where the template says, on whatever mesh that is.

    Args:
      template: the pytree that was saved, of jax.ShapeDtypeStruct (or arrays),
        with a `sharding` for what shall not go to the default device.

    Returns:
      (step, state, metadata), or None if no step is on disk.

    Raises:
      CorruptCheckpoint: if there are steps and none is intact.
      InputError: if an intact step holds other leaves than the template.
    """
    self.wait()
    tried, errors = set(), []
    while left := [step for step in self.steps() if step not in tried]:
      step = left[-1]
      tried.add(step)
      folder = self._directory / str(step)
      try:
        state, metadata = _read(folder, step, template)
      except CorruptCheckpoint as error:
        if not folder.exists():
          continue  # a run that goes on has just removed it: look again
        logging.error("%s; falling back to the step before", error)
        self._damaged.add(step)
        errors.append(error)
        continue
      self._intact.add(step)
      return step, state, metadata
    if not errors:
      return None
    raise CorruptCheckpoint(
      f"no intact checkpoint is left in {self._directory}, the newest: "
      f"{errors[0]}; put back a copy, or start in another folder"
    )

  def _prepare(self) -> ocp.AsyncCheckpointer:
    """Makes the folder and clears what a killed run left in it."""
    if self._orbax is None:
      if processes.first():
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
      processes.wait_for_all("checkpoint folder")
      self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    return self._orbax

  def _commit(
    self,
    orbax: ocp.AsyncCheckpointer,
    step: int,
    host: dict[tuple[str, ...], Any],
    metadata: dict,
  ) -> None:
    """Runs behind: waits for Orbax, writes the manifest, renames, prunes."""
    staged, final = self._partial / str(step), self._directory / str(step)
    try:
      orbax.wait_until_finished()
      self._intact.add(step)
      if not processes.first():
        return
      content = {
        "step": step,
        "metadata": metadata,
        "leaves": {"/".join(path): _describe(x) for path, x in host.items()},
        "files": {name: _file_digest(staged / name) for name in _files(staged)},
      }
      (staged / MANIFEST).write_bytes(_encode(content))
      for path in [*staged.rglob("*"), staged]:
        _sync(path)
      if final.exists():
        self._discard(step)
      staged.rename(final)
      _sync(self._directory)
      self._damaged.discard(step)
      self._prune()
    except OSError as error:
      raise self._unwritable(error) from error

  def _prune(self) -> None:
    """Damaged steps neither count nor go: they are written anew, or stay."""
    steps = [step for step in self.steps() if step not in self._damaged]
    for step in steps[: -self._keep]:
      if not self._keep_every or step % self._keep_every:
        self._discard(step)

  def _discard(self, step: int) -> None:
    """Removes a step; a kill halfway leaves nothing that looks like one."""
    old = self._partial / f"{step}.old"
    (self._directory / str(step)).rename(old)
    shutil.rmtree(old)

  def _unwritable(self, error: OSError) -> config_lib.InputError:
    return config_lib.InputError(
      f"checkpoints cannot be written to {self._directory}: "
      f"{error.strerror or error}"
    )


def _read(folder: pathlib.Path, step: int, template: Tree) -> tuple[Tree, dict]:
  """State and metadata of one folder, with every checksum compared."""
  manifest = _verify_files(folder, step)
  wanted = _named_leaves(template)
  _check_template(folder, manifest["leaves"], wanted)
  as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
  kinds = _nested(
    (tuple(name.split("/")), as_numpy)
    for name, leaf in manifest["leaves"].items()
    if 0 not in leaf["shape"]
  )
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      tree = reader.restore(
        folder, args=ocp.args.PyTreeRestore(restore_args=kinds)
      )
  except Exception as error:  # whatever Orbax or TensorStore raise
    raise _corrupt(folder, f"{type(error).__name__} {error}") from error
  leaves = []
  for path, leaf in wanted:
    name, value = "/".join(path), tree
    if 0 in leaf.shape:
      value = np.zeros(leaf.shape, leaf.dtype)
    else:
      for key in path:
        value = value[key]
    value, saved = np.asarray(value), manifest["leaves"][name]
    if saved["sha256"] and _describe(value) != saved:
      raise _corrupt(folder, f"checksum of leaf {name} differs")
    leaves.append(_place(value, getattr(leaf, "sharding", None)))
  treedef = jax.tree.structure(template)
  return jax.tree.unflatten(treedef, leaves), manifest["metadata"]


def _verify_files(folder: pathlib.Path, step: int) -> dict:
  """The manifest of a folder whose files all agree with it."""
  try:
    raw = (folder / MANIFEST).read_bytes()
    try:
      content = json.loads(raw)["content"]
      agrees = _encode(content) == raw and content["step"] == step
    except (ValueError, TypeError, KeyError):
      agrees = False
    if not agrees:
      raise _corrupt(folder, f"checksum of {MANIFEST} differs")
    found, listed = set(_files(folder)) - {MANIFEST}, set(content["files"])
    for names, word in ((listed - found, "lacks"), (found - listed, "has")):
      if names:
        raise _corrupt(folder, f"{word} the file {min(names)}, see {MANIFEST}")
    for name, digest in content["files"].items():
      if _file_digest(folder / name) != digest:
        raise _corrupt(folder, f"checksum of {name} differs")
  except OSError as error:
    raise _corrupt(folder, f"{error.filename}: {error.strerror}") from error
  return content


def _check_template(
  folder: pathlib.Path, saved: dict, wanted: list[tuple[tuple[str, ...], Any]]
) -> None:
  """InputError if the checkpoint is intact, but of another model."""
  expected = {
    "/".join(path): f"{np.dtype(leaf.dtype).name} {list(leaf.shape)}"
    for path, leaf in wanted
  }
  there = {k: f"{v['dtype']} {v['shape']}" for k, v in saved.items()}
  for name in sorted(expected.keys() | there.keys()):
    here, in_file = expected.get(name, "absent"), there.get(name, "absent")
    if here != in_file:
      raise config_lib.InputError(
        f"checkpoint {folder} is of another run: {name} is {in_file} there and "
        f"{here} in this config"
      )


def _corrupt(folder: pathlib.Path, reason: str) -> CorruptCheckpoint:
  reason = " ".join(reason.split())[:300]
  return CorruptCheckpoint(f"checkpoint {folder} is corrupt: {reason}")


def _named_leaves(tree: Any) -> list[tuple[tuple[str, ...], Any]]:
  """[(("params", "layers", "w"), leaf), ...]."""
  one = lambda key: jax.tree_util.keystr((key,), simple=True)
  return [
    (tuple(map(one, path)), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def _nested(leaves: Iterable[tuple[tuple[str, ...], Any]]) -> dict:
  """[(("params", "w"), leaf), ...] as nested dictionaries."""
  out: dict = {}
  for path, leaf in leaves:
    node = out
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = leaf
  return out


def _copy(leaf: Any) -> Any:
  """A copy on the host, since the device's buffer may be donated; on the
  devices, if no process has the whole of it."""
  if _in_parts(leaf):
    return leaf.copy()
  return np.array(leaf)


def _in_parts(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and not (
    leaf.is_fully_addressable or leaf.is_fully_replicated
  )


def _place(value: np.ndarray, sharding: Any) -> jax.Array:
  """A copy where the sharding says: the program that takes it may donate it."""
  if sharding is None or sharding.is_fully_addressable:
    return jax.device_put(value, sharding, may_alias=False)
  parts = sharding.addressable_devices_indices_map(value.shape).items()
  shards = [
    jax.device_put(value[index], device, may_alias=False)
    for device, index in parts
  ]
  return jax.make_array_from_single_device_arrays(value.shape, sharding, shards)


def _describe(leaf: Any) -> dict:
  """For the manifest; a leaf in parts has the checksums of its files only."""
  digest = None
  if not _in_parts(leaf):
    data = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    digest = hashlib.sha256(data.data).hexdigest()
  return {
    "dtype": leaf.dtype.name,
    "shape": list(leaf.shape),
    "sha256": digest,
  }


def _encode(content: dict) -> bytes:
  """The one way to write a manifest: any other bytes are a damaged one."""
  inner = json.dumps(content, sort_keys=True)
  digest = hashlib.sha256(inner.encode()).hexdigest()
  both = {"content": content, "sha256": digest}
  return (json.dumps(both, sort_keys=True, indent=1) + "\n").encode()


def _files(folder: pathlib.Path) -> list[str]:
  """Everything below that is no folder, relative, sorted."""
  below = (p for p in folder.rglob("*") if not p.is_dir() or p.is_symlink())
  return sorted(p.relative_to(folder).as_posix() for p in below)


def _file_digest(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: pathlib.Path) -> None:
  """Returns when a file or folder is on disk, and not in a cache only."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
