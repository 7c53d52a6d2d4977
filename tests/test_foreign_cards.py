"""Records and cards that others wrote: what is carried on of them, and how they are shown."""

import json

import pytest
import yaml

from lingconv.errors import CheckpointError
from lingconv.execution.closing.closing_files import _json
from lingconv.execution.closing.model_card import CardInputs, model_card, published_record
from lingconv.storage.local import LocalStorage
from lingconv.storage.provenance import read_source_record

RECORD = {
    "lingconv": "0.1.0",
    "source": "/a/b",
    "revision": "r|`\n# x",
    "plan_digest": "0",
    "options": {"layout": "hf", "dtype": "", "merged": ""},
    "encodings": {"bf16": 1},
    "dropped": {},
}


def read_back(folder, data):
    (folder / "lingconv.json").write_bytes(data)
    return read_source_record(LocalStorage(folder))


@pytest.mark.parametrize(
    "text",
    ["[]", "5", '{"a":' * 2000 + "1" + "}" * 2000, "", "\xff", '{"source": 5}',
     '{"sources": [1]}'],
    ids=range(7),
)  # fmt: skip
def test_a_record_of_something_else_is_none(tmp_path, text):
    assert read_back(tmp_path, text.encode("latin-1")) is None


def test_ancestors_that_are_something_else_are_left_out(tmp_path):
    kept = {"source": "a", "other": [1], "source_record": {"source": "b"}}
    assert read_back(tmp_path, json.dumps(kept).encode()) == kept
    odd = {"source": "a", "source_record": {"source": 5}}
    assert read_back(tmp_path, json.dumps(odd).encode())["source_record"] == {}


@pytest.mark.parametrize(
    "front",
    ["tags: [[1]]", "tags: x", "eval_results: 5", "license: [1, {a: 2}]", "a: " + "[" * 3000,
     "a: " + "[" * 3000 + "]" * 3000, "1: 2", "model-index: 5", "base_model: {a: b}", "- x",
     "ignore_metadata_errors: 1", "a: &a [*a]", "a: !!python/object:os.system x", "a: \ud800"],
    ids=range(14),
)  # fmt: skip
def test_odd_front_matter_spoils_no_card(front):
    card = model_card(CardInputs(RECORD, {}, f"---\n{front}\n---\nits text\n"))
    parsed = yaml.safe_load(card.split("---\n")[1])
    assert parsed["library_name"] == "transformers"
    assert "lingconv" in parsed["tags"]
    assert all(isinstance(tag, str) for tag in parsed["tags"])
    assert "its text" in card


def test_names_are_no_markup():
    record = {**RECORD, "source": "/x/a`|[b](http:c)<img>\n---\nlicense: mit\x1b[2J"}
    card = model_card(CardInputs(record, {}))
    line = next(line for line in card.splitlines() if line.startswith("| source"))
    assert r"a\`\|\[b\](http:c)\<img\>" in line
    assert "\x1b" not in card
    assert "license" not in yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("change", [{"source": 5}, {"options": []}, {"encodings": 3}])
def test_a_folder_with_another_record_is_told(change):
    with pytest.raises(CheckpointError, match=r"lingconv\.json"):
        model_card(CardInputs({**RECORD, **change}, {}))


def test_of_another_record_only_what_is_usable_is_published():
    record = {"source": 5, "sources": [{"uri": "/home/me/x"}, 3], "source_record": {"source": "/b"}}
    told = json.loads(published_record(record))
    assert told == {"source_record": {"source": "b"}}


def test_halves_of_characters_are_written_as_json_writes_them():
    value = {"a": "\ud800 \udce9 é"}
    assert json.loads(_json(value).decode("utf-8")) == value
