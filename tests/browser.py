"""A page in a real browser: headless Chromium opens the file, a script does what a person would, and the page is read back."""

import shutil
import subprocess

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def after(page: str, script: str, tmp_path) -> str:
    """The text that `script` leaves in the variable `out`, run at the end of `page` (HTML), opened from a file without network."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    file = tmp_path / "page.html"
    run = f"<script>addEventListener('load', async () => {{ let out; try {{ {script} }} catch (e) {{ out = 'error: ' + e }} document.body.innerHTML = '<pre id=out>' + out + '</pre>' }})</script>"
    file.write_text(page.replace("</html>", run + "</html>"), encoding="utf-8")
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", f"--user-data-dir={tmp_path / 'profile'}",
                           "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=60)
    assert '<pre id="out">' in done.stdout, done.stderr[-2000:]
    return done.stdout.split('<pre id="out">')[1].split("</pre>")[0]
