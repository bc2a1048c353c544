"""The page as a person uses it, in Debian's Chromium: from an empty page to a picture that is found by its tag."""

import base64
import io
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import QUICK, ROOT, Served

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium")
AXE = "axe-core@4.14.1"
PHONE, DESK = {"width": 400, "height": 800}, {"width": 1280, "height": 900}
SCREENSHOTS = os.environ.get("SCREENSHOTS")
"""A folder: what the browser shows is kept there, to be looked at."""

if CHROMIUM is None:
    pytest.skip("chromium is not here: apt-get install chromium", allow_module_level=True)

from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402

CHANGED = """
async ([before]) => {
  const read = async (address) => {
    const picture = await createImageBitmap(await (await fetch(address)).blob());
    const canvas = Object.assign(document.createElement("canvas"), {width: 96, height: 96});
    const context = canvas.getContext("2d");
    context.drawImage(picture, 0, 0, 96, 96);
    return context.getImageData(0, 0, 96, 96);
  };
  const address = document.querySelector("#drawings img").src;
  const image = Object.assign(new Image(), {src: before});
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), {width: 96, height: 96});
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0, 96, 96);
  const one = context.getImageData(0, 0, 96, 96), two = await read(address);
  let painted = 0, elsewhere = 0;
  for (let y = 0; y < 96; y++) for (let x = 0; x < 96; x++) for (let c = 0; c < 3; c++) {
    const apart = Math.abs(one.data[4 * (96 * y + x) + c] - two.data[4 * (96 * y + x) + c]);
    if (y > 60) elsewhere = Math.max(elsewhere, apart);
    else if (y > 15 && y < 23 && x > 12 && x < 36) painted = Math.max(painted, apart);
  }
  return {painted, elsewhere};
}
"""
"""The largest differences, in levels of 255, where the mask was painted and far from there."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's script."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not here")
    folder = tmp_path_factory.mktemp("axe")
    subprocess.run(["npm", "install", "--silent", "--no-fund", "--prefix", str(folder), AXE], check=True)
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport=DESK, bypass_csp=False)
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: said.append(str(error)))
    yield opened
    context.close()
    said = [line for line in said if "status of 422" not in line]
    assert not said, said


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Pictures of a person's own, without captions."""
    folder = tmp_path_factory.mktemp("pictures")
    with zipfile.ZipFile(ROOT / "examples" / "subject.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))[:12]
        return [Path(archive.extract(name, folder)) for name in names]


def sign_in(page: Page, url: str, token: str) -> None:
    page.goto(url)
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Train a LoRA")).to_be_visible()


def look(page: Page, axe: str, called: str) -> None:
    """No serious fault by axe, and nothing wider than the screen, on a phone and on a desktop."""
    for size in (PHONE, DESK):
        page.set_viewport_size(size)  # type: ignore[arg-type]
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{called}: {wide} pixels wider than {size['width']}"
        page.evaluate(axe)  # by the debugger's way, which the page's policy does not concern
        found = page.evaluate("axe.run(document)")
        bad = [
            f"{fault['id']}: {fault['help']}: {[node['html'][:160] for node in fault['nodes'][:3]]}"
            for fault in found["violations"]
            if fault["impact"] in ("serious", "critical")
        ]
        assert not bad, (called, size, bad)
        if SCREENSHOTS:
            page.screenshot(path=f"{SCREENSHOTS}/{called}-{size['width']}.png", full_page=True)


def train(page: Page, axe: str, pictures: list[Path], name: str) -> None:
    """Drops the pictures, writes captions, starts, and watches to the end."""
    page.get_by_label("Drop pictures or a zip here").set_input_files(pictures)
    expect(page.get_by_text("12 pictures", exact=True)).to_be_visible()
    expect(page.get_by_text("0 with a caption")).to_be_visible()
    boxes = page.locator("textarea[name^='caption:']")
    expect(boxes).to_have_count(12)
    for number in range(12):
        boxes.nth(number).fill(f"a [trigger] on background number {number}")
    look(page, axe, "train-pictures")
    page.get_by_label("Name of the new LoRA").fill(name)
    page.get_by_label("Trigger word", exact=True).fill("TOK")
    page.get_by_label("Training steps").fill("12")
    page.get_by_label("Tags").fill("spring")
    page.get_by_text("For experts").click()
    page.get_by_label("Resolution").fill("64")
    page.get_by_role("button", name="Start the training").click()
    expect(page.get_by_role("heading", name=f"you/{name}")).to_be_visible()
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    look(page, axe, "run-now")
    expect(page.get_by_role("heading", name="Verdict")).to_be_visible(timeout=170_000)


def draw(page: Page, prompt: str, before: int) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator("#drawings img")).to_have_count(before, timeout=170_000)


def test_a_person_trains_draws_and_finds_the_pictures(
    page: Page, axe: str, served: Served, trained: object, twelve: list[Path]
) -> None:
    """`trained` is another LoRA that is there already."""
    page.goto(served.url)
    look(page, axe, "sign-in")
    sign_in(page, served.url, served.token)
    look(page, axe, "train-empty")
    train(page, axe, twelve, "mine")
    for finding in ("Learned", "Not memorised"):
        expect(page.get_by_text(finding, exact=True)).to_be_visible()
    preview = page.get_by_alt_text("Each preview prompt")
    expect(preview).to_be_visible()
    assert preview.evaluate("image => image.naturalWidth") > 0
    look(page, axe, "run-verdict")
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Report").click()
    opened.value.wait_for_load_state()
    assert "TOK" in opened.value.inner_text("body")
    opened.value.close()
    with page.expect_download() as tar:
        page.get_by_role("link", name="Download").click()
    assert tar.value.suggested_filename.endswith(".tar")

    page.get_by_role("link", name="Draw with it").click()
    expect(page.get_by_label("LoRA", exact=True)).to_have_value("you/mine")
    page.get_by_label("Second LoRA", exact=True).fill("you/trained")
    page.get_by_label("Tags").fill("spring, posters")
    page.get_by_label("Num inference steps").fill("2")
    page.get_by_label("Num outputs").fill("2")
    draw(page, "a TOK on a green background", 2)
    look(page, axe, "draw")
    assert page.locator("#drawings img").first.evaluate("image => image.naturalWidth") > 0

    page.get_by_label("Num outputs").fill("1")
    page.get_by_label("Beside it, the same seed").check()
    draw(page, "a TOK beside itself", 4)
    words = page.locator("#drawings .made").all_inner_texts()[:2]
    seeds = {text.partition("seed ")[2].split(";")[0] for text in words}
    assert len(seeds) == 1, words
    look(page, axe, "draw-beside")

    page.get_by_role("link", name="Gallery").click()
    page.get_by_label("Tag").select_option("spring")
    page.get_by_role("button", name="Show").click()
    expect(page.locator(".drawings img")).to_have_count(4)
    look(page, axe, "gallery")
    page.get_by_label("Prompt holds").fill("green")
    page.get_by_role("button", name="Show").click()
    expect(page.locator(".drawings img")).to_have_count(2)
    with page.expect_download() as exported:
        page.get_by_role("link", name="Export").click()
    with zipfile.ZipFile(io.BytesIO(exported.value.path().read_bytes())) as packed:
        assert sum(name.endswith(".webp") for name in packed.namelist()) == 4
        assert re.search(r'lora_weights"": \[""[0-9a-f]{64}""\]', packed.read("runs.csv").decode())
    page.get_by_role("link", name="Again with…").first.click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a TOK on a green background")
    expect(page.get_by_label("Second LoRA", exact=True)).to_have_value("you/trained")
    page.get_by_role("link", name="Usage", exact=True).click()
    expect(page.get_by_role("rowheader", name="posters")).to_be_visible()
    look(page, axe, "used")


def test_a_mask_is_painted_and_only_what_is_painted_changes(
    page: Page, axe: str, served: Served, twelve: list[Path]
) -> None:
    sign_in(page, served.url, served.token)
    page.goto(f"{served.url}/draw")
    page.get_by_text("Start from a picture").click()
    page.get_by_label("Picture", exact=True).set_input_files(twelve[0])
    canvas = page.locator("#canvas")
    expect(canvas).to_be_visible()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.2 * box["height"], steps=5)
    page.mouse.up()
    expect(page.locator("#mask")).to_have_value(re.compile("mask.png"))
    look(page, axe, "draw-mask")
    page.get_by_label("How far to go").fill("1")
    page.get_by_label("Num inference steps").fill("2")
    page.get_by_text("For experts").click()
    page.get_by_label("Output format").select_option("png")
    draw(page, "a house", 1)
    apart = page.evaluate(CHANGED, [f"data:image/png;base64,{base64.b64encode(twelve[0].read_bytes()).decode()}"])
    assert apart["painted"] > 10, apart
    assert apart["elsewhere"] <= 1, apart


def test_pictures_that_cannot_be_used_are_marked_before_the_start(
    page: Page, axe: str, served: Served, twelve: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 no picture")
    sign_in(page, served.url, served.token)
    page.get_by_label("Drop pictures or a zip here").set_input_files([broken, *twelve[:3]])
    expect(page.get_by_text("1 cannot be used")).to_be_visible()
    expect(page.get_by_text("'broken.jpg' cannot be read as a picture")).to_be_visible()
    look(page, axe, "train-broken")
    page.get_by_role("button", name="Start the training").click()
    expect(page.get_by_text("remove what cannot be used")).to_be_visible()
    page.get_by_role("button", name="Remove broken.jpg").click()
    expect(page.get_by_text("3 pictures", exact=True)).to_be_visible()
    page.get_by_label("Training steps").evaluate("field => field.removeAttribute('max')")
    page.get_by_label("Training steps").fill("9999")
    page.get_by_role("button", name="Start the training").click()
    expect(page.locator("#error-training_steps")).to_contain_text("must be 6000 or less")
    expect(page.get_by_text("3 pictures", exact=True)).to_be_visible()


def test_a_training_at_work_leaves_keyboard_and_log_where_they_are(
    page: Page, served: Served, http: httpx.Client
) -> None:
    """Its page replaces what changes every two seconds."""
    images = http.post("/files", files={"content": ("a.zip", (ROOT / "examples" / "subject.zip").read_bytes())}).json()
    inputs = {"input_images": images["urls"]["get"], **QUICK, "training_steps": 6000}
    address = "/models/ostris/flux-dev-lora-trainer/versions/" + 64 * "0" + "/trainings"
    run = http.post(address, json={"destination": "you/watched", "input": inputs}).json()
    sign_in(page, served.url, served.token)
    page.goto(f"{served.url}/run/{run['id']}")
    log = page.locator(".log")
    expect(log).to_contain_text("| 1/6000", timeout=90_000)
    expect(page.locator("h1 + p time")).not_to_contain_text("UTC")  # but in the reader's own time zone
    cancel = page.get_by_role("button", name="Cancel")
    cancel.focus()
    with page.expect_response(re.compile("/now")):
        pass
    page.wait_for_timeout(500)
    expect(cancel).to_be_focused()
    log.evaluate("log => { log.scrollTop = 50 }")
    page.get_by_text("Log", exact=True).focus()
    with page.expect_response(re.compile("/now")):
        pass
    page.wait_for_timeout(500)
    expect(page.get_by_text("Log", exact=True)).to_be_focused()
    assert log.evaluate("log => log.scrollTop") == 50
    page.keyboard.press("Enter")
    expect(log).to_be_hidden()
    with page.expect_response(re.compile("/now")):
        pass
    page.wait_for_timeout(500)
    expect(log).to_be_hidden()
    page.on("dialog", lambda dialog: dialog.accept())
    cancel.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text("canceled", exact=True)).to_be_visible()


def test_pictures_and_captions_outlive_a_reload(page: Page, served: Served, twelve: list[Path]) -> None:
    sign_in(page, served.url, served.token)
    page.get_by_label("Drop pictures or a zip here").set_input_files(twelve[:3])
    expect(page.get_by_text("3 pictures", exact=True)).to_be_visible()
    page.locator("textarea[name^='caption:']").nth(1).fill("a [trigger] written by hand")
    page.get_by_role("button", name="Remove 03.png").click()
    expect(page.get_by_text("2 pictures", exact=True)).to_be_visible()
    page.reload()
    expect(page.get_by_text("2 pictures", exact=True)).to_be_visible()
    expect(page.locator("textarea[name^='caption:']").nth(1)).to_have_value("a [trigger] written by hand")
    page.get_by_role("link", name="Train", exact=True).click()
    expect(page.get_by_text("No pictures yet.")).to_be_visible()
