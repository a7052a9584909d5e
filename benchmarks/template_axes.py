"""All of the report's tool-call templates: round trips in every cut, malformed variants, and published renderings.

    python benchmarks/template_axes.py --out=benchmarks/results/template_axes.json [--calls=500] [--processes=2]

For each template `calls` seeded calls are rendered, read back whole, streamed in two pieces at every cut, and streamed
by characters; malformed variants of each must be read the same whole and streamed, and none may pass for another call
without a problem. The three axes are held against published chat templates, which the source distributions of vLLM and
llama-cpp-python hold (downloaded to --cache from pip's index). Takes some minutes a template.
"""

import collections
import concurrent.futures
import datetime
import json
import pathlib
import random
import re
import string
import sys
import tarfile
import time

from absl import app, flags

from qcn_jax.chat import templates, tool_frames
from qcn_jax.chat.folder_template import FolderTemplate
from qcn_jax.chat.rendering import ToolCall
from qcn_jax.envs.synthesis.sources import download
from qcn_jax.errors import UserError

_OUT = flags.DEFINE_string("out", None, "JSON of results.")
_CALLS = flags.DEFINE_integer("calls", 500, "Calls for each template.")
_PROCESSES = flags.DEFINE_integer("processes", 2, "Side by side.")
_CACHE = flags.DEFINE_string("cache", "bench/published", "Folder of downloads.")
_SEED = flags.DEFINE_integer("seed", 25, "Of the calls.")

VLLM, LLAMA = "vllm==0.11.2", "llama-cpp-python==0.3.36"
PUBLISHED = {  # template -> (distribution, file in it)
    "qwen3_coder": (VLLM, "tool_chat_template_qwen3coder"), "deepseekr1": (VLLM, "tool_chat_template_deepseekr1"),
    "deepseekv3": (VLLM, "tool_chat_template_deepseekv3"), "deepseekv31": (VLLM, "tool_chat_template_deepseekv31"),
    "deepseekv32": (LLAMA, "deepseek-ai-DeepSeek-V3.2"), "glm46": (LLAMA, "GLM-4.6"),
    "minimax_m1": (VLLM, "tool_chat_template_minimax_m1"), "minimax_m2": (LLAMA, "MiniMax-M2"),
    "kimik2": (LLAMA, "moonshotai-Kimi-K2"), "hermes": (LLAMA, "Qwen-Qwen2.5-7B-Instruct"),
    "harmony_json": (LLAMA, "openai-gpt-oss-120b"), "llama4_pythonic": (VLLM, "tool_chat_template_llama4_pythonic"),
    "toolace": (VLLM, "tool_chat_template_toolace"), "mistral3": (LLAMA, "mistralai-Ministral-3-14B-Reasoning-2512"),
    "xlam_qwen": (VLLM, "tool_chat_template_xlam_qwen"),
}
ALSO = {"hermes": (VLLM, "tool_chat_template_hermes"), "mistral3": (VLLM, "tool_chat_template_mistral3")}

PARAMETERS = {"path": {"type": "string", "description": "Where."}, "count": {"type": "integer", "default": 3},
              "flag": {"type": "boolean"}, "lines": {"type": "array", "items": {"type": "integer"}},
              "options": {"type": "object"}, "rate": {"type": "number"}}
TOOLS = [{"type": "function", "function": {"name": name, "description": f"Does {name}.", "parameters": {
    "type": "object", "properties": PARAMETERS, "required": ["path"]}}} for name in ("edit_file", "search", "run")]
PIECES = ["x", "é", " ", "\n", "<", ">", "</", "\\", '"', "'", "{", "}", "[", "]", "(", ")", ",", ":", "`", "=", "None"]


def text(rng, syntax):
    """A value that code could hold, now and then with pieces of the template's own syntax."""
    letters = rng.choices([*PIECES, *string.ascii_lowercase], k=rng.randrange(12))
    if rng.random() < 0.3:
        letters.insert(rng.randrange(len(letters) + 1), rng.choice(syntax))
    return "".join(letters)


def drawn(rng, syntax):
    """A call of one of TOOLS that its schema allows."""
    values = {"path": lambda: text(rng, syntax), "count": lambda: rng.randrange(-9, 10**6), "flag": lambda: rng.random() < 0.5,
              "lines": lambda: [rng.randrange(99) for _ in range(rng.randrange(3))],
              "options": lambda: {"a": rng.choice([None, True, text(rng, syntax)])}, "rate": lambda: rng.randrange(1, 99) / 8}
    keys = ["path", *rng.sample([key for key in values if key != "path"], rng.randrange(3))]
    return ToolCall(rng.choice(TOOLS)["function"]["name"], {key: values[key]() for key in keys})


def streamed(name, pieces):
    """What is read of pieces: words and message."""
    reader = templates.reader(name, TOOLS)
    said = "".join(map(reader.push, pieces)) + reader.finish()
    return said, reader.message


def variants(written, calls, name, rng):
    """(kind, text) of malformed forms of a turn."""
    lines = written.split("\n")
    closers = [at for at, letter in enumerate(written) if letter in "}])>"]
    at = rng.choice(closers)
    yield "a closing character is missing", written[:at] + written[at + 1:]
    yield "cut", written[:rng.randrange(1, len(written))]
    yield "words behind", written + "\n\nThat is what I do."
    yield "the last line is missing", "\n".join(lines[:-1]) if len(lines) > 1 else written[:-1]
    if len(lines) > 1 and not templates.parse(name, lines[0], TOOLS).calls:
        yield "the first line is there twice", "\n".join([lines[0], *lines])
    yield "quotes are single", written.replace('"', "'")
    yield "in a fence", f"```\n{written}\n```"
    yield "blanks in tags", re.sub(r"<(?=[\w/|｜])", "< ", written)
    other = rng.choice([one for one in templates.REPORT if one != name])
    yield "another template's", templates.render(other, "", calls)


def examine(name, count, seed):
    """Counts of what held for one template, and what did not."""
    rng, started = random.Random(f"{seed} {name}"), time.monotonic()
    example = templates.render_call(name, ToolCall("edit_file", {"path": "x"}))
    syntax = [line for line in [example, *example.split("\n"), *re.split(r"(?=[<\[])", example)] if line]
    counts, failures, kinds = collections.Counter(), [], collections.Counter()
    for number in range(count):
        calls = [drawn(rng, syntax) for _ in range(1 + (number % 4 == 3))]
        words = rng.choice(["", "", "I look.", text(rng, syntax)])
        written = templates.render(name, words, calls)
        whole = templates.parse(name, written, TOOLS)
        ok = whole.calls == calls and whole.content == words.strip() and not whole.problems
        counts["whole"] += ok
        cuts = [streamed(name, [written[:at], written[at:]])[1].calls == calls for at in range(len(written) + 1)]
        counts["cuts"] += len(cuts)
        counts["cuts_held"] += sum(cuts)
        counts["by_characters"] += streamed(name, written)[1] == streamed(name, [written])[1]
        if not ok or not all(cuts):
            failures.append(written)
        # Values that hold no syntax: what is broken is the call's structure, and not a value, which may be any text.
        calls = [ToolCall(call.name, {"path": "".join(rng.choices(string.ascii_lowercase, k=6)), "count": rng.randrange(99)})
                 for call in calls]
        for kind, broken in variants(templates.render(name, "", calls), calls, name, rng):
            said, message = streamed(name, [broken])
            counts["variants"] += 1
            counts["variants_streamed"] += streamed(name, broken) == (said, message)
            clean = bool(message.calls) and not message.problems
            meant = [call for call in calls if call in message.calls]
            what = (("flagged" if message.problems else "no call") if not clean else "other" if message.calls != meant
                    else "same" if meant == calls else "some of the calls")
            kinds[f"{kind}: {what}"] += 1
            if what == "other":
                failures.append(f"{kind}: {broken}")
    return {**counts, "calls": count, "kinds": dict(sorted(kinds.items())), "failures": failures[:5],
            "seconds": round(time.monotonic() - started, 1)}


def conversation():
    """Two calls and their results, in OpenAI's form."""
    calls = [ToolCall("edit_file", {"path": "a.py", "count": 2, "flag": True}), ToolCall("search", {"path": "b c"})]
    ids = ["functions.edit_file:0", "functions.search:1"]
    asked = [{"id": one, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
             for one, call in zip(ids, calls, strict=True)]
    told = [{"role": "tool", "tool_call_id": one, "name": call.name, "content": f"RESULT {one[-1]}"}
            for one, call in zip(ids, calls, strict=True)]
    return calls, [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "USER"},
                   {"role": "assistant", "content": "WORDS", "tool_calls": asked}, *told,
                   {"role": "assistant", "content": "DONE"}]


def published(name, place):
    """How each axis of a template stands to a published rendering: exact, white space, or differs."""
    requirement, stem = place
    archive = download(requirement, None, pathlib.Path(_CACHE.value))
    with tarfile.open(archive) as members:
        member = next(one for one in members.getmembers() if one.name.endswith(f"/{stem}.jinja"))
        source = members.extractfile(member).read().decode()
    source = source.replace("strftime_now", "raise_date") if "strftime_now" in source else source
    template = FolderTemplate({"default": source}, stem, {"bos_token": "<BOS>", "eos_token": "<EOS>"})
    for one in template._templates.values():
        one.globals["raise_date"] = lambda _: datetime.date(2026, 1, 1).isoformat()
    calls, messages = conversation()
    if "mistral" in stem:
        for number, message in enumerate(messages[3:5]):
            message["tool_call_id"] = messages[2]["tool_calls"][number]["id"] = f"abcdefgh{number}"
    found = {"source": f"{requirement} {stem}.jinja"}
    try:
        rendered = template.render(messages, TOOLS)
    except UserError as error:
        return found | {"refused": str(error)}
    told = templates.respond(name, [(call.name, f"RESULT {index}") for index, call in enumerate(calls)])
    ours = {"definitions": tool_frames.joined(templates.definitions(name, TOOLS)), "calls": templates.render(name, "", calls),
            "responses": tool_frames.joined(told)}
    one_by_one = [tool_frames.joined(templates.respond(name, [(call.name, f"RESULT {index}")])) for index, call in enumerate(calls)]
    for axis, wanted in ours.items():
        place = 0
        for line in filter(None, wanted.split("\n")):
            place = rendered.find(line, place) + len(line) if rendered.find(line, place) >= 0 else len(rendered) + 1
        squeezed = re.sub(r"\s+", "", rendered)
        found[axis] = ("exact" if wanted in rendered else "but for white space" if re.sub(r"\s+", "", wanted) in squeezed
                       else "sentences between" if axis == "definitions" and place <= len(rendered)
                       else "a turn for each" if axis == "responses" and all(
                           re.sub(r"\s+", "", one) in squeezed for one in one_by_one) else "differs")
    written = rendered[rendered.find("WORDS") + 5:rendered.find("RESULT 0")] if "WORDS" in rendered else rendered[
        rendered.find("USER") + 4:rendered.find("RESULT 0")]
    read = templates.parse(name, written, TOOLS)
    found["published_turn_is_read"] = read.calls == calls
    return found


def main(argv):
    """Examines all templates, prints a table, writes the results."""
    del argv
    with concurrent.futures.ProcessPoolExecutor(_PROCESSES.value) as pool:
        jobs = {name: pool.submit(examine, name, _CALLS.value, _SEED.value) for name in templates.REPORT}
        against = {name: [published(name, place) for place in (PUBLISHED.get(name), ALSO.get(name)) if place]
                   for name in templates.REPORT}
        found = {}
        for name, job in jobs.items():
            found[name] = job.result() | {"published": against[name]}
            row = found[name]
            print(name, f"whole {row['whole']}/{row['calls']}, cuts {row['cuts_held']}/{row['cuts']}, variants streamed as "
                  f"whole {row['variants_streamed']}/{row['variants']}, {row['seconds']} s", flush=True)
            for one in against[name]:
                print("   ", one)
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(json.dumps({"seed": _SEED.value, "templates": found}, indent=1, ensure_ascii=False))
    bad = [name for name, row in found.items() if row["failures"] or row["whole"] < row["calls"]
           or row["cuts_held"] < row["cuts"] or row["variants_streamed"] < row["variants"]]
    print("held for all" if not bad else f"did not hold for {', '.join(bad)}")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(app.run(main))
