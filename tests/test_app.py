"""`bcos-nb app`: its address, its token, its end, and that the instruments work in it."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid

import psutil
import pytest
from browser import SCREENSHOTS, fill_demo
from typer.testing import CliRunner

from bcos_nb import cli
from bcos_nb.resources import resource_path

PROGRAM = [sys.executable, "-c", "from bcos_nb.cli import main; main()", "app", "--no-browser"]


def answer(address, method="GET", **headers):
    """Code and place of an answer, redirects not followed."""
    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *given):
            return None

    opener = urllib.request.build_opener(Stay, urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(address, method=method, headers=headers), timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("Location", "")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return fill_demo(tmp_path_factory.mktemp("app"), frames_per_video=4)


@pytest.fixture(scope="module")
def app(demo):
    """A running app: its process and its address without the token, and the token."""
    with socket.socket() as taken:  # somebody else has the wanted port
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wanted = taken.getsockname()[1]
        environment = os.environ | {"BCOS_NB_RUNS": str(demo / "runs" / "demo"), "OMP_NUM_THREADS": "1"}
        environment.pop("JUPYTER_TOKEN", None)
        process = subprocess.Popen([*PROGRAM, f"--port={min(wanted, 64000)}", "--theme=dark"], cwd=demo, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell lets what it starts in the background ignore it
        try:
            said = process.stdout.readline()
            address, token = re.search(r"(http://127\.0\.0\.1:\d+)/\?token=([0-9a-f]{48})", said).groups()
            assert not address.endswith(f":{wanted}")
            for _ in range(1800):
                try:
                    socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None, said + process.stdout.read()
                    time.sleep(0.1)
            yield process, address, token
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(20)


@pytest.mark.browser
def test_without_the_token_it_is_refused(app):
    _, address, token = app
    for place in ("/", "/voila/render/grids.ipynb", "/voila/tree"):
        for wrong in ("", "?token=", "?token=" + "0" * 48):
            code, to = answer(address + place + wrong)
            assert code in (302, 403) and (code == 403 or to.startswith("/login")), (place, wrong, code, to)
    number = str(uuid.uuid4())  # of a kernel
    assert answer(f"{address}/voila/api/shutdown/{number}", "POST")[0] in (302, 403)
    assert answer(f"{address}/api/kernels/{number}")[0] in (302, 403)
    key = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version": "13"}
    assert answer(f"{address}/api/kernels/{number}/channels", **key)[0] == 403
    for form in ({}, {"Authorization": f"token {token}"}):
        code, page = answer(f"{address}/" + ("" if form else f"?token={token}"), **form)
        assert code == 200 and "grids.ipynb" in page and "thresholds.ipynb" in page


@pytest.mark.browser
def test_it_listens_on_this_machine_only_and_hides_its_token(app):
    process, address, token = app
    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    lines = [" ".join(psutil.Process(one.pid).cmdline()) for one in family]
    assert any("voila" in line for line in lines) and not any(token in line for line in lines)
    port = int(address.rsplit(":", 1)[1])
    places = {one.laddr.ip for member in family for one in psutil.Process(member.pid).net_connections("tcp") if one.status == "LISTEN" and one.laddr.port == port}
    assert places == {"127.0.0.1"}


@pytest.mark.browser
def test_the_instruments_work_in_it(app, chromium):  # noqa: F811
    _, address, token = app
    SCREENSHOTS.mkdir(exist_ok=True)
    errors = []
    context = chromium.new_context(viewport={"width": 1280, "height": 1000})
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(f"{page.url}: {error}"))
    page.on("console", lambda message: errors.append(f"{page.url}: {message.text}") if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith((address, "data:", "blob:", address.replace("http", "ws"))) else errors.append(f"asks {request.url}"))
    page.set_default_timeout(120_000)
    page.goto(f"{address}/?token={token}")
    names = [name for name in ("attributions", "grids", "own_images", "thresholds") if page.locator(f"a[href$='{name}.ipynb']").count()]
    page.screenshot(path=SCREENSHOTS / "app.png")
    assert {"grids", "own_images", "thresholds"} <= set(names)
    shown = {"grids": ".bcos-bars .bcos-chart", "own_images": ".bcos-drop button", "thresholds": ".bcos-threshold .noUi-handle", "attributions": ".bcos-explorer canvas"}
    for name in names:
        page.goto(f"{address}/voila/render/{name}.ipynb")  # the cookie of the first page is enough
        page.locator(shown[name]).first.wait_for()
        assert not page.get_by_text("Run all cells").count() and page.get_by_text("if it was run").count()
        assert page.evaluate("document.body.dataset.jpThemeLight") == "false"
        if page.locator(".bcos-threshold .noUi-handle").count():
            handle = page.locator(".bcos-threshold .noUi-handle").first
            before = float(page.locator(".bcos-threshold .widget-readout").first.inner_text())
            handle.focus()
            for _ in range(5):
                handle.press("ArrowRight")
            page.wait_for_function("wanted => document.querySelector('.bcos-threshold .widget-readout').innerText == wanted", arg=f"{before + 0.05:.2f}")
        page.wait_for_timeout(300)
        page.screenshot(path=SCREENSHOTS / f"app_{name}.png", full_page=True)
    context.close()
    assert not errors, errors


@pytest.mark.browser
def test_ctrl_c_ends_it_with_its_kernels(app):
    process, address, _ = app
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0 and "The app has ended." in process.stdout.read()
    assert psutil.wait_procs(family, timeout=20)[1] == []


def test_what_cannot_be_is_said(monkeypatch, tmp_path):
    said = CliRunner().invoke(cli.app, ["app", "--theme", "blue"])
    assert said.exit_code == 1 and "theme must be light or dark" in said.output
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = CliRunner().invoke(cli.app, ["app"])
    assert said.exit_code == 1 and "pip install voila" in said.output


def test_a_port_in_use_is_passed_over():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < cli.free_port(port) < port + 50


def test_the_template_asks_nothing_of_the_internet(tmp_path):
    cli.write_template(tmp_path, resource_path("nbs/explore"), "dark")
    place = tmp_path / "voila" / "templates" / "bcos_nb"
    assert json.loads((place / "conf.json").read_text()) == {"base_template": "lab"}
    text = (place / "index.html.j2").read_text()
    assert text.count("https://") == text.count('replace("https://') == 2
    entrance = (place / "tree.html").read_text()
    assert "http" not in entrance and "color-scheme: dark" in entrance
    for name in ("grids", "own_images", "thresholds"):
        assert f'href="{{{{ base_url }}}}voila/render/{name}.ipynb"' in entrance
