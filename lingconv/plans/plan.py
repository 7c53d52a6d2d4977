"""The plan: every output file, every byte range in it, and the source ranges that fill it.

A Plan is a frozen value with a JSON form and a digest. It has names, shapes and byte ranges, but no
tensor data; it opens no file, and imports neither torch nor numba. `planner/` builds one.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from lingconv.encodings import Encoding, encoding_from_json, encoding_to_json
from lingconv.encodings.dtypes import DTYPES, GGML_TYPES
from lingconv.encodings.scaling import Rule, Scaling, Search
from lingconv.encodings.tensor_spec import TensorSpec, tensor_spec
from lingconv.errors import UsageError
from lingconv.plans.key_values import Metadata, value_from_json, value_to_json
from lingconv.plans.options import ConvertOptions
from lingconv.plans.tensor_map import ByteRange, MatrixSlice, StoredMatrix, in_runs
from lingconv.storage import FileStat
from lingconv.storage.stated_sums import StatedSum

SCHEMA = "lingconv.plan/4"


class Source(NamedTuple):
    """A checkpoint that is read: its files, and its weight where several are averaged.

    `revision` describes its version, as far as that is known; `checksums` are what its files state
    of ranges of their own bytes.
    """

    uri: str
    files: Mapping[str, FileStat]
    weight: float = 1.0
    revision: str = ""
    checksums: Mapping[str, tuple[StatedSum, ...]] = MappingProxyType({})


class Term(NamedTuple):
    """The segments that fill a matrix, from its first row to its last, in one or more sources.

    `sources` are their numbers in the plan; the segments are the same in all of them.
    """

    sources: tuple[int, ...]
    segments: tuple[MatrixSlice, ...]


class Transfer(NamedTuple):
    """One target matrix and the terms that fill it: one source, or the average of all sources.

    `copies`: bytes are copied unchanged; otherwise rows are decoded and encoded. `peers` are the
    terms of other matrices of the same shape that share a scale of the whole matrix with it.
    """

    target: StoredMatrix
    terms: tuple[Term, ...]
    scaling: Scaling
    copies: bool
    peers: tuple[tuple[Term, ...], ...] = ()

    @property
    def is_average(self) -> bool:
        """Whether there is more than one source."""
        return len(self.terms) > 1 or len(self.terms[0].sources) > 1

    @property
    def segments(self) -> tuple[MatrixSlice, ...]:
        """The segments that fill the matrix in the last source."""
        return self.terms[-1].segments

    @property
    def rows(self) -> int:
        """Number of rows of the target matrix."""
        return self.target.rows

    @property
    def filled_rows(self) -> int:
        """Number of rows that segments fill; the rest are zeros (a padded vocabulary)."""
        elements = sum(segment.num_rows * segment.num_cols for segment in self.segments)
        return elements // self.cols

    @property
    def cols(self) -> int:
        """Number of elements in a row."""
        return self.target.cols


def in_term_runs(transfer: Transfer, counts: Sequence[int]) -> Iterator[tuple[Term, ...]]:
    """Yield the terms of consecutive runs of rows of a transfer, `counts` rows each."""
    runs = [in_runs(term.segments, transfer.cols, counts) for term in transfer.terms]
    for beside in zip(*runs, strict=True):
        yield tuple(
            term._replace(segments=segments)
            for term, segments in zip(transfer.terms, beside, strict=True)
        )


class OutputFile(NamedTuple):
    """A weight file: its tensors in the order of their bytes, and the transfers that fill it.

    `container` is the name of its format. `metadata` are the key-values of a GGUF file, `state` the
    contents of a legacy per-rank file besides tensors; None for other formats.
    """

    name: str
    nbytes: int
    tensors: tuple[TensorSpec, ...]
    transfers: tuple[Transfer, ...]
    container: str = "safetensors"
    metadata: Metadata | None = None
    state: Mapping[str, Any] | None = None


class Dropped(NamedTuple):
    """A source tensor or file that is not in the target, and the reason."""

    name: str
    nbytes: int
    reason: str


@dataclass(frozen=True, repr=False)
class Plan:
    """A conversion as a value.

    The last of several `sources` (oldest first) is the base: the target gets its config and small
    files. `weighting` names how the weights were chosen.
    `args` are the arguments in Megatron's formats, `states` the keys of the modules' states in
    torch_dist, each with the number of its shards.
    """

    sources: tuple[Source, ...]
    family: str
    options: ConvertOptions
    files: tuple[OutputFile, ...]
    side_files: Mapping[str, int]
    config: Mapping[str, Any]
    dropped: tuple[Dropped, ...]
    total_parameters: int
    warnings: tuple[str, ...]
    args: Mapping[str, Any] | None = None
    states: tuple[tuple[str, int], ...] = ()
    weighting: str = ""

    def __repr__(self) -> str:
        return (
            f"<Plan {self.digest[:12]}: {self.source} -> {self.options.layout},"
            f" {len(self.files)} files, {self.write_bytes:,} bytes>"
        )

    @property
    def source(self) -> str:
        """The sources, as text."""
        if self.weighting:
            return f"{self.weighting} of {len(self.sources)} checkpoints"
        return self.sources[-1].uri

    @property
    def source_files(self) -> dict[str, FileStat]:
        """All source files by name; with several sources, each name is prefixed with its URI."""
        if not self.weighting:
            return dict(self.sources[-1].files)
        return {
            f"{source.uri}/{name}": stat
            for source in self.sources
            for name, stat in source.files.items()
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that determines the output's bytes; time stamps are left out."""
        encodings = _Numbers()
        sha = hashlib.sha256()
        for file in self.files:
            sha.update(f"{file.name} {file.nbytes} {file.container}\n".encode())
            sha.update(json.dumps([_metadata_to_json(file.metadata), file.state]).encode())
            sha.update("".join(_line(t, encodings) for t in file.transfers).encode())
        rest = {
            "schema": SCHEMA,
            "sources": [
                [{name: stat.size for name, stat in source.files.items()}, source.weight]
                for source in self.sources
            ],
            "weighting": self.weighting,
            "family": self.family,
            "options": self.options.to_json(),
            "encodings": [encoding_to_json(encoding) for encoding in encodings.seen],
            "side_files": dict(self.side_files),
            "config": self.config,
            "dropped": self.dropped,
            "args": self.args,
            "states": self.states,
        }
        sha.update(json.dumps(rest, sort_keys=True).encode())
        return sha.hexdigest()

    @property
    def write_bytes(self) -> int:
        """Number of bytes of all weight files and carried-over files."""
        return sum(file.nbytes for file in self.files) + sum(self.side_files.values())

    @cached_property
    def read_bytes(self) -> int:
        """Number of bytes read from the sources' weight files."""
        return sum(
            len(term.sources) * segment.nbytes
            for transfer in self.transfers()
            for term in transfer.terms
            for segment in term.segments
        )

    @property
    def tensor_bytes(self) -> int:
        """Number of bytes of all target tensors: the index's `total_size`."""
        return sum(spec.nbytes for file in self.files for spec in file.tensors)

    def transfers(self) -> Iterator[Transfer]:
        """Yield the transfers of all files."""
        for file in self.files:
            yield from file.transfers

    @cached_property
    def encodings(self) -> dict[str, int]:
        """Return the number of target matrices of each encoding, by label."""
        counts = Counter(transfer.target.encoding for transfer in self.transfers())
        return {encoding.label: count for encoding, count in counts.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values; parts that repeat are stored once and referenced."""
        encodings = _Numbers()
        files = [_file_to_json(file, encodings) for file in self.files]
        return {
            "schema": SCHEMA,
            "sources": [
                {
                    "uri": source.uri,
                    "files": {name: list(stat) for name, stat in source.files.items()},
                    "weight": source.weight,
                    "revision": source.revision,
                    "checksums": {name: list(map(list, s)) for name, s in source.checksums.items()},
                }
                for source in self.sources
            ],
            "weighting": self.weighting,
            "family": self.family,
            "options": self.options.to_json(),
            "encodings": [encoding_to_json(encoding) for encoding in encodings.seen],
            "files": files,
            "side_files": dict(self.side_files),
            "config": self.config,
            "dropped": [list(item) for item in self.dropped],
            "total_parameters": self.total_parameters,
            "warnings": list(self.warnings),
            "args": self.args,
            "states": [list(state) for state in self.states],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Plan":
        """Return the plan that `to_json` wrote; raises UsageError for another schema."""
        if value.get("schema") != SCHEMA:
            raise UsageError(f"not a plan of schema {SCHEMA}: {value.get('schema')!r}")
        encodings = [encoding_from_json(item) for item in value["encodings"]]
        return cls(
            sources=tuple(
                Source(
                    item["uri"],
                    {name: FileStat(*stat) for name, stat in item["files"].items()},
                    item["weight"],
                    item["revision"],
                    {
                        name: tuple(StatedSum(*stated) for stated in sums)
                        for name, sums in item.get("checksums", {}).items()
                    },
                )
                for item in value["sources"]
            ),
            weighting=value["weighting"],
            family=value["family"],
            options=ConvertOptions.from_json(value["options"]),
            files=tuple(_file_from_json(item, encodings) for item in value["files"]),
            side_files=value["side_files"],
            config=value["config"],
            dropped=tuple(Dropped(*item) for item in value["dropped"]),
            total_parameters=value["total_parameters"],
            warnings=tuple(value["warnings"]),
            args=value["args"],
            states=tuple((key, shards) for key, shards in value["states"]),
        )


class _Numbers:
    """Numbers of encodings in the order of first use, so that each is written in full once."""

    def __init__(self) -> None:
        self.seen: dict[Encoding, int] = {}

    def of(self, encoding: Encoding) -> int:
        return self.seen.setdefault(encoding, len(self.seen))


def _line(transfer: Transfer, encodings: _Numbers) -> str:
    """Return a transfer as a line of text, for the digest."""
    sources = _describe_terms(transfer.terms, encodings)
    scaling = f"{transfer.scaling.min_amax!r} {transfer.scaling.power_of_two}"
    target = _describe(transfer.target, encodings)
    line = f"{target} < {sources} | {scaling} {transfer.copies}"
    policy = [word for word in transfer.scaling[2:] if word not in (Search.NONE, Rule.QUOTIENT)]
    peers = [_describe_terms(terms, encodings) for terms in transfer.peers]
    return " | ".join([line, *policy, *peers]) + "\n"


def _describe_terms(terms: Sequence[Term], encodings: _Numbers) -> str:
    return " < ".join(
        f"{term.sources} {_describe(segment.source, encodings)}"
        f" {segment.first_row}+{segment.num_rows} {segment.first_col}+{segment.num_cols}"
        for term in terms
        for segment in term.segments
    )


def _describe(stored: StoredMatrix, encodings: _Numbers) -> str:
    places = " ".join(f"{e.file}@{e.offset}+{e.nbytes}" for e in stored.extents)
    number = encodings.of(stored.encoding)
    return f"{stored.name} {stored.shape} x{stored.stack} /{stored.pitch} #{number} {places}"


def _metadata_to_json(metadata: Metadata | None) -> dict[str, Any] | None:
    if metadata is None:
        return None
    return {key: value_to_json(value) for key, value in metadata.items()}


def _metadata_from_json(value: Mapping[str, Any] | None) -> Metadata | None:
    if value is None:
        return None
    return {key: value_from_json(fields) for key, fields in value.items()}


def _file_to_json(file: OutputFile, encodings: _Numbers) -> dict[str, Any]:
    return {
        "name": file.name,
        "bytes": file.nbytes,
        "container": file.container,
        "metadata": _metadata_to_json(file.metadata),
        "state": file.state,
        "tensors": [[spec.name, spec.dtype, spec.shape, spec.offsets] for spec in file.tensors],
        "transfers": [
            {
                "target": _stored_to_json(transfer.target, encodings),
                "from": _terms_to_json(transfer.terms, encodings),
                "scaling": list(transfer.scaling),
                "copies": transfer.copies,
                **_peers_to_json(transfer.peers, encodings),
            }
            for transfer in file.transfers
        ],
    }


def _file_from_json(value: Mapping[str, Any], encodings: list[Any]) -> OutputFile:
    return OutputFile(
        value["name"],
        value["bytes"],
        tuple(
            tensor_spec(name, DTYPES.get(dtype) or GGML_TYPES[dtype], tuple(shape), tuple(offsets))
            for name, dtype, shape, offsets in value["tensors"]
        ),
        tuple(
            Transfer(
                _stored_from_json(item["target"], encodings),
                _terms_from_json(item["from"], encodings),
                _scaling_from_json(item["scaling"]),
                item["copies"],
                tuple(_terms_from_json(terms, encodings) for terms in item.get("peers", ())),
            )
            for item in value["transfers"]
        ),
        value["container"],
        _metadata_from_json(value["metadata"]),
        value["state"],
    )


def _peers_to_json(
    peers: Sequence[Sequence[Term]], encodings: _Numbers
) -> dict[str, list[list[dict[str, Any]]]]:
    return {"peers": [_terms_to_json(terms, encodings) for terms in peers]} if peers else {}


def _scaling_from_json(value: Sequence[Any]) -> Scaling:
    min_amax, power_of_two, *words = value
    search, rule = words or (Search.NONE, Rule.QUOTIENT)
    return Scaling(min_amax, power_of_two, Search(search), Rule(rule))


def _terms_to_json(terms: Sequence[Term], encodings: _Numbers) -> list[dict[str, Any]]:
    return [
        {
            "sources": term.sources,
            "segments": [
                [_stored_to_json(source, encodings), *window] for source, *window in term.segments
            ],
        }
        for term in terms
    ]


def _terms_from_json(value: Sequence[Mapping[str, Any]], encodings: list[Any]) -> tuple[Term, ...]:
    return tuple(
        Term(
            tuple(term["sources"]),
            tuple(
                MatrixSlice(_stored_from_json(stored, encodings), *window)
                for stored, *window in term["segments"]
            ),
        )
        for term in value
    )


def _stored_to_json(stored: StoredMatrix, encodings: _Numbers) -> list[Any]:
    extents = [list(extent) for extent in stored.extents]
    number = encodings.of(stored.encoding)
    columns = [stored.pitch, stored.stored_as]
    return [stored.name, list(stored.shape), number, extents, stored.stack, columns]


def _stored_from_json(value: list[Any], encodings: list[Any]) -> StoredMatrix:
    name, shape, number, extents, stack, (pitch, stored_as) = value
    places = tuple(ByteRange(*item) for item in extents)
    return StoredMatrix(
        name, tuple(shape), encodings[number], places, stack, (), pitch, tuple(stored_as)
    )
