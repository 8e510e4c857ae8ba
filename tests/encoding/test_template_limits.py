"""Chat templates come from strangers: whatever one tries, it ends within its limits and reaches nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from deft.core.errors import InputError
from deft.core.types import Message
from deft.encoding.render.sandbox import Exhausted, Meter
from deft.encoding.render.template import Refusal, Rendering, Template
from deft.encoding.render.traced import TEMPLATE, owner_of

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}"
ENDS = "{% endfor %}{% endfor %}"

HOSTILE = {
    "nested loops": LOOPS + "x" + ENDS,
    "silent nested loops": LOOPS + "{% set x = a * b %}" + ENDS,
    "filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "endless range": "{{ range(10 ** 12) | list }}",
    "text times a number": "{{ 'a' * 10 ** 10 }}",
    "a number times text": "{{ 1000000000 * ('ab' ~ 'c') }}",
    "list times a number": "{{ [0] * 10 ** 10 }}",
    "list times lists": "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "lists as JSON": "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x | tojson }}",
    "dicts of dicts": "{% set ns = namespace(x={}) %}{% for i in range(60) %}"
    "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x }}",
    "tuples of tuples": "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}"
    "{% endfor %}{{ ns.x | string | length }}",
    "namespaces of namespaces": "{% set ns = namespace(x=namespace()) %}{% for i in range(60) %}"
    "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "doubling by +": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling a list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",  # noqa: E501
    "doubling by join": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "doubling by replace": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
    "doubling by the replace filter": "{% set ns = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}",
    "doubling by format": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "doubling by %": "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
    "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "doubling by set blocks": "{% set x = 'a' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60 + "{{ x }}",
    "a wide field by %": "{{ '%1000000000d' % 1 }}",
    "a field as wide as a number": "{{ '%*d' % (1000000000, 1) }}",
    "a wide field by format": "{{ '{:1000000000}'.format(1) }}",
    "a field as wide as an argument": "{{ '{:{}}'.format(1, 1000000000) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}",
    "the center filter": "{{ 'a' | center(10 ** 10) }}",
    "zfill": "{{ '1'.zfill(10 ** 10) }}",
    "expandtabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "the indent filter": "{{ ('a\n' * 100000) | indent(100000) }}",
    "wide JSON": "{{ [1, 2, 3] | tojson(indent=1000000000) }}",
    "long separators": "{{ range(99999) | list | tojson(separators=('a' * 99999, ':')) }}",
    "a tower of powers": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "a large product": "{% set ns = namespace(x=2) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "to_bytes": "{{ (1).to_bytes(10 ** 10, 'big') | length }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) | length }}",
    "endless recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "recursion in two directions": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(100) }}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
    "many large lists": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set ns.x = ns.x + [range(99999) | list] %}{% endfor %}",
    "many slices": "{% set ns = namespace(x=[]) %}{% set s = 'a' * 1000000 %}{% for i in range(99999) %}"
    "{% set ns.x = [ns.x, s[i:]] %}{% endfor %}",
    "many words": "{{ lipsum(n=100000) }}",
    "batches": "{{ [1] | batch(10 ** 9, 'x') | list }}",
    "a wide date": "{{ strftime_now('%1000000000d') }}",
    "the type of a text": "{{ ''.__class__.__mro__ }}",
    "the globals of a function": "{{ raise_exception.__globals__ }}",
    "a hidden attribute": "{{ ''|attr('__class__') }}",
    "a hidden name": "{{ namespace(__class__=1) }}",
    "a file": "{% include '/etc/passwd' %}",
    "changing the messages": "{% set x = messages.append(1) %}",
}
"""What a template may try: to be endless, to fill the memory, to reach what is none of its business."""

DEEP = {
    "deep brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "deep blocks": "{% if 1 %}" * 5000 + "x" + "{% endif %}" * 5000,
    "a long source": "x" * 2_000_000,
    "a nest of loops": "{% for a in [1] %}" * 40 + "x" + "{% endfor %}" * 40,
}
"""What cannot even be compiled."""

RUN = """
import json, resource, sys, time
from deft.core.errors import InputError
from deft.encoding.render.template import Refusal, Template
from deft.core.types import Message
for name, source in json.load(sys.stdin).items():
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        text = Template(source, {}).render([Message("user", "Hi")])
        ended = f"refused: {text}" if not text else "rendered"
    except (Refusal, InputError) as error:
        ended = f"refused: {error}"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps([name, ended, time.process_time() - began, grown / 1024]), flush=True)
"""


def run(templates: dict[str, str]) -> dict[str, tuple[str, float, float]]:
    """What became of each template in a process of its own: how it ended, seconds of computing, MiB."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(templates),
        capture_output=True,
        text=True,
        timeout=3000,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return {name: (ended, seconds, mib) for name, ended, seconds, mib in map(json.loads, done.stdout.splitlines())}


def test_every_day_is_the_same_day() -> None:
    assert Template("{{ strftime_now('%Y-%m-%d') }}", {}).render([Message("user", "Hi")]) == "2025-01-01"


def test_safe_text_escapes_what_is_added_to_it_as_in_transformers() -> None:
    template = "{{ '<'|safe + messages[0].content }}{{ ('a'|safe).replace('a', '&') }}{{ '&' + '<' }}"
    (expected,), *_ = render_jinja_template([[{"role": "user", "content": '"'}]], chat_template=template)
    assert expected == "<&#34;&amp;&<"
    assert Rendering(Template(template, {}), [Message("user", '"')]).plain(1) == expected


def test_what_is_added_to_safe_text_keeps_its_owner() -> None:
    text = Template("{{ 'a'|safe + messages[0].content }}", {}).render([Message("user", "Hi")])
    assert text.runs == ((TEMPLATE, 1), (owner_of(0), 2))


def test_what_no_sandbox_allows_is_said_to_be_so_everywhere() -> None:
    with pytest.raises(Refusal, match=r"that of transformers neither .*append"):
        Template("{% set x = [] %}{% set y = x.append(1) %}", {}).render([Message("user", "Hi")])


def test_hostile_templates_end_within_their_limits() -> None:
    assert len(HOSTILE) >= 30
    found = run(HOSTILE | DEEP)
    assert found.keys() == HOSTILE.keys() | DEEP.keys()
    for name, (ended, seconds, mib) in found.items():
        assert ended.startswith("refused: "), f"{name}: {ended}"
        assert seconds < 8, f"{name}: {seconds:.1f} s"
        assert mib < 700, f"{name}: {mib:.0f} MiB"


def test_a_template_that_is_always_over_its_limits_stops_the_run() -> None:
    template = Template(LOOPS + "x" + ENDS, {})
    for _ in range(2):
        with pytest.raises(Refusal, match="limits"):
            template.render([Message("user", "Hi")])
    with pytest.raises(InputError, match="name another"):
        template.render([Message("user", "Hi")])


def test_the_limit_of_time_is_one_of_computing() -> None:
    meter = Meter(seconds=0.05)
    time.sleep(0.1)
    meter._check()
    while time.thread_time() <= meter.deadline:
        pass
    with pytest.raises(Exhausted, match="too long"):
        meter._check()


def test_limits_grow_with_the_conversation() -> None:
    chat = [Message("user", "word " * 20_000), Message("assistant", "So. ")] * 50
    quadratic = (
        "{% for m in messages %}{% for n in messages %}{% if loop.index == m.content | length %}!{% endif %}"
        "{% endfor %}{{ m.role + ': ' + m.content.strip() + '\n' }}{% endfor %}"
    )
    assert len(Template(quadratic, {}).render(chat)) > 4_000_000


def test_what_templates_of_models_do_is_not_refused(corpus: Path) -> None:
    rendered, reasons = 0, []
    for entry in json.loads((corpus / "templates.json").read_text()):
        template = Template(entry["template"], {"bos_token": "<s>", "eos_token": "</s>"})
        try:
            template.render([Message("user", "Hi?"), Message("assistant", "Hello.")] * 40)
        except Refusal as refusal:
            reasons.append(str(refusal))
        else:
            rendered += 1
    assert rendered > 130
    assert not [reason for reason in reasons if "limits" in reason or "followed" in reason]
