"""The chat template as Jinja, for engines that read `chat_template.jinja` beside the weights.

It gives what `chat.render` gives, and refuses what that refuses, but for two things that no published template knows:
the escapes of `tool_calls`, and the names that it refuses.
"""

from qcn_jax.chat.rendering import DEFAULT_SYSTEM, TOOLS_FORMAT, TOOLS_HEADING

CHAT_TEMPLATE_FILE = "chat_template.jinja"

_EXTRAS = r"""
{%- macro plain(value) -%}
{{ value if value is string else (value | tojson if value is mapping or value is sequence else value | string) }}
{%- endmacro -%}
{%- macro extras(values, done) -%}
{%- if values is mapping -%}
{%- for key, value in values | items if key not in done -%}
{{ '\n<' ~ key ~ '>' ~ plain(value) ~ '</' ~ key ~ '>' }}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
_CHECKS = r"""
{%- macro text(content) -%}
{%- if content is string -%}
{{ content }}
{%- elif content is mapping or (content is not sequence and content is defined and content is not none) -%}
{{ raise_exception('content: expected text or a list of text parts') }}
{%- elif content -%}
{%- for part in content -%}
{{ part.text if part is mapping and part.text is string
   else raise_exception('content: expected text or a list of text parts') }}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro check(ok, message) -%}
{%- if not ok %}{{ raise_exception(message) }}{% endif -%}
{%- endmacro -%}
"""
_TOOL = r"""
{%- macro describe(tool) -%}
{{- check(tool is mapping and tool.name is string, 'tools: expected objects with a name') -}}
{{ '\n<function>\n<name>' ~ tool.name ~ '</name>' }}
{%- if tool.description is defined %}{{ '\n<description>' ~ tool.description | trim ~ '</description>' }}{% endif -%}
{{ '\n<parameters>' }}
{%- if tool.parameters is mapping and tool.parameters.properties is mapping -%}
{%- for name, field in tool.parameters.properties | items -%}
{{ '\n<parameter>\n<name>' ~ name ~ '</name>' }}
{%- if field.type is defined %}{{ '\n<type>' ~ field.type | string ~ '</type>' }}{% endif -%}
{%- if field.description is defined %}{{ '\n<description>' ~ field.description | trim ~ '</description>' }}{% endif -%}
{{ extras(field, ['name', 'type', 'description']) ~ '\n</parameter>' }}
{%- endfor -%}
{%- endif -%}
{{ extras(tool.parameters, ['type', 'properties']) ~ '\n</parameters>' }}
{{- extras(tool, ['type', 'name', 'description', 'parameters']) ~ '\n</function>' }}
{%- endmacro -%}
"""
_HEAD = r"""
{%- set system = messages and messages[0].role == 'system' -%}
{%- if system or tools -%}
{{ '<|im_start|>system\n' ~ (text(messages[0].content) if system else DEFAULT) }}
{%- if tools -%}
{{ HEADING }}
{%- for tool in tools %}{{ describe(tool.function if tool.function is defined else tool) }}{% endfor -%}
{{ FORMAT }}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endif -%}
"""
_TURNS = r"""
{%- for message in (messages[1:] if system else messages) -%}
{{- check(message.role in ['system', 'user', 'assistant', 'tool'], 'unknown role') -}}
{%- if message.role == 'tool' -%}
{{- check(not loop.first, "a tool message must follow an assistant's call") -}}
{%- if not loop.first and loop.previtem.role != 'tool' %}{{ '<|im_start|>user\n' }}{% endif -%}
{{ '<tool_response>\n' ~ text(message.content) ~ '\n</tool_response>\n' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif -%}
{%- else -%}
{%- set words = text(message.content) -%}
{%- set calls = message.tool_calls or [] if message.role == 'assistant' else [] -%}
{{- check(calls is sequence and calls is not mapping and calls is not string, 'tool_calls: expected a list') -}}
{{ '<|im_start|>' ~ message.role }}
{%- if not calls -%}
{{ '\n' ~ words }}
{%- elif words | trim -%}
{{ '\n' ~ words | trim ~ '\n' }}
{%- endif -%}
{%- for call in calls -%}
{%- set call = call.function if call.function is defined else call -%}
{{- check(call is mapping and (not call.arguments or call.arguments is mapping),
         'tool_calls: arguments must be a mapping') -}}
{{ '\n<tool_call>\n<function=' ~ call.name ~ '>\n' }}
{%- for key, value in (call.arguments or {}) | items -%}
{{ '<parameter=' ~ key ~ '>\n' ~ plain(value) ~ '\n</parameter>\n' }}
{%- endfor -%}
{{ '</function>\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif -%}
"""


def chat_template() -> str:
    """The template's text."""
    values = {"DEFAULT": DEFAULT_SYSTEM, "HEADING": TOOLS_HEADING, "FORMAT": f"\n</tools>{TOOLS_FORMAT}"}
    settings = "".join("{%%- set %s = %r -%%}\n" % item for item in values.items())
    return settings + _EXTRAS.lstrip() + _CHECKS.lstrip() + _TOOL.lstrip() + _HEAD.lstrip() + _TURNS.strip()
