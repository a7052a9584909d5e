"""Whether every token of an assistant, and no other, is in the loss: conversations under each kind of chat template.

    python benchmarks/chat_masks.py [--chats=1000]

Conversations and templates are those of tests/chat/of_others.py. Ids and masks are held against transformers'
`apply_chat_template(return_assistant_tokens_mask=True)` of the template with {% generation %} marks; ours come from
those marks, from the template without them, and for Qwen3-Coder's template also from the native encoder. Prints a row a
template; the first difference ends it.
"""

import pathlib
import sys
import tempfile
import time

import numpy as np
import transformers
from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qcn_jax.chat.tokenizer import Tokenizer
from tests.chat import of_others

_CHATS = flags.DEFINE_integer("chats", 1000, "conversations a template")


def main(_: list[str]) -> None:
    tokenizer = Tokenizer.train(of_others.texts(), 500, of_others.ADDED)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
    print(f"{'template':<12}{'chats':>8}{'tokens':>12}{'in the loss':>14}{'seconds':>10}")
    for name in of_others.TEMPLATES:
        begin = time.process_time()
        tokens, own = of_others.compare(name, _CHATS.value, np.random.default_rng(1), tokenizer, theirs)
        print(f"{name:<12}{_CHATS.value:>8}{tokens:>12,}{own:>14,}{time.process_time() - begin:>10.1f}", flush=True)


if __name__ == "__main__":
    app.run(main)
