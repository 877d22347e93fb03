"""Which cluster and which token a command takes, and that the token is never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.client.address import DEFAULT_ADDRESS, find_cluster, find_token
from service.errors import InputError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without a token of this machine's user."""
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (None, {}, DEFAULT_ADDRESS),
        (None, {"RAY_ADDRESS": "http://a:8265"}, "http://a:8265"),
        (None, {"RAY_ADDRESS": "http://a:8265", "RAY_API_SERVER_ADDRESS": "http://b:1"}, "http://b:1"),
        ("http://c:2/", {"RAY_API_SERVER_ADDRESS": "http://b:1", "RAY_ADDRESS": "http://a:3"}, "http://c:2"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, DEFAULT_ADDRESS),
        (None, {"RAY_ADDRESS": "auto"}, DEFAULT_ADDRESS),
        ("head:8265", {}, "http://head:8265"),
        ("https://ray.example.org/cluster-1/", {}, "https://ray.example.org/cluster-1"),
        ("http://[::1]:8265", {}, "http://[::1]:8265"),
    ],
)
def test_a_word_on_the_command_line_wins_over_the_environment(
    given: str | None, environment: dict[str, str], expected: str
) -> None:
    assert find_cluster(given, environment).url == expected


@pytest.mark.parametrize(
    ("address", "way_out"),
    [
        ("ray://head:10001", "an address of Ray's client; give the dashboard's"),
        ("ftp://head", "is no address of a dashboard"),
        ("http://head:99999", "is no address of a dashboard"),
        ("http://", "is no address of a dashboard"),
        ("http://[::1", "is no address of a dashboard"),
        ("http://head\x07:8265", "is no address of a dashboard"),
        ("http://head:8265?x=1", "is no address of a dashboard"),
        ("http://me:secret@head:8265", "holds a user or password"),
    ],
)
def test_what_is_no_address_of_a_dashboard_is_refused(address: str, way_out: str) -> None:
    with pytest.raises(InputError) as caught:
        find_cluster(address, {})
    assert way_out in str(caught.value)
    assert str(caught.value).startswith("--address: ")
    assert "secret" not in str(caught.value)


def test_the_token_comes_from_the_environment_then_a_named_file_then_rays_own(home: Path) -> None:
    assert find_token({}) == (None, "")
    (home / ".ray").mkdir()
    (home / ".ray/auth_token").write_text("of-ray\n")
    (home / "mine").write_text("  of-file \n")
    named = {"RAY_AUTH_TOKEN_PATH": str(home / "mine")}
    assert find_token({}) == ("of-ray", str(home / ".ray/auth_token"))
    assert find_token(named) == ("of-file", f"RAY_AUTH_TOKEN_PATH={home / 'mine'}")
    assert find_token(named | {"RAY_AUTH_TOKEN": "of-variable"}) == ("of-variable", "RAY_AUTH_TOKEN")
    assert find_token(named | {"RAY_AUTH_MODE": "disabled"}) == (None, "")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b" \n", "is empty"),
        (b"two words", "with a blank"),
        (b"\xff", "no text"),
    ],
)
def test_a_file_without_a_token_is_refused_and_its_content_not_shown(
    home: Path, content: bytes | None, fault: str
) -> None:
    path = home / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        find_token({"RAY_AUTH_TOKEN_PATH": str(path)})
    assert fault in str(caught.value)
    assert "set RAY_AUTH_TOKEN" in str(caught.value)
    assert "two words" not in str(caught.value)


def test_a_token_is_sent_and_never_shown() -> None:
    cluster = find_cluster("http://head:8265", {"RAY_AUTH_TOKEN": "s3cret"})
    assert cluster.headers == {"Authorization": "Bearer s3cret"}
    assert "s3cret" not in repr(cluster)
    assert find_cluster("http://head:8265", {}).headers == {}


@pytest.mark.parametrize(
    ("url", "in_clear"),
    [
        ("http://head:8265", True),
        ("https://head", False),
        ("http://127.0.0.1:8265", False),
        ("http://localhost:1", False),
    ],
)
def test_a_token_that_others_could_read_on_its_way_is_told_of(url: str, in_clear: bool) -> None:
    assert find_cluster(url, {"RAY_AUTH_TOKEN": "s3cret"}).sends_token_in_clear is in_clear
    assert not find_cluster(url, {}).sends_token_in_clear
