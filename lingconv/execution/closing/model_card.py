"""The model card of what lingconv wrote: whose it is, what was done, how it was checked and loads.

It is made of the record that lies beside the weights (lingconv.json), so that a folder is described
as well as a conversion that has just ended. The source's own card follows below, its front matter's
keys are kept.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.utils import yaml_dump
from jinja2 import Environment, StrictUndefined, Template

from lingconv.encodings.quantization_config import KEY
from lingconv.errors import CheckpointError
from lingconv.errors.value_kinds import checked
from lingconv.plans.options import FourBitOptions, Target, TargetDType
from lingconv.plans.runtimes import encoding_word, loaders, without_mtp
from lingconv.storage.file_names import MARK, RECORD_NAME
from lingconv.storage.front_matter import FrontMatterError, load_front_matter, split_card
from lingconv.storage.provenance import RECORD_FIELDS, public_name, repository_of, without_paths

_NEEDED = ("source", "options", "encodings", "dropped")
_MARKUP = re.compile(r"[\\`*\[\]<>|#~$]")
END_MARK = "<!-- what follows is the source's own card -->"
_MERGE, _QUANTIZED = "merge", "quantized"
# What labels of encodings begin with, as tags.
_KINDS = ("fp8", "nvfp4", "mxfp4", "int4")
_FLOAT_OUTTYPES = ("auto", "f32", "f16", "bf16")
_FORWARD_NAMES = {
    "mean_kld": "Mean KLD",
    "max_kld": "Maximum KLD",
    "kld_999": "99.9% KLD",
    "median_kld": "Median KLD",
    "rms_dp": "RMS dp",
    "same_top_p": "Same top p",
}


@dataclass(frozen=True, slots=True)
class CardInputs:
    """What a card is made of.

    `record` is lingconv.json, `base_card` the source's README.md, `verdict` what `verify --json`
    printed; `report` is the name of its HTML report among the files.
    """

    record: Mapping[str, Any]
    config: Mapping[str, Any]
    base_card: str = ""
    repository: str = ""
    first_file: str = ""
    verdict: Mapping[str, Any] | None = None
    report: str = ""


def model_card(described: CardInputs) -> str:
    """Return README.md; raise CheckpointError for a record that lingconv did not write."""
    described = replace(described, record=_checked_record(described.record))
    data, text = _parse(described.base_card)
    if MARK in text:  # a card of lingconv's own: the part that it made is made anew
        text = text.partition(END_MARK)[2]
    with _record_is_read():
        front = _to_yaml(_front_matter(described, data))
        section = _section(described).strip()
    rest = f"\n\n{END_MARK}\n\n{text.strip()}" if text.strip() else ""
    return f"---\n{front}\n---\n{section}{rest}\n"


def _checked_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record that has what a card is made of."""
    needed = {key: RECORD_FIELDS[key]._replace(required=True) for key in _NEEDED}
    good, faults = checked(record, {**RECORD_FIELDS, **needed}, RECORD_NAME)
    if faults:
        raise CheckpointError(
            f"{RECORD_NAME} is none that lingconv wrote",
            faults=faults,
            hint="remove it from the folder, or restore it",
        )
    return good


def published_record(record: Mapping[str, Any]) -> bytes:
    """Return lingconv.json as it is published. Raises CheckpointError as `model_card` does."""
    with _record_is_read():
        told = json.dumps(without_paths(record), indent=2, ensure_ascii=False)
    return f"{told}\n".encode("utf-8", "backslashreplace")


@contextmanager
def _record_is_read() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError) as exc:
        raise CheckpointError(
            f"{RECORD_NAME} is not what lingconv writes: {exc!r}",
            hint=f"move {RECORD_NAME} away: the weights do not need it",
        ) from exc


def _inline(text: str) -> str:
    """Return a name as Markdown is to show it in a line or a cell: no mark-up, no line end."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    return _MARKUP.sub(r"\\\g<0>", printable)


def _parse(card: str) -> tuple[dict[str, Any], str]:
    """Return the front matter of a card and its text; what cannot be parsed is all text."""
    parts = split_card(card)
    try:
        data = load_front_matter(parts.yaml)
    except FrontMatterError:
        return {}, card
    return {key: value for key, value in data.items() if value is not None}, parts.text


def _to_yaml(data: dict[str, Any]) -> str:
    """Return front matter as the Hub's library writes it, as far as that takes what stands there.

    It knows better what a list of results means, and refuses with all kinds of errors.
    """
    try:
        return str(ModelCardData(ignore_metadata_errors=True, **data).to_yaml())
    except Exception:
        return yaml_dump(data, sort_keys=False).strip()


def _front_matter(described: CardInputs, data: dict[str, Any]) -> dict[str, Any]:
    """Return the base's keys with what is true of this checkpoint."""
    record = described.record
    bases = list(dict.fromkeys(filter(None, map(repository_of, _origins(record)))))
    relation = _relation(record)
    if bases:
        data["base_model"] = bases if len(bases) > 1 or relation == _MERGE else bases[0]
        data.pop("base_model_relation", None)
        if relation:
            data["base_model_relation"] = relation
    layout = record["options"]["layout"]
    if layout == Target.HF:
        data.setdefault("library_name", "transformers")
    else:
        data.pop("library_name", None)
    if layout in (Target.HF, Target.GGUF):
        data.setdefault("pipeline_tag", "text-generation")
    own = {
        _MERGE: relation == _MERGE,
        Target.GGUF.value: layout == Target.GGUF,
        **{word: any(label.startswith(word) for label in record["encodings"]) for word in _KINDS},
        "compressed-tensors": _method(described) == "compressed-tensors",
        "modelopt": _method(described) == "modelopt",
        "lingconv": True,
    }
    # What is true of the base alone goes: people look for models by these.
    kept = [tag for tag in _tags(data.get("tags")) if own.get(tag.lower(), True)]
    data["tags"] = list(dict.fromkeys([*kept, *(tag for tag, holds in own.items() if holds)]))
    return data


def _method(described: CardInputs) -> str:
    """Return `quant_method` of the config, or nothing."""
    stated = described.config.get(KEY)
    return str(stated.get("quant_method", "")) if isinstance(stated, dict) else ""


def _tags(value: Any) -> list[str]:
    """Return the tags of a card: one, or a list of them; a year is a tag too, a list is none."""
    held = value if isinstance(value, list) else [value]
    return [str(tag) for tag in held if isinstance(tag, (str, int, float)) and tag != ""]


def _origins(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the sources of a checkpoint, each as far back as records know it."""
    if len(record.get("sources", ())) > 1:
        yield from (source["uri"] for source in record["sources"])
        return
    while True:
        before = record.get("source_record") or {}
        if repository_of(record["source"]) or "source" not in before:
            yield record["source"]
            return
        record = before


def _relation(record: Mapping[str, Any]) -> str:
    """Return how a checkpoint relates to its base, in the Hub's words; none for a plain copy."""
    options = record["options"]
    if len(record.get("sources", ())) > 1:
        return _MERGE
    quantized = options["dtype"] in _KINDS or (
        options["layout"] == Target.GGUF and options["gguf"]["outtype"] not in _FLOAT_OUTTYPES
    )
    return _QUANTIZED if quantized else ""


def _section(described: CardInputs) -> str:
    """Return the part of the card that says what was done."""
    record, config = described.record, described.config
    sources = record.get("sources", ()) if len(record.get("sources", ())) > 1 else ()
    layout = record["options"]["layout"]
    named = f"{layout}+{record['options']['merged']}" if layout == Target.HF_MERGED else layout
    encoding = encoding_word(config, record["encodings"])
    return _template().render(
        mark=MARK,
        title=_inline(_title(described)),
        what=_what(record),
        provenance=list(_provenance(described)),
        sources=[
            (
                _inline(public_name(source["uri"])),
                _inline(source["revision"] or "-"),
                f"{source['weight']:.9g}",
            )
            for source in sources
        ],
        left_out=[
            (_inline(reason), held["count"], f"{held['bytes']:,} bytes")
            for reason, held in record["dropped"].items()
        ],
        proof=_proof(described),
        loaders=loaders(named, encoding, config, described.repository, described.first_file)
        if described.repository
        else [],
        without_mtp=without_mtp(named, encoding, config),
    )


def _template() -> Template:
    """Return the template of a card: Markdown, so nothing is escaped."""
    text = (files("lingconv.execution.closing") / "card.md.jinja").read_text("utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(text)


def _title(described: CardInputs) -> str:
    sources = described.record.get("sources", ())
    if described.repository:
        return described.repository.rpartition("/")[2]
    if len(sources) > 1:
        return f"An average of {len(sources)} checkpoints"
    return public_name(described.record["source"])


def _what(record: Mapping[str, Any]) -> str:
    """Return one sentence: what this is."""
    sources = record.get("sources", ())
    stored = ", ".join(record["encodings"])
    if len(sources) > 1:
        how = str(record.get("weighting", "an average")).capitalize()
        return (
            f"{how} of {len(sources)} checkpoints, summed in float64 and rounded once,"
            f" stored as {stored}."
        )
    name, relation = _inline(public_name(next(_origins(record)))), _relation(record)
    done = "quantized" if relation == _QUANTIZED else "converted, every number kept as it was read"
    if record["options"]["dtype"] in ("bf16", "f16", "f32"):
        done = f"converted to {record['options']['dtype'].upper()}"
    return f"{name}, {done}: layout `{record['options']['layout']}`, stored as {stored}."


def _scale_dtype(record: Mapping[str, Any]) -> str:
    """Return the dtype of FP8's scales, by the label of its encoding."""
    label = next((each for each in record["encodings"] if each.startswith("fp8")), "")
    return label.removesuffix(" scales").rpartition(" ")[2].replace("ue8m0", "f32")


def _four_bits(described: CardInputs, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield how weights of four bits were made."""
    yield f"dialect {_inline(_method(described) or options['dialect'])}"
    if options["search"] != "none":
        yield f"scales searched: {options['search']}"
    if options["inputs"]:
        yield "input scales of 1.0, assumed and not measured (W4A4)"
    else:
        yield "weights only (activations stay in 16 bits)"
    yield from (f"{_inline(pattern)} quantized" for pattern in options["include"])
    yield from (f"{_inline(pattern)} kept" for pattern in options["ignore"])


def _provenance(described: CardInputs) -> Iterator[tuple[str, str]]:
    record = described.record
    if len(record.get("sources", ())) <= 1:
        yield "source", _inline(public_name(record["source"]))
        if record.get("revision"):
            yield "revision", _inline(record["revision"])
    yield "made by", f"lingconv {record['lingconv']}"
    yield "plan", f"`{record['plan_digest']}`"
    if record["options"]["dtype"] == TargetDType.FP8:
        fp8 = record["options"]["fp8"]
        dialect = _method(described) or fp8["dialect"]
        words = [f"dialect {_inline(dialect)}", f"{fp8['scheme']} scales"]
        words += [f"rounded by rule {fp8['scale']}", f"stored in {_scale_dtype(record)}"]
        words += [f"{_inline(pattern)} kept" for pattern in fp8["ignore"]]
        yield "FP8", ", ".join(words)
    if record["options"]["dtype"] in _KINDS[1:]:
        four_bits = record["options"].get("four_bits", asdict(FourBitOptions()))
        yield record["options"]["dtype"].upper(), ", ".join(_four_bits(described, four_bits))
    if record["options"]["layout"] == Target.GGUF:
        yield "GGUF", f"`{record['options']['gguf']['outtype']}`"


def _proof(described: CardInputs) -> dict[str, Any] | None:
    """Return the numbers of a verdict."""
    verdict = described.verdict
    if verdict is None:
        return None
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for tensor in verdict["tensors"]:
        key = f"{tensor['source']} -> {tensor['target']}"
        groups.setdefault(key, []).append(tensor)
    answer = "passed" if verdict["ok"] else f"FAILED with {len(verdict['findings'])} findings"
    forward = verdict["forward"]
    figures: Sequence[tuple[str, str]] = ()
    if forward:
        figures = [(n, f"{forward['logits'][key]:.6g}") for key, n in _FORWARD_NAMES.items()]
    return {
        "summary": f"`lingconv verify --level {verdict['level']}` against the source: {answer}.",
        "report": described.report,
        "rows": [_row(name, tensors) for name, tensors in groups.items()],
        "logits": figures,
    }


def _row(name: str, tensors: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return a line of the table: how many tensors, how many equal, and the worst of them."""
    worst = max(tensors, key=lambda tensor: tensor["rel_error"] or 0.0)
    equal = sum(not tensor["rel_error"] for tensor in tensors)
    snr = worst["snr_db"]
    return (
        name,
        f"{len(tensors):,}",
        f"{equal:,}",
        f"{worst['rel_error'] or 0.0:.3g}",
        "exact" if snr is None else f"{snr:.1f} dB",
    )
