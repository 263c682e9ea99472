"""Writes the bill of materials of the server and its default model, in CycloneDX: `make sbom`, to sbom.json.

It lists the contents of the image: the locked distributions with the digests of their files, the installed PyTorch, and the
default model's files of weights. Licences and dependencies come from the metadata of the installed distributions. The
document is validated against CycloneDX's schema before it is written.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.supply.lock import ROOT, read_lock, required
from model.zoo.default import BRIDGE, LANGUAGE_MODEL_FILE, LIKENESS_FILE, VISION_FILE
from server.version import VERSION

SCHEMA = SchemaVersion.V1_6
PYTORCH = ("torch", "torchvision")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.supply.sbom", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=ROOT / "sbom.json", help="default: sbom.json")
    file = parser.parse_args(arguments).file
    bom = bill_of_materials()
    text = make_outputter(bom, OutputFormat.JSON, SCHEMA).output_as_string(indent=2)
    if error := JsonStrictValidator(SCHEMA).validate_str(text):
        raise SystemExit(f"the bill of materials is not valid CycloneDX: {error.data}")
    file.write_text(text + "\n", encoding="utf-8")
    print(f"{file}: {len(bom.components)} components")
    return 0


def bill_of_materials() -> Bom:
    server = Component(name="flamboyance", version=VERSION, type=ComponentType.APPLICATION, bom_ref="flamboyance")
    packages = {package.name: package for package in [*_locked_packages(), *_pytorch()]}
    weights = list(_weights())
    bom = Bom(components=[*packages.values(), *weights])
    bom.metadata.component = server
    direct = {canonicalize_name(requirement.name) for requirement in required("server")}
    bom.register_dependency(server, [*(packages[name] for name in packages.keys() & direct), *weights])
    for name, package in packages.items():
        bom.register_dependency(package, [packages[other] for other in packages.keys() & _required_by(name)])
    return bom


def _locked_packages() -> Iterator[Component]:
    for entry in read_lock("server"):
        yield _package(entry.name, entry.version, entry.digests)


def _pytorch() -> Iterator[Component]:
    """Yield the installed PyTorch, without digests, because its files depend on the accelerator."""
    for name in PYTORCH:
        yield _package(name, metadata.version(name), ())


def _package(name: str, version: str, digests: Sequence[str]) -> Component:
    return Component(
        name=name,
        version=version,
        bom_ref=name,
        purl=PackageURL("pypi", None, name, version),
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest) for digest in digests],
        licenses=_licenses(name),
    )


def _licenses(name: str) -> list[License]:
    """Return the licence in the metadata of an installed distribution, unless it is a whole text."""
    try:
        stated = metadata.metadata(name)
    except metadata.PackageNotFoundError:  # for another platform
        return []
    text = next((stated[field] for field in ("License-Expression", "License") if field in stated), "")
    return [LicenseFactory().make_from_string(text)] if text and "\n" not in text else []


def _required_by(name: str) -> set[str]:
    """Return the names of an installed distribution's requirements on this platform, without extras."""
    try:
        requirements = map(Requirement, metadata.requires(name) or ())
    except metadata.PackageNotFoundError:
        return set()
    return {canonicalize_name(r.name) for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}


def _weights() -> Iterator[Component]:
    """Yield the files of weights: the experts', whose digests are checked before they are used, and the clone's own."""
    for expert in (VISION_FILE, LANGUAGE_MODEL_FILE):
        yield _file(f"{expert.distribution}{expert.suffix}", expert.version, expert.sha256)
    for file in (BRIDGE, LIKENESS_FILE):
        yield _file(file.name, VERSION, hashlib.sha256(file.read_bytes()).hexdigest())


def _file(name: str, version: str, digest: str) -> Component:
    return Component(
        name=name,
        version=version,
        bom_ref=name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
    )


if __name__ == "__main__":
    raise SystemExit(main())
