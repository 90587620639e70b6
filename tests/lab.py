"JupyterLab on this machine and a browser that looks at it."
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
         "--disable-background-networking", "--disable-sync", "--force-color-profile=srgb"]
HALF = """from dataclasses import dataclass
from cit_workbench import Method
@dataclass
class Half(Method):
    "Gradients at a part of their size."
    share: float = .5 # What is left
    def grads(self, net, s):
        for p in net.params.values(): p.grad.mul_(self.share)
    def stats(self, net): return {"left": self.share}"""  # a method that a notebook defines


def notebook(path, *cells):
    "Write a notebook of code cells."
    cell = lambda k, s: {"cell_type": "code", "id": f"c{k}", "metadata": {}, "execution_count": None, "outputs": [], "source": s}
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nb = {"cells": [cell(k, s) for k, s in enumerate(cells)], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    Path(path).write_text(json.dumps(nb))


@contextmanager
def server(folder, **env):
    "A JupyterLab on 127.0.0.1 with a token; yields its address and token."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token, home = secrets.token_hex(16), Path(folder)/".jupyter"
    config = {"JUPYTER_CONFIG_DIR": home/"config", "JUPYTER_DATA_DIR": home/"data", "JUPYTER_RUNTIME_DIR": home/"run"}
    flags = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", f"--IdentityProvider.token={token}", "--LabApp.news_url=",
             "--LabApp.extension_manager=readonly", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}"]
    flags += ["--allow-root"] if os.geteuid() == 0 else []
    env = os.environ | {k: str(v) for k, v in (config | env).items()} | {"JUPYTERLAB_WORKSPACES_DIR": str(home/"spaces"), "JUPYTERLAB_SETTINGS_DIR": str(home/"settings")}
    (home/"run").mkdir(parents=True)
    quiet = home/"settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with open(home/"log.txt", "wb") as log:
        p = subprocess.Popen([sys.executable, "-m", "jupyterlab", *flags], stdout=log, stderr=log, env=env)
    try:
        at = f"http://127.0.0.1:{port}"
        for _ in range(480):
            try: urllib.request.urlopen(f"{at}/api?token={token}", timeout=1).close(); break
            except OSError:
                assert p.poll() is None, (home/"log.txt").read_text()[-2000:]
                time.sleep(.25)
        yield at, token
    finally:
        p.terminate()
        try: p.wait(20)
        except subprocess.TimeoutExpired: p.kill()


@contextmanager
def browser():
    "A Chromium without a window."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as pw:
        b = pw.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        try: yield b
        finally: b.close()


class Lab:
    "One page of JupyterLab with one notebook open."
    def __init__(self, b, at, token, name, width=1280, height=1000):
        self.page = b.new_page(viewport={"width": width, "height": height})
        self.page.goto(f"{at}/lab/workspaces/{secrets.token_hex(4)}/tree/{name}?token={token}")
        self.ready()

    def ready(self):
        self.page.wait_for_function("window.jupyterapp && document.querySelector('.jp-Notebook .jp-Cell')", timeout=180_000)
        kernel = "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel"
        self.page.wait_for_function(f"{kernel}?.connectionStatus === 'connected' && {kernel}.status === 'idle'", timeout=180_000)

    def do(self, command, **args): self.page.evaluate("([c, a]) => { window.jupyterapp.commands.execute(c, a) }", [command, args])

    def run_all(self): self.do("notebook:run-all-cells")

    def wide(self):
        "Without the file browser."
        if self.page.locator("#jp-left-stack").is_visible(): self.do("application:toggle-left-area")

    def dark(self, yes=True):
        self.do("apputils:change-theme", theme=f"JupyterLab {'Dark' if yes else 'Light'}")
        self.page.wait_for_selector(f"body[data-jp-theme-light={'false' if yes else 'true'}]", state="attached", timeout=60_000)

    def narrow(self):
        "With the file browser."
        if not self.page.locator("#jp-left-stack").is_visible(): self.do("application:toggle-left-area")

    def size(self, width, height=1000):
        "Another window; waits until every figure is as wide as its place."
        self.page.set_viewport_size({"width": width, "height": height})
        self.fitted()

    def fitted(self):
        "Wait until every visible figure is drawn, as wide as its place."
        plot = "f.querySelector('.js-plotly-plot')"
        off = f"f => f.offsetParent && !({plot}?.data?.length && Math.abs({plot}._fullLayout.width - f.clientWidth) <= 4)"
        self.page.wait_for_function(f"![...document.querySelectorAll('.cit-figure')].some({off})", timeout=240_000)

    def crowded(self): return self.page.evaluate(CROWDED)

    def view(self, n=0): return self.page.locator(".cit-view").nth(n)

    def reload(self):
        self.page.reload()
        self.ready()

    def restart(self):
        "A new kernel; the old one is gone."
        self.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
        self.ready()
        self.do("notebook:clear-all-cell-outputs")
        self.view().wait_for(state="detached", timeout=120_000)

    def field(self, name):
        "The input of the visible widget with that label."
        label = self.page.locator(f"label:text-is('{name}')")
        return self.page.locator(".cit-view .jupyter-widgets:visible", has=label).last.locator("input, select, textarea").first

    def type(self, name, text):
        self.field(name).fill(text)
        self.field(name).press("Tab")

    def choose(self, name, value): self.field(name).select_option(value)

    def button(self, name, exact=True): return self.page.get_by_role("button", name=name, exact=exact).locator("visible=true").first

    def tab(self, name): self.page.locator(".cit-view .lm-TabBar-tab", has_text=re.compile(f"^{name}$")).click()


CROWDED = """() => {
  const said = [], view = [...document.querySelectorAll('.cit-view')].find(v => v.offsetParent && !v.parentElement.closest('.cit-view'));
  const shown = e => e.checkVisibility?.({ visibilityProperty: true, opacityProperty: true }) ?? e.getClientRects().length;
  const name = e => (e.textContent || e.value || e.tagName).trim().slice(0, 40);
  const corners = (e, m) => {
    const b = e.getBBox(), r = 1.5;
    const at = (x, y) => { const p = new DOMPoint(x, y).matrixTransform(m); return [p.x, p.y]; };
    const [x0, y0, x1, y1] = [b.x + r, b.y + r, b.x + b.width - r, b.y + b.height - r];
    return [at(x0, y0), at(x1, y0), at(x1, y1), at(x0, y1)];
  };
  const apart = (p, q) => [p, q].some(s => s.some((a, i) => {
    const b = s[(i + 1) % 4], n = [b[1] - a[1], a[0] - b[0]];
    const on = t => t.map(c => c[0]*n[0] + c[1]*n[1]);
    const [u, v] = [on(p), on(q)];
    return Math.max(...u) <= Math.min(...v) || Math.max(...v) <= Math.min(...u);
  }));
  for (const plot of [...view.querySelectorAll('.js-plotly-plot')].filter(p => p.offsetParent)) {
    const frame = plot.closest('.cit-figure').getBoundingClientRect();
    const texts = [...plot.querySelectorAll('svg text')].filter(t => shown(t) && t.textContent.trim() && !t.closest('.hoverlayer, .modebar'));
    const boxes = texts.map(t => [name(t), corners(t, t.getScreenCTM())]);
    boxes.forEach(([a, p], i) => {
      if (p.some(([x, y]) => x < frame.left - 2 || x > frame.right + 2 || y < frame.top - 2 || y > frame.bottom + 2)) said.push(`${a} is cut`);
      for (const [b, q] of boxes.slice(i + 1)) if (!apart(p, q)) said.push(`${a} runs into ${b}`);
    });
  }
  const leaf = 'label, button, select, input:not([type=file]), textarea, .lm-TabBar-tabLabel, .widget-html-content, .widget-readout, .jp-Collapse-header';
  const things = [...view.querySelectorAll(leaf)].filter(e => e.offsetParent && shown(e) && e.getBoundingClientRect().width && !e.closest('.noUi-target'));
  const edge = view.getBoundingClientRect(), boxes = things.map(e => e.getBoundingClientRect());
  things.forEach((e, i) => {
    const [a, r] = [boxes[i], 1.5];
    if (e.matches('label, button, .lm-TabBar-tabLabel') && e.scrollWidth > e.clientWidth + 1 && e.clientWidth) said.push(`${name(e)} is cut`);
    if (a.right > edge.right + 2) said.push(`${name(e)} lies beyond the page`);
    things.slice(i + 1).forEach((o, k) => {
      const b = boxes[i + 1 + k];
      const over = Math.min(a.right, b.right) - Math.max(a.left, b.left) > r && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > r;
      if (over && !e.contains(o) && !o.contains(e)) said.push(`${name(e)} lies over ${name(o)}`);
    });
  });
  return said;
}"""  # What overlaps, and what is cut: lines of text in figures by their turned boxes, fields and buttons by theirs
