"""Chat templates: programs of strangers, held within limits."""

import shutil
import subprocess

import pytest

import lingconv
from lingconv.errors import CheckpointError, UsageError
from lingconv.storage.local import LocalStorage
from lingconv.verification.reference import chat_template
from lingconv.verification.reference.prompts import Text
from tests.support import edit_json

ENDLESS = {
    "multiplied": "{{ 'a' * 4000000000 }}",
    "padded": "{{ 'x'|center(4000000000) }}",
    "formatted": "{{ '%4000000000d'|format(1) }}",
    "doubled": "{% set n = namespace(s='aaaaaaaa') %}{% for i in range(40) %}"
    "{% set n.s = n.s + n.s %}{% endfor %}",
    "nested loops": "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2,
    "power": "{{ (9 ** (9 ** 9)) > 1 }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
}
FAILING = {
    "1/0": "{{ 1/0 }}",
    "overflow": "{{ 10.0 ** 400 }}",
    "macro": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "deep": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "brackets": "{{" + "(" * 100000 + "1" + ")" * 100000 + "}}",
    "append": "{{ [1].append(2) }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "include": "{% include '/etc/passwd' %}",
    "unclosed": "{% if %}",
    "refuses": "{{ raise_exception('no users here') }}",
}


@pytest.fixture
def checkpoint(golden, tmp_path):
    shutil.copytree(golden, tmp_path / "c")
    return tmp_path / "c"


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_end_is_ended(name):
    with pytest.raises(ValueError, match="more than"):
        chat_template.render(ENDLESS[name], {})


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_told(name, checkpoint):
    edit_json(checkpoint / "tokenizer_config.json", lambda v: v.update(chat_template=FAILING[name]))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json") as caught:
        Text(LocalStorage(checkpoint)).encode("hi", chat=True)
    assert "tokens=1,2,3" in caught.value.hint


@pytest.mark.parametrize("value", [[1], [None], [{"name": []}], [{"name": "default"}], 5, {}, []])
def test_a_template_of_another_type_is_none(value, checkpoint):
    edit_json(checkpoint / "tokenizer_config.json", lambda v: v.update(chat_template=value))
    with pytest.raises(CheckpointError, match="no chat template"):
        lingconv.forward(checkpoint, prompt="hi", chat=True)


def test_a_config_nested_deep_is_told(checkpoint):
    (checkpoint / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        lingconv.forward(checkpoint, prompt="hi", chat=True)


def test_halves_of_characters_are_told(checkpoint):
    (checkpoint / "chat_template.jinja").write_text("{{ '\\ud800' }}")
    with pytest.raises(CheckpointError, match="surrogates"):
        lingconv.forward(checkpoint, prompt="hi", chat=True)
    with pytest.raises(UsageError, match="not UTF-8"):
        lingconv.forward(checkpoint, prompt="caf\udce9")


def test_a_template_sees_no_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    given = []

    def run(words, *, env, **options):
        given.append(env)
        return subprocess.CompletedProcess(words, 0, b'{"text": ""}', b"")

    monkeypatch.setattr(subprocess, "run", run)
    chat_template.render("x", {})
    assert "PATH" in given[0]
    assert "HF_TOKEN" not in given[0]


def test_the_text_comes_back_as_it_is():
    text = 'é\n"\\ 💡'
    variables = {"messages": [{"content": text}]}
    assert chat_template.render("a{{ messages[0]['content'] }}b", variables) == f"a{text}b"
