"""The listening page: every system's continuation of the same songs side by side, or blind, with ratings."""

import json
from urllib.parse import quote

from continuation.cli import one_line


def page(songs: list[dict]) -> str:
    """One html file that needs no server.

    songs: {"title", "systems": [{"name", "sound", "picture"}]} each; sounds and pictures by paths from the page.
    """
    shown = [
        {"title": one_line(song["title"]), "systems": [
            {"name": one_line(system["name"]), "sound": quote(system["sound"]), "picture": quote(system["picture"])}
            for system in song["systems"]
        ]}
        for song in songs
    ]  # fmt: skip
    content = json.dumps(shown).replace("<", "\\u003c")  # a title must not end, or double, the script it stands in
    return PAGE.replace("@SONGS@", content)


PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Listen</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #26303b; background: #f5f6f8; margin: 2rem auto;
    max-width: 76rem; padding: 0 1rem; }
  h2 { margin: 2rem 0 .5rem; font-size: 1.1rem; }
  .systems { display: grid; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)); gap: 1rem; }
  article { background: white; border-radius: .5rem; padding: .8rem; box-shadow: 0 1px 3px #0002; }
  article h3 { margin: 0 0 .4rem; font-size: .95rem; }
  img, audio { width: 100%; display: block; }
  fieldset { border: 0; padding: .4rem 0 0; margin: 0; display: none; }
  .blind fieldset { display: block; }
  .blind img { display: none; }
  label { margin-right: .8rem; }
  button { font: inherit; padding: .3rem .9rem; margin-right: .5rem; }
</style>
<h1>Ten seconds of a song, and what each system plays next</h1>
<p>The line in each spectrogram is where the song ends and the continuation begins. All sounds of a song have the same
gain.</p>
<p><button id="blind">Blind test</button><button id="save" hidden>Save ratings as CSV</button>
<span id="hint" hidden>Names are hidden and shuffled. 1: noise, 5: could be the song itself.</span></p>
<main></main>
<script id="songs" type="application/json">@SONGS@</script>
<script>
"use strict";
const songs = JSON.parse(document.getElementById("songs").textContent);
const main = document.querySelector("main");
const key = ["ratings", location.pathname, document.lastModified].join(" ");  // a page written anew has none
const ratings = stored();  // by the song's number and the system's name
let blind = false;

function stored() {
  try { return JSON.parse(localStorage.getItem(key)) || {}; } catch { return {}; }  // a browser may forbid storage
}

function rate(what, rating) {
  ratings[what] = rating;
  try { localStorage.setItem(key, JSON.stringify(ratings)); } catch { /* then they last until the page is left */ }
}

function rated(what) {
  return ratings[what] ? ", rated " + ratings[what] : "";
}

function letters(position) {  // A to Z, AA, AB ...
  const last = String.fromCharCode(65 + position % 26);
  return position < 26 ? last : letters(Math.floor(position / 26) - 1) + last;
}

function element(parent, tag, properties) {
  const made = Object.assign(document.createElement(tag), properties);
  parent.append(made);
  return made;
}

function shuffled(list) {
  const copy = [...list];
  for (let i = copy.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [copy[i], copy[j]] = [copy[j], copy[i]];
  }
  return copy;
}

function show() {
  main.replaceChildren();
  main.className = blind ? "blind" : "";
  document.getElementById("blind").textContent = blind ? "Show names" : "Blind test";
  document.getElementById("save").hidden = document.getElementById("hint").hidden = !blind;
  songs.forEach((song, number) => {
    element(main, "h2", { textContent: song.title });
    const grid = element(main, "div", { className: "systems" });
    const systems = blind ? shuffled(song.systems) : song.systems;
    systems.forEach((system, position) => {
      const letter = letters(position), what = number + " " + system.name;
      const card = element(grid, "article", {});
      Object.assign(card.dataset, { song: song.title, letter, system: system.name });
      element(card, "h3", { textContent: blind ? letter : system.name + rated(what) });
      element(card, "img", { src: blind ? "" : system.picture, alt: blind ? "" : "spectrogram of " + system.name });
      element(card, "audio", { src: system.sound, controls: true, preload: "none" });
      const choices = element(card, "fieldset", {});
      for (let rating = 1; rating <= 5; rating++) {
        const label = element(choices, "label", {});
        element(label, "input", { type: "radio", name: number + letter, value: rating,
          checked: ratings[what] === rating, onchange: () => rate(what, rating) });
        label.append(" " + rating);
      }
    });
  });
}

function csv() {
  const inert = (text) => (/^[=+@-]/.test(text) ? "'" : "") + text;  // no formula to a spreadsheet
  const quoted = (text) => '"' + inert(text).replaceAll('"', '""') + '"';
  const rows = [...document.querySelectorAll("article")].map((card) => {
    const rating = card.querySelector("input:checked");
    return [card.dataset.song, card.dataset.letter, card.dataset.system, rating ? rating.value : ""];
  });
  const header = ["song", "letter", "system", "rating"];
  return [header, ...rows].map((row) => row.map(quoted).join(",") + "\\n").join("");
}

document.getElementById("blind").onclick = () => { blind = !blind; show(); };
document.getElementById("save").onclick = () => {
  const file = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  element(document.body, "a", { href: file, download: "ratings.csv" }).click();
};
document.addEventListener("play", (event) => {  // one sound at a time
  document.querySelectorAll("audio").forEach((other) => { if (other !== event.target) other.pause(); });
}, true);
show();
</script>
</html>
"""
