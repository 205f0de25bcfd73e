"""The listening page holds what it was given, and keeps the ratings of a listener; the latter in a real browser."""

import csv
import html
import json
import shutil
import string
import subprocess
from urllib.parse import unquote

import pytest

import listen


def test_page_is_not_ended_by_a_title_nor_lost_by_a_strange_path():
    title, path = "</script><b>", "sounds/100 %#1/?.wav"
    page = listen.page([{"title": title, "systems": [{"name": "truth", "sound": path, "picture": path}]}])
    (song,) = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    assert song["title"] == title
    assert unquote(song["systems"][0]["sound"]) == path
    assert not set(song["systems"][0]["sound"]) & set(" #?")


@pytest.fixture
def in_browser(tmp_path):
    """Open a page of two songs and so many systems, run a script in it: the value of its last expression."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium")

    def run(systems: int, script: str):
        made = [{"name": f"system {number}", "sound": "none.wav", "picture": "none.png"} for number in range(systems)]
        page = listen.page([{"title": title, "systems": made} for title in ("one", "two")])
        path = tmp_path / "listen.html"
        path.write_text(f"{page}<script>document.title = JSON.stringify(eval({json.dumps(script)}))</script>")
        flags = ["--headless", "--no-sandbox", f"--user-data-dir={tmp_path}", "--virtual-time-budget=5000"]
        done = subprocess.run([program, *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True)
        return json.loads(html.unescape(done.stdout.partition("<title>")[2].partition("</title>")[0]))

    return run


BLIND, NAMED = "blind = true; show();", "blind = false; show();"
CARD = "[data-song=two][data-system='system 1']"
RATE = f"{BLIND} document.querySelector(\"{CARD} input[value='4']\").click();"
HEADINGS = "[...document.querySelectorAll('h3')].map((name) => name.textContent)"


def test_systems_beyond_the_26th_have_two_letters_in_the_blind_test(in_browser):
    assert in_browser(29, BLIND + HEADINGS) == 2 * [*string.ascii_uppercase, "AA", "AB", "AC"]


def test_names_are_shown_with_their_ratings(in_browser):
    assert in_browser(2, RATE + NAMED + HEADINGS) == ["system 0", "system 1", "system 0", "system 1, rated 4"]


@pytest.mark.parametrize("then", [NAMED, "location.search = '?again'; throw 'left';"])
def test_ratings_survive_a_look_at_the_names_and_a_reload(in_browser, then):
    text = in_browser(2, f"if (!location.search) {{ {RATE} {then} }} {BLIND} csv()")
    rated = [row for row in csv.DictReader(text.splitlines()) if row["rating"]]
    assert [(row["song"], row["system"], row["rating"]) for row in rated] == [("two", "system 1", "4")]
