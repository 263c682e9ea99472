"""Rules on URLs: the allow-list, strict parsing, and addresses that are public, embedded ones included."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import MediaUrlRefused
from server.media.addresses import UrlRules, host_of
from server.settings import Settings, SettingsError


def rules(**settings: object) -> UrlRules:
    fields = {"media_url_hosts": "cdn.example, .img.example", "media_url_ports": "443, 8443", **settings}
    return UrlRules.from_settings(Settings.model_validate(fields))


@pytest.mark.parametrize(
    "url",
    [
        "https://cdn.example/a.png",
        "HTTPS://CDN.EXAMPLE/a.png?x=1#y",
        "https://cdn.example:443/",
        "https://cdn.example:8443/",
        "https://a.img.example/",
        "https://a.b.img.example/",
    ],
)
def test_a_listed_host_is_allowed(url: str) -> None:
    assert host_of(rules().read(url, "prompt")) in {"cdn.example", "a.img.example", "a.b.img.example"}


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://other.example/", "host"),
        ("https://img.example/", "host"),  # .img.example allows only its subdomains
        ("https://notimg.example/", "host"),
        ("https://cdn.example.evil/", "host"),
        ("https://cdn.example./", "host"),
        ("https://evil/cdn.example", "host"),
        ("https://evil#cdn.example", "host"),
        ("https://evil?cdn.example", "host"),
        ("https://127.0.0.1/", "host"),
        ("https://[::1]/", "host"),
        ("https://0x7f.1/", "host"),
        ("https:///a.png", "host"),
        ("https:cdn.example", "host"),
        ("https://xn--cdn-example-/", "host"),
        ("https://cdn%2eexample/", "host"),
        ("http://cdn.example/", "begin with https://"),
        ("ftp://cdn.example/", "begin with https://"),
        ("file:///etc/passwd", "begin with https://"),
        ("//cdn.example/", "begin with https://"),
        ("https://cdn.example:80/", "port"),
        ("https://cdn.example:0/", "port"),
        ("https://cdn.example:22/", "port"),
        ("https://user@cdn.example/", "user or a password"),
        ("https://user:password@cdn.example/", "user or a password"),
        ("https://cdn.example@evil/", "user or a password"),
        ("https://cdn.example\\@evil/", "invalid URL"),
        ("https://evil\\.cdn.example/", "invalid URL"),
        ("https://cdn.example/a b", "invalid URL"),
        ("https://cdn.example/\n", "invalid URL"),
        ("https://cdn.example/\r\nHost: evil", "invalid URL"),
        ("https://cdn.example/\x00", "invalid URL"),
        ("https://cdn。example/", "invalid URL"),
        ("https://cdn.example:x/", "invalid URL"),
        ("https://cdn.example/" + "a" * 5000, "invalid URL"),
    ],
)
def test_any_other_url_is_refused(url: str, reason: str) -> None:
    with pytest.raises(MediaUrlRefused, match=reason) as caught:
        rules().read(url, "prompt[0].image_url.url")
    assert caught.value.param == "prompt[0].image_url.url"
    assert caught.value.status == 400


def test_plain_http_requires_a_setting() -> None:
    allowed = rules(media_url_http=True, media_url_ports="80")
    assert allowed.read("http://cdn.example/a", "").scheme == "http"
    with pytest.raises(MediaUrlRefused, match="begin with https:// or http://"):
        allowed.read("gopher://cdn.example/a", "")


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    for url in (text, f"https://{text}", f"https://cdn.example{text}"):
        with suppress(MediaUrlRefused):
            host = host_of(rules().read(url, "x"))
            assert host == "cdn.example" or host.endswith(".img.example")


PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
NOT_PUBLIC = {
    "loopback": "127.0.0.1",
    "all of loopback": "127.9.9.9",
    "loopback v6": "::1",
    "this host": "0.0.0.0",
    "this host v6": "::",
    "private 10": "10.0.0.1",
    "private 172": "172.16.0.1",
    "private 192": "192.168.1.1",
    "unique local": "fd00::1",
    "link local": "169.254.1.1",
    "metadata": "169.254.169.254",
    "metadata v6": "fd00:ec2::254",
    "link local v6": "fe80::1",
    "with a zone": "fe80::1%1",
    "carrier grade": "100.64.0.1",
    "multicast": "224.0.0.1",
    "multicast v6": "ff02::1",
    "broadcast": "255.255.255.255",
    "reserved": "240.0.0.1",
    "benchmarks": "198.18.0.1",
    "documents": "192.0.2.1",
    "mapped loopback": "::ffff:127.0.0.1",
    "mapped private": "::ffff:10.0.0.1",
    "6to4 of loopback": "2002:7f00:1::",
    "NAT64 of loopback": "64:ff9b::7f00:1",
    "NAT64 of metadata": "64:ff9b::a9fe:a9fe",
    "Teredo": "2001:0:4136:e378:8000:63bf:3fff:fdd2",
}


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert rules().allows(ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC.values(), ids=NOT_PUBLIC.keys())
def test_other_addresses_are_refused(address: str) -> None:
    assert not rules().allows(ip_address(address))


def test_a_network_may_be_allowed() -> None:
    extended = rules(media_url_networks="10.1.0.0/16, fd00::/64")
    allowed = [ip_address(a) for a in ("10.1.2.3", "::ffff:10.1.2.3", "fd00::5", "8.8.8.8")]
    assert all(map(extended.allows, allowed))
    assert not any(extended.allows(ip_address(a)) for a in ("10.2.0.1", "fd00:1::5", "127.0.0.1", "169.254.169.254"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("media_url_ports", "https"),
        ("media_url_ports", "0"),
        ("media_url_ports", "65536"),
        ("media_url_networks", "x/8"),
    ],
)
def test_an_invalid_setting_is_named_in_the_error(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        rules(**{name: value})


def test_no_host_is_allowed_by_default() -> None:
    assert UrlRules.from_settings(Settings()).hosts == ()
