"""The report's page in a browser: nothing is drawn before it is seen, and printing, searching, anchors and a dark ground work all the same."""
import base64
import io
import json

import nbformat
import numpy as np
import plotly.graph_objects as go
import pytest
from PIL import Image

from bcos_nb.reports import Cell, Table, table_html
from bcos_nb.reports.page import PLOTLY_MIME, for_paper, loads_from_network, make_page, notebook_page, smaller_pictures

PARTS = 8


def picture(kind="RGB", side=200):
    """A photo-like PNG and its pixels."""
    y, x = np.mgrid[:side, :side] / side
    pixels = np.stack([x, y, (np.sin(9 * x) * np.cos(7 * y) + 1) / 2, 0.5 + 0 * x], -1)[..., :len(kind)] + np.random.default_rng(0).normal(0, 0.01, (side, side, len(kind)))
    written = io.BytesIO()
    Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8), kind).save(written, "PNG")
    return written.getvalue()


def a_notebook():
    """As a report's, executed: in each part a heading, a table, a picture and two figures."""
    html = lambda text: nbformat.v4.new_output("display_data", {"text/html": text})
    cells = [nbformat.v4.new_markdown_cell("# A report")]
    for part in range(PARTS):
        rows = [(f"row {part}.{k}", [Cell(0.5 + k / 100, 0.4, 0.6, 0.55)] * 3) for k in range(20)]
        table = Table(f"table_{part}", f"Table {part}", "", ["a", "b", "c"], [("", rows)])
        figure = go.Figure(go.Scatter(x=[0, 1], y=[part, 1], line_color="#6d0f3c"), dict(height=400, title=f"figure {part}"))
        plot = nbformat.v4.new_output("display_data", {PLOTLY_MIME: json.loads(figure.to_json()), "text/plain": "a figure"}, metadata={"alt": f"Figure {part} in words"})
        image = html(f'<figure id="item-{part}"><img src="data:image/png;base64,{base64.b64encode(picture()).decode()}" alt="a picture"></figure>')
        cells += [nbformat.v4.new_markdown_cell(f"## Part {part}"), nbformat.v4.new_code_cell("1 / 0", outputs=[html(table_html(table)), image, plot])]
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(notebook_page(a_notebook()), encoding="utf-8")
    return file


def test_pictures_are_smaller_and_look_the_same():
    png = picture()
    markup = smaller_pictures(f'<p><img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="a &gt; b"></p><p>data:image/png;base64,AAAA</p>')
    assert 'width="200" height="200"' in markup and 'loading="lazy"' in markup and 'alt="a &gt; b"' in markup and markup.endswith("<p>data:image/png;base64,AAAA</p>")
    kind, data = markup.split("src=\"data:image/")[1].split('"')[0].split(";base64,")
    data = base64.b64decode(data)
    assert kind == "webp" and len(data) < len(png) / 2
    before, after = (np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), float) for file in (png, data))
    assert before.shape == after.shape and np.abs(before - after).mean() < 3  # of 255
    seen_through = smaller_pictures(f'<img alt="" src="data:image/png;base64,{base64.b64encode(picture("RGBA")).decode()}">')
    assert "A" in Image.open(io.BytesIO(base64.b64decode(seen_through.split(";base64,")[1].split('"')[0]))).getbands()
    dot = io.BytesIO()
    Image.new("RGB", (1, 1)).save(dot, "PNG")
    assert len(smaller_pictures(f'<img src="data:image/png;base64,{base64.b64encode(dot.getvalue()).decode()}">')) < 300  # never larger than it was


def test_a_figure_on_paper_has_nothing_that_wants_a_pointer():
    figure = go.Figure([go.Scatter(y=[1, 2], name="shown"), go.Scatter(y=[2, 1], name="waits", visible="legendonly")])
    figure.update_layout(height=560, margin_t=50, yaxis_title="share", paper_bgcolor="rgba(0,0,0,0)", updatemenus=[dict(type="buttons", buttons=[dict(label="weighted", method="restyle", args=[{}])])])
    made = for_paper(figure)
    assert [trace.name for trace in made.data] == ["shown"] and not made.layout.updatemenus and made.layout.paper_bgcolor == "white"
    assert made.layout.yaxis.title.text == "share, weighted" and made.layout.height == 530 and made.layout.margin.t == 20
    assert for_paper(go.Figure(go.Scatter(y=[1]))).layout.yaxis.title.text is None


def test_the_notebook_runs_where_the_command_was_given(tmp_path, monkeypatch):
    """Datasets are named relative to it, wherever the runs lie."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("word = ''", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell("import os\nprint(word, os.getcwd())")],
                                        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}})
    nbformat.write(notebook, there / "in.ipynb")
    monkeypatch.chdir(here)
    make_page(str(there / "in.ipynb"), str(there / "out.ipynb"), str(there / "page.html"), '{"word": "hello"}')
    assert f"hello {here}" in (there / "page.html").read_text(encoding="utf-8")


@pytest.mark.browser
def test_the_page_is_drawn_as_it_is_seen(page_file, chromium):
    page, said = chromium.new_page(viewport={"width": 1300, "height": 800}), []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:", "blob:")) else None)
    page.goto(page_file.as_uri())
    page.wait_for_load_state("load")
    drawn = lambda: page.evaluate("[...document.querySelectorAll('.plot')].map(place => !!place.querySelector('svg'))")
    assert not drawn()[-1] and sum(drawn()) <= 2
    skipped = "document.querySelector('#table_7 td.text').checkVisibility({contentVisibilityAuto: true})"
    assert page.evaluate(skipped) is False  # the last table is not laid out
    assert page.evaluate("document.documentElement.scrollHeight") > PARTS * 1000

    page.evaluate("location.hash = '#Part-7'")  # an anchor
    page.wait_for_function("Math.abs(document.getElementById('Part-7').getBoundingClientRect().top) < 60")
    assert page.evaluate(skipped) is True
    page.evaluate("document.querySelectorAll('.plot')[7].scrollIntoView()")
    page.wait_for_function("document.querySelectorAll('.plot')[7].querySelector('svg')")
    assert not drawn()[4] and page.evaluate("[...document.images].at(-1).complete && [...document.images].at(-1).naturalWidth") == 200

    page.evaluate("window.scrollTo(0, 0)")
    assert page.evaluate("window.find('row 4.13')")  # searching
    page.wait_for_function("(top => top > -5 && top < 805)([...document.querySelectorAll('td.text')].find(cell => cell.textContent === 'row 4.13').getBoundingClientRect().top)")

    page.click("#theme")
    page.evaluate("document.querySelectorAll('.plot')[7].scrollIntoView()")
    page.wait_for_function("document.querySelectorAll('.plot')[7].innerHTML.includes('rgb(168, 50, 121)')")  # what reports.figures.DARK has for it

    pdf = page.pdf()  # printing draws all that was never seen
    assert sum(drawn()) == PARTS and pdf.count(b"/Subtype /Image") >= 1 and not said
    page.close()


@pytest.mark.browser
def test_a_page_just_opened_is_printed_whole(page_file, chromium):
    page = chromium.new_page()
    page.goto(page_file.as_uri())
    page.pdf()
    assert page.evaluate("[...document.querySelectorAll('.plot')].every(place => place.querySelector('svg'))")
    assert "rgb(109, 15, 60)" in page.evaluate("document.querySelectorAll('.plot')[3].innerHTML")  # in the colours of a white ground
    page.close()


@pytest.mark.browser
def test_a_phone_scrolls_figures_instead_of_squeezing_them(page_file, chromium):
    page = chromium.new_page(viewport={"width": 390, "height": 800})
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('.plot')[2].scrollIntoView()")
    page.wait_for_function("document.querySelectorAll('.plot')[2].querySelector('svg')")
    assert page.evaluate("document.querySelectorAll('.plot')[2].querySelector('svg').getBoundingClientRect().width") >= 700
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()


@pytest.mark.browser
def test_paper_is_white_and_wide_enough(tmp_path, chromium):
    """From a dark desktop: dark letters, and nothing of a table of 18 columns or of a figure's legend beyond the page's edge."""
    notebook = a_notebook()
    rows = [("row", [Cell(0.5, 0.41, 0.62, 0.55)] * 18)]
    wide = table_html(Table("wide", "Table", "", ["AUC", "F1"] * 9, [("ResNet-34", rows)], [(name, 2) for name in "ABCDEFGHI"]))
    notebook.cells.append(nbformat.v4.new_code_cell("", outputs=[nbformat.v4.new_output("display_data", {"text/html": wide})]))
    (tmp_path / "page.html").write_text(notebook_page(notebook), encoding="utf-8")
    page = chromium.new_page(viewport={"width": 1280, "height": 800}, color_scheme="dark")
    page.goto((tmp_path / "page.html").as_uri())
    colour = "getComputedStyle(document.querySelector('h1')).color"
    assert page.evaluate(colour) == "rgb(227, 230, 234)"
    page.emulate_media(media="print")
    assert page.evaluate(colour) == "rgb(34, 38, 43)"
    page.set_viewport_size({"width": 718, "height": 1000})  # an A4 page without its margins, at 96 dpi
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function("[...document.querySelectorAll('.plot')].every(place => place.querySelector('svg'))")
    edges = page.evaluate("['#wide', '.plot svg.main-svg'].map(one => document.querySelector(one).getBoundingClientRect().right)")
    assert max(edges) <= 718 and min(edges) > 500, edges
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    page.emulate_media(media="screen")
    page.set_viewport_size({"width": 1280, "height": 800})
    page.wait_for_function("document.querySelector('.plot svg.main-svg').getBoundingClientRect().width > 900")
    page.close()


def test_nothing_is_fetched(page_file):
    assert not loads_from_network(page_file.read_text(encoding="utf-8"))
