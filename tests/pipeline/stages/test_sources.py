"""Mid-training's stream from nothing but a user's files: which texts, in which forms, how much of each."""

import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from qcn_jax.chat.tokenizer import Tokenizer
from qcn_jax.config import MidtrainConfig, PhaseConfig, RunConfig, TextSource, TokenizerConfig, TrainConfig
from qcn_jax.config_phases import midtrain_phases
from qcn_jax.errors import UserError
from qcn_jax.pipeline.context import Shared, StageContext
from qcn_jax.pipeline.data import loader
from qcn_jax.pipeline.stages import midtrain

TRAIN = TrainConfig(steps=4, rows=2, sequence_length=128)


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    words = lambda: "".join(f"value_{rng.integers(99)} = call({rng.integers(99)})\n" for _ in range(rng.integers(4, 40)))
    rows = [{"body": words(), "repo_name": f"r{i // 8}", "path": f"{i}.py"} for i in range(64)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=7)
    chats = [{"text": words()} for _ in range(40)] + [{"text": None}, {"text": " "}]
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return folder


def context_of(folder, root, **stage):
    config = RunConfig(init="random", tokenizer=TokenizerConfig(vocab_size=400), midtrain=MidtrainConfig(
        train=TRAIN, malformed="skip", **stage))
    context = StageContext(config, root, "midtrain", Shared(config, root))
    object.__setattr__(context, "log", [].append)
    return context


def sources_of(context, phase=0):
    stores = midtrain.read_texts(context)
    tokenizer = midtrain.prepare_tokenizer(context, stores)
    return midtrain.make_sources(context, stores, tokenizer, phase), stores, tokenizer


def test_a_corpus_in_three_forms_and_a_second_file_by_share(folder, tmp_path):
    code = lambda form, share: TextSource(path=f"{folder}/*.parquet", form=form, share=share, options={"text": "body"})
    context = context_of(folder, tmp_path, sources={
        "plain": code("text", 0.4), "repo": code("repository", 0.2), "fim": code("fim", 0.2), "none": code("text", 0.0),
        "notes": TextSource(path=f"{folder}/b.jsonl", share=0.2)})  # fmt: skip
    made, stores, tokenizer = sources_of(context)
    assert [source.name for source in made] == ["plain", "repo", "fim", "notes"]
    assert stores["plain"].folder == stores["repo"].folder != stores["notes"].folder and "none" not in stores
    assert stores["notes"].summary | {"malformed_rows": []} == {
        "texts": 40, "bytes": stores["notes"].summary["bytes"], "characters": stores["notes"].summary["characters"],
        "read": 42, "kept": 40, "malformed": 1, "malformed_rows": [], "left_out": {"empty": 1}}  # fmt: skip
    plain, repo, fim, _ = (source.documents for source in made)
    assert tokenizer.decode(plain[3]["tokens"]) == stores["plain"][3].text + "<|endoftext|>"
    assert len(repo) >= 2 and tokenizer.decode(repo[0]["tokens"]).startswith("<|repo_name|>r0\n<|file_sep|>0.py\nvalue_")
    assert repo.tokens >= 0.2 * 4 * 2 * 128
    assert tokenizer.decode(fim[0]["tokens"])[:12] in ("<|fim_prefix", "<|im_start|>")
    stream = lambda: loader.batches(made, rows=2, length=128, seed=3)
    first, again = stream(), stream()
    batches = [next(first) for _ in range(6)]
    for batch in batches[:3]:
        np.testing.assert_array_equal(next(again)["tokens"], batch["tokens"])
    resumed = stream()
    resumed.set_state(again.get_state())
    for batch in batches[3:]:
        np.testing.assert_array_equal(next(resumed)["tokens"], batch["tokens"])
    # A second process, or the same one killed, reads what is there and gives the same.
    later, _, _ = sources_of(context_of(folder, tmp_path, sources=context.config.midtrain.sources))
    np.testing.assert_array_equal(
        next(loader.batches(later, rows=2, length=128, seed=3))["tokens"], batches[0]["tokens"])


def test_data_is_the_one_source_where_it_is_given_and_phases_weigh_by_name(folder, tmp_path):
    sources = {"plain": TextSource(path="/none"), "notes": TextSource(path=f"{folder}/b.jsonl", share=0.0)}
    context = context_of(folder, tmp_path, sources=sources, data=f"{folder}/b.jsonl")
    made, stores, _ = sources_of(context)
    assert [(source.name, source.share) for source in made] == [("data", 1.0)] and len(stores["data"]) == 40
    phases = (PhaseConfig(steps=1, shares={"plain": 0.0, "notes": 2}), PhaseConfig(steps=3))
    phased = midtrain_phases(context_of(folder, tmp_path, sources=sources, phases=phases).config)
    shares = [{name: source.share for name, source in config.midtrain.sources.items()} for _, config in phased]
    assert shares == [{"plain": 0.0, "notes": 2.0}, {"plain": 1.0, "notes": 0.0}]
    with pytest.raises(UserError, match=r"phases\[0\].shares.note: there is no such source; allowed: plain, notes"):
        midtrain_phases(context_of(folder, tmp_path, sources=sources, phases=(PhaseConfig(shares={"note": 1.0}),)).config)


def test_a_source_of_which_nothing_is_left_is_named(folder, tmp_path):
    sources = {"notes": TextSource(path=f"{folder}/b.jsonl")}
    from qcn_jax.config import FilterConfig

    with pytest.raises(UserError, match="sources.notes: no text is left .*read: 42.*'under 100000 characters': 40.*malformed: 1"):
        midtrain.read_texts(context_of(folder, tmp_path, sources=sources, filters=FilterConfig(min_characters=100_000)))


def test_texts_that_are_too_short_for_a_form_name_their_source(tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    sources = {"holes": TextSource(path=f"{tmp_path}/short.jsonl", form="fim")}
    with pytest.raises(UserError, match="^--config.midtrain.sources.holes: fill in the middle: there is no text to cut"):
        sources_of(context_of(tmp_path, tmp_path, sources=sources))


def test_texts_without_tokenizer_tokens_of_the_form_are_one_line(folder, tmp_path):
    context = context_of(folder, tmp_path, data=f"{folder}/b.jsonl")
    stores = midtrain.read_texts(context)
    with pytest.raises(UserError, match="no token '<|endoftext|>'"):
        midtrain.make_sources(context, stores, Tokenizer.train(["a b"], 260, ()))
