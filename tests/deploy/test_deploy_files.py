"""The files of deploy/ against the server they start: flags, variables, paths, times; the health check is run."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import pytest
import typer
import yaml

from nanovllm.cli.main import app
from nanovllm.config import EngineConfig, env_name
from nanovllm.serve.config import ServerConfig, setting_fields
from tests.lab.scripted_server import ScriptedServer, head

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
OTHER_VARIABLES = {"NANOVLLM_CACHE"}  # read by the models' cache


def text_of(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def compose() -> dict[str, dict]:
    return yaml.safe_load(text_of("compose.yaml"))


@pytest.fixture(scope="module")
def unit() -> configparser.ConfigParser:
    """The unit file; repeated directives are not used in it, so that this parser reads it whole."""
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text_of("nanovllm.service"))
    return parser


def instructions(name: str) -> list[str]:
    """The Containerfile's lines with this instruction, continuations joined."""
    joined = re.sub(r"\\\n\s*", "", text_of("Containerfile"))
    return [line.removeprefix(name).strip() for line in joined.splitlines() if line.startswith(name + " ")]


def serve_arguments(compose: dict[str, dict], unit: configparser.ConfigParser) -> dict[str, list[str]]:
    """What each file passes to `nanovllm serve`."""
    entrypoint, command = (json.loads(instructions(name)[-1]) for name in ("ENTRYPOINT", "CMD"))
    assert entrypoint == ["nanovllm", "serve"]
    program, verb, *rest = shlex.split(unit["Service"]["ExecStart"])
    assert program.endswith("/nanovllm") and verb == "serve"
    return {"Containerfile": command, "compose": compose["services"]["nanovllm"]["command"], "unit": rest}


def test_every_flag_is_one_of_the_server(compose: dict[str, dict], unit: configparser.ConfigParser) -> None:
    """Parsed by the verb's own parser: an unknown flag, or one without its value, is an error here."""
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    for arguments in serve_arguments(compose, unit).values():
        context = serve.make_context("serve", list(arguments))
        assert context.params["model"] == "smollm2"


def test_every_variable_is_read_by_somebody() -> None:
    known = {env_name(f.name) for f in fields(EngineConfig)} | {env_name(name) for name, _ in setting_fields()}
    files = [path for path in DEPLOY.rglob("*") if path.is_file() and path.suffix != ".json"]
    found = {name for path in files for name in re.findall(r"\bNANOVLLM_[A-Z_]+", path.read_text(encoding="utf-8"))}
    assert {"NANOVLLM_API_KEY", "NANOVLLM_HOST"} <= found <= known | OTHER_VARIABLES


def flag(arguments: list[str], name: str, default: object) -> str:
    return arguments[arguments.index(name) + 1] if name in arguments else str(default)


def test_whoever_stops_the_server_waits_longer_than_it_takes(
    compose: dict[str, dict], unit: configparser.ConfigParser
) -> None:
    arguments, default = serve_arguments(compose, unit), ServerConfig().shutdown_timeout
    waits = {
        "compose": compose["services"]["nanovllm"]["stop_grace_period"].removesuffix("s"),
        "unit": unit["Service"]["TimeoutStopSec"],
    }
    for name, wait_s in waits.items():
        assert float(wait_s) >= float(flag(arguments[name], "--shutdown-timeout", default)) + 10


def test_the_container_is_nobody_and_asks_for_a_key() -> None:
    (user,) = instructions("USER")
    assert user.isdecimal() and int(user) > 0
    environment = " ".join(instructions("ENV"))
    assert "NANOVLLM_HOST=0.0.0.0" in environment and "KEY" not in environment  # no key is baked in
    assert instructions("VOLUME") == ["/var/lib/nanovllm"] and "NANOVLLM_CACHE=/var/lib/nanovllm" in environment
    assert instructions("FROM")[0].startswith("python:3.11-slim") and instructions("STOPSIGNAL") == ["SIGTERM"]


def test_what_the_container_copies_is_there() -> None:
    copied = [part for line in instructions("COPY") if not line.startswith("--from") for part in line.split()[:-1]]
    assert "nanovllm" in copied and all((DEPLOY.parent / part).exists() for part in copied)


@pytest.mark.parametrize(("status", "is_healthy"), [("200 OK", True), ("503 Service Unavailable", False)])
def test_the_health_check_says_what_the_server_says(status: str, is_healthy: bool) -> None:
    (line,) = instructions("HEALTHCHECK")
    program, *arguments = json.loads(line[line.index("[") :])
    assert program == "python"
    with ScriptedServer(lambda seen: [head(status, "application/json"), b"{}"]) as server:
        environment = {**os.environ, "NANOVLLM_PORT": server.url.rpartition(":")[2]}
        done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, timeout=60)
    assert (done.returncode == 0) is is_healthy
    assert [seen.path for seen in server.seen] == ["/health/ready"]


def test_the_unit_is_confined_and_stops_cleanly(unit: configparser.ConfigParser) -> None:
    assert unit.sections() == ["Unit", "Service", "Install"]
    service = unit["Service"]
    expected = {
        "DynamicUser": "yes",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "CapabilityBoundingSet": "",
        "KillSignal": "SIGTERM",
        "Restart": "on-failure",
        "RestartPreventExitStatus": "2",
        "StateDirectory": "nanovllm",
    }
    assert {name: service[name] for name in expected} == expected
    assert "MemoryDenyWriteExecute" not in service  # torch generates its kernels at run time


def test_the_keys_of_the_unit_are_credentials(unit: configparser.ConfigParser) -> None:
    name, _, source = unit["Service"]["LoadCredential"].partition(":")
    assert source.startswith("/etc/") and f"--api-key-file %d/{name}" in unit["Service"]["ExecStart"]


def test_compose_publishes_on_loopback_only_and_mounts_what_is_there(compose: dict[str, dict]) -> None:
    services = compose["services"]
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", []))
    assert {name for name, service in services.items() if "profiles" not in service} == {"nanovllm"}
    sources = [volume.partition(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    for source in sources:
        assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"]
    assert compose["services"]["nanovllm"]["environment"]["NANOVLLM_API_KEY"].startswith("${NANOVLLM_API_KEY:?")


def test_prometheus_and_grafana_find_each_other(compose: dict[str, dict]) -> None:
    (scrape,) = yaml.safe_load(text_of("prometheus/prometheus.yml"))["scrape_configs"]
    services = compose["services"]
    assert scrape["static_configs"] == [{"targets": ["nanovllm:8000"]}] and "nanovllm" in services
    secret = scrape["authorization"]["credentials_file"].removeprefix("/run/secrets/")
    assert services["prometheus"]["secrets"] == [secret] and secret in compose["secrets"]
    (source,) = yaml.safe_load(text_of("grafana/provisioning/datasources/prometheus.yaml"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load(text_of("grafana/provisioning/dashboards/nanovllm.yaml"))["providers"]
    targets = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert any(target.startswith(provider["options"]["path"] + "/") for target in targets)
    json.loads(text_of("grafana/dashboard.json"))


def links(text: str) -> Iterable[str]:
    return re.findall(r"\]\(([^)#]+)\)", text)


def test_both_readmes_say_the_same_things() -> None:
    english, chinese = text_of("README.md"), text_of("README.zh.md")
    assert sorted(re.findall(r"`([^`]+)`", english)) == sorted(re.findall(r"`([^`]+)`", chinese))
    assert all((DEPLOY / link).exists() for text in (english, chinese) for link in links(text))
