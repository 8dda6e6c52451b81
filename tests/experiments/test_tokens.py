"""Tokenizers of published models, chat templates, and generate with them."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from giantsteps.experiments.harness import tokens as tokens_lib

tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

InputError = tokens_lib.InputError
ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "parallel_decoding"
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %} t7 {{ m['content'] }}{% endfor %}"
  "{% if add_generation_prompt %} t8{% endif %}"
)


def folder_of(path, words=90, config=None, **named):
  """A tokenizer of the words t0, t1, .., id i for word ti, and its folder."""
  vocabulary = {f"t{i}": i for i in range(words)}
  model = tokenizers.models.WordLevel(vocabulary, unk_token="t0")
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="t3 $A", special_tokens=[("t3", 3)]
  )
  tokenizer.save(str(path / "tokenizer.json"))
  if config is not None:
    (path / "config.json").write_text(json.dumps(config))
  if named:
    (path / "tokenizer_config.json").write_text(json.dumps(named))
  return path


def test_bytes():
  tokens = tokens_lib.utf8(mask=256)
  assert tokens.encode("aé") == [97, 195, 169] and tokens.mask == 256
  assert tokens.decode(np.array([97, 195, 169])) == "aé"
  assert tokens.decode([97, 256, 98]) == "ab"


def test_text_special_ids_and_the_end(tmp_path):
  config = {"eos_token_id": 5, "pad_token_id": 6}
  folder_of(tmp_path, config=config, mask_token={"content": "t9"})
  (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 4]}')
  tokens = tokens_lib.published(tmp_path, 90)
  assert (tokens.eos, tokens.pad, tokens.mask) == ((4, 5), 6, 9)
  assert tokens.size == 90
  # the beginning of a text is the tokenizer's own affair
  assert tokens.encode("t10 t11 nonsense") == [3, 10, 11, 0]
  assert tokens.decode(np.array([10, 11, 4, 12])) == "t10 t11"
  (tmp_path / "config.json").write_text('{"mask_token_id": 11}')
  assert tokens_lib.published(tmp_path, 90).mask == 11


@pytest.mark.parametrize("place", ["string", "named", "file"])
def test_chat_template(tmp_path, place):
  named: dict[str, Any] = {"bos_token": {"content": "t1"}}
  if place == "string":
    named["chat_template"] = TEMPLATE
  if place == "named":
    rows = [{"name": "tools", "template": "no"}]
    named["chat_template"] = [*rows, {"name": "default", "template": TEMPLATE}]
  if place == "file":
    named["chat_template"] = "the file counts"
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
  folder_of(tmp_path, config={}, **named)
  tokens = tokens_lib.published(tmp_path, 90, chat=True)
  assert tokens.encode("t20 t21") == [1, 7, 20, 21, 8]  # and no second t3
  assert tokens_lib.published(tmp_path, 90).encode("t20") == [3, 20]


@pytest.mark.parametrize(
  ("template", "words"),
  [
    (None, "has no chat template.*leave --chat out"),
    (5, "has no chat template"),
    ("{% for %}", "the template of .* fails"),
    ("{{ messages[9].content }}", "fails"),
    ("{{ raise_exception('only tools') }}", "fails, only tools"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "fails, .*unsafe"),
    ("{{ messages.append(1) }}", "fails, .*unsafe"),
    ("{% for i in range(10**9) %}x{% endfor %}", "fails, Range too big"),
  ],
)
def test_a_chat_template_that_is_refused(tmp_path, template, words):
  folder_of(tmp_path, config={}, bos_token="t1", chat_template=template)
  with pytest.raises(InputError, match=words):
    tokens_lib.published(tmp_path, 90, chat=True).encode("t2")


def test_what_is_refused(tmp_path):
  with pytest.raises(InputError, match="tokenizer.json: no such file"):
    tokens_lib.published(tmp_path, 90)
  (tmp_path / "tokenizer.json").write_text('{"version": 3}')
  with pytest.raises(InputError, match="tokenizer.json: no tokenizer"):
    tokens_lib.published(tmp_path, 90)
  folder_of(tmp_path, config={})
  with pytest.raises(InputError, match=r"tokenizer's token 80 .*\[0, 64\)"):
    tokens_lib.published(tmp_path, 64).encode("t80")
  for config, words in (
    ({"eos_token_id": [1, 90]}, "eos token 90"),
    ({"mask_token_id": -1}, "mask token -1"),
    ({"pad_token_id": "t6"}, "pad token 't6'"),
  ):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
      tokens_lib.published(tmp_path, 90)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(InputError, match="config.json: no JSON"):
    tokens_lib.published(tmp_path, 90)


def test_byte_pairs_of_qwen2(tmp_path):
  """All that a folder of Dream holds; ids by hand."""
  letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocabulary = [*letters, "lo", "low", "Ġlow"]  # Ġ is the space's byte
  ids = {token: i for i, token in enumerate(vocabulary)}
  (tmp_path / "vocab.json").write_text(json.dumps(ids))
  (tmp_path / "merges.txt").write_text("#version: 0.2\nl o\nlo w\nĠ low\n")
  config = {"model_type": "Dream", "eos_token_id": 259, "mask_token_id": 260}
  (tmp_path / "config.json").write_text(json.dumps(config))
  rows = {"259": {"content": "<|end|>", "special": True}, "260": "<|mask|>"}
  named = {"added_tokens_decoder": rows}
  path = tmp_path / "tokenizer_config.json"
  path.write_text(json.dumps(named))
  with pytest.raises(InputError, match="added tokens are malformed"):
    tokens_lib.published(tmp_path, 264)
  rows["260"] = {"content": "<|mask|>", "special": True}
  path.write_text(json.dumps(named))
  tokens = tokens_lib.published(tmp_path, 264)
  low, space = ids["low"], ids["Ġlow"]
  # digits stay alone, specials are whole, a space goes to the next word
  assert tokens.encode("low low12") == [low, space, ids["1"], ids["2"]]
  assert tokens.encode("lo<|mask|>") == [ids["lo"], 260]
  text = "größe, 木! It's\n\n  low"
  assert tokens.decode(tokens.encode(text)) == text
  assert tokens.encode("e\u0301") == tokens.encode("\u00e9")  # NFC
  assert tokens.decode([low, 259, low]) == "low"
  (tmp_path / "added_tokens.json").write_text('{"<|more|>": 263}')
  with pytest.raises(InputError, match=r"'<\|more\|>' has the id 263"):
    tokens_lib.published(tmp_path, 264)
  (tmp_path / "config.json").write_text('{"model_type": "llama"}')
  with pytest.raises(InputError, match="tokenizer.json: no such file"):
    tokens_lib.published(tmp_path, 264)


def test_without_the_library(tmp_path, monkeypatch):
  folder_of(tmp_path, config={})
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(InputError, match=r"giantsteps\[checkpoints\]"):
    tokens_lib.published(tmp_path, 90)


def generate(*flags: str) -> str:
  code = (
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); import conftest, runpy; "
    "runpy.run_module('giantsteps.experiments.generate', run_name='__main__')"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, *flags],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


def published(path, name, words):
  shutil.copy(GOLDEN / f"{name}.config.json", path / "config.json")
  shutil.copy(GOLDEN / f"{name}.safetensors", path / "model.safetensors")
  folder_of(path, words)
  return path


def test_generate_continues_as_the_published_code_does(tmp_path):
  folder = published(tmp_path, "tiny_llama", 128)
  # The prompt is the golden one: the tokenizer must not add its t3.
  path = folder / "tokenizer.json"
  raw = json.loads(path.read_text()) | {"post_processor": None}
  path.write_text(json.dumps(raw))
  golden = np.load(GOLDEN / "tiny_llama_logits.npz", allow_pickle=False)
  text = lambda ids: " ".join(f"t{i}" for i in ids)
  prompts = [text(row) for row in golden["greedy_prompt"]]
  flags = [f"--prompt={prompt}" for prompt in prompts]
  said = generate(f"--model={folder}", "--num_tokens=24", *flags)
  first, second = (row[6:] for row in golden["greedy_out"])
  first = first[: list(first).index(1)]  # config.json: eos_token_id 1
  assert said.splitlines() == [
    # a row that has ended costs nothing more
    f"--- {len(first) + 1} forwards, 1.0 tokens per forward, greedy",
    prompts[0] + text(first),
    "--- 24 forwards, 1.0 tokens per forward, greedy",
    prompts[1] + text(second),
  ]
  assert sorted(p.name for p in folder.iterdir()) == [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
  ]


def test_generate_fills_blocks_of_a_masked_model(tmp_path):
  folder = published(tmp_path, "tiny_dream", 30)
  path = folder / "config.json"
  # 31 ids have a meaning, 96 have logits
  raw = json.loads(path.read_text()) | {"mask_token_id": 30}
  del raw["pad_token_id"]
  path.write_text(json.dumps(raw))
  said = generate(
    f"--model={folder}", "--num_tokens=12", "--prompt=t5 t6", "--threshold=0.3"
  )
  head, text = said.splitlines()
  calls = int(head.split()[1])
  assert 1 <= calls <= 12 and head.endswith("approximate")
  written = text.removeprefix("t5 t6").split()
  # The tokenizer drops what it does not know, and of all 96 ids this model
  # writes some that it does not.
  assert len(written) == 12 and set(written) <= {f"t{i}" for i in range(30)}
