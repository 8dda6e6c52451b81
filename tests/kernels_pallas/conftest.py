"""Lets the tests of this folder write `import harness`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
