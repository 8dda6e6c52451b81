"""Configs: overrides by type, JSON there and back, one line per mistake."""

import dataclasses
import json
from typing import Literal

import pytest

from giantsteps.experiments import configs
from giantsteps.experiments.harness import config
from giantsteps.models import dit, mlp


@dataclasses.dataclass(frozen=True)
class Inner:
  count: int = 3
  rate: float = 0.5
  window: int | None = None


@dataclasses.dataclass(frozen=True)
class Outer:
  inner: Inner = Inner()
  sizes: tuple[int, ...] = (1, 2)
  flag: bool = False
  name: str = "x"
  kind: Literal["a", "b"] = "a"
  other: Inner = Inner(count=7)

  def __post_init__(self):
    if self.flag and self.inner.count % 2:
      raise ValueError(f"count={self.inner.count}\nmust be even with flag")


RUN = config.Config(task="flow", model=mlp.Config())


def fails(call, *arguments) -> str:
  """The message of the InputError that the call ends with: one line."""
  with pytest.raises(config.InputError) as caught:
    call(*arguments)
  message = str(caught.value)
  assert "\n" not in message
  return message


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("inner.count=-12", Outer(inner=Inner(count=-12))),
    ("inner.rate=3e-3", Outer(inner=Inner(rate=0.003))),
    ("inner.rate=2", Outer(inner=Inner(rate=2.0))),
    ("inner.window=8", Outer(inner=Inner(window=8))),
    ("other.window=None", Outer()),
    ("sizes=3,4,5", Outer(sizes=(3, 4, 5))),
    ("sizes=(3,)", Outer(sizes=(3,))),
    ("sizes=", Outer(sizes=())),
    ("name=a=b", Outer(name="a=b")),
    ("kind=b", Outer(kind="b")),
    (" inner.count = 4", Outer(inner=Inner(count=4))),
  ],
)
def test_overrides_are_read_by_the_type_of_the_field(text, expected):
  got = config.override(Outer(), [text])
  assert got == expected
  assert type(got.inner.rate) is float


def test_overrides_apply_together_and_the_last_one_counts():
  # one at a time, flag=true with count=3 would be refused
  got = config.override(
    Outer(), ["flag=True", "inner.count=1", "inner.count=4"]
  )
  assert got == Outer(flag=True, inner=Inner(count=4))


@pytest.mark.parametrize(
  ("text", "parts"),
  [
    ("inner.cuont=1", ["inner.cuont", "did you mean 'count'", "rate, window"]),
    ("outer=1", ["outer", "inner, sizes, flag, name, kind, other"]),
    ("inner=3", ["inner=3", "inner.count, inner.rate, inner.window"]),
    ("flag.x=3", ["flag.x=3", "no fields"]),
    ("inner.count", ["inner.count", "no '='"]),
    ("inner.count=4.5", ["inner.count", "4.5", "int"]),
    ("inner.count=", ["inner.count", "int"]),
    ("inner.rate=fast", ["inner.rate", "fast", "float"]),
    ("inner.rate=nan", ["inner.rate", "nan", "finite"]),
    ("inner.rate=-inf", ["inner.rate", "-inf", "finite"]),
    ("inner.window=big", ["inner.window", "big", "int or none"]),
    ("flag=1", ["flag", '"1"', "true or false"]),
    ("sizes=1,x", ["sizes", '"x"', "int"]),
    ("kind=c", ["kind", '"c"', "one of a, b"]),
    ("flag=true", ["count=3", "even"]),
    ("=3", ["there are inner"]),
    ("inner.co\nunt=3", ["inner.co\\nunt"]),
  ],
)
def test_a_bad_override_is_said_in_one_line(text, parts):
  message = fails(config.override, Outer(), [text])
  for part in parts:
    assert part in message, message


@pytest.mark.parametrize(
  ("override", "part"),
  [
    ("steps=0", "steps=0"),
    ("steps=-4", "steps=-4"),
    ("steps=3000000000", "2**31"),
    ("batch_size=0", "batch_size=0"),
    ("accumulate=0", "accumulate=0"),
    ("accumulate=3", "batch_size=256: not a multiple of accumulate=3"),
    ("steps_per_dispatch=0", "steps_per_dispatch=0"),
    ("ema_decay=1", "ema_decay=1.0: must be in [0, 1)"),
    ("seed=-1", "seed=-1"),
    ("keep=0", "keep=0"),
    ("keep_every=-1", "keep_every=-1"),
    ("data.seq_len=0", "data.seq_len=0"),
    ("data.held_out=1", "data.held_out=1.0"),
    ("optim.learning_rate=-1", "optim.learning_rate=-1.0"),
    ("optim.b2=1", "optim.b2=1.0"),
    ("optim.end_factor=2", "optim.end_factor=2.0"),
    ("model.width=0", "model.width=0"),
    ("model.depth=-2", "model.depth=-2"),
    ("model.num_classes=-2", "model.num_classes=-2"),
    ("model.dtype=float99", "float32, bfloat16"),
    ("model.remat=some", "none"),
  ],
)
def test_a_run_that_cannot_be_is_refused(override, part):
  cfg = config.override(RUN, [override])
  assert part in fails(config.validate, cfg)


@pytest.mark.parametrize(
  "override", ["optim.name=sgd", "optim.schedule=step", "task=diffusion"]
)
def test_names_come_from_a_list(override):
  name, _, value = override.partition("=")
  message = fails(config.override, RUN, [override])
  assert name in message and value in message and "one of" in message


def test_a_config_written_in_python_is_checked_too():
  cfg = dataclasses.replace(RUN, steps=2.5)
  assert "steps=2.5: wants int" in fails(config.validate, cfg)


def test_load_finds_modules(tmp_path, monkeypatch):
  (tmp_path / "tiny_run.py").write_text(
    "from giantsteps.experiments.harness import config\n"
    "from giantsteps.models import dit\n"
    "def get_config():\n"
    "  return config.Config('flow', dit.Config())\n"
  )
  monkeypatch.setattr(configs, "__path__", [*configs.__path__, str(tmp_path)])
  assert "tiny_run" in config.names()
  cfg = config.load("tiny_run", ["steps=7", "model.heads=2"])
  assert cfg == config.Config("flow", dit.Config(heads=2), steps=7)
  message = fails(config.load, "tiny_rum", [])
  assert "did you mean 'tiny_run'?" in message
  assert all(name in message for name in config.names())
  fails(config.load, "../etc", [])
  assert "steps=0" in fails(config.load, "tiny_run", ["steps=0"])


def test_every_config_loads_and_survives_json():
  for name in config.names():
    cfg = config.load(name)
    assert config.from_json(json.loads(json.dumps(config.to_json(cfg)))) == cfg


def test_json_names_the_model():
  data = config.to_json(RUN)
  assert data["model"]["kind"] == "mlp"
  assert config.from_json(data).model == mlp.Config()
  data = config.to_json(dataclasses.replace(RUN, model=dit.Config(patch=4)))
  assert config.from_json(data).model == dit.Config(patch=4)


@pytest.mark.parametrize(
  ("change", "parts"),
  [
    (lambda d: d.pop("steps"), ["steps", "missing"]),
    (lambda d: d["optim"].pop("b1"), ["optim.b1", "missing"]),
    (lambda d: d["optim"].update(beta=1), ["optim.beta", "b1"]),
    (lambda d: d["model"].pop("kind"), ["model", "kind"]),
    (lambda d: d["model"].update(kind="resnet"), ["resnet", "mlp"]),
    (lambda d: d["model"].update(kind="layers"), ["layers", "no such model"]),
    (lambda d: d["model"].update(kind=3), ["3", "mlp"]),
    (lambda d: d.update(model=3), ["model", "object"]),
    (lambda d: d.update(data=[]), ["data", "object"]),
    (lambda d: d.update(steps="9"), ["steps", '"9"', "int"]),
    (lambda d: d.update(steps=True), ["steps", "true", "int"]),
    (lambda d: d.update(ema_decay=None), ["ema_decay", "null", "float"]),
    (lambda d: d.update(steps=-9), ["steps=-9"]),
  ],
)
def test_edited_json_is_refused(change, parts):
  data = config.to_json(RUN)
  change(data)
  message = fails(config.from_json, data)
  for part in parts:
    assert part in message, message


@pytest.mark.parametrize("data", [None, [], 3, "flow"])
def test_json_that_is_no_config_is_refused(data):
  fails(config.from_json, data)


def test_differences_name_both_values():
  other = config.override(RUN, ["optim.learning_rate=0.003", "steps=5"])
  assert config.differences(RUN, RUN) == []
  assert config.differences(RUN, other) == [
    "optim.learning_rate: 0.01 here, 0.003 in the work folder",
    "steps: 2000 here, 5 in the work folder",
  ]


def test_differences_of_two_models_name_fields_of_either():
  other = dataclasses.replace(RUN, model=dit.Config())
  lines = config.differences(RUN, other)
  assert 'model.kind: "mlp" here, "dit" in the work folder' in lines
  assert "model.patch: absent here, 2 in the work folder" in lines


def test_a_config_is_hashable_and_frozen():
  assert hash(RUN) == hash(config.Config(task="flow", model=mlp.Config()))
  with pytest.raises(dataclasses.FrozenInstanceError):
    RUN.steps = 3  # type: ignore
