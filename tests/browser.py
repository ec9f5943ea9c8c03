"""A headless Chromium, driven over its debugging pipe with the standard library."""
import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
    "--disable-extensions", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--remote-debugging-pipe", "about:blank",
)
ANSWER_S = 20
# Ten seconds of a page's timers pass in one, so that nobody waits for its next question.
FAST_TIMERS = "const wait = setTimeout; window.setTimeout = (then, ms) => wait(then, ms / 10);"


def browser_path():
    """Return the browser to use, or None where none is installed."""
    named = os.environ.get("CHROMIUM", "")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page; its console errors and requests are kept."""

    def __init__(self, path):
        self.home = tempfile.mkdtemp(prefix="qwencode-browser-")
        # The pipe's descriptors are 3 and 4; the shell moves the standard ones there.
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null', path,
             f"--user-data-dir={self.home}", *ARGUMENTS],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": self.home})
        self.numbers = itertools.count(1)
        self.answers, self.news = {}, threading.Condition()
        self.errors, self.requests, self.session = [], [], None
        threading.Thread(target=self._read, daemon=True).start()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call(
            "Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")
        self.call("Page.addScriptToEvaluateOnNewDocument", source=f"{{ {FAST_TIMERS} }}")

    def _read(self):
        rest = b""
        while True:
            read = self.process.stdout.read1(65536)
            if not read:
                return
            *messages, rest = (rest + read).split(b"\0")
            with self.news:
                for message in map(json.loads, messages):
                    self._take(message)
                self.news.notify_all()

    def _take(self, message):
        parameters = message.get("params", {})
        if "id" in message:
            self.answers[message["id"]] = message
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"])
        elif message.get("method") == "Log.entryAdded":
            if parameters["entry"]["level"] == "error":
                self.errors.append(parameters["entry"]["text"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"]))
        elif message.get("method") == "Runtime.consoleAPICalled":
            if parameters["type"] in ("error", "warning", "assert"):
                self.errors.append(json.dumps(parameters["args"]))

    def call(self, method, **parameters):
        """Send a command and return its result."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        with self.news:
            if not self.news.wait_for(lambda: number in self.answers, ANSWER_S):
                raise AssertionError(f"the browser did not answer {method}")
            answer = self.answers.pop(number)
        assert "error" not in answer, answer
        return answer["result"]

    def run(self, script):
        """Evaluate an expression in the page, wait for its promise, return its value."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                           returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition, seconds=10):
        """Wait until an expression is true in the page."""
        script = """new Promise((resolve) => {
          const end = Date.now() + %d;
          const look = () => { let value = false;
            try { value = (%s); } catch (error) { value = false; }
            if (value || Date.now() > end) resolve(Boolean(value)); else setTimeout(look, 100); };
          look(); })""" % (seconds * 1000, condition)
        assert self.run(script), f"never true: {condition}\n{self.run('document.body.innerText')}"

    def open(self, url, width=1280, height=900, scheme="light"):
        """Load a page in a window of that size and colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=url)
        self.wait(f"location.href.startsWith({json.dumps(url)}) && document.body")

    def press(self, key, code=0, text=""):
        """Press a key, for example Tab (9) or Enter (13)."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown",
                  **common, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text):
        """Write into the focused field."""
        self.call("Input.insertText", text=text)

    def picture(self, path):
        """Save the whole page as PNG."""
        image = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(image))

    def close(self):
        """End the browser and remove its folder."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        shutil.rmtree(self.home, ignore_errors=True)
