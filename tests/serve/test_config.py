"""Server settings: where they come from, what is refused, and that no key is ever shown."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from nanovllm.config import EngineConfig, masked
from nanovllm.errors import ConfigError, TierError
from nanovllm.serve.config import Limits, ServerConfig, load, parse_setting, setting_fields
from nanovllm.serve.listener import check_exposure
from nanovllm.serve.tenants import Tenants
from nanovllm.state.tiers.remote import RemoteTier

FILE = """
block_size = 32
[server]
port = 9000
api_key = ["file-key"]
ttft_slo = 5
[server.limits]
n = 4
body_bytes = 100
"""


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(FILE)
    return path


def test_later_sources_win(settings_file: Path) -> None:
    env = {"NANOVLLM_PORT": "9001", "NANOVLLM_HOST": "::1", "NANOVLLM_LIMIT_BODY_BYTES": "2MiB"}
    config, limits, sources = load({"host": "127.0.0.2"}, file=settings_file, env=env)
    assert (config.port, config.host, config.api_key, config.ttft_slo) == (9001, "127.0.0.2", ("file-key",), 5)
    assert (limits.n, limits.body_bytes, limits.stop) == (4, 2 * 2**20, 4)
    assert sources == {
        "port": "environment", "host": "flag", "api_key": "file", "ttft_slo": "file", "limit_n": "file",
        "limit_body_bytes": "environment",
    }  # fmt: skip


def test_engine_and_server_share_a_file(settings_file: Path) -> None:
    assert EngineConfig.load({}, file=settings_file, env={})[0].block_size == 32


def test_every_setting_can_be_an_environment_variable() -> None:
    values = {"bool": "true", "int": "5", "float": "2.5", "str": "text", "tuple": "a, b"}
    special = {"generation_config": "none", "limit_header_bytes": "4096", "limit_stop_ids": "5", "limit_stop": "3"}
    for name, f in setting_fields():
        text = special.get(name, values[str(f.type).split(" | ")[0].split("[")[0]])
        config, limits, sources = load({}, env={f"NANOVLLM_{name.upper()}": text})
        found = getattr(limits if name.startswith("limit_") else config, f.name)
        assert found == parse_setting(name, text) != f.default, name
        assert sources == {name: "environment"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[server]\nprot = 1", ["'prot'", "[server]", "'port'"]),
        ("[server.limits]\nboddy_bytes = 1", ["'boddy_bytes'", "[server.limits]", "'body_bytes'"]),
        ("server = 1", ["server in", "table"]),
        ("[server]\nlimits = 1", ["limits in", "table"]),
        ("[server]\nport = '80'", ["port", "integer"]),
        ("[server]\nport = true", ["port", "integer"]),
        ("[server]\nport = 65536", ["port", "65535"]),
        ("[server]\nttft_slo = 0", ["ttft_slo"]),
        ("[server]\nttft_slo = nan", ["ttft_slo"]),
        ("[server]\nqueue_timeout = inf", ["queue_timeout"]),
        ("[server]\ninsecure = 1", ["insecure", "true or false"]),
        ("[server]\nallowed_host = [1]", ["allowed_host", "list of texts"]),
        ("[server]\nhost = ''", ["host"]),
        ("[server]\ngeneration_config = 'vllm'", ["generation_config", "auto or none"]),
        ("[server]\nmetrics_prefix = 'a b'", ["metrics_prefix"]),
        ("[server.limits]\nn = 17", ["limit_n", "16"]),
        ("[server", ["settings file"]),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load({}, file=path, env={})
    assert all(word in str(refused.value) for word in words), str(refused.value)


@pytest.mark.parametrize(
    ("name", "text"), [("PORT", "http"), ("PORT", "8.0"), ("INSECURE", "maybe"), ("TTFT_SLO", "soon"), ("PORT", "-1")]
)
def test_a_bad_variable_is_named(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load({}, env={f"NANOVLLM_{name}": text})
    assert f"NANOVLLM_{name}" in str(refused.value)


def test_the_variable_that_kubernetes_sets() -> None:
    with pytest.raises(ConfigError, match=r"NANOVLLM_PORT.*enableServiceLinks"):
        load({}, env={"NANOVLLM_PORT": "tcp://10.0.0.1:8000"})


def test_an_engine_variable_is_named_too() -> None:
    with pytest.raises(ConfigError, match="NANOVLLM_BLOCK_SIZE cannot be read from 'x'"):
        EngineConfig.load({}, env={"NANOVLLM_BLOCK_SIZE": "x"})


def test_keys_are_not_shown() -> None:
    config = ServerConfig(api_key=("the-key",), admin_key="the-admin-key")
    assert "the-" not in repr(config)
    with pytest.raises(ConfigError) as refused:
        ServerConfig(api_key=("the-key", 1))  # type: ignore[arg-type]
    assert "the-key" not in str(refused.value)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("redis://host:6379/1", "redis://host:6379/1"),
        ("redis://:the-key@host:6379", "redis://***@host:6379"),
        ("rediss://user:the-key@[::1]:6379/0?db=1", "rediss://***@[::1]:6379/0?***"),
        ("redis://host?password=the-key", "redis://host?***"),
        ("redis://:a/the-key@host", "set"),
        ("redis://:a@the-key@host", "set"),
        (":the-key@host", "set"),
    ],
)
def test_an_address_is_shown_without_its_password(address: str, shown: str) -> None:
    assert masked(address) == shown
    assert "the-key" not in repr(EngineConfig(state_remote=address))


@pytest.mark.parametrize("address", ["redis://:a/the-key@host", "http://:the-key@host", "redis://:the-key[@host"])
def test_a_remote_address_that_cannot_be_used_is_not_quoted(address: str) -> None:
    with pytest.raises(TierError, match="address cannot be used") as refused:
        RemoteTier(address)
    assert "the-key" not in str(refused.value)


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.example", False),  # noqa: S104  not bound
        ("example", False),
    ],
)  # fmt: skip
def test_a_public_address_needs_a_key(host: str, is_local: bool) -> None:
    config = ServerConfig(host=host)
    assert config.is_loopback == is_local
    check_exposure(config, has_keys=True)
    check_exposure(ServerConfig(host=host, insecure=True), has_keys=False)
    if is_local:
        check_exposure(config, has_keys=False)
    else:
        with pytest.raises(ConfigError, match="--api-key"):
            check_exposure(config, has_keys=False)


KEYS: list[tuple[dict[str, Any], str]] = [
    ({"api_key": ("",)}, "printable"),
    ({"api_key": ("a b",)}, "printable"),
    ({"api_key": ("alice:one,bob:two",)}, "commas"),
    ({"api_key": ("schlüssel",)}, "printable"),
    ({"api_key": ("name:",)}, "printable"),
    ({"api_key": (":key",)}, "name before"),
    ({"api_key": ("a b:key",)}, "name before"),
    ({"api_key": ("same", "same")}, "same key"),
    ({"api_key": ("x:one", "x:two")}, "same name"),
    ({"api_key": ("same",), "admin_key": "same"}, "same key"),
    ({"api_key_file": "/nonexistent/keys"}, "cannot be read"),
]


@pytest.mark.parametrize(("settings", "words"), KEYS, ids=[words for _, words in KEYS])
def test_bad_keys(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Tenants(ServerConfig(**settings))


def test_a_key_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# who may come in\n\nalice:key-a\n  key-b  \n")
    tenants = Tenants(ServerConfig(api_key=("key-c",), api_key_file=str(path)))
    names = [tenants.authenticate(f"Bearer key-{letter}".encode()).name for letter in "abc"]
    assert names == ["alice", "tenant-3", "tenant-1"]
    path.write_text("# nobody yet\n")
    with pytest.raises(ConfigError, match="holds no key"):
        Tenants(ServerConfig(api_key_file=str(path)))


def test_settings_have_help_and_limits_have_bounds() -> None:
    for f in [*fields(ServerConfig), *fields(Limits)]:
        assert f.metadata["help"] and f.metadata["least"] <= f.metadata["most"]


@pytest.mark.parametrize("page", ["server.md", "server.zh.md"])
def test_the_pages_give_every_setting_its_default(page: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / page).read_text(encoding="utf-8")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `--")]
    shown = {row[0].strip("`"): row[1].strip("`") for row in cells}
    assert all(len(row) == 4 for row in cells)
    expected = {f"--{name.replace('_', '-')}": f.default for name, f in setting_fields()}
    assert shown.keys() == expected.keys()
    for flag, default in expected.items():
        if default in (None, ()):
            assert shown[flag] == ""
        elif default is False:
            assert shown[flag] in ("off", "关")
        else:
            assert type(default)(shown[flag]) == default, flag
