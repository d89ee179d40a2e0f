"""The manifests of `deploy/kubernetes` as kustomize builds them, in so far as they use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]


def build(folder: Path) -> list[Manifest]:
    """Every manifest of a kustomization. Fails on fields that are not known here."""
    asked = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert set(asked) <= {"apiVersion", "kind", "resources", "images", "patches"}, set(asked)
    found: list[Manifest] = []
    for name in asked["resources"]:
        path = (folder / name).resolve()
        found += build(path) if path.is_dir() else load(path)
    for patch in asked.get("patches", []):
        targets = [m for m in found if _is(m, patch["target"])]
        assert targets, f"{folder}: {patch['target']} is nowhere"
        for target in targets:
            for operation in yaml.safe_load(patch["patch"]):
                _apply(target, operation)
    for image in asked.get("images", []):
        _set_image(found, image)
    return found


def load(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def _is(manifest: Manifest, target: dict[str, str]) -> bool:
    assert set(target) == {"kind", "name"}
    named = (manifest["kind"], manifest["metadata"]["name"])
    return named == (target["kind"], target["name"])


def _apply(manifest: Manifest, operation: dict[str, Any]) -> None:
    """One operation of RFC 6902."""
    *parents, last = [
        part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]
    ]
    place: Any = manifest
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    match operation["op"]:
        case "add" if last == "-":
            place.append(operation["value"])
        case "replace":
            assert last in place, operation["path"]
            place[last] = operation["value"]
        case "remove":
            del place[last]
        case other:
            raise AssertionError(f"{other} is not known here")


def _set_image(manifests: list[Manifest], image: dict[str, str]) -> None:
    changed = 0
    for manifest in manifests:
        if manifest["kind"] == "Deployment":
            for container in manifest["spec"]["template"]["spec"]["containers"]:
                name, _, tag = container["image"].partition(":")
                if name == image["name"]:
                    new = image.get("newName", name), image.get("newTag", tag)
                    container["image"] = ":".join(new)
                    changed += 1
    assert changed, f"no image is called {image['name']}"
