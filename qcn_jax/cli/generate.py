"""Writes what a checkpoint says to a prompt, as it comes.

  qcn generate --checkpoint=DIR --chat='Reverse a list in Python.'     an assistant's answer to a user
  qcn generate --checkpoint=DIR --prompt='def add(a, b):'              the text goes on
  qcn generate --checkpoint=DIR --prompt=- < file.py                   the same, read from stdin
"""

import sys
from collections.abc import Sequence

from absl import flags

from qcn_jax.cli import parsing
from qcn_jax.config import MeshConfig
from qcn_jax.errors import UserError

PIECE = 16  # tokens between two writes


def main(argv: Sequence[str]) -> int:
    """Parses flags, loads the checkpoint, streams its answer to stdout."""
    values = flags.FlagValues()
    flags.DEFINE_string("checkpoint", None, "Folder with weights in Hugging Face form and a tokenizer.",
                        flag_values=values, required=True)  # fmt: skip
    flags.DEFINE_string("prompt", None, "Text to go on from; - reads it from stdin.", flag_values=values)
    flags.DEFINE_string("chat", None, "A user's message to answer; - reads it from stdin.", flag_values=values)
    flags.DEFINE_string("system", None, "System prompt, with --chat.", flag_values=values)
    flags.DEFINE_integer("max_new_tokens", 256, "Tokens to write at most.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("max_length", 4096, "Tokens of prompt and answer together.", flag_values=values,
                         lower_bound=2)  # fmt: skip
    flags.DEFINE_float("temperature", 0.0, "0: always the most probable token.", flag_values=values, lower_bound=0.0)
    flags.DEFINE_float("top_p", 1.0, "Draw from the smallest set of tokens with this much probability.",
                       flag_values=values, lower_bound=1e-6, upper_bound=1.0)  # fmt: skip
    flags.DEFINE_integer("top_k", 0, "Draw from this many tokens; 0: all.", flag_values=values, lower_bound=0,
                         upper_bound=(1 << 31) - 1)  # fmt: skip
    flags.DEFINE_integer("seed", 0, "Of the random draws.", flag_values=values, lower_bound=0)
    mesh = parsing.define_mesh(values)
    parsing.parse(values, "generate", __doc__, argv)
    if (values.prompt is None) == (values.chat is None):
        raise UserError("give either --prompt=TEXT or --chat=TEXT")
    if values.system is not None and values.chat is None:
        raise UserError("--system goes with --chat")
    if not values.temperature:
        parsing.refuse_given(values, ["top_p", "top_k"], "nothing is drawn without --temperature")
    _generate(values, mesh())
    return 0


def _generate(values: flags.FlagValues, mesh: MeshConfig | None) -> None:
    from qcn_jax.chat.template_encoder import encoder_of
    from qcn_jax.chat.tokenizer import IncrementalDecoder
    from qcn_jax.inference.checkpoint import load_engine
    from qcn_jax.inference.sampling import Sampling

    loaded = load_engine(values.checkpoint, slots=1, max_length=values.max_length, max_new_tokens=PIECE, mesh=mesh)
    engine = loaded.engine
    if values.chat is not None:
        messages = [{"role": "system", "content": values.system}] if values.system is not None else []
        messages.append({"role": "user", "content": _text(values.chat)})
        tokens = encoder_of(values.checkpoint, loaded.tokenizer).encode_prompt(messages)
    else:
        tokens = loaded.tokenizer.encode(_text(values.prompt))
    if not 1 <= len(tokens) < engine.max_length:
        flag = "--prompt" if values.chat is None else "--chat"
        raise UserError(f"{flag}: has {len(tokens)} tokens; allowed: 1 to {engine.max_length - 1} (see --max_length)")
    engine.extend({0: tokens})
    decoder, left = IncrementalDecoder(loaded.tokenizer), min(values.max_new_tokens, engine.max_length - len(tokens))
    sampling = Sampling(values.temperature, values.top_p, values.top_k)
    while left > 0:
        piece = engine.generate([0], seeds=[values.seed], sampling=sampling, max_new_tokens=min(left, PIECE))[0]
        left -= len(piece.tokens)
        text = piece.tokens[:-1] if piece.finish == "stop" else piece.tokens
        print("".join(decoder.push(token) for token in text), end="", flush=True)
        if piece.finish == "stop":
            break
    print(decoder.finish(), flush=True)


def _text(argument: str) -> str:
    return sys.stdin.read() if argument == "-" else argument
