"""The benchmark of solvers: its public rows are those others measured."""

import json
import subprocess
import sys

import numpy as np
import pytest

from giantsteps.experiments.harness import (
  diffusers_peers,
  plots,
  samplers_overhead,
  samplers_quality,
)

# median over the same 128 noises, calls 5, 8, 10, 15, 20: the authors' own
# PyTorch and JAX code in float64, measured by another author
AUTHORS = {
  "DPM-Solver-fast 3 time": (7.5e-1, 2.1e-1, 9.0e-2, 4.9e-2, 1.2e-1),
  "DPM++ 2M time": (1.5e-1, 1.1e-1, 7.4e-2, 7.4e-2, 6.8e-2),
  "DPM++ 3M time": (1.5e-1, 1.1e-1, 4.4e-1, 1.8e-1, 9.2e-2),
  "UniPC 3 bh2 time": (1.5e-1, 1.1e-1, 8.9e-2, 5.2e-2, 3.5e-2),
  "UniPC 2 bh2 time": (1.5e-1, 1.1e-1, 8.9e-2, 5.3e-2, 3.5e-2),
  "DPM-Solver-fast 3 logSNR": (8.3e-1, 5.7e-1, 3.8e-2, 2.7e-2, 1.8e-2),
  "DPM++ 2M logSNR": (9.8e-2, 5.4e-2, 3.5e-2, 1.2e-2, 6.3e-3),
  "DPM++ 3M logSNR": (1.3e-1, 5.9e-2, 2.7e-2, 7.6e-3, 2.8e-3),
  "UniPC 3 bh2 logSNR": (1.3e-1, 5.3e-2, 5.4e-2, 6.6e-3, 1.6e-3),
  "UniPC 2 bh2 logSNR": (1.0e-1, 4.3e-2, 1.7e-2, 4.6e-3, 2.2e-3),
  "DPM-Solver-fast 3 quadratic": (4.1, 1.3e-1, 3.6e-2, 1.2e-2, 4.6e-3),
  "DPM++ 2M quadratic": (6.7e-2, 1.6e-2, 3.2e-2, 1.7e-2, 9.9e-3),
  "DPM++ 3M quadratic": (7.3e-2, 2.2e-2, 2.8e-2, 9.2e-3, 4.6e-3),
  "UniPC 3 bh1 quadratic": (9.8e-2, 4.1e-2, 2.9e-2, 8.7e-3, 2.5e-3),
  "UniPC 3 bh2 quadratic": (7.1e-2, 2.8e-2, 1.9e-2, 5.2e-3, 1.3e-3),
  "UniPC 2 bh2 quadratic": (7.0e-2, 1.2e-2, 7.6e-3, 6.1e-3, 3.5e-3),
  "DEIS tAB2 quadratic": (4.9e-2, 2.1e-2, 1.3e-2, 5.4e-3, 2.7e-3),
  "DEIS tAB3 quadratic": (5.0e-2, 1.7e-2, 9.8e-3, 3.1e-3, 1.2e-3),
  "DEIS rhoAB3 quadratic": (7.5e-2, 3.4e-2, 2.1e-2, 8.4e-3, 4.0e-3),
  "DEIS tAB3 logSNR": (6.8e-2, 3.9e-2, 2.2e-2, 8.5e-3, 3.8e-3),
  "DEIS rhoAB3 logSNR": (1.3e-1, 5.9e-2, 3.9e-2, 1.7e-2, 8.2e-3),
  "iPNDM": (2.6e-1, 9.2e-2, 6.9e-2, 2.1e-2, 1.1e-2),
}


@pytest.fixture(scope="module")
def measured():
  problem = samplers_quality.problems()[0]
  return samplers_quality.measure(problem)


@pytest.mark.parametrize("name", AUTHORS)
def test_authors_rows_are_what_others_measured(measured, name):
  rows = [row for row in measured["rows"] if row["name"] == name]
  got = [row["median"] for row in rows]
  # two digits are recorded
  np.testing.assert_allclose(got, AUTHORS[name], rtol=0.07, err_msg=name)


def test_no_recompilation_and_a_fair_winner(measured):
  # one program per number of rows and none per solver: at nfe = 8 some
  # solvers only have 6 or 7 calls
  assert measured["programs"] < 15 < 100 < measured["tables"]
  for line in samplers_quality.summary(measured["rows"]):
    column = [row for row in measured["rows"] if row["nfe"] == line["nfe"]]
    public = [r["median"] for r in column if r["source"] != "giantsteps"]
    assert line["best_median"] == min(public)
    assert line["times_lower_median"] > 1
    assert line["times_lower_median_fresh"] > 1


def test_plot(measured, tmp_path):
  path = tmp_path / "error.png"
  plots.error_curves({"a": measured["rows"], "b": measured["rows"]}, path)
  assert path.stat().st_size > 10_000


def test_overhead_counts_one_model_and_no_extra_program():
  shapes = ((1, 2, 8, 8), (2, 1, 4, 4))
  found = samplers_overhead.measure(rounds=1, shapes=shapes)
  assert found["model_in_program"] == 1
  assert found["programs"] == found["shapes_and_widths"]
  for row in found["rows"]:
    assert row["bytes"] == (row["K"] + 6) * 4 * np.prod(row["shape"])
    assert 0 < row["ours"][0] <= row["ours"][1] <= row["ours"][2]


def test_binary_writes_json_and_names_what_is_missing(tmp_path):
  command = [sys.executable, "-m", "giantsteps.experiments.benchmark"]
  bad = subprocess.run(
    [*command, "--suite=digits"], capture_output=True, text=True, check=False
  )
  assert bad.returncode == 2
  assert "--workdir" in bad.stderr.strip().splitlines()[-1]
  run = subprocess.run(
    [*command, "--suite=samplers", f"--workdir={tmp_path}", "--rounds=0"],
    capture_output=True,
    text=True,
    check=True,
  )
  result = json.loads((tmp_path / "benchmark_samplers.json").read_text())
  assert len(result["problems"]) == 7
  if diffusers_peers.versions() is None:
    assert result["peers"] == "recorded"
    assert "recorded" in run.stderr
  for problem in result["problems"].values():
    sources = {row["source"] for row in problem["rows"]}
    assert "diffusers" in sources and "giantsteps" in sources
  assert (tmp_path / "samplers_error.png").stat().st_size > 10_000
