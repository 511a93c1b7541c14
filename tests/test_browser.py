"""The exploring instruments in a real browser: JupyterLab is started, the notebooks are run, sliders are moved, regions brushed."""
import json
import re
import time

import numpy as np
import pytest
import torch
from browser import DETECTORS, demo, lab, nameless, open_notebook, shoot, theme  # noqa: F401
from PIL import Image

from bcos_nb.data import load_frames, read_catalog
from bcos_nb.explainers import explain
from bcos_nb.games import localization_scores, specificity
from bcos_nb.models import load_detector
from bcos_nb.reports.figures import curve_colour, heat_overlay
from bcos_nb.widgets import MapCanvas, Panel
from bcos_nb.widgets.explorer import hidden_image
from bcos_nb.widgets.saving import canvas_page
from bcos_nb.widgets.thresholds import on_any_ground

pytestmark = pytest.mark.browser


class Expected:
    """What the project's own functions say of the fakes of the test split."""

    def __init__(self, folder):
        self.detectors = {b: load_detector(folder / "runs" / "demo" / "train" / f"resnet10-{name}" / "detector.safetensors").eval() for b, name in DETECTORS.items()}
        catalog = read_catalog(folder / "data", "FaceForensics++", "test", "c23", frames_per_video=2)
        self.catalog, self.root = catalog, folder / "data"
        self.frames = load_frames(catalog[catalog.label == 1].reset_index(drop=True), 128, root=folder / "data")
        self.inside = self.frames.masks[:, 0] == 255

    def image(self, frame):
        return self.frames.images[[frame]].float() / 255

    def source(self, frame):
        name = self.frames.catalog.source_frame.iloc[frame]
        catalog = self.catalog[self.catalog.frame == name].reset_index(drop=True)
        return load_frames(catalog, 128, root=self.root, with_mask=False).images[0].float() / 255

    def maps(self, b, explainer, frame):
        return explain(self.detectors[b], self.image(frame), explainer).maps

    def scores(self, b, explainer, frame, threshold):
        scores = localization_scores(self.maps(b, explainer, frame), self.inside[[frame]], (threshold,))
        return [scores[name].item() for name in ("weighted", "unweighted")]

    def probability(self, b, image):
        with torch.no_grad():
            return self.detectors[b](image).softmax(1)[0, 1].item()


@pytest.fixture(scope="module")
def expected(demo):
    return Expected(demo)


PANEL = ".bcos-canvas:not(.bcos-plain) .bcos-panel:has(.bcos-kept)"  # a map, not a picture of the filmstrip nor the frame itself


def numbers(page, panel, names=("weighted", "unweighted")):
    """The scores below a map."""
    return [float(page.locator(PANEL).nth(panel).locator(f".bcos-{name} b").inner_text()) for name in names]


def wait_for(page, say, wanted, tolerance=6e-4):
    """Waits until the numbers on the page are those wanted, to three digits."""
    end = time.monotonic() + 45
    while True:
        told = say()
        if len(told) == len(wanted) and all(abs(a - b) <= tolerance for a, b in zip(told, wanted)):
            return
        assert time.monotonic() < end, f"the page says {told}, expected {wanted}"
        page.wait_for_timeout(50)


def picture(page, panel):
    """The pixels of a map."""
    return page.locator(f"{PANEL} .bcos-picture").nth(panel).evaluate("canvas => canvas.toDataURL()")


def readout(page):
    return float(page.locator(".bcos-threshold .widget-readout").inner_text())


def drag(page, locator, begin, end):
    """From one place to another, as shares of an element's size."""
    locator.evaluate("element => element.scrollIntoView({block: 'center'})")
    page.wait_for_timeout(100)
    box = locator.bounding_box()
    page.mouse.move(box["x"] + begin[0] * box["width"], box["y"] + begin[1] * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + end[0] * box["width"], box["y"] + end[1] * box["height"], steps=5)
    page.mouse.up()


# With both detectors ticked and three explainers, the maps with scores are: ordinary Grad-CAM and LayerCAM, B = 2 B-cos, Grad-CAM, LayerCAM.
MAPS = [(None, "gradcam"), (None, "layercam"), (2.0, "bcos"), (2.0, "gradcam"), (2.0, "layercam")]


def test_attributions(lab, expected, chromium):
    with open_notebook(chromium, lab, "attributions.ipynb") as page:
        handle = page.locator(".bcos-threshold .noUi-handle")
        handle.wait_for(timeout=120_000)  # the kernel imports
        page.locator(f"{PANEL} .bcos-score").first.wait_for()
        for panel, (b, explainer) in enumerate(MAPS):
            wait_for(page, lambda: numbers(page, panel), expected.scores(b, explainer, 0, 0.0))
        assert page.locator(".bcos-words").count() == 1 and "B-cos" in page.locator(".bcos-words").inner_text()

        # The slider by keyboard and by mouse: picture and scores follow, to what localization_scores gives.
        before = picture(page, 2)
        handle.focus()
        for _ in range(3):
            handle.press("ArrowRight")
        wait_for(page, lambda: [readout(page)], [0.03])
        for panel, (b, explainer) in enumerate(MAPS):
            wait_for(page, lambda: numbers(page, panel), expected.scores(b, explainer, 0, 0.03))
        pixels = page.locator(f"{PANEL} .bcos-picture").nth(2).evaluate("canvas => [...canvas.getContext('2d').getImageData(0, 0, 128, 128).data]")
        image = (expected.image(0)[0].permute(1, 2, 0) * 255).byte().numpy()
        heat = heat_overlay(image, expected.maps(2.0, "bcos", 0)[0].numpy(), 0.03).astype(int)
        assert np.abs(np.reshape(pixels, (128, 128, 4))[..., :3] - heat).max() <= 3  # a step of the colours, and of rounding
        drag(page, page.locator(".bcos-threshold .noUi-base"), (0.03, 0.5), (0.4, 0.5))
        threshold = readout(page)
        assert 0.3 < threshold < 0.5
        for panel, (b, explainer) in enumerate(MAPS):
            wait_for(page, lambda: numbers(page, panel), expected.scores(b, explainer, 0, threshold))
        assert picture(page, 2) != before

        # A rectangle: its share of what is left of the map, and what the detectors say without it.
        drag(page, page.locator(f"{PANEL} .bcos-stage").nth(2), (0.3, 0.35), (0.7, 0.8))
        page.locator("b.bcos-hidden").nth(1).wait_for()
        words = page.locator("th", has_text="pixels at").inner_text()
        width, height, left, top = map(int, re.search(r"(\d+) × (\d+) pixels at (\d+), (\d+)", words).groups())
        assert abs(width - 0.4 * 128) < 3 and abs(left - 0.3 * 128) < 3
        box = (left, top, left + width, top + height)
        hidden = hidden_image(expected.image(0), box, "blurred")
        wait_for(page, lambda: [float(text) for text in page.locator("b.bcos-hidden").all_inner_texts()], [expected.probability(b, hidden) for b in (None, 2.0)])
        region = torch.zeros(1, 128, 128, dtype=torch.bool)
        region[:, top:top + height, left:left + width] = True
        share = localization_scores(expected.maps(2.0, "bcos", 0), region, (threshold,))["weighted"].item()
        assert abs(float(re.search(r"box: ([\d.]+) %", page.locator(f"{PANEL} .bcos-box").nth(2).inner_text())[1]) / 100 - share) < 6e-3
        assert "attribution" in page.locator(f"{PANEL} .bcos-label").nth(2).inner_text()
        shoot(page, "attributions_light")

        # Settings are saved, everything is changed by keyboard and boxes, and they bring it back.
        page.get_by_role("button", name="settings").click()
        page.locator(".bcos-saved", has_text="json").wait_for()
        saved = next((lab.folder / "saved").glob("attributions-*.json"))
        assert json.loads(saved.read_text())["brush"] == list(box)
        canvas = page.locator(".bcos-canvas").nth(1)
        canvas.focus()
        canvas.press("ArrowRight"), canvas.press("ArrowUp"), canvas.press("Escape")
        for panel, (b, explainer) in enumerate(MAPS):
            wait_for(page, lambda: numbers(page, panel), expected.scores(b, explainer, 1, round(threshold + 0.01, 2)))
        assert page.locator("b.bcos-hidden").count() == 0
        page.get_by_label("ordinary", exact=True).uncheck()
        page.wait_for_function("() => document.querySelectorAll('.bcos-panel .bcos-score b').length === 6")
        wait_for(page, lambda: numbers(page, 0), expected.scores(2.0, "bcos", 1, round(threshold + 0.01, 2)))
        page.locator("select:has(option[value='contours'])").select_option("contours")
        with page.expect_file_chooser() as chosen:
            page.get_by_role("button", name="restore").click()
        chosen.value.set_files(saved)
        page.locator(".bcos-saved", has_text="Restored").wait_for()
        for panel, (b, explainer) in enumerate(MAPS):
            wait_for(page, lambda: numbers(page, panel), expected.scores(b, explainer, 0, threshold))
        page.locator("b.bcos-hidden").nth(1).wait_for()
        assert readout(page) == threshold and page.locator("select:has(option[value='contours'])").input_value() == "heat"
        page.get_by_role("button", name="PNG").click()
        page.locator(".bcos-saved", has_text="png").wait_for()
        assert next((lab.folder / "saved").glob("attributions-*.png")).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

        page.locator("select:has(option[value='contours'])").select_option("colour")
        theme(page, "JupyterLab Dark")
        shoot(page, "attributions_dark")
        theme(page, "JupyterLab Light")
        assert page.locator(".bcos-explorer").evaluate("element => element.scrollWidth <= element.clientWidth")  # fits


        # Every style is another picture; every way to hide the box gives what the detector says of the frame hidden that way.
        maps, menu = page.locator(f"{PANEL} .bcos-stage").nth(2), page.locator("select:has(option[value='contours'])")
        pictures = set()
        for style in ("heat", "colour", "signed", "contours", "outline only"):
            menu.select_option(style)
            page.wait_for_timeout(400)
            pictures.add(maps.evaluate("stage => [...stage.querySelectorAll('canvas')].map(one => one.toDataURL()).join()"))
        assert len(pictures) == 5
        source = expected.source(0)
        for how in ("grey", "source frame"):
            page.get_by_role("button", name=how, exact=True).click()
            hidden = hidden_image(expected.image(0), box, how, source)
            wait_for(page, lambda: [float(text) for text in page.locator("b.bcos-hidden").all_inner_texts()], [expected.probability(b, hidden) for b in (None, 2.0)])

        # What a screen reader finds, and the page and the table that are saved.
        for role, names in {"combobox": ("maps", "explain", "frames", "judged by", "verdict", "order"), "checkbox": ("mask outline", "B-cos", "ordinary"),
                            "slider": ("threshold", "opacity", "frame"), "button": ("previous frame", "next frame", "blurred", "PNG", "restore")}.items():
            for name in names:
                assert page.get_by_role(role, name=name, exact=role != "button").count() >= 1, (role, name)
        assert page.get_by_role("img", name="B-cos map of ResNet-10, B = 2, p(fake)").count() == 1 and nameless(page) == []
        for kind in ("HTML", "CSV"):
            page.get_by_role("button", name=kind).click()
            page.locator(".bcos-saved", has_text=kind.lower()).wait_for()
        saved = next((lab.folder / "saved").glob("attributions-*.html"))
        alone = chromium.new_page()
        alone.on("pageerror", lambda error: page.errors.append(str(error)))
        alone.goto(saved.as_uri())
        alone.locator("[data-trait=threshold]").focus()
        alone.keyboard.press("Home")
        for panel, (b, explainer) in enumerate(MAPS):
            wait_for(alone, lambda: numbers(alone, panel), expected.scores(b, explainer, 0, 0.0))
        alone.close()


def test_contours_are_where_the_map_has_their_value_and_cost_no_more_on_a_noisy_map(chromium, tmp_path):
    y, x = np.mgrid[:256, :256].astype(np.float32) + 0.5
    cone = np.clip(1 - np.hypot(x - 128, y - 128) / 120, 0, 1)  # threshold t is a circle of radius 120 (1 - t)
    noise = np.random.default_rng(0).random((256, 256)).astype(np.float32)
    taken = {}
    for name, values in (("cone", cone), ("noise", noise)):
        canvas = MapCanvas([[Panel(np.zeros((256, 256, 3), np.uint8), values)]], look="contours", threshold=0.4)
        html = canvas_page(canvas, name).replace('<script type="module">', '<script>window.requestAnimationFrame = (paint) => { paint(); return 0; };</script><script type="module">')
        (tmp_path / f"{name}.html").write_text(html)
        page = chromium.new_page(viewport={"width": 900, "height": 600})
        page.goto((tmp_path / f"{name}.html").as_uri())
        page.locator(".bcos-lines").wait_for()
        if name == "cone":
            white = page.evaluate("""() => { const lines = document.querySelector(".bcos-lines"), { data } = lines.getContext("2d").getImageData(0, 0, lines.width, lines.height);
                return [...Array(lines.width * lines.height).keys()].filter((i) => Math.min(data[4 * i], data[4 * i + 1], data[4 * i + 2]) > 240 && data[4 * i + 3] > 200); }""")
            radius = np.hypot(np.array(white) % 256 + 0.5 - 128, np.array(white) // 256 + 0.5 - 128)
            assert len(white) > 300 and np.abs(radius - 72).max() < 1.5
        times = page.evaluate("""() => { const control = document.querySelector("[data-trait=threshold]"), taken = [];
            for (let k = 0; k < 60; k++) {
              control.value = 0.3 + 0.005 * k;
              const begin = performance.now();
              control.dispatchEvent(new Event("input"));
              document.querySelector(".bcos-lines").getContext("2d").getImageData(0, 0, 1, 1);
              taken.push(performance.now() - begin);
            }
            return taken; }""")
        taken[name] = np.percentile(times, 25)  # of a machine that does other things too
        page.close()
    assert taken["noise"] < 6 * taken["cone"] + 2, taken


def test_thresholds(lab, expected, chromium):
    with open_notebook(chromium, lab, "thresholds.ipynb") as page:
        handle = page.locator(".bcos-threshold .noUi-handle")
        handle.wait_for(timeout=120_000)
        page.locator(f"{PANEL} .bcos-score").first.wait_for()
        explainers = ["bcos", "gradcam", "layercam", "gradcam++"]  # of the detector with B = 2
        for panel, explainer in enumerate(explainers):
            wait_for(page, lambda: numbers(page, panel), expected.scores(2.0, explainer, 0, 0.5))
        maps = torch.cat([expected.maps(2.0, "bcos", k) for k in range(len(expected.frames))])
        specific = specificity(maps, expected.inside, (0.5,), groups=expected.frames.videos)[0, 0].item()
        wait_for(page, lambda: numbers(page, 0, ["specificity"]), [specific])

        # The line on the curves is where the threshold is, after a key and after the mouse.
        marks = page.locator(".bcos-mark")
        page.locator(".bcos-explorer .js-plotly-plot").first.scroll_into_view_if_needed()
        marks.nth(3).wait_for(state="attached")
        assert marks.count() == 4 and marks.first.get_attribute("data-threshold") == "0.50"
        where = lambda: marks.first.evaluate("""line => { const plot = line.parentElement.querySelector(".nsewdrag").getBoundingClientRect();
            return (line.getBoundingClientRect().left - plot.left) / plot.width }""")
        assert abs(where() - 0.5) < 0.02
        before = picture(page, 0)
        handle.focus()
        handle.press("ArrowLeft"), handle.press("ArrowLeft")
        for panel, explainer in enumerate(explainers):
            wait_for(page, lambda: numbers(page, panel), expected.scores(2.0, explainer, 0, 0.48))
        assert abs(where() - 0.48) < 0.02 and picture(page, 0) != before
        drag(page, page.locator(".bcos-threshold .noUi-base"), (0.48, 0.5), (0.2, 0.5))
        threshold = readout(page)
        for panel, explainer in enumerate(explainers):
            wait_for(page, lambda: numbers(page, panel), expected.scores(2.0, explainer, 0, threshold))
        assert abs(where() - threshold) < 0.02
        shoot(page, "thresholds_light")

        # It plays by itself, and stops.
        play = page.locator("button[title='move the threshold by itself']")
        play.click()
        page.wait_for_function("start => document.querySelector('.bcos-mark').dataset.threshold != start", arg=f"{threshold:.2f}")
        play.click()
        stopped = readout(page)

        assert page.get_by_role("button", name="move the threshold by itself").count() == 1 and page.locator("[data-title*='Share']").count() == 0  # nothing is offered to others' servers

        # The mean of all fakes, with intervals, at the threshold.
        page.get_by_role("button", name="mean of the chosen frames").click()
        page.locator(".bcos-means").wait_for()
        page.wait_for_timeout(200)
        stopped = readout(page)
        count = len(expected.frames)
        assert f"mean of {count} frames" in page.locator(".bcos-means").inner_text()
        mean = localization_scores(maps, expected.inside, (stopped,))["weighted"].mean().item()
        wait_for(page, lambda: [float(page.locator(".bcos-means b").first.inner_text())], [mean])
        # The picture that is saved has the curves too, and the table of means.
        assert nameless(page) == []
        page.locator(".bcos-save").get_by_role("button", name="PNG").click()
        page.locator(".bcos-saved", has_text="png").wait_for()
        saved = np.asarray(Image.open(next((lab.folder / "saved").glob("thresholds-*.png"))).convert("RGB")).astype(int)
        curve = [int(on_any_ground(curve_colour("bcos", 2.0))[k:k + 2], 16) for k in (1, 3, 5)]
        canvas, plots, table = (page.locator(place).first.bounding_box()["height"] for place in (".bcos-canvas:not(.bcos-plain) .bcos-table", ".js-plotly-plot", ".bcos-means"))
        assert abs(saved.shape[0] / 2 - (canvas + plots + table)) < 80
        assert (np.abs(saved[int(2 * canvas):int(2 * (canvas + plots))] - curve).max(2) < 12).sum() > 300
        theme(page, "JupyterLab Dark")
        shoot(page, "thresholds_dark")
        theme(page, "JupyterLab Light")
        assert page.locator(".bcos-explorer").evaluate("element => element.scrollWidth <= element.clientWidth")
