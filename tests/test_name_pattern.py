"""Patterns that name weights: as re, fnmatch and compressed-tensors read them, and bounded."""

import fnmatch
import json
import re
import shutil

import pytest
from compressed_tensors.utils.match import match_name
from hypothesis import assume, example, given
from hypothesis import strategies as st

import lingconv
from lingconv.encodings import name_matcher
from lingconv.encodings.name_matcher import NameMatcher, TooCostly
from lingconv.encodings.name_pattern import Pattern, select
from lingconv.encodings.quantization_config import with_kept
from lingconv.encodings.regular_expression import parse_glob, parse_regex
from lingconv.errors import UsageError
from tests.support import edit_json

NAMES = [
    *(
        f"model.layers.{layer}.{module}.weight"
        for layer in (0, 1, 2, 10, 21)
        for module in (
            "self_attn.q_proj", "self_attn.o_proj", "mlp.gate", "mlp.gate_proj",
            "mlp.experts.0.up_proj", "mlp.experts.10.down_proj", "mlp.shared_experts.gate_proj",
            "mlp.shared_expert_gate",
        )
    ),
    "lm_head.weight", "model.embed_tokens.weight", "model.visual.blocks.0.attn.qkv.weight",
    "mtp.0.x",
]  # fmt: skip

# As llm-compressor, AMD Quark, vLLM and others write them.
WRITTEN = [
    "re:.*lm_head", "re:.*self_attn.*", "re:.*mlp.gate$", "re:visual.*",
    r"re:.*layers\.(0|1|2)\..*",
    "re:.*gate$", r"re:.*mtp\..*", "re:model.visual.*", "re:.*shared_expert_gate$", "lm_head",
    r"re:.*\.self_attn\.(q|k|v)_proj", "re:^(?!.*experts).*$",
    r"re:^(?!.*\.mlp\.experts(?:\.|$)).*$",
    r"re:(?!(?:lm_head|mtp)$)(?:.*head)",
    r"re:(?:model\.)?layers\.\d+\.mlp\.experts\.\d+\.up_proj$",
    r"re:.*\.layers\.[12]?\d\.mlp\.(gate|up|down)_proj", r"re:^model\.layers\.(?:[0-9]|1[0-9])\..*",
]  # fmt: skip

# Patterns that a backtracking matcher takes exponential or polynomial time for.
HOSTILE = [
    "re:(.+)+!", "re:(a+)+$", r"re:(\w+\.?)+!", "re:(.*)*!", "re:(x+x+)+y", "re:.*.*.*.*.*.*.*.*!",
    "re:(?=(.+)+!)m", "re:(?:(?:(?:.{1,100000}){1,100000}){1,100000}){1,100000}!",
    "re:(.|..|...)*!",
    "re:" + "(" * 40 + "." + "*)" * 40 + "!", "re:" + "a?" * 3000 + "!", "*m*o*d*e*l*.*.*.*.*!",
]  # fmt: skip


@st.composite
def expressions(draw, depth=4):
    atoms = ["a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", r"\w", r"[a-b\d]", "$", "^", r"\b", "-"]
    if depth == 0:
        return draw(st.sampled_from(atoms))
    part = expressions(depth - 1)
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return draw(st.sampled_from(atoms))
    if kind == 1:
        return draw(part) + draw(part)
    if kind == 2:
        return f"(?:{draw(part)}|{draw(part)})"
    if kind == 3:
        mark = draw(st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?", "+?"]))
        return f"({draw(part)}){mark}"
    return f"(?{draw(st.sampled_from(['=', '!', ':']))}{draw(part)})"


def matched(tree, names):
    matcher = NameMatcher(names)
    return matcher.names_at(matcher.places(tree))


@given(expressions(), st.lists(st.text("ab1.-é", min_size=1, max_size=9), min_size=1, unique=True))
def test_expressions_fit_what_they_fit_in_re(text, names):
    assert matched(parse_regex(text), names) == [name for name in names if re.match(text, name)]


@given(
    st.lists(st.sampled_from(["a", "b", "*", "?", "[ab]", "[!a]", "[]a]", "[a-b]", "-", "]"])),
    st.lists(st.text("ab1.-]", max_size=9), min_size=1, unique=True),
)
def test_globs_fit_what_they_fit_in_fnmatch(parts, names):
    glob = "".join(parts)
    assert matched(parse_glob(glob), names) == [n for n in names if fnmatch.fnmatchcase(n, glob)]


@pytest.mark.parametrize("text", WRITTEN)
def test_what_is_written_fits_as_in_compressed_tensors(text):
    modules = [name.removesuffix(".weight") for name in NAMES]
    wanted = {name for name in modules if match_name(name, text)}
    found = select([text], modules)
    assert found.faults == ()
    assert found.names == wanted
    assert select([text], NAMES).names >= {n for n in NAMES if n.removesuffix(".weight") in wanted}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_patterns_cost_little(text, monkeypatch):
    steps = []
    count = NameMatcher._count
    monkeypatch.setattr(NameMatcher, "_count", lambda *a: (steps.append(1), count(*a)))
    names = [*NAMES, "a" * 200, "x" * 200]
    assert select([text], names).names <= {"a" * 200}
    assert len(steps) < 200_000


def test_patterns_without_end_are_told(monkeypatch):
    monkeypatch.setattr(name_matcher, "MAX_WORK", 10**8)
    matcher = NameMatcher(["a" * 300])
    with pytest.raises(TooCostly):
        matcher.places(parse_regex("((((a*b|a)*c|a)*d|a)*e|a)*" * 50))
    found = select(["lm_head", *(f"re:.*{i}x.*" for i in range(10**5))], NAMES)
    assert found.names == {"lm_head.weight"}
    assert "takes too long" in found.faults[0]
    with pytest.raises(UsageError, match="takes too long"):
        Pattern("re:" + "((((a*b|a)*c|a)*d|a)*e|a)*" * 50).matches("a" * 300)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (r"(a)\1", "backreferences"), ("(?P<n>a)(?P=n)", "groups that begin with"),
        ("(", "closed"),
        ("a++", "possessive"), ("(?>a)", "groups that begin with"), ("a)", "closes nothing"),
        ("[a", "midst"), ("*a", "nothing to repeat"), ("a**", "two repetitions"),
        ("a{3,1}", "no rep"),
        (r"\q", "means nothing"), ("[b-a]", "range"), ("(" * 41 + ")" * 41, "deep"),
        ("\\", "midst"),
        ("a" * 100_001, "characters"), ("(?s:.)", "groups that begin with"),
        (r"\x1", "no character"),
    ],
)  # fmt: skip
def test_what_is_not_read_says_so(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_regex(text)
    with pytest.raises(UsageError, match=reason):
        Pattern(f"re:{text}").matches("a")


@pytest.mark.filterwarnings("ignore:Possible :FutureWarning")  # Python's of `[[]`, as it reads it
@given(st.text("()[]{}*+?|\\^$.-,:=!<>Pab1x", max_size=30))
@example("[[]")
def test_no_text_is_more_than_refused(text):
    try:
        tree = parse_regex(text)
    except ValueError:
        return
    try:
        theirs = re.compile(text)
    except re.error:
        assume(False)
    names = ["a", "b1", "ab.a", "x-", "((", "]"]
    assert matched(tree, names) == [name for name in names if theirs.match(name)]


def test_a_list_with_an_unread_pattern_is_written_anew():
    stated = {"quant_method": "compressed-tensors", "ignore": [r"re:(.)\1"], "other": 1}
    new = with_kept(stated, ["lm_head"], ["a.weight"])
    assert new == {**stated, "ignore": ["lm_head"]}
    kept = {**stated, "ignore": ["re:.*head"]}
    assert with_kept(kept, ["lm_head"], ["a.weight"]) == kept


def test_a_checkpoint_with_hostile_patterns_is_read_and_told_of(golden_block, tmp_path):
    shutil.copytree(golden_block, tmp_path / "c")
    texts = ["re:(.+)+!", r"re:(a)\1"]
    edit_json(
        tmp_path / "c/config.json", lambda v: v["quantization_config"]["ignore"].extend(texts)
    )
    report = json.dumps(lingconv.inspect(tmp_path / "c").to_json())
    assert "`ignore`" in report
    assert "backreferences" in report
    assert "pattern `re:(.+)+!`" not in report
