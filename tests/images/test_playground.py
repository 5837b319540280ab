"""The playground in headless Chromium, against a real server with an API key."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Page, Playwright, expect, sync_playwright

from live_server import live_server, metric, wait_until_idle

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
KEY = "a-key"
PROMPT = "a calm lake at sunset, a red house on the left"
NUM_ROWS, NUM_TOKENS = 16, 273

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    command = ["sjd-vllm", "serve", "--num-speculative-tokens", "32", "--max-batch-size", "4", "--", "--api-key", KEY]
    with live_server(command, tmp_path_factory.mktemp("serve") / "log") as client:
        client.headers["authorization"] = f"Bearer {KEY}"
        yield client


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def browser(playwright: Playwright, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    context = playwright.chromium.launch_persistent_context(
        tmp_path_factory.mktemp("profile"),
        executable_path=CHROMIUM,
        headless=True,
        args=FLAGS,
        viewport={"width": 1280, "height": 900},
    )
    context.set_default_timeout(30_000)
    expect.set_options(timeout=30_000)
    yield context
    context.close()


@pytest.fixture
def bare(browser: BrowserContext, server: httpx.Client) -> Iterator[Page]:
    """A new page, which must ask no other host for anything and must not fail inside."""
    page = browser.new_page()
    addresses: list[str] = []
    failures: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    # Chromium itself reports answers that are no success; anything else is the page's own.
    page.on("console", lambda said: None if "Failed to load" in said.text else failures.append(said.text))
    yield page
    page.close()
    assert failures == []
    assert [address for address in addresses if not address.startswith((str(server.base_url), "data:"))] == []


@pytest.fixture
def page(bare: Page, server: httpx.Client) -> Page:
    return opened(bare, server, seed=7, prompt=PROMPT)


def opened(page: Page, server: httpx.Client, **settings: Any) -> Page:
    """The page with the key typed in and some settings in its link."""
    page.goto(f"{server.base_url}/playground#{httpx.QueryParams(settings)}")
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Ready: the model demo")
    return page


def made(page: Page) -> None:
    expect(page.get_by_role("status")).to_contain_text("Done:")


def shot(page: Page, selector: str = ".frame") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).first.screenshot())).convert("RGB"), dtype=float)


def test_the_page_is_one_file_under_a_strict_policy(server: httpx.Client) -> None:
    answer = httpx.get(f"{server.base_url}/playground")  # open: it holds no secret
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", answer.text)
    assert httpx.get(f"{server.base_url}/v1/images/options").status_code == 401
    assert server.get("/v1/images/options").json()["defaults"]["num_speculative_tokens"] == 32


def test_rows_appear_before_the_end(page: Page) -> None:
    page.get_by_label("Strategy").select_option("plain")
    page.get_by_role("button", name="Make the picture").click()
    partial = ",".join(f".card[data-rows='{row}']" for row in range(1, NUM_ROWS))
    page.locator(partial).wait_for()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    seen = shot(page)
    assert np.ptp(seen[: len(seen) // 32, :, 0]) > 2
    made(page)
    expect(page.locator(".note")).to_contain_text(f"{NUM_TOKENS} forwards")


def test_the_map_is_played_back(page: Page) -> None:
    page.get_by_label("Window").fill("32")
    page.get_by_role("button", name="Make the picture").click()
    made(page)
    scrub, step = page.get_by_role("slider", name="Forward"), page.locator("#step")
    num_steps = int(scrub.get_attribute("max") or 0)
    assert 1 < num_steps < NUM_TOKENS / 1.5
    picture = shot(page)
    page.get_by_label("Acceptance map").check()
    assert np.abs(shot(page) - picture).mean() > 10
    scrub.focus()
    scrub.press("Home")
    expect(step).to_contain_text(f"forward 0 of {num_steps}")
    assert shot(page).std() < 20  # nothing is painted yet
    scrub.press("ArrowRight")
    expect(step).to_have_text(f"forward 1 of {num_steps}: 1 token")
    scrub.fill(str(num_steps - 8))
    page.get_by_role("button", name="Play").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    expect(step).to_contain_text(f"forward {num_steps} of")
    expect(page.get_by_role("button", name="Play")).to_be_visible()


def test_both_ways_side_by_side(page: Page) -> None:
    page.get_by_role("button", name="Compare with plain").click()
    made(page)
    plain, jacobi = page.locator(".card").all()
    expect(plain).to_contain_text("Plain decoding")
    expect(plain).to_contain_text(f"{NUM_TOKENS} forwards")
    steps = [int(card.locator(".note b").first.inner_text()) for card in (plain, jacobi)]
    assert steps[0] > 1.5 * steps[1]
    expect(page.locator("#verdict")).to_contain_text(f"{steps[0] / steps[1]:.1f}\u00d7 fewer forwards")
    assert "s decoding" in jacobi.inner_text()


def test_several_pictures_have_consecutive_seeds(page: Page) -> None:
    page.get_by_label("Pictures", exact=True).fill("3")
    page.get_by_role("button", name="Make the pictures").click()
    made(page)
    cards = page.locator(".card")
    assert [cards.nth(index).get_by_role("button").inner_text() for index in range(3)] == ["Seed 7", "Seed 8", "Seed 9"]
    cards.nth(2).get_by_role("button").click()
    expect(page.get_by_label("Seed")).to_have_value("9")


def test_a_link_restores_the_settings_and_never_holds_the_key(page: Page, server: httpx.Client) -> None:
    page.get_by_text("More settings").click()
    given = {
        "Prompt": "a boat & 'stars'",
        "Guidance": "2.5",
        "Seed": "11",
        "Pictures": "2",
        "Window": "8",
        "Top-k": "50",
    }
    for label, value in given.items():
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_label("Strategy").select_option("coupled")
    page.get_by_text("Link and curl").click()
    link = page.get_by_label("These settings as a link").input_value()
    assert KEY not in link
    page.goto("about:blank")
    page.goto(link)
    page.get_by_label("API key").fill(KEY)
    page.get_by_role("button", name="Use", exact=True).click()
    expect(page.get_by_role("status")).to_contain_text("Ready")
    for label, value in given.items():
        expect(page.get_by_label(label, exact=True)).to_have_value(value)
    expect(page.get_by_label("Strategy")).to_have_value("coupled")


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="the line needs curl and jq")
@pytest.mark.parametrize("num_pictures", [1, 2])
def test_the_curl_line_works_in_a_shell(page: Page, tmp_path: Path, num_pictures: int) -> None:
    page.get_by_label("Prompt", exact=True).fill('a lake\'s "shore" at `night` $HOME')
    page.get_by_label("Pictures", exact=True).fill(str(num_pictures))
    line = page.locator("#curl").input_value()
    assert KEY not in line
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=tmp_path,
        env={"API_KEY": KEY, "PATH": "/usr/bin:/bin"},
        check=True,
        timeout=60,
    )
    names = ["picture.png"] if num_pictures == 1 else ["picture-1.png", "picture-2.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(Image.open(tmp_path / name).size == (96, 96) for name in names)


def test_a_seed_keeps_all_its_digits(bare: Page, server: httpx.Client) -> None:
    """Also those that a number of JavaScript has no room for."""
    seed = 2**62 + 1
    page = opened(bare, server, seed=seed, prompt=PROMPT, n=2)
    assert f'"seed":{seed},' in page.locator("#curl").input_value()
    page.get_by_role("button", name="Make the pictures").click()
    made(page)
    expect(page.locator(".card").nth(1).get_by_role("button")).to_have_text(f"Seed {seed + 1}")
    expected = server.post("/v1/images/generations", json={"prompt": PROMPT, "seed": seed + 1}, timeout=60).json()
    saved = page.locator(".card").nth(1).get_by_role("link").get_attribute("href") or ""
    assert saved.removeprefix("data:image/png;base64,") == expected["data"][0]["b64_json"]
    page.get_by_label("Seed").fill("1.5")
    page.get_by_role("button", name="Make the pictures").click()
    expect(page.get_by_role("alert")).to_contain_text("must be a whole number")


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="the line needs curl and jq")
def test_a_picture_is_finished_from_its_upper_rows(page: Page, server: httpx.Client, tmp_path: Path) -> None:
    other = server.post("/v1/images/generations", json={"prompt": "a snowy mountain at night", "seed": 1}, timeout=60)
    given = tmp_path / "it's given.png"
    given.write_bytes(base64.b64decode(other.json()["data"][0]["b64_json"]))
    page.get_by_text("More settings").click()
    expect(page.locator("#start-hint")).to_contain_text("of which there are 16")
    page.get_by_label("Picture to start from").set_input_files(given)
    expect(page.get_by_label("Rows to keep")).to_have_value("8")
    page.get_by_role("button", name="Make the picture").click()
    made(page)
    saved = page.locator(".card").get_by_role("link").get_attribute("href") or ""
    painted = Image.open(io.BytesIO(base64.b64decode(saved.partition(",")[2])))
    before = np.asarray(Image.open(given).convert("RGB"), dtype=float)
    change = np.abs(np.asarray(painted, dtype=float) - before).mean((1, 2))
    assert change[:36].mean() < change[60:].mean() / 3, "the upper rows are the given picture's"
    whole = shot(page)
    page.get_by_role("slider", name="Forward").press("Home")
    covered = np.abs(shot(page) - whole).mean((1, 2))
    half = len(covered) // 2
    assert covered[: half - 8].mean() < 2, "the given rows lie open before the first forward"
    assert covered[half + 8 :].mean() > 10
    line = page.locator("#curl").input_value()
    command = ["bash", "-euo", "pipefail", "-c", line]
    done = subprocess.run(
        command, cwd=tmp_path, env={"API_KEY": KEY, "PATH": "/usr/bin:/bin"}, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")), np.asarray(painted))
    assert "init" not in page.get_by_label("These settings as a link").input_value()
    page.get_by_label("Rows to keep").fill("16")
    page.get_by_role("button", name="Make the picture").click()
    expect(page.get_by_role("alert")).to_contain_text("Rows to keep cannot be used")
    expect(page.get_by_role("alert")).to_contain_text("from 1 to 15")


def test_stopping_frees_the_request(page: Page, server: httpx.Client) -> None:
    page.get_by_label("Strategy").select_option("plain")
    page.get_by_label("Pictures", exact=True).fill("4")
    page.get_by_role("button", name="Make the pictures").click()
    page.locator(".card[data-rows]").first.wait_for()
    page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    wait_until_idle(server)
    page.get_by_role("button", name="Make the pictures").click()
    page.locator(".card[data-rows]").first.wait_for()
    assert metric(server, "vllm:num_requests_running") > 0
    page.goto("about:blank")
    wait_until_idle(server)


def test_the_keyboard_alone(page: Page) -> None:
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "example"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(re.compile("sailboat"))
    seen = []
    while "make" not in seen and len(seen) < 30:
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id"))
    assert {"guidance", "n", "window", "seed", "strategy"} <= set(seen)
    page.keyboard.press("Control+Enter")
    made(page)
    seen = []
    while "show-map" not in seen and len(seen) < 40:
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id"))
    assert {"play", "scrub", "show-map"} <= set(seen)
    page.keyboard.press("Space")
    expect(page.get_by_label("Acceptance map")).to_be_checked()


def test_narrow_and_dark(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 760})
    page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    page.get_by_role("button", name="Compare with plain").click()
    made(page)
    for details in page.locator("summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    colours = page.evaluate("(({backgroundColor, color}) => [backgroundColor, color])(getComputedStyle(document.body))")
    page_light, text_light = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in colours)
    assert page_light < 60 < 200 < text_light


@pytest.mark.parametrize(
    ("settings", "label", "said"),
    [
        ({"size": "1000x1000"}, "Size", "size must be one of 96x96"),
        ({"guidance": "-1"}, "Guidance", "greater than 0"),
        ({"guidance": "much"}, "Guidance", "must be a number"),
        ({"window": "33"}, "Window", "from 0 to 32"),
        ({"n": "11"}, "Pictures", "from 1 to 10"),
        ({"strategy": "couple"}, "Strategy", "Did you mean 'coupled'?"),
        ({"prompt": "a red house " * 300}, "Prompt", "too long"),
    ],
)
def test_a_bad_setting_is_told_in_words(
    bare: Page, server: httpx.Client, settings: dict[str, str], label: str, said: str
) -> None:
    page = opened(bare, server, **{"seed": 7, "prompt": PROMPT, **settings})
    page.get_by_role("button", name="Make the picture").click()
    expect(page.get_by_role("alert")).to_contain_text(f"{label} cannot be used")
    expect(page.get_by_role("alert")).to_contain_text(said)
    expect(page.get_by_label(label, exact=True)).to_be_focused()
    expect(page.get_by_label(label, exact=True)).to_have_attribute("aria-invalid", "true")


def test_a_wrong_key_and_a_server_that_is_gone(bare: Page, server: httpx.Client) -> None:
    bare.goto(f"{server.base_url}/playground")
    expect(bare.get_by_role("alert")).to_contain_text("This server asks for an API key")
    bare.get_by_label("API key").fill("wrong")
    bare.get_by_label("API key").press("Enter")
    expect(bare.get_by_role("alert")).to_contain_text("another API key")
    page = opened(bare, server, prompt=PROMPT)
    expect(page.get_by_role("alert")).to_be_hidden()
    assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
    page.context.set_offline(True)
    try:
        page.get_by_role("button", name="Make the picture").click()
        expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    finally:
        page.context.set_offline(False)
    page.get_by_role("button", name="Make the picture").click()
    made(page)
