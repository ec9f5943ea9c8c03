"""The status page in a real browser; a stand-in serves it, so that no clock decides."""
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import qwencode as q
from browser import Browser, browser_path
from helpers import running_shim
from mock_ollama import MockOllama, error_line, hold, text
from test_status import FAILED, TURN, config

KEY = "open sesame"
NOW = 1_790_000_000.0
HOSTILE = "<img src=x onerror=\"window.hit=1\">'&quot;</script><script>window.hit=1</script>"


class Site:
    """`/` and `/status` as the shim serves them; stats are the test's to change."""

    def __init__(self, key=""):
        self.stats, self.now, self.key, self.broken = q.Stats(NOW - 60), NOW, key, False
        self.health = {"ok": True, "upstream": {"url": "http://ollama:1", "version": "0.33.0"},
                       "model": {"capabilities": ["tools"], "window": 65536}}
        site = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *words):
                pass

            def do_GET(self):
                status, kind, body = site.answer(self.path, self.headers.get("x-api-key", ""))
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"

    def answer(self, path, key):
        if path == "/":
            return 200, "text/html; charset=utf-8", q.STATUS_PAGE.encode()
        if path == "/health":
            told = {"ok": True, **({} if self.key and key != self.key else {"version": "1"})}
            return 200, "application/json", json.dumps(told).encode()
        if self.key and key != self.key:
            return 401, "application/json", b"{}"
        if self.broken:
            return 503, "application/json", b"{}"
        status = q.status_json(self.stats, config(SHIM_API_KEY=self.key), self.health, self.now)
        return 200, "application/json", json.dumps(status).encode()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture(scope="module")
def browser():
    path = browser_path()
    if path is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    one = Browser(path)
    yield one
    one.close()


@pytest.fixture
def site(request):
    one = Site(getattr(request, "param", ""))
    yield one
    one.close()


def busy(site):
    """A session with a past: turns, a rescue, an error with its cure, one at work."""
    for turn in range(1, 7):
        site.stats.end(turn, TURN._replace(
            turn=turn, started=NOW - 100 + turn, prompt_tokens=8_000 * turn, rescue=""))
    site.stats.end(7, TURN._replace(turn=7, started=NOW - 9, rescue_outcome="worked",
                                    prompt_tokens=55_000, left_out=("Agent", "skills list")))
    site.stats.end(8, FAILED._replace(session="s1", turn=8, started=NOW - 5))
    site.stats.begin(9, "s1", "qwen3", NOW - 3)


def open_page(browser, site, **window):
    browser.call("Page.navigate", url="about:blank")  # the last test's page still asks its site
    browser.errors.clear()
    browser.requests.clear()
    browser.open(site.url, **window)
    browser.wait("document.getElementById('turns').children.length")


def text_of(browser, part):
    return browser.run(f"document.getElementById('{part}').innerText")


def test_it_shows_windows_turns_rescues_errors_and_counters(browser, site):
    busy(site)
    open_page(browser, site)
    assert "55.4k of 64k used (85 %), 10.1k left" in text_of(browser, "sessions")
    assert "Not shown to the model: Agent, skills list" in text_of(browser, "sessions")
    assert "prefill 3.0 s" in text_of(browser, "running")
    assert "Write via rescue:hermes" in text_of(browser, "turns")
    rescue = text_of(browser, "rescues")
    assert "hermes" in rescue
    assert "worked" in rescue
    error = text_of(browser, "errors")
    assert "Ollama sent nothing for 120 s." in error
    assert "See `ollama ps`." in error
    assert "Failures of Ollama: upstream timeout" in text_of(browser, "counters")
    assert "0.33.0 at http://ollama:1" in text_of(browser, "model")
    assert browser.run("document.querySelectorAll('#speeds rect').length") == 7
    assert browser.run("document.querySelector('#contexts polyline').points.length") == 7


def test_it_follows_a_running_stream_without_a_reload(browser, site):
    open_page(browser, site)
    assert "Nothing is running." in text_of(browser, "running")
    running = site.stats.begin(1, "s1", "qwen3", NOW)
    browser.wait("document.getElementById('running').innerText.includes('prefill')")
    running.enter("writing", NOW)
    running.tokens = 84
    site.now = NOW + 2
    browser.wait("document.getElementById('running').innerText.includes('42')")
    site.stats.end(1, TURN)
    browser.wait("document.getElementById('turns').innerText.includes('rescue:hermes')")
    assert "Nothing is running." in text_of(browser, "running")
    assert text_of(browser, "news") == "Turn 4 finished, rescued by hermes."


def test_it_asks_no_other_host_and_reports_no_error(browser, site):
    busy(site)
    open_page(browser, site)
    site.stats.begin(10, "s2", "qwen3", NOW)
    browser.wait("document.getElementById('running').innerText.includes('s2')")
    assert browser.errors == []
    assert {one["url"] for one in browser.requests} == {
        site.url, site.url + "health", site.url + "status"}


def test_names_from_outside_are_text_and_never_html(browser, site):
    site.stats.end(1, TURN._replace(
        session=HOSTILE, model=HOSTILE, tools=(HOSTILE,), rescue=HOSTILE, outcome=HOSTILE,
        error=HOSTILE, cure=HOSTILE, notes=(HOSTILE,), rescue_outcome=HOSTILE))
    site.stats.begin(2, HOSTILE, HOSTILE, NOW)
    site.health = {"ok": False, "upstream": {"error": HOSTILE, "url": HOSTILE, HOSTILE: 1},
                   "model": {"capabilities": [HOSTILE]}}
    open_page(browser, site)
    assert browser.run("document.images.length + document.querySelectorAll('main script').length"
                       " + (window.hit || 0)") == 0
    assert HOSTILE[:20] in text_of(browser, "errors")
    assert browser.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_text_is_readable_and_nothing_is_wider_than_the_screen(
        browser, site, width, scheme):
    busy(site)
    open_page(browser, site, width=width, scheme=scheme)
    assert browser.run("document.documentElement.scrollWidth") == width
    poor = browser.run("""(() => {
      const numbers = (text) => text.match(/[0-9.]+/g).map(Number);
      const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255).map((c) => c <= 0.04045
        ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) =>
        sum + c * [0.2126, 0.7152, 0.0722][i], 0);
      const behind = (node) => { const colour = numbers(getComputedStyle(node).backgroundColor);
        return colour.length === 3 || !node.parentElement ? colour : behind(node.parentElement); };
      const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      const found = [];
      while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !node.checkVisibility()
            || node.closest("script, noscript")) continue;
        const pair = [light(numbers(getComputedStyle(node).color)), light(behind(node))].sort();
        const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
        if (contrast < 4.5) found.push([node.textContent, contrast]);
      }
      return found; })()""")
    assert poor == []


@pytest.mark.parametrize("width", [1280, 390])
def test_a_screen_reader_finds_headings_tables_gauges_and_pictures(browser, site, width):
    busy(site)
    open_page(browser, site, width=width)
    tree = browser.call("Accessibility.getFullAXTree")["nodes"]
    names = {}
    for node in tree:
        if not node.get("ignored"):
            names.setdefault(node["role"]["value"], []).append(
                node.get("name", {}).get("value", ""))
    assert names["heading"][:3] == ["qwencode", "Context window", "Running now"]
    assert "Last turns" in names["table"]
    assert "First token" in names["columnheader"]
    assert len(names["row"]) >= 12
    assert names["meter"] == ["Window of s1"]
    assert [name.split(".")[0] for name in names["image"]] == [
        "Tokens a second", "Context over time"]
    assert all(names["button"])
    assert "status" in names
    assert all(browser.run("[...document.querySelectorAll('main [role=region]')]"
                           ".map((one) => one.getAttribute('aria-label') !== '')"))


def test_the_keyboard_reaches_the_button_that_stops_the_updates(browser, site):
    open_page(browser, site)
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.id") == "pause"
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Enter", 13, "\r")
    assert text_of(browser, "pause") == "Go on"
    site.stats.begin(1, "s1", "qwen3", NOW)
    count = len(browser.requests)
    browser.run("new Promise((resolve) => setTimeout(resolve, 1200))")
    assert len(browser.requests) == count
    browser.press("Enter", 13, "\r")
    browser.wait("document.getElementById('running').innerText.includes('prefill')")


@pytest.mark.parametrize("site", [KEY], indirect=True)
def test_with_a_key_it_asks_once_and_keeps_it_for_the_session(browser, site):
    browser.open(site.url)
    browser.wait("!document.getElementById('login').hidden")
    assert browser.run("document.getElementById('content').hidden")
    assert browser.run("document.activeElement.id") == "key"
    browser.type("wrong")
    browser.press("Enter", 13, "\r")
    browser.wait("document.getElementById('login-text').innerText.includes('not the one')")
    browser.run("document.getElementById('key').value = ''")
    browser.type(KEY)
    browser.press("Enter", 13, "\r")
    browser.wait("!document.getElementById('content').hidden")
    open_page(browser, site)
    assert browser.run("document.getElementById('login').hidden")
    assert KEY not in browser.run("document.body.innerText + location.href")
    browser.run("sessionStorage.clear()")


def test_a_shim_that_goes_away_is_told_and_found_again(browser, site):
    open_page(browser, site)
    site.broken = True
    browser.wait("document.getElementById('state').innerText === 'the shim does not answer'")
    site.broken = False
    browser.wait("document.getElementById('news').innerText === 'The shim answers again.'")
    assert text_of(browser, "state") == "ready"


def test_the_real_shim_shows_a_stream_while_it_runs_and_then_an_error(browser):
    go = threading.Event()
    words = text("one ") + hold(go) + text("two")
    with MockOllama([words, error_line("it broke")]) as ollama, \
            running_shim(ollama.url, model=ollama.model) as shim:
        browser.errors.clear()
        browser.requests.clear()
        browser.open(shim.url + "/")
        browser.wait("document.getElementById('running').innerText.includes('Nothing')")
        asking = threading.Thread(target=shim.messages, args=("a secret question",))
        asking.start()
        browser.wait("document.getElementById('running').innerText.includes('writing')")
        go.set()
        asking.join()
        browser.wait("document.getElementById('turns').innerText.includes('ok')")
        shim.messages("a secret question")
        browser.wait("document.getElementById('errors').innerText.includes('it broke')")
        assert "doctor" in text_of(browser, "errors")
        assert "secret question" not in browser.run("document.body.innerText")
        assert browser.errors == []
        assert {one["url"] for one in browser.requests} == {
            shim.url + path for path in ("/", "/health", "/status")}


def test_the_real_shim_asks_for_its_key_and_then_opens(browser):
    with MockOllama([text("ok")]) as ollama, running_shim(
            ollama.url, model=ollama.model, api_key=KEY) as shim:
        browser.errors.clear()
        browser.open(shim.url + "/")
        browser.wait("!document.getElementById('login').hidden")
        browser.type(KEY)
        browser.press("Enter", 13, "\r")
        browser.wait("!document.getElementById('content').hidden")
        assert browser.errors == []
