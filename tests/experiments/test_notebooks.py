"""Every notebook runs from top to bottom, with a model of a few seconds."""

import json
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "notebooks"


@pytest.mark.parametrize(
  "path", sorted(FOLDER.glob("*.ipynb")), ids=lambda p: p.stem
)
def test_runs(path, tmp_path):
  cells = json.loads(path.read_text())["cells"]
  code = ["import matplotlib; matplotlib.use('Agg')"]
  code += ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
  script = tmp_path / "notebook.py"
  text = "\n\n".join(code)
  assert '"digits_flow"' in text
  script.write_text(text.replace('"digits_flow"', '"digits_flow_smoke"'))
  run = subprocess.run(
    [sys.executable, str(script)],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr[-3000:]
  assert "order" in run.stdout
