"""Packaging of qcn_jax: `pip install -e .`, with extras `test`, `tpu`, `gpu`, `ray` and `web`."""

import pathlib

import setuptools

LIBTPU = "libtpu==0.0.42.*"  # ahead-of-time compilation for TPU topologies, no TPU needed; jax 0.10's own pin
WEB = ["playwright>=1.50"]  # drives Debian's Chromium; its own browsers are not needed
DATA = ["datasketch>=1.6", "detect-secrets>=1.5"]  # filters of texts: near duplicates, secrets
TEST = [
    *DATA, *WEB,
    "pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "tree-sitter-language-pack>=0.9,<1", "ray>=2.40",
    "swebench>=5",
    # Parity with the reference implementation: exact versions, because numerics are compared.
    "torch==2.13.0", "transformers>=5.0,<6", "tiktoken>=0.7",
    LIBTPU,  # one reduced step is compiled for a TPU topology
]

# JAX 0.10 is the newest that Python 3.11 has and what README's figures come from; 0.11, the newest of the range on
# Python 3.12 and later, is tested by .ci/run on 3.12 and 3.13. 0.12 has not been tried.
JAX = ">=0.10,<0.12"

setuptools.setup(
    name="qcn_jax",
    version="0.1.0",
    description="The Qwen3-Coder-Next system in JAX: tasks, environments, agent, rewards, training.",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    # configs/ of the repository is installed as qcn_jax/configs, where --config=nano finds it.
    packages=[*setuptools.find_packages(include=["qcn_jax", "qcn_jax.*"]), "qcn_jax.configs"],
    package_dir={"qcn_jax.configs": "configs"},
    package_data={"qcn_jax": ["py.typed", "recipes/nano/base/*", "envs/sandbox/*.dockerfile",
                              "envs/problems/inside/*.js", "envs/synthesis/inside/*.js", "envs/synthesis/inside/*.go",
                              "envs/synthesis/pages/templates/start.*", "envs/synthesis/pages/templates/*/*",
                              "envs/synthesis/pages/templates/*/tests/*",
                              "envs/synthesis/pages/templates/*/src/*",
                              "envs/web/inside/*.mjs", "envs/web/inside/modules/*"]},
    python_requires=">=3.11",
    install_requires=[
        f"jax{JAX}", "flax>=0.12", "optax>=0.2.5", "orbax-checkpoint>=0.11", "grain>=0.2.10",
        "docker>=7", "numpy>=2", "absl-py>=2", "pytest>=8", "ml_collections>=1.0", "safetensors>=0.5",
        "tokenizers>=0.21", "jinja2>=3.1", "libcst>=1.5", "unidiff>=0.7.5", "tqdm>=4.66",
        "matplotlib>=3.8", "starlette>=0.40", "uvicorn>=0.30", "httpx>=0.27", "pyarrow>=17", "orjson>=3.10",
        "tree-sitter>=0.23", "tree-sitter-bash>=0.23",  # how agents' commands are read
        "jsonschema>=4.18",  # whether calls fit the tools that users define
    ],
    extras_require={
        # From 1.0 on the package downloads its grammars at run time.
        "languages": ["tree-sitter-language-pack>=0.9,<1"],
        "data": DATA,
        "test": TEST,
        "tpu": [f"jax[tpu]{JAX}", "tokamax"],
        "compile": [LIBTPU],
        "ray": ["ray>=2.40"],
        "web": WEB,
    },
    entry_points={"console_scripts": ["qcn=qcn_jax.cli.main:run"]},
)
