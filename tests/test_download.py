"""OpenAI's release, fetched: whole, continued where a line broke, from another mirror, and never half under a final name."""

import base64
import hashlib
import http.server
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from groundup.errors import ConfigError, DataError, ResourceError
from groundup.interop import download
from groundup.interop.download import RELEASE_FILES, download_openai
from groundup.interop.openai import read_openai, write_openai
from groundup.tokenizer.tokenizer import byte_tokenizer
from tests.runs import Killed
from tests.test_interop import assert_same_bits, new_model
from tests.test_openai import CONFIG, DATA


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A folder as we write it."""
    (tmp_path / "written").mkdir()
    write_openai(new_model(CONFIG), byte_tokenizer(), tmp_path / "written")
    return tmp_path / "written"


@dataclass
class Mirror:
    """A server of files, on this machine, with the faults of real ones."""

    files: dict[str, bytes]
    ranges: bool = True
    etag: str = '"v1"'
    break_after: int | None = None
    """Bytes of the large file after which the line breaks, each time."""
    md5: str | None = None
    """Instead of the right one."""
    status: int | None = None
    moved_to: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        name, asked = handler.path.rsplit("/", 1)[1], handler.headers.get("Range")
        self.requests.append((name, asked))
        if self.moved_to:
            handler.send_response(302)
            handler.send_header("Location", self.moved_to)
            handler.end_headers()
            return
        if self.status or name not in self.files:
            handler.send_error(self.status or 404)
            return
        content, start, status = self.files[name], 0, 200
        if self.ranges and asked and handler.headers.get("If-Range") in (self.etag, None):
            start, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206
            if start >= len(content):
                handler.send_error(416)
                return
        handler.send_response(status)
        headers = {
            "Content-Length": str(len(content) - start),
            "ETag": self.etag,
            "x-ms-blob-content-md5": self.md5 or base64.b64encode(hashlib.md5(content).digest()).decode(),
        }
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        for key, value in (headers | self.headers).items():
            if value:
                handler.send_header(key, value)
        handler.end_headers()
        end = len(content) if self.break_after is None or name != DATA else start + self.break_after
        handler.wfile.write(content[start:end])


@pytest.fixture
def serve():
    """Start mirrors; all end with the test."""
    servers = []

    def start(**options: Any) -> Mirror:
        mirror = Mirror(**({"files": dict(RELEASE)} | options))

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):  # noqa: N802 - the library's name
                mirror.answer(self)

            def log_message(self, *arguments):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        mirror.url = f"http://127.0.0.1:{server.server_port}/{{size}}/"
        return mirror

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


RELEASE = {name: f"content of {name}".encode() for name in RELEASE_FILES} | {DATA: bytes(range(256)) * 40}


@pytest.fixture(autouse=True)
def _known_hashes(monkeypatch):
    """The small files that stand for OpenAI's have hashes of their own."""
    known = {name: hashlib.sha256(RELEASE[name]).hexdigest() for name in ("encoder.json", "vocab.bpe")}
    monkeypatch.setattr(download, "KNOWN_SHA256", known)
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 2)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, without hidden ones."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_the_seven_files_are_fetched(serve, tmp_path):
    mirror, seen = serve(), []
    download_openai("124M", tmp_path / "a" / "b", [mirror.url], lambda *call: seen.append(call))
    assert contents(tmp_path / "a" / "b") == RELEASE
    assert seen[-1] == (DATA, 10240, 10240)
    assert {name for name, _, _ in seen} == set(RELEASE_FILES)
    assert mirror.requests == [(name, None) for name in RELEASE_FILES]


def test_a_release_that_was_fetched_is_read(serve, written, tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in written.iterdir()} | {"model.ckpt.meta": b"graph"}
    monkeypatch.setattr(download, "KNOWN_SHA256", {})
    download_openai("355M", tmp_path / "fetched", [serve(files=files).url.rstrip("/")])
    assert_same_bits(dict(read_openai(tmp_path / "fetched").model.state_dict()), dict(new_model(CONFIG).state_dict()))


def test_the_mirrors_are_those_of_the_release_and_the_book():
    assert [mirror.replace("{size}", "124M") for mirror in download.MIRRORS] == [
        "https://openaipublic.blob.core.windows.net/gpt-2/models/124M/",
        "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2/124M/",
    ]
    assert download.SIZES == ("124M", "355M", "774M", "1558M")


def test_files_that_are_there_are_not_fetched_again(serve, tmp_path):
    mirror = serve()
    for name in ("encoder.json", "model.ckpt.index"):
        (tmp_path / name).write_bytes(RELEASE[name])
    download_openai("124M", tmp_path, [mirror.url])
    assert {"encoder.json", "model.ckpt.index"}.isdisjoint(name for name, _ in mirror.requests)
    mirror.requests.clear()
    download_openai("124M", tmp_path, [mirror.url])
    assert mirror.requests == []


def test_a_line_that_breaks_again_and_again_is_continued(serve, tmp_path):
    mirror = serve(break_after=3000)
    download_openai("124M", tmp_path, [mirror.url])
    assert contents(tmp_path) == RELEASE
    assert [asked for name, asked in mirror.requests if name == DATA] == [None, "bytes=3000-", "bytes=6000-", "bytes=9000-"]


def kill_at(limit: int) -> Any:
    def progress(name, done, total):
        if name == DATA and done >= limit:
            raise Killed

    return progress


@pytest.mark.parametrize(("limit", "expected"), [(0, None), (4096, "bytes=4096-"), (10240, "no request")])
def test_a_download_that_was_killed_goes_on(serve, tmp_path, monkeypatch, limit, expected):
    monkeypatch.setattr(download, "HASH_BLOCK_BYTES", 1024)
    mirror = serve()
    with pytest.raises(Killed):
        download_openai("124M", tmp_path, [mirror.url], kill_at(limit))
    assert not (tmp_path / DATA).exists(), "half a file under its final name"
    mirror.requests.clear()
    download_openai("124M", tmp_path, [mirror.url])
    assert contents(tmp_path) == RELEASE
    assert mirror.requests == ([] if expected == "no request" else [(DATA, expected)])


@pytest.mark.parametrize("etag", ['"v2"', 'W/"v1"', ""])
def test_a_file_that_may_have_changed_is_fetched_whole(serve, tmp_path, monkeypatch, etag):
    """Another ETag, a weak one, none: nothing says that what is there belongs to what comes."""
    monkeypatch.setattr(download, "HASH_BLOCK_BYTES", 1024)
    mirror = serve(etag='"v1"' if "2" in etag else etag)
    with pytest.raises(Killed):
        download_openai("124M", tmp_path, [mirror.url], kill_at(4096))
    mirror.etag, mirror.files[DATA] = etag, RELEASE[DATA][::-1]
    download_openai("124M", tmp_path, [mirror.url])
    assert (tmp_path / DATA).read_bytes() == RELEASE[DATA][::-1]


@pytest.mark.parametrize(("file_id", "expected"), [("4_z1", "bytes=4096-"), ("4_z2", None)])
def test_a_server_without_etags_names_its_file_in_backblazes_way(serve, tmp_path, monkeypatch, file_id, expected):
    monkeypatch.setattr(download, "HASH_BLOCK_BYTES", 1024)
    mirror = serve(etag="", headers={"X-Bz-File-Id": "4_z1", "x-ms-blob-content-md5": ""})
    with pytest.raises(Killed):
        download_openai("124M", tmp_path, [mirror.url], kill_at(4096))
    mirror.headers["X-Bz-File-Id"], mirror.files[DATA] = file_id, RELEASE[DATA][::-1]
    download_openai("124M", tmp_path, [mirror.url])
    assert mirror.requests[-1] == (DATA, expected)
    assert ((tmp_path / DATA).read_bytes() == RELEASE[DATA][::-1]) == (expected is None)


def test_a_part_from_one_mirror_is_not_continued_from_another(serve, tmp_path, monkeypatch):
    """Equal ETags of two servers mean nothing."""
    monkeypatch.setattr(download, "HASH_BLOCK_BYTES", 1024)
    first, second = serve(), serve(files=RELEASE | {DATA: RELEASE[DATA][::-1]})
    with pytest.raises(Killed):
        download_openai("124M", tmp_path, [first.url], kill_at(4096))
    download_openai("124M", tmp_path, [second.url])
    assert second.requests == [(DATA, None)]
    assert (tmp_path / DATA).read_bytes() == RELEASE[DATA][::-1]


@pytest.mark.parametrize("size", [100, 4000, 5000, 20000])
def test_a_server_that_continues_another_file_is_found_out_by_its_size(serve, tmp_path, monkeypatch, size):
    monkeypatch.setattr(download, "HASH_BLOCK_BYTES", 1024)
    mirror = serve()
    with pytest.raises(Killed):
        download_openai("124M", tmp_path, [mirror.url], kill_at(4096))
    mirror.files[DATA] = bytes(size)  # under the same ETag
    download_openai("124M", tmp_path, [mirror.url])
    assert (tmp_path / DATA).read_bytes() == bytes(size)


def test_a_server_without_ranges_starts_over(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "HASH_BLOCK_BYTES", 1024)
    mirror = serve(ranges=False)
    with pytest.raises(Killed):
        download_openai("124M", tmp_path, [mirror.url], kill_at(4096))
    download_openai("124M", tmp_path, [mirror.url])
    assert contents(tmp_path) == RELEASE


@pytest.mark.timeout(20)
def test_a_server_without_ranges_that_always_breaks_is_left(serve, tmp_path):
    bad, good = serve(ranges=False, break_after=3000), serve()
    download_openai("124M", tmp_path, [bad.url, good.url])
    assert contents(tmp_path) == RELEASE
    assert [name for name, _ in good.requests] == [DATA]
    assert len([name for name, _ in bad.requests if name == DATA]) == 2


@pytest.mark.parametrize(
    "note", ["", "{", "[]", '{"url": 1}', '{"url": "HERE", "size_bytes": 10240, "validator": "\\n", "file_id": "", "md5": ""}']
)
def test_a_damaged_note_beside_a_part_is_no_note(serve, tmp_path, note):
    mirror = serve()
    (tmp_path / f"{DATA}.part").write_bytes(b"junk")
    (tmp_path / f"{DATA}.part.json").write_text(note.replace("HERE", mirror.url.replace("{size}", "124M") + DATA))
    download_openai("124M", tmp_path, [mirror.url])
    assert contents(tmp_path) == RELEASE


def test_a_part_that_was_damaged_is_not_given_the_files_name(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "HASH_BLOCK_BYTES", 1024)
    mirror = serve()
    with pytest.raises(Killed):
        download_openai("124M", tmp_path, [mirror.url], kill_at(4096))
    part = tmp_path / f"{DATA}.part"
    part.write_bytes(b"\xee" * part.stat().st_size)
    with pytest.raises(DataError, match="does not have the MD5 that the server gave"):
        download_openai("124M", tmp_path, [mirror.url])
    assert not (tmp_path / DATA).exists()
    download_openai("124M", tmp_path, [mirror.url])
    assert contents(tmp_path) == RELEASE


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 404}, "HTTP Error 404"),
        ({"status": 500}, "HTTP Error 500"),
        ({"md5": base64.b64encode(bytes(16)).decode()}, "does not have the MD5"),
        ({"files": RELEASE | {"encoder.json": b"<html>log in</html>"}}, r"is not OpenAI's file \(sha256 is not"),
        ({"headers": {"Content-Length": ""}}, "Content-Length absent"),
        ({"headers": {"Content-Length": "-5"}}, "Content-Length -5"),
        ({"headers": {"Content-Encoding": "gzip"}}, "Content-Encoding gzip"),
        ({"headers": {"Content-Length": "30"}}, "broke off after 23 of 30 bytes"),
        ({"moved_to": "ftp://127.0.0.1/encoder.json"}, "ftp"),
        ({"moved_to": "file:///etc/passwd"}, "file"),
    ],
    ids=str,
)
def test_after_a_mirror_that_fails_the_next_is_asked(serve, tmp_path, fault, words):
    bad, good = serve(**fault), serve()
    with pytest.raises(DataError, match=words) as refusal:
        download_openai("124M", tmp_path / "alone", [bad.url])
    assert "\n" not in str(refusal.value)
    assert "encoder.json" not in contents(tmp_path / "alone")
    download_openai("124M", tmp_path / "both", [bad.url, good.url])
    assert contents(tmp_path / "both") == RELEASE
    assert {name for name, _ in bad.requests} == {"encoder.json"}, "a mirror that failed is not asked first again"


def test_when_no_mirror_answers_the_files_and_the_folder_are_named(tmp_path):
    (tmp_path / "vocab.bpe").write_bytes(RELEASE["vocab.bpe"])
    with pytest.raises(DataError) as refusal:
        download_openai("124M", tmp_path, ["http://127.0.0.1:1/{size}/", "http://127.0.0.1:2/{size}"])
    reason = "<urlopen error [Errno 111] Connection refused>"
    refused = [f"http://127.0.0.1:{port}/124M/encoder.json: {reason}" for port in (1, 2)]
    assert str(refusal.value) == (
        f"download: cannot fetch encoder.json ({refused[0]}; {refused[1]}); run the same command again to go on, or "
        "get OpenAI's encoder.json, hparams.json, checkpoint, model.ckpt.index, model.ckpt.meta, "
        f"model.ckpt.data-00000-of-00001 elsewhere and put them into {tmp_path}"
    )


def test_a_file_that_is_there_and_is_not_openais_is_left_and_named(serve, tmp_path):
    (tmp_path / "vocab.bpe").write_bytes(b"my own")
    with pytest.raises(DataError, match=r"vocab.bpe is there and is not OpenAI's file .*; move it away"):
        download_openai("124M", tmp_path, [serve().url])
    assert (tmp_path / "vocab.bpe").read_bytes() == b"my own"


@pytest.mark.parametrize(
    ("size", "mirror", "words"),
    [
        ("345M", "https://x/", "no GPT-2 of size '345M'; choose one of 124M, 355M, 774M, 1558M"),
        ("124M", "file:///etc/", "mirror 'file:///etc/' is no http or https address"),
        ("124M", "ftp://x/", "is no http or https address"),
    ],
)
def test_a_size_or_a_mirror_that_cannot_be_is_refused(tmp_path, size, mirror, words):
    with pytest.raises(ConfigError, match=words):
        download_openai(size, tmp_path / "never", [mirror])
    assert not (tmp_path / "never").exists()


def test_a_disk_without_room_is_said_before_it_is_filled(serve, tmp_path):
    mirror = serve(headers={"Content-Length": str(10**15 - 1)})
    with pytest.raises(ResourceError, match=r"encoder.json needs 953,\d{3},\d{3} MiB more"):
        download_openai("124M", tmp_path, [mirror.url])


def test_two_downloads_into_one_folder_do_not_mix(serve, tmp_path):
    inside = []

    def second(name, done, total):
        if not inside:
            inside.append(pytest.raises(ConfigError, match="in use by another process"))
            with inside[0]:
                download_openai("124M", tmp_path, [mirror.url])

    mirror = serve()
    download_openai("124M", tmp_path, [mirror.url], second)
    assert inside
    assert contents(tmp_path) == RELEASE


def test_a_server_that_says_nothing_is_left_after_a_while(serve, tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(DataError, match="timed out"):
            download_openai("124M", tmp_path, [url])
