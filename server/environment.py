"""Variables of the environment: which of them may contain a secret, and which addresses one of them may list."""

from __future__ import annotations

import re
from ipaddress import ip_address, ip_network

from server.setting_values import parts

# words in names of variables that may contain a secret, such as HF_TOKEN or AWS_ACCESS_KEY_ID
SECRET = re.compile(
    "(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|_PASS|_PWD|SSHPASS|CREDENTIAL|KEY|AUTHORIZATION|COOKIE|CONNECTION_STRING"
    r"|HEADER|DATABASE|MEDIA_STORE)S?\d*(_|$)",
    re.IGNORECASE,
)
URL_WITH_USER = re.compile(r"://[^/\s]*@")


def may_be_secret(name: str, value: str) -> bool:
    """Return whether a variable of the environment may contain a secret."""
    is_proxy_with_user = name.upper().endswith("_PROXY") and "@" in value  # its value needs no scheme
    return bool(SECRET.search(name) or URL_WITH_USER.search(value) or is_proxy_with_user)


def checked_proxies(setting: str) -> str:
    """Return addresses and networks, separated by commas, or `*`. Raises `ValueError` for any other text."""
    for part in [] if setting == "*" else parts(setting):
        try:
            (ip_network if "/" in part else ip_address)(part)
        except ValueError as error:
            raise ValueError(f"{error}; addresses and networks are separated by commas, and * stands for all") from None
    return setting
