"""The page of the service in Chromium, with a run of real processes behind it: submit, watch, control, read, stop."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrator.reporting.metrics import MetricsLog
from tests.browser_page import WAIT_MS, enter
from tests.runs import ARITHMETIC, merged
from tests.service_client import client, write_run, write_tokens

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: requirements/browser.txt")
RECIPE: dict[str, Any] = merged(
    ARITHMETIC,
    {
        "rewards": [
            {"fn": "exact_match"},
            *(  # random texts get different rewards, and the model learns too slowly to change that
                {
                    "fn": "regex",
                    "name": f"place_{n}",
                    "options": {"pattern": f".{{{n}}}[!-~].*"},
                    "weight": 0.3 + 0.1 * n,
                }
                for n in range(3)
            ),
        ],
        "train": {"steps": 100_000, "learning_rate": 1e-6},
        "roles": {"rollout": {"engine": "hf", "workers": 1, "max_model_len": 64}},  # room for a conversation
        "logging": {"completions_every": 1},
        "checkpoint": {"every": 1000},
    },
)
pytestmark = pytest.mark.timeout(900)


def step(page: Any) -> int:
    return int(page.get_by_text("step ", exact=False).first.inner_text().split()[-1])


def test_a_run_is_submitted_watched_controlled_and_stopped_in_the_page(page: Any, address: str, tmp_path: Path):
    enter(page, address)
    page.get_by_role("link", name="Submit", exact=True).click()
    (tmp_path / "template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    chatty = {"model": {"chat_template": str(tmp_path / "template.jinja")}}
    page.get_by_label("recipe").fill(json.dumps(merged(RECIPE, chatty)))
    page.get_by_label("overrides").fill("name=paged\ntrain.batch_size=4")
    page.get_by_role("button", name="Submit").click()
    run = page.get_by_role("heading", name="paged").inner_text()
    state = page.locator("section .state").first
    api.expect(state).to_have_text("running", timeout=WAIT_MS)

    assert_the_curve_grows(page)
    names = page.locator(".pipeline li > span:first-child").all_inner_texts()
    drawn = ["rollout.generate", "reward.score", "driver.credit", "policy.update", "publish"]
    assert names[: len(drawn)] == drawn, "what is not of every step (an evaluation) stands behind while it is at work"
    page.locator(".pipeline li.working", has_text="policy.update").wait_for()  # the stage at work, as the run goes on

    page.get_by_label("workers").fill("2")
    page.get_by_role("button", name="Scale").click()
    page.get_by_text("2 of 2 serve").wait_for()

    page.get_by_role("button", name="Pause").click()
    api.expect(state).to_have_text("paused", timeout=WAIT_MS)
    held = step(page)
    page.get_by_role("button", name="Checkpoint").click()
    page.get_by_role("cell", name=f"step-{held:08d}", exact=True).wait_for()  # an event has it in its text, too
    assert_colours_follow_the_values(page, samples_of(tmp_path / "runs", run, held))
    page.get_by_role("button", name="Continue").click()
    api.expect(state).to_have_text("running", timeout=WAIT_MS)

    page.get_by_role("button", name="Open this sample").first.click()
    dialog = page.get_by_role("dialog", name="Sample")
    assert "+" in dialog.inner_text() and "exact_match" in dialog.inner_text()
    dialog.get_by_role("button", name="Close").click()

    [policy] = client(tmp_path / "runs").get(f"/v1/runs/{run}").json()["ranks"]["policy"]
    rank = page.locator("section", has=page.get_by_role("heading", name="Roles")).locator("tr", has_text="working")
    rank.or_(page.get_by_role("cell", name=str(policy["pid"]), exact=True)).first.wait_for()
    page.get_by_role("cell", name=str(policy["pid"]), exact=True).wait_for()
    chat_with_the_policy(page)
    if folder := os.environ.get("TROUPE_SCREENSHOTS"):  # for docs/
        take_screenshots(page, Path(folder))
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Stop it").click()
    api.expect(state).to_have_text("stopped", timeout=WAIT_MS)
    page.get_by_role("cell", name="checkpoint", exact=True).first.wait_for()  # an event, told without a reload


def assert_the_curve_grows(page: Any) -> None:
    """What the chart has drawn, as its canvas says it: more points, up to a later step, and another picture."""
    canvas = page.locator(".chart", has_text="Reward").locator("canvas")

    def drawn() -> tuple[int, int]:
        told = canvas.get_attribute("aria-label")
        [(points, last)] = re.findall(r"Reward: reward (\d+) points, \S+ at step (\d+)", told)
        return int(points), int(last)

    canvas.and_(page.locator("[aria-label]")).wait_for()
    (points, last), picture = drawn(), canvas.evaluate("canvas => canvas.toDataURL()")
    deadline = time.monotonic() + WAIT_MS / 1000
    while drawn()[0] < points + 3:
        assert time.monotonic() < deadline, f"{points} points, and no more"
        time.sleep(0.2)
    assert drawn()[1] >= last + 3 and canvas.evaluate("canvas => canvas.toDataURL()") != picture


def chat_with_the_policy(page: Any) -> None:
    """Two turns: what is shown is what the service streamed, and the second request has the first answer."""
    turns, sent = page.locator(".turn.assistant"), list[Any]()
    for turn in range(2):
        page.get_by_label("Message to the policy").fill("12+34=")
        with page.expect_response("**/v1/chat/completions") as answered:
            page.get_by_role("button", name="Send").click()
        assert answered.value.status == 200, answered.value.text()
        parts = [line.removeprefix("data: ") for line in answered.value.text().splitlines() if "{" in line]
        said = "".join(each["delta"].get("content") or "" for part in parts for each in json.loads(part)["choices"])
        assert said
        api.expect(turns.nth(turn)).to_have_text(said, use_inner_text=False)
        sent.append(answered.value.request.post_data_json["messages"])
        api.expect(page.get_by_role("button", name="Send")).to_be_enabled()
    assert [each["role"] for each in sent[1]] == ["user", "assistant", "user"]
    assert sent[1][0] == sent[0][0] and len(sent[0]) == 1 and sent[1][1]["content"]


def take_screenshots(page: Any, folder: Path) -> None:
    page.emulate_media(color_scheme="dark")
    page.screenshot(path=folder / "page.png", full_page=True)
    page.emulate_media(color_scheme="light")
    page.get_by_label("Message to the policy").scroll_into_view_if_needed()
    page.screenshot(path=folder / "page-chat.png")
    page.set_viewport_size({"width": 390, "height": 844})
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(3000)  # the charts follow the width
    page.screenshot(path=folder / "page-phone.png")
    page.set_viewport_size({"width": 1280, "height": 900})


def samples_of(runs: Path, run: str, step: int) -> dict[str, Any]:
    """Those of a step as the page asks for them, once their tokens are written: that is done beside the run."""
    asked = {"step": step, "limit": 10, "tokens": True}
    deadline = time.monotonic() + WAIT_MS / 1000
    while True:
        found = client(runs).get(f"/v1/runs/{run}/samples", params=asked).json()
        if all(found["tokens"]):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def shown(piece: str) -> str:
    """What cannot be seen of a token has a sign."""
    return piece.replace("\r", "␍").replace("\n", "⏎\n").replace("\t", "⇥\t") or "◦"


def assert_colours_follow_the_values(page: Any, found: dict[str, Any]) -> None:
    """Of the samples that the page shows, by advantage: each token has the text, the sign and the strength of its own
    value."""
    page.locator("label", has_text=re.compile("^step")).locator("select").select_option(str(found["step"]))
    page.get_by_text(f"Step {found['step']}: 1 to").wait_for()
    page.locator(".sequence").first.wait_for()
    written = [each for (each,) in found["tokens"]]
    known = [value for each in written for value in each["values"]["advantages"] if value is not None]
    assert len({*known}) > 2 and min(known) < 0 < max(known), "there is something to tell apart"
    sequences = page.locator(".sequence .tokens")
    api.expect(sequences).to_have_count(len(written))
    shares: list[tuple[float, float]] = []
    for index, each in enumerate(written):
        first = each["mask"].index(True)  # the prompt is folded
        values = each["values"]["advantages"][first:]
        painted = (
            sequences.nth(index)
            .locator(".token")
            .evaluate_all(
                "all => all.map(e => [e.innerText, e.classList.contains('plus'), e.classList.contains('minus'),"
                " Number(e.style.getPropertyValue('--share')), getComputedStyle(e).backgroundColor])"
            )
        )
        assert [bool(plus) for _, plus, _, _, _ in painted] == [(value or 0) > 0 for value in values]
        assert [bool(minus) for _, _, minus, _, _ in painted] == [(value or 0) < 0 for value in values]
        shares += [(abs(value or 0), share) for (_, _, _, share, _), value in zip(painted, values, strict=True)]
        assert [text for text, *_ in painted] == [shown(piece) for piece in each["pieces"][first:]]
        assert len({(value, colour) for (*_, colour), value in zip(painted, values)}) == len({*values})
    strengths = [share for _, share in sorted(shares)]
    assert strengths == sorted(strengths) and strengths[-1] == 1, "one scale for all, the strongest at its end"
    strongest = max(value for value, _ in shares)
    told = [each for each in shares if each[0] == 0 or each[0] > strongest / 1000]  # the page writes three digits
    assert [share > 0 for _, share in told] == [value > 0 for value, _ in told]


def test_what_a_sample_says_is_text_and_never_part_of_the_page(page: Any, address: str, tmp_path: Path):
    folder = write_run(tmp_path / "runs", "hostile", metrics=[{"step": 1, "reward": 0.5}])
    log = MetricsLog(folder)
    log.write_completions(
        1, [{"prompt": "<b id=bold>x</b>", "completion": "<img src=x onerror='window.hit = 1'>", "reward": 1.0}] * 2
    )
    log.close()
    hostile = ["<b id=bold>", "<img src=x onerror='window.hit = 1'>", "</div><script>window.hit = 1</script>", "", "漢"]
    nan = float("nan")
    tokens = {"pieces": hostile, "mask": [False, True, True, True, True], "advantages": [nan, 1, -0.5, 0, -1]}
    write_tokens(folder, 1, {0: [tokens | {"sample_logps": [nan, -0.01, -1, -2, -4]}]})
    enter(page, f"{address}/#/runs/hostile")
    page.get_by_text("<img src=x").first.wait_for()
    page.get_by_role("button", name="Open this sample").first.click()
    page.get_by_role("dialog", name="Sample").get_by_role("button", name="Close").click()

    page.get_by_role("button", name="tokens of the prompt").click()
    token = page.locator(".sequence .token")
    assert token.all_inner_texts() == [*hostile[:3], "◦", "漢"]
    token.nth(1).focus()
    page.keyboard.press("ArrowRight")
    told = page.locator(".told")
    assert "advantage\n-0.5\n" in told.inner_text() and "<script>" in told.inner_text()
    assert "mask 1, learned from, advantage -0.5, log-probability, sampler -1 (p = 0.368)" in (
        page.evaluate("document.activeElement.getAttribute('aria-label')")
    ), "what the eye sees is said to the ear"
    page.keyboard.press("Escape")
    assert not told.is_visible()
    assert page.evaluate("window.hit") is None and page.locator("#bold, .samples img, .told img").count() == 0

    def painted(index: int) -> list[Any]:
        return token.nth(index).evaluate("e => [e.className, e.style.getPropertyValue('--share')]")

    assert [painted(index) for index in range(5)] == [
        ["token unlearned", "0.000"], ["token plus", "1.000"], ["token minus", "0.500"], ["token", "0.000"],
        ["token minus", "1.000"],
    ]  # fmt: skip
    assert page.locator(".legend .token").all_inner_texts() == ["-1", "-0.5", "0", "0.5", "1", "not learned from"]
    page.get_by_label("colour tokens by").select_option("sample_logps")
    assert [painted(index) for index in (0, 1, 3)] == [
        ["token unlikely", "0.003"], ["token unlikely", "0.250"], ["token unlikely", "1.000"],
    ]  # fmt: skip
    assert page.locator(".legend .token").all_inner_texts()[2] == "-4 (p = 0.018)"
    page.get_by_label("colour tokens by").select_option("mask")
    page.get_by_role("button", name="tokens of the prompt").click()
    assert [painted(index)[0] for index in (0, 1)] == ["token unlearned", "token plus"]


def test_two_runs_are_drawn_beside_each_other_and_a_wrong_token_is_asked_for_again(
    page: Any, address: str, tmp_path: Path
):
    for name, rewards in (("first", (0.1, 0.2, 0.3)), ("second", (0.2, 0.4))):
        lines = [{"step": 1 + index, "reward": value} for index, value in enumerate(rewards)]
        write_run(tmp_path / "runs", name, metrics=lines)
    page.goto(address)
    page.get_by_label("Token of the service").fill("not-the-token-of-the-service")
    page.get_by_role("button", name="Continue").click()
    enter(page, f"{address}/#/runs/first")
    page.get_by_label("beside").select_option("second")
    page.get_by_text("reward · second").wait_for()
    assert page.get_by_text("reward · first").count() == 1
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function("() => document.documentElement.scrollWidth <= innerWidth")  # of a phone
