"""Packaging: folder `models` installs as `giantsteps.models`, and so on."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
FOLDERS = ("models", "samplers", "kernels_pallas", "research", "experiments")

DEMO = ["scikit-learn", "matplotlib", "tqdm"]
CHECKPOINTS = ["safetensors>=0.8", "tokenizers", "jinja2"]
EXTRAS = {
  "demo": DEMO,
  "test": [
    *DEMO,
    *CHECKPOINTS,
    "pytest",
    "pytest-xdist",
    "ruff",
    "pyright[nodejs]",
    # compile-for-TPU tests run where it installs and say why they skip
    "libtpu; platform_machine == 'x86_64' and sys_platform == 'linux'",
  ],
  "checkpoints": CHECKPOINTS,  # published models: pretrained, generate --model
  "tpu": ["jax[tpu]"],
  "cuda12": ["jax[cuda12]"],
  "cuda13": ["jax[cuda13]"],
  # compiles for the H200 without a GPU or driver; CUDA's libraries stay away
  "gpu_compile": [
    "jax-cuda12-plugin",  # of the same version as jax
    "jax-cuda12-pjrt",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cuda-nvcc-cu12",
    "nvidia-nvjitlink-cu12",
  ],
  "notebooks": [*DEMO, "jupyterlab", "ipywidgets"],
  "tensorboard": ["tensorboardX"],
  "peers": ["diffusers", "torch", "matplotlib"],  # what benchmark compares with
}
package_dir = {
  f"giantsteps.{name}": name.replace(".", "/")
  for name in find_packages(
    str(HERE), include=[p for f in FOLDERS for p in (f, f"{f}.*")]
  )
}
setup(
  name="giantsteps",
  version="0.1.0",
  description="Do the work in fewer, larger steps: a JAX research codebase",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  packages=sorted(package_dir),
  package_dir=package_dir,
  package_data={
    name: ["py.typed", "tuned/*.json", "results/*.json"] for name in package_dir
  },
  python_requires=">=3.11",
  install_requires=[
    "jax>=0.10",
    "flax>=0.12",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "numpy",
    "tensorstore",
    "absl-py",
  ],
  extras_require=EXTRAS,
)
