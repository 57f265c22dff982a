"""How is a conversation written for a Voxtral, whose own files hold no chat template but its tokens alone (`tekken.json`)?

Each turn of a user stands in `[INST]` and `[/INST]`, a system's words before it in marks of their own, an answer ends with
`</s>`, and no blank stands between them; a sound is its mark and one placeholder, of which a reader makes as many as it needs.
Compared with mistral-common 1.13.1: the same tokens for turns, systems and sounds before, behind and between texts.
"""

VOXTRAL_TEMPLATE = """
{%- macro said(content) -%}
    {%- if content is string -%}{{ content }}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'audio' -%}[BEGIN_AUDIO][AUDIO]{%- else -%}{{ part.text }}{%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- '<s>' -}}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}[SYSTEM_PROMPT]{{ said(message.content) }}[/SYSTEM_PROMPT]
    {%- elif message.role == 'user' -%}[INST]{{ said(message.content) }}[/INST]
    {%- elif message.role == 'assistant' -%}{{ said(message.content) }}</s>
    {%- else -%}{{ raise_exception('only system, user and assistant may speak') }}
    {%- endif -%}
{%- endfor -%}
"""
