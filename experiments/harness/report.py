"""One self-contained HTML file: figures, tables, decoded text, the machine."""

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; color: #1b1f24; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d0d7de; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .25rem .8rem; border-bottom: 1px solid #e2e6ea; text-align: right; }
td:first-child, th:first-child { text-align: left; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; vertical-align: top; }
figure img { max-width: 100%; } figcaption { max-width: 34rem; font-size: 13px; color: #57606a; }
pre { background: #f6f8fa; padding: .8rem; line-height: 1.35;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.note { color: #57606a; font-size: 13px; }
"""


def page(title: str, lead: str, sections: Sequence[str]) -> str:
  """The whole document; `lead` and `sections` are HTML."""
  return (
    "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
    "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
    f"<h1>{html.escape(title)}</h1>{lead}{''.join(sections)}</body></html>\n"
  )


def section(title: str, *parts: str) -> str:
  """A heading and HTML parts below it."""
  return f"<h2>{html.escape(title)}</h2>{''.join(parts)}"


def paragraph(text: str, note: bool = False) -> str:
  """Plain text as a paragraph."""
  kind = " class='note'" if note else ""
  return f"<p{kind}>{html.escape(text)}</p>"


def figure(path: pathlib.Path, caption: str) -> str:
  """A PNG inside the page, with its caption as the text for no image."""
  data = base64.b64encode(path.read_bytes()).decode()
  text = html.escape(caption, quote=True)
  return (
    f"<figure><img alt='{text}' src='data:image/png;base64,{data}'>"
    f"<figcaption>{text}</figcaption></figure>"
  )


def table(rows: Sequence[Mapping[str, object]]) -> str:
  """Rows with the same keys; numbers with four significant digits."""
  show = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
  head = "".join(f"<th>{html.escape(str(key))}</th>" for key in rows[0])
  body = "".join(
    "<tr>"
    + "".join(f"<td>{html.escape(show(v))}</td>" for v in row.values())
    + "</tr>"
    for row in rows
  )
  return f"<table><tr>{head}</tr>{body}</table>"


def committed_text(
  tokens: np.ndarray, committed_at: np.ndarray, steps: int
) -> str:
  """Bytes with a background by the step that committed them.

  Args:
    tokens: [L] byte values.
    committed_at: [L] int, the step, -1 for text that was given.
    steps: of the whole decoding; light is early, dark is late.
  """
  spans = []
  for token, step in zip(tokens, committed_at, strict=True):
    character = chr(token) if 32 <= token < 127 or token == 10 else "\ufffd"
    text = html.escape(character)
    if step < 0:
      spans.append(text)
      continue
    light = 88 - 45 * int(step) / max(steps - 1, 1)
    shown = "\u21b5\n" if character == "\n" else text
    spans.append(
      f"<span title='step {int(step) + 1} of {steps}' style='background:"
      f"hsl(28 90% {light:.0f}%)'>{shown}</span>"
    )
  return f"<pre>{''.join(spans)}</pre>"
