"""Names of a tenant's stored data: all begin with the tenant's name, except those of the default tenant.

A tenant is a group of API keys that share support sets, uploads, evaluations and caches. No tenant sees those of another.
The default tenant is that of the setting `api_key`, of servers without keys, and of keys that name no other.
"""

from __future__ import annotations

DEFAULT_TENANT = ""
# separates tenant and name in paths and stored names; a name itself has no slash
TENANT_NAME = r"^[a-z0-9][a-z0-9_-]{0,47}$"


def qualified(tenant: str, name: str) -> str:
    """Return the name, or the media id, under which a tenant's own `name` is stored."""
    return f"{tenant}/{name}" if tenant else name


def split(name: str) -> tuple[str, str]:
    """Return the tenant and its own name of a qualified name."""
    tenant, _, unqualified = name.rpartition("/")
    return tenant, unqualified
