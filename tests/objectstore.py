"""For tests: moto's S3 server with authentication enforced, in a process of its own, and a proxy that breaks calls."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.request import Request as UrlRequest
from urllib.request import urlopen

import boto3
import pytest
from botocore.config import Config

BUCKET = "speech"
REGION = "us-east-1"

_SERVER = """
import sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

app, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

def atomic(environ, start_response):
    # moto looks and writes in two steps; the stores that it stands for do both at once.
    if "HTTP_IF_NONE_MATCH" in environ or "HTTP_IF_MATCH" in environ:
        with one_at_a_time:
            return app(environ, start_response)
    return app(environ, start_response)

server = make_server("127.0.0.1", 0, atomic, True, request_handler=MotoRequestHandler)
print(server.server_port, flush=True)
server.serve_forever()
"""

_FULL = ["s3:*"]
_READ = ["s3:Get*", "s3:List*", "s3:Head*"]


@dataclass(frozen=True)
class Keys:
    """An access key."""

    id: str
    secret: str

    def variables(self, endpoint: str) -> dict[str, str]:
        """The environment of a client."""
        return {
            "AWS_ACCESS_KEY_ID": self.id,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }


def be(keys: Keys, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process be the client with these keys."""
    for name, value in keys.variables(endpoint).items():
        monkeypatch.setenv(name, value)


class Server:
    """moto's server, once it runs.

    Args:
        port: where it listens.
    """

    def __init__(self, port: int) -> None:
        self.port, self.endpoint = port, f"http://127.0.0.1:{port}"
        iam = self._client("iam", Keys("setup", "setup"))
        self.writer = self._user(iam, "writer", _FULL)
        self.reader = self._user(iam, "reader", _READ)
        self._client("s3", Keys("setup", "setup")).create_bucket(Bucket=BUCKET)
        plain = {"Content-Type": "text/plain"}
        urlopen(
            UrlRequest(f"{self.endpoint}/moto-api/reset-auth", data=b"0", headers=plain)
        ).close()  # enforce from now
        self.s3 = self._client("s3", self.writer)

    def _client(self, service: str, keys: Keys) -> Any:
        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            aws_access_key_id=keys.id,
            aws_secret_access_key=keys.secret,
            region_name=REGION,
            config=Config(retries={"total_max_attempts": 1}),
        )

    def _user(self, iam: Any, name: str, actions: list[str]) -> Keys:
        iam.create_user(UserName=name)
        statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName=name, PolicyName="allowed", PolicyDocument=policy)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return Keys(key["AccessKeyId"], key["SecretAccessKey"])

    def keys(self, prefix: str) -> list[str]:
        """The keys of all objects below a prefix."""
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def body(self, key: str) -> bytes:
        """An object's content."""
        content: bytes = self.s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content

    def uploads(self, prefix: str) -> list[dict[str, Any]]:
        """Large uploads that are not complete."""
        found: list[dict[str, Any]] = self.s3.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])
        return found


@contextmanager
def moto_server() -> Iterator[Server]:
    """moto's server with a bucket, a user who may do everything and one who may only read."""
    process = subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        yield Server(int(process.stdout.readline()))
    finally:
        process.kill()
        process.wait()


@dataclass
class Request:
    """What the proxy has seen of a call."""

    method: str
    path: str
    """With its query."""
    fault: str | None = None


Choose = Callable[[Request], str | None]

_BODIES = {"500": ("500 Internal Server Error", "InternalError"), "503": ("503 Slow Down", "SlowDown")}
FAULTS = ("500", "503", "reset", "cut", "lost", "stall")
"""What a call may meet: an error of the store; a reset before it arrives; a cut in the middle of its body or answer; an
answer that is lost after the call was made; silence."""


@dataclass
class Proxy:
    """Between a client and the server; breaks the calls that `choose` names a fault for.

    Args:
        port: of the server behind it.
        choose: gives the fault of a call; None: none.
        stall_s: how long it is silent where it stalls.
    """

    port: int
    choose: Choose = lambda request: None
    stall_s: float = 30.0
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Listen no more."""
        self._closed.set()
        self._listener.close()

    def faults(self) -> list[str]:
        """The faults that calls have met."""
        return [request.fault for request in list(self.requests) if request.fault]

    def sent(self, method: str, text: str = "") -> list[Request]:
        """The calls of one method whose path has a text in it."""
        return [request for request in list(self.requests) if request.method == method and text in request.path]

    def _accept(self) -> None:
        while not self._closed.is_set():
            with suppress(OSError):
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError), client:
            while self._one_call(client):
                pass

    def _one_call(self, client: socket.socket) -> bool:
        """Pass on one call and its answer; whether the connection may be used again."""
        head, rest = _read_head(client)
        if not head:
            return False
        method, path, *_ = head.decode("latin-1").split(" ", 2)
        request = Request(method, path)
        request.fault = self.choose(request)
        self.requests.append(request)
        length = _length(head)
        if request.fault == "reset":
            return _reset(client)
        if b"100-continue" in head.lower():
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.fault == "cut" and length:
            with socket.create_connection(("127.0.0.1", self.port)) as server:
                server.sendall(head + (rest + _read(client, length // 2 - len(rest)))[: length // 2])
                return _reset(client)
        body = rest + _read(client, length - len(rest))
        if request.fault == "stall":
            self._closed.wait(self.stall_s)
            return False
        if request.fault in _BODIES:
            status, code = _BODIES[request.fault]
            text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            answer = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n\r\n"
            client.sendall(answer.encode() + (b"" if method == "HEAD" else text))
            return True
        return self._pass_on(request, head, body, client)

    def _pass_on(self, request: Request, head: bytes, body: bytes, client: socket.socket) -> bool:
        head = head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)
        head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))
        with socket.create_connection(("127.0.0.1", self.port)) as server:
            server.sendall(head + body)
            answer = bytearray()
            while piece := server.recv(1 << 20):
                answer += piece
        if request.fault == "lost":
            return _reset(client)
        if request.fault == "cut":
            client.sendall(answer[: max(1, len(answer) * 2 // 3)])
            return _reset(client)
        client.sendall(answer)
        return False


def _read_head(client: socket.socket) -> tuple[bytes, bytes]:
    content = b""
    while b"\r\n\r\n" not in content:
        piece = client.recv(1 << 16)
        if not piece:
            return b"", b""
        content += piece
    head, _, rest = content.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


def _read(client: socket.socket, length: int) -> bytes:
    content = bytearray()
    while len(content) < length:
        piece = client.recv(min(1 << 20, length - len(content)))
        if not piece:
            raise ConnectionError
        content += piece
    return bytes(content)


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        if line.lower().startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0


def _reset(client: socket.socket) -> bool:
    """Close a connection with a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    return False


def at_random(share: float, seed: int, faults: tuple[str, ...] = FAULTS[:5]) -> Choose:
    """Faults for a share of the calls, the same ones in every run as far as the calls are the same."""
    generator, lock = random.Random(seed), threading.Lock()

    def choose(request: Request) -> str | None:
        with lock:
            return generator.choice(faults) if generator.random() < share else None

    return choose


def nth(number: int, fault: str, method: str, text: str = "", *, calls: int = 1) -> Choose:
    """A fault for the nth call (1, 2, ...), and those that follow, of a method whose path has a text in it."""
    count, lock = 0, threading.Lock()

    def choose(request: Request) -> str | None:
        nonlocal count
        with lock:
            if request.method == method and text in request.path:
                count += 1
                return fault if number <= count < number + calls else None
            return None

    return choose


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)
