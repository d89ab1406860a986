"""The chat page in a real browser: typing Chinese, streaming, comparing, rating."""

import json
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from tests.browser import chromium, shoot
from tests.serve.conftest import Running

LONG = "4000"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser: Browser, server: Running) -> Iterator[Page]:
    """The page with its models loaded; nothing may be wrong on its console in the end."""
    server.preferences.unlink(missing_ok=True)
    context = browser.new_context(viewport={"width": 1100, "height": 800})
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda told: wrong.append(told.text) if is_wrong(told) else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(server.url)
    expect(page.locator("#first option")).to_have_count(2)
    page.locator("summary").click()
    page.locator("#temperature").fill("0")
    page.locator("#max_tokens").fill("30")
    yield page
    assert wrong == []
    context.close()


def is_wrong(told: ConsoleMessage) -> bool:
    """Whether the browser complains; that a request was refused is said there too."""
    return told.type == "error" and "status of 400" not in told.text


def say(page: Page, text: str) -> None:
    page.locator("#said").fill(text)
    page.locator("#said").press("Enter")


def answer_of(server: Running, model: str, said: str) -> str:
    messages = [{"role": "user", "content": said}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 30}
    told = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
    return str(told["choices"][0]["message"]["content"])


def test_chinese_is_typed_and_answered_and_markup_stays_text(page: Page, server: Running) -> None:
    page.locator("#said").focus()
    session = page.context.new_cdp_session(page)
    session.send("Input.imeSetComposition", {"text": "mao", "selectionStart": 3, "selectionEnd": 3})
    page.evaluate(
        """document.querySelector('#said').dispatchEvent(new KeyboardEvent('keydown',
            {key: 'Enter', isComposing: true, bubbles: true, cancelable: true}))"""
    )
    session.send("Input.insertText", {"text": "猫<b>吃</b>什么？"})
    expect(page.locator(".user")).to_have_count(0)  # Enter chose a word, it did not send
    page.keyboard.press("Enter")
    expect(page.locator(".user")).to_have_text("猫<b>吃</b>什么？")
    expect(page.locator(".answer .row")).to_be_visible()
    expected = answer_of(server, "one", "猫<b>吃</b>什么？")
    assert page.locator(".answer .text").text_content() == expected
    expect(page.locator(".state")).to_have_text("cut at the limit")
    page.keyboard.press("Shift+Enter")
    assert page.locator("#said").input_value() == "\n"


def test_text_appears_as_it_comes_and_stop_stops_it(page: Page, server: Running) -> None:
    page.locator("#max_tokens").fill(LONG)
    say(page, "Tell me a long story.")
    text = page.locator(".answer .text")
    expect(text).not_to_be_empty()
    early = len(text.text_content() or "")
    page.wait_for_function(
        "n => document.querySelector('.answer .text').textContent.length > n", arg=early
    )
    expect(page.locator("#send")).to_be_disabled()
    page.locator("#stop").click()
    expect(page.locator(".state")).to_have_text("stopped")
    expect(page.locator("#send")).to_be_enabled()
    page.locator("#fresh").click()
    expect(page.locator(".answer")).to_have_count(0)


def test_two_checkpoints_are_compared_and_the_choice_becomes_a_pair(
    page: Page, server: Running
) -> None:
    page.locator("#second").select_option("two")
    page.locator("#system").fill("Be brief.")
    say(page, "马在哪里？")
    expect(page.locator(".answer .row:visible")).to_have_count(2)
    page.locator("#system").fill("Be rude.")  # later than the answers
    page.locator(".answer .up").nth(1).click()
    expect(page.locator(".state").nth(1)).to_contain_text("saved as chosen")
    expect(page.locator(".state").nth(0)).to_contain_text("saved as rejected")
    (line,) = server.preferences.read_text("utf-8").splitlines()
    pair = json.loads(line)
    assert [message["role"] for message in pair["prompt"]] == ["system", "user"]
    assert [message["content"] for message in pair["prompt"]] == ["Be brief.", "马在哪里？"]
    assert (pair["chosen_model"], pair["rejected_model"]) == ("two", "one")
    texts = page.locator(".answer .text").all_text_contents()
    assert [pair["rejected"], pair["chosen"]] == texts
    # the conversation goes on with the answer that was liked
    expect(page.locator(".answer").nth(1)).to_have_class("answer goes-on")
    page.locator("#second").select_option("")
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Why?")
    assert asked.value.post_data_json["messages"][2]["content"] == pair["chosen"]
    expect(page.locator(".answer .row:visible")).to_have_count(3)
    page.locator(".answer .up").nth(0).click()  # on second thoughts
    expect(page.locator(".state").nth(0)).to_contain_text("saved as chosen")
    expect(page.locator(".answer [aria-pressed=true]")).to_have_count(1)
    (line,) = server.preferences.read_text("utf-8").splitlines()
    assert json.loads(line)["chosen"] == texts[0]


def test_an_answer_that_is_disliked_gets_another_beside_it(page: Page, server: Running) -> None:
    say(page, "What does the dog eat?")
    expect(page.locator(".answer .row:visible")).to_have_count(1)
    page.locator("#temperature").fill("1.5")
    page.locator(".answer .down").click()
    expect(page.locator(".answer .row:visible")).to_have_count(2)
    assert not server.preferences.exists()
    page.locator(".answer .up").nth(1).click()
    expect(page.locator("#notice")).to_contain_text("Saved in")
    pair = json.loads(server.preferences.read_text("utf-8"))
    assert [pair["rejected"], pair["chosen"]] == page.locator(".answer .text").all_text_contents()


def test_the_oldest_turns_go_when_the_conversation_is_too_long(page: Page) -> None:
    for said in ("鑫" * 800, "鑫" * 801):  # three tokens each: more than 4096 together
        say(page, said)
        expect(page.locator("#send")).to_be_enabled(timeout=20_000)
    expect(page.locator("#notice")).to_contain_text("oldest turns were left out")
    expect(page.locator(".answer .error").nth(1)).to_be_empty()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_at_the_width_of_a_phone(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": 400, "height": 800})
    page.locator("#second").select_option("two")
    say(page, "W" * 200)
    expect(page.locator(".answer .row:visible")).to_have_count(2)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 400
    boxes = [page.locator(".answer").nth(place).bounding_box() for place in (0, 1)]
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]  # one below the other
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(ground[4:].split(",")[0]) < 128) == (scheme == "dark")
    shoot(page, f"chat-{scheme}-400")
    page.set_viewport_size({"width": 1200, "height": 800})
    shoot(page, f"chat-{scheme}-1200")
