"""Rows of associative recall, and the loss of a memory that forgets nothing."""

import numpy as np
import pytest

from giantsteps.research.test_time_training import associative_recall

KEYS, LENGTH = 8, 64


def make(indices, **kwargs):
  return associative_recall.rows(np.asarray(indices), LENGTH, KEYS, **kwargs)


def test_a_key_has_one_value_per_row():
  batch = make(range(50))
  assert batch["tokens"].shape == batch["weights"].shape == (50, LENGTH)
  rows = batch["tokens"].reshape(50, -1, 2)
  meanings = []
  for row in rows:
    assert row[:, 0].max() < KEYS <= row[:, 1].min() and row.max() < 2 * KEYS
    meaning = dict(row.tolist())
    assert [meaning[key] for key in row[:, 0]] == row[:, 1].tolist()
    meanings.append(tuple(sorted(meaning.items())))
  assert len(set(meanings)) == 50  # another row, other values
  assert batch["weights"].reshape(50, -1, 2).tolist() == [[[0, 1]] * 32] * 50


def test_rows_depend_on_their_index_and_split_alone():
  some = make([3, 5])["tokens"]
  np.testing.assert_array_equal(make([5])["tokens"][0], some[1])
  assert (make([3], held_out=True)["tokens"][0] != some[0]).any()


def test_keys_and_values_are_uniform():
  rows = make(range(2_000))["tokens"].reshape(-1, 2)
  for column in rows.T % KEYS:
    share = np.bincount(column, minlength=KEYS) / len(column)
    # values repeat within a row: about KEYS independent draws of 2000 rows
    np.testing.assert_allclose(share, 1 / KEYS, atol=4 * 0.33 / 126)


def test_best_loss_is_the_share_of_new_keys():
  rows = make(range(4_000))["tokens"].reshape(4_000, -1, 2)[..., 0]
  new = [
    [key not in row[:j] for j, key in enumerate(row)] for row in rows.tolist()
  ]
  share = np.mean(new, axis=0)
  best = associative_recall.best_nats(LENGTH // 2, KEYS)
  # a frequency of 4000 rows is off by 1/126 at most, times 4
  np.testing.assert_allclose(best / np.log(KEYS), share, atol=4 * 0.5 / 63)


@pytest.mark.parametrize(("length", "keys"), [(7, 4), (8, 0)])
def test_impossible_rows_are_refused(length, keys):
  with pytest.raises(ValueError, match=f"length={length}, num_keys={keys}"):
    associative_recall.rows(np.arange(2), length, keys)
