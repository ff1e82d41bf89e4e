"""Whether the hub is used, or only its cache on this machine."""

import socket

import pytest
from huggingface_hub import constants

from grpo.config import hub


@pytest.fixture(autouse=True)
def endpoint(monkeypatch):
    """A function that sets the port of the hub. At first nothing answers there."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "_unreachable", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def set_address(port):
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")

    set_address(9)
    return set_address


def test_only_the_cache_is_used_while_the_hub_cannot_be_reached(endpoint, caplog):
    for _ in range(2):
        hub.use_cache_if_hub_is_unreachable("me/model")
        assert constants.is_offline_mode()
        assert hub.why_offline() == "there is no connection to http://127.0.0.1:9"
    assert len(caplog.records) == 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint(server.getsockname()[1])
        hub.use_cache_if_hub_is_unreachable("me/model")
    assert not constants.is_offline_mode()
    assert hub.why_offline() is None


def test_the_libraries_see_that_the_hub_is_not_used(monkeypatch):
    from datasets import config
    from transformers.utils.hub import is_offline_mode

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    hub.use_cache_if_hub_is_unreachable("me/model")
    assert config.HF_HUB_OFFLINE
    assert is_offline_mode()


def test_no_connection_is_tried_for_folders(tmp_path):
    hub.use_cache_if_hub_is_unreachable(str(tmp_path), "", "a/b/c", "./model", None, ["a", "b"])
    assert hub.why_offline() is None


def test_what_the_user_set_stays(monkeypatch, endpoint):
    from datasets import config

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    hub.use_cache_if_hub_is_unreachable("me/model")
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint(server.getsockname()[1])
        hub.use_cache_if_hub_is_unreachable("me/model")
    assert not constants.is_offline_mode()
    assert config.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.use_cache_if_hub_is_unreachable("me/model")
    assert hub.why_offline() == "HF_HUB_OFFLINE is set"


def test_behind_a_proxy_no_connection_is_tried(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    hub.use_cache_if_hub_is_unreachable("me/model")
    assert hub.why_offline() is None
