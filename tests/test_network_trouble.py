"""What is said while the network fails, and when it is given up at once. No test waits."""

import json
import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import fsspec
import pytest
from huggingface_hub import close_session
from huggingface_hub.utils import _detect_agent

import lingconv
from lingconv import ConvertOptions, NetworkError, PublishOptions, convert
from lingconv.cli.retry_notes import hear_retries
from lingconv.cli.terminal import terminal
from lingconv.storage.hub import client
from lingconv.storage.retries import LOGGER, Retry, tell
from tests.hub_server import TOKEN, Fire
from tests.hub_support import environment, point_client_at
from tests.kit import command
from tests.test_hub_read import hub

__all__ = ["hub"]  # the fixture

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
MODEL = "hf://org/tiny-ling-v2"


class First(Fire):
    """The first requests of one kind go wrong."""

    def __init__(self, kind, count):
        super().__init__(**{kind: 1.0})
        self.count = count

    def strikes(self, kind):
        return self.met[kind] < self.count and super().strikes(kind)


@pytest.fixture
def told():
    """The retries that are told, as they come."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.extend(record.args)
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


@pytest.fixture
def slept(monkeypatch):
    """The pauses of our own tries, none of which is made."""
    found = []
    monkeypatch.setattr(client, "time", SimpleNamespace(sleep=found.append))
    return found


def refuse(monkeypatch, count):
    """Let the next connections of this process be refused; return how many were."""
    met, connect = [], socket.create_connection

    def connecting(address, timeout=None, **words):
        of_client = timeout == _detect_agent._REGISTRY_FETCH_TIMEOUT  # a question of its own
        if len(met) == count and not of_client:
            return connect(address, timeout, **words)
        if not of_client:
            met.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", connecting)
    return met


def unresolved(*arguments, **words):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_connection_that_is_not_answered_is_told_when_its_time_is_over(
    monkeypatch, tmp_path, golden, told, slept
):
    """The client alone waits for as long as the system does: minutes."""
    asked = []

    def unanswered(address, timeout=None, **words):
        if timeout != _detect_agent._REGISTRY_FETCH_TIMEOUT:  # a question of the client's own
            asked.append(timeout)
        raise TimeoutError("timed out")

    point_client_at(monkeypatch, "http://hub.invalid:84", tmp_path)
    monkeypatch.setattr(socket, "create_connection", unanswered)
    for publish in (PublishOptions(create=True), PublishOptions()):
        with pytest.raises(NetworkError, match="after 9 tries: timed out"):
            convert(golden, "hf://org/x", publish=publish)
    assert asked == [10.0] * 18
    assert [(each.reason, each.failures) for each in told] == [
        ("timed out", number) for number in range(1, 9)
    ] * 2


# The first contact -------------------------------------------------------------------------------


def test_a_hub_whose_name_is_unknown_is_given_up_at_once(monkeypatch, tmp_path, told, slept):
    point_client_at(monkeypatch, "http://hub.invalid", tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    with pytest.raises(NetworkError, match=r"hub\.invalid cannot be reached.*not known") as caught:
        lingconv.inspect("hf://org/x")
    assert "`HF_ENDPOINT`" in caught.value.hint
    assert (told, slept) == ([], [])


def test_a_hub_that_never_answered_and_refuses_is_given_up_at_once(
    monkeypatch, tmp_path, golden, told, slept
):
    point_client_at(monkeypatch, "http://hub.invalid:81", tmp_path)
    met = refuse(monkeypatch, 9)
    with pytest.raises(NetworkError, match=r"hub\.invalid:81 cannot be reached"):
        convert(golden, "hf://org/x", publish=PublishOptions(create=True))
    assert (len(met), told, slept) == (1, [], [])


def test_a_hub_that_answered_before_is_tried_again(hub, monkeypatch, told, slept):
    before = lingconv.inspect(MODEL)
    close_session()  # with the connections that it keeps
    refuse(monkeypatch, 3)
    assert lingconv.inspect(MODEL) == before
    assert [(each.place, each.failures, each.most) for each in told] == [
        (MODEL, number, 9) for number in (1, 2, 3)
    ]
    assert [each.wait_s for each in told] == slept
    assert all("Connection refused" in each.reason for each in told)


def test_a_store_whose_name_is_unknown_is_given_up_at_once(monkeypatch, store_of, told):
    store_of("http://store.invalid:82")
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    with pytest.raises(NetworkError, match=r"store\.invalid:82 cannot be reached") as caught:
        lingconv.inspect("s3://bucket/x")
    assert "`AWS_ENDPOINT_URL`" in caught.value.hint
    assert told == []


def test_a_store_that_refuses_is_given_up_at_once(monkeypatch, store_of, golden, told):
    store_of("http://127.0.0.1:83")
    met = refuse(monkeypatch, 9)
    with pytest.raises(NetworkError, match=r"127\.0\.0\.1:83 cannot be reached"):
        convert(golden, "s3://bucket/x", ConvertOptions(dtype="fp8"))
    assert (len(met), told) == (1, [])


# Tries -------------------------------------------------------------------------------------------


def test_a_busy_hub_is_told_before_each_pause(hub, told, slept):
    hub.fire = Fire(**{"503": 1.0})
    with pytest.raises(NetworkError, match="after 9 tries: the Hub answers 503"):
        lingconv.inspect(MODEL)
    assert [each.reason for each in told] == ["the Hub answers 503"] * 8
    assert [each.wait_s for each in told] == slept


def test_tries_of_the_client_itself_are_told_without_links(hub, told):
    hub.fire = First("upload 503", 2)
    convert(MODEL, "hf://org/out", publish=PublishOptions(create=True))
    assert [(each.place, each.failures, each.most) for each in told] in (
        [("localhost", 1, 5), ("localhost", 2, 5)],  # of one file, or of two at once
        [("localhost", 1, 5)] * 2,
    )
    assert all(each.reason == "HTTP Error 503" for each in told)
    assert [each.wait_s for each in told] in ([1, 2], [1, 1])  # as huggingface_hub has them
    assert "sig=" not in str(told)


@pytest.fixture
def store_of(monkeypatch):
    """Point S3's client at an endpoint."""

    def point(url):
        for name, value in {
            "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": url,
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()

    yield point
    fsspec.filesystem("s3").clear_instance_cache()


class Busy(BaseHTTPRequestHandler):
    """Answers 503 to all that is asked."""

    def do_GET(self):
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *words):
        pass


def test_tries_of_the_store_s_client_are_told(store_of, monkeypatch, told):
    async def at_once(endpoint, seconds):
        pass

    monkeypatch.setattr("aiobotocore.endpoint.AioEndpoint._sleep", at_once)
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store_of(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(NetworkError, match="s3://bucket/x"):
            lingconv.inspect("s3://bucket/x")
        server.shutdown()
    # AWS SDK reference, "Retry behavior": botocore's legacy mode makes five attempts.
    assert len(told) == 4
    assert {(each.place, each.reason) for each in told} == {
        ("S3", "retryable HTTP status code received: 503")
    }
    assert all(each.wait_s is not None for each in told)


# The command line --------------------------------------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_line_says_each_retry(hub, tmp_path, as_json):
    hub.fire = First("429", 2)  # whose Retry-After is 0
    words = ["inspect", MODEL, *(["--json"] if as_json else [])]
    done = command(*words, environment=environment(hub.endpoint, tmp_path / "home", TOKEN))
    assert done.exit_code == 0, done.err
    lines = done.err.splitlines()
    if as_json:
        assert [json.loads(line) for line in lines] == [
            {
                "event": "retry", "place": MODEL, "reason": "the Hub answers 429",
                "wait_s": 0.0, "failures": number, "most": 9,
            }
            for number in (1, 2)
        ]  # fmt: skip
    else:
        assert lines == [
            f"{MODEL}: the Hub answers 429; trying again in 0.0 s (failure {number} of 9)"
            for number in (1, 2)
        ]


def test_notes_of_retries_are_left_out_when_quiet(monkeypatch, capsys):
    logger = logging.getLogger(LOGGER)
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    hear_retries()
    for quiet, said in ((False, "x: busy; trying again\n"), (True, "")):
        monkeypatch.setattr(terminal, "quiet", quiet)
        tell(Retry("x", "busy"))
        assert capsys.readouterr().err == said
