"""How the public port talks: TLS and mutual TLS that follow their files, compression, sizes."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from frontends import ASK, Frontend
from grpc import StatusCode

from quire.config import ServerConfig
from quire.errors import InvalidConfig
from quire.protos.v1 import generation_pb2 as pb
from quire.protos.v1.generation_pb2_grpc import GenerationServiceStub

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


def openssl(*args: object, stdin: str = "") -> None:
    command = ["openssl", *map(str, args)]
    subprocess.run(command, check=True, input=stdin, text=True, capture_output=True)


class Authority:
    """A root certificate, and what it signs."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.cert, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        self._make_key(self._key)
        subject = ("-subj", f"/CN={name}")
        openssl("req", "-x509", "-key", self._key, "-out", self.cert, "-days", 2, *subject)

    def sign(self, name: str) -> tuple[Path, Path]:
        """A certificate for this machine, and its key."""
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        request, more = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        self._make_key(key)
        openssl("req", "-new", "-key", key, "-out", request, "-subj", f"/CN={name}")
        more.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        by = ("-CA", self.cert, "-CAkey", self._key, "-CAcreateserial", "-days", 2)
        openssl("x509", "-req", "-in", request, *by, "-extfile", more, "-out", cert)
        return cert, key

    @staticmethod
    def _make_key(path: Path) -> None:
        openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path)


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "root")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("others"), "others")


def trusting(ca: Authority, pair: tuple[Path, Path] | None = None) -> grpc.ChannelCredentials:
    cert, key = pair or (None, None)
    return grpc.ssl_channel_credentials(
        ca.cert.read_bytes(), key and key.read_bytes(), cert and cert.read_bytes()
    )


def outcome(frontend: Frontend, credentials: grpc.ChannelCredentials | None) -> StatusCode:
    """Of a call over a new connection."""
    try:
        frontend.stub(credentials).Generate(ASK, timeout=20)
    except grpc.RpcError as error:
        return error.code()
    return StatusCode.OK


COMPRESSIONS = (grpc.Compression.NoCompression, grpc.Compression.Gzip)


class Tap:
    """Stands between one caller and a frontend, and counts the bytes of responses."""

    def __init__(self, frontend: Frontend):
        self._frontend = frontend
        self.received = 0

    def __enter__(self) -> Tap:
        self._server = self._frontend.run(lambda: asyncio.start_server(self._join, "127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *error: object) -> None:
        self._frontend.loop.call_soon_threadsafe(self._server.close)

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._frontend.address.rpartition(":")
        answers, asks = await asyncio.open_connection(host, int(port))

        async def pump(source: Any, target: Any, *, count: bool) -> None:
            while data := await source.read(65536):
                self.received += len(data) * count
                target.write(data)
            target.close()

        await asyncio.gather(pump(reader, asks, count=False), pump(answers, writer, count=True))


def replace(source: Path, target: Path) -> None:
    """As whoever renews certificates should: in one go."""
    shutil.copy(source, fresh := target.with_suffix(".new"))
    os.replace(fresh, target)


def test_tls_follows_its_files(
    folder: Path,
    tmp_path: Path,
    ca: Authority,
    others: Authority,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cert, key = tmp_path / "cert", tmp_path / "key"
    for source, target in zip(ca.sign("first"), (cert, key), strict=True):
        replace(source, target)
    with Frontend(folder, tls_cert=str(cert), tls_key=str(key)) as frontend:
        assert outcome(frontend, trusting(ca)) is StatusCode.OK
        assert outcome(frontend, None) is StatusCode.UNAVAILABLE
        assert outcome(frontend, trusting(others)) is StatusCode.UNAVAILABLE
        standing = frontend.stub(trusting(ca))
        standing.Generate(ASK, timeout=20)

        new_cert, new_key = others.sign("second")
        replace(new_cert, cert)  # the key does not fit it yet
        assert outcome(frontend, trusting(ca)) is StatusCode.OK
        assert outcome(frontend, trusting(ca)) is StatusCode.OK
        assert caplog.text.count("stay in force") == 1 and "tls_key" in caplog.text
        replace(new_key, key)
        assert outcome(frontend, trusting(others)) is StatusCode.OK
        assert outcome(frontend, trusting(ca)) is StatusCode.UNAVAILABLE
        standing.Generate(ASK, timeout=20)

        cert.unlink()
        assert outcome(frontend, trusting(others)) is StatusCode.OK


def test_mutual_tls_asks_for_a_certificate_of_its_own_authority(
    folder: Path, ca: Authority, others: Authority
) -> None:
    cert, key = map(str, ca.sign("server"))
    files = {"tls_cert": cert, "tls_key": key, "tls_client_ca": str(ca.cert)}
    with Frontend(folder, **files) as frontend:
        assert outcome(frontend, trusting(ca, ca.sign("client"))) is StatusCode.OK
        assert outcome(frontend, trusting(ca)) is StatusCode.UNAVAILABLE
        assert outcome(frontend, trusting(ca, others.sign("stranger"))) is StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda files: files["tls_cert"].unlink(), "tls_cert: .* cannot be read: No such file"),
        (lambda files: files["tls_key"].unlink(), "tls_key: .* cannot be read"),
        (lambda files: files["tls_client_ca"].unlink(), "tls_client_ca: .* cannot be read"),
        (lambda files: files["tls_cert"].write_text("x"), "tls_cert: .* holds no PEM certificate"),
        (lambda files: files["tls_key"].write_text("x"), "tls_key: .* holds no PEM key"),
        (lambda files: files["tls_client_ca"].write_text("x"), "tls_client_ca: .* holds no PEM"),
    ],
)
def test_a_bad_file_is_refused_before_the_port_is_open(
    folder: Path, tmp_path: Path, ca: Authority, spoil: Callable[[Any], Any], says: str
) -> None:
    cert, key = ca.sign("to be spoiled")
    files = {}
    sources = {"tls_cert": cert, "tls_key": key, "tls_client_ca": ca.cert}
    for name, source in sources.items():
        files[name] = Path(shutil.copy(source, tmp_path / name))
    spoil(files)
    with pytest.raises(InvalidConfig, match=says):
        Frontend(folder, **{name: str(path) for name, path in files.items()}).__enter__()


def test_requests_may_be_compressed(folder: Path) -> None:
    with Frontend(folder) as frontend:
        stub = frontend.stub()
        for compression in (*COMPRESSIONS, grpc.Compression.Deflate):
            stub.Generate(ASK, timeout=20, compression=compression)
        assert len({request.prompt for request in frontend.link.requests}) == 1


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
def test_responses_are_compressed_where_it_is_set(folder: Path, method: str) -> None:
    sizes = {}
    for compression in ("none", "gzip"):
        with Frontend(folder, compression=compression) as frontend, Tap(frontend) as tap:
            frontend.link.tokens = (7,) * 4000
            with grpc.insecure_channel(tap.address) as channel:
                call = getattr(GenerationServiceStub(channel), method)
                answer = call(ASK, timeout=20)
                messages = [answer] if method == "Generate" else list(answer)
                assert sum(len(message.token_ids) for message in messages) == 4000
            sizes[compression] = tap.received
    assert sizes["none"] > 4000 and sizes["gzip"] < sizes["none"] / 3


def test_a_request_above_the_limit_is_refused_compressed_or_not(folder: Path) -> None:
    with Frontend(folder, max_message_size="64KiB") as frontend:
        stub = frontend.stub()
        for size, expected in ((2_000, StatusCode.OK), (70_000, StatusCode.RESOURCE_EXHAUSTED)):
            request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * size))
            for compression in COMPRESSIONS:
                try:
                    stub.Generate(request, timeout=20, compression=compression)
                    code = StatusCode.OK
                except grpc.RpcError as error:
                    code = error.code()
                assert code is expected, (size, compression)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"host": "0.0.0.0"}, "host: got '0.0.0.0', which other machines reach"),
        ({"host": "::"}, "host: got '::'"),
        ({"host": "example.org"}, "host: got 'example.org'"),
        ({"tls_cert": "x"}, "tls_key: got none, must be given together with tls_cert"),
        ({"tls_key": "x"}, "tls_cert: got none, must be given together with tls_key"),
        ({"tls_client_ca": "x"}, "tls_client_ca: works with tls_cert and tls_key"),
        ({"host": "0.0.0.0", "tls_cert": "x", "tls_key": "y"}, "host: got"),
        ({"compression": "zip"}, "compression: got 'zip', must be one of none, gzip"),
    ],
)
def test_settings_that_make_no_sense_or_open_the_door(settings: Any, says: str) -> None:
    with pytest.raises(InvalidConfig, match=says):
        ServerConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"host": "localhost"},
        {"host": "127.3.2.1"},
        {"host": "::1"},
        {"host": "0.0.0.0", "api_keys": "file"},
        {"host": "0.0.0.0", "insecure": True},
        {"host": "0.0.0.0", "tls_cert": "x", "tls_key": "y", "tls_client_ca": "z"},
    ],
)
def test_settings_that_are_fine(settings: Any) -> None:
    ServerConfig(**settings)
