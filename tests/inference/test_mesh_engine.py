"""The engine over eight devices, in every mesh form: the tokens and log-probabilities of one device."""

import json

import pytest

# name: MeshConfig over eight devices. Eight experts lie on as many devices as hold no parts of the same sequences.
FORMS = {
    "fsdp and expert, gather": {"fsdp": 4, "expert": 2, "dispatch": "gather"},
    "fsdp, expert and context, ragged": {"fsdp": 2, "expert": 2, "context": 2},
    "data, expert and tensor, capacity": {
        "data": 2, "fsdp": 1, "expert": 2, "tensor": 2, "dispatch": "capacity", "dispatch_buffer": 0.0},
}
SLOTS = (0, 5, 9, 15)


def child() -> None:
    """Prints, per form, what every turn of every slot gave, the engine's parts, and decode's largest collective."""
    import dataclasses

    import jax

    from qcn_jax.compile import hlo
    from qcn_jax.config import MeshConfig
    from qcn_jax.inference.engine import Engine
    from qcn_jax.inference.sampling import Sampling
    from qcn_jax.pipeline.train.layout import param_shardings
    from qcn_jax.sharding.mesh import make_parallel
    from tests.inference.test_engine import CONFIG, make_params, prompt

    config = dataclasses.replace(CONFIG, num_experts=8, vocab_size=64)
    params = make_params(config)
    draws = [Sampling(0.0), Sampling(1.0), Sampling(1.0, top_p=0.9), Sampling(0.7, top_k=8), *[Sampling(1.0)] * 2]

    def play(parallel, **blocks):
        laid_out = params if parallel is None else jax.device_put(params, param_shardings(config, parallel))
        engine = Engine(config, laid_out, slots=16, max_length=96, max_new_tokens=6, stop_ids=(7,), prefill_rows=8,
                        prefill_chunk=16, parallel=parallel, snapshots=8, **blocks)
        turns, use = [], [*SLOTS, 4, 8]
        for around in range(2):  # the second time in slots that were used before
            engine.reset(use)
            engine.extend({slot: prompt(i + around, (1, 20, 17, 40)[i]) for i, slot in enumerate(SLOTS)}
                          | {8: prompt(30, 60)})
            engine.fork({5: [4]})  # of one part, however many there are
            saved = {}
            for slot in (0, 9):
                saved[slot] = sum(engine.part(slot) == engine.part(other) for other in saved)
            engine.save(saved)
            for turn in range(2):
                made = engine.generate(use, seeds=range(6), sampling=draws, enough=turn)
                turns += [(one.tokens, one.logprobs.tolist(), one.drawn_logprobs.tolist(), one.finish) for one in made]
                engine.extend({slot: prompt(50 + slot, 5 + slot % 3) for slot in use})
            engine.restore(saved)
            made = engine.generate(list(saved), seeds=[7, 8], sampling=Sampling(1.0))
            turns += [(one.tokens, one.logprobs.tolist(), one.drawn_logprobs.tolist(), one.finish) for one in made]
        return engine, turns

    results = {"one": play(None)[1]}
    for name, mesh in FORMS.items():
        # In all but the first: a part has blocks for one sequence and a copy, and decodes one at a time.
        parts = 4 if "tensor" in name else 8
        few = {} if "gather" in name else {"block_size": 16, "num_blocks": 7 * parts, "max_num_seqs": 1}
        engine, turns = play(make_parallel(MeshConfig(**mesh)), **few)
        lanes, width = (1, 6) if few else (16 // parts, 1)
        decode = engine.programs.function("decode", 96).lower(
            *engine.programs.abstract("decode", lanes, width)).compile()
        moved = hlo.summarize(decode.as_text()).largest_collectives
        keys = 16 * CONFIG.num_key_value_heads * 96 * CONFIG.head_dim * 4 // engine.parts
        results[name] = {"turns": turns, "parts": engine.parts, "moved": max(moved)[0], "keys": keys,
                         "counts": engine.counts()}
    print(json.dumps(results))


@pytest.fixture(scope="module", name="results")
def _results(run_with_devices) -> dict:
    return json.loads(run_with_devices(child, 8).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_equals_one_device(results, form):
    assert (results[form]["counts"].get("swapped_in", 0) > 0) == ("gather" not in form)
    assert results[form]["parts"] == (4 if "tensor" in form else 8)
    assert len(results[form]["turns"]) == len(results["one"]) == 28
    for ours, right in zip(results[form]["turns"], results["one"]):
        assert ours[0] == right[0] and ours[3] == right[3]
        assert ours[1] == pytest.approx(right[1], abs=1e-4) and ours[2] == pytest.approx(right[2], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_no_cache_travels_between_devices(results, form):
    """What decoding moves at a time is less than the keys of one layer that a device holds."""
    assert 0 < results[form]["moved"] < results[form]["keys"]
