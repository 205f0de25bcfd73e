#!/usr/bin/env bash
# Real music to build and measure on: the songs of Debian's free games, as a tree of audio files.
#
#   bash scripts/make_corpus.sh DIR          84 minutes: 18 rock and electronic songs    (about 1 minute)
#   bash scripts/make_corpus.sh DIR full     7.5 hours: 89 files of many styles          (about 5 minutes)
#   bash scripts/make_corpus.sh DIR large    34.7 hours: 630 songs                       (about 8 minutes, 6.6 GB to fetch)
#
# Debian and Ubuntu only: apt-get fetches packages of `main` without installing them. Needs ffmpeg and python3, and
# one `apt-get update` before. The songs are free, under the GPL, Creative Commons or other free licences; each package's
# copyright file, kept beside its songs, names authors and licences. They are not part of this project.
# The first two sizes become mp3s, as users have them; what `large` adds are the packages' own files of 1 to 25 minutes.
# Packages whose songs are already there are left alone.
set -euo pipefail
unset CDPATH  # where it is exported, cd may go elsewhere, and prints

usage="usage: make_corpus.sh DIR [full|large]"
out=${1:?$usage}
size=${2:-}
case $size in "" | full | large) ;; *) echo "$usage" >&2 && exit 2 ;; esac
mp3_packages=(nexuiz-music)
kept_packages=()
[ -z "$size" ] || mp3_packages+=(warzone2100-music wesnoth-1.16-music)
[ "$size" != large ] || kept_packages=(
  0ad-data berusky2-data colobot-common-sounds davegnukem-data drascula-music fillets-ng-data flare-game
  freedroidrpg-data fretsonfire-songs-muldjord fretsonfire-songs-sectoid hedgewars-data marsshooter-data megaglest-data
  naev-data openclonk-data planetblupi-music-ogg pushover-data redeclipse-data singularity-music starfighter-data
  supertux-data supertuxkart-data trackballs-data ufoai-music unknown-horizons warmux-data widelands-data wizznic-data
)
for tool in apt-get dpkg ffmpeg python3; do
  command -v "$tool" >/dev/null && continue
  echo "error: $tool is missing; this script needs Debian or Ubuntu, with ffmpeg and python3" >&2
  exit 2
done

# One song as an mp3 in FOLDER, tags kept, at two typical qualities in turn: variable and constant bit rate.
write_mp3() {
  local folder=$1 song=$2 name quality
  name="$(basename "$(dirname "$song")") - $(basename "${song%.*}").mp3"
  if (($(cksum <<<"$name" | cut -d ' ' -f 1) % 2)); then quality=(-q:a 2); else quality=(-b:a 192k); fi
  ffmpeg -nostdin -v error -y -i "$song" -vn "${quality[@]}" "$folder/part-$name"
  mv "$folder/part-$name" "$folder/$name"
}

# One song of 1 to 25 minutes as it is in FOLDER.
keep_song() {
  local folder=$1 song=$2 seconds
  seconds=$(ffprobe -v error -show_entries format=duration -of csv=p=0 "$song")
  [[ ${seconds%.*} =~ ^[0-9]+$ ]] && ((${seconds%.*} >= 60 && ${seconds%.*} < 1500)) || return 0
  mv "$song" "$folder/$(basename "$(dirname "$song")") - $(basename "$song")"
}
export -f write_mp3 keep_song

# The songs of PACKAGE, each by FUNCTION, in a folder of its name; sound effects are left out.
make_package() {
  local function=$1 package=$2 unpacked=$scratch/$2
  [ -e "$out/.$package.done" ] && return
  mkdir -p "$unpacked" "$out/$package"
  (cd "$scratch" && apt-get download -q -o APT::Sandbox::User=root "$package" >/dev/null)
  dpkg -x "$scratch/$package"_*.deb "$unpacked"
  rm "$scratch/$package"_*.deb
  cp "$unpacked/usr/share/doc/$package/copyright" "$out/$package/"
  find "$unpacked" \( -name '*.pk3' -o -name '*.zip' \) -execdir python3 -m zipfile -e {} . \;
  find "$unpacked" -type f \( -iname '*.ogg' -o -iname '*.opus' -o -iname '*.mp3' \) -print0 |
    grep -zEv '/(sfx|sounds|weather|dayscape|environment|animals)/[^/]*$|/guitar\.ogg$' | sort -z |
    xargs -0 -r -P 2 -n 1 bash -euc '"$@"' _ "$function" "$out/$package"
  rm -rf "$unpacked"
  touch "$out/.$package.done"
}

mkdir -p -- "$out"
out=$(cd -- "$out" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for package in "${mp3_packages[@]}"; do make_package write_mp3 "$package"; done
for package in "${kept_packages[@]}"; do make_package keep_song "$package"; done
echo "songs in $out: $(find "$out" -type f ! -name copyright ! -name '.*' | wc -l)"
