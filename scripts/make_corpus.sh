#!/usr/bin/env bash
# Real music to build and measure on: the songs of Debian's free game-music packages, as a tree of mp3 files.
#
#   bash scripts/make_corpus.sh DIR          84 minutes: 18 rock and electronic songs   (about 1 minute)
#   bash scripts/make_corpus.sh DIR full     7.5 hours: 89 files of many styles         (about 5 minutes)
#
# Debian and Ubuntu only: the songs come out of the packages nexuiz-music and, with `full`,
# warzone2100-music and wesnoth-1.16-music, which apt-get fetches without installing them. Needs ffmpeg and
# python3, and one `apt-get update` before. The songs are free, under the GPL or Creative Commons licences;
# each package's copyright file, kept beside its songs, names authors and licences. They are not part of this
# project.
# Packages whose songs are already there are left alone.
set -euo pipefail
unset CDPATH  # where it is exported, cd may go elsewhere, and prints

usage="usage: make_corpus.sh DIR [full]"
out=${1:?$usage}
packages=(nexuiz-music)
case "${2:-}" in
  "") ;;
  full) packages+=(warzone2100-music wesnoth-1.16-music) ;;
  *) echo "$usage" >&2 && exit 2 ;;
esac
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
export -f write_mp3

mkdir -p -- "$out"
out=$(cd -- "$out" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
for package in "${packages[@]}"; do
  [ -e "$out/.$package.done" ] && continue
  unpacked=$scratch/$package
  mkdir -p "$unpacked" "$out/$package"
  (cd "$scratch" && apt-get download -q -o APT::Sandbox::User=root "$package" >/dev/null)
  dpkg -x "$scratch/$package"_*.deb "$unpacked"
  cp "$unpacked/usr/share/doc/$package/copyright" "$out/$package/"
  find "$unpacked" -name '*.pk3' -execdir python3 -m zipfile -e {} . \;
  find "$unpacked" -type f \( -iname '*.ogg' -o -iname '*.opus' \) -print0 | sort -z |
    xargs -0 -P 2 -n 1 bash -euc 'write_mp3 "$@"' _ "$out/$package"
  rm -rf "$unpacked"
  touch "$out/.$package.done"
done
echo "mp3 files in $out: $(find "$out" -name '*.mp3' | wc -l)"
