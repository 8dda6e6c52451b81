"""Every bad invocation ends as one line with the bad value, exit code 2."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Imports a binary once and forks a child per command line: jax takes seconds
# to import and no child needs a backend before it fails.
DRIVER = """
import importlib, json, os, sys, tempfile
sys.path.insert(0, {root!r})
import conftest
module = importlib.import_module("giantsteps.experiments.{binary}")
from giantsteps.experiments.harness import cli
results = []
for argv in json.load(sys.stdin):
  with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
    child = os.fork()
    if not child:
      os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
      sys.argv = ["{binary}.py", *argv]
      code = 70
      try:
        cli.run(module.main)
      except SystemExit as stop:
        code = stop.code or 0
      finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out.seek(0), err.seek(0)
    results.append((status, out.read(), err.read()))
print(json.dumps(results))
"""


def invoke(binary: str, lines: list[list[str]]) -> list[tuple[int, str, str]]:
  """Runs the command lines; (exit code, stdout, stderr) of each."""
  code = DRIVER.format(root=str(ROOT), binary=binary)
  done = subprocess.run(
    [sys.executable, "-c", code],
    input=json.dumps(lines),
    capture_output=True,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    cwd=ROOT,
    check=True,
  )
  return [tuple(row) for row in json.loads(done.stdout.splitlines()[-1])]


def check(results, lines, expected) -> None:
  for (code, _, err), line, words in zip(results, lines, expected, strict=True):
    said = [row for row in err.splitlines() if row.strip()]
    assert code == 2, (line, code, err)
    assert len(said) == 1, (line, err)
    assert "Traceback" not in err, (line, err)
    for word in words:
      assert word in said[0], (line, word, said[0])


@pytest.fixture
def files(tmp_path):
  """A folder of inputs that are wrong, each in its own way."""
  (tmp_path / "empty.txt").write_bytes(b"")
  (tmp_path / "short.txt").write_bytes(b"too short")
  (tmp_path / "file").write_text("a file, no folder")
  np.savez(tmp_path / "shape.npz", image=np.zeros((5, 4), np.float32))
  np.savez(tmp_path / "range.npz", image=np.full((9, 4, 4), 7.0, np.float32))
  np.savez(tmp_path / "nan.npz", image=np.full((9, 4, 4), np.nan, np.float32))
  objects = np.array([{}, {}], dtype=object)
  np.savez(tmp_path / "object.npz", image=objects, allow_pickle=True)
  (tmp_path / "noise.npz").write_bytes(b"PK no archive at all")
  (tmp_path / "empty_folder").mkdir()
  return tmp_path


def test_train_refuses_bad_input_in_one_line(files):
  def line(*extra, config="digits_flow_smoke", workdir="run"):
    return [f"--config={config}", f"--workdir={files / workdir}", *extra]

  def source(value, config="digits_flow_smoke"):
    return line(f"--set=data.source={value}", config=config)

  cases = [
    (line(config="digits_flo"), ["digits_flo", "digits_flow"]),
    ([f"--workdir={files / 'run'}"], ["config"]),
    (["--config=digits_flow_smoke"], ["workdir"]),
    (line("--set=optim.learning_rat=1"), ["learning_rat", "learning_rate"]),
    (line("--set=nonsense=1"), ["nonsense", "batch_size"]),
    (line("--set=steps=many"), ["steps", "many", "int"]),
    (line("--set=optim.learning_rate=fast"), ["fast", "float"]),
    (line("--set=steps"), ["steps", "="]),
    (line("--set=steps=-3"), ["steps", "-3"]),
    (line("--set=batch_size=0"), ["batch_size", "0"]),
    (line("--set=model.width=-1"), ["width", "-1"]),
    (line("--set=optim.name=sgd"), ["sgd", "lamb"]),
    (line("--set=optim.learning_rate=nan"), ["learning_rate", "nan"]),
    (line("--set=accumulate=7"), ["accumulate", "7"]),
    (line("--set=seed=-1"), ["seed", "-1"]),
    (line("--mesh=data=many"), ["many"]),
    (line("--mesh=rows=2"), ["rows", "data"]),
    (line("--mesh=data=512"), ["512"]),
    (line("--wrkdir=x"), ["wrkdir"]),
    (line("surplus"), ["surplus"]),
    (source("mnist"), ["mnist", "digits"]),
    (source(f"npz:{files / 'none.npz'}"), ["none.npz"]),
    (source(f"npz:{files / 'shape.npz'}"), ["shape.npz", "[5, 4]"]),
    (source(f"npz:{files / 'range.npz'}"), ["range.npz", "7"]),
    (source(f"npz:{files / 'nan.npz'}"), ["nan.npz"]),
    (source(f"npz:{files / 'object.npz'}"), ["object.npz"]),
    (source(f"npz:{files / 'noise.npz'}"), ["noise.npz"]),
    (source(f"text:{files / 'none'}", "code_ar_smoke"), ["none"]),
    (source(f"text:{files / 'empty.txt'}", "code_ar_smoke"), ["empty.txt"]),
    (source(f"text:{files / 'short.txt'}", "code_ar_smoke"), ["short.txt"]),
    (source(f"text:{files / 'empty_folder'}", "code_ar_smoke"), ["empty_fol"]),
    (source(f"zarr:{files / 'none.zarr'}", "code_ar_smoke"), ["none.zarr"]),
    (source(f"text:{files / 'short.txt'}"), ["short.txt"]),
    (source("stdlib"), ["stdlib", "image"]),
    (line(workdir="file/below"), ["file/below"]),
    (
      line("--set=block_size=7", config="code_blocks_smoke"),
      ["block_size=7", "seq_len=128"],
    ),
    (
      line("--set=block_size=8", config="code_lm_smoke"),
      ["block_size=8", "transformer", "code_blocks"],
    ),
    (
      line("--set=block_size=8", config="code_ar_smoke"),
      ["block_size=8", "autoregressive"],
    ),
    (
      line("--set=rate_low=0.9", "--set=rate_high=0.2", config="code_lm_smoke"),
      ["rate_low=0.9", "rate_high=0.2"],
    ),
  ]
  lines, expected = zip(*cases, strict=True)
  check(invoke("train", list(lines)), lines, expected)


def test_sample_and_generate_refuse_bad_input_in_one_line(files):
  folder = files / "no_run"
  broken = files / "broken"
  broken.mkdir()
  (broken / "config.json").write_text("{")
  cases = [
    ([], ["workdir"]),
    ([f"--workdir={folder}"], ["no_run"]),
    ([f"--workdir={broken}"], ["config.json"]),
    ([f"--workdir={folder}", "--seed=-1"], ["-1"]),
    ([f"--workdir={folder}", "extra"], ["extra"]),
    ([f"--workdir={folder}", "--what=1"], ["what"]),
  ]
  lines, expected = zip(*cases, strict=True)
  check(invoke("sample", list(lines)), lines, expected)
  check(invoke("generate", list(lines)), lines, expected)
  more = [
    [f"--workdir={folder}", "--solver=magic"],
    [f"--workdir={folder}", "--nfe=0"],
  ]
  check(invoke("sample", more), more, [["magic", "ddim"], ["0"]])
  tiny = files / "tiny"
  tiny.mkdir()
  golden = ROOT / "tests" / "golden" / "parallel_decoding"
  raw = json.loads((golden / "tiny_dream.config.json").read_text())
  (tiny / "config.json").write_text(json.dumps(raw))
  unknown = files / "unknown"
  unknown.mkdir()
  (unknown / "config.json").write_text('{"model_type": "gpt2"}')
  cases = [
    ([f"--workdir={folder}", "--num_tokens=x"], ["x"]),
    ([f"--workdir={folder}", f"--model={tiny}"], ["workdir", "model"]),
    ([f"--workdir={folder}", "--chat"], ["chat", "--model"]),
    ([f"--model={folder}"], ["no_run/config.json"]),
    ([f"--model={broken}"], ["config.json", "JSON"]),
    ([f"--model={unknown}"], ["gpt2", "llama"]),
    ([f"--model={tiny}"], ["tokenizer.json"]),
    ([f"--model={tiny}", "--dtype=int8"], ["int8"]),
    ([f"--model={tiny}", "--mesh=rows=2"], ["rows", "model"]),
  ]
  lines, expected = zip(*cases, strict=True)
  check(invoke("generate", list(lines)), lines, expected)


def test_compile_for_pod_refuses_bad_input_in_one_line():
  line = lambda *more: ["--config=bert_smoke", *more]
  cases = [
    (line("--topology=v9:2x2"), ["v9:2x2", "v5e:16x16"]),
    (line("--topology=v5e:3x5"), ["v5e:3x5", "v5e:4x4"]),
    (line("--topology=v5e:4x4", "--mesh=data=8"), ["data=8", "16"]),
    (line("--topology=v5e:4x4", "--mesh=rows=16"), ["rows"]),
    (line("--accumulate=0"), ["accumulate"]),
    (line("--json=/no/such/folder/x.json"), ["/no/such/folder"]),
    (["--config=bert"], ["bert", "bert_large"]),
    ([], ["--config", "--model"]),
    (line("--model=/no/such/model"), ["--config", "--model"]),
    (["--model=/no/such/model", "--topology=v5e:2x2"], ["/no/such/model"]),
    (["--model=/x", "--topology=v5e:2x2", "--mesh=model=8"], ["model=8", "4"]),
    (["--model=/x", "--cache=all"], ["all", "dual"]),
  ]
  lines, expected = zip(*cases, strict=True)
  check(invoke("compile_for_pod", list(lines)), lines, expected)


def test_help_explains_and_names_the_flags():
  for binary in ("train", "sample", "generate"):
    code = (
      f"import sys; sys.path.insert(0, {str(ROOT)!r}); import conftest, runpy;"
      f"runpy.run_module('giantsteps.experiments.{binary}', "
      "run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
      [sys.executable, "-c", code, "--help"],
      capture_output=True,
      text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      cwd=ROOT,
      check=False,
    )
    assert f"python -m giantsteps.experiments.{binary}" in done.stdout
    assert "--workdir" in done.stdout and "Traceback" not in done.stderr
