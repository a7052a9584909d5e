"""Fifty faults for benchmarks/mutants.py: what peers' hybrid models and engines got wrong, as one change of text each."""

import dataclasses

CACHE = "inference/cache.py"
ENGINE, SLOTS, LANES, PROGRAMS, PREFIXES, SCHEDULER, SAMPLING = (
    f"inference/{name}.py" for name in ("engine", "slots", "lanes", "programs", "prefixes", "scheduler", "sampling"))
ATTENTION, DELTA_NET, RULE, FLASH = (
    f"layers/{name}.py" for name in ("attention", "gated_delta_net", "delta_rule", "flash"))
MODEL, BLOCK = "model.py", "moe/block.py"
MIXER, CACHED = "layers/kernels/mixer.py", "layers/kernels/cached_attention.py"


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
      name: what is wrong.
      file: in the package.
      old, new: its text, which occurs there once, and what it becomes.
      form: of the conformance kit, which runs first as the one most likely to find it.
      kind: the public fault or trap of hybrid models that it stands for.
    """

    name: str
    file: str
    old: str
    new: str
    form: str
    kind: str


PADDING, LEAK, WINDOW, POSITIONS = "padding corrupts a state", "documents leak", "convolution's window", "positions"
STATE, FORK, PREFIX, STALE = "prefill and decoding part ways", "forks and saved states", "wrong prefix", "stale slot"
KV, ROUTES, DRAWS, KERNEL = "keys and values", "routes", "sampling", "kernels"

MUTANTS = (
    # States of DeltaNet layers.
    Mutant("beta is not zero at padding", DELTA_NET, "jnp.where(real, beta, 0.0)", "beta", "pieces", PADDING),
    Mutant("g is not zero at padding", DELTA_NET, "jnp.where(real, g, 0.0)", "g", "pieces", PADDING),
    Mutant("one token of padding counts as real", MODEL, "valid = index < lengths[:, None]",
           "valid = index <= lengths[:, None]", "pieces", PADDING),
    Mutant("sequences grow by padding too", MODEL,
           "cache = Cache(cache.length + (tokens.shape[1] if lengths is None else lengths), layers)",
           "cache = Cache(cache.length + tokens.shape[1], layers)", "pieces", PADDING),
    Mutant("the window is one token short", DELTA_NET, "index = lengths[:, None] + jnp.arange(size",
           "index = jnp.maximum(lengths[:, None] - 1, 0) + jnp.arange(size", "pieces", WINDOW),
    Mutant("the window ends with padding", DELTA_NET, "    if lengths is None:\n        return padded",
           "    if True:\n        return padded", "pieces", WINDOW),
    Mutant("every piece begins with an empty window", DELTA_NET,
           "causal_conv(qkv, taps, window, context.segment_ids)",
           "causal_conv(qkv, taps, None, context.segment_ids)", "pieces", WINDOW),
    Mutant("a state is kept in bfloat16", DELTA_NET,
           'cache = {"conv": next_window(qkv, window, context.lengths), "state": state}',
           'cache = {"conv": next_window(qkv, window, context.lengths), '
           '"state": state.astype(jnp.bfloat16).astype(state.dtype)}', "pieces", STATE),
    Mutant("decoding does not write the state back", RULE,
           "        state, o = step(state, tuple(x[:, 0] for x in tokens))",
           "        _, o = step(state, tuple(x[:, 0] for x in tokens))", "copies", STATE),
    # Documents of a row.
    Mutant("the convolution looks across documents", DELTA_NET,
           "        if segment_ids is not None:\n            same = jnp.pad(",
           "        if False:\n            same = jnp.pad(", "packed rows", LEAK),
    Mutant("documents are told apart by their ids alone", MODEL,
           "sharded_document_ids(segment_ids, self.parallel) if spread else document_ids(segment_ids)",
           "sharded_document_ids(segment_ids, self.parallel) if spread else segment_ids", "packed rows", LEAK),
    Mutant("a document reads the state of the one before", RULE,
           "from_state, to_state, carry = from_state * head, to_state * tail, carry * keep",
           "to_state, carry = to_state * tail, carry * keep", "packed rows", LEAK),
    Mutant("attention sees other documents", FLASH,
           "mask = mask & (segment_ids[:, :end, None] == segment_ids[:, None, begin:end])",
           "mask = mask & (segment_ids[:, :end, None] == segment_ids[:, :end, None])", "packed rows", LEAK),
    Mutant("padding on the left is a token like others", FLASH,
           "mask = mask & (segment_ids[:, :end, None] == segment_ids[:, None, begin:end])",
           "mask = mask & ((segment_ids[:, :end, None] == segment_ids[:, None, begin:end])"
           " | (segment_ids[:, :end, None] == 0))", "left padding", PADDING),
    # Positions.
    Mutant("positions are one short behind a cache", MODEL,
           "positions = index if start is None else index + start[:, None]",
           "positions = index if start is None else index + jnp.maximum(start[:, None] - 1, 0)", "pieces", POSITIONS),
    # Attention with a cache.
    Mutant("keys are not normed with a cache", ATTENTION, 'k = apply_rotary(norm("k_norm")(k),',
           'k = apply_rotary(norm("k_norm")(k) if cache is None else k,', "pieces", KV),
    Mutant("decoding drops the output's gate", ATTENTION, "y = y * jax.nn.sigmoid(gate)",
           "y = y * jax.nn.sigmoid(gate) if length > 1 else y", "copies", STATE),
    Mutant("a token of a piece sees the next", ATTENTION, "key[:, :, None] <= query[:, None])", "key[:, :, None] <= query[:, None] + 1)", "pieces", KV),
    Mutant("padding overwrites the first key", ATTENTION, "jnp.where(context.valid, query, capacity)",
           "jnp.where(context.valid, query, 0)", "pieces", PADDING),
    Mutant("keys are written to other sequences' rows", ATTENTION, "if context.tables is None else context.tables\n",
           "if True else context.tables\n", "turns", KV),
    Mutant("decoding reads what the prompt needed", ENGINE,
           "max((end for _, end in wave.values()), default=0)", "max((start for start, _ in wave.values()), default=0)",
           "growing limits", KV),
    # Slots: prefill, forks, saved states, use again.
    Mutant("the next token is that of before the last piece", PROGRAMS,
           'logits.at[indices].set(rows, mode="drop")', "logits", "turns", STATE),
    Mutant("the next token is that of padding", PROGRAMS, "jnp.maximum(lengths - 1, 0)[:, None, None]",
           "jnp.full_like(lengths, tokens.shape[1] - 1)[:, None, None]", "turns", PADDING),
    Mutant("slots that do not generate take a token in", PROGRAMS, "lengths=active.astype(jnp.int32), key_limit",
           "lengths=jnp.ones_like(limits), key_limit", "copies", STATE),
    Mutant("a fork leaves windows and states behind", PROGRAMS,
           "(cache_put(held, target, cache_take(held, nearest)),",
           "(held.replace(length=cache_put(held, target, cache_take(held, nearest)).length),", "copies", FORK),
    Mutant("a fork leaves the convolution's window behind", CACHE, "take = lambda axis, x: jnp.take(x, indices, axis=axis)",
           "take = lambda axis, x: x if x.ndim == 4 and x.shape[1] == 3 and len(x) == len(indices) "
           "else jnp.take(x, indices, axis=axis)", "copies", FORK),
    Mutant("a prefix cuts keys and values, not the recurrent state", PROGRAMS,
           "return (cache_put(held, slots, cache_take(pool, entries)),",
           "return (held.replace(length=cache_put(held, slots, cache_take(pool, entries)).length),", "saved states",
           PREFIX),
    Mutant("a saved state comes without its logits", PROGRAMS, 'kept.at[entries].set(logits[slots], mode="drop")',
           "kept", "saved states", FORK),
    Mutant("a slot keeps its length when it is cut back", PROGRAMS, "return with_states(cache, held), logits\n\n    def _sample(",
           "return with_states(cache, held.replace(length=cache.length)), logits\n\n    def _sample(", "saved states", FORK),
    Mutant("a slot keeps the state of whom it held before", PROGRAMS,
           "return cache_reset(cache_take(held, nearest), fresh | (indices >= self._slots)), logits[nearest]",
           "return cache_take(held, nearest), logits[nearest]", "used slots", STALE),
    Mutant("a slot keeps the window of whom it held before", CACHE,
           "jnp.zeros((), x.dtype), x)", "x if x.ndim == 4 and x.shape[1] == 3 else jnp.zeros((), x.dtype), x)",
           "used slots", STALE),
    Mutant("a slot keeps another's keys, which are not numbers", ATTENTION,
           'jnp.where(held[:, None, :, None], _first(cache["v"], limit, context.tables), 0)',
           '_first(cache["v"], limit, context.tables)',
           "used slots", STALE),
    Mutant("the engine acts on with the weights that it had", ENGINE,
           'self._weights = self.programs.run("arrange", params)',
           'self._weights = self.__dict__.get("_weights") or self.programs.run("arrange", params)', "other weights",
           STALE),
    Mutant("a slot is not cleared after new weights", SLOTS, "self._lengths[slot], self._fresh[slot] = 0, True",
           "self._lengths[slot], self._fresh[slot] = 0, self._fresh[slot]", "other weights", STALE),
    # Prefixes of the server.
    Mutant("a prefix is taken up at any token", PREFIXES, "whole = common == len(held.tokens) and slot in free",
           "whole = slot in free", "served", PREFIX),
    Mutant("a prefix is one token longer than what is shared", PREFIXES, "return int(unlike[0]) if len(unlike)",
           "return int(unlike[0]) + 1 if len(unlike)", "served", PREFIX),
    Mutant("a state that was given to others is still taken up", PREFIXES, "del self._held[owner].saved[at]",
           "pass", "served", PREFIX),
    Mutant("a prefix copied from another slot keeps that slot's state", SCHEDULER,
           "for one in taken if one.hit.entry is not None}",
           "for one in taken if one.hit.entry is not None and one.hit.source == one.slot}", "served", PREFIX),
    Mutant("a slot's answer is not part of what it holds", SCHEDULER,
           "                self._prefixes.extended(slot, request.held)",
           "                self._prefixes.extended(slot, request.tokens)", "served", PREFIX),
    # Routes.
    Mutant("routes are those of the token before", PROGRAMS, "return jnp.moveaxis(routes, 0, 2)",
           "return jnp.roll(jnp.moveaxis(routes, 0, 2), 1, axis=1)", "turns", ROUTES),
    Mutant("a fork shares its routes with its origin", SLOTS, "list(self._routes[origin]), list(self._tokens[origin])",
           "self._routes[origin], list(self._tokens[origin])", "copies", ROUTES),
    Mutant("decoding drops the shared expert's gate", BLOCK, "(routed + jax.nn.sigmoid(share) * shared)",
           "(routed + (jax.nn.sigmoid(share) if x.shape[1] > 1 else 1.0) * shared)", "copies", ROUTES),
    # Sampling.
    Mutant("a stream belongs to the slot", LANES, "turns[slot].seed & 0xFFFFFFFF", "slot", "sampling", DRAWS),
    Mutant("the model's log-probability is the tempered one", SAMPLING, "return tokens, of(own), of(drawn_by)",
           "return tokens, of(drawn_by), of(drawn_by)", "sampling", DRAWS),
    Mutant("the drawing log-probability is the untempered one", SAMPLING, "return tokens, of(own), of(drawn_by)",
           "return tokens, of(own), of(own)", "sampling", DRAWS),
    Mutant("ids that the tokenizer lacks are drawn", SAMPLING, "(lambda x: x) if drawable is None else",
           "(lambda x: x) if True else", "sampling", DRAWS),
    # Kernels, interpreted.
    Mutant("the kernel reads another sequence's row", CACHED,
           "tables_ref[b, jnp.minimum(first // length, count - 1)]", "b", "kernels", KERNEL),
    Mutant("the kernel's window lies at the wrong end", MIXER, "((0, 0), (missing, 0), (0, 0),",
           "((0, 0), (0, missing), (0, 0),", "kernels", KERNEL),
    Mutant("the kernel begins with an empty state", MIXER, "_joined(state.astype(jnp.float32))}",
           "_joined(jnp.zeros_like(state))}", "kernels", KERNEL),
    Mutant("the window behind the kernel ends with padding", DELTA_NET,
           'next_window(qkv, cache["conv"], context.lengths)', 'next_window(qkv, cache["conv"], None)', "kernels",
           KERNEL),
)
