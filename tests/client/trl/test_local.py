"""What is an address, and what starting a server says when it cannot."""

import pytest

from onebase.client.errors import UnavailableError
from onebase.client.trl import local
from onebase.client.trl.local import LocalServer, is_address


@pytest.mark.parametrize("target", ["127.0.0.1:7070", "gpu-box.lan:80", "localhost:65535", "[::1]:7070"])
def test_addresses(target):
    assert is_address(target)


@pytest.mark.parametrize("target", ["meta-llama/Llama-3.2-1B", "gpt2", "./base", "/models/a:b", "C:\\models"])
def test_models(target):
    assert not is_address(target)


def test_a_directory_that_looks_like_an_address_is_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base:1").mkdir()
    assert not is_address("base:1")


def test_without_the_server_the_way_out_is_named(monkeypatch):
    monkeypatch.setattr(local.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onebase\[server\]"):
        LocalServer("gpt2")


def test_what_the_server_said_is_in_the_error(tmp_path):
    with pytest.raises(UnavailableError, match="nowhere"):
        LocalServer(str(tmp_path / "nowhere"))
