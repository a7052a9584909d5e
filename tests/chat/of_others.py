"""Chat templates of the kinds that models are published with, and conversations to write with them.

Every template marks what assistants wrote ({% generation %}), which transformers' own masks are made of; `unmarked`
is the same without the marks.
"""

import json

from qcn_jax.chat import jinja_template
from qcn_jax.pipeline.stages.midtrain import ADDED_TOKENS

ADDED = (*ADDED_TOKENS, "<think>", "</think>", "<|eot|>", "<|eom|>", "<|head|>", "<|/head|>", "[INST]", "[/INST]", "</s>")
_CALL = "{% set call = call.function %}"
_GENERATION, _END = "{% generation %}", "{% endgeneration %}"
TOOL = {"type": "function", "function": {"name": "run", "description": "Runs a command.", "parameters": {
    "type": "object", "properties": {"command": {"type": "string", "description": "What."}}, "required": ["command"]}}}


def _native() -> str:
    """Ours: an assistant's turn is caught, and given with marks behind its opening."""
    whole, opening = jinja_template.chat_template(), "{{ '<|im_start|>' ~ message.role }}"
    head, _, rest = whole.partition(opening)
    body, _, tail = rest.partition("{{ '<|im_end|>\\n' }}\n{%- endif -%}\n{%- endfor -%}")
    assert head and body and tail
    return (head + "{%- set body -%}" + body + "{%- endset -%}{{ '<|im_start|>' ~ message.role ~ '\\n' }}"
            "{%- if message.role == 'assistant' -%}{% generation %}{{ body[1:] ~ '<|im_end|>' }}{% endgeneration %}"
            "{%- else -%}{{ body[1:] ~ '<|im_end|>' }}{%- endif -%}{{ '\\n' }}{%- endif -%}{%- endfor -%}" + tail)


def _lines(text: str) -> str:
    return "".join(line.strip() for line in text.splitlines())


TEMPLATES = {
    "native": _native(),
    "chatml": _lines("""
        {% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\\n' }}{% if message.role == 'assistant' %}
        {% generation %}{{ message.content ~ '<|im_end|>' }}{% endgeneration %}
        {% else %}{{ message.content ~ '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""),
    # Reasoning is shown behind the last question alone; calls are JSON, results stand in a user's turn.
    "thinking": _lines("""
        {% if tools %}{{ '<|im_start|>system\\n' ~ (messages[0].content ~ '\\n\\n' if messages[0].role == 'system' else '') }}
        {% for tool in tools %}{{ tool | tojson ~ '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}
        {% elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' ~ messages[0].content ~ '<|im_end|>\\n' }}{% endif %}
        {% set ns = namespace(last=0) %}
        {% for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
        {% for message in messages %}
        {% if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' }}
        {% elif message.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}
        {% set thought = (message.reasoning_content or '') | trim %}
        {% if loop.index0 > ns.last %}{{ '<think>\\n' }}{% if not thought %}{{ '\\n</think>\\n\\n' }}{% endif %}{% endif %}
        {% generation %}{% if loop.index0 > ns.last and thought %}{{ thought ~ '\\n</think>\\n\\n' }}{% endif %}
        {{ message.content }}
        {% for call in message.tool_calls or [] %}""" + _CALL + """
        {{ ('\\n' if message.content or not loop.first else '') ~ '<tool_call>\\n' ~ {'name': call.name, 'arguments': call.arguments} | tojson ~ '\\n</tool_call>' }}
        {% endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
        {% elif message.role == 'tool' %}{% if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{ '\\n<tool_response>\\n' ~ message.content ~ '\\n</tool_response>' }}
        {% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}{% endif %}{% endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""),
    # A turn of calls ends with another token, and results say whose they are: the frame depends on what was written.
    "headers": _lines("""
        {% if tools %}{{ '<|head|>tools<|/head|>\\n\\n' ~ tools | tojson ~ '<|eot|>' }}{% endif %}
        {% set ns = namespace(name='') %}{% for message in messages %}
        {% if message.role == 'assistant' %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% generation %}
        {{ message.content | trim }}{% for call in message.tool_calls or [] %}""" + _CALL + """{% set ns.name = call.name %}
        {{ '<tool_call>' ~ call.name ~ call.arguments | tojson ~ '</tool_call>' }}{% endfor %}
        {{ '<|eom|>' if message.tool_calls else '<|eot|>' }}{% endgeneration %}
        {% elif message.role == 'tool' %}{% if not ns.name %}{{ raise_exception('a result without a call') }}{% endif %}
        {{ '<|head|>' ~ ns.name ~ '<|/head|>\\n\\n' ~ message.content | tojson ~ '<|eot|>' }}
        {% else %}{{ '<|head|>' ~ message.role ~ '<|/head|>\\n\\n' ~ message.content | trim ~ '<|eot|>' }}{% endif %}{% endfor %}
        {% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}"""),
    # No opening of its own; an answer begins with a space.
    "instruct": _lines("""
        {% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' ~ message.content ~ '[/INST]' }}
        {% elif message.role == 'assistant' %}{% generation %}{{ ' ' ~ message.content ~ '</s>' }}{% endgeneration %}
        {% else %}{{ raise_exception('Only user and assistant roles are known') }}{% endif %}{% endfor %}"""),
}  # fmt: skip
WITH_TOOLS = ("native", "thinking", "headers")


def unmarked(template: str) -> str:
    """The template without its marks."""
    return template.replace(_GENERATION, "").replace(_END, "")


def chats(count: int, rng, tools: bool, system: bool = True):
    """(messages, tools) of `count` conversations of one to four questions, whose answers may call tools first."""
    words = ["list", "files", "sum", "x = 1", "naïve", "日本", "print('a')", "FAILED 3 of 4", "\n", "done.", "<", "{}", "é"]

    def said():
        return " ".join(rng.choice(words, rng.integers(1, 9))).strip() or "yes"

    for _ in range(count):
        listed = [TOOL] if tools and rng.random() < 0.7 else None
        messages = [{"role": "system", "content": said()}] if system and rng.random() < 0.5 else []
        for _ in range(rng.integers(1, 5)):
            messages.append({"role": "user", "content": said()})
            for _ in range(rng.integers(0, 3) if tools else 0):
                calls = [{"type": "function", "id": f"c{n}", "function": {"name": "run", "arguments": {"command": said(), "n": n}}}
                         for n in range(rng.integers(1, 3))]
                messages.append({"role": "assistant", "content": said() if rng.random() < 0.6 else "", "tool_calls": calls})
                messages += [{"role": "tool", "content": said(), "tool_call_id": call["id"]} for call in calls]
            messages.append({"role": "assistant", "content": said()})
        yield messages, listed


def texts() -> list[str]:
    """What to train a tokenizer on."""
    return [json.dumps(TOOL), *TEMPLATES.values()]


def compare(name: str, count: int, rng, tokenizer, theirs) -> tuple[int, int]:
    """(tokens, tokens of assistants) of conversations whose ids and masks are transformers', by every route there is.

    Args:
      tokenizer: has ADDED.
      theirs: the same one in transformers.
    """
    import numpy as np

    from qcn_jax.chat.encoder import ChatEncoder
    from qcn_jax.chat.folder_template import FolderTemplate
    from qcn_jax.chat.template_encoder import TemplateEncoder

    marked = TEMPLATES[name]
    encoders = [TemplateEncoder(tokenizer, FolderTemplate({"default": source}, name)) for source in (marked, unmarked(marked))]
    encoders += [ChatEncoder(tokenizer)] if name == "native" else []
    total = own = 0
    for messages, tools in chats(count, rng, name in WITH_TOOLS, name != "instruct"):
        want = theirs.apply_chat_template(messages, tools=tools, chat_template=marked, return_dict=True,
                                          return_assistant_tokens_mask=True)
        mask = np.asarray(want["assistant_masks"])
        assert mask.any() and not mask.all()
        for encoder in encoders:
            found = encoder.encode(messages, tools)
            assert found["tokens"].tolist() == list(want["input_ids"]), (name, messages)
            assert found["weights"].tolist() == [*mask[1:].tolist(), 0], (name, messages)
        total, own = total + len(mask), own + int(mask.sum())
    return total, own
