"""Imports point down, never up or sideways: every file is parsed."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = "giantsteps"

MAY_IMPORT = {  # besides itself
  "kernels_pallas": set(),
  "models": {"kernels_pallas"},
  "samplers": {"kernels_pallas"},
  "research": {"models", "samplers", "kernels_pallas"},
  "experiments": {"models", "samplers", "kernels_pallas", "research"},
  "tests": {"models", "samplers", "kernels_pallas", "research", "experiments"},
}
FOLDERS = MAY_IMPORT.keys()
RUN_CODE_ON_LOAD = {"pickle", "cPickle", "cloudpickle", "dill", "joblib"}
KERNELS_NEED_ONLY = {"jax", "numpy", PACKAGE, *sys.stdlib_module_names}


def imported(source: str, path: str) -> list[tuple[int, str]]:
  """(line, absolute dotted name) of everything that a file imports.

  Args:
    source: the text of the file.
    path: where it lies below the root, "models/dit.py".
  """
  package = [PACKAGE, *pathlib.PurePosixPath(path).parts[:-1]]
  found = []
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found += [(node.lineno, alias.name) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      base = package[: len(package) + 1 - node.level] if node.level else []
      prefix = [*base, *(node.module.split(".") if node.module else [])]
      found += [
        (node.lineno, ".".join([*prefix, alias.name])) for alias in node.names
      ]
  return found


def violations(source: str, path: str) -> list[str]:
  """What the file at `path` imports and must not, one line each."""
  folder = path.partition("/")[0]
  out = []
  for line, name in imported(source, path):
    top, *rest = name.split(".")
    target = rest[0] if top == PACKAGE and rest else None
    if top in FOLDERS:
      reason = f"write {PACKAGE}.{top}"
    elif top in RUN_CODE_ON_LOAD:
      reason = "runs code on load"
    elif folder not in FOLDERS:
      continue
    elif target in FOLDERS and target not in MAY_IMPORT[folder] | {folder}:
      reason = f"{folder} must not import {target}"
    elif top == PACKAGE and target not in FOLDERS:
      reason = f"no such folder of {PACKAGE}"
    elif folder == "kernels_pallas" and top not in KERNELS_NEED_ONLY:
      reason = "kernels need jax and numpy only"
    else:
      continue
    out.append(f"{path}:{line}: {name}: {reason}")
  return out


def files() -> list[pathlib.Path]:
  below = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
  return [*ROOT.glob("*.py"), *below]


def test_every_import_points_down():
  found = [
    line
    for file in files()
    for line in violations(
      file.read_text(encoding="utf-8"), file.relative_to(ROOT).as_posix()
    )
  ]
  assert len(files()) > 20  # or nothing was looked at
  assert not found, "\n".join(found)


@pytest.mark.parametrize(
  ("path", "source"),
  [
    ("models/a.py", "from giantsteps.samplers import diffusion"),
    ("models/a.py", "from giantsteps import samplers"),
    ("models/a.py", "import giantsteps.samplers.diffusion as d"),
    ("models/a.py", "from ..samplers import diffusion"),
    ("models/a.py", "def f():\n  from giantsteps import research"),
    ("samplers/diffusion/a.py", "from giantsteps.models import dit"),
    ("samplers/diffusion/a.py", "from ...models.dit import Dit"),
    ("research/large_batch/a.py", "import giantsteps.experiments.harness"),
    ("experiments/train.py", "from giantsteps import tests"),
    ("kernels_pallas/a.py", "from giantsteps.models import layers"),
    ("kernels_pallas/a.py", "import flax.linen as nn"),
    ("research/a.py", "from models import layers"),
    ("tests/models/test_a.py", "import samplers.diffusion"),
    ("tests/test_a.py", "import pickle"),
    ("setup.py", "from pickle import loads"),
    ("models/a.py", "from giantsteps import utils"),
  ],
)
def test_an_import_upward_is_found(path, source):
  assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
  ("path", "source"),
  [
    ("models/a.py", "from giantsteps.kernels_pallas import unmask_stats"),
    ("models/a.py", "from . import layers"),
    ("samplers/diffusion/solvers/a.py", "from .. import tables"),
    (
      "research/a/b.py",
      "from giantsteps import models, samplers\nimport optax",
    ),
    ("experiments/harness/a.py", "from giantsteps.experiments import configs"),
    ("kernels_pallas/a.py", "import functools, jax, numpy as np"),
    ("tests/test_a.py", "from giantsteps.experiments import train"),
  ],
)
def test_an_import_downward_is_not(path, source):
  assert violations(source, path) == []
