"""Messages name options by their fields; the command line alone turns them into flags."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import typer

import lingconv
from lingconv.cli.app import app
from lingconv.cli.option_flags import flags_of, parameter_of, speller
from lingconv.cli.terminal import terminal
from lingconv.containers.source_overrides import SourceOverrides
from lingconv.errors import Fault
from lingconv.execution.request import RunRequest
from lingconv.model.parallelism import Parallel
from lingconv.plans.options import MegatronOptions

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`([a-z_][a-z_.]*)(?:=[^`]*)?`")
VALUES = (
    lingconv.ConvertOptions, lingconv.FourBitOptions, lingconv.Fp8Options, lingconv.GgufOptions,
    MegatronOptions, lingconv.Resources, lingconv.PublishOptions, lingconv.ForwardOptions,
    lingconv.VerifyOptions,
    SourceOverrides, RunRequest,
)  # fmt: skip
FUNCTIONS = (
    lingconv.convert, lingconv.merge_checkpoints, lingconv.forward, lingconv.verify,
    lingconv.push, lingconv.api.estimate, lingconv.by_decay, lingconv.by_hand,
)  # fmt: skip


def known_fields():
    fields = {field.name for value in VALUES for field in dataclasses.fields(value)}
    words = {name for function in FUNCTIONS for name in inspect.signature(function).parameters}
    # The parameters that only the command line has for the weights of an average.
    words.add("weights")
    return fields | words | {f"parallel.{name}" for name in Parallel._fields}


def messages():
    """Yield every text of the core that is no docstring, with its place."""
    for path in sorted((ROOT / "lingconv").rglob("*.py")):
        if "cli" in path.parts:
            continue
        tree = ast.parse(path.read_text())
        prose = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
            if is_text and id(node) not in prose:
                yield f"{path.name}:{node.lineno}", node.value


# Commands that somebody is to run.
COMMANDS = re.compile(r"lingconv verify|vllm serve|sglang|mlx_lm|llama-server|hf download")
# Recorded in lingconv.json and in the plan's digest, as they have always been.
REASONS = ("left out by `--", "taken from the last checkpoint: `--exclude`")


def test_the_core_names_no_flag():
    flags = [
        (place, text)
        for place, text in messages()
        if re.search(r"(^|[ `])--[a-z]", text)
        and not text.startswith(REASONS)
        and not COMMANDS.search(text)
    ]
    assert flags == []


def test_every_option_that_a_message_names_is_a_field_and_a_flag():
    flags, fields = flags_of(app), known_fields()
    named = {
        (place, word)
        for place, text in messages()
        for word in NAMED.findall(text)
        if parameter_of(word) in flags
    }
    assert len(named) > 40
    assert {(place, word) for place, word in named if word not in fields} == set()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("add `dtype=bf16` (or fp8)", "add `--dtype bf16` (or fp8)"),
        ("pass `allow_requantize`", "pass `--allow-requantize`"),
        ("`layout` is `x`", "`--to` is `x`"),
        ("say `parallel.layers=3,3,2`", "say `--pp-layers 3,3,2`"),
        ("add `experts=sequential`", "add `--sequential`"),
        ("`quant_method` is 'x'", "`quant_method` is 'x'"),
    ],
)
def test_the_command_line_shows_flags(text, shown):
    assert speller(app)(text) == shown


def test_keys_of_files_stay_what_they_are(capsys, monkeypatch):
    """`ignore` and `version` are keys of configs and cards as well as options."""
    monkeypatch.setattr(terminal, "spell", speller(app))
    error = lingconv.CheckpointError(
        "1 fault", faults=[Fault("config", "`ignore` is 5, not a list", "config.json")],
        hint="leave it out: `ignore=PATTERN`",
    )  # fmt: skip
    terminal.error(error)
    terminal.warning("README.md: `version` is a list of 1")
    terminal.warning("`ignore` is odd: `scheme=channel` has no such limit")
    assert capsys.readouterr().err.splitlines() == [
        "error: 1 fault",
        "  config.json: `ignore` is 5, not a list",
        "hint: leave it out: `--ignore PATTERN`",
        "warning: README.md: `version` is a list of 1",
        "warning: `ignore` is odd: `--scheme channel` has no such limit",
    ]


def commands(command, name=""):
    """Yield click's own commands by their names."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
    for word, each in (inner or {}).items():
        yield from commands(each, f"{name} {word}".strip())


OPTIONS_OF = {
    name: {word for option in command.params for word in (*option.opts, *option.secondary_opts)}
    for name, command in commands(typer.main.get_command(app))
}
SHOWN = re.compile(r"`(--[a-z][a-z0-9-]*)[^`]*`(?: of `lingconv ([a-z ]+?)(?: --[^`]*)?`)?")


@pytest.mark.parametrize("name", sorted(OPTIONS_OF))
def test_every_flag_that_a_command_shows_is_its_own_or_that_of_one_it_names(name):
    """Each message of the core, shown by each command."""
    spell = speller(app, [*name.split(), "SRC", "DST", "--quiet"])
    wrong = {
        (place, flag)
        for place, text in messages()
        for flag, home in SHOWN.findall(spell(text))
        if flag not in OPTIONS_OF[home or name] and not text.startswith(REASONS)
    }
    assert wrong == set()


def test_a_caller_in_python_reads_keywords(golden, tmp_path):
    with pytest.raises(lingconv.UsageError, match=r"`scale`.* are for FP8") as caught:
        lingconv.convert(
            golden,
            tmp_path / "out",
            lingconv.ConvertOptions(fp8=lingconv.Fp8Options(scale="ue8m0")),
        )
    assert caught.value.hint == "add `dtype=fp8`"
