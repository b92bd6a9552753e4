"""The pictures in the README, the help pages and the example workflows, taken in Chromium.

    make gallery     takes them again, into docs/gallery, web/docs and example_workflows

Otherwise they go into a temporary folder, and the tests check what they show.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import demo_pictures
import minilm
import pytest
import thumbnails
from browser import ComfyPage
from PIL import Image
from workflows import EXAMPLES, to_graph

from mxfp8.quant.conversion.calibration import calibrate

pytestmark = pytest.mark.comfy

ROOT = Path(__file__).resolve().parents[2]
MODEL = CALIBRATION = "all-MiniLM-L6-v2.safetensors"
HELD_OUT = "all-MiniLM-L6-v2-held-out.safetensors"
TEXTS = 32  # paragraphs to calibrate on, and as many others to measure on
# The model folder of each loader.
FOLDERS = {
    "UNETLoader": "diffusion_models",
    "MXFP8Load": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "MXFP8LoadTextEncoder": "text_encoders",
    "VAELoader": "vae",
}
TALL = {"width": 1400, "height": 1500}  # px, so that every node fits on the page


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """The folder they go to: this checkout with MXFP8_KEEP_PICTURES, else a temporary one."""
    if os.environ.get("MXFP8_KEEP_PICTURES"):
        return ROOT
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def shown(comfy, browser):
    page = ComfyPage(browser, comfy, nodes2=True)
    page.page.set_viewport_size(TALL)
    yield page
    assert not page.complaints
    page.close()


def take(shown, node: int, path: Path) -> None:
    """Take a picture of one node and check that it is not blank: it has more than a few colors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown.page.evaluate(
        """(id) => {
            const node = app.graph.getNodeById(id);
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [200 - node.pos[0], 80 - node.pos[1]];
            app.canvas.setDirty(true, true);
        }""",
        node,
    )
    shown.settle()
    shown.page.locator(f"[data-node-id='{node}']").screenshot(path=path)
    with Image.open(path) as image:
        assert image.width >= 200 and image.height >= 80
        assert len(image.convert("RGB").resize((64, 64)).getcolors(64 * 64)) > 8, path.name


def take_thumbnails(browser, folder: Path, numbers: str, **measured) -> None:
    """Take the thumbnails of the example workflows of these numbers.

    Args:
        measured: what they show, as `thumbnails.page` takes it.
    """
    folder.mkdir(exist_ok=True)
    page = browser.new_page(viewport={"width": thumbnails.SIZE, "height": thumbnails.SIZE})
    for number in numbers:
        (path,) = EXAMPLES.glob(f"MXFP8 {number} - *.json")
        page.set_content(thumbnails.page(path.stem, **measured))
        png = page.screenshot()
        with Image.open(io.BytesIO(png)) as image:
            assert image.size == (thumbnails.SIZE, thumbnails.SIZE)
            image.convert("RGB").save(folder / f"{path.stem}.jpg", quality=90)
    page.close()


@pytest.fixture(scope="module")
def trained(comfy) -> None:
    """Trained weights, MiniLM's, in a model folder, and two calibrations of them on two texts."""
    folder = comfy.base / "models" / "text_encoders"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(minilm.WEIGHTS, folder / MODEL)
    folder = comfy.base / "output" / "calibrations"
    folder.mkdir(parents=True, exist_ok=True)
    texts = minilm.paragraphs()
    for name, part in ((CALIBRATION, texts[:TEXTS]), (HELD_OUT, texts[TEXTS : 2 * TEXTS])):
        calibration = calibrate(
            minilm.trained().eval(),
            minilm.batches(part, size=1),
            select=lambda name, _: name.startswith("encoder"),
        )
        calibration.save(folder / name, overwrite=True)


def test_a_report_on_trained_weights(comfy, browser, pictures, trained):
    shown = ComfyPage(browser, comfy, nodes2=True)  # a new page lists the new files
    shown.page.set_viewport_size(TALL)
    shown.clear()
    convert = shown.add(
        "MXFP8ConvertFile", (420, 120), source=f"text_encoders/{MODEL}", overwrite=True
    )
    for y, name, to in ((120, CALIBRATION, "calibration"), (300, HELD_OUT, "held_out")):
        load = shown.add("MXFP8LoadCalibration", (60, y), calibration_name=name)
        shown.link(load, convert, to)
    shown.queue()
    view = shown.page.locator(".mxfp8-report")
    view.get_by_role("button", name="show layers").click()
    view.locator(".bar").first.wait_for()
    view.locator("[role=listbox]").focus()
    for _ in range(12):
        shown.page.keyboard.press("ArrowRight")
    take(shown, convert, pictures / "docs" / "gallery" / "report.png")
    report = json.loads(shown.page.evaluate(f"app.nodeOutputs[{convert}].mxfp8_report[0]"))
    measured = [layer for layer in report["layers"] if layer["output_error"] is not None]
    assert len(measured) == 36
    assert all(layer["output_error"] < layer["nearest_error"] for layer in measured)
    assert "on held-out data" in view.locator(".summary").first.inner_text()  # loaders follow
    errors = [(layer["nearest_error"], layer["output_error"]) for layer in measured]
    take_thumbnails(browser, pictures / "example_workflows", "12345", errors=errors)
    assert not shown.complaints
    shown.close()


def test_a_backend_report(shown, pictures):
    shown.clear()
    load = shown.add("MXFP8Load", (60, 120), model_name="flux-mxfp8.safetensors")
    node = shown.add("MXFP8BackendReport", (420, 120), measure=True, rows=256)
    shown.link(load, node, "model")
    shown.queue()
    shown.page.get_by_role("button", name="show layers").click()
    shown.page.locator(".mxfp8-report .bar").first.wait_for()
    take(shown, node, pictures / "docs" / "gallery" / "backend-report.png")


def test_a_comparison(comfy, browser, pictures):
    """Of the small trained image model, whose pictures have 32 x 32 pixels."""
    shutil.copy(demo_pictures.MODEL, comfy.base / "models" / "diffusion_models")
    shown = ComfyPage(browser, comfy, nodes2=True)  # a new page lists the new file
    shown.page.set_viewport_size(TALL)
    shown.clear()
    load = shown.add("UNETLoader", (60, 120), unet_name=demo_pictures.MODEL.name)
    quantize = shown.add("MXFP8Quantize", (60, 300))
    clip = shown.add("TestEmojiTextEncoder", (60, 500))
    prompt = shown.add("CLIPTextEncode", (60, 560), text="fox face")
    latent = shown.add("EmptySD3LatentImage", (60, 700), width=128, height=128)
    vae = shown.add("TestEmojiVAE", (60, 860))
    node = shown.add("MXFP8CompareModels", (520, 120), steps=20)
    for source, to, name in (
        (load, quantize, "model"), (clip, prompt, "clip"), (load, node, "reference"),
        (quantize, node, "model"), (prompt, node, "positive"), (prompt, node, "negative"),
        (latent, node, "latent_image"), (vae, node, "vae"),
    ):  # fmt: skip
        shown.link(source, to, name)
    shown.queue()
    images = shown.page.locator(".mxfp8-report .pairs img")
    images.first.wait_for()
    assert images.count() == 2 * 4  # seeds
    images.evaluate_all("(all) => Promise.all(all.map((image) => image.decode()))")
    assert images.evaluate_all("(all) => all.every((image) => image.naturalWidth === 32)")
    take(shown, node, pictures / "docs" / "gallery" / "compare.png")
    assert not shown.complaints
    shown.close()


def test_a_size_is_chosen(comfy, browser, pictures):
    """Of the same model, by sensitivities that are measured on four prompts."""
    shutil.copy(demo_pictures.MODEL, comfy.base / "models" / "diffusion_models")
    shown = ComfyPage(browser, comfy, nodes2=True)
    shown.page.set_viewport_size(TALL)
    shown.clear()
    load = shown.add("UNETLoader", (60, 120), unet_name=demo_pictures.MODEL.name)
    clip = shown.add("TestEmojiTextEncoder", (60, 300))
    texts = demo_pictures.CALIBRATION[::4]
    prompt = shown.add("CLIPTextEncode", (60, 360), text="\n".join(texts))
    latent = shown.add(
        "EmptySD3LatentImage", (60, 500), width=128, height=128, batch_size=len(texts)
    )
    calibrate = shown.add("MXFP8Calibrate", (60, 660), seeds=1, steps=6, sensitivity=True)
    node = shown.add("MXFP8Quantize", (520, 120), size_or_quality="65%")
    end = shown.add("PreviewAny", (1000, 120))
    for source, to, name in (
        (load, calibrate, "model"), (clip, prompt, "clip"), (prompt, calibrate, "positive"),
        (prompt, calibrate, "negative"), (latent, calibrate, "latent_image"),
        (load, node, "model"), (calibrate, node, "calibration"),
    ):  # fmt: skip
        shown.link(source, to, name)
    shown.link(node, end, "source", slot=1)
    shown.queue()
    view = shown.page.locator(f"[data-node-id='{node}'] .mxfp8-report")
    view.get_by_role("button", name="show layers").click()
    view.locator(".point").first.wait_for()
    take(shown, node, pictures / "docs" / "gallery" / "budget.png")
    budget = json.loads(shown.page.evaluate(f"app.nodeOutputs[{node}].mxfp8_budget[0]"))
    curve = [(p["bytes"] / budget["bytes_before"], p["snr_db"]) for p in budget["curve"][:-1]]
    assert curve == sorted(curve) and len(curve) > 15
    take_thumbnails(browser, pictures / "example_workflows", "6", curve=curve)
    assert not shown.complaints
    shown.close()


@pytest.fixture(scope="module")
def examples(comfy, browser):
    """A page of a ComfyUI with empty files under the names in the examples (20 GB in reality)."""
    made = []
    for path in EXAMPLES.glob("*.json"):
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            for name in node.get("widgets_values", ()):
                if str(name).endswith(".safetensors"):
                    file = comfy.base / "models" / FOLDERS[node["type"]] / name
                    if not file.exists():
                        file.parent.mkdir(exist_ok=True)
                        file.touch()
                        made.append(file)
    page = ComfyPage(browser, comfy, nodes2=True)
    yield page
    assert not page.complaints
    page.close()
    for file in made:
        file.unlink()


def test_every_node_alone(comfy, examples, pictures):
    names = [
        name
        for name, info in comfy.get("/object_info").items()
        if info["python_module"] == "custom_nodes.ComfyUI-MXFP8"
    ]
    assert len(names) >= 15
    for name in names:
        examples.clear()
        take(examples, examples.add(name), pictures / "web" / "docs" / f"{name}.png")


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.json")))
def test_an_example_opens_whole(comfy, examples, name):
    workflow = json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
    examples.clear()
    sent, failed = examples.page.evaluate(
        """async (workflow) => {
            await app.loadGraphData(workflow);
            const sent = (await app.graphToPrompt()).output;
            return [sent, app.graph._nodes.filter((n) => n.has_errors).map((n) => n.type)];
        }""",
        workflow,
    )
    assert not failed
    graph = to_graph(workflow, comfy.get("/object_info"))  # what the other tests run
    assert {k: n["inputs"] for k, n in sent.items()} == {k: n["inputs"] for k, n in graph.items()}
