"""Bundles of experiment 4 checked (being written)."""

from __future__ import annotations

from pathlib import Path

from nanovllm.lab.findings import Finding, Verdict
from nanovllm.lab.manifest import own_digest, read_manifest

RULES = ("manifest", "status")


def check_bundle(folder: Path, *, submission: bool = False) -> Verdict:
    """Everything that can be held against a bundle."""
    manifest = read_manifest(folder)
    verdict = Verdict(4, folder.name, RULES)
    if own_digest(manifest) != manifest.get("sha256"):
        verdict.findings.append(Finding("manifest", "manifest.json"))
    if manifest.get("status") != "ok":
        verdict.findings.append(Finding("status", "manifest.json", str(manifest.get("status"))))
    return verdict
