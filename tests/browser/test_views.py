"""Every view of the page: on a phone, in dark and light, and by the keyboard alone. The run is one of a driver that
trains nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser_page import enter
from tests.live_driver import live
from tests.service_client import write_run, write_samples, write_tokens

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: requirements/browser.txt")
pytestmark = pytest.mark.timeout(300)

PHONE = {"width": 390, "height": 844}
LONG = "a-run-whose-name-is-as-long-as-names-of-runs-are-that-say-everything-20261126-202108-30165"
# View -> what is there once it is drawn.
VIEWS = {
    "#/": "cell:a-run",
    "#/runs/a-run": "text:1 of 1 serve",
    f"#/runs/{LONG}": "text:Resume",
    "#/runs/a-run?with=another": "text:reward · another",
    "#/submit": "text:Submit a run",
    "#/methods": "text:grpo",
}


@pytest.fixture
def runs(tmp_path: Path, address: str) -> Iterator[str]:
    """The address of a service with a run in progress, and others that are over."""
    wide = "12+34=" * 40
    for name in ("a-run", "another", LONG):
        lines = [{"step": step, "reward": step / 10, "loss": 1 / step, "kl": 0.1} for step in range(1, 9)]
        over = [] if name == "a-run" else [{"event": "failed", "time": 1010.0, "error": "x" * 300}]
        folder = write_run(tmp_path / "runs", name, events=over, metrics=lines)
        write_samples(folder, 8, [0.5, 1.0])
        token = {"pieces": [wide, "4", "6"], "mask": [False, True, True], "advantages": [float("nan"), 1, -0.5]}
        write_tokens(folder, 8, {0: [token]})
        (folder / "console.log").write_text("a line that is wider than a phone is " * 10 + "\n" + "x" * 400 + "\n")
    with live(tmp_path / "runs" / "a-run"):
        yield address


def shown(page: Any, url: str, view: str) -> None:
    page.goto(f"{url}/{view}")
    kind, _, what = VIEWS[view].partition(":")
    found = page.get_by_role("cell", name=what, exact=True) if kind == "cell" else page.get_by_text(what)
    found.first.wait_for()


def test_no_view_is_wider_than_a_phone(page: Any, runs: str):
    page.set_viewport_size(PHONE)
    enter(page, runs)
    for view in VIEWS:
        shown(page, runs, view)
        if view == "#/methods":
            for each in page.locator("summary").all()[:3]:
                each.click()
        page.wait_for_timeout(500)  # charts and samples come with the next looks
        width, there = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        beyond = page.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
            " && !e.closest('.scroll, pre')).map(e => `${e.tagName}.${e.className}`)"
        )
        assert (width, there, beyond) == (PHONE["width"], PHONE["width"], []), view


def test_dark_and_light_have_colours_of_their_own(page: Any, runs: str):
    enter(page, runs)
    for view in VIEWS:
        shown(page, runs, view)
        seen = {}
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            seen[scheme] = page.evaluate(
                "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])"
                ".concat(getComputedStyle(document.querySelector('section')).backgroundColor)"
            )
        light, dark = ([brightness(colour) for colour in seen[scheme]] for scheme in ("light", "dark"))
        assert light[0] > 200 and light[2] > 200 and light[1] < 60, (view, seen)
        assert dark[0] < 60 and dark[2] < 60 and dark[1] > 200, (view, seen)


def brightness(colour: str) -> float:
    red, green, blue = map(float, re.findall(r"[\d.]+", colour)[:3])
    return (red + green + blue) / 3


def test_the_tab_key_reaches_every_control_of_a_run_in_the_order_of_the_page(page: Any, runs: str):
    enter(page, runs)
    shown(page, runs, "#/runs/a-run")
    page.reload()  # the focus is at the beginning again
    page.get_by_role("button", name="tokens of the prompt").wait_for()
    reached = list[str]()
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):  # behind the last one
            break
        name = page.evaluate(
            "(e => e.getAttribute('aria-label') ?? e.labels?.[0]?.firstChild.textContent ?? e.innerText.trim())"
            "(document.activeElement)"
        )
        reached.append(name)
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", f"{name}: who comes by the keyboard sees where he is"
    wanted = ["Skip to content", "Runs", "Submit", "role", "workers", "Scale", "Auto", "Pause", "Checkpoint", "Stop"]
    wanted += ["Open this sample", "What the run printed", "Message to the policy", "Send", "Start over"]
    assert [name for name in dict.fromkeys(reached) if name in wanted] == wanted, reached
    buttons = [each for each in page.get_by_role("button").all() if each.is_visible() and each.is_enabled()]
    names = {each.get_attribute("aria-label") or each.inner_text() for each in buttons}
    assert len(names) > 8 and names - {*reached} == set()


def test_a_run_is_paused_by_the_keyboard_alone(page: Any, runs: str):
    enter(page, runs)
    shown(page, runs, "#/runs/a-run")
    page.get_by_text("1 of 1 serve").wait_for()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.innerText") == "Pause":
            break
    page.keyboard.press("Enter")
    api.expect(page.locator("section .state").first).to_have_text("paused")
