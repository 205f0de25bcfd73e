"""The listening page holds what it was given, and keeps the ratings of a listener; the latter in a real browser."""

import csv
import html
import json
import string
import subprocess
from urllib.parse import unquote

import pytest

from continuation import listening_page


def test_page_is_not_ended_by_a_title_nor_lost_by_a_strange_path():
    title, path = "</script><b>", "sounds/100 %#1/?.wav"
    page = listening_page.page([{"title": title, "systems": [{"name": "truth", "sound": path, "picture": path}]}])
    (song,) = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    assert song["title"] == title
    assert unquote(song["systems"][0]["sound"]) == path
    assert not set(song["systems"][0]["sound"]) & set(" #?")


def test_title_stays_on_its_line_and_is_text_that_a_browser_can_show():
    system = {"name": "b\r", "sound": "b.wav", "picture": "b.png"}
    page = listening_page.page([{"title": "a\n\x1b\udcff", "systems": [system]}])
    (song,) = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    assert (song["title"], song["systems"][0]["name"]) == (r"a\n\x1b\udcff", r"b\r")


# A frame is reloaded in its own process, which keeps the storage in memory. A page by itself may be loaded by another
# process, which at times sees the storage before what the first one wrote has arrived.
FRAME = """<!DOCTYPE html><title></title><script>
const scripts = @SCRIPTS@, frame = document.createElement("iframe"), kept = localStorage.length;
frame.onload = () => {
  const value = frame.contentWindow.eval(scripts.shift());
  if (scripts.length) frame.contentWindow.location.reload(); else document.title = JSON.stringify(value);
};
frame.src = "listen.html";
document.documentElement.append(frame);
</script>"""


@pytest.fixture
def in_browser(chromium, tmp_path):
    """Open a page of these songs and so many systems, run scripts in it, with a reload between: the last value."""

    def run(systems: int, *scripts: str, titles=("one", "two"), name="system"):
        made = [{"name": f"{name} {number}", "sound": "none.wav", "picture": "none.png"} for number in range(systems)]
        page = listening_page.page([{"title": title, "systems": made} for title in titles])
        (tmp_path / "listen.html").write_text(page)
        frame = tmp_path / "frame.html"
        frame.write_text(FRAME.replace("@SCRIPTS@", json.dumps(scripts)))
        flags = ["--headless", "--no-sandbox", f"--user-data-dir={tmp_path}", "--allow-file-access-from-files"]
        command = [chromium, *flags, "--virtual-time-budget=5000", "--dump-dom", frame.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True)
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


@pytest.mark.parametrize("scripts", [[f"{RATE} {NAMED} {BLIND} csv()"], [RATE, f"{BLIND} csv()"]])
def test_ratings_survive_a_look_at_the_names_and_a_reload(in_browser, scripts):
    text = in_browser(2, *scripts)
    rated = [row for row in csv.DictReader(text.splitlines()) if row["rating"]]
    assert [(row["song"], row["system"], row["rating"]) for row in rated] == [("two", "system 1", "4")]


def test_name_that_looks_like_the_page_blanks_nothing(in_browser):
    name = "<!--<script>"
    shown = "[...document.querySelectorAll('h2, h3')].map((heading) => heading.textContent)"
    assert in_browser(1, shown, titles=[name], name=name) == [name, f"{name} 0"]


@pytest.mark.parametrize("first", "=+-@")
def test_ratings_hold_no_formula(in_browser, first):
    text = in_browser(1, f"{BLIND} csv()", titles=[f'{first}HYPERLINK("x", "y")'], name=f"{first}1")
    (row,) = csv.DictReader(text.splitlines())
    assert (row["song"], row["system"]) == (f'\'{first}HYPERLINK("x", "y")', f"'{first}1 0")
