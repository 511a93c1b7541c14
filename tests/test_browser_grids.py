"""Grids and own images in a real browser: a grid is dealt, its winner changes, a face is put in; files are taken and refused."""
import json
import re
import time

import numpy as np
import pandas as pd
import pytest
import torch
from browser import fill_demo, lab, nameless, open_notebook, shoot, theme  # noqa: F401
from PIL import Image
from skimage import data

from bcos_nb.data import load_frames, read_catalog
from bcos_nb.explainers import explain
from bcos_nb.games import build_grids, localization_scores, play_grid_game
from bcos_nb.models import load_detector
from bcos_nb.widgets.own_images import make_own

pytestmark = pytest.mark.browser
PLAYED = {"arch": "resnet10", "b": 2.0, "data": "data", "dataset": "FaceForensics++", "compression": "c23", "image_size": 128, "frames_per_video": 4, "explainers": ["bcos", "gradcam"],
          "options": {}, "n": 2, "grids": 4, "fakes": 1, "cell_size": None, "common": [], "windows": "auto", "min_confidence": 0.0, "seed": 3}


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A visitor's folder with a finished grid game, made by the functions that its notebook calls."""
    root = fill_demo(tmp_path_factory.mktemp("grids"), frames_per_video=4)
    runs = root / "runs" / "demo"
    run = runs / "grid_game" / "resnet10-b2"
    run.mkdir(parents=True)
    detector = load_detector(runs / "train" / "resnet10-bcos" / "detector.safetensors").eval()
    frames = load_frames(read_catalog(root / "data", "FaceForensics++", "test", "c23", frames_per_video=4), 128, with_mask=False)
    grids = build_grids(detector, frames, n=2, count=4, seed=3, min_confidence=0.0)
    scores = play_grid_game(detector, frames, PLAYED["explainers"], thresholds=(0.0, 0.5), grids=grids)
    scores.attrs.clear()
    scores.to_parquet(run / "scores.parquet")
    (run / "params.json").write_text(json.dumps(PLAYED | {"detector": "../../train/resnet10-bcos"})), (run / "metrics.json").write_text("{}")
    return root


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What somebody may have on a disk."""
    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(data.astronaut()).save(folder / "astronaut.jpg", quality=95)
    (folder / "letter.png").write_bytes(b"Dear reader, this is a letter and no picture.")
    with open(folder / "large.jpg", "wb") as file:
        file.write((folder / "astronaut.jpg").read_bytes())
        file.truncate(30_000_000)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (2400, 2000, 3), dtype=np.uint8)).save(folder / "twelve.png", compress_level=0)  # 14 MB, more than a message may have
    return folder


def winners(page):
    return page.locator(".bcos-winner").all_inner_texts()


def wait_for_other(page, before):
    page.wait_for_function("before => JSON.stringify([...document.querySelectorAll('.bcos-winner')].map(one => one.innerText)) != before && document.querySelector('.bcos-winner')",
                           arg=json.dumps(before, ensure_ascii=False).replace('", "', '","'))


def test_grids(lab, demo, chromium):  # noqa: F811
    with open_notebook(chromium, lab, "grids.ipynb", height=1150) as page:
        page.locator(".bcos-bars .bcos-chart").first.wait_for(timeout=180_000)
        first = winners(page)
        assert len(first) == page.locator(".bcos-grids .bcos-panel canvas.bcos-picture").count() - 1 and all("fake's share" in one for one in first)

        menus = page.locator(".bcos-grids select")
        menus.nth(1).select_option("ResNet-10, B = 2")
        page.wait_for_function("() => document.querySelectorAll('.bcos-chart').length == 5 && document.querySelector('.bcos-title + *') && document.body.innerText.includes('B-cos')")
        before = winners(page)
        page.get_by_role("button", name="Deal another grid").click()
        wait_for_other(page, before)

        # Until a winner changes, with other faces and then with the threshold; the fake's share is what the game scores.
        found = [text.split(" row")[0] for text in winners(page)]
        for _ in range(6):
            before = winners(page)
            page.get_by_role("button", name="Deal another grid").click()
            wait_for_other(page, before)
            if [text.split("fake's")[0] for text in winners(page)] != [text.split("fake's")[0] for text in before]:
                break
        else:
            pytest.fail(f"in six grids the winners stayed {found}")
        shoot(page, "grids", ".bcos-grids")

        saved = page.locator(".bcos-save")
        saved.get_by_role("button", name="CSV").click()
        saved.get_by_text(re.compile(r"Saved .*\.csv")).wait_for()
        table = pd.read_csv(max((demo / "saved").glob("grids-*.csv")))
        fake = table[table.label == 1].set_index("explainer").weighted
        shown = [float(text.split("fake's share")[1]) for text in winners(page)]
        assert np.allclose(shown, fake.to_numpy(), atol=6e-5)
        assert np.allclose(shown, game_scores(demo, table, list(fake.index)), atol=2e-4)

        # The picture and the page have the bars too; in the page they follow the threshold as they do here.
        for kind in ("PNG", "HTML"):
            saved.get_by_role("button", name=kind).click()
            saved.get_by_text(re.compile(rf"Saved .*\.{kind.lower()}")).wait_for()
        picture = np.asarray(Image.open(max((demo / "saved").glob("grids-*.png"))).convert("RGB")).astype(int)
        assert (np.abs(picture[picture.shape[0] // 2:] - [0xd4, 0x57, 0x2f]).max(2) < 4).sum() > 100
        alone = chromium.new_page()
        alone.goto(max((demo / "saved").glob("grids-*.html")).as_uri())
        assert winners(alone) == winners(page)
        alone.locator("[data-trait=threshold]").focus()
        for _ in range(30):
            alone.keyboard.press("ArrowRight")
        alone.wait_for_function("() => document.querySelector('output').innerText == '0.30'")
        moved = winners(alone)
        alone.close()

        handle = page.locator(".bcos-grids .bcos-threshold .noUi-handle")
        handle.focus()
        before = winners(page)
        for _ in range(30):
            handle.press("ArrowRight")
        page.wait_for_function("() => document.querySelector('.bcos-threshold .widget-readout').innerText == '0.30'")
        wait_for_other(page, before)
        assert winners(page) == moved and nameless(page, ".bcos-grids") == []

        # Another face for the first cell.
        before = page.locator(".bcos-thumbs.bcos-close img").first.get_attribute("src")
        page.locator(".bcos-thumbs.bcos-close button").first.click()
        page.locator(".bcos-thumbs:not(.bcos-close) button").nth(5).click()
        page.wait_for_function("before => { const image = document.querySelector('.bcos-thumbs.bcos-close img'); return image && image.src != before; }", arg=before)
        page.locator(".bcos-thumbs.bcos-close button.bcos-chosen").wait_for()

        # The grids of the run, from the worst on.
        menus.first.select_option(index=1)
        page.get_by_text(re.compile("grid 1 of 4, from worst to best")).wait_for()
        scores = pd.read_parquet(demo / "runs" / "demo" / "grid_game" / "resnet10-b2" / "scores.parquet")
        ranked = sorted(scores[(scores.explainer == "bcos") & (scores.weighting == "weighted") & (scores.threshold == 0)].score)
        assert f"{ranked[0]:.4f}" in page.locator(".bcos-grids .bcos-verdict").inner_text()
        page.locator("button[title='a better grid']").click()
        page.get_by_text(re.compile("grid 2 of 4")).wait_for()
        assert f"{ranked[1]:.4f}" in page.locator(".bcos-grids .bcos-verdict").inner_text()
        assert page.locator(".bcos-grids [role=alert]").count() == 0

        # LIME is offered for the run's grid, says that it is at work, and can be given up.
        lime, maps = page.get_by_label("LIME too"), page.locator(".bcos-grids .bcos-canvas .bcos-panel")
        count = maps.count()
        lime.check()
        page.get_by_text("LIME is at work").wait_for()
        page.get_by_role("button", name="cancel").click()
        page.wait_for_function("count => document.querySelectorAll('.bcos-grids .bcos-canvas .bcos-panel').length == count", arg=count)
        assert not lime.is_checked()
        theme(page, "JupyterLab Dark")
        shoot(page, "grids_dark", ".bcos-grids")


def game_scores(demo, table, names):
    """What localization_scores gives the fake of a saved table, its grid put together from the frames by hand."""
    detector = load_detector(demo / "runs" / "demo" / "train" / "resnet10-bcos" / "detector.safetensors").eval()
    catalog = read_catalog(demo / "data", "FaceForensics++", "test", "c23", frames_per_video=4)
    cells = table[table.explainer == table.explainer.iloc[0]].sort_values(["row", "column"])
    frames = load_frames(catalog, 128, with_mask=False)
    place = {name: row for row, name in enumerate(catalog.frame)}
    n = int(cells.row.max())
    rows = [torch.cat([frames.images[place[name]] for name in cells[cells.row == r].frame], 2) for r in range(1, n + 1)]
    grid, region = torch.cat(rows, 1)[None].float() / 255, torch.zeros(1, 128 * n, 128 * n, dtype=torch.bool)
    fake = cells[cells.label == 1].iloc[0]
    region[:, 128 * (fake.row - 1):128 * fake.row, 128 * (fake.column - 1):128 * fake.column] = True
    return [float(localization_scores(explain(detector, grid, name).maps, region, (float(table.threshold.iloc[0]),))["weighted"]) for name in names]


def test_images_of_ones_own_in_attributions(lab, demo, files, chromium):  # noqa: F811
    with open_notebook(chromium, lab, "attributions.ipynb") as page:
        map_of = ".bcos-canvas:not(.bcos-plain) .bcos-panel:has(.bcos-kept)"
        page.locator(f"{map_of} .bcos-score").first.wait_for(timeout=180_000)
        assert page.locator(".bcos-drop").count() == 0
        page.get_by_role("button", name="images of your own").click()
        page.get_by_text("The maps of your image will be here.").wait_for()
        chosen = page.locator(".bcos-drop input[type=file]")
        chosen.set_input_files(str(files / "letter.png"))
        page.get_by_text("letter.png is not an image, whatever its name says").wait_for()
        chosen.set_input_files(str(files / "large.jpg"))
        page.get_by_text("large.jpg has 30.0 MB, more than 25.").wait_for()
        chosen.set_input_files(str(files / "astronaut.jpg"))
        page.get_by_text("face found by dlib").wait_for()
        page.locator(map_of).first.wait_for()
        image = torch.from_numpy(make_own((files / "astronaut.jpg").read_bytes(), "astronaut.jpg", 128).face).permute(2, 0, 1)[None].float() / 255
        for name, words in zip(("ordinary", "bcos"), page.locator(".bcos-canvas:not(.bcos-plain) .bcos-row").all_inner_texts()):
            detector = load_detector(demo / "runs" / "demo" / "train" / f"resnet10-{name}" / "detector.safetensors").eval()
            with torch.no_grad():
                probability = float(detector(image).softmax(1)[0, 1])
            assert abs(float(re.search(r"p\(fake\) ([\d.]+)", words)[1]) - probability) < 2e-3, words
        shoot(page, "attributions_own")
        page.get_by_role("button", name="faces of the datasets").click()
        page.locator(f"{map_of} .bcos-weighted").first.wait_for()  # a fake with its mask again
        assert page.locator(".bcos-drop").count() == 0


def test_own_images(lab, demo, files, chromium):  # noqa: F811
    with open_notebook(chromium, lab, "own_images.ipynb") as page:
        page.get_by_role("button", name="Choose images").wait_for(timeout=180_000)
        chosen = page.locator(".bcos-drop input[type=file]")
        chosen.set_input_files(str(files / "letter.png"))
        page.get_by_text("letter.png is not an image, whatever its name says: its content is a text that begins with “Dear reader").wait_for()
        chosen.set_input_files(str(files / "large.jpg"))
        page.get_by_text("large.jpg has 30.0 MB, more than 25.").wait_for()
        chosen.set_input_files(str(files / "astronaut.jpg"))
        page.get_by_text("face found by dlib").wait_for()
        map_of = ".bcos-canvas:not(.bcos-plain) .bcos-panel:has(.bcos-kept)"
        page.locator(map_of).nth(4).wait_for()
        expected = make_own((files / "astronaut.jpg").read_bytes(), "astronaut.jpg", 128)
        image, said = torch.from_numpy(expected.face).permute(2, 0, 1)[None].float() / 255, {}
        for name in ("ordinary", "bcos"):
            detector = load_detector(demo / "runs" / "demo" / "train" / f"resnet10-{name}" / "detector.safetensors").eval()
            with torch.no_grad():
                said[name] = float(detector(image).softmax(1)[0, 1])
        rows = page.locator(".bcos-canvas:not(.bcos-plain) .bcos-row")
        for name, words in zip(said, rows.all_inner_texts()):
            assert abs(float(re.search(r"p\(fake\) ([\d.]+)", words)[1]) - said[name]) < 2e-3 and not re.search("right|wrong", words), words
        shoot(page, "own_images")
        assert nameless(page) == []

        # Saying what it is makes the verdict right or wrong; then the table, and the settings, which bring it back.
        page.get_by_label("it is").select_option("real")
        for name, row in zip(said, (0, 1)):
            rows.nth(row).get_by_text(f": {'fake, wrong' if said[name] > 0.5 else 'real, right'}").wait_for()
        for kind, ending in (("CSV", "csv"), ("settings", "json"), ("PNG", "png")):
            page.locator(".bcos-save").get_by_role("button", name=kind).click()
            page.get_by_text(re.compile(rf"Saved .*own_images-.*\.{ending}")).wait_for()
        table = pd.read_csv(next((demo / "saved").glob("own_images-*.csv")))
        assert np.allclose(table.groupby("detector", sort=False).probability.first(), list(said.values()), atol=1e-4) and set(table.label) == {0}
        assert Image.open(next((demo / "saved").glob("own_images-*.png"))).size[0] > 1000
        page.get_by_label("it is").select_option("fake")
        rows.nth(0).get_by_text(f": {'fake, right' if said['ordinary'] > 0.5 else 'real, wrong'}").wait_for()
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="restore").click()
        chooser.value.set_files(next((demo / "saved").glob("own_images-*.json")))
        rows.nth(0).get_by_text(f": {'fake, wrong' if said['ordinary'] > 0.5 else 'real, right'}").wait_for()

        # 14 MB of noise, more than one message may have: it arrives in pieces, has no face, and is taken whole.
        chosen.set_input_files(str(files / "twelve.png"))
        page.get_by_text("In twelve.png no face was found").wait_for(timeout=120_000)
        page.get_by_role("button", name="use the whole image").last.click()
        page.locator(".bcos-plain .bcos-note", has_text="twelve.png").wait_for()
        page.locator("button[title='put this message away']").first.click()
        page.wait_for_function("() => document.querySelectorAll('.bcos-refused').length == 2")
        page.get_by_placeholder("or the path of a folder").fill(str(files))
        page.get_by_placeholder("or the path of a folder").press("Tab")
        page.get_by_role("button", name="Read folder").click()
        page.get_by_text("astronaut.jpg (2)").first.wait_for(timeout=120_000)
        begin = time.monotonic()
        while page.get_by_text("large.jpg has 30.0 MB").count() < 2 and time.monotonic() - begin < 60:
            page.wait_for_timeout(200)
        assert page.get_by_text("large.jpg has 30.0 MB").count() == 2
