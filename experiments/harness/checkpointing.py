"""Checkpoints: Orbax, asynchronous, with a manifest of checksums.

Orbax commits by rename and survives a kill, but does not notice a flipped bit.
So a step is written in two stages: Orbax commits it to `.partial/<step>`, then
every file and every leaf is entered with its sha256 in manifest.json, beside
the digest of the manifest itself, all is synced, and one rename makes it
`<step>`. A folder named by a step is therefore complete; one that does not
agree with its manifest was damaged later, is refused loudly, and the step
before it is used.

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
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from giantsteps.experiments.harness import config as config_lib

Tree = TypeVar("Tree")

MANIFEST = "manifest.json"


class CorruptCheckpoint(config_lib.InputError):
  """A checkpoint does not agree with its checksums, and no older one does."""


class Checkpoints:
  """The checkpoints of one run: at most one save is in flight.

  Nothing is created before the first `save`, so a reader needs no write access.
  One process; arrays of other processes would have to be gathered first.

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
    host = [
      (path, np.array(leaf))  # copies: the device's buffer may be donated
      for path, leaf in _named_leaves(jax.device_get(state))
    ]
    try:
      orbax = self._prepare()
      orbax.save(
        self._partial / str(step), args=ocp.args.PyTreeSave(_nested(host))
      )
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

  def close(self) -> None:
    """Waits and frees the threads."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      if self._orbax is not None:
        self._orbax.close()
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
      shutil.rmtree(self._partial, ignore_errors=True)
      self._partial.mkdir(parents=True)
      self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    return self._orbax

  def _commit(
    self,
    orbax: ocp.AsyncCheckpointer,
    step: int,
    host: dict[tuple[str, ...], np.ndarray],
    metadata: dict,
  ) -> None:
    """Runs behind: waits for Orbax, writes the manifest, renames, prunes."""
    staged, final = self._partial / str(step), self._directory / str(step)
    try:
      orbax.wait_until_finished()
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
      self._intact.add(step)
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
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      tree = reader.restore(folder)
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
    value = np.asarray(value)
    if _describe(value) != manifest["leaves"][name]:
      raise _corrupt(folder, f"checksum of leaf {name} differs")
    # a copy: the program that takes the state may donate it
    place = getattr(leaf, "sharding", None)
    leaves.append(jax.device_put(value, place, may_alias=False))
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


def _nested(leaves: list[tuple[tuple[str, ...], np.ndarray]]) -> dict:
  """The leaves as nested dictionaries, without those of size 0."""
  out: dict = {}
  for path, leaf in leaves:
    if leaf.size:
      node = out
      for key in path[:-1]:
        node = node.setdefault(key, {})
      node[path[-1]] = leaf
  return out


def _describe(leaf: np.ndarray) -> dict:
  data = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
  return {
    "dtype": leaf.dtype.name,
    "shape": list(leaf.shape),
    "sha256": hashlib.sha256(data.data).hexdigest(),
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
