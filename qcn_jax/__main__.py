"""`python -m qcn_jax VERB` is the `qcn` command."""

from qcn_jax.cli.main import run

if __name__ == "__main__":
    run()
