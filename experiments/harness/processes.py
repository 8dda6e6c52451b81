"""Runs of several processes: joining, agreeing to stop, noticing who died.

Every host runs the same command. `jax.distributed` connects them; the work
folder is one that all of them see.
"""

import json
import os
import pathlib
import platform
import random
import socket
import sys
import threading
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from giantsteps.experiments.harness import config as config_lib

BEAT = 2.0  # seconds between signs of life
SILENCE = 30.0  # seconds after which a process counts as lost
PATIENCE = 120.0  # seconds to wait for process 0 at the start


def connect(
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
  cluster: bool = False,
) -> None:
  """Joins the run, before any array is made. Nothing to do for one process.

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: of the run.
    process_id: of this one, from 0.
    cluster: the three are read from the environment: TPU pods, Slurm,
      Kubernetes (JobSet), Open MPI.

  Raises:
    InputError: some of the three without the others, or out of range; process
      0 does not answer. (If others do not come, JAX aborts process 0.)
  """
  explicit = (coordinator, num_processes, process_id)
  given = [value is not None for value in explicit]
  if cluster and any(given):
    raise config_lib.InputError(
      "--cluster reads --coordinator, --num_processes and --process_id from "
      "the environment: leave those out"
    )
  if not any(given):
    if not cluster:
      return
  elif not all(given):
    raise config_lib.InputError(
      f"--coordinator={coordinator} --num_processes={num_processes} "
      f"--process_id={process_id}: give all three, or --cluster"
    )
  if coordinator is not None:
    assert num_processes is not None and process_id is not None
    if not 0 <= process_id < num_processes:
      raise config_lib.InputError(
        f"--process_id={process_id} is not in 0 .. {num_processes - 1} "
        f"(--num_processes={num_processes})"
      )
    if not coordinator.rpartition(":")[2].isdecimal():
      raise config_lib.InputError(
        f"--coordinator={coordinator} is not HOST:PORT"
      )
  if coordinator and process_id:
    _find(coordinator)
  # it would take SIGTERM for itself; `Stop` does what it is for
  jax.config.update("jax_enable_preemption_service", False)
  bind = None  # all interfaces: the others may be on other machines
  if coordinator and coordinator.startswith(("127.", "localhost:")):
    bind = coordinator
  try:
    jax.distributed.initialize(
      *explicit,
      coordinator_bind_address=bind,
      initialization_timeout=int(PATIENCE),
      heartbeat_timeout_seconds=100,  # `Watch` is faster, and says who
      shutdown_timeout_seconds=30,
    )
  except (RuntimeError, ValueError) as error:
    raise config_lib.InputError(
      f"the processes of this run did not meet (coordinator {coordinator}, "
      f"{num_processes} processes): {str(error)[:300]}"
    ) from error
  logging.info(
    "process %d of %d, %d of %d devices here",
    jax.process_index(),
    jax.process_count(),
    jax.local_device_count(),
    jax.device_count(),
  )


def _find(coordinator: str) -> None:
  """Waits for process 0; JAX itself would abort without a word to Python."""
  host, _, port = coordinator.rpartition(":")
  deadline = time.monotonic() + PATIENCE
  while True:
    try:
      socket.create_connection((host, int(port)), timeout=5).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise config_lib.InputError(
          f"--coordinator={coordinator}: process 0 does not answer"
          f" ({error.strerror or error}) after {PATIENCE:.0f} s; start it there,"
          " or correct the address"
        ) from error
      time.sleep(0.5)


def first() -> bool:
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def agree(value: int, what: str) -> None:
  """Raises InputError unless `value` is the same on every process.

  Args:
    value: below 2**31.
    what: what is wrong if it is not.
  """
  values = multihost_utils.process_allgather(np.int32(value))
  if np.unique(values).size > 1:
    raise config_lib.InputError(f"{what}: {np.ravel(values).tolist()}")


def wait_for_all(name: str) -> None:
  """Returns when every process has come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


class Stop:
  """Whether a signal reached any process, known to all at the same call.

  The flags of one call are combined on the devices and read at the next, so
  nobody waits.

  Args:
    mesh: over all devices of the run.
  """

  def __init__(self, mesh: Mesh):
    line = Mesh(mesh.devices.ravel(), "all")
    self._rows = NamedSharding(line, PartitionSpec("all"))
    whole = NamedSharding(line, PartitionSpec())
    self._any = jax.jit(jnp.any, out_shardings=whole)
    self._last: jax.Array | None = None

  def __call__(self, here: bool) -> bool:
    """True: all stop now. `here` is this process's own flag, which is all
    that counts in a run of one process."""
    if jax.process_count() == 1:
      return here
    own = np.full(len(self._rows.addressable_devices), here)
    size = (self._rows.mesh.size,)
    flags = jax.make_array_from_process_local_data(self._rows, own, size)
    last, self._last = self._last, self._any(flags)
    return last is not None and bool(last)


class Watch:
  """Stops this process when another one of the run has died.

  A device waiting for a lost peer waits forever, or fails with a message
  about sockets. So every process writes a sign of life to the work folder
  every two seconds and reads those of the others; one whose file stays as it
  is for 30 seconds is named, and this process exits with code 1. One that ends
  with bad input says so in its file, and the others end with it. The loss of
  process 0 is JAX's to tell: it aborts the others within seconds, with "leader
  task was preempted/died". In a run of one process nothing happens.

  Args:
    folder: seen by all processes.

  Raises:
    InputError: the folder cannot be written, or is not the same one on every
      process.
  """

  def __init__(self, folder: pathlib.Path):
    self._folder, self._over = folder / "processes", threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._me, self._count = jax.process_index(), jax.process_count()
    if self._count == 1:
      return
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      if first():
        (self._folder / "run").write_text(str(random.randrange(2**31)))
      wait_for_all("work folder")
      self._token = int((self._folder / "run").read_text())
    except (OSError, ValueError) as error:
      raise config_lib.InputError(
        f"--workdir {folder} of process {self._me}: {error}; all processes"
        " need the same folder"
      ) from error
    agree(self._token, f"--workdir {folder} is not one folder for all")
    self._write(0)
    self._thread.start()

  def __enter__(self) -> "Watch":
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    if self._count == 1:
      return
    bad_input = isinstance(error, config_lib.InputError)
    failed = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    if failed and not bad_input:
      # most likely the peer's end of a socket: find out whose
      logging.error("%s", str(error).splitlines()[0][:300])
      self._over.wait(2 * SILENCE)
    self._over.set()
    self._thread.join()
    if kind is None or bad_input:
      self._write(-1, str(error) if bad_input else None)
    if kind is not None:
      if bad_input:
        logging.error("%s", error)
        if self._me == 0:  # JAX aborts the others when it goes: let them read
          time.sleep(3 * BEAT)
      else:
        traceback.print_exception(kind, error, trace)
      _leave(2 if bad_input else 1)  # others may wait: no farewell

  def _run(self) -> None:
    seen: dict[int, tuple[Any, float]] = {}
    beat = 0
    while not self._over.wait(BEAT):
      beat += 1
      self._write(beat)
      now = time.monotonic()
      for peer in range(self._count):
        if peer == self._me:
          continue
        sign = self._read(peer)
        if peer not in seen or seen[peer][0] != sign:
          seen[peer] = sign, now
        if sign and sign["beat"] < 0:
          if sign["error"]:
            logging.error("process %d: %s", peer, sign["error"])
            _leave(2)
          continue
        if now - seen[peer][1] > SILENCE:
          who = f"{sign['host']}, pid {sign['pid']}" if sign else "never seen"
          logging.error(
            "process %d of %d (%s) is lost: no sign of life for %.0f s. "
            "Stopping; start all processes again with the same command: they "
            "resume from the newest checkpoint",
            peer,
            self._count,
            who,
            now - seen[peer][1],
          )
          _leave(1)

  def _write(self, beat: int, error: str | None = None) -> None:
    sign = {"run": self._token, "host": platform.node(), "pid": os.getpid()}
    sign |= {"beat": beat, "error": error}
    path = self._folder / f"{self._me}.json"
    partial = path.with_suffix(".partial")
    try:
      partial.write_text(json.dumps(sign))
      partial.rename(path)
    except OSError as failure:  # the next one may succeed
      logging.warning("no sign of life written: %s", failure)

  def _read(self, peer: int) -> dict | None:
    """What the peer wrote in this run."""
    try:
      sign = json.loads((self._folder / f"{peer}.json").read_text())
    except (OSError, ValueError):
      return None
    return sign if sign["run"] == self._token else None


def _leave(code: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  logging.flush()
  os._exit(code)
