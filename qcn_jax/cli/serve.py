"""Serves a checkpoint over HTTP as OpenAI's API does: chat with tools, plain completion, streaming.

  qcn serve --checkpoint=DIR --port=8000
  curl localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
       -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}'

Requests are batched as they come. SIGTERM and SIGINT end it.
"""

import asyncio
import functools
import socket
import sys
from collections.abc import Sequence

from absl import flags

from qcn_jax.cli import blocks, parsing
from qcn_jax.config import MeshConfig
from qcn_jax.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Parses flags, loads the checkpoint, serves until a signal comes."""
    values = flags.FlagValues()
    flags.DEFINE_string("checkpoint", None, "Folder with weights in Hugging Face form and a tokenizer.",
                        flag_values=values, required=True)  # fmt: skip
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.", flag_values=values)
    flags.DEFINE_integer("port", 8000, "Port to listen on; 0 takes a free one.", flag_values=values, lower_bound=0,
                         upper_bound=65535)  # fmt: skip
    flags.DEFINE_integer("slots", 8, "Sequences that are generated side by side.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("max_length", 4096, "Tokens of prompt and answer together.", flag_values=values,
                         lower_bound=2)  # fmt: skip
    flags.DEFINE_integer("snapshots", None, "States that are saved, so that prompts which begin alike are taken up "
                         "there; by default as many as --slots. 0: only where a whole sequence was held.",
                         flag_values=values, lower_bound=0)  # fmt: skip
    blocks.define(values, "slots")
    flags.DEFINE_string("name", None, "Name of the model for clients; by default the folder's.", flag_values=values)
    mesh = parsing.define_mesh(values)
    parsing.parse(values, "serve", __doc__, argv)
    listening = _listen(values.host, values.port)  # a port that is taken is said before weights are read
    try:
        _serve(values, listening, mesh())
    finally:
        listening.close()
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to host and port; raises UserError where that cannot be."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: cannot listen there: {error.strerror or error}") from error
    return listening


def _serve(values: flags.FlagValues, listening: socket.socket, mesh: MeshConfig | None) -> None:
    import uvicorn

    from qcn_jax.chat.template_encoder import encoder_of
    from qcn_jax.chat.templates import NATIVE
    from qcn_jax.inference.checkpoint import load_engine
    from qcn_jax.inference.scheduler import PIECE, Scheduler
    from qcn_jax.inference.server import Service

    loaded = load_engine(values.checkpoint, slots=values.slots, max_length=values.max_length, max_new_tokens=PIECE,
                         mesh=mesh, snapshots=values.slots if values.snapshots is None else values.snapshots,
                         **blocks.given(values))
    encoder = encoder_of(values.checkpoint, loaded.tokenizer)
    service = Service(
        Scheduler(loaded.engine), loaded.tokenizer, functools.partial(encoder.encode_prompt, trusted=False),
        loaded.stop_ids, values.name or loaded.name, encoder.calls or NATIVE)
    host, port = listening.getsockname()[:2]
    print(f"serving {service.name} on http://{host}:{port}/v1", file=sys.stderr, flush=True)
    server = uvicorn.Server(uvicorn.Config(service.app(), log_level="warning", timeout_graceful_shutdown=5))
    asyncio.run(server.serve(sockets=[listening]))
