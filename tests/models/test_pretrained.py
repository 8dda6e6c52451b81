"""Published checkpoints: logits of the authors' code, folders to the bit, and
what is refused."""

# pytrees and JSON have no static type
# pyright: reportArgumentType=false, reportIndexIssue=false
# pyright: reportOptionalSubscript=false

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from giantsteps.models import (
  families,
  partitioning,
  pretrained,
  safetensors_folder,
  transformer,
)

safetensors_numpy = pytest.importorskip("safetensors.numpy")

FolderError = pretrained.FolderError
GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CAUSAL = ("tiny_llama", "tiny_llama3rope", "tiny_qwen2", "tiny_qwen3")
MASKED = ("tiny_llada_mha", "tiny_llada_gqa", "tiny_dream")
logits = jax.jit(transformer.logits, static_argnums=0)


def checkpoint(name, folder):
  """The golden model `name` as a folder of its own."""
  where = "decoding" if name == "tiny_llada_mha" else "parallel_decoding"
  for file, target in (
    (f"{name}.config.json", "config.json"),
    (f"{name}.safetensors", "model.safetensors"),
  ):
    shutil.copy(GOLDEN / where / file, folder / target)
  return folder


def edit(folder, **changes):
  """Changes config.json; None takes a field away."""
  path = folder / "config.json"
  raw = json.loads(path.read_text()) | changes
  raw = {key: value for key, value in raw.items() if value is not None}
  path.write_text(json.dumps(raw))


def edit_tensors(folder, change):
  path = folder / "model.safetensors"
  tensors = change(dict(safetensors_numpy.load_file(path)))
  safetensors_numpy.save_file(tensors, path)


def assert_same_bits(a, b):
  def leaf(x, y):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

  jax.tree.map(leaf, a, b)


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED])
def test_logits_of_the_published_code(tmp_path, name):
  suffix = "decode" if name == "tiny_dream" else "logits"
  path = GOLDEN / "parallel_decoding" / f"{name}_{suffix}.npz"
  golden = np.load(path, allow_pickle=False)
  config, params = pretrained.load(checkpoint(name, tmp_path))
  assert config.causal == (name in CAUSAL)
  assert config.shifted == (name == "tiny_dream")
  with jax.default_matmul_precision("highest"):
    out = logits(config, params, golden["tokens"])
  assert out.dtype == jnp.float32
  expected = golden["logits"]
  # Two float32 implementations of the same sums, logits up to 24.
  np.testing.assert_allclose(
    out[:, -expected.shape[1] :], expected, atol=1e-5, rtol=1e-6
  )


@pytest.mark.parametrize("name", [*CAUSAL, *MASKED])
def test_saved_and_loaded_to_the_bit(tmp_path, name):
  (tmp_path / "first").mkdir()
  config, params = pretrained.load(checkpoint(name, tmp_path / "first"))
  extra = {"mask_token_id": 95}
  pretrained.save(
    tmp_path / "again", config, params, extra=extra, max_shard_bytes=10**5
  )
  again, loaded = pretrained.load(tmp_path / "again")
  assert again == config
  assert_same_bits(loaded, params)
  raw = json.loads((tmp_path / "again" / "config.json").read_text())
  first = json.loads((tmp_path / "first" / "config.json").read_text())
  assert raw["model_type"] == first["model_type"]
  assert raw["mask_token_id"] == 95
  # the same tensors as the authors' file, under the same names
  there = safetensors_numpy.load_file(tmp_path / "first" / "model.safetensors")
  here = {}
  for shard in (tmp_path / "again").glob("model-*.safetensors"):
    here |= safetensors_numpy.load_file(shard)
  assert_same_bits(here, there)


def test_bfloat16_is_kept(tmp_path):
  (tmp_path / "first").mkdir()
  checkpoint("tiny_qwen2", tmp_path / "first")
  config, params = pretrained.load(tmp_path / "first", dtype="bfloat16")
  assert config.dtype == config.param_dtype == "bfloat16"
  _, wide = pretrained.load(tmp_path / "first")
  assert_same_bits(params, jax.tree.map(lambda x: x.astype("bfloat16"), wide))
  pretrained.save(tmp_path / "again", config, params)
  files = list((tmp_path / "again").iterdir())
  assert sorted(f.name for f in files) == ["config.json", "model.safetensors"]
  again, loaded = pretrained.load(tmp_path / "again")
  assert again == config
  assert_same_bits(loaded, params)
  tensors = safetensors_folder.open_tensors(tmp_path / "again")
  assert {t.dtype.name for t in tensors.values()} == {"bfloat16"}


def load_on_a_mesh(folder):
  """What lies where on 2 x 2 x 2 devices, and how much of the file was read."""
  shape, names = (2, 2, 2), ("data", "fsdp", "model")
  mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), names)
  read = []
  opened = safetensors_folder.open_tensors

  def spied(directory):
    def spy(tensor):
      def one(index):
        value = tensor.read(index)
        read.append(value.nbytes)
        return value

      return dataclasses.replace(tensor, read=one)

    return {name: spy(tensor) for name, tensor in opened(directory).items()}

  safetensors_folder.open_tensors = spied
  _, params = pretrained.load(folder, mesh=mesh)
  whole = sum(read)
  _, alone = pretrained.load(folder)
  places = partitioning.specs(alone, mesh)
  same = jax.tree.map(
    lambda a, b, p: bool(np.array_equal(a, b)) and a.sharding.spec == p,
    params,
    alone,
    places,
  )
  parts = jax.tree.map(lambda x: x.addressable_shards[0].data.size, params)
  return {
    "same": jax.tree.all(same),
    "bytes": whole,
    "q": parts["layers"]["q"]["kernel"],
  }


def test_every_device_gets_its_slice_and_each_is_read_once(
  tmp_path, on_devices
):
  folder = checkpoint("tiny_llama", tmp_path)
  found = on_devices(8, __file__, f"load_on_a_mesh({str(folder)!r})")
  assert found["same"]
  tensors = safetensors_numpy.load_file(folder / "model.safetensors")
  assert found["bytes"] == sum(t.nbytes for t in tensors.values())
  assert found["q"] == 3 * 64 * 64 // 4  # fsdp and model split it


LLAMA3 = {
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}


def raw_config(name):
  where = "decoding" if name == "tiny_llada_mha" else "parallel_decoding"
  return json.loads((GOLDEN / where / f"{name}.config.json").read_text())


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_both_dialects_of_rotary_positions(key):
  raw = raw_config("tiny_llama3rope")
  _, new = families.read(raw)
  del raw["rope_parameters"]
  raw |= {"rope_theta": 5e5, "rope_scaling": {key: "llama3", **LLAMA3}}
  _, old = families.read(raw)
  assert old == new
  assert (old.rope_type, old.rope_factor, old.rope_low) == ("llama3", 8.0, 1.0)
  assert (old.rope_high, old.rope_original_length) == (4.0, 64)
  raw["rope_scaling"] = {key: "linear", "factor": 4}
  _, linear = families.read(raw)
  assert (linear.rope_type, linear.rope_factor) == ("linear", 4.0)


def test_fields_of_llada():
  raw = raw_config("tiny_llada_gqa")
  raw |= {
    "embedding_size": 128,
    "scale_logits": True,
    "input_emb_norm": True,
    "include_qkv_bias": True,
    "weight_tying": True,
    "mlp_hidden_size": None,
    "mlp_ratio": 3,
    "n_kv_heads": None,
  }
  _, config = families.read(raw)
  assert (config.vocab_size, config.embedding_size) == (96, 128)
  assert config.scale_logits and config.scale_embeddings and config.qkv_bias
  assert config.tie_embeddings and not config.causal and not config.shifted
  assert config.mlp_width == 3 * 64 and config.num_kv_heads == 4
  assert families.read(families.write(config))[1] == config


# Fields of the published config.json files; the numbers are theirs.
PUBLISHED = {
  "llada": {  # LLaDA-8B-Instruct
    "model_type": "llada",
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "max_sequence_length": 4096,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "weight_tying": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "activation_type": "silu",
    "block_type": "llama",
    "block_group_size": 1,
    "layer_norm_type": "rms",
    "multi_query_attention": None,
    "mask_token_id": 126336,
  },
  "Dream": {  # Dream-v0-7B
    "model_type": "Dream",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "mask_token_id": 151666,
  },
}


def test_sizes_of_published_models():
  """LLaDA: 2 126464 4096 + 32 (4 4096^2 + 3 4096 12288 + 2 4096) + 4096;
  Dream is Qwen2.5-7B, whose count is published."""
  for name, expected in (("llada", 8_015_581_184), ("Dream", 7_615_616_512)):
    _, config = families.read(PUBLISHED[name])
    init = transformer.Transformer(config).init
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(init, jax.random.key(0), tokens)["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == expected


REFUSED = [  # model, change of config.json, words of the error
  ("tiny_llama", {"model_type": "mistral"}, "model_type='mistral'.*llama"),
  ("tiny_llama", {"model_type": ["llama"]}, "model_type="),
  ("tiny_llama", {"model_type": None}, "model_type=None"),
  ("tiny_llama", {"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu'"),
  ("tiny_llama", {"hidden_act": None}, "hidden_act=None.*'silu'"),
  ("tiny_llama", {"attention_bias": True}, "attention_bias=True"),
  ("tiny_llama", {"mlp_bias": True}, "mlp_bias=True"),
  ("tiny_llama", {"is_causal": False}, "is_causal=False"),
  ("tiny_llama", {"rms_norm_eps": None}, "rms_norm_eps is missing"),
  ("tiny_llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
  ("tiny_llama", {"hidden_size": "64"}, "hidden_size='64' must be a positive"),
  ("tiny_llama", {"hidden_size": True}, "hidden_size=True must be"),
  ("tiny_llama", {"hidden_size": 2**40}, "hidden_size=1099511627776 must be"),
  ("tiny_llama", {"num_hidden_layers": -1}, "num_hidden_layers=-1 must be"),
  ("tiny_llama", {"num_hidden_layers": 2**30}, "1073741824 layers, the files"),
  ("tiny_llama", {"head_dim": 2**30}, "a side of 4294967296, the longest"),
  ("tiny_llama", {"vocab_size": 2**31 - 1}, "a side of 2147483647, the lon"),
  ("tiny_llama", {"num_key_value_heads": 3}, "num_kv_heads=3: must be a div"),
  ("tiny_llama", {"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be"),
  ("tiny_llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
  ("tiny_llama", {"quantization_config": {"bits": 4}}, "quantization_config="),
  ("tiny_qwen2", {"use_sliding_window": True}, "use_sliding_window=True"),
  (
    "tiny_qwen2",
    {"layer_types": ["full_attention", "sliding_attention"]},
    "layer_types has 'sliding_attention'",
  ),
  ("tiny_qwen2", {"num_key_value_heads": None}, "num_key_value_heads is miss"),
  ("tiny_qwen3", {"head_dim": None}, "head_dim is missing"),
  ("tiny_dream", {"rope_theta": None}, "rope_theta is missing"),
  ("tiny_dream", {"rope_theta": -1}, "rope_theta=-1 must be"),
  ("tiny_dream", {"vocab_size": None}, "vocab_size is missing"),
  ("tiny_dream", {"hidden_size": 66}, "4 heads do not divide the width 66"),
  ("tiny_dream", {"rope_scaling": "yarn"}, "rope_scaling='yarn' must be an ob"),
  ("tiny_dream", {"rope_scaling": {"type": "yarn"}}, "rope_type='yarn'"),
  ("tiny_dream", {"rope_scaling": {"type": "linear"}}, "factor of rope_type"),
  (
    "tiny_llama3rope",
    {
      "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8}
    },
    "low_freq_factor of rope_type='llama3' is missing",
  ),
  ("tiny_llama3rope", {"rope_theta": 1e4}, "rope_theta=10000.0, but 500000.0"),
  (
    "tiny_llama",
    {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1]}},
    "'mrope_section'=",
  ),
  ("tiny_llada_gqa", {"activation_type": "swiglu"}, "activation_type='swiglu'"),
  ("tiny_llada_gqa", {"block_type": "sequential"}, "block_type='sequential'"),
  ("tiny_llada_gqa", {"alibi": True}, "alibi=True"),
  ("tiny_llada_gqa", {"include_bias": True}, "include_bias=True"),
  ("tiny_llada_gqa", {"embedding_size": 90}, "embedding_size=90: must be"),
  ("tiny_llada_gqa", {"mlp_hidden_size": None}, "mlp_hidden_size is missing"),
  # shapes that the files do not have
  (
    "tiny_llada_gqa",
    {"embedding_size": 128},
    "a side of 128, the longest",
  ),
  ("tiny_llada_gqa", {"include_qkv_bias": True}, "k_proj.bias' is missing"),
  ("tiny_llama", {"intermediate_size": 64}, r"down_proj.*64, 96.*64, 64"),
  ("tiny_llama", {"vocab_size": 127}, r"embed_tokens.*128, 64.*127, 64"),
  ("tiny_llama", {"rms_norm_eps": 10**400}, "rms_norm_eps=1000"),
  ("tiny_llama", {"num_attention_heads": 8}, r"o_proj.weight' is \[64, 64\]"),
  ("tiny_llama", {"num_hidden_layers": 2}, "layers.2.* is used by nothing"),
  ("tiny_llama", {"num_hidden_layers": 4}, "layers.3.* is missing"),
  (
    "tiny_llama",
    {"tie_word_embeddings": True},
    "lm_head.weight' is not the em",
  ),
  ("tiny_llama", {"model_type": "qwen2"}, "k_proj.bias' is missing"),
  ("tiny_qwen2", {"model_type": "llama"}, "k_proj.bias' is used by nothing"),
]


@pytest.mark.parametrize(("name", "change", "words"), REFUSED)
def test_a_config_that_is_refused(tmp_path, name, change, words):
  edit(checkpoint(name, tmp_path), **change)
  with pytest.raises(FolderError, match=words) as info:
    pretrained.load(tmp_path)
  assert "\n" not in str(info.value) and len(str(info.value)) < 500


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (lambda t: t | {"extra": np.zeros(3, np.float32)}, "'extra' is used by no"),
    (
      lambda t: {k: v for k, v in t.items() if "norm" not in k},
      r"input_layernorm.weight' is missing \(7 of 30",
    ),
    (
      lambda t: t | {"model.norm.weight": np.zeros((64, 1), np.float32)},
      r"'model.norm.weight' is \[64, 1\].*\[64\]",
    ),
    (
      lambda t: {
        k: v.astype(np.float16) if "layers.1.self_attn.q" in k else v
        for k, v in t.items()
      },
      "layers.1.self_attn.q_proj.weight' is float16 .* float32: choose one",
    ),
    (
      lambda t: {k: v.astype(np.float64) for k, v in t.items()},
      "is float64; choose dtype",
    ),
  ],
)
def test_tensors_that_are_refused(tmp_path, change, words):
  edit_tensors(checkpoint("tiny_llama", tmp_path), change)
  with pytest.raises(FolderError, match=words):
    pretrained.load(tmp_path)


def test_a_tied_head_may_be_stored_twice(tmp_path):
  checkpoint("tiny_qwen3", tmp_path)
  config, params = pretrained.load(tmp_path)
  name = "model.embed_tokens.weight"
  edit_tensors(tmp_path, lambda t: t | {"lm_head.weight": t[name].copy()})
  again, same = pretrained.load(tmp_path)
  assert again == config
  assert_same_bits(same, params)
  edit_tensors(tmp_path, lambda t: t | {"lm_head.weight": t[name] + 1})
  with pytest.raises(FolderError, match="lm_head.weight' is not the embedding"):
    pretrained.load(tmp_path)


def test_what_save_refuses(tmp_path):
  (tmp_path / "first").mkdir()
  config, params = pretrained.load(checkpoint("tiny_llama", tmp_path / "first"))
  out = tmp_path / "out"
  cases = [
    ({"family": "gpt2"}, config, "family='gpt2': one of llama"),
    ({"family": "qwen2"}, config, "cannot say qkv_bias=False"),
    ({}, dataclasses.replace(config, window=4), "cannot say window=4"),
    ({}, dataclasses.replace(config, qk_norm=True, shifted=True), "no family"),
    ({}, dataclasses.replace(config, mlp_width=8), r"'layers/down/kernel' is"),
    ({"extra": {"hidden_size": 8}}, config, "extra hidden_size=8: the config"),
  ]
  for options, changed, words in cases:
    with pytest.raises(ValueError, match=words):
      pretrained.save(out, changed, params, **options)
  less = {key: value for key, value in params.items() if key != "head"}
  with pytest.raises(ValueError, match="'head' are missing"):
    pretrained.save(out, config, less)
  assert not out.exists()  # nothing was begun
  with pytest.raises(FolderError, match="is there already"):
    pretrained.save(tmp_path / "first", config, params)
  with pytest.raises(ValueError, match="dtype='int8'"):
    pretrained.load(tmp_path / "first", dtype="int8")


@pytest.mark.parametrize("name", CAUSAL)
def test_transformers_reads_what_was_saved(tmp_path, name):
  """Their logits of our folder, where the library is installed."""
  torch = pytest.importorskip("torch")
  theirs = pytest.importorskip("transformers")
  (tmp_path / "first").mkdir()
  config, params = pretrained.load(checkpoint(name, tmp_path / "first"))
  pretrained.save(tmp_path / "out", config, params)
  model = theirs.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
  path = GOLDEN / "parallel_decoding" / f"{name}_logits.npz"
  golden = np.load(path, allow_pickle=False)
  with torch.no_grad():
    out = model(torch.tensor(golden["tokens"])).logits.float().numpy()
  expected = golden["logits"]
  np.testing.assert_allclose(
    out[:, -expected.shape[1] :], expected, atol=2e-5, rtol=1e-5
  )
