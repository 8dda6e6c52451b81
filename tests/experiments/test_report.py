"""The report is one well-formed file whose pictures are inside it."""

import base64
import html.parser
import re

import numpy as np

from giantsteps.experiments.harness import plots, report

VOID = {"meta", "img", "br"}


class Checker(html.parser.HTMLParser):
  """Fails on tags that do not nest; collects text and picture sources."""

  def __init__(self):
    super().__init__()
    self.open, self.text, self.sources = [], [], []

  def handle_starttag(self, tag, attrs):
    if tag == "img":
      self.sources.append(dict(attrs)["src"])
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open and self.open.pop() == tag, tag

  def handle_data(self, data):
    self.text.append(data)


def test_page_nests_escapes_and_embeds(tmp_path):
  path = tmp_path / "curve.png"
  plots.curves(
    {"a <b>": ([1, 2, 4], [3.0, 2.0, 1.0])},
    path,
    x_label="x",
    y_label="y",
    title="t",
    levels={"floor": 0.5},
    log_x=True,
    log_y=True,
    ticks=(1, 2, 4),
  )
  grid = tmp_path / "grid.png"
  images = np.linspace(-1, 1, 5 * 64).reshape(5, 8, 8, 1)
  plots.image_grid(images, grid, columns=3, row_labels=["one", "two"])
  page = report.page(
    "T & U",
    report.paragraph("1 < 2"),
    [
      report.section("S", report.figure(path, "a 'quoted' \"caption\" <x>")),
      report.figure(grid, "grid"),
      report.table([{"k": "<v>", "n": 0.123456}, {"k": "w", "n": 2}]),
    ],
  )
  checker = Checker()
  checker.feed(page)
  assert not checker.open
  for source, file in zip(checker.sources, (path, grid), strict=True):
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    assert data == file.read_bytes() and data.startswith(b"\x89PNG")
  text = " ".join(checker.text)
  assert "1 < 2" in text and "<v>" in text and "0.1235" in text


def test_committed_text_marks_only_what_was_filled_darker_later():
  tokens = np.frombuffer(b"ab<\n\xff", np.uint8)
  out = report.committed_text(tokens, np.array([-1, 0, 3, 1, -1]), 4)
  checker = Checker()
  checker.feed(out)
  assert not checker.open
  assert "".join(checker.text) == "ab<\u21b5\n\ufffd"
  light = {
    int(step): int(value)
    for step, value in re.findall(r"step (\d) of 4.*?90% (\d+)%", out)
  }
  assert sorted(light) == [1, 2, 4]
  assert light[1] > light[2] > light[4]
