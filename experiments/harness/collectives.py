"""Collectives of a compiled program, from its HLO text, with loops multiplied.

The compiler's text holds one copy of a loop's body, so operations are counted
by walking from ENTRY: a `while` multiplies its body by the trip count, a
constant in its condition; fusions, calls and asynchronous wrappers are
entered. On TPUs one collective that was fused with computation is printed in
several fusions, also of a loop that it spans: there, equal labels, kind and
shape count once. Outside fusions every operation counts, for programs of `shard_map` may give all of
them one channel.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2}  # the rest: bits / 8

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^| )([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*\w*)\[([\d,]*)\]")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|branch_computations|called_computations)="
  r"(\{[^}]*\}|%?[\w.\-]+)"
)


class Collective(NamedTuple):
  """One collective operation of the program.

  Attributes:
    kind: one of KINDS.
    dtype: of its results, "f32"; several are joined by "+".
    bytes: of its results on one device, per execution.
    operand_bytes: of its operands likewise.
    group: devices that take part together.
    count: executions per run of the program.
    in_loop: whether it sits in a loop of known length.
    source: name of the operation in the traced program, "" if unknown.
  """

  kind: str
  dtype: str
  bytes: float
  operand_bytes: float
  group: int
  count: int
  in_loop: bool
  source: str

  @property
  def wire_bytes(self) -> float:
    """Bytes that one device sends per execution, by the ring algorithms."""
    share = (self.group - 1) / self.group if self.group else 1.0
    match self.kind:
      case "all-reduce":
        return 2 * share * self.bytes
      case "reduce-scatter":
        return share * self.operand_bytes
      case "collective-permute" | "collective-broadcast":
        return self.bytes
      case _:
        return share * self.bytes


class _Instruction(NamedTuple):
  name: str
  type: str
  opcode: str
  operands: str
  rest: str


class _Program(NamedTuple):
  """Computations by name, each its instructions by name."""

  computations: dict[str, dict[str, _Instruction]]
  entry: str
  devices: int


def parse(text: str) -> list[Collective]:
  """The collectives of `compiled.as_text()`, in the order of the walk.

  A loop whose length is no constant (the outer loop over training steps)
  counts once.

  Raises:
    ValueError: if the text has no ENTRY computation.
  """
  program = _read(text)
  return list(_walk(program, program.entry, _Context()))


def cycles(text: str) -> float:
  """Sum of the compiler's `estimated_cycles`, loops multiplied; 0 if none."""
  program = _read(text)

  def total(computation):
    out = 0.0
    for op in program.computations[computation].values():
      found = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
      out += float(found[1]) if found else 0.0
      if op.opcode == "while":
        out += _trip_count(program, op)[0] * total(_called(op)[0])
      elif op.opcode in ("call", "conditional"):
        out += max(map(total, _called(op)))
    return out

  return total(program.entry)


def _read(text: str) -> _Program:
  computations, entry, current = {}, "", None
  for line in text.splitlines():
    header = _HEADER.match(line.rstrip())
    if header:
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif current is not None:
      op = _instruction(line)
      if op:
        current[op.name] = op
  if not entry:
    raise ValueError(f"no ENTRY computation in this text: {text[:80]!r}")
  sizes = re.search(r"num_partitions=(\d+)", text[:20_000])
  copies = re.search(r"replica_count=(\d+)", text[:20_000])
  size = lambda match: int(match[1]) if match else 1
  return _Program(computations, entry, size(sizes) * size(copies))


def _instruction(line: str) -> _Instruction | None:
  named = _INSTRUCTION.match(line)
  if not named:
    return None
  body = named[2]
  found = _OPCODE.search(body)
  if not found:
    return None
  depth, start = 1, found.end()
  end = start
  while depth and end < len(body):
    depth += {"(": 1, ")": -1}.get(body[end], 0)
    end += 1
  return _Instruction(
    name=named[1],
    type=body[: found.start()],
    opcode=found[1],
    operands=body[start : end - 1],
    rest=body[end:],
  )


class _Context(NamedTuple):
  """How the walk came to a computation.

  Attributes:
    times: executions of it per run of the program.
    in_loop: whether a loop of known length is around it.
    fused: whether it is the inside of a fusion.
    seen: labels of collectives already counted in fusions.
  """

  times: int = 1
  in_loop: bool = False
  fused: bool = False
  seen: frozenset | set = frozenset()


def _walk(
  program: _Program, name: str, context: _Context
) -> Iterator[Collective]:
  # A chain that was started before a loop goes on in it: still one collective.
  seen = context.seen if context.fused else {k for k in context.seen if k.chain}
  assert isinstance(seen, set)
  for op in program.computations[name].values():
    inner = context._replace(seen=seen)
    if op.opcode == "while":
      trips, known = _trip_count(program, op)
      inner = inner._replace(
        times=context.times * trips, in_loop=context.in_loop or known
      )
      yield from _walk(program, _called(op)[0], inner)
    elif op.opcode in ("fusion", "call", "conditional", "async-start"):
      inner = inner._replace(fused=context.fused or op.opcode == "fusion")
      for called in _called(op):
        yield from _walk(program, called, inner)
    else:
      found = _collective(program, name, op, context)
      key = _Label.of(op)
      if found is None or (context.fused and key in seen):
        continue
      if context.fused:
        seen.add(key)
      yield found


class _Label(NamedTuple):
  """What is the same in all fusions that one collective is printed in."""

  kind: str
  channel: str
  chain: str
  arrays: tuple

  @classmethod
  def of(cls, op: _Instruction) -> "_Label":
    find = lambda pattern: next(iter(re.findall(pattern, op.rest)), "")
    return cls(
      op.opcode,
      find(r"channel_id=(\d+)"),
      find(r'chain_id="(\d+)"'),
      tuple(_ARRAY.findall(op.type)),
    )


def _collective(
  program: _Program, name: str, op: _Instruction, context: _Context
) -> Collective | None:
  """`op` as a collective; of a start/done pair the start counts, and its
  results are those of the done."""
  kind, result = op.opcode, op.type
  table = program.computations[name]
  if kind.endswith("-start") and kind.removesuffix("-start") in KINDS:
    kind = kind.removesuffix("-start")
    for other in table.values():
      if other.opcode == f"{kind}-done" and op.name in _names(other.operands):
        result = other.type
  if kind not in KINDS:
    return None
  given = [table[n].type for n in _names(op.operands) if n in table]
  operands = " ".join(given) or op.operands
  source = re.search(r'op_name="([^"]*)"', op.rest)
  arrays = _arrays(result)
  return Collective(
    kind=kind,
    dtype="+".join(dict.fromkeys(dtype for dtype, _ in arrays)),
    bytes=sum(size for _, size in arrays),
    operand_bytes=sum(size for _, size in _arrays(operands)),
    group=_group(op.rest, program.devices),
    count=context.times,
    in_loop=context.in_loop,
    source=source[1] if source else "",
  )


def _trip_count(program: _Program, op: _Instruction) -> tuple[int, bool]:
  """How often a `while` runs, and whether that is known; unknown is 1.

  The loops of `scan` count from 0 by 1 to a constant of the condition.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.rest)
  if known:
    return int(known[1]), True
  condition = re.search(r"condition=%?([\w.\-]+)", op.rest)
  assert condition is not None, op
  constants = set(_constants(program, condition[1]))
  return (constants.pop(), True) if len(constants) == 1 else (1, False)


def _constants(program: _Program, name: str) -> Iterator[int]:
  for op in program.computations[name].values():
    if op.opcode == "constant" and re.match(r"[su](32|64)\[\]", op.type):
      yield int(op.operands)
    elif op.opcode in ("fusion", "call"):
      for called in _called(op):
        yield from _constants(program, called)


def _called(op: _Instruction) -> list[str]:
  groups = _CALLED.findall(op.rest)
  return [n for group in groups for n in re.findall(r"[\w.\-]+", group)]


def _names(operands: str) -> list[str]:
  """Names among the operands, whether or not their types are printed."""
  found = re.findall(r"%([\w.\-]+)", operands)
  return found or [n.strip() for n in operands.split(",")]


def _arrays(type_text: str) -> list[tuple[str, float]]:
  """(dtype, bytes) of every array of a type, "(f32[8,4]{1,0}, u32[])"."""
  out = []
  for dtype, sides in _ARRAY.findall(type_text):
    bits = re.search(r"\d+", dtype)
    size = _BYTES.get(dtype, int(bits[0]) / 8 if bits else 0)
    out.append((dtype, size * math.prod(int(n) for n in sides.split(",") if n)))
  return out


def _group(rest: str, devices: int) -> int:
  listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
  if listed:
    return len(listed[1].split(","))
  iota = re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest)
  if iota:
    return int(iota[1])
  named = re.search(r"replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}", rest)
  if not named:
    return devices
  sizes = dict(re.findall(r"'([^']*)'=(\d+)", named[1]))
  # an axis, or a part of one: 'x' or 'x':(2)4
  axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", named[2])
  return math.prod(int(part or sizes[name]) for name, part in axes)
