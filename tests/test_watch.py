"""groundup watch over real sockets: what is served, to whom, and that nothing breaks it or changes anything."""

import base64
import contextlib
import hashlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import groundup
from groundup.cli.main import run as command
from groundup.config.load import Given, Settings, resolve
from groundup.config.options import WATCH_GROUPS
from groundup.errors import ConfigError
from groundup.recipes.watch import await_run, mark_of, pages_of
from groundup.reporting.data import RunReader, page_data
from groundup.serving.guard import policy_of, refusal
from groundup.serving.latest import Latest
from groundup.serving.server import listen, require_framework
from groundup.serving.tokens import tokens_page
from groundup.tracking.metrics import append_row
from tests.conftest import TINY
from tests.runs import contents, prepared

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
from groundup.serving.app import LONGEST_QUESTION, WAITING, application  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("watch") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("groundup.recipes.train.draw_curves", lambda *arguments: None)
        patch.setattr("os.fsync", lambda descriptor: None)
        groundup.train(prepared(tmp_path_factory, words=400), run, **TINY)
    return run


def options(**given: Any) -> Settings:
    return resolve(WATCH_GROUPS, {name: Given(value, "test") for name, value in given.items()})


class Served:
    """A server of this process, on a thread."""

    def __init__(self, app: Any):
        self._listening = listen(0)
        self.port = self._listening.getsockname()[1]
        config = uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", log_config=None, log_level="critical", server_header=False,
            date_header=False, proxy_headers=False, h11_max_incomplete_event_size=16 * 1024,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listening]})
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._listening.close()

    def ask(self, path: str, method: str = "GET", body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body; a body that is no bytes is sent as JSON."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            named.setdefault("content-type", "application/json")
        connection.request(method, path, sent, named)
        answer = connection.getresponse()
        found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        connection.close()
        return found

    def send(self, content: bytes) -> bytes:
        """What comes back for raw bytes, up to its first 64 KiB."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection, contextlib.suppress(OSError):
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(2**16)
        return b""


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def served(run: Path, said: list[str]) -> Iterator[Served]:
    server = Served(application(pages_of(run, options(), said.append)))
    yield server
    server.stop()
    assert said == [], "no request that a test sends is a fault of ours"


# --- what is served ---


def test_the_page_is_the_report_live(served):
    status, headers, body = served.ask("/")
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert b"<!doctype html>" in body[:100].lower()
    assert b"data.json" in body


@pytest.mark.parametrize("path", ["/", "/tokens"])
def test_a_page_may_run_its_own_scripts_and_nothing_else(served, path):
    _, headers, body = served.ask(path)
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    text = body.decode()
    for kind in ("script", "style"):
        for found in re.findall(rf"<{kind}(?![^>]*application/json)[^>]*>(.*?)</{kind}>", text, re.DOTALL):
            assert base64.b64encode(hashlib.sha256(found.encode()).digest()).decode() in policy
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=.?(https?:)?//", text), "nothing from elsewhere"
    assert not re.search(r"\son[a-z]+\s*=\s*[\"']", text.partition("<script>")[0]), "no scripts in attributes"


def test_the_policy_of_a_page_without_scripts_allows_none():
    assert "script-src 'none'" in policy_of("<p>hello</p><script type='application/json'>{}</script>")


@pytest.mark.parametrize("path", ["/", "/tokens", "/data.json", "/favicon.ico", "/nothing"])
def test_every_answer_keeps_the_browser_careful(served, path):
    _, headers, _ = served.ask(path)
    assert headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["referrer-policy"] == "no-referrer"
    assert not any(name.startswith("access-control") for name in headers)
    assert "server" not in headers


def test_the_scripts_of_the_token_view_never_make_markup_of_text(served):
    _, _, body = served.ask("/tokens")
    assert b"textContent" in body
    for word in (b"innerHTML", b"outerHTML", b"insertAdjacent", b"document.write", b"eval("):
        assert word not in body


def test_the_name_of_a_run_is_text(run, tmp_path):
    named = tmp_path / "<img src=x onerror=alert(1)>"
    shutil.copytree(run, named)
    pages = pages_of(named, options(), print)
    for text in (pages.tokens, pages.page(pages.data.now().text)):
        assert "<img" not in text.replace("\\u003cimg", "")


def test_a_name_that_is_no_utf8_or_has_line_breaks_can_be_shown(run, tmp_path):
    assert "bad??name" in tokens_page("bad\udcff\udcfename")
    said: list[str] = []
    with pytest.raises(ConfigError):
        await_run(tmp_path / "two\nlines\x1b", said.append, seconds=0)
    assert "\n" not in said[0]
    assert "\x1b" not in said[0]


def test_data_is_the_run_and_is_sent_again_only_when_it_changed(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    pages = pages_of(copy, options(), print)
    made, clock = [], [0.0]

    def make() -> str:
        made.append(clock[0])
        return json.dumps(page_data([reader.data()]))

    reader = RunReader(copy)
    latest = Latest(make, lambda: mark_of(copy), lambda: clock[0])
    server = Served(application(type(pages)(pages.page, latest, pages.tokens, pages.questions, print)))
    try:
        status, headers, body = server.ask("/data.json")
        assert status == 200
        assert headers["cache-control"] == "no-cache"
        assert json.loads(body)["runs"][0]["totals"]["step"] == TINY["max_steps"]
        same = {"if_none_match": headers["etag"]}
        assert server.ask("/data.json", **same)[::2] == (304, b"")
        assert server.ask("/data.json")[2] == body
        assert len(made) == 1, "nothing changed, so nothing is made anew"
        clock[0] = 10.0
        append_row(copy / "metrics.jsonl", {"step": 99, "loss": 1.0, "learning_rate": 0.1})
        status, changed, body = server.ask("/data.json", **same)
        assert status == 200
        assert changed["etag"] != headers["etag"]
        assert json.loads(body)["runs"][0]["totals"]["step"] == 99
        assert len(made) == 2
    finally:
        server.stop()


def test_what_is_asked_of_the_token_view_is_answered(served):
    status, headers, body = served.ask("/tokens/next", "POST", {"prompt": "the ", "draw": True})
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert len(json.loads(body)["written"]) == 1
    status, _, body = served.ask("/tokens/text", "POST", {"text": "日"})
    assert status == 200
    assert [token["label"] for token in json.loads(body)["tokens"]] == ["⟨E6⟩", "⟨97⟩", "⟨A5⟩"]


def test_nothing_is_written(run, served):
    before = contents(run)
    for path in ("/", "/data.json", "/tokens"):
        served.ask(path)
    served.ask("/tokens/next", "POST", {"prompt": "a", "draw": True})
    assert contents(run) == before


# --- to whom ---

HERE = b"127.0.0.1:8265"


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        (b"GET", [(b"host", HERE)], None),
        (b"HEAD", [(b"host", b"localhost:9000")], None),  # the other end of a tunnel
        (b"GET", [(b"host", b"LOCALHOST")], None),
        (b"GET", [(b"host", b"[::1]:80")], None),
        (b"GET", [], 421),
        (b"GET", [(b"host", b"evil.example")], 421),
        (b"GET", [(b"host", b"127.0.0.1.evil.example")], 421),
        (b"GET", [(b"host", b"localhost.evil.example:8265")], 421),
        (b"GET", [(b"host", b"127.0.0.1:8265@evil.example")], 421),
        (b"GET", [(b"host", b"192.168.0.5:8265")], 421),
        (b"GET", [(b"host", b"0.0.0.0:8265")], 421),
        (b"GET", [(b"host", b"")], 421),
        (b"GET", [(b"host", b"127.0.0.1:port")], 421),
        (b"GET", [(b"host", HERE), (b"host", b"evil.example")], 421),
        (b"POST", [(b"host", HERE), (b"origin", b"http://127.0.0.1:8265")], None),
        (b"POST", [(b"host", b"localhost:9000"), (b"origin", b"http://localhost:9000")], None),
        (b"POST", [(b"host", HERE), (b"origin", b"http://evil.example")], 403),
        (b"GET", [(b"host", HERE), (b"origin", b"http://evil.example")], 403),
        (b"POST", [(b"host", HERE), (b"origin", b"null")], 403),
        (b"POST", [(b"host", HERE), (b"origin", b"")], 403),
        (b"POST", [(b"host", HERE), (b"origin", b"https://127.0.0.1:8265")], 403),
        (b"POST", [(b"host", HERE), (b"origin", b"http://127.0.0.1:3000")], 403),  # another program of this machine
        (b"POST", [(b"host", HERE), (b"origin", b"http://localhost:8265")], 403),
        (b"POST", [(b"host", HERE), (b"origin", b"http://127.0.0.1:8265"), (b"origin", b"http://evil.example")], 403),
        (b"GET", [(b"host", HERE), (b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"no-cors")], 403),
        (b"GET", [(b"host", HERE), (b"sec-fetch-site", b"same-site"), (b"sec-fetch-mode", b"cors")], 403),
        (b"GET", [(b"host", HERE), (b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"navigate")], None),
        (b"POST", [(b"host", HERE), (b"sec-fetch-site", b"cross-site"), (b"sec-fetch-mode", b"navigate")], 403),
        (b"GET", [(b"host", HERE), (b"sec-fetch-site", b"same-origin"), (b"sec-fetch-mode", b"cors")], None),
        (b"GET", [(b"host", HERE), (b"sec-fetch-site", b"none"), (b"sec-fetch-mode", b"navigate")], None),
        (b"OPTIONS", [(b"host", HERE)], 405),
        (b"PUT", [(b"host", HERE)], 405),
        (b"DELETE", [(b"host", HERE)], 405),
        (b"TRACE", [(b"host", HERE)], 405),
        (b"get", [(b"host", HERE)], 405),
    ],
)
def test_who_is_answered(method, headers, status):
    found = refusal(method, headers)
    assert (found and found[0]) == status


@pytest.mark.parametrize("path", ["/", "/data.json", "/tokens", "/tokens/next", "/nothing"])
def test_a_foreign_host_or_origin_gets_nothing(served, path):
    for headers, expected in (
        ({"host": "evil.example"}, 421), ({"host": f"evil.example:{served.port}"}, 421),
        ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403),
    ):  # fmt: skip
        for method, body in (("GET", None), ("POST", {"prompt": "a"})):
            status, _, content = served.ask(path, method, body, **headers)
            assert status == expected
            assert len(content) < 100


def test_it_listens_on_this_machine_alone():
    with listen(0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"


# --- what is refused ---


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT", "BREW"])
@pytest.mark.parametrize("path", ["/", "/data.json", "/tokens"])
def test_pages_are_only_read(served, path, method):
    assert served.ask(path, method, b"x")[0] == 405


def test_a_question_is_only_posted(served):
    assert served.ask("/tokens/next")[0] == 405


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "application/jsonp"]
)
def test_no_form_can_ask(served, kind):
    assert served.ask("/tokens/next", "POST", {"prompt": "a"}, content_type=kind)[0] == 415


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400), (b"{", 400), (b"[]", 400), (b"null", 400), (b'"x"', 400), (b"\xff\xfe", 400), (b"{\"prompt\": NaN}", 400),
        (b"[" * 100_000, 400), (b'{"top_k":' + b"9" * 5000 + b"}", 400), (b'{"top_k": 1e999}', 422), (b'{"prompt": 3}', 422),
        (b'{"prompt": "\\ud800"}', 422), (b'{"temperature": -1}', 422), (b'{"written": [-1]}', 422), (b"{}", 200),
        (b'{"constructor": {}, "__proto__": []}', 200), (b"x" * (LONGEST_QUESTION + 1), 413),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_a_bad_question_is_refused_with_its_reason(served, body, status):
    found, _, content = served.ask("/tokens/next", "POST", body)
    assert found == status
    assert status == 200 or json.loads(content)["error"]


def test_a_body_that_says_it_is_huge_is_not_waited_for(served):
    started = time.monotonic()
    head = b"POST /tokens/next HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: 99999999999\r\n\r\n"
    assert served.send(head + b"x" * (LONGEST_QUESTION + 10)).split()[1] == b"413"
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2fconfig.toml", "/config.toml", "/metrics.jsonl", "//etc/passwd",
     "/tokens/../config.toml", "/tokens/%00", "/tokens/next/..%5c", "/data.json/", "/%", "/%zz", "/tokens.js"],
)  # fmt: skip
def test_no_path_of_a_request_is_opened(served, path):
    answer = served.send(b"GET " + path.encode() + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    assert answer.split()[1] in (b"404", b"400", b"307")
    assert b"root:" not in answer
    assert b"n_layer" not in answer


def test_too_many_questions_at_a_time_are_sent_away(tmp_path):
    """One is answered, some wait, and the rest hear at once that it is busy."""
    going_on = threading.Event()

    def slow(asked: Any) -> dict[str, Any]:
        going_on.wait(20)
        return {}

    pages = pages_of(tmp_path, options(), print)
    server = Served(application(type(pages)(pages.page, pages.data, pages.tokens, {"next": slow}, print)))
    found: list[int] = []
    try:
        threads = [
            threading.Thread(target=lambda: found.append(server.ask("/tokens/next", "POST", {})[0])) for _ in range(WAITING + 4)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 15
        while len(found) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert found == [503] * 3
        assert server.ask("/tokens")[0] == 200, "pages do not wait for questions"
        going_on.set()
        for thread in threads:
            thread.join(20)
        assert sorted(found) == [200] * (WAITING + 1) + [503] * 3
    finally:
        going_on.set()
        server.stop()


def test_a_fault_of_ours_is_said_in_one_line_and_the_server_lives(tmp_path):
    def broken(asked: Any) -> dict[str, Any]:
        raise ZeroDivisionError("secret")

    said: list[str] = []
    pages = pages_of(tmp_path, options(), said.append)
    server = Served(application(type(pages)(pages.page, pages.data, pages.tokens, {"next": broken}, said.append)))
    try:
        status, _, body = server.ask("/tokens/next", "POST", {})
        assert status == 500
        assert b"secret" not in body
        assert server.ask("/tokens/next", "POST", {})[0] == 500
        assert said == ["WARNING: a request failed: ZeroDivisionError: secret"], "once"
        assert server.ask("/tokens")[0] == 200
    finally:
        server.stop()


@pytest.mark.slow
def test_a_long_answer_does_not_keep_ctrl_c_from_ending(run):
    script = """if True:
        import sys
        from groundup.recipes import watch
        from groundup.cli.main import run
        class Slow:
            def next(self, asked):
                import torch
                print("asked", flush=True)
                while True:
                    torch.ones(300, 300) @ torch.ones(300, 300)
        watch._token_view = lambda *more: Slow()
        sys.exit(run(sys.argv[1:]))
    """
    process = subprocess.Popen(
        [sys.executable, "-c", script, "watch", str(run), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stdout is not None
    port = int(process.stderr.readline().partition("127.0.0.1:")[2].split()[0])
    assert "ssh" in process.stderr.readline()
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/tokens/next", b"{}", {"Content-Type": "application/json"})
    assert process.stdout.readline() == "asked\n"
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=50)
    assert process.returncode == 0
    assert time.monotonic() - started < 30
    assert err == "", "nothing of a library that is taken down"


# --- a thousand malformed requests ---

TOKEN = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12).map(str.encode)
METHODS = st.sampled_from([b"GET", b"POST", b"HEAD", b"PUT", b"BREW", b"get", b"\x00", b"G" * 5000]) | TOKEN
PATHS = st.sampled_from([b"/", b"/data.json", b"/tokens", b"/tokens/next", b"/tokens/text", b"*", b"http://evil/"]) | (
    st.binary(max_size=40).map(lambda content: b"/" + content)
)
VERSIONS = st.sampled_from([b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b"", b"\xff"])
NAMES = (
    st.sampled_from([b"Host", b"Origin", b"Content-Type", b"Content-Length", b"Transfer-Encoding", b"Expect", b"Upgrade"])
    | TOKEN
)
VALUES = st.sampled_from(
    [b"127.0.0.1", b"evil", b"application/json", b"-1", b"5", b"99999999999999999999", b"chunked", b"100-continue"]
) | st.binary(max_size=20)  # fmt: skip
HEADERS = st.lists(st.tuples(NAMES, VALUES), max_size=6)
BODIES = st.binary(max_size=200) | st.sampled_from([b'{"prompt": 1}', b"5\r\nhello\r\n", b"\r\n" * 50, b"[" * 3000])
REQUESTS = st.binary(max_size=300) | st.builds(
    lambda method, path, version, headers, body, end: b"".join(
        [method, b" ", path, b" ", version, end, *(name + b": " + value + end for name, value in headers), end, body]
    ),
    METHODS, PATHS, VERSIONS, HEADERS, BODIES, st.sampled_from([b"\r\n", b"\n", b"\r", b"\r\n\r\n"]),
)  # fmt: skip


@pytest.mark.slow
def test_a_thousand_malformed_requests_leave_it_alive(run, served):
    before, statuses = contents(run), set()

    @settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(REQUESTS)
    def attack(content: bytes) -> None:
        answer = served.send(content)
        if answer:
            assert answer.startswith(b"HTTP/1.1 ")
            statuses.add(answer.split()[1])

    attack()
    assert statuses & {b"400", b"404", b"405", b"421"}, "it did answer"
    assert b"500" not in statuses
    assert served.ask("/data.json")[0] == 200
    assert served.ask("/tokens/next", "POST", {"prompt": "the"})[0] == 200
    assert contents(run) == before


def test_connections_that_say_nothing_do_not_keep_others_out(served):
    silent = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(40)]
    for connection in silent[::2]:
        connection.sendall(b"POST /tokens/next HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 50\r\n")
    assert served.ask("/")[0] == 200
    for connection in silent:
        connection.close()


# --- made anew when something changed ---


def test_a_text_is_made_anew_when_it_changed_and_not_too_often():
    clock, mark, made = [0.0], [1], []

    def make() -> str:
        made.append(clock[0])
        return f"text {mark[0]}"

    latest = Latest(make, lambda: mark[0], lambda: clock[0])
    first = latest.now()
    assert first.text == "text 1"
    clock[0] = 100.0
    assert latest.now() is first, "nothing changed"
    mark[0] = 2
    assert latest.now() is first, "looked a moment ago"
    clock[0] = 101.9
    assert latest.now() is first
    clock[0] = 102.1
    second = latest.now()
    assert second.text == "text 2"
    assert second.etag != first.etag
    assert made == [0.0, 102.1]


def test_what_takes_long_to_make_is_made_less_often():
    """At most a fiftieth of one core's time."""
    clock, marks, made = [0.0], [0], []

    def make() -> str:
        made.append(clock[0])
        clock[0] += 0.5
        return "text"

    def mark() -> int:
        marks[0] += 1
        return marks[0]

    latest = Latest(make, mark, lambda: clock[0])
    while clock[0] < 100:
        latest.now()
        clock[0] += 0.1
    assert len(made) in (4, 5)


def test_who_asks_while_it_is_made_anew_gets_the_old_one_at_once():
    going_on, clock, count = threading.Event(), [0.0], [0]

    def make() -> str:
        count[0] += 1
        if count[0] > 1:
            assert going_on.wait(20)
        return f"text {count[0]}"

    latest = Latest(make, lambda: clock[0], lambda: clock[0])
    latest.now()
    clock[0] = 10.0
    slow = threading.Thread(target=latest.now)
    slow.start()
    while count[0] < 2:
        time.sleep(0.001)
    assert latest.now().text == "text 1"
    going_on.set()
    slow.join(20)
    assert latest.now().text == "text 2"


def test_what_failed_to_be_made_is_tried_again_and_the_old_one_stays():
    clock, fail = [0.0], [False]

    def make() -> str:
        if fail[0]:
            raise OSError("gone")
        return "text"

    latest = Latest(make, lambda: clock[0], lambda: clock[0])
    latest.now()
    clock[0], fail[0] = 10.0, True
    with pytest.raises(OSError, match="gone"):
        latest.now()
    clock[0] = 11.0
    assert latest.now().text == "text", "for the length of the pause"
    clock[0], fail[0] = 20.0, False
    assert latest.now().text == "text"


def test_a_run_that_is_moved_away_is_no_fault(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    pages, before = pages_of(tmp_path / "run", options(), print), mark_of(tmp_path / "run")
    pages.data.now()
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    assert mark_of(tmp_path / "run") != before
    assert json.loads(pages_of(tmp_path / "run", options(), print).data.now().text)["runs"][0]["name"] == "run"


# --- the verb ---


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert command(["watch", str(tmp_path), "--port", "0"]) == 2
    assert "not the folder of a run" in capsys.readouterr().err
    assert command(["watch", str(tmp_path / "file"), "--port", "0"]) == 2
    assert "not the folder of a run" in capsys.readouterr().err


def test_a_folder_that_never_comes_is_refused(tmp_path):
    said: list[str] = []
    with pytest.raises(ConfigError, match="no such folder"):
        await_run(tmp_path / "none", said.append, seconds=0.3)
    assert "waiting" in said[0]


def test_a_run_that_only_begins_is_waited_for(tmp_path):
    said: list[str] = []
    later = threading.Timer(0.4, lambda: (tmp_path / "soon").mkdir())
    later.start()
    await_run(tmp_path / "soon", said.append, seconds=30)
    later.join()
    assert "waiting" in said[0]


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    (tmp_path / ".lock").touch()
    pages = pages_of(tmp_path, options(), print)
    text = pages.data.now().text
    assert json.loads(text)["runs"][0]["rows"] == 0
    assert "<!doctype html>" in pages.page(text).lower()[:100]


def test_a_port_that_is_taken_is_refused_in_one_line(run, capsys):
    with listen(0) as taken:
        port = taken.getsockname()[1]
        assert command(["watch", str(run), "--port", str(port)]) == 2
    error = capsys.readouterr().err.strip()
    assert f"port: {port} is taken" in error
    assert "--port 0" in error
    assert len(error.splitlines()) == 1


def test_without_the_web_framework_it_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"pip install 'groundup\[watch\]'"):
        require_framework()
    assert command(["watch", str(run)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize("given", [["--port", "-1"], ["--port", "70000"], ["--threads", "0"]], ids=" ".join)
def test_values_that_cannot_be_used_are_refused(run, given, capsys):
    assert command(["watch", str(run), *given]) == 2
    assert given[0].strip("-") in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_says_its_address_serves_and_ends_quietly(run, tmp_path):
    """Without a question to the model no torch is imported: the page beside a training stays light."""
    script = "import sys; from groundup.cli.main import run; code = run(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "watch", str(run), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)", first)
    assert found, first
    assert f"ssh -N -L {found[1]}:127.0.0.1:{found[1]}" in process.stderr.readline()
    connection = HTTPConnection("127.0.0.1", int(found[1]), timeout=30)
    connection.request("GET", "/data.json")
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out.split() == ["0", "False"]
    assert err == ""


@pytest.mark.slow
def test_a_browser_shows_the_token_view(served, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}",
         "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", f"http://127.0.0.1:{served.port}/tokens"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, "an error of the page"
    assert done.stdout.count('class="bar after') == 30
    assert "checkpoint-12" in done.stdout
