"""Random events in an engine's life, of which every so manyth answer is held against a fresh forward pass.

Conversations are admitted, copied, cut back, cancelled and finished, take turns with observations between them, and
outlive new weights, in more slots than an engine decodes at a time and with fewer blocks than they fill, so that their
keys and values are shared, copied, swapped to host memory or given up and made again.
"""

import collections
import dataclasses
from typing import Any

import jax
import numpy as np

from qcn_jax.config import ModelConfig
from qcn_jax.inference.conformance import Reference
from qcn_jax.inference.conformance_scores import Drawn, Scored, apart
from qcn_jax.inference.engine import Engine
from qcn_jax.inference.sampling import Sampling

EVENTS = ("admit", "turn", "observe", "fork", "save", "restore", "cancel", "update", "finish")
OFTEN = (5, 8, 5, 3, 2, 2, 1, 0.3, 2)  # shares of them
PLAIN = Sampling(1.0)


@dataclasses.dataclass
class Counted:
    """What happened: events by name, answers that were checked, and the largest difference in nats."""

    events: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    checked: int = 0
    worst: float = 0.0


class Life:
    """An engine, and beside it what every slot must hold."""

    def __init__(self, engine: Engine, config: ModelConfig, params: Any, seed: int, check: float) -> None:
        """`engine` acts with `params`; `check`: the share of answers that a forward pass is made for."""
        self._engine, self._params, self._check = engine, params, check
        self._rng, self._held, self._saved = np.random.default_rng(seed), {}, {}
        self._reference = Reference(config, jax.device_get(params), engine.max_length)
        self._vocabulary, self._weights, self._scale = config.vocab_size, None, 0
        self.counted = Counted()

    def step(self) -> None:
        """One event, that can happen, drawn at random."""
        shares = np.array(OFTEN) * [self._can(event) for event in EVENTS]
        event = EVENTS[self._rng.choice(len(EVENTS), p=shares / shares.sum())]
        self.counted.events[event] += 1
        getattr(self, "_" + event)()

    def _can(self, event: str) -> bool:
        if event == "admit":
            return len(self._held) < self._engine.slots
        if event in ("fork", "save"):
            return bool(self._held) and (event == "fork" or self._engine.snapshots > 0)
        return bool(self._saved if event == "restore" else self._held)

    def _some(self, most: int) -> list[int]:
        """Some of the open slots."""
        count = int(self._rng.integers(1, min(most, len(self._held)) + 1))
        return sorted(self._rng.choice(sorted(self._held), count, replace=False).tolist())

    def _tokens(self, most: int) -> list[int]:
        return self._rng.integers(0, self._vocabulary, int(self._rng.integers(1, most + 1))).tolist()

    def _admit(self) -> None:
        """Mostly short prompts, and now and then one that fills half a slot."""
        free = [slot for slot in range(self._engine.slots) if slot not in self._held]
        chosen = free[: int(self._rng.integers(1, 4))]
        self._engine.reset(chosen)
        long = self._rng.random() < 0.1
        new = {slot: self._tokens(self._engine.max_length // (2 if long else 8)) for slot in chosen}
        self._engine.extend(new)
        self._held |= new

    def _turn(self) -> None:
        """Some slots generate, at times until all but one have ended."""
        slots = self._some(self._engine.slots)
        seed = int(self._rng.integers(1 << 30))
        enough = int(self._rng.integers(0, 2)) if len(slots) > 1 else 0
        made = self._engine.generate(slots, seeds=[seed + slot for slot in slots], sampling=PLAIN, enough=enough)
        for slot, one in zip(slots, made, strict=True):
            before = len(self._held[slot])
            self._held[slot] = self._held[slot] + one.tokens
            if self._engine.length(slot) != len(self._held[slot]):
                raise AssertionError(f"slot {slot}: {self._engine.length(slot)} tokens, not {len(self._held[slot])}")
            if one.tokens and self._rng.random() < self._check:
                routes = self._engine.routes(slot) if self._engine.with_routes else None
                drawn = Drawn(PLAIN, seed + slot, one.drawn_logprobs, None, before)
                self._compare(Scored(self._held[slot], before, one.logprobs, routes, None, drawn))

    def _compare(self, one: Scored) -> None:
        logits, _ = self._reference.of(one.tokens, one.routes, self._weights)
        self.counted.checked += 1
        self.counted.worst = max(self.counted.worst, apart(one, logits, 1e-3))

    def _observe(self) -> None:
        added = {slot: self._tokens(12) for slot in self._some(8)}
        added = {slot: tokens[: self._engine.max_length - len(self._held[slot])] for slot, tokens in added.items()}
        self._engine.extend(added)
        self._held = {slot: tokens + added.get(slot, []) for slot, tokens in self._held.items()}

    def _fork(self) -> None:
        """Copies into free slots of the same part, and over one that was open."""
        (source,) = self._some(1)
        part = self._engine.part(source)
        others = [slot for slot in range(self._engine.slots) if slot != source and self._engine.part(slot) == part]
        free = [slot for slot in others if slot not in self._held]
        targets = free[: int(self._rng.integers(1, 4))] or others[:1]
        self._engine.fork({source: targets})
        self._held |= {slot: self._held[source] for slot in targets}

    def _save(self) -> None:
        (slot,) = self._some(1)
        entry = int(self._rng.integers(self._engine.snapshots))
        self._engine.save({slot: entry})
        self._saved[self._engine.part(slot), entry] = self._held[slot]

    def _restore(self) -> None:
        """Cuts back a slot that begins with what was saved."""
        for (part, entry), tokens in sorted(self._saved.items()):
            for slot, held in self._held.items():
                if self._engine.part(slot) == part and held[: len(tokens)] == tokens:
                    self._engine.restore({slot: entry})
                    self._held[slot] = tokens
                    return

    def _cancel(self) -> None:
        """Half of all go at once."""
        self._drop(self._some(max(1, len(self._held) // 2)))

    def _finish(self) -> None:
        self._drop(self._some(2))

    def _drop(self, slots: list[int]) -> None:
        self._engine.reset(slots)
        for slot in slots:
            del self._held[slot]

    def _update(self) -> None:
        """Other weights, for which what stays open is prefilled anew."""
        self._scale += 1
        change = 1 + 0.05 * (self._scale % 3)
        new = jax.tree.map(lambda leaf: leaf * np.asarray(change, leaf.dtype), self._params)
        self._engine.params, self._weights = new, jax.device_get(new)
        self._engine.reset(sorted(self._held))
        self._engine.extend(self._held)
        self._saved = {}
