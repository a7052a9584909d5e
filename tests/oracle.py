"""A transformers model of this family in float64, and how near to it float32 must come.

See tests.rounding. What is changed here are all weights, and all that the reference's modules hand on in both directions.

Where an expert that is not chosen comes as near as that to one that is, rounding decides between them. Rows with such a
tie are drawn again, so that in all others every program must choose the same experts.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_next import modeling_qwen3_next

from tests import rounding
from tests.rounding import ALLOWED, EPS, RUNS

MOST_DRAWS = 8

REFERENCES = (modeling_qwen3_next, modeling_qwen3_5, modeling_qwen3_5_moe)
_ROUTERS = (modeling_qwen3_next.Qwen3NextTopKRouter, modeling_qwen3_5_moe.Qwen3_5MoeTopKRouter)
_recurrent = modeling_qwen3_next.torch_recurrent_gated_delta_rule


class _Float64Torch:
    """The module torch with float64 under the name of float32."""

    def __getattr__(self, name):
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


@contextlib.contextmanager
def _patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    before = [getattr(owner, name) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(changes, before):
            setattr(owner, name, value)


def _rule(*arguments, chunk_size=None, **named):
    return _recurrent(*arguments, **named)


def recurrent():
    """Within it transformers computes its delta rule token by token, which is the definition.

    Its chunked form takes differences of large cumulative decays, an error of its own that no conditioning explains: in
    float32 it reaches 1e-3 on these logits.
    """
    return _patched(*((code, "torch_chunk_gated_delta_rule", _rule) for code in REFERENCES))


def float64():
    """Within it transformers computes in float64 also where its code says float32."""
    return _patched(*((code, "torch", _Float64Torch()) for code in REFERENCES),
                    (torch.Tensor, "float", torch.Tensor.double))


@dataclasses.dataclass
class Result:
    """What a model makes of a batch.

    Attributes:
      logits: [B, T, V].
      loss: mean cross entropy of the tokens that follow one that is no padding.
      balance: the balance loss; 0 without experts.
      counts: [L, E], tokens that chose each expert of each layer; None without.
      routers: [L, B, T, E], the routers' logits; None without, and for our model, which does not show them.
      gradients: of loss + coefficient * balance, by transformers' names of parameters; none if not asked for.
    """

    logits: np.ndarray
    loss: float
    balance: float
    counts: np.ndarray | None
    routers: np.ndarray | None = None
    gradients: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def evaluate(model, tokens: np.ndarray, mask: np.ndarray | None = None, gradients: bool = True) -> Result:
    """The Result of a transformers model for tokens [B, T]; `mask` [B, T] is 0 at padding."""
    ids, mask = (None if x is None else torch.from_numpy(np.asarray(x, np.int64)) for x in (tokens, mask))
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask > 0
    sparse = hasattr(model.config, "num_experts")
    with torch.set_grad_enabled(gradients):
        out = model(input_ids=ids, attention_mask=mask, **({"output_router_logits": True} if sparse else {}))
        loss = -torch.log_softmax(out.logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[real[:, :-1]].mean()
        if gradients:
            model.zero_grad()
            (loss + model.config.router_aux_loss_coef * out.aux_loss if sparse else loss).backward()
    found = {name: leaf.grad.numpy().copy() for name, leaf in model.named_parameters()} if gradients else {}
    if not sparse:
        return Result(out.logits.detach().numpy(), loss.item(), 0.0, None, None, found)
    routers = np.stack([logits.detach().numpy() for logits in out.router_logits])
    chosen = np.argsort(-routers, axis=-1)[..., : model.config.num_experts_per_tok]
    counts = [np.bincount(layer[real.numpy().reshape(-1)].reshape(-1), minlength=routers.shape[-1]) for layer in chosen]
    routers = routers.reshape(len(routers), *ids.shape, -1)
    return Result(out.logits.detach().numpy(), loss.item(), out.aux_loss.item(), np.stack(counts), routers, found)


@dataclasses.dataclass
class Judge:
    """The exact Result, and those of models that were changed by roundings of float32."""

    exact: Result
    moved: list[Result]
    real: np.ndarray  # [B, T]: not padding
    choices: int

    def tied_rows(self) -> np.ndarray:
        """[B]: whether rounding may choose another expert for one of the row's tokens, in any layer."""
        routers = self.exact.routers
        if routers is None:
            return np.zeros(len(self.real), bool)
        order = np.argsort(-routers, axis=-1)[..., self.choices - 1 : self.choices + 1]
        gap = lambda routers: -np.diff(np.take_along_axis(routers, order, axis=-1))[..., 0]
        noise = np.max([np.abs(gap(one.routers) - gap(routers)) for one in self.moved], axis=0)
        noise = np.maximum(noise, EPS * np.abs(routers).max(axis=-1))
        return np.any((gap(routers) < ALLOWED * noise) & self.real, axis=(0, 2))

    def errors(self, found: Result, eps: float = EPS) -> dict[str, float]:
        """Distances of `found` from the exact Result, in units of what changes by `eps` make: at most ALLOWED is right.

        Of logits the largest of any token.
        """
        exact = self.exact
        assert np.array_equal(found.counts, exact.counts), "experts were chosen that are not the nearest"

        def of(value: Callable[[Result], Any], axis: int | None = None) -> float:
            moved = [value(one) for one in self.moved]
            return rounding.ratio(np.asarray(value(found)), value(exact), moved, axis, eps)

        return {
            "logits": of(lambda one: one.logits[self.real], -1), "loss": of(lambda one: one.loss),
            "balance": of(lambda one: one.balance),
            **{name: of(lambda one, name=name: one.gradients[name]) for name in found.gradients}}


class Oracle:
    """The float64 twin of a transformers model with the same weights."""

    def __init__(self, model) -> None:
        self.model = copy.deepcopy(model).double()
        with float64():  # the frequencies are rounded in float32
            self.model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
        if hasattr(model.config, "num_experts"):
            self.model.set_experts_implementation("eager")  # torch's grouped product knows no float64

    def judge(self, tokens: np.ndarray, mask: np.ndarray | None = None, gradients: bool = True) -> Judge:
        """What is right for tokens [B, T], and how near to it float32 must come."""
        with float64(), recurrent():
            exact = evaluate(self.model, tokens, mask, gradients)
        moved = [self._moved(run, tokens, mask, gradients) for run in range(RUNS)]
        real = np.ones(tokens.shape, bool) if mask is None else mask > 0
        return Judge(exact, moved, real, getattr(self.model.config, "num_experts_per_tok", 0))

    def chunked(self, tokens: np.ndarray) -> Result:
        """The Result without gradients by the chunked rule, as transformers has it."""
        with float64():
            return evaluate(self.model, tokens, gradients=False)

    def untied(self, draw: Callable[[], np.ndarray], **options: Any) -> tuple[np.ndarray, Judge]:
        """Tokens [B, T] that `draw` gives, and their Judge; rows with a tie are drawn again.

        Raises:
          AssertionError: there are still some after MOST_DRAWS draws.
        """
        tokens = draw()
        for _ in range(MOST_DRAWS):
            judge = self.judge(tokens, **options)
            tied = judge.tied_rows()
            if not tied.any():
                return tokens, judge
            tokens = np.where(tied[:, None], draw(), tokens)
        raise AssertionError(f"rows with a router's tie in each of {MOST_DRAWS} draws")

    def _moved(self, run: int, tokens: np.ndarray, mask: np.ndarray | None, gradients: bool) -> Result:
        noise = torch.Generator().manual_seed(run)
        changed = lambda x: x * (1 + EPS * (2 * torch.rand(x.shape, generator=noise, dtype=torch.float64) - 1))

        def touch(value):
            if isinstance(value, tuple):
                return tuple(map(touch, value))
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                return value
            value = changed(value)
            if value.requires_grad:
                value.register_hook(changed)
            return value

        def route(router, hidden):
            # Every operation is changed: of one expert chosen the weight is p / p, whose gradient is zero, and a number
            # after rounding.
            logits = touch(torch.nn.functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight))
            weights, chosen = torch.topk(touch(torch.softmax(logits, -1)), router.top_k, dim=-1)
            if getattr(router, "norm_topk_prob", True):
                weights = touch(weights) / touch(weights.sum(-1, keepdim=True))
            return logits, weights, chosen

        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for leaf in (*model.parameters(), model.model.rotary_emb.inv_freq):
                leaf.copy_(changed(leaf))
        for module in model.modules():
            if module is not model and module is not model.model:
                module.register_forward_hook(lambda module, inputs, output: touch(output))
        rule = lambda *arguments, **named: touch(_rule(*arguments, **named))
        with float64(), _patched(*((code, "torch_chunk_gated_delta_rule", rule) for code in REFERENCES),
                                 *((router, "forward", route) for router in _ROUTERS)):
            return evaluate(model, tokens, mask, gradients)
