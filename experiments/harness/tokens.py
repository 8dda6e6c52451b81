"""Text to tokens and back: bytes of our own models, tokenizers of others."""

import datetime
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from giantsteps.experiments.harness import config as config_lib
from giantsteps.models import safetensors_folder

InputError = config_lib.InputError
# How Qwen2 cuts a text before its byte pairs are merged.
_QWEN_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokens(NamedTuple):
  """How a model reads and writes text.

  Attributes:
    unit: what one token is called.
    encode: text -> ids, as the model is to see them before it continues.
    decode: ids -> text, up to the first id of `eos`.
    eos: ids that end a text.
    pad: id that fills, or None.
    mask: id of an unknown token, or None.
    size: no id from here on has a meaning; None: unknown.
  """

  unit: str
  encode: Callable[[str], list[int]]
  decode: Callable[[Sequence[int] | np.ndarray], str]
  eos: tuple[int, ...] = ()
  pad: int | None = None
  mask: int | None = None
  size: int | None = None


def utf8(mask: int | None = None) -> Tokens:
  """The bytes of a text; ids from 256 on stand for none."""
  decode = lambda ids: bytes(i for i in ids if i < 256).decode(
    "utf-8", "replace"
  )
  return Tokens("bytes", lambda text: list(text.encode()), decode, mask=mask)


def published(
  directory: pathlib.Path, vocab_size: int, *, chat: bool = False
) -> Tokens:
  """The tokenizer in the folder of a published checkpoint.

  Special ids are those of config.json and generation_config.json; a mask token
  may also be named in tokenizer_config.json.

  Args:
    directory: holds config.json and tokenizer.json; of Qwen2 and Dream also
      vocab.json and merges.txt will do, Dream has no other.
    vocab_size: of the model; ids outside are refused.
    chat: wraps a text as the user's turn of the folder's chat template,
      which a sandbox renders, and opens the assistant's.

  Raises:
    InputError: if a file or a library is missing or a file is of no use.
  """
  named = _json(directory / "tokenizer_config.json")
  model = _json(directory / "config.json")
  tokenizer = _tokenizer(directory, model.get("model_type"), named)
  ends = _json(directory / "generation_config.json").get("eos_token_id")
  eos = {*_ids(model.get("eos_token_id")), *_ids(ends)}
  mask = _ids(model.get("mask_token_id"))
  if not mask and named.get("mask_token"):
    mask = _ids(tokenizer.token_to_id(_content(named["mask_token"])))
  pad = _ids(model.get("pad_token_id"))
  render = _template(directory, named) if chat else None
  for name, ids in (("eos", eos), ("mask", mask), ("pad", pad)):
    _check_ids(directory, name, ids, vocab_size)

  def encode(text):
    if render is not None:  # the template writes the special tokens itself
      ids = tokenizer.encode(render(text), add_special_tokens=False).ids
    else:
      ids = tokenizer.encode(text).ids
    _check_ids(directory, "tokenizer's", ids, vocab_size)
    return list(ids)

  def decode(ids):
    ids = [int(i) for i in ids]
    end = next((i for i, token in enumerate(ids) if token in eos), len(ids))
    return tokenizer.decode(ids[:end], skip_special_tokens=True)

  one = lambda ids: ids[0] if ids else None
  known = [*tokenizer.get_vocab().values(), *eos, *pad, *mask]
  return Tokens(
    unit="tokens",
    encode=encode,
    decode=decode,
    eos=tuple(sorted(eos)),
    pad=one(pad),
    mask=one(mask),
    size=max(known, default=-1) + 1,
  )


def _tokenizer(directory: pathlib.Path, model_type: Any, named: dict) -> Any:
  path, table = directory / "tokenizer.json", directory / "vocab.json"
  try:
    import tokenizers
  except ImportError as error:
    raise InputError(
      f"{path}: needs the library tokenizers, "
      "pip install 'giantsteps[checkpoints]'"
    ) from error
  if path.is_file():
    try:
      return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
      raise InputError(f"{path}: no tokenizer, {_line(error)}") from error
  merges = directory / "merges.txt"
  known = model_type in ("qwen2", "Dream")
  if not (known and table.is_file() and merges.is_file()):
    raise InputError(
      f"{path}: no such file; other formats are not read (but of qwen2 and "
      "Dream vocab.json with merges.txt), transformers' "
      "AutoTokenizer.save_pretrained writes it"
    )
  try:
    model = tokenizers.models.BPE.from_file(str(table), str(merges))
  except Exception as error:
    raise InputError(f"{table}: no vocabulary, {_line(error)}") from error
  cut = tokenizers.pre_tokenizers
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer = tokenizers.normalizers.NFC()
  tokenizer.pre_tokenizer = cut.Sequence(
    [
      cut.Split(tokenizers.Regex(_QWEN_WORDS), "isolated"),
      cut.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  for index, (text, special) in sorted(_added(directory, named).items()):
    token = tokenizers.AddedToken(text, special=special, normalized=False)
    tokenizer.add_tokens([token])
    if tokenizer.token_to_id(text) != index:
      raise InputError(
        f"{directory}: the added token {text!r} has the id {index}, after "
        f"{table.name} it would be {tokenizer.token_to_id(text)}"
      )
  return tokenizer


def _added(directory: pathlib.Path, named: dict) -> dict[int, tuple[str, bool]]:
  """Tokens beside the vocabulary, id -> (text, special), from either file."""
  rows = named.get("added_tokens_decoder") or {}
  older = _json(directory / "added_tokens.json")
  try:
    added = {index: (text, True) for text, index in older.items()}
    added |= {
      int(index): (_content(row), bool(row.get("special")))
      for index, row in rows.items()
    }
    return {int(index): pair for index, pair in added.items()}
  except (AttributeError, TypeError, ValueError) as error:
    raise InputError(
      f"{directory}: the added tokens are malformed, {_line(error)}"
    ) from error


def _template(
  directory: pathlib.Path, named: dict[str, Any]
) -> Callable[[str], str]:
  """text -> the folder's chat template with one turn of the user."""
  try:
    import jinja2
    import jinja2.sandbox
  except ImportError as error:
    raise InputError(
      "--chat needs the library jinja2, pip install 'giantsteps[checkpoints]'"
    ) from error
  path = directory / "chat_template.jinja"
  source = named.get("chat_template")
  if path.is_file():
    source = path.read_text(encoding="utf-8", errors="replace")
  if isinstance(source, list):  # several by name
    rows = [row for row in source if isinstance(row, dict)]
    source = {row.get("name"): row.get("template") for row in rows}.get(
      "default"
    )
  if not isinstance(source, str):
    raise InputError(
      f"--chat: {directory} has no chat template, in tokenizer_config.json or "
      "chat_template.jinja; leave --chat out"
    )

  def refuse(message):
    raise jinja2.TemplateError(message)

  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.loopcontrols"],
  )
  environment.filters["tojson"] = lambda x, indent=None: json.dumps(
    x, ensure_ascii=False, indent=indent
  )
  special = {
    key: _content(value)
    for key, value in named.items()
    if key.endswith("_token") and value
  }

  def render(text):
    try:
      return environment.from_string(source).render(
        messages=[{"role": "user", "content": text}],
        add_generation_prompt=True,
        raise_exception=refuse,
        strftime_now=lambda form: datetime.datetime.now().strftime(form),
        **special,
      )
    except Exception as error:  # a template is a program: anything
      raise InputError(
        f"--chat: the template of {directory} fails, {_line(error)}"
      ) from error

  return render


def _json(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    return safetensors_folder.read_json(path)
  except safetensors_folder.FolderError as error:
    raise InputError(str(error)) from error


def _ids(value: Any) -> list[int]:
  """An id, several or none, as config.json may have it."""
  values = value if isinstance(value, list) else [value]
  return [v for v in values if v is not None]


def _content(value: Any) -> str:
  """A special token is a string or an object around it."""
  return str(value.get("content", "") if isinstance(value, dict) else value)


def _check_ids(
  directory: pathlib.Path, name: str, ids: Any, vocab_size: int
) -> None:
  for i in ids:
    if type(i) is not int or not 0 <= i < vocab_size:
      raise InputError(
        f"{directory}: the {name} token {i!r} must be in [0, {vocab_size}); do "
        "tokenizer.json and config.json belong together?"
      )


def _line(error: BaseException) -> str:
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= 160 else text[:157] + "..."
