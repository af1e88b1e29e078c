"""The page that `--to web` writes: in Chromium, and what needs no browser."""

import contextlib
import functools
import http.server
import importlib
import io
import json
import os
import re
import shutil
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import run_main
from photo_files import write_model, write_photos
from PIL import Image
from pillow_resize import PILLOW, pillow_resize

from keras_resnet import InputError, export_web, load
from keras_resnet.datasets.images import border_level, decode_image
from keras_resnet.exporters import web, web_html, web_runtime
from keras_resnet.exporters.formats import PRECISIONS

pytestmark = pytest.mark.thorough

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TOLERANCE = PRECISIONS["float16"].tolerance.max_difference
RUNTIMES = ["tflite", "onnx"]
SIZE = 32
# Where the page lies on its server.
PLACE = "some/sub folder/page"
# The longest wait for a page, in milliseconds: the processor may have other work.
PATIENCE = 60_000


def missing(what):
    """Skips on a user's machine; where a change is checked nothing may go untested."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


# ---------------------------------------------------------------------------------------------
# Without a browser
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packages():
    """A folder with the runtimes, which npm installs once."""
    try:
        return web_runtime.find_runtime()
    except InputError as error:
        return missing(f"needs npm, which `make browser` installs: {error}")


@pytest.fixture(scope="module")
def site(fashion, packages, tmp_path_factory):
    """A server's folder with the page of the packaged network in a sub-folder."""
    folder = tmp_path_factory.mktemp("site")
    export_web("fashion_mnist", folder / PLACE, dataset=fashion, runtime=packages)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of small photographs."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, SIZE)
    return folder


@pytest.fixture(scope="module")
def photo_site(photos, packages, tmp_path_factory):
    """A server's folder with the page of a network that takes photographs of any size."""
    folder = tmp_path_factory.mktemp("photo_site")
    write_model(folder / "any.keras", photos, SIZE)
    done = run_main(
        *("export", folder / "any.keras", "--photos", photos, "--to", "web"),
        *("--out", folder / PLACE, "--runtime", packages),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^model-float16\.onnx: .* on 12 images: verified$", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-2].startswith(f"written to {folder / PLACE}: ")
    return folder


def read_metadata(site):
    return json.loads((site / PLACE / "metadata.json").read_text())


def test_the_versions_are_pinned_and_no_registry_is_named():
    pages = Path(web.__file__).with_name("page")
    wanted = json.loads((pages / "package.json").read_text())["dependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values())
    lock = json.loads((pages / "package-lock.json").read_text())["packages"]
    assert lock[""]["dependencies"] == wanted
    for name, row in lock.items():
        if name:
            assert row["integrity"].startswith("sha512-") and "resolved" not in row, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "web", "tflite"], "--to web writes a folder .* alone, got web tflite"),
        (
            ["--to", "web", "--precision", "float32", "int8"],
            "files of one --precision: name one, got float32 int8",
        ),
        (["--to", "web", "--precision", "dynamic"], "onnx comes in .*, not in dynamic"),
        (
            ["--to", "web", "--input-size", "28", "28"],
            "takes photographs of any size: leave --input-size out",
        ),
        (["--to", "web", "--no-preprocessing"], "takes images: leave --no-preprocessing out"),
        (["--to", "onnx", "--runtime", "there"], "--runtime is for --to web alone"),
        (["--runtime", "there"], "--runtime is for --to web alone"),
        (["--to", "web", "--runtime", "there"], "there: no such folder"),
    ],
)
def test_bad_choices_are_one_line_and_status_2(options, message, tmp_path):
    done = run_main("export", "fashion_mnist", *options, "--out", tmp_path / "page")
    assert done.returncode == 2 and not (tmp_path / "page").exists()
    assert re.search(message, done.stderr) and len(done.stderr.splitlines()) == 1


def test_without_npm_and_cache_the_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"no npm here: .*litertjs/core@\d.* as --runtime$"):
        web_runtime.find_runtime()
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'no route to the registry' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(InputError, match=r"npm could not install .*: no route to the registry: "):
        web_runtime.find_runtime()
    assert not any((tmp_path / "keras_resnet" / "web").iterdir())


def test_a_folder_of_runtimes_is_compared_with_the_checksums(packages, tmp_path):
    inner = tmp_path / "node_modules"
    shutil.copytree(packages, inner)
    assert web_runtime.find_runtime(tmp_path) == inner == web_runtime.find_runtime(inner)
    changed = inner / "@litertjs" / "core" / "dist" / "index.js"
    changed.write_bytes(changed.read_bytes() + b" ")
    with pytest.raises(InputError, match=r"index\.js: of another version, or damaged: its sha256"):
        web_runtime.find_runtime(tmp_path)
    changed.unlink()
    with pytest.raises(InputError, match=r"index\.js: no such file of a runtime: name a folder"):
        web_runtime.find_runtime(tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(InputError, match="a page is written to a new folder, an empty one or"):
        export_web("fashion_mnist", tmp_path)
    (tmp_path / "metadata.json").write_text('{"of": "something else"}')
    with pytest.raises(InputError, match="choose another --out"):
        export_web("fashion_mnist", tmp_path)


def test_an_earlier_page_is_replaced_and_foreign_files_stay(fashion, packages, site, tmp_path):
    folder = tmp_path / "page"
    shutil.copytree(site / PLACE, folder)
    (folder / "CNAME").write_text("example.org")
    (folder / "samples" / "old.png").write_text("")
    lines = []
    options = {"dataset": fashion, "runtime": packages, "precision": "float32"}
    metadata = export_web("fashion_mnist", folder, report=lines.append, **options)
    assert metadata == json.loads((folder / "metadata.json").read_text())
    assert metadata["precision"] == "float32" and metadata["tolerance"] == 1e-5
    assert (folder / "CNAME").read_text() == "example.org"
    assert not (folder / "samples" / "old.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["page"]
    assert re.fullmatch(rf"written to {folder}: \d\d\.\d MB", lines[-2])
    assert lines[-1] == f"to see it: python -m http.server --directory {folder}"


def test_the_folder_holds_everything_and_nothing_about_the_machine(site):
    folder = site / PLACE
    assert {path.name for path in folder.iterdir()} == web._OWN
    licenses = {name: (folder / "runtime" / name).read_text() for name in web_runtime.LICENSES}
    assert "Apache License" in licenses["LICENSE-LiteRT.txt"]
    assert "MIT License" in licenses["LICENSE-ONNX-Runtime.txt"]
    text = (folder / "index.html").read_text() + (folder / "metadata.json").read_text()
    assert str(Path(web.__file__).parents[2]) not in text and str(site) not in text
    assert not re.search(r"(src|href)=\"(?!\w)", text), "paths are relative"
    assert not re.search(r"https?://", text)
    metadata = read_metadata(site)
    assert len(metadata["samples"]) == 20 and len(metadata["class_names"]) == 10
    assert {sample["label"] for sample in metadata["samples"]} == set(metadata["class_names"])
    assert "93" in text and metadata["files"]["tflite"]["accuracy"] > 0.9


def test_names_of_classes_are_text_in_the_html(site):
    metadata = read_metadata(site)
    bad = "<script>alert('$policy')</script>\" onclick=\""
    metadata["class_names"][0] = metadata["network"] = metadata["trained_on"] = bad
    metadata["samples"][0]["label"] = bad
    page = web_html.fill_page(metadata)
    assert bad not in page and page.count("<script") == 2 and 'onclick="' not in page


@pytest.mark.parametrize("name", ["site", "photo_site"])
def test_the_shape_of_the_input_is_where_the_metadata_says(name, request):
    site = request.getfixturevalue(name)
    content = (site / PLACE / "model.tflite").read_bytes()
    height, width, channels = (28, 28, 1) if name == "site" else (None, None, 3)
    shape, signature = (
        struct.unpack_from("<4i", content, offset)
        for offset in read_metadata(site)["files"]["tflite"]["shape_at"]
    )
    assert shape == (1, height or 1, width or 1, channels)
    assert signature == (-1, height or -1, width or -1, channels)


def test_every_text_has_enough_contrast():
    """The ratio of WCAG 2.2, level AA, in the light colours and in the dark ones."""
    style = Path(web.__file__).with_name("page").joinpath("style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): #(\w+);", block))
        pairs = [("text", "page"), ("text", "panel"), ("quiet", "page"), ("quiet", "panel")]
        pairs += [("accent", "page"), ("on-accent", "accent"), ("problem", "panel")]
        for one, other in [*pairs, ("good", "panel")]:
            light, dark = sorted(map(luminance, (colours[one], colours[other])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (one, other)


def luminance(colour):
    digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    levels = np.frombuffer(bytes.fromhex(digits), "uint8") / 255
    linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


# ---------------------------------------------------------------------------------------------
# In Chromium
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium."""
    try:
        playwright = importlib.import_module("playwright.sync_api")
    except ImportError:
        return missing("needs playwright, which the extra `test` installs")
    if CHROMIUM is None:
        return missing("needs Chromium, which `make browser` installs")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def served(folder):
    """Serves a folder like `python -m http.server`; yields the address of the page in it."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{PLACE.replace(' ', '%20')}/"
        server.shutdown()


@pytest.fixture(scope="module")
def address(site):
    with served(site) as found:
        yield found


@pytest.fixture(scope="module")
def photo_address(photo_site):
    with served(photo_site) as found:
        yield found


# Before any script of the page runs.
WATCH = """
globalThis.seen = {shift: 0, violations: []};
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) seen.shift += entry.value;
}).observe({type: "layout-shift", buffered: true});
addEventListener("securitypolicyviolation", (event) => seen.violations.push(event.blockedURI));
"""


@pytest.fixture
def visit(chromium):
    """A function that opens an address, and returns the page when its self-check is done."""
    with contextlib.ExitStack() as stack:

        def open_page(address, *, script="", missing=(), wait=True, **context_options):
            context = stack.enter_context(chromium.new_context(**context_options))
            page = context.new_page()
            page.set_default_timeout(PATIENCE)
            page.errors, page.requested = [], []
            page.on("console", lambda m: m.type == "error" and page.errors.append(m.text))
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            page.on("request", lambda request: page.requested.append(request.url))
            page.add_init_script(WATCH + script)
            for pattern in missing:
                page.route(pattern, lambda route: route.fulfill(status=404))
            page.goto(address)
            if wait:
                page.wait_for_selector("#check.passed, #check.problem")
            return page

        yield open_page


def text(page, name):
    return page.inner_text(f"#{name}")


def wait_for(page, name, wanted):
    page.locator(f"#{name}", has_text=wanted).wait_for(timeout=PATIENCE)


def choose(page, name, content):
    """Gives the page a file."""
    file = {"name": name, "mimeType": "application/octet-stream", "buffer": content}
    page.set_input_files("#file", file)


def encode(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# Images as bytes -> what the page makes of them.
PREPARE = """async ([files, input]) => {
  const {decode, prepare} = await import("./pixels.js");
  return Promise.all(files.map(async (bytes) => {
    const image = await decode(new Blob([new Uint8Array(bytes)]));
    const {pixels, shape, inverted} = prepare(image, input);
    return {pixels: [...pixels], shape, inverted};
  }));
}"""
PREDICT = """async ([files, name]) => {
  const {decode, prepare} = await import("./pixels.js");
  const {openNetwork} = await import("./runtimes.js");
  const metadata = await (await fetch("metadata.json")).json();
  const run = await openNetwork(name, metadata.files[name], [1, 28, 28, metadata.input.channels]);
  const found = [];
  for (const bytes of files) {
    const image = await decode(new Blob([new Uint8Array(bytes)]));
    const {pixels, shape} = prepare(image, metadata.input);
    found.push([...await run(pixels, shape)]);
  }
  return found;
}"""


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_hundred_images_get_python_s_answers(runtime, address, visit, fashion):
    page = visit(f"{address}?runtime={runtime}")
    assert page.locator("#check").get_attribute("class") == "passed", text(page, "check")
    assert text(page, "check").startswith("20 of 20 answers equal to Python's")
    assert page.input_value("#runtime") == runtime
    images = fashion.splits["test"].images[:100]
    files = [[*encode(Image.fromarray(image[..., 0]))] for image in images]
    found = np.array(page.evaluate(PREDICT, [files, runtime]))
    expected = load("fashion_mnist")(images)
    assert np.abs(found - expected).max() <= TOLERANCE
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()
    assert page.errors == [] and page.evaluate("seen.violations") == []
    # Nothing moved while the page loaded, and nothing came from elsewhere.
    assert page.evaluate("seen.shift") < 0.01
    assert all(url.startswith(address) for url in page.requested)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_self_check_of_the_other_precisions(precision, fashion, packages, visit, tmp_path):
    options = {"dataset": fashion, "runtime": packages, "precision": precision}
    export_web("fashion_mnist", tmp_path / PLACE, **options)
    with served(tmp_path) as address:
        for runtime in RUNTIMES:
            page = visit(f"{address}?runtime={runtime}")
            assert page.input_value("#runtime") == runtime
            assert text(page, "check").startswith("20 of 20 answers equal"), text(page, "check")
            assert page.errors == []


def test_other_addresses_are_out_of_reach(address, visit):
    page = visit(address, wait=False)
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 1, () => 0)") == 0
    assert page.evaluate("seen.violations") == ["http://127.0.0.1:9/"]
    assert page.evaluate("fetch('metadata.json').then((answer) => answer.status)") == 200
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "globalThis.leaked = true";
          document.head.append(script);
        }"""
    )
    assert page.evaluate("globalThis.leaked ?? false") is False
    assert page.evaluate("seen.violations")[1:] == ["inline"]


def make_images():
    """Returns name -> image file, and how many grey levels its pixels may differ from Pillow's."""
    generator = np.random.default_rng(2)
    smooth = Image.fromarray(generator.integers(0, 256, (5, 7, 3), "uint8")).resize((161, 117))
    noise = Image.fromarray(generator.integers(0, 256, (40, 61, 3), "uint8"))
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = noise.convert("RGBA")
    alpha.putalpha(Image.fromarray(generator.integers(0, 256, (40, 61), "uint8")))
    deep = generator.integers(0, 2**16, (33, 47)).astype("uint16")
    light = Image.fromarray(generator.integers(180, 256, (50, 40), "uint8"))
    return {
        "colour": (encode(noise), 0),
        "grey": (encode(noise.convert("L")), 0),
        "high": (encode(noise.resize((30, 200))), 0),
        "wide": (encode(noise.resize((200, 30))), 0),
        "tiny": (encode(noise.crop((0, 0, 3, 2))), 0),
        "as taken": (encode(noise.resize((28, 28))), 0),
        "palette": (encode(noise.quantize(16)), 0),
        "light": (encode(light), 0),
        "webp": (encode(smooth, "webp", lossless=True), 0),
        "transparent": (encode(alpha), 1),
        "16 bits": (encode(Image.fromarray(deep)), 1),
        "photograph": (encode(smooth, "jpeg", quality=90), 2),
        "turned": (encode(smooth, "jpeg", quality=90, exif=exif), 2),
    }


def test_pixels_are_those_of_predict(address, visit):
    page = visit(address, wait=False)
    images = make_images()
    files = [[*content] for content, _ in images.values()]
    for size, channels in (((28, 28), 1), ((32, 24), 3), ((None, None), 3)):
        taken = {"height": size[0], "width": size[1], "channels": channels}
        taken |= {"dark_background": channels == 1, "resampler": PILLOW}
        found = page.evaluate(PREPARE, [files, taken])
        for (name, (content, bound)), row in zip(images.items(), found, strict=True):
            expected = decode_image(content, size, channels)
            is_light = border_level(expected[None]) >= 128
            assert row["shape"] == [1, *expected.shape], name
            assert row["inverted"] == (channels == 1 and is_light), name
            if row["inverted"]:
                expected = 255 - expected
            pixels = np.array(row["pixels"]).reshape(expected.shape)
            assert np.abs(pixels - expected.astype(int)).max() <= bound, name


@pytest.mark.parametrize("version", ["pillow", pytest.param("pillow12", marks=pytest.mark.slow)])
def test_resizing_is_pillow_s_in_both_orders(version, address, visit):
    page = visit(address, wait=False)
    generator = np.random.default_rng(3)
    for shape in ((61, 40), (40, 61), (200, 33), (9, 9), (28, 100)):
        image = generator.integers(0, 256, (*shape, 3), "uint8")
        found = page.evaluate(
            """async ([pixels, shape, size, version]) => {
              const {resize} = await import("./pixels.js");
              return [...resize(new Uint8Array(pixels), shape, size, version)];
            }""",
            [image.reshape(-1).tolist(), [*image.shape], [28, 20], version],
        )
        expected = pillow_resize(image, 28, 20, "bilinear", version)
        np.testing.assert_array_equal(np.reshape(found, expected.shape), expected)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_photographs_of_any_size(runtime, photo_site, photo_address, visit, photos):
    page = visit(f"{photo_address}?runtime={runtime}")
    assert text(page, "check").startswith("8 of 8 answers equal to Python's")
    paths = sorted(photos.iterdir())
    files = [[*path.read_bytes()] for path in paths]
    found = np.array(page.evaluate(PREDICT, [files, runtime]))
    model = load(photo_site / "any.keras")
    expected = np.concatenate([model(np.asarray(Image.open(path))[None]) for path in paths])
    assert np.abs(found - expected).max() <= TOLERANCE
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()
    assert page.locator("#seen, #clear").count() == 0
    assert page.errors == []


def test_by_keyboard_alone(address, visit):
    page = visit(address)
    focused = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name = page.evaluate(
            "document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"
        )
        if name in focused:
            break
        focused.append(name)
        if name == "file":
            page.evaluate("addEventListener('click', ({target}) => { seen.clicked = target.id; })")
            page.keyboard.press("Space")  # opens the system's dialog
            assert page.evaluate("seen.clicked") == "file"
            choose(page, "mine.png", encode(Image.new("L", (40, 40))))
            page.wait_for_selector("#picture[aria-label='mine.png']")
        elif name == "runtime":
            page.keyboard.press("ArrowDown")
            wait_for(page, "speed", "ONNX Runtime Web")
        elif name.startswith("sample 3"):
            page.keyboard.press("Enter")
            page.wait_for_selector("#picture[aria-label='sample 3']")
            wait_for(page, "note", "Labelled: Trouser.")
            assert page.get_attribute("button[aria-pressed=true]", "aria-label") == name
    assert focused[:3] == ["file", "clear", "runtime"]
    assert len([name for name in focused if name.startswith("sample")]) == 20
    assert text(page, "answer").startswith("Trouser, ")


def test_names_for_a_screen_reader(address, visit):
    page = visit(address)
    seen = page.locator("body").aria_snapshot()
    for expected in (
        'heading "resnet10_narrow on fashion_mnist" [level=1]',
        "status: ",
        "alert",
        'img "sample 1"',
        'button "sample 2, labelled Pullover"',
        'combobox "Runtime"',
        'button "Choose an image"',
    ):
        assert expected in seen, seen
    first = page.locator("#bars li").first.inner_text()
    assert re.fullmatch(r"Ankle boot\s+\d+\.\d %", first)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_s_width_in_light_and_dark(scheme, address, visit):
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    page = visit(address, color_scheme=scheme, **phone)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("seen.shift") < 0.01
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    level = np.mean([*map(int, re.findall(r"\d+", background))])
    assert level > 200 if scheme == "light" else level < 50
    for button in page.locator("button, .button, select").all():
        if button.is_visible():
            assert min(button.bounding_box()[side] for side in ("width", "height")) >= 40
    assert page.get_by_text("Take a photo").is_visible()
    # A finger draws.
    page.tap("#picture")
    page.wait_for_selector("#picture[aria-label='a drawing']")


def test_drawing_and_clearing(address, visit):
    page = visit(address)

    def draw(*points):
        page.locator("#picture").scroll_into_view_if_needed()
        box = page.locator("#picture").bounding_box()
        (x, y), *others = (
            (box["x"] + u * box["width"], box["y"] + v * box["height"]) for u, v in points
        )
        page.mouse.move(x, y)
        page.mouse.down()
        for x, y in others:
            page.mouse.move(x, y, steps=5)
        page.mouse.up()

    def levels_once(is_there):
        """Returns the grey levels that the network gets, once a condition holds."""
        script = "[...find.getContext('2d').getImageData(0, 0, 28, 28).data]"
        for _ in range(PATIENCE // 50):
            found = page.locator("#seen").evaluate(f"(find) => {script}")[::4]
            if is_there(levels := np.reshape(found, (28, 28))):
                return levels
            page.wait_for_timeout(50)
        return pytest.fail("the drawing does not reach the network")

    draw((0.3, 0.2), (0.3, 0.9))
    page.wait_for_selector("#picture[aria-label='a drawing']")
    one = levels_once(lambda levels: levels[25, 8] > 200)
    # Light on dark, as the training images are.
    assert one[14, 8] > 200 and one[14, 20] == 0 and one[0, 0] == 0
    draw((0.7, 0.2), (0.7, 0.9))
    both = levels_once(lambda levels: levels[25, 20] > 200)
    assert both[14, 8] > 200 and both[14, 20] > 200
    wait_for(page, "speed", "ms, LiteRT.js")
    assert text(page, "note") == ""
    page.click("#clear")
    assert text(page, "answer") == "Draw, or choose an image"
    # After a sample, a stroke begins a new drawing.
    page.locator(".samples button").nth(2).click()
    wait_for(page, "note", "Labelled")
    draw((0.3, 0.2), (0.3, 0.9))
    levels_once(lambda levels: np.array_equal(levels, one))


def test_a_dropped_photograph_and_its_inversion(address, visit):
    page = visit(address)
    light = encode(Image.new("L", (60, 50), 240))
    page.evaluate(
        """(bytes) => {
          const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
          dispatchEvent(new DragEvent("dragenter", {dataTransfer: data}));
          dispatchEvent(new DragEvent("drop", {dataTransfer: data, cancelable: true}));
        }""",
        [*light],
    )
    page.wait_for_selector("#picture[aria-label='dropped.png']")
    wait_for(page, "note", "Light and dark were swapped")
    assert page.get_attribute("body", "class") == "ready"


def test_a_broken_image_is_named_and_the_next_one_works(address, visit):
    page = visit(address)
    choose(page, "broken.jpg", encode(Image.new("RGB", (99, 99)), "jpeg")[:60])
    wait_for(page, "problem", "broken.jpg cannot be read as an image: choose a photograph")
    # The image and the answer before stay.
    assert page.locator("button[aria-pressed=true]").count() == 1
    assert text(page, "answer").startswith("Ankle boot")
    choose(page, "whole.png", encode(Image.new("L", (30, 30))))
    page.wait_for_selector("#picture[aria-label='whole.png']")
    page.locator("#problem:empty").wait_for(state="attached")
    assert page.errors == []


def test_an_image_beyond_the_limit_of_a_canvas_is_named(address, visit):
    # What Safari's canvas does with more than 16 megapixels.
    page = visit(address, script="CanvasRenderingContext2D.prototype.fillRect = () => {};")
    choose(page, "huge.png", encode(Image.new("LA", (30, 20))))
    wait_for(page, "problem", "huge.png cannot be used: 30 × 20 pixels are too many for this")


def test_a_missing_model_and_the_other_instead(address, visit):
    page = visit(address, missing=["**/model.tflite"])
    assert text(page, "problem") == (
        "model.tflite is missing on the server (status 404). ONNX Runtime Web runs instead."
    )
    assert page.input_value("#runtime") == "onnx"
    assert text(page, "check").startswith("20 of 20 answers equal")


def test_files_that_are_missing_or_damaged_are_named(address, visit):
    page = visit(address, missing=["**/model.*"], wait=False)
    wait_for(page, "problem", "Copy the whole exported folder")
    assert text(page, "answer") == "No network"
    for name in ("model.tflite", "model.onnx"):
        assert f"{name} is missing on the server (status 404)" in text(page, "problem")
    page = visit(address, missing=["**/metadata.json"], wait=False)
    wait_for(page, "problem", "metadata.json is missing on the server (status 404)")
    page = visit("about:blank", wait=False)
    page.route("**/model.tflite", lambda route: route.fulfill(body=b"not a network"))
    page.goto(address)
    wait_for(page, "problem", "LiteRT.js cannot run model.tflite: ")


@pytest.mark.slow  # the hint comes after 5 seconds
def test_the_page_opened_as_a_file_says_that_it_needs_a_server(site, visit):
    page = visit((site / PLACE / "index.html").as_uri(), wait=False)
    page.locator(".unserved").wait_for()
    assert "python -m http.server" in page.inner_text(".unserved")


def test_a_browser_without_webassembly(address, visit):
    page = visit(address, script="delete globalThis.WebAssembly;", wait=False)
    wait_for(page, "problem", "this browser has no WebAssembly")
    assert text(page, "answer") == "No network"


def test_a_changed_model_fails_the_self_check(site, chromium, visit, tmp_path):
    shutil.copytree(site / PLACE, tmp_path / PLACE)
    path = tmp_path / PLACE / "metadata.json"
    metadata = read_metadata(site)
    for name in RUNTIMES:
        metadata["samples"][3]["answers"][name][0] += 0.01
    path.write_text(json.dumps(metadata))
    with served(tmp_path) as address:
        page = visit(address)
        assert page.get_attribute("#check", "class") == "problem"
        assert text(page, "check").startswith("19 of 20 answers equal to Python's, largest")
