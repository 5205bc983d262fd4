"""The report: one page that needs nothing else, and that sorts and filters in a real browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from plot_fixtures.synthetic import block, write_set

from experiments.make_report import illustrate, roots_of
from experiments.plotting.report import build_page, format_value, glance
from experiments.plotting.table import read_results

BROWSERS = (
    "chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome",
)  # fmt: skip
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--virtual-time-budget=2000",
)  # fmt: skip
needs_browser = pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium or Chrome installed")


def make_page(top):
    return build_page([illustrate(read_results(root), top) for root in roots_of(top)])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    top = tmp_path_factory.mktemp("results")
    skip = [("pg19", "kvpress", "flash")]
    write_set(top / "cpu", ["demo_narrative", "pg19"], ["baseline", "streaming", "kvpress"], skip=skip)
    random = {"weights": "random", "model": "random:pythia-2.8b"}
    write_set(top / "h200", ["pg19"], ["baseline", "streaming"], ["flash"], **random)
    return top


@pytest.fixture(scope="module")
def page(results):
    return make_page(results)


class Ids(HTMLParser):
    """Collects ids, references to them, and what a page would load."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.references, self.loads = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for name in ("href", "xlink:href"):
            if attributes.get(name, "").startswith("#"):
                self.references.add(attributes[name][1:])
        self.references |= set(re.findall(r"url\(#([^)]+)\)", " ".join(v or "" for v in attributes.values())))
        self.loads += [(tag, attributes[name]) for name in ("src", "href") if attributes.get(name, "#")[0] != "#"]


def test_the_page_is_self_contained_and_its_ids_are_sound(page):
    parsed = Ids(page)
    assert parsed.loads == []
    assert "@import" not in page
    assert len(parsed.ids) == len(set(parsed.ids))
    assert parsed.references <= set(parsed.ids)


def test_the_page_holds_every_cell_figure_and_environment(page):
    assert len(re.findall("<tr data-run", page[page.index('id="results"') : page.index('id="figures"')])) == 12 + 2
    assert page.count("<svg") == page.count("<figure") > 20
    for text in ("Synthetic CPU", "skipped: kvpress is not installed", "random weights", "configuration", "0000000"):
        assert text in page
    speedup = block("baseline", "math")["runtime_sec"] / block("streaming", "math")["runtime_sec"]
    assert f">{format_value(speedup)}<" in page


def test_names_from_files_cannot_break_the_page(tmp_path):
    model = '<script>alert("x")</script>'
    write_set(tmp_path, ["pg19"], ["streaming"], ["math"], model=model, ablations=False, losses=False)
    assert "<script>alert" not in make_page(tmp_path)


def test_the_glance_gives_ranges_over_data_sets(results):
    lines = {line["label"]: line["ranges"] for line in glance(read_results(results / "cpu"))}
    assert set(lines) == {"StreamingLLM (math)", "StreamingLLM (flash)", "KVPress (math)", "KVPress (flash)"}
    speedup, perplexity, _ = lines["StreamingLLM (math)"]
    assert re.fullmatch(r"\d\.\d\d to \d\.\d\d\W", speedup)
    assert perplexity == "+2.00\xa0%"


PROBE = """
<script>
addEventListener("load", () => {
  const out = {};
  const rows = () => [...document.querySelectorAll("#results tbody tr[data-method]")].filter((r) => !r.hidden);
  const head = (name) => [...document.querySelectorAll("#results thead th")].find((h) => h.textContent.includes(name));
  const column = (name) => rows().map((r) => r.cells[head(name).cellIndex].dataset.v);
  const box = (group, value) => document.querySelector(`input[data-group="${group}"][value="${value}"]`);
  const figures = () => [...document.querySelectorAll("figure")].filter((f) => f.checkVisibility()).length;
  out.errors = window.probeErrors;
  out.all = rows().length;
  out.figures = figures();
  head("Runtime").querySelector("button").click();
  out.up = column("Runtime");
  out.sortUp = head("Runtime").getAttribute("aria-sort");
  head("Runtime").querySelector("button").click();
  out.down = column("Runtime");
  head("Perplexity").querySelector("button").click();
  out.perplexity = column("Perplexity");
  out.sortRuntime = head("Runtime").getAttribute("aria-sort");
  box("method", "streaming").click();
  out.noStreaming = rows().length;
  out.faded = document.querySelectorAll('g.off[data-method="streaming"]').length;
  out.wronglyFaded = document.querySelectorAll('g.off:not([data-method="streaming"])').length;
  box("dataset", "pg19").click();
  out.noPg19 = rows().length;
  out.figuresNoPg19 = figures();
  box("run", "cpu").click();
  out.none = rows().length;
  out.noneShown = document.querySelector("#results tr.none").hidden === false;
  out.state = document.getElementById("state").textContent;
  document.getElementById("all").click();
  out.again = rows().length;
  const before = getComputedStyle(document.body).backgroundColor;
  document.getElementById("theme").click();
  out.themed = getComputedStyle(document.body).backgroundColor !== before;
  const text = document.querySelector("figure svg text");
  out.ink = getComputedStyle(text).fill === getComputedStyle(document.body).color;
  document.getElementById("spread").click();
  out.spread = getComputedStyle(document.querySelector(".spread")).display;
  out.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  out.width = innerWidth;
  const stops = 'a[href], button, input, summary, [tabindex="0"]';
  out.small = [...document.querySelectorAll("button, label")].filter(
    (e) => e.checkVisibility() && e.getBoundingClientRect().height < 24).length;
  out.focusable = [...document.querySelectorAll(stops)].filter((e) => e.tabIndex < 0).length;
  parent.postMessage(JSON.stringify(out), "*");
});
</script>
"""


FRAME = """<!DOCTYPE html><html><body>
<script>addEventListener("message", (event) => {{ document.body.dataset.probe = event.data; }});</script>
<iframe src="report.html" width="{width}" height="900" style="border:0"></iframe></body></html>"""


def probe(page, folder, width):
    """Run the probe in a frame of the given width (a headless window is at least 500 px wide); -> what it found."""
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    catch = "<script>window.probeErrors = []; addEventListener('error', (e) => probeErrors.push(e.message));</script>"
    text = page.replace("<head>", f"<head>{catch}", 1).replace("</body>", f"{PROBE}</body>")
    (folder / "report.html").write_text(text, encoding="utf-8")
    path = folder / "frame.html"
    path.write_text(FRAME.format(width=width), encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(found[1].replace("&quot;", '"'))


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_works_in_a_browser(page, tmp_path, width):
    out = probe(page, tmp_path, width)
    assert out["errors"] == []
    assert out["width"] == width
    assert out["all"] == 14
    up, down = ([float(v) for v in out[key] if v != ""] for key in ("up", "down"))
    assert up == sorted(up)
    assert down == sorted(up, reverse=True)
    assert out["up"][-1] == out["down"][-1] == ""  # the skipped cell stays below
    assert out["sortUp"] == "ascending"
    assert out["sortRuntime"] == "none"
    with_value = [float(v) for v in out["perplexity"] if v]
    assert with_value == sorted(with_value)
    assert out["noStreaming"] == 14 - 5
    assert out["faded"] > 0
    assert out["wronglyFaded"] == 0
    assert out["noPg19"] == 4
    assert out["figuresNoPg19"] == out["figures"] - 2
    assert out["none"] == 0
    assert out["noneShown"] is True
    assert out["state"] == "0 of 14 results shown"
    assert out["again"] == 14
    assert out["themed"] is True
    assert out["ink"] is True
    assert out["spread"] == "block"
    assert out["overflow"] <= 0, "the page itself must not scroll sideways"
    assert out["focusable"] == 0
    assert out["small"] == 0
