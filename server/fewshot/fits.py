"""Stores classifiers that were fitted to versions of support sets in the database, for later runs and other servers.

A row per version, method and model has named arrays in the safetensors format, which contains no code: the parameters of
the method, and its answers to left-out examples. It is deleted with the version, or when it is old.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save
from sqlalchemy import select
from sqlalchemy.orm import Session

from server.fewshot.confidence import Confidence
from server.fewshot.methods.likeness import Array
from server.schemas.responses.evaluations import CurvePoint
from server.store.database import Database
from server.store.records import FitRow, VersionRow
from server.store.retention import delete_old

# incremented whenever the fit of a method or of its confidence changes: older fits are not read
FORMAT = 2
# older fits are deleted: their model may no longer be in use
RETENTION_SECONDS = 30 * 24 * 3600.0
PARAMETER = "parameters."
IS_CORRECT, TEMPERATURE, CURVE = "left_out.is_correct", "left_out.temperature", "left_out.curve"


@dataclass(frozen=True, slots=True)
class FittedVersion:
    """A version of a support set; `model` is the key of everything that the vectors of its media depend on."""

    set_id: str
    version: int
    model: str


@dataclass(frozen=True, slots=True, eq=False)
class LeftOut:
    """The answers of a method to left-out examples: which are correct, [N], and the confidence in them."""

    is_correct: NDArray[np.bool_]
    confidence: Confidence


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """The fit of a method to a version: its parameters, and its answers to left-out examples."""

    parameters: Mapping[str, Array] | None = None
    left_out: LeftOut | None = None


@dataclass(frozen=True, slots=True)
class FitStore:
    """The fits in the database."""

    database: Database

    async def get(self, version: FittedVersion) -> dict[str, Fit]:
        """Return the fits of a version by method."""

        def read(session: Session, now: float) -> dict[str, Fit]:
            query = select(FitRow.method, FitRow.arrays).where(
                FitRow.set_id == version.set_id,
                FitRow.version == version.version,
                FitRow.model == version.model,
                FitRow.format == FORMAT,
            )
            return {method: _from_bytes(arrays) for method, arrays in session.execute(query)}

        return await self.database.read(read)

    async def put(self, version: FittedVersion, fits: Mapping[str, Fit]) -> None:
        """Store fits by method, replacing earlier ones, unless the version was deleted meanwhile."""

        def write(session: Session, now: float) -> None:
            if session.get(VersionRow, (version.set_id, version.version)) is None:
                return
            for method, fit in fits.items():
                row = FitRow(
                    set_id=version.set_id,
                    version=version.version,
                    method=method,
                    model=version.model,
                    format=FORMAT,
                    arrays=_to_bytes(fit),
                    created_at=now,
                )
                session.merge(row)

        await self.database.write(write)

    async def sweep(self) -> None:
        """Delete the fits of all tenants that are older than `RETENTION_SECONDS`."""
        await delete_old(self.database, FitRow, RETENTION_SECONDS)


def _to_bytes(fit: Fit) -> bytes:
    arrays: dict[str, NDArray[np.generic]] = {PARAMETER + name: array for name, array in (fit.parameters or {}).items()}
    if fit.left_out is not None:
        confidence = fit.left_out.confidence
        arrays[IS_CORRECT] = fit.left_out.is_correct
        arrays[TEMPERATURE] = np.array([confidence.temperature])
        arrays[CURVE] = np.array([astuple(point) for point in confidence.curve])
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def _from_bytes(data: bytes) -> Fit:
    arrays = load(data)
    parameters = {name.removeprefix(PARAMETER): array for name, array in arrays.items() if name.startswith(PARAMETER)}
    return Fit(parameters or None, _left_out(arrays) if IS_CORRECT in arrays else None)


def _left_out(arrays: Mapping[str, NDArray[np.generic]]) -> LeftOut:
    is_correct = arrays[IS_CORRECT].astype(np.bool_)
    points = tuple(CurvePoint(*point) for point in arrays[CURVE].tolist())
    return LeftOut(is_correct, Confidence(float(arrays[TEMPERATURE].item()), points, len(is_correct)))
