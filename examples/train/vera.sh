#!/usr/bin/env bash
# The abbreviations of computing of V.E.R.A. (Oliver Heidelbach and others, GFDL 1.1 or later), from Debian's package
# dict-vera: on each line an abbreviation, a tab, and what it is short for, without remarks.
set -euo pipefail
out=${1:?name a file, as vera.tsv}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 - "$folder" "$out" <<'END'
import collections, gzip, io, lzma, re, sys, tarfile, urllib.request

folder, out = sys.argv[1:]
url = "http://deb.debian.org/debian/pool/main/v/vera/dict-vera_1.24-1_all.deb"
package = urllib.request.urlopen(url, timeout=60).read()

# An ar archive: after 8 bytes, members with headers of 60, each at an even place.
at, members = 8, {}
while at < len(package):
    name, size = package[at:at + 16].decode().strip().rstrip("/"), int(package[at + 48:at + 58])
    members[name] = package[at + 60:at + 60 + size]
    at += 60 + size + size % 2
(data,) = (members[name] for name in members if name.startswith("data.tar"))
files = tarfile.open(fileobj=io.BytesIO(data))
(name,) = (name for name in files.getnames() if name.endswith("vera.dict.dz"))
text = gzip.decompress(files.extractfile(name).read()).decode()

entries = []
for line in text.split("\n"):
    if re.fullmatch(r"[A-Z0-9][A-Z0-9&/+.-]*", line):
        entries.append((line, []))
    elif line.strip() and entries:
        entries[-1][1].append(line.strip())
times = collections.Counter(word for word, _ in entries)
kept = 0
with open(out, "w", encoding="utf-8") as file:
    for word, lines in entries:
        meaning = " ".join(lines)
        meaning = re.sub(r"\([^()]*\)|\[|\]|\"[^\"]*\"|, *$", "", meaning)
        meaning = " ".join(meaning.split()).rstrip(",; ")
        # One meaning, in words, of an abbreviation of letters.
        if times[word] == 1 and re.fullmatch(r"[A-Z]{2,8}", word) and re.fullmatch(r"[A-Za-z][A-Za-z' -]{5,59}", meaning):
            file.write(f"{word}\t{meaning}\n")
            kept += 1
print(f"{kept} of {len(entries)} entries in {out}")
END
