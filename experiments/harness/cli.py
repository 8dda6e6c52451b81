"""How every binary starts: one clear line and exit code 2 for bad input."""

import logging as std_logging
import os
import sys
from collections.abc import Callable

from absl import app, flags, logging

from giantsteps.experiments.harness import config as config_lib


def run(main: Callable[[], int | None]) -> None:
  """Parses flags, runs `main()` and exits with what it returns (None is 0).

  A flag that does not exist or does not parse, a surplus argument and every
  `InputError` end as one line on stderr and exit code 2 (absl alone prints
  several lines and exits 1).
  """

  def fail(message: object) -> None:
    program = os.path.basename(sys.argv[0]).removesuffix(".py")
    print(f"{program}: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)

  def parse(argv: list[str]) -> list[str]:
    try:
      return flags.FLAGS(argv)
    except flags.Error as error:
      fail(error)
      raise

  def guarded(argv: list[str]) -> int | None:
    if len(argv) > 1:
      fail(
        f"unexpected argument {argv[1]!r}; all options are flags, see --help"
      )
    logging.set_verbosity(logging.INFO)
    std_logging.getLogger("jax").setLevel(std_logging.WARNING)
    logging.get_absl_handler().addFilter(_ours)
    try:
      return main()
    except config_lib.InputError as error:
      fail(error)

  app.run(guarded, flags_parser=parse)


def _ours(record: std_logging.LogRecord) -> bool:
  """Leaves out the progress notes of orbax, a dozen lines per checkpoint."""
  return record.levelno >= std_logging.WARNING or "orbax" not in record.pathname
