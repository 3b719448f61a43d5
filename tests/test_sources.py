"""Sources to documents: every kind of file, in an order of its own, and damage that is named."""

import codecs
import csv
import gzip
import io
import json
import os
import sysconfig
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

import groundup.data.sources as sources_module
from groundup.data.sources import ReadOptions, SourceReport, documents
from groundup.errors import DataError
from tests.conftest import groundup


def read(source, **options):
    """The documents of a source as (name, text), and the report."""
    report = SourceReport()
    found = [(document.name, "".join(document.open())) for document in documents(str(source), ReadOptions(**options), report)]
    return found, report


def names(source):
    return [name for name, _ in read(source)[0]]


def zstd(data):
    return zstandard.ZstdCompressor().compress(data)


# --- one file ---


def test_a_text_file_is_one_document_kept_byte_for_byte(tmp_path):
    path = tmp_path / "a.txt"
    text = "\ufeffa\r\nb\rc\n\x00".replace("\x00", "") + "\u2028 \x1b[0m é日\U0001f600\n"
    path.write_bytes(text.encode())
    assert read(path)[0] == [("a.txt", text)]


def test_a_document_can_be_opened_again(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (document,) = documents(str(tmp_path / "a.txt"), ReadOptions(), SourceReport())
    assert "".join(document.open()) == "".join(document.open()) == "abc"


def test_nul_late_in_a_text_is_kept_and_early_means_binary(tmp_path):
    late = tmp_path / "late.txt"
    late.write_bytes(b"x" * sources_module.SNIFF_BYTES + b"\0end")
    assert read(late)[0][0][1].endswith("\0end")
    early = tmp_path / "early.txt"
    early.write_bytes(b"x\0")
    with pytest.raises(DataError, match=r"early.txt: is binary, not UTF-8 text"):
        read(early)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes((codecs.BOM_UTF16_LE if encoding == "utf-16-le" else codecs.BOM_UTF16_BE) + "text".encode(encoding))
    with pytest.raises(DataError, match=r"a.txt: is UTF-16, not UTF-8 text; convert it"):
        read(path)


def test_a_missing_source_is_named(tmp_path):
    for missing in ("nowhere", "a" * 300, "text.txt/below"):
        (tmp_path / "text.txt").write_text("x")
        with pytest.raises(DataError, match=f"{missing}: not found"):
            read(tmp_path / missing)


# --- invalid UTF-8 ---

# What a decoder must count as one replacement each: Unicode 15, chapter 3.9, "maximal subparts".
INVALID = [
    (b"\xff", 1), (b"\xc3", 1), (b"\xe2\x82", 1), (b"\xf0\x9f\x98", 1), (b"\xc0\xaf", 2), (b"\xed\xa0\x80", 3),
    (b"\xf5\x80", 2), (b"\x80\x80", 2), (b"\xe2\x28", 1), (b"\xf0\x9fa", 1), (b"a\xffb\xfec", 2), (b"\xe2\xef\xbf\xbd", 1),
    (b"\xef\xbf\xbd", 0), (b"\xef\xbf\xbd\xef\xbf", 1), ("é日😀".encode(), 0),
]  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 2**20])
@pytest.mark.parametrize(("data", "count"), INVALID)
def test_replacements_are_counted_exactly_wherever_a_chunk_ends(tmp_path, monkeypatch, data, count, chunk):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", chunk)
    for number, (before, after) in enumerate([(b"", b""), (b"ab", b"cd"), (b"\xef\xbf\xbd", b"\xef\xbf\xbd")]):
        path = tmp_path / f"{number}.txt"
        path.write_bytes(before + data + after)
        found, report = read(path)
        assert found[0][1] == (before + data + after).decode(errors="replace")
        assert report.replaced_sequences == count


@settings(max_examples=200, deadline=None)
@given(
    data=st.lists(st.sampled_from([b"a", "é".encode(), "😀".encode(), b"\xef\xbf\xbd", b"\xff", b"\xe2\x82", b"\xf0\x9f"])),
    chunk=st.integers(1, 6),
)
def test_chunks_change_neither_text_nor_count(tmp_path_factory, data, chunk):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(b"x" + b"".join(data))
    with pytest.MonkeyPatch.context() as patch:
        whole, expected = read(path)
        patch.setattr(sources_module, "CHUNK_BYTES", chunk)
        cut, report = read(path)
    assert cut == whole
    assert report.replaced_sequences == expected.replaced_sequences
    total = b"".join(data)
    assert report.replaced_sequences == total.decode(errors="replace").count("\ufffd") - total.count(b"\xef\xbf\xbd")


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**20])
@pytest.mark.parametrize(
    ("data", "place"),
    [(b"\xff", 0), (b"abc\xff", 3), (b"ab\xe2\x82", 2), ("é😀".encode() + b"\xf0\x9f\x98x", 6), (b"a" * 20 + b"\x80", 20)],
)
def test_strict_stops_at_the_right_byte(tmp_path, monkeypatch, data, place, chunk):
    monkeypatch.setattr(sources_module, "CHUNK_BYTES", chunk)
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"a.txt: byte {place} is not UTF-8"):
        read(path, encoding_errors="strict")


def test_strict_reads_good_text(tmp_path):
    (tmp_path / "a.txt").write_text("é\ufffd😀", encoding="utf-8")
    assert read(tmp_path / "a.txt", encoding_errors="strict")[0][0][1] == "é\ufffd😀"


# --- folders ---


def test_a_folder_is_walked_in_order_of_bytes(tmp_path):
    for name in ("b.txt", "a/z.py", "a/b/c.md", "B.txt", "é.txt", "10", "9", "a.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    assert names(tmp_path) == ["10", "9", "B.txt", "a/b/c.md", "a/z.py", "a.txt", "b.txt", "é.txt"]


def test_gitignore_nested_negated_and_anchored(tmp_path):
    files = {
        ".gitignore": "*.log\n/build\n!keep.log\n# comment\n\ndocs/*\n!docs/api\n",
        "a.log": "", "keep.log": "", "build/x.txt": "", "src/build/y.txt": "", "docs/b.txt": "", "docs/api/c.txt": "",
        "src/.gitignore": "!a.log\n*.tmp\n", "src/a.log": "", "src/b.log": "", "src/c.tmp": "", "d.tmp": "",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or "text")
    # What `git ls-files --others --exclude-standard` lists, less the hidden files.
    assert names(tmp_path) == ["d.tmp", "docs/api/c.txt", "keep.log", "src/a.log", "src/build/y.txt"]
    assert read(tmp_path)[1].skipped == {"hidden": 2, "git-ignored": 5}


@pytest.mark.parametrize("line", ["!", "\\", "a\\", "[", "***", "//"])
def test_a_strange_line_in_gitignore_stops_nothing(tmp_path, line):
    """git passes over a line that is no pattern."""
    (tmp_path / ".gitignore").write_text(f"{line}\n*.log\n" if line != "***" else "*.log\n***x\n")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.log").write_text("text")
    assert names(tmp_path) == ["a.txt"]


def test_hidden_binary_and_utf_16_files_are_skipped_and_counted(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("secret")
    (tmp_path / ".env").write_text("secret")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "b.txt").write_bytes(codecs.BOM_UTF16_LE + "text".encode("utf-16-le"))
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "d.txt").write_text("text")
    found, report = read(tmp_path)
    assert found == [("d.txt", "text")]
    assert report.skipped == {"hidden": 2, "binary": 1, "UTF-16": 1, "empty": 1}


def test_links_that_loop_or_lead_away_are_not_followed(tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.txt").write_text("text")
    (folder / "inner" / "up").symlink_to("..")
    (folder / "parent").symlink_to(tmp_path)
    (folder / "dangling").symlink_to("nowhere")
    found, report = read(folder)
    assert found == [("inner/a.txt", "text")]
    assert report.skipped["not a regular file"] == 3


def test_a_link_to_itself_is_skipped(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "self").symlink_to("self")
    found, report = read(tmp_path)
    assert found == [("a.txt", "text")]
    assert report.skipped == {"not a regular file": 1}


def test_a_file_reached_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    os.link(tmp_path / "a.txt", tmp_path / "b.txt")
    assert names(tmp_path) == ["a.txt"]
    assert read(tmp_path)[1].skipped == {"seen already (link)": 1}


@pytest.mark.parametrize("link", ["0.txt", "z.txt"])
def test_a_link_to_a_file_that_is_there_too_is_read_once(tmp_path, link):
    """Whether the link or the file comes first by name."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / link).symlink_to("a.txt")
    assert [text for _, text in read(tmp_path)[0]] == ["text"]


@pytest.mark.timeout(20)
def test_a_pipe_never_blocks(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    assert names(tmp_path) == ["a.txt"]
    assert read(tmp_path)[1].skipped == {"not a regular file": 1}
    with pytest.raises(DataError, match="pipe: is not a regular file; use -"):
        read(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        read("/dev/zero")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_counted_in_a_folder_and_named_alone(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "b.txt").chmod(0)
    (tmp_path / "closed").mkdir(mode=0)
    found, report = read(tmp_path)
    assert found == [("a.txt", "text")]
    assert report.skipped == {"unreadable": 2}
    with pytest.raises(DataError, match="b.txt: permission denied"):
        read(tmp_path / "b.txt")


def test_a_denied_file_is_counted_in_a_folder_and_named_alone(tmp_path, monkeypatch):
    """As the test above, for root."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    opened = Path.open

    def denied(self, *args, **kwargs):
        if self.name == "b.txt":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    assert read(tmp_path)[1].skipped == {"unreadable": 1}
    with pytest.raises(DataError, match="b.txt: permission denied"):
        read(tmp_path / "b.txt")


def test_names_that_are_no_text_are_read(tmp_path):
    (tmp_path / "a\nb.txt").write_text("one")
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "w") as file:
        file.write("two")
    found = read(tmp_path)[0]
    assert found == [("a\nb.txt", "one"), ("\\xff.txt", "two")]


# --- tables ---

ROWS = ["first", "second\nwith a line", 'quo"ted, and comma', "日本 😀\u2028x", ""]


def write_table(path, rows, column="text"):
    """Write a table of the kind that the name says."""
    kind = path.name.lower()
    if ".jsonl" in kind:
        lines = [json.dumps({"id": n, column: row}, ensure_ascii=n % 2 == 0) for n, row in enumerate(rows)]
        data = "".join(line + "\n" for line in lines).encode()
    elif ".csv" in kind:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerows([["id", column], *enumerate(rows)])
        data = text.getvalue().encode()
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(rows))), column: rows}), path)
        return path
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else zstd(data) if kind.endswith(".zst") else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz", "a.csv.zst", "A.JSONL", "a.jsonl.GZ"])
def test_each_row_is_a_document(tmp_path, name):
    found, report = read(write_table(tmp_path / name, ROWS))
    assert [text for _, text in found] == ROWS[:-1]
    assert all(document.startswith(f"{name}:") for document, _ in found)
    assert len({document for document, _ in found}) == len(found)
    assert report.skipped == {"empty": 1}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_the_text_column_can_be_chosen_and_a_wrong_one_lists_those_there(tmp_path, name):
    path = write_table(tmp_path / name, ROWS, column="content")
    assert [text for _, text in read(path, text_column="content")[0]] == ROWS[:-1]
    with pytest.raises(DataError, match=r"has no column 'text'; --text-column takes one of: id, content"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_table_that_starts_with_a_byte_order_mark_is_read(tmp_path, name):
    """As Excel and PowerShell write it."""
    path = write_table(tmp_path / name, ["one"])
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"id,text", b"text,id").replace(b"0,one", b"one,0"))
    assert [text for _, text in read(path)[0]] == ["one"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_invalid_utf_8_in_a_table_is_counted(tmp_path, name):
    path = write_table(tmp_path / name, ["one", "two X", "three"])
    path.write_bytes(path.read_bytes().replace(b"X", b"\xff"))
    found, report = read(path)
    assert [text for _, text in found] == ["one", "two \ufffd", "three"]
    assert report.replaced_sequences == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_invalid_utf_8_in_a_table_stops_when_strict(tmp_path, name):
    path = write_table(tmp_path / name, ["one", "two X", "three"])
    path.write_bytes(path.read_bytes().replace(b"X", b"\xff"))
    with pytest.raises(DataError, match=f"{name}.*not UTF-8"):
        read(path, encoding_errors="strict")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"line 2: is not JSON"),
        ("[1]", r"line 2: is not a JSON object"),
        ('{"text": 5}', r"row 2: column 'text' holds int, not text"),
        ('{"other": "x"}', r"row 2: has no column 'text'.*: other"),
        ('{"text":' + "[" * 100_000, r"line 2: is not JSON"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "ok"}}\n{line}\n')
    with pytest.raises(DataError, match=f"a.jsonl, {words}"):
        read(tmp_path / "a.jsonl")


def test_jsonl_details(tmp_path):
    """Blank lines and CRLF are none of the text's business; null is no text; half a surrogate pair is no character."""
    (tmp_path / "a.jsonl").write_bytes(b'\r\n{"text": "a\\u2028b"}\r\n\n{"text": null}\n{"text": "x\\ud800y"}')
    found, report = read(tmp_path / "a.jsonl")
    assert found[0] == ("a.jsonl:2", "a\u2028b")
    assert len(found) == 2
    found[1][1].encode()
    assert report.skipped == {"empty": 1}


def test_csv_with_missing_fields(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1\n2,two\n3,three,more\n")
    assert [text for _, text in read(tmp_path / "a.csv")[0]] == ["two", "three"]


@pytest.mark.parametrize("damage", ["truncated", "page", "header", "empty", "text"])
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    import pyarrow.parquet

    path = write_table(tmp_path / "a.parquet", [f"{n} hello " * 30 for n in range(2000)])
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(1)
    start = column.dictionary_page_offset or column.data_page_offset
    data = path.read_bytes()
    hole = {"page": start + 200, "header": start}.get(damage, 0)
    damaged = data[:hole] + bytes(60) + data[hole + 60 :]
    data = {"truncated": data[:-100], "empty": b"", "text": b"text"}.get(damage, damaged)
    path.write_bytes(data)
    with pytest.raises(DataError, match="a.parquet: cannot be read as parquet"):
        read(path)


def test_parquet_with_invalid_utf_8_is_an_error_that_names_it(tmp_path):
    import pyarrow
    import pyarrow.parquet

    offsets = pyarrow.array([0, 3], pyarrow.int32()).buffers()[1]
    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(b"a\xff\xfe")])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet"):
        read(tmp_path / "a.parquet", encoding_errors="strict")


# --- compressed files ---

TEXT = "".join(f"line {number} é\n" for number in range(5000))


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".GZ"])
def test_compressed_text_is_read_frame_after_frame(tmp_path, suffix):
    compress = zstd if suffix == ".zst" else gzip.compress
    data = TEXT.encode()
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(data[:1001]) + compress(b"") + compress(data[1001:]))
    assert [text for _, text in read(path)[0]] == [TEXT]
    (tmp_path / "empty").mkdir()
    empty = tmp_path / "empty" / f"b.txt{suffix}"
    empty.write_bytes(compress(b""))
    assert read(empty)[0] == []


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("keep", [0.001, 0.5, 0.99])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, suffix, keep):
    data = (zstd if suffix == ".zst" else gzip.compress)(TEXT.encode())
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data[: max(5, int(len(data) * keep))])
    with pytest.raises(DataError, match=rf"a.txt\{suffix}: damaged or truncated \{suffix} file"):
        read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_is_not_compressed_or_has_a_tail_is_an_error_that_names_it(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    compress = zstd if suffix == ".zst" else gzip.compress
    for data in (b"plain text", compress(b"good") + b"tail of another kind"):
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"a.txt\{suffix}: damaged"):
            read(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_flipped_bit_is_found(tmp_path, suffix):
    data = bytearray(gzip.compress(TEXT.encode()))
    if suffix == ".zst":
        data = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(TEXT.encode()))
    data[len(data) // 2] ^= 4
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        read(path)


def test_zst_with_a_frame_to_skip_is_read(tmp_path):
    """pzstd writes such frames."""
    skippable = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"abcd"
    (tmp_path / "a.zst").write_bytes(skippable + zstd(b"one ") + skippable + zstd(b"two"))
    assert read(tmp_path / "a.zst")[0][0][1] == "one two"


def test_empty_compressed_files_are_empty(tmp_path):
    for name in ("a.gz", "a.zst"):
        (tmp_path / name).write_bytes(b"")
    assert read(tmp_path)[1].skipped == {"empty": 2}


# --- standard input and the standard library ---


def prepared_from_stdin(tmp_path, data):
    return groundup("prepare", "-", "--tokenizer", "byte", "--output-dir", tmp_path / "data", "--json", stdin=data)


def test_standard_input_is_one_document(tmp_path):
    data = ("stdin é\n" * 100).encode() + b"\xff"
    result = prepared_from_stdin(tmp_path, data)
    assert result.code == 0, result.err
    assert (result.json["documents"], result.json["replaced_sequences"]) == (1, 1)
    assert result.json["bytes"] == len(data) + 2
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "dataset.json", "tokenizer.json", "tokenizer_config.json", "train-00000.npy", "validation-00000.npy"]  # fmt: skip


@pytest.mark.parametrize(("data", "words"), [(b"", "no text found in -"), (b"\0\0", "source -: is binary")])
def test_standard_input_without_text_is_refused(tmp_path, data, words):
    result = prepared_from_stdin(tmp_path, data)
    assert result.code == 3
    assert words in result.err
    assert list(tmp_path.iterdir()) == []


def test_the_standard_library_is_python_without_its_tests():
    found = [document.name for document in documents("python-stdlib", ReadOptions(), SourceReport())]
    assert len(found) > 300
    assert {"json/decoder.py", "asyncio/events.py", "abc.py"} <= set(found)
    assert all(name.endswith(".py") for name in found)
    assert not any({"test", "tests", "site-packages"} & set(Path(name).parts) for name in found)
    assert found == [document.name for document in documents("python-stdlib", ReadOptions(), SourceReport())]
    (first,) = [d for d in documents("python-stdlib", ReadOptions(), SourceReport()) if d.name == "abc.py"]
    assert "".join(first.open()).encode() == Path(sysconfig.get_path("stdlib"), "abc.py").read_bytes()
