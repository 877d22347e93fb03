"""For tests: a way through to a server on which connections can be refused, cut, held up, faked or encrypted."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
from contextlib import suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


class Relay:
    """Passes bytes on to a port of this machine, both ways.

    Args:
        port: of the server behind it.
        certificate: a file with key and certificate: clients then speak TLS.
        host: the address of this machine to listen on.
        drop: connections whose first bytes have this text in them are closed.
        lose: of these the request is passed on, and the answer is not.

    Attributes:
        mode: what happens to new connections: `pass`, `refuse` (closed at once), `hold` (taken, never answered), or an
            answer, sent whatever was asked.
        connections: how many there were.
    """

    def __init__(
        self, port: int, certificate: Path | None = None, host: str = "127.0.0.1", drop: str = "", lose: str = ""
    ) -> None:
        self.mode: str | bytes = "pass"
        self.connections = 0
        self._port, self._drop, self._lose, self._tls = port, drop.encode(), lose.encode(), None
        if certificate:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate)
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if certificate else 'http'}://{host}:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break all connections that there are."""
        for one in list(self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Listen no more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # what waits in `accept` would go on listening
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError):
            if self._tls:
                client = self._tls.wrap_socket(client, server_side=True)
            self._open.add(client)
            if isinstance(self.mode, bytes):
                client.recv(65536)
                client.sendall(self.mode)
            elif self.mode == "hold":
                while client.recv(65536):
                    pass
            elif self.mode == "pass":
                first = client.recv(65536) if self._drop or self._lose else b""
                if self._lose and self._lose in first:
                    self._pass_and_lose(first)
                elif not (self._drop and self._drop in first):
                    self._pass(client, first)
        self._open.discard(client)
        client.close()

    def _pass_and_lose(self, first: bytes) -> None:
        with socket.create_connection(("127.0.0.1", self._port)) as server:
            server.sendall(first)
            server.recv(65536)

    def _pass(self, client: socket.socket, first: bytes) -> None:
        with socket.create_connection(("127.0.0.1", self._port)) as server:
            server.sendall(first)
            self._open.add(server)
            back = threading.Thread(target=_pump, args=(server, client), daemon=True)
            back.start()
            _pump(client, server)
            back.join()
            self._open.discard(server)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while content := source.recv(65536):
            target.sendall(content)
    for one in (source, target):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def write_certificate(folder: Path) -> Path:
    """A key and a certificate of its own for 127.0.0.1, in one file, which is its own authority too."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "whisper-jobs test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    path = folder / "certificate.pem"
    path.write_bytes(secret + certificate.public_bytes(serialization.Encoding.PEM))
    return path
