"""Several processes on loopback do what one process does, to the bit."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from giantsteps.experiments.harness import config, metrics, pod, processes
from giantsteps.experiments.harness import mesh as mesh_lib

ROOT = pathlib.Path(__file__).parents[2]
BASE = (
  "--config=digits_flow_smoke",
  "--set=eval_every=0",
  "--set=checkpoint_every=10",
)


def call(*flags: str, devices: int = 1) -> subprocess.Popen:
  """`train` as a user calls it, from a checkout or an installed copy."""
  code = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); import conftest, runpy; "
    "runpy.run_module('giantsteps.experiments.train', run_name='__main__')"
  )
  flag = f"--xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
    [sys.executable, "-c", code, *BASE, *flags],
    env=os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"},
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )


def start(count: int, workdir, *flags: str) -> list[subprocess.Popen]:
  """The processes of one run."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  return [
    call(
      f"--workdir={workdir}",
      f"--mesh=data={count}",
      f"--coordinator=127.0.0.1:{port}",
      f"--num_processes={count}",
      f"--process_id={i}",
      *flags,
    )
    for i in range(count)
  ]


def finish(run: list[subprocess.Popen], code: int = 0) -> list[str]:
  """What they wrote; every one of them must end with `code`."""
  said = [process.communicate(timeout=240)[1] for process in run]
  for process, text in zip(run, said, strict=True):
    assert process.returncode == code, text[-3000:]
  return said


def wait_for_step(run, workdir, step: int) -> None:
  """Returns once metrics.jsonl holds `step`."""
  deadline = time.time() + 180
  while time.time() < deadline and run[0].poll() is None:
    rows = metrics.read(pathlib.Path(workdir))
    if rows and rows[-1]["step"] >= step:
      return
    time.sleep(0.05)
  for process in run:
    process.kill()
  raise AssertionError(f"no step {step}: {finish(run, -9)}")


def losses(workdir) -> list[tuple]:
  rows = metrics.read(pathlib.Path(workdir))
  return [(r["step"], r["loss"], r["grad_norm"]) for r in rows if "loss" in r]


def digests(workdir, step: int) -> dict:
  """sha256 of every leaf, as the manifest has it."""
  path = pathlib.Path(workdir) / "checkpoints" / str(step) / "manifest.json"
  leaves = json.loads(path.read_text())["content"]["leaves"]
  return {name: leaf["sha256"] for name, leaf in leaves.items()}


def test_lost_process_is_named_and_the_run_resumes_to_the_bit(tmp_path):
  straight, work = tmp_path / "straight", tmp_path / "work"
  one = call(
    f"--workdir={straight}", "--mesh=data=2", "--set=steps=60", devices=2
  )
  finish([one])
  run = start(2, work, "--set=steps=60")
  wait_for_step(run, work, 25)
  run[1].kill()
  killed = time.time()
  said = run[0].communicate(timeout=60)[1]
  assert run[0].returncode == 1 and time.time() - killed < 60
  assert "process 1 of 2" in said and f"pid {run[1].pid}" in said
  assert "is lost" in said and "same command" in said
  run[1].communicate()
  finish(start(2, work, "--set=steps=60"))
  assert losses(work) == losses(straight)
  assert digests(work, 60) == digests(straight, 60)


def test_sigterm_to_one_stops_all_at_the_same_step(tmp_path):
  run = start(2, tmp_path, "--set=steps=5000")
  wait_for_step(run, tmp_path, 10)
  run[1].send_signal(signal.SIGTERM)
  said = finish(run)
  saved = max(
    int(p.name)
    for p in (tmp_path / "checkpoints").iterdir()
    if p.name.isdecimal()
  )
  for text in said:
    assert f"saved step {saved} of 5000" in text


def test_shared_state_goes_on_on_another_number_of_devices(tmp_path):
  # parameters and moments in two parts, each written by its own process
  work, straight = tmp_path / "work", tmp_path / "straight"
  shared = "--set=optim.shards=2"
  steps = "--set=steps=30"
  run = start(2, work, shared, steps)
  wait_for_step(run, work, 10)
  run[0].send_signal(signal.SIGTERM)
  finish(run)
  saved = max(p.name for p in (work / "checkpoints").iterdir() if p.is_dir())
  assert 10 <= int(saved) < 30
  assert None in digests(work, int(saved)).values()  # no process has all of it
  finish([call(shared, steps, f"--workdir={work}")])
  finish([call(shared, steps, f"--workdir={straight}")])
  # sums of two devices against those of one: a unit in the last place, and
  # what 30 steps make of it; parts in a wrong order would be another model
  for got, want in zip(losses(work), losses(straight), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4)


def test_bad_input_ends_all(tmp_path):
  run = start(2, tmp_path, "--set=batch_size=7")
  for text in finish(run, 2):
    assert "batch_size=7" in text


def test_a_mesh_that_leaves_a_process_out_is_refused(tmp_path):
  run = start(2, tmp_path, "--mesh=")
  for text in finish(run, 2):
    assert "--mesh is of 1 device(s), the run has 2" in text


def test_nobody_there(monkeypatch):
  monkeypatch.setattr(processes, "PATIENCE", 1.0)
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  with pytest.raises(config.InputError, match="does not answer"):
    processes.connect(f"127.0.0.1:{port}", 2, 1)


@pytest.mark.parametrize("topology", ["v5e:4x4", "v5e:8x8", "v5p:2x2x2"])
def test_every_host_of_a_pod_knows_its_rows(topology):
  pytest.importorskip("libtpu", reason="libtpu gives the hosts of a pod")
  chips = pod.slice_devices(topology)
  mesh = mesh_lib.make({"data": len(chips)}, chips)
  sharding = mesh_lib.batch_sharding(mesh)
  size, rows = 3 * len(chips), {}
  for device, index in sharding.devices_indices_map((size,)).items():
    own = rows.setdefault(device.process_index, [])
    own.extend(range(size)[index[0]])
  assert len(rows) > 1
  for host, want in rows.items():
    got = mesh_lib.own_rows(mesh, size, host)
    assert got.tolist() == sorted(want)


@pytest.mark.slow
def test_four_processes_are_one(tmp_path):
  straight, work = tmp_path / "straight", tmp_path / "work"
  flags = ("--set=steps=30",)
  finish([call(*flags, f"--workdir={straight}", "--mesh=data=4", devices=4)])
  finish(start(4, work, *flags))
  # sockets add four terms in another order than one process does: one unit in
  # the last place of a gradient, and what 30 steps make of it
  for got, want in zip(losses(work), losses(straight), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("127.0.0.1:9", 2, None), "all three"),
    ((None, 2, 0), "all three"),
    (("127.0.0.1:9", 2, 2), "process_id=2"),
    (("127.0.0.1:9", 2, -1), "process_id=-1"),
    (("127.0.0.1", 2, 0), "HOST:PORT"),
    (("127.0.0.1:9", 2, 0, True), "leave those out"),
  ],
)
def test_bad_flags(arguments, message):
  with pytest.raises(config.InputError, match=message):
    processes.connect(*arguments)
