"""A page in a real browser: headless Chromium opens the file, a script does what a person would,
and says what it saw.

Chromium is spoken to in its own protocol over two pipes, so no package is needed, and nothing is
guessed about time."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import time

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


def after(page: str, script: str, tmp_path, seconds: float = 60) -> str:
    """The text that `script` (JavaScript, may await) leaves in the variable `out`, run on `page`:
    an address, or HTML that is opened from a file."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    file, until, number, pending = tmp_path / "page.html", time.time() + seconds, 0, b""
    if not page.startswith("http://"):
        file.write_text(page, encoding="utf-8")
        page = file.as_uri()
    low = (*os.pipe(), *os.pipe())  # theirs to read, ours to write; ours to read, theirs to write
    pipes = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in low]  # away from 3 and 4
    for fd in low:
        os.close(fd)
    theirs_in, ours_out, ours_in, theirs_out = pipes
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-pipe",
        "--no-proxy-server",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    browser = subprocess.Popen(
        [CHROMIUM, *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        close_fds=False,
        # Where Chromium looks for them.
        preexec_fn=lambda: (os.dup2(theirs_in, 3), os.dup2(theirs_out, 4)),
    )

    def message() -> dict:
        nonlocal pending
        while b"\0" not in pending:
            ready, _, _ = select.select([ours_in], [], [], max(0, until - time.time()))
            assert ready, "the browser did not answer in time"
            pending += os.read(ours_in, 2**16)
        one, pending = pending.split(b"\0", 1)
        return json.loads(one)

    def call(method, session=None, **params) -> dict:
        nonlocal number
        number += 1
        request = {"id": number, "method": method, "params": params}
        request |= {"sessionId": session} if session else {}
        os.write(ours_out, json.dumps(request).encode() + b"\0")
        while (answer := message()).get("id") != number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    try:
        target = call("Target.createTarget", url="about:blank")["targetId"]
        session = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        call("Page.enable", session)
        call("Page.navigate", session, url=page)
        while message().get("method") != "Page.loadEventFired":
            pass
        expression = f"(async () => {{ let out; {script}; return String(out) }})()"
        how = dict(expression=expression, awaitPromise=True, returnByValue=True)
        found = call("Runtime.evaluate", session, **how)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"]["value"]
    finally:
        browser.kill()
        browser.wait()
        for fd in pipes:
            os.close(fd)
