"""The binaries as a user calls them: train, then sample, generate, measure."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


def call(binary: str, *flags: str) -> str:
  """Runs a binary to its end; its stdout."""
  code = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); import conftest, runpy; "
    f"runpy.run_module('giantsteps.experiments.{binary}', run_name='__main__')"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, *flags],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


def test_train_and_sample_digits(tmp_path):
  call("train", "--config=digits_flow_smoke", f"--workdir={tmp_path}")
  said = json.loads(call("sample", f"--workdir={tmp_path}", "--nfe=6"))
  assert said["nfe"] == 6 and said["images"] == 64
  images = np.load(tmp_path / "samples" / "default_6.npz")["image"]
  assert images.shape == (64, 8, 8, 1) and np.isfinite(images).all()
  # 300 steps suffice to find the mean and the spread of the pixels
  assert -0.6 < images.mean() < -0.2 and 0.5 < images.std() < 1.0
  assert (tmp_path / "samples" / "default_6.png").stat().st_size > 1000


@pytest.mark.parametrize("config", ["code_lm_smoke", "code_ar_smoke"])
def test_train_and_generate_text(tmp_path, config):
  source = tmp_path / "text"
  source.mkdir()
  for i in range(12):
    (source / f"{i}.py").write_text("def f(x):\n  return x + 1\n\n" * 60)
  work = tmp_path / "run"
  call(
    "train",
    f"--config={config}",
    f"--workdir={work}",
    f"--set=data.source=text:{source}",
    "--set=data.seq_len=64",
  )
  rows = [json.loads(r) for r in (work / "metrics.jsonl").open()]
  # one line over and over: a few steps bring it below four bits
  assert rows[-1]["held_out_bits_per_byte"] < 4
  call("generate", f"--workdir={work}", "--prompt=def f", "--num_tokens=32")
  (row,) = [json.loads(r) for r in (work / "generated.jsonl").open()]
  assert row["prompt"] == "def f" and 1 <= row["forwards"] <= 32
  assert row["exactness"] == ("greedy" if "ar" in config else "approximate")


def test_train_and_generate_blocks(tmp_path):
  source = tmp_path / "text.py"
  source.write_text("def f(x):\n  return x + 1\n\n" * 700)
  work = tmp_path / "run"
  call(
    *("train", "--config=code_blocks_smoke", f"--workdir={work}"),
    *(f"--set=data.source=text:{source}", "--set=data.seq_len=64"),
    *("--set=model.remat=none", "--set=optim.name=adamw"),
  )
  rows = [json.loads(r) for r in (work / "metrics.jsonl").open()]
  assert rows[-1]["held_out_bits_per_byte"] < 4
  flags = ["--prompt=def f", "--num_tokens=30", "--rule=one_per_step"]
  call("generate", f"--workdir={work}", *flags)
  (row,) = [json.loads(r) for r in (work / "generated.jsonl").open()]
  # The cache is "block" by itself: 30 passes for 30 bytes, and one more for each
  # of the blocks 0..7, 8..15, 16..23 and 24..31 of a text of 35.
  assert row["forwards"] == 34


@pytest.mark.slow
def test_train_and_measure_views(tmp_path):
  call("train", "--config=novel_views_smoke", f"--workdir={tmp_path}")
  said = call(
    *("benchmark", "--suite=views", f"--workdir={tmp_path}", "--scenes=64")
  )
  assert said.count("input views") == 3  # 1, 2 and 4 of 5 pictures
  result = json.loads((tmp_path / "benchmark_views.json").read_text())
  # 300 steps suffice to beat both baselines, and to use more than one view
  for row in result["rows"]:
    assert row["psnr"] > max(row["mean_colour"], row["nearest_view"])
  assert result["gain"] > 0
  assert (tmp_path / "views.png").stat().st_size > 1000


@pytest.mark.slow
def test_quickstart_writes_a_report_and_a_second_call_is_quick(tmp_path):
  call("quickstart", f"--workdir={tmp_path}")
  page = (tmp_path / "report.html").read_text()
  assert page.count("data:image/png;base64,") >= 6
  times = {p: p.stat().st_mtime for p in tmp_path.glob("*.json")}
  call("quickstart", f"--workdir={tmp_path}")
  assert times == {p: p.stat().st_mtime for p in tmp_path.glob("*.json")}
