"""Cycles of a TPU kernel, counted in the compiler's final program.

A TPU core issues one bundle of instructions per cycle, so a kernel takes as
many cycles as it executes bundles, plus the waits for memory, which the
program does not show. Where a run of bundles issues matrix products faster
than the units take them (v5e, v5p), the units set the pace. The compiler writes the bundles as text. Here their
scalar instructions are executed: loop counters, grid positions and
predicates are known numbers, so every branch goes where it goes on the chip.
A branch on data falls through, into the region that it would skip.
"""

import collections
import itertools
import operator
import re
from collections.abc import Callable
from typing import NamedTuple

DELAY_SLOTS = 4  # bundles after a branch that are executed before it is taken
_LIMIT = 50_000_000  # executed bundles; a loop that never ends is a wrong parse

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]+)? *:[ >]*\{")
_COMMENT = re.compile(r"/\*.*?\*/", re.S)
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")
_ASSIGN = re.compile(r"^%(\w+) = (\S+)\s*(.*)$", re.S)
_PREDICATED = re.compile(r"\((!?)%(p\w+)(?:, %(\w+))?\),?")
_BRANCH = re.compile(r"sbr\.rel.*?target = \$region(\d+)", re.S)
_STORE = re.compile(r"sst \[(smem:\[[^\]]*\])\](?: \([^)]*\),)? %?(\w+)")
_SLOT = re.compile(r"\[(smem:\[[^\]]*\])\]")
# The first of two cores that share a grid (v5p) stands for both.
_CORE = re.compile(r"sld \[[^;]*?\](?= /\* megacore core id)")
_BITS = 0xFFFFFFFF

Value = int | None  # None: not known before the program runs


class Instruction(NamedTuple):
  """One scalar instruction: what it does, and if which predicate holds."""

  kind: str  # of "value", "phi", "load", "store", "branch"
  name: str  # what it sets; the slot of a store; the region of a branch
  operation: str
  operands: tuple[str, ...]
  predicate: tuple[str, bool] | None  # (name, value that executes it)
  otherwise: str | None = None  # what the name is if it is not executed


class Bundle(NamedTuple):
  """What one cycle does to the flow of control, and matrix products in it."""

  scalars: tuple[Instruction, ...]
  regions: tuple[int, ...]  # that start here
  matmuls: int


class Count(NamedTuple):
  """What a kernel executes.

  Attributes:
    cycles: bundles, or what the matrix units need where that is more.
    bundles: executed.
    static: bundles in the program.
    utilisation: share of the cycles in which the matrix units are busy.
    slots: executed operations per unit, "MATMUL", "VLOAD", ...
    capacity: operations per bundle and unit.
    spills, fills: vector registers stored to and loaded from memory because
      there are too few, in the program.
    unknown: executed branches on values that only the data decide.
  """

  cycles: int
  bundles: int
  static: int
  utilisation: float
  slots: dict[str, int]
  capacity: dict[str, int]
  spills: int
  fills: int
  unknown: int


def _signed(x: int) -> int:
  x &= _BITS
  return x - (1 << 32) if x >> 31 else x


_ARITHMETIC: dict[str, Callable[..., int]] = {
  "sadd": operator.add,
  "ssub": operator.sub,
  "smul": operator.mul,
  "sand": operator.and_,
  "sor": operator.or_,
  "sxor": operator.xor,
  "sshll": lambda a, b: a << (b & 31),
  "sshrl": lambda a, b: (a & _BITS) >> (b & 31),
  "sshra": lambda a, b: _signed(a) >> (b & 31),
  "smin": min,
  "smax": max,
}
_COMPARE = {
  name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}


def _evaluate(operation: str, xs: tuple[Value, ...]) -> Value:
  """The value of one instruction, or None if it is not known."""
  base, _, rest = operation.partition(".")
  if base in ("por", "pand", "pnor", "pnand"):
    either = base in ("por", "pnor")
    decides = int(either)  # true or anything is true, even if unknown
    if decides in xs:
      out = decides
    elif None in xs:
      return None
    else:
      out = 1 - decides
    return 1 - out if base[1] == "n" else out
  if base == "scalar_select":
    return None if xs[0] is None else xs[1 if xs[0] else 2]
  known = tuple(x for x in xs if x is not None)
  if len(known) < len(xs) or not xs:
    return None
  return _arithmetic(base, rest, known)


def _arithmetic(base: str, rest: str, xs: tuple[int, ...]) -> Value:
  """As `_evaluate`, of numbers."""
  if base == "smov" or base == "pmov":
    return xs[0]
  if base == "pneg":
    return 1 - xs[0]
  if base == "scmp":
    kind, _, width = rest.partition(".")
    fix = (lambda x: x & _BITS) if width.startswith("u32") else _signed
    return int(_COMPARE[kind](fix(xs[0]), fix(xs[1])))
  if base in _ARITHMETIC and len(xs) == 2:
    fix = (lambda x: x & _BITS) if rest == "u32" else _signed
    out = _ARITHMETIC[base](fix(xs[0]), fix(xs[1]))
    return _signed(out)
  return None


def _instruction(text: str) -> Instruction | None:
  """Parses one instruction; None for those of vectors and memory."""
  found = _PREDICATED.search(text)
  predicate = (found[2], not found[1]) if found else None
  otherwise = found[3] if found else None
  branch = _BRANCH.search(text)
  if branch:
    return Instruction("branch", branch[1], "sbr", (), predicate)
  store = _STORE.search(text)
  if store:
    return Instruction("store", store[1], "sst", (store[2],), predicate)
  assign = _ASSIGN.match(text.strip())
  if not assign or assign[1][0] not in "sp":
    return None
  name, operation, rest = assign.groups()
  rest = _PREDICATED.sub("", rest)
  if operation == "sld":
    slot = _SLOT.search(rest)
    operands = (slot[1],) if slot else ()
    return Instruction("load", name, operation, operands, predicate)
  operands = tuple(x.strip().lstrip("%") for x in rest.split(","))
  kind = "phi" if operation == "sphi" else "value"
  return Instruction(kind, name, operation, operands, predicate, otherwise)


def parse(text: str) -> list[Bundle]:
  """The bundles of a file `*-final_bundles.txt`."""
  chunks: list[str] = []
  for line in text.splitlines():
    if _BUNDLE.match(line):
      chunks.append(line)
    elif chunks:
      chunks[-1] += "\n" + line
  bundles = []
  for chunk in chunks:
    regions = tuple(int(r) for r in _REGION.findall(chunk))
    body = (
      _COMMENT.sub("", _CORE.sub("smov.u32 0", chunk))
      .partition("{")[2]
      .rpartition("}")[0]
    )
    matmuls = len(re.findall(r"\bvmatmul\.", body))
    parsed = map(_instruction, body.split(";;"))
    scalars = tuple(x for x in parsed if x is not None)
    bundles.append(Bundle(scalars, regions, matmuls))
  return bundles


def _deciding(bundles: list[Bundle]) -> list[tuple[Instruction, ...]]:
  """Per bundle the instructions on which branches depend, phis first."""
  writers = collections.defaultdict(list)
  wanted, found = [], set()
  for i, bundle in enumerate(bundles):
    for x in bundle.scalars:
      if x.kind == "branch":
        wanted.append((i, x))
      else:
        writers[x.name].append((i, x))
  while wanted:
    here = wanted.pop()
    if here not in found:
      found.add(here)
      x = here[1]
      names = (*x.operands, *x.predicate[:1]) if x.predicate else x.operands
      wanted += [w for n in (*names, x.otherwise) if n for w in writers[n]]
  out = []
  for i, bundle in enumerate(bundles):
    kept = [x for x in bundle.scalars if (i, x) in found]
    out.append(tuple(sorted(kept, key=lambda x: x.kind != "phi")))
  return out


def executions(bundles: list[Bundle]) -> tuple[list[int], int]:
  """How often every bundle is executed, and how many branches are unknown.

  Raises:
    ValueError: if the program does not end, or jumps to nowhere.
  """
  start = {r: i for i, bundle in enumerate(bundles) for r in bundle.regions}
  values: dict[str, Value] = {}
  memory: dict[str, Value] = {}
  written: dict[str, int] = {}
  clock = unknown = 0

  def read(name: str) -> Value:
    try:
      return int(name, 0)
    except ValueError:
      return {"true": 1, "false": 0}.get(name, values.get(name))

  def write(name: str, value: Value) -> None:
    nonlocal clock
    clock += 1
    values[name], written[name] = value, clock

  decides = _deciding(bundles)
  following = [len(bundles)] * (len(bundles) + 1)  # bundle that decides
  for i in reversed(range(len(bundles))):
    following[i] = i if decides[i] else following[i + 1]
  # Executions of bundle i less those of bundle i - 1.
  steps = [0] * (len(bundles) + 1)
  position = total = 0
  pending: tuple[int, int] | None = None  # (delay slots left, target)
  while position < len(bundles):
    end = position + 1
    if not pending:
      end = max(end, following[position])
    steps[position] += 1
    steps[end] -= 1
    total += end - position
    if total > _LIMIT:
      raise ValueError(f"more than {_LIMIT} bundles: a loop does not end")
    target = None
    for x in decides[position]:
      holds: Value = 1
      if x.predicate:
        holds = read(x.predicate[0])
        holds = None if holds is None else int(bool(holds) == x.predicate[1])
      if x.kind == "branch":
        unknown += holds is None
        target = int(x.name) if holds else None
      elif holds == 0:
        if x.otherwise:
          write(x.name, read(x.otherwise))
      elif x.kind == "phi":
        newest = max(x.operands, key=lambda n: written.get(n, -1))
        write(x.name, read(newest))
      elif x.kind == "store":
        memory[x.name] = read(x.operands[0]) if holds else None
      elif x.kind == "load":
        known = memory.get(x.operands[0]) if x.operands and holds else None
        write(x.name, known)
      else:
        known = tuple(read(name) for name in x.operands)
        write(x.name, _evaluate(x.operation, known) if holds else None)
    if target is not None:
      if target not in start:
        raise ValueError(f"branch to region {target}, which starts nowhere")
      pending = (DELAY_SLOTS, start[target])
    elif pending:
      pending = (pending[0] - 1, pending[1])
    if pending and pending[0] == 0:
      position, pending = pending[1], None
    else:
      position = end
  return list(itertools.accumulate(steps[:-1])), unknown


def count(program: str, utilization: str, issue: int) -> Count:
  """Counts what a kernel executes.

  Args:
    program: text of `*-final_bundles.txt`.
    utilization: text of `*-final_hlo-static-per-bundle-utilization.txt`.
    issue: cycles that one vmatmul keeps its matrix unit busy.

  Raises:
    ValueError: if the two do not describe the same bundles.
  """
  bundles = parse(program)
  times, unknown = executions(bundles)
  head, _, table = utilization.partition("== UTILIZATION:")
  names, capacity = head.strip().splitlines()[-2:]
  names = [name.strip() for name in names.split(",")]
  capacity = dict(zip(names, map(int, capacity.split()), strict=True))
  rows = [[int(x) for x in row.split()] for row in table.strip().splitlines()]
  if len(rows) != len(bundles):
    raise ValueError(f"{len(bundles)} bundles, utilization of {len(rows)}")
  slots: dict[str, int] = collections.Counter()
  for row, n in zip(rows, times, strict=True):
    for name, used in zip(names, row, strict=True):
      slots[name] += n * used
  static = dict(zip(names, map(sum, zip(*rows, strict=True)), strict=True))
  cycles = busy = 0.0
  pairs = zip(times, bundles, strict=True)
  for n, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
    run = [bundle for _, bundle in run]
    needed = sum(b.matmuls for b in run) * issue / capacity["MATMUL"]
    cycles += n * max(len(run), needed)
    busy += n * needed
  return Count(
    cycles=round(cycles),
    bundles=sum(times),
    static=len(bundles),
    utilisation=busy / cycles,
    slots=dict(slots),
    capacity=capacity,
    spills=static["VSTORE:SPILL"],
    fills=static["VLOAD:FILL"],
    unknown=unknown,
  )
