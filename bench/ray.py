"""Replicas behind one address, measured from outside: `python -m bench.ray [--replicas 4]`."""

from __future__ import annotations
