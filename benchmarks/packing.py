"""What packing costs by method, on this machine's standard library: the form of the report's Table 13.

    python benchmarks/packing.py [--length=4096]

Documents are files, as bytes (one byte a token), so that the figures depend on no tokenizer. Fragmentation is the
share of pieces that were cut although their document fits into a row; padding the share of positions without a
token. Prints one row a method and the processor seconds of planning and filling.
"""

import time

import numpy as np
from absl import app, flags

from qcn_jax.pipeline.data import packing
from qcn_jax.recipes.nano import corpus

_LENGTH = flags.DEFINE_integer("length", 4096, "tokens of a row")


def main(_: list[str]) -> None:
    length = _LENGTH.value
    documents = [{"tokens": np.frombuffer(text.encode(), np.uint8)} for _, text in corpus.stdlib_modules()]
    order = np.random.default_rng(0).permutation(len(documents))  # files come shuffled, as in training
    documents = [documents[i] for i in order]
    lengths = [len(document["tokens"]) for document in documents]
    print(f"{len(documents)} documents, {sum(lengths):,} tokens, {np.mean(np.asarray(lengths) > length):.0%} longer than "
          f"a row of {length}")
    print(f"{'method':<22}{'rows':>8}{'fragmentation %':>17}{'padding %':>11}{'dropped':>9}{'seconds':>9}")
    cases = [(method, "split") for method in packing.METHODS] + [("best_fit", "slide"), ("best_fit", "drop")]
    for method, overlong in cases:
        begin = time.process_time()
        planned = packing.plan(lengths, length, method, overlong)
        packing.fill(documents, planned, length)
        seconds = time.process_time() - begin
        found = packing.statistics(lengths, length, planned)
        name = method if overlong == "split" else f"{method} + {overlong}"
        print(f"{name:<22}{planned.rows:>8}{found.fragmentation:>17.2f}{found.padding:>11.2f}{found.dropped:>9}{seconds:>9.2f}")


if __name__ == "__main__":
    app.run(main)
