"""Chat templates of others: those that are published work as in transformers; those that would never end are ended."""

# ruff: noqa: E501 - templates are one line
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lalia.errors import UserError
from lalia.tokenizer import template
from lalia.tokenizer.bpe import Tokenizer
from lalia.tokenizer.chat import check_messages, render
from lalia.tokenizer.template import render_template

TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hi  "},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Who?\n"},
]
BIG = "{% set big = 'x' * 9000000 %}"
# The structure of the published templates, shortened.
PUBLISHED = {
    "chatml_with_default_system": "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nI am helpful<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama2": "{% if messages[0]['role'] == 'system' %}{% set talk = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set talk = messages %}{% set system = false %}{% endif %}"
    "{% for m in talk %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}{% else %}"
    "{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama3": "{%- if not date is defined %}{%- set date = 'today' %}{%- endif %}\n"
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}\n"
    "{{- bos_token ~ '<|reserved_0|>system<|reserved_1|>\n\n' }}{%- if tools is not none %}{{- tools | tojson }}{%- endif %}"
    "{{- 'Date: ' + date + '\n' + system }}{{- '<|reserved_2|>' }}\n"
    "{%- for m in messages %}\n    {%- if not (m.role == 'ipython' or 'tool_calls' in m) %}"
    "{{- '<|reserved_0|>' + m['role'] + '<|reserved_1|>\n\n' + m['content'] | trim + '<|reserved_2|>' }}{%- endif %}\n"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|reserved_0|>assistant<|reserved_1|>\n\n' }}{%- endif %}",
    "mistral": "{%- set ns = namespace(index=0, last='') %}{%- for m in messages if m['role'] in ['user', 'assistant'] %}"
    "{%- set ns.index = ns.index + 1 %}{%- set ns.last = m.role %}{%- if loop.last %}{{ '[' ~ loop.length ~ ']' }}{% endif %}"
    "{{ '[INST] ' + m['content'] + '[/INST]' if m['role'] == 'user' else ' ' + m['content'] + eos_token }}"
    "{%- endfor %}{{ ns.index }}{{ ns.last }}",
    "gemma": "{{ bos_token }}{% for m in messages[1:] %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = m['role'] %}{% endif %}{{ '<turn>' + role + '\n' + m['content'] | trim + '<end>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}",
    "phi": "{% for m in messages %}{{ '<|' ~ m['role'] ~ '|>' ~ '\n' ~ (m['content'] or '') ~ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "macros_and_marks": "{% macro turn(m, last=false) %}[{{ m.role|upper }}{{ '*' if last }}]{{ m['content']|default('') }}"
    "{% endmacro %}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ turn(m) }}{% endgeneration %}"
    "{% else %}{{ turn(m, loop.last) }}{% endif %}{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}"
    "{{ messages|map(attribute='role')|join(',') }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}"
    "{{ messages[0]|tojson(indent=2) }}{{ 'a,b'.split(',')|last }}{{ ('%s-%d' % ('n', 3)) }}{{ messages[::-1][0].role }}"
    "{{ {'a': [1, (2, 3)]}.items()|list }}{{ messages|length }}{{ ' x '.strip().replace('x', 'yy') }}",
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_published_templates_render_as_in_transformers(
    tokenizer: Tokenizer, tmp_path: Path, name: str, add_generation_prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.chat_template = PUBLISHED[name]
    talk = TALK[1:] if name == "chatml_with_default_system" else TALK
    expected = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=add_generation_prompt)
    tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    assert render_template(PUBLISHED[name], talk, add_generation_prompt, **tokens) == expected
    foreign = Tokenizer(tokenizer._json, {"chat_template": PUBLISHED[name], **tokens})
    ids = render(foreign, talk, add_generation_prompt)
    assert ids == theirs(expected, add_special_tokens=False)["input_ids"]


def test_content_that_is_none(tokenizer: Tokenizer) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]
    foreign = Tokenizer(tokenizer._json, {"chat_template": PUBLISHED["phi"]})
    assert foreign.decode(render(foreign, talk, False)) == "<|user|>\na<|end|>\n<|assistant|>\n<|end|>\n"
    joining = Tokenizer(tokenizer._json, {"chat_template": PUBLISHED["gemma"]})
    with pytest.raises(UserError, match="the chat template"):
        render(Tokenizer(tokenizer._json, {"chat_template": "{{ messages[1].content + 'x' }}"}), talk, False)
    assert "None" in joining.decode(render(joining, talk, False))  # Jinja's trim makes text of it, as in transformers
    with pytest.raises(UserError, match="content must be text, got NoneType"):
        render(foreign, [{"role": "user", "content": None}], False)
    with pytest.raises(UserError, match="content must be text, got NoneType"):
        check_messages(talk)


def test_errors_of_a_template_are_named() -> None:
    with pytest.raises(UserError, match="does not parse: .*unknown tag 'nonsense'"):
        render_template("{% nonsense %}", TALK, True)
    with pytest.raises(UserError, match="refuses this conversation .*: no tools here"):
        render_template("{{ raise_exception('no tools here') }}", TALK, True)
    with pytest.raises(UserError, match="'nothing' is undefined"):
        render_template("{{ nothing.at.all }}", TALK, True)
    with pytest.raises(UserError, match="more than 1000000"):
        render_template("x" * 1_000_001, TALK, True)


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursion": "{% for x in messages recursive %}{{ loop([x]) }}{% endfor %}",
    "slow_turns": BIG + "{% for i in range(99999) %}{% if 'y' in big %}{% endif %}{% endfor %}",
    "comparison": "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}"
    "{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}",
    "hash": "{% set n = namespace(a=(1,)) %}{% for i in range(60) %}{% set n.a = (n.a, n.a) %}{% endfor %}{{ {n.a: 1} }}",
    "dict": "{% set n = namespace(a=1) %}{% for i in range(60) %}{% set n.a = dict(a=n.a, b=n.a) %}{% endfor %}{{ n.a }}",
    "cycle": "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
    "doubling_text": "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "doubling_sum": "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "doubling_list": "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "format": "{{ '{:999999999}'.format(1) }}",
    "computed_format": "{{ '{:{}}'.format(1, 999999999) }}",
    "percent": "{{ '%999999999d' % 1 }}",
    "computed_percent": "{{ '%*d' % (999999999, 1) }}",
    "center": "{{ 'x'.center(999999999) }}",
    "center_filter": "{{ 'x' | center(999999999) }}",
    "indent": "{{ 'x\n' | indent(999999999) }}",
    "json": "{{ messages | tojson(indent=999999999) }}",
    "date": "{{ strftime_now('%999999999d') }}",
    "replace": "{{ ('x' * 1000000) | replace('x', 'y' * 1000000) }}",
    "replace_method": "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}",
    "join": "{{ range(99999) | join('x' * 1000000) }}",
    "join_method": "{{ ('x' * 1000000).join(['a'] * 100000) }}",
    "list_text": "{{ ['x' * 1000000] * 1000 }}",
    "namespaces": BIG + "{% set n = namespace(a=big) %}{{ ([n] * 10000) | join }}",
    "lorem": "{{ lipsum(n=999999) }}",
    "block": "{% set a %}{% for i in range(99999) %}{{ 'x' * 9000 }}{% endfor %}{% endset %}",
    "many_copies": BIG + "".join(f"{{% set a{i} = big | upper %}}" for i in range(3000)),
    "many_slices": BIG + "".join(f"{{% set a{i} = big[{i}:] %}}" for i in range(3000)),
    "many_lists": "".join(f"{{% set a{i} = ('x ' * 400000).split() %}}" for i in range(3000)),
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_and_greedy_templates_are_ended(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In a thread other than the main one, as in the server."""
    monkeypatch.setattr(template, "MAX_SECONDS", 1.0)
    outcome: list[Any] = []

    def attempt() -> None:
        try:
            outcome.append(render_template(ENDLESS[name], TALK, True))
        except UserError as error:
            outcome.append(error)

    start = time.monotonic()
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(20.0)
    assert not thread.is_alive() and time.monotonic() - start < 15.0
    assert isinstance(outcome[0], UserError) and "the chat template" in str(outcome[0])


def test_the_bounds_leave_long_conversations_alone() -> None:
    """The control: 2,000 messages, half a million characters, well within the bounds."""
    talk = [{"role": ("user", "assistant")[i % 2], "content": "word " * 50} for i in range(2000)]
    start = time.monotonic()
    for name in ("chatml_with_default_system", "llama2", "llama3", "mistral", "phi", "macros_and_marks"):
        assert len(render_template(PUBLISHED[name], talk, True, bos_token="<s>", eos_token="</s>")) > 1000
    assert time.monotonic() - start < 10.0


@pytest.mark.parametrize(
    "reach",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{{ (messages | map(attribute='__class__') | first).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ range.__self__.x }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ joiner.__call__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{{ 'x'.translate({120: 'y' * 100000}) }}",
        "{{ get_flashed_messages() }}",
    ],
)
def test_nothing_of_python_is_reached(reach: str) -> None:
    with pytest.raises(UserError, match="the chat template"):
        render_template(reach, TALK, True)
    assert TALK[0]["content"] == " Be brief. "


BOMBS = [
    '{{ (1).to_bytes(500000000, "big") }}',
    '{{ "a".encode().ljust(500000000) }}',
    '{{ ("\t" * 60000).expandtabs(10000) }}',
    '{{ ("a" * 20000).join("b" * 20000) }}',
    '{{ ("a" * 10000).join(range(40000) | map("string")) }}',
    '{{ ("a" * 20000).encode().replace("a".encode(), ("b" * 20000).encode()) }}',
]


@pytest.mark.parametrize("bomb", BOMBS)
def test_nothing_large_is_built_before_it_is_refused(bomb: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match="chat template"):
            render_template(bomb, TALK, True)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_the_measure_of_memory_sees_what_is_built() -> None:
    tracemalloc.start()
    built = ("a" * 20000).join("b" * 20000)
    assert tracemalloc.get_traced_memory()[1] > len(built) > 100 << 20
    tracemalloc.stop()
