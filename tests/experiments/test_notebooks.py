"""Every notebook runs from top to bottom, with a model of a few seconds."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "notebooks"
SMALLER = {  # name: what is replaced, and what the output must say
  "samplers": ({'"digits_flow"': '"digits_flow_smoke"'}, "order"),
  "chunk_size": (
    {
      "(16, 64, 256, 1024, 2048, 4096, 8192)": "(64, 256)",
      "SHAPES.get(jax.default_backend(), SHAPES)": (
        'SHAPES["cpu"][:1]; shapes = [shapes[0]._replace(tokens=512)]'
      ),
      "ROUNDS = 5": "ROUNDS = 2",
    },
    "fastest",
  ),
  "decoding": (
    {
      "code_blocks_quickstart": "code_blocks_smoke",
      "NUM_TOKENS = 64": "NUM_TOKENS = 16",
      '"none", "prefix", "dual", "refresh", "vicinity", "block"': (
        '"none", "dual", "block"'
      ),
    },
    "block: 100% as without cache",
  ),
  "pod": ({'"bert_base", "v5e:8x8"': '"code_lm_smoke", "v5e:2x2"'}, "fits"),
}


@pytest.mark.parametrize(
  "path", sorted(FOLDER.glob("*.ipynb")), ids=lambda p: p.stem
)
def test_runs(path, tmp_path):
  replaced, said = SMALLER[path.stem]
  if path.stem == "pod" and not importlib.util.find_spec("libtpu"):
    pytest.skip("libtpu, the compiler for TPUs, is not installed")
  cells = json.loads(path.read_text())["cells"]
  code = ["import matplotlib; matplotlib.use('Agg')"]
  code += ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
  text = "\n\n".join(code)
  for old, new in replaced.items():
    assert old in text
    text = text.replace(old, new)
  script = tmp_path / "notebook.py"
  script.write_text(text)
  run = subprocess.run(
    [sys.executable, str(script)],
    cwd=tmp_path,
    env=os.environ | {"PIP_NO_INDEX": "1"},
    capture_output=True,
    text=True,
    check=False,
    timeout=600,
  )
  assert run.returncode == 0, run.stderr[-3000:]
  assert said in run.stdout
