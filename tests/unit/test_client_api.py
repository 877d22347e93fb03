"""What a command says of an address where no cluster, no sound cluster or another server answers."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from relay import Relay, write_certificate

from service.client import api as api_module
from service.client.address import Cluster
from service.client.api import Api
from service.errors import InputError, UnauthorisedError, UnreachableError


class _Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>welcome</html>" if self.path != "/api/version" else b"{}")

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def page() -> Iterator[int]:
    """The port of a server that is no Ray dashboard."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


@pytest.fixture
def relay(page: int) -> Iterator[Relay]:
    running = Relay(page)
    yield running
    running.close()


def api_at(url: str, token: str | None = None) -> Api:
    return Api(Cluster(url, token, "RAY_AUTH_TOKEN"), patience_s=0)


def test_another_server_is_no_cluster(relay: Relay) -> None:
    with pytest.raises(UnreachableError, match="what answers there is no Ray dashboard; check the address"):
        api_at(relay.url).version()
    with pytest.raises(UnreachableError, match=r"no Ray dashboard \('<html>welcome</html>'\); check the address"):
        api_at(relay.url).jobs()


def test_an_address_where_nobody_listens_is_named(relay: Relay) -> None:
    relay.close()
    with pytest.raises(UnreachableError) as caught:
        api_at(relay.url).version()
    assert str(caught.value).startswith(f"{relay.url}: no cluster answers there (")
    assert str(caught.value).endswith("; check --address, the network and whether the head runs")
    with pytest.raises(UnreachableError), api_at(relay.url).tail("job"):
        pass


def test_a_dashboard_that_takes_connections_and_is_silent_is_not_waited_for_for_ever(
    relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_module, "TIMEOUT_S", 0.3)
    relay.mode = "hold"
    with pytest.raises(
        UnreachableError, match=r"takes connections but does not answer within 0\.3 s; look at the head"
    ):
        api_at(relay.url).version()
    with pytest.raises(UnreachableError, match="does not answer"), api_at(relay.url).tail("job"):
        pass


def test_a_dashboard_that_answers_500_is_asked_again_and_then_named(relay: Relay) -> None:
    relay.mode = b"HTTP/1.1 500 Oops\r\nContent-Length: 25\r\nConnection: close\r\n\r\nTraceback\n  Error: broken"
    patient = Api(Cluster(relay.url), patience_s=1.2)
    with pytest.raises(UnreachableError) as caught:
        patient.jobs()
    assert relay.connections >= 2
    assert "answers HTTP 500 (Error: broken); ask again in a while" in str(caught.value)


def test_a_token_follows_no_redirection(relay: Relay, page: int) -> None:
    to = f"http://127.0.0.1:{page}/api/version".encode()
    relay.mode = b"HTTP/1.1 302 Found\r\nLocation: " + to + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with pytest.raises(UnreachableError, match=f"sends its callers to http://127.0.0.1:{page}/api/version; give that"):
        api_at(relay.url, "s3cret").version()


@pytest.mark.parametrize(
    ("status", "token", "text"),
    [
        (401, None, "wants a token, and none was found here (HTTP 401); set RAY_AUTH_TOKEN"),
        (403, None, "wants a token, and none was found here (HTTP 403); set RAY_AUTH_TOKEN"),
        (401, "s3cret", "refuses the request (HTTP 401); set RAY_AUTH_TOKEN"),
        (403, "s3cret", "refuses the token of RAY_AUTH_TOKEN (HTTP 403)"),
    ],
)
def test_a_refused_token_is_told_from_a_missing_one(relay: Relay, status: int, token: str | None, text: str) -> None:
    relay.mode = f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
    for call in (api_at(relay.url, token).version, api_at(relay.url, token).tail("job").__enter__):
        with pytest.raises(UnauthorisedError) as caught:
            call()
        assert text in str(caught.value)
        assert "s3cret" not in str(caught.value)


def test_a_certificate_that_is_not_trusted_is_refused_and_the_way_out_works(
    page: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = write_certificate(tmp_path)
    relay = Relay(page, certificate)
    with pytest.raises(UnreachableError, match="its certificate is not trusted here; set SSL_CERT_FILE to the file"):
        api_at(relay.url).version()
    with pytest.raises(UnreachableError, match="its certificate is not trusted here"), api_at(relay.url).tail("job"):
        pass
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with pytest.raises(UnreachableError, match="is no Ray dashboard"):  # it was heard
        api_at(relay.url).version()
    relay.close()


def test_a_file_of_authorities_that_is_not_there_is_named(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nonesuch.pem")
    with pytest.raises(InputError, match=r'^SSL_CERT_FILE: "/nonesuch\.pem" cannot be read'):
        api_at(relay.url)


def test_a_server_that_answers_json_of_its_own_is_no_cluster(relay: Relay) -> None:
    for content in (b'{"a": 1}', b"[1, 2]", b'[{"submission_id": "x"}]', b"null"):
        relay.mode = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(content), content)
        for call in (api_at(relay.url).jobs, lambda: api_at(relay.url).job("x"), api_at(relay.url).version):
            with pytest.raises(UnreachableError, match="what answers there is no Ray dashboard"):
                call()


def test_what_is_on_this_machine_is_reached_through_no_proxy(
    relay: Relay, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Relay(page)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv(name.lower(), proxy.url)
    with pytest.raises(UnreachableError, match="is no Ray dashboard"):
        api_at(relay.url, "s3cret").version()
    with pytest.raises(UnreachableError), api_at(relay.url, "s3cret").tail("job"):
        pass
    assert (relay.connections, proxy.connections) == (2, 0)
    proxy.close()
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(InputError, match=r"^HTTP_PROXY, HTTPS_PROXY or ALL_PROXY: name a proxy that cannot be used"):
        api_at("http://elsewhere:8265")
