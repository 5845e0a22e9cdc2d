"""The report in a real browser, headless: what is drawn, what is requested, light and dark."""

from __future__ import annotations

import json
import re
import shutil
import socketserver
import subprocess
import threading
from html import unescape

import numpy as np
import pytest
from PIL import Image

from distcl.reporting.page import write_report
from distcl.reporting.plots import COLORS
from tests.folders import run_folder

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine"),
    pytest.mark.timeout(300),
]
PLOTS = ["accuracy", "forgetting", "watched", "loss", "weights-cur", "most-drawn", "time"]
OWN = re.compile(
    r"\b(update\.googleapis|optimizationguide-pa\.googleapis|safebrowsing\.googleapis"
    r"|android\.clients\.google|(clients\d?|accounts|www)\.google|edgedl\.me\.gvt1)\.com\b"
)
"""What the browser asks for by itself, whatever page it shows."""

MEASURE = """<script>
addEventListener("load", () => {
  const plots = [...document.querySelectorAll("figure.card")].map(card => {
    const svg = card.querySelector("svg"), seen = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")];
    const marks = [...svg.querySelectorAll("path, image, use, rect")].filter(mark => {
      const box = mark.getBoundingClientRect();
      return box.width + box.height > 1 && box.right >= seen.left && box.left <= seen.right;
    });
    const scale = seen.width / svg.viewBox.baseVal.width;
    return {
      name: card.id, width: seen.width, height: seen.height, marks: marks.length,
      text: texts.map(text => text.textContent.trim()).join("|"),
      smallest: scale * Math.min(...texts.map(text => parseFloat(getComputedStyle(text).fontSize))),
    };
  });
  parent.postMessage(JSON.stringify({
    plots, requests: performance.getEntriesByType("resource").map(entry => entry.name),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  }), "*");
});
</script></body>"""

FRAME = """<iframe src="measured.html" style="width:{width}px;height:5000px;border:0"></iframe>
<script>addEventListener("message", event => {{
  const holder = document.createElement("pre");
  holder.textContent = event.data;
  document.body.append(holder);
}})</script>"""


class Recorder(socketserver.ThreadingTCPServer):
    """A proxy that notes the first line of every request and answers none."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self):
        self.asked = []
        super().__init__(("127.0.0.1", 0), None)

    def finish_request(self, request, client_address):
        request.settimeout(5)
        line = request.recv(4096).partition(b"\r\n")[0].decode("latin-1")
        self.asked.append(line)
        request.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")


@pytest.fixture
def proxy():
    with Recorder() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = run_folder(tmp_path_factory.mktemp("runs") / "a")
    write_report([folder], folder / "report.html")
    return folder / "report.html"


def browse(tmp_path, page, *options):
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--no-first-run",
            "--disable-sync",
            "--disable-extensions",
            "--disable-default-apps",
            "--disable-features=NetworkTimeServiceQuerying,OptimizationHints,MediaRouter",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


def measured(tmp_path, report, width):
    """Return what a script, put into a copy of the page, measures in a window of that width."""
    page = report.read_text()
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    copy = tmp_path / "measured.html"
    copy.write_text(page.replace("</body>", MEASURE))
    frame = tmp_path / "frame.html"  # a window cannot be as narrow as a phone; a frame can
    frame.write_text(FRAME.format(width=width))
    text = browse(tmp_path, frame, "--virtual-time-budget=5000", "--dump-dom")
    found = re.search(r"<pre>(.*?)</pre>", text, re.DOTALL)
    assert found, text[-2000:]
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize("width", [390, 1200])
def test_every_plot_has_content_and_can_be_read(tmp_path, report, width):
    found = measured(tmp_path, report, width)
    assert [plot["name"] for plot in found["plots"]] == [f"01-a-{name}" for name in PLOTS]
    for plot in found["plots"]:
        assert plot["width"] > 0.75 * min(width, 450) and plot["height"] > 100, plot
        assert plot["marks"] >= 8, plot
        assert plot["smallest"] >= 7.5, plot
    texts = {plot["name"].removeprefix("01-a-"): plot["text"] for plot in found["plots"]}
    assert "73.3" not in texts["accuracy"] and "85.0" in texts["accuracy"]
    assert "drift detected" in texts["watched"] and "50%" in texts["weights-cur"]
    assert "×20 “0”" in texts["most-drawn"] and "pretraining" in texts["time"]
    assert found["overflow"] == 0, "the page scrolls sideways"
    assert found["requests"] == []


def test_nothing_is_requested_from_outside(tmp_path, report, proxy):
    options = (
        f"--proxy-server=127.0.0.1:{proxy.server_address[1]}",
        "--proxy-bypass-list=<-loopback>",
    )
    assert "samples drawn most" in browse(tmp_path, report, *options, "--dump-dom")
    asked = list(proxy.asked)
    control = tmp_path / "control.html"
    control.write_text('<img src="http://example.test/seen.png">')
    browse(tmp_path, control, *options, "--dump-dom")
    assert any("example.test/seen.png" in line for line in proxy.asked), "the proxy sees nothing"
    assert [line for line in asked if not OWN.search(line)] == []


def test_the_page_follows_light_and_dark(tmp_path, report):
    for scheme, number in (("light", 1), ("dark", 0)):
        picture = tmp_path / f"{scheme}.png"
        browse(
            tmp_path,
            report,
            "--window-size=1200,1600",
            f"--screenshot={picture}",
            f"--blink-settings=preferredColorScheme={number}",
        )
        pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
        background = pixels[2, 2].mean()
        assert background > 230 if scheme == "light" else background < 40
        for name in ("c1", "c2", "ink"):  # a line of the plots, a bar, and text
            color = COLORS[name][0 if scheme == "light" else 1]
            wanted = [int(color[k : k + 2], 16) for k in (1, 3, 5)]
            assert (abs(pixels - wanted).max(axis=2) <= 3).sum() > 100, (scheme, name)
