"""Section 3: flags over environment over defaults, one line for a bad value."""
import base64
import re
from pathlib import Path

import pytest

from qwencode import OPTIONS, ConfigError, flag_of, load_config, secrets_of, url_from_ollama_host

README = Path(__file__).resolve().parent.parent / "README.md"

DEFAULTS = {
    "host": "127.0.0.1", "port": 8000, "base_url": "http://127.0.0.1:11434",
    "model": "qwen2.5-coder:14b", "auth_token": "", "num_ctx": None, "max_tools": 8, "api_key": "",
    "use_requested_model": False, "log": "info", "max_read_bytes": 200000, "timeout_ms": 120000,
    "first_token_timeout_ms": 600000, "cors_wildcard": False, "keep_alive": "-1",
    "rescue": ("text", "intent"), "verbatim": "auto", "bash_style": "plain", "prompt": "slim",
    "max_concurrent": 256, "warm": True,
}


def test_the_defaults_are_those_that_users_know():
    config = load_config({}, {})
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(("flags", "env", "field", "value"), [
    ({}, {"PORT": "9001"}, "port", 9001),
    ({"port": "9002"}, {"PORT": "9001"}, "port", 9002),
    ({}, {"PORT": ""}, "port", 8000),
    ({}, {"SHIM_USE_REQUESTED_MODEL": "Yes"}, "use_requested_model", True),
    ({}, {"SHIM_USE_REQUESTED_MODEL": "0"}, "use_requested_model", False),
    ({}, {"OLLAMA_NUM_CTX": "0"}, "num_ctx", None),
    ({}, {"SHIM_NUM_CTX": "16384"}, "num_ctx", 16384),
    ({}, {"SHIM_RESCUE": "text"}, "rescue", ("text",)),
    ({}, {"SHIM_RESCUE": "off"}, "rescue", ()),
    ({}, {"SHIM_REQUEST_TIMEOUT_MS": "1000"}, "first_token_timeout_ms", 1000),
    ({}, {"SHIM_REQUEST_TIMEOUT_MS": "1000", "SHIM_FIRST_TOKEN_TIMEOUT_MS": "5"},
     "first_token_timeout_ms", 5),
    ({}, {"OLLAMA_BASE_URL": "http://h:1/x/"}, "base_url", "http://h:1/x"),
    ({}, {"OLLAMA_HOST": "0.0.0.0:5"}, "base_url", "http://127.0.0.1:5"),
    ({}, {"OLLAMA_HOST": "0.0.0.0", "OLLAMA_BASE_URL": "http://h:1"}, "base_url", "http://h:1"),
    ({}, {"SHIM_MODEL_MAP": "haiku=a:1, Opus = b"}, "model_map", (("haiku", "a:1"), ("opus", "b"))),
    ({}, {"SHIM_LOG": "DEBUG"}, "log", "debug"),
])
def test_values_are_read(flags, env, field, value):
    assert getattr(load_config(flags, env), field) == value


@pytest.mark.parametrize(("env", "line"), [
    ({"PORT": "x"}, "PORT: 'x' is not a whole number"),
    ({"PORT": "70000"}, "PORT: '70000' is above 65535, the last port"),
    ({"PORT": "+5"}, "PORT: '+5' is not a whole number"),
    ({"PORT": "1_0"}, "PORT: '1_0' is not a whole number"),
    ({"SHIM_RESCUE": "text,foo"},
     "SHIM_RESCUE: 'text,foo' holds 'foo', none of text, intent, off"),
    ({"SHIM_LOG": "loud"}, "SHIM_LOG: 'loud' is none of error, warn, info, debug"),
    ({"OLLAMA_BASE_URL": "nonsense"},
     "OLLAMA_BASE_URL: 'nonsense' is not a URL such as http://127.0.0.1:11434"),
    ({"OLLAMA_BASE_URL": "user:pw@h"},
     "OLLAMA_BASE_URL: the value is not a URL such as http://127.0.0.1:11434"),
    ({"SHIM_KEEP_ALIVE": "soon"},
     "SHIM_KEEP_ALIVE: 'soon' is neither seconds nor a duration such as 30m"),
    ({"SHIM_REQUEST_TIMEOUT_MS": "0"},
     "SHIM_REQUEST_TIMEOUT_MS: '0' must be at least 1 millisecond"),
    ({"SHIM_API_KEY": "a\nb"}, "SHIM_API_KEY: the value holds a control character"),
    ({"SHIM_ALLOW_CORS_WILDCARD": "maybe"},
     "SHIM_ALLOW_CORS_WILDCARD: 'maybe' is neither on nor off"),
    ({"SHIM_MODEL_MAP": "haiku"}, "SHIM_MODEL_MAP: 'haiku' is not ROLE=MODEL"),
    ({"SHIM_MAX_CONCURRENT": "0"}, "SHIM_MAX_CONCURRENT: '0' would let no request work"),
    ({"SHIM_NUM_CTX": "big"}, "SHIM_NUM_CTX: 'big' is neither auto, off nor a whole number"),
    ({"OLLAMA_MODEL": " "}, "OLLAMA_MODEL: ' ' is empty"),
    ({"HOST": "\t"}, "HOST: '\\t' is empty"),
])
def test_a_bad_value_is_one_clear_line(env, line):
    with pytest.raises(ConfigError) as problem:
        load_config({}, env)
    assert str(problem.value) == line


@pytest.mark.parametrize(("flags", "line"), [
    ({"host": " "}, "--host: ' ' is empty"), ({"model": ""}, "--model: '' is empty"),
    ({"port": "x"}, "--port: 'x' is not a whole number")])
def test_a_bad_flag_is_named_as_it_was_given(flags, line):
    with pytest.raises(ConfigError) as problem:
        load_config(flags, {"HOST": "::1", "OLLAMA_MODEL": "m", "PORT": "1"})
    assert str(problem.value) == line


@pytest.mark.parametrize(("host", "url"), [
    ("", "http://127.0.0.1:11434"), ("1.2.3.4", "http://1.2.3.4:11434"),
    ("1.2.3.4:5", "http://1.2.3.4:5"), (":77", "http://127.0.0.1:77"),
    ("[::1]", "http://[::1]:11434"), ("::1", "http://[::1]:11434"),
    ("[::1]:1337", "http://[::1]:1337"), ("http://h", "http://h:80"),
    ("https://h", "https://h:443"), ("ollama.com", "https://ollama.com:443"),
    ("https://x/ollama", "https://x:443/ollama"), ("h:99999", "http://h:11434"),
    (' "h" ', "http://h:11434"), ("[::]", "http://[::1]:11434"),
    ("0.0.0.0", "http://127.0.0.1:11434"),
])
def test_ollama_host_is_read_as_ollama_does(host, url):
    assert url_from_ollama_host(host) == url


def test_secrets_are_the_keys_and_the_url_login():
    """As written, decoded, and as the Basic header that the upstream may quote."""
    config = load_config({}, {"SHIM_API_KEY": "abc123", "OLLAMA_AUTH_TOKEN": "tok456",
                              "OLLAMA_BASE_URL": "http://me:hu%40sh@x@h:1"})
    basic = base64.b64encode(b"me:hu@sh@x").decode()
    assert set(secrets_of(config)) == {
        "abc123", "tok456", "me:hu%40sh@x", "hu%40sh@x", "me:hu@sh@x", "hu@sh@x", basic}
    assert [*secrets_of(config)] == sorted(secrets_of(config), key=len, reverse=True)


@pytest.mark.parametrize("url", [
    "http://h:99999", "http://[::1", "http://", "http://user@", "http://:80", "ftp://h",
    "http://h\n:1", "http://h:0", "http://h:x", "http://例え:1", "http://h:1/é"])
def test_urls_that_cannot_be_used_are_refused(url):
    with pytest.raises(ConfigError, match="is not a URL such as"):
        load_config({}, {"OLLAMA_BASE_URL": url})


def test_every_option_has_its_own_names():
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)
    assert len({option.variable for option in OPTIONS}) == len(OPTIONS)
    assert len({flag_of(option) for option in OPTIONS}) == len(OPTIONS)


def test_the_readme_table_holds_every_option_with_its_default():
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| ([^|]*) \|", README.read_text(encoding="utf-8"),
                           re.MULTILINE))
    shown = {option.variable: f"`{option.default}`" if option.default else "-"
             for option in OPTIONS}
    assert {name: cell.strip() for name, cell in rows.items() if name in shown} == shown
