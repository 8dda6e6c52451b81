"""Lets pytest run in a checkout that was never installed.

An installed copy wins; otherwise the checkout itself is the package.
"""

import importlib.util
import pathlib
import sys
import types

if importlib.util.find_spec("giantsteps") is None:
  package = types.ModuleType("giantsteps")
  package.__path__ = [str(pathlib.Path(__file__).parent)]
  sys.modules["giantsteps"] = package
