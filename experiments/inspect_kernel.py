"""What the compiler says of a Pallas kernel on a TPU that is not here.

  python -m giantsteps.experiments.inspect_kernel newton_schulz --target v6e
  python -m giantsteps.experiments.inspect_kernel newton_schulz \\
      --target v5e,v5p,v6e --case 512 --json report.json

Per example of the kernel: estimated microseconds, how busy the matrix units
are, register spills, on-chip memory and temporaries, beside XLA's estimate for
the same call. These are estimates of a compiler, not measurements: they leave
out waits for memory. `--tune` tries block sizes and writes the best by this
estimate to kernels_pallas/tuned/. Needs the package libtpu, and wants no TPU.
"""

import json
import pathlib
import sys

import jax
from absl import flags, logging

from giantsteps.experiments.harness import cli, kernel_report
from giantsteps.experiments.harness import config as config_lib
from giantsteps.kernels_pallas import dispatch

_KERNEL = flags.DEFINE_string(
  "kernel", None, "Package in kernels_pallas.", required=True
)
_TARGET = flags.DEFINE_list("target", "v6e", "Chips: v5e, v5p, v6e.")
_CASE = flags.DEFINE_string("case", "", "Only examples with this in the name.")
_IMPLEMENTATION = flags.DEFINE_enum(
  "implementation",
  None,
  [name for name in dispatch.IMPLEMENTATIONS if name != "pallas_gpu"],
  "Only this one; by default the kernel beside XLA.",
)
_TUNE = flags.DEFINE_bool(
  "tune", False, "Tries block sizes first and keeps the best in tuned/."
)
_JSON = flags.DEFINE_string("json", None, "Writes the reports to this file.")


def main() -> int:
  """Prints one report per example, chip and implementation; 1 if one fails."""
  jax.config.update("jax_platforms", "cpu")  # the chips are not here
  path = _JSON.value and pathlib.Path(_JSON.value)
  if path and not path.parent.is_dir():
    raise config_lib.InputError(f"--json {path}: no folder {path.parent}")
  name, targets = _KERNEL.value, _TARGET.value
  for target in targets:
    kernel_report.check_target(target)
  reports = []
  print("compiler estimates, not measurements")
  for example in kernel_report.examples(name, _CASE.value):
    for target in targets:
      if _TUNE.value:
        best = kernel_report.tune(name, example, target, logging.info)
        if best:  # not all have block sizes
          print(f"{example.name}, {target}: blocks {json.dumps(best)}")
      for implementation in ("xla", "pallas_tpu"):
        if implementation not in example.implementations:
          continue
        if _IMPLEMENTATION.value in (None, implementation):
          report = kernel_report.estimate(
            name, example.name, target, implementation
          )
          print(kernel_report.words(report), flush=True)
          reports.append(report)
  if path:
    path.write_text(json.dumps(reports, indent=2) + "\n")
  return int(any("fails" in report for report in reports))


if __name__ == "__main__":
  if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
    sys.argv[1] = f"--kernel={sys.argv[1]}"  # inspect_kernel NAME
  cli.run(main)
