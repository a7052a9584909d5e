"""What the engine, and the scheduler above it, say of tokens that they draw, after all that can happen to a slot."""

import queue
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qcn_jax.config import ModelConfig
from qcn_jax.errors import UserError
from qcn_jax.inference.conformance_scores import Drawn, Scored
from qcn_jax.inference.engine import Engine
from qcn_jax.inference.sampling import GREEDY, History, Sampling
from qcn_jax.inference.scheduler import Piece, Request, Scheduler
from qcn_jax.sharding.parallel import Parallel

BLOCK = 16  # tokens of a block, where there are some
NEW = 8  # tokens that the engine generates at a time
PLAIN = Sampling(1.0)
DRAWS = (Sampling(0.7), GREEDY, Sampling(1.3, top_k=2), Sampling(0.9, top_p=0.6), Sampling(1.1, min_p=0.2), PLAIN)
ADJUSTED = (Sampling(0.8, frequency_penalty=0.9, presence_penalty=0.6), Sampling(1.2, repetition_penalty=1.4),
            Sampling(0.0, frequency_penalty=2.0), Sampling(1.0, logit_bias=((1, 4.0), (2, -3.0))))  # fmt: skip
HIDDEN = 8  # every so manyth id of the vocabulary is one that must not be drawn
LEAST = 8  # tokens that the scheduler takes up
LOOK = 5.0  # seconds between two looks at whether the scheduler still runs
UNLIKE = 8  # at the end of prompts that begin alike

Array = np.ndarray


class Played:
    """An engine with more slots than sequences, and what happens to them; each method is a form of its own."""

    def __init__(self, config: ModelConfig, params: Any, sequences: Sequence[list[int]], length: int,
                 parallel: Parallel | None = None, several_shapes: bool = False, unrolled: bool | None = None,
                 key_limit: int | None = None, few_blocks: bool = False) -> None:
        """Allocates an engine.

        Args:
          config, params, parallel, several_shapes, unrolled, key_limit: see Engine.
          sequences: of up to `length` - 2 * NEW - 4 tokens.
          length: tokens of a slot.
          few_blocks: keys and values in blocks, that do for two sequences of `length` a device.
        """
        parts = 1 if parallel is None else parallel.mesh.size
        blocks = {"block_size": BLOCK, "num_blocks": 2 * parts * -(-length // BLOCK), "max_num_seqs": 2 * parts}
        self._params, self._sequences, self._length = params, [list(tokens) for tokens in sequences], length
        self._drawable = np.arange(config.vocab_size) % HIDDEN != HIDDEN - 1
        self._engine = Engine(config, params, slots=2 * len(sequences) + 2, max_length=length, max_new_tokens=NEW,
                              prefill_rows=4, prefill_chunk=16, several_shapes=several_shapes, key_limit=key_limit,
                              snapshots=len(sequences) + 1, with_routes=bool(config.num_experts), parallel=parallel,
                              unrolled=unrolled, drawable=self._drawable, **(blocks if few_blocks else {}))
        self._slots = range(min(len(sequences), self._engine.slots))

    def _begin(self) -> dict[int, list[int]]:
        """The sequences in slots that were empty."""
        held = {slot: self._sequences[slot] for slot in self._slots}
        self._engine.reset(range(self._engine.slots))
        self._engine.extend(held)
        return held

    def _draw(self, held: dict[int, list[int]], seed: int, most: int = NEW, params: Any = None,
              draws: Sequence[Sampling] = (PLAIN,)) -> list[Scored]:
        """Generates for the slots of `held`, to which the tokens are added; the next is drawn as the next of `draws`.

        Some get a token or two less than `most`, so that they have ended while others go on.

        `params`: the weights that the engine has, where they are not the model's.
        """
        slots, found, engine = sorted(held), [], self._engine
        chosen = [draws[number % len(draws)] for number in range(len(slots))]
        histories = [History(held[slot], ()) for slot in slots] if any(draw.adjusts for draw in chosen) else None
        seeds = [1000 * seed + 7 * slot for slot in slots]
        limits = [most - number % 3 for number in range(len(slots))]
        made = engine.generate(slots, seeds=seeds, sampling=chosen, max_new_tokens=limits, histories=histories)
        for slot, one, draw, stream in zip(slots, made, chosen, seeds):
            before, held[slot] = len(held[slot]), held[slot] + one.tokens
            drawn = Drawn(draw, stream, one.drawn_logprobs, self._drawable, before)
            routes = engine.routes(slot) if engine.with_routes else None
            found.append(Scored(held[slot], before, one.logprobs, routes, params, drawn))
        return found

    def _copied(self, held: dict[int, list[int]]) -> dict[int, list[int]]:
        """Copies of slots, each in a slot of its own as far as there are any."""
        engine = self._engine
        free = [slot for slot in range(engine.slots) if slot not in held]
        pairs = [(slot, copy) for slot, copy in zip(held, free) if engine.part(slot) == engine.part(copy)]
        engine.fork({slot: [copy] for slot, copy in pairs})
        return {copy: held[slot] for slot, copy in pairs}

    def turns(self) -> list[Scored]:
        """Answers, observations of unlike lengths, answers."""
        held = self._begin()
        found = self._draw(held, 1)
        added = {slot: self._sequences[0][: slot % 3] or [1] for slot in held}
        self._engine.extend(added)
        held = {slot: tokens + added[slot] for slot, tokens in held.items()}
        return found + self._draw(held, 2)

    def copies(self) -> list[Scored]:
        """Two samples of a prompt, of which one was prefilled and the other goes on alone first; two of each answer."""
        held = self._begin()
        copies = self._copied(held)
        found = self._draw(copies, 3) if copies else []
        found += self._draw(held, 4, most=NEW // 2)
        copies = self._copied(held)
        return found + self._draw(held, 5) + (self._draw(copies, 6) if copies else [])

    def saved_states(self) -> list[Scored]:
        """Slots, and copies of them, cut back to states that were saved behind their prompts."""
        held, engine, entries = self._begin(), self._engine, {}
        for slot in held:
            entry = sum(engine.part(slot) == engine.part(other) for other in entries)
            if entry < engine.snapshots:
                entries[slot] = entry
        engine.save(entries)
        after = dict(held)
        self._draw(after, 5)
        copies = self._copied(after)
        origins = {copy: next(slot for slot in after if after[slot] is tokens) for copy, tokens in copies.items()}
        back = {copy: origin for copy, origin in origins.items() if origin in entries}
        engine.restore(entries | {copy: entries[origin] for copy, origin in back.items()})
        held = {slot: held[slot] for slot in entries} | {copy: held[origin] for copy, origin in back.items()}
        return self._draw(held, 6)

    def used_slots(self) -> list[Scored]:
        """Slots that held other, longer sequences before, of weights that were not numbers."""
        engine, longest = self._engine, max(self._sequences, key=len)
        engine.params = jax.tree.map(lambda leaf: leaf * jnp.asarray(jnp.nan, leaf.dtype), self._params)
        engine.reset(range(engine.slots))
        engine.extend({slot: longest for slot in range(engine.slots)})
        engine.params = self._params
        return self._draw(self._begin(), 7)

    def other_weights(self) -> list[Scored]:
        """Other weights in the same slots, and the first ones given again."""
        other = jax.tree.map(lambda leaf: leaf * jnp.asarray(0.5, leaf.dtype), self._params)
        self._engine.params = other
        found = self._draw(self._begin(), 8, params=jax.device_get(other))
        self._engine.params = self._params
        return found + self._draw(self._begin(), 9)

    def sampling(self) -> list[Scored]:
        """Temperatures, filters, penalties and biases, for two turns."""
        held = self._begin()
        found = self._draw(held, 10, draws=DRAWS) + self._draw(held, 11, draws=DRAWS[1:], most=NEW // 2)
        return found + self._draw(self._begin(), 12, draws=ADJUSTED)

    def events(self) -> list[Scored]:
        """Used slots, copies and saved states."""
        return self.used_slots() + self.copies() + self.saved_states()

    def served(self) -> list[Scored]:
        """Requests whose prompts begin with what slots hold, by a scheduler."""
        rng, size = np.random.default_rng(0), self._length // 4
        drawable = np.flatnonzero(self._drawable)
        some = lambda count: rng.choice(drawable, count).tolist()
        scheduler, shared = Scheduler(self._engine, least=LEAST), some(size)
        found: list[Scored] = []

        def ask(*prompts: list[int]) -> list[list[int]]:
            """The whole sequences, once all are there."""
            done: queue.SimpleQueue[tuple[Request, str]] = queue.SimpleQueue()
            scores: list[list[float]] = [[] for _ in prompts]
            requests = []
            for number, prompt in enumerate(prompts):

                def emit(piece: Piece, number: int = number) -> None:
                    scores[number].extend(piece.logprobs)
                    if piece.finish is not None:
                        done.put((requests[number], piece.finish))

                requests.append(Request(prompt, PLAIN, NEW + 2, 100 + len(found) + number, emit))
            scheduler.submit(requests)
            for _ in prompts:
                request, finish = _first(done, scheduler)
                if finish != "length":
                    raise UserError(f"a request ended with {finish}")
            for request, logprobs in zip(requests, scores):
                drawn = Drawn(PLAIN, request.seed, None, self._drawable, len(request.tokens))
                found.append(Scored(request.held, len(request.tokens), np.array(logprobs), request.routes, None, drawn))
            return [request.held for request in requests]

        try:
            first = shared + some(UNLIKE)
            answer, _ = ask(first, first)  # two samples
            ask(answer + some(LEAST // 2), first)  # the next turn, and a third sample
            ask(first[:-1] + some(1), shared + some(UNLIKE))  # they part at the last token, and behind what is shared
            ask(shared + some(UNLIKE))
            ask(*(some(size) for _ in range(self._engine.snapshots * self._engine.parts + 1)))  # all states are others'
            ask(first + some(2), answer + some(2))
        finally:
            scheduler.close()
        return found


def _first(done: queue.SimpleQueue, scheduler: Scheduler) -> Any:
    """The next of `done`; raises UserError where nobody is left who could add one."""
    while True:
        try:
            return done.get(timeout=LOOK)
        except queue.Empty:
            if not scheduler.alive:
                raise UserError("the scheduler's thread ended") from None
