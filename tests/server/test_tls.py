from __future__ import annotations

from pathlib import Path

import pytest
import typer
from certificates import Certificates, make_certificates
from server.harness import Live
from server.tenants import Guarded
from typer.testing import CliRunner

from onebase.client import SamplingParams, UnauthenticatedError, UnavailableError, connect, connect_async
from onebase.client.cli import app
from onebase.server import commands
from onebase.server.certificates import check_certificates
from onebase.server.config import ConfigError, EngineConfig, Security, ServerConfig


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("pem"))


def served(pem, **more):
    security = Security(tls_cert=pem.cert, tls_key=pem.key, **more)
    return Live(ServerConfig(engine=EngineConfig(model="fake"), port=0, drain_seconds=5, security=security))


def test_a_client_that_knows_the_authority_is_served_and_others_are_not(pem, tmp_path):
    with served(pem) as live:
        target = f"127.0.0.1:{live.port}"
        with connect(target, tls=pem.ca, wait=10) as client:
            assert client.info().base.model == "fake"
        for tls in (None, True):  # plain text; the system's authorities
            with pytest.raises(UnavailableError):
                connect(target, tls=tls, wait=1)


async def test_with_asyncio_too(pem, tmp_path):
    with Guarded(tmp_path, security={"tls_cert": pem.cert, "tls_key": pem.key}) as guarded:
        target, token = f"127.0.0.1:{guarded.port}", guarded.make("red")
        async with connect_async(target, tls=pem.ca, token=token, wait=10) as client:
            assert (await client.info()).base.model == "fake"
        with pytest.raises(UnauthenticatedError):
            await connect_async(target, tls=pem.ca, wait=10)


def test_a_token_and_tls_go_together(pem, tmp_path):
    with Guarded(tmp_path, security={"tls_cert": pem.cert, "tls_key": pem.key}) as guarded:
        target = f"127.0.0.1:{guarded.port}"
        with connect(target, tls=str(pem.ca), token=guarded.make("red"), wait=10) as client:
            assert [one.name for one in client.adapters()] == []
            assert list(
                client.stream("w", adapter="base", sampling=SamplingParams(max_new_tokens=2))
            )  # streams carry it too
        with pytest.raises(UnauthenticatedError) as told:
            connect(target, tls=pem.ca, token="ob_x_y", wait=10)
        assert told.value.reason == "TOKEN_UNKNOWN"


def test_where_clients_must_show_a_certificate_only_those_that_have_one_are_served(pem):
    with served(pem, tls_client_ca=pem.ca) as live:
        target = f"127.0.0.1:{live.port}"
        pair = (pem.client_cert, pem.client_key)
        with connect(target, tls=pem.ca, tls_certificate=pair, wait=10) as client:
            assert client.info().base.model == "fake"
        with pytest.raises(UnavailableError):
            connect(target, tls=pem.ca, wait=1)


def test_a_token_does_not_leave_the_machine_in_plain_text():
    with pytest.raises(ValueError, match="plain text: give tls=True"):
        connect("gpu-1:7070", token="ob_x_y", wait=1)
    with pytest.raises(UnavailableError):  # unless it is meant
        connect("gpu-1.invalid:7070", token="ob_x_y", tls=False, wait=1)
    with pytest.raises(ValueError, match="token is none"):
        connect("127.0.0.1:7070", token="two words")
    with pytest.raises(ValueError, match=r"tls is '/nowhere\.pem'"):
        connect("127.0.0.1:7070", tls="/nowhere.pem")
    with pytest.raises(ValueError, match="tls_certificate is set, and tls is not"):
        connect("127.0.0.1:7070", tls_certificate=("a", "b"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "gpu-1"])
def test_other_machines_are_served_over_tls_or_where_it_is_meant(pem, host):
    def config(**security):
        return ServerConfig(engine=EngineConfig(model="fake"), host=host, security=Security(**security))

    with pytest.raises(ConfigError, match=r"there is no TLS: give --tls-cert and --tls-key, or say --insecure"):
        config()
    config(insecure=True)
    config(tls_cert=pem.cert, tls_key=pem.key)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_this_machine_is_served_in_plain_text(host):
    ServerConfig(engine=EngineConfig(model="fake"), host=host)


def test_a_file_that_is_missing_is_named(pem, tmp_path):
    with pytest.raises(ConfigError, match="tls_key is '/nowhere'"):
        Security(tls_cert=pem.cert, tls_key=Path("/nowhere"))
    with pytest.raises(ConfigError, match="give --tls-cert and --tls-key, or neither"):
        Security(tls_cert=pem.cert)
    with pytest.raises(ConfigError, match="it needs --tls-cert"):
        Security(tls_client_ca=pem.ca)
    with pytest.raises(ConfigError, match="onebase token create"):
        Security(tokens=tmp_path / "none")


def test_files_that_are_no_certificates_are_named_by_their_flags_before_a_base_is_loaded(pem, tmp_path):
    def told(cert=pem.cert, key=pem.key, ca=pem.ca):
        with pytest.raises(ConfigError) as error:
            check_certificates(Security(tls_cert=cert, tls_key=key, tls_client_ca=ca))
        return str(error.value)

    check_certificates(Security(tls_cert=pem.cert, tls_key=pem.key, tls_client_ca=pem.ca))
    check_certificates(Security())
    bad, empty, locked, broken = (tmp_path / name for name in ("bad.pem", "empty.pem", "locked.key", "broken.pem"))
    bad.write_bytes(b"\xff\x00no certificate")
    empty.touch()
    locked.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nMA==\n-----END ENCRYPTED PRIVATE KEY-----\n")
    broken.write_text("-----BEGIN CERTIFICATE-----\nMA==\n-----END CERTIFICATE-----\n")
    for wrong in (bad, empty, pem.key, broken):
        assert told(cert=wrong) == f"--tls-cert is {str(wrong)!r}: it holds no certificate in PEM"
        assert told(ca=wrong) == f"--tls-client-ca is {str(wrong)!r}: it holds no certificate in PEM"
    for wrong in (bad, empty, pem.cert):
        assert told(key=wrong) == f"--tls-key is {str(wrong)!r}: it holds no private key in PEM"
    assert told(key=pem.client_key).startswith(
        f"--tls-key is {str(pem.client_key)!r}: it is not the key of --tls-cert {str(pem.cert)!r}"
    )
    assert "it wants a passphrase" in told(key=locked)


def test_the_command_looks_at_certificates_before_it_opens_the_base(pem):
    result = CliRunner().invoke(
        _serving(), ["/no/base", "--tls-cert", str(pem.cert), "--tls-key", str(pem.client_key)], env={"COLUMNS": "300"}
    )
    assert result.exit_code == 1
    assert "it is not the key of --tls-cert" in result.output


def _serving():
    command = typer.Typer()
    command.command()(commands.serve)
    return command


def told(port, **settings):
    with pytest.raises((UnavailableError, ValueError)) as error:
        connect(f"127.0.0.1:{port}", wait=1, **settings)
    return str(error.value)


def test_a_client_whose_tls_does_not_fit_is_told_how(pem, tmp_path):
    (tmp_path / "other").mkdir()
    stranger = make_certificates(tmp_path / "other")
    with served(pem) as live:
        assert "the server's certificate is not signed by" in told(live.port, tls=stranger.ca)
        assert repr(str(stranger.ca)) in told(live.port, tls=stranger.ca)
        assert "not signed by the system's authorities" in told(live.port, tls=True)
        assert "as a server does that wants TLS: give its certificates as tls (--tls-ca, tls_ca)" in told(live.port)
    with Live() as live:
        assert "this server speaks plain text: leave tls (--tls-ca, tls_ca) out" in told(live.port, tls=pem.ca)
    with served(pem, tls_client_ca=pem.ca) as live:
        assert "wants a client's certificate, give tls_certificate" in told(live.port, tls=pem.ca)
    assert "start one with `onebase serve MODEL`" in told(1)
    assert told(1, tls=pem.key) == f"tls is {str(pem.key)!r}: the file holds no certificates in PEM"


def test_commands_name_their_flag(pem):
    for path, said in (("/nowhere.pem", "No such file or directory"), (str(pem.key), "holds no certificates in PEM")):
        result = CliRunner().invoke(app, ["status", "--tls-ca", path], env={"COLUMNS": "300", "TERM": "dumb"})
        assert result.exit_code == 2
        assert "--tls-ca" in result.stderr
        assert "--server" not in result.stderr
        assert said in result.stderr


@pytest.mark.parametrize("scheme", ["http://", "https://"])
def test_an_address_is_no_url(scheme):
    with pytest.raises(ValueError, match=f"give HOST:PORT, without {scheme}"):
        connect(f"{scheme}127.0.0.1:7070")
