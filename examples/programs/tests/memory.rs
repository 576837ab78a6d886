//! `hybrid memory`, run as a person would run it, beside the library.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use candle_core::Device;
use hybrid_attention::memory::evaluate::{
    Continuation, Conversations, Generics, Given, Held, Passage, Retrieval, Story,
};
use hybrid_attention::memory::{Embedded, Embedding, MainPoint, Memory, NoteId, Recall, Salience};
use hybrid_attention::{GenerationConfig, HybridModel};
use hybrid_attention_testing::{Result, checkpoint};
use serde_json::{Value, json};

const TEXTS: [&str; 3] =
    ["the cat sat on the mat", "the dog sat about\nin the sun", "a boat is on the sea"];

fn run(args: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hybrid-under-test"));
    hybrid_attention_testing::run(command.arg("memory").args(args), "")
}

/// Standard output of a run that succeeds.
fn succeed(args: &[&str]) -> Result<String> {
    let output = run(args)?;
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Standard error of a run that fails, having printed nothing.
fn fail(args: &[&str]) -> Result<String> {
    let output = run(args)?;
    assert!(!output.status.success() && output.stdout.is_empty(), "{args:?}");
    Ok(String::from_utf8(output.stderr)?)
}

fn lines(text: &str) -> Result<Vec<Value>> {
    Ok(text.lines().map(serde_json::from_str).collect::<serde_json::Result<_>>()?)
}

fn load(folder: &Path) -> Result<HybridModel> {
    Ok(HybridModel::from_folder(folder, None, &Device::Cpu)?)
}

/// A file of [`TEXTS`] each, in `folder`; their paths.
fn files(folder: &Path) -> Result<Vec<String>> {
    let write = |(index, text): (usize, &&str)| {
        let path = folder.join(format!("{index}.txt"));
        fs::write(&path, format!("{text}\n"))?;
        Ok(path.to_str().ok_or("no text")?.to_owned())
    };
    TEXTS.iter().enumerate().map(write).collect()
}

#[test]
fn what_was_added_is_found_as_the_library_finds_it() -> Result {
    let folder = checkpoint(1.0, true)?;
    let model = load(folder.path())?;
    let path = folder.path().to_str().ok_or("no text")?;
    let (files, store) = (files(folder.path())?, folder.path().join("notes.redb"));
    let at = store.to_str().ok_or("no text")?;
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    for (file, tag) in files.iter().zip(["pet", "pet", "sea"]) {
        let tag = format!("--tag=kind={tag}");
        let added = ["add", "--store", at, "--model", path, &tag, "--tag=a=b=c", file];
        let added = lines(&succeed(&added)?)?;
        let text = fs::read_to_string(file)?;
        let text = text.trim();
        assert_eq!(
            added,
            [json!({
                "id": NoteId::of(text), "text": text, "source": file, "spans": [],
                "tokens": tokenizer.encode(text, true)?.len(),
                "tags": { "kind": tag.rsplit('=').next(), "a": "b=c" },
            })]
        );
    }

    let question = "where is the cat?";
    let ask = ["ask", "--store", at, "--model", path, question];
    let some = [&ask[..], &["--max-tokens=6"]].concat();
    let report: Value =
        serde_json::from_str(&succeed(&[&some[..], &["--json", "--best=2"]].concat())?)?;
    let memory = Memory::open(&store, &model)?;
    let recall = Recall::best(2);
    let found = memory.recall(question, &recall)?;
    let reported = report["found"].as_array().ok_or("no list")?;
    assert_eq!(reported.len(), 2);
    for (reported, note) in reported.iter().zip(&found) {
        assert_eq!((&reported["id"], &reported["text"]), (&json!(note.id), &json!(note.text)));
        assert_eq!(serde_json::from_value::<f32>(reported["score"].clone())?, note.score);
        // Of whole texts, the words are found when asked.
        let point = MainPoint::of(&model, &note.text, &Salience::received())?;
        let spans: Vec<(usize, usize, f32)> = serde_json::from_value(reported["spans"].clone())?;
        let right = point.spans().iter().map(|it| (it.bytes.start, it.bytes.end, it.score));
        assert_eq!(spans, right.collect::<Vec<_>>());
        assert!(!spans.is_empty());
    }
    let config = GenerationConfig::default().max_tokens(6);
    let answer = model.generate(memory.prompt(question, &recall)?, &config)?;
    assert_eq!(report["answer"]["ids"], json!(answer.ids));
    assert_eq!(report["answer"]["prompt_ids"], json!(answer.prompt_ids));
    drop(memory);

    let sea: Value =
        serde_json::from_str(&succeed(&[&some[..], &["--json", "--tag=kind=sea"]].concat())?)?;
    assert_eq!(sea["found"].as_array().map(Vec::len), Some(1));
    assert_eq!(sea["found"][0]["text"], TEXTS[2]);
    let none = run(&[&ask[..], &["--tag=kind=none", "--max-tokens=0"]].concat())?;
    assert!(none.status.success() && none.stdout.is_empty());
    assert!(String::from_utf8(none.stderr)?.contains("nothing was found"));

    // For people: marks, but no styles where there is no terminal; lines below each other.
    let shown = succeed(&some)?;
    assert!(shown.starts_with("1. ") && !shown.contains('\x1b'), "{shown}");
    let plain = shown.replace('*', "");
    assert!(shown.matches('*').count() >= 6 && plain.contains("\n   in the sun"), "{shown}");
    for (text, file) in TEXTS.iter().zip(&files) {
        let first = text.lines().next().unwrap_or_default();
        assert!(plain.contains(first) && shown.contains(file), "{shown}");
    }
    let answer = succeed(&[&ask[..], &["--max-tokens=0"]].concat())?;
    assert!(shown.starts_with(&answer) && shown.len() > answer.len());
    Ok(())
}

#[test]
fn notes_are_listed_corrected_forgotten_and_carried_over() -> Result {
    let folder = checkpoint(1.0, true)?;
    let path = folder.path().to_str().ok_or("no text")?;
    let files = files(folder.path())?;
    let (store, other) = (folder.path().join("a.redb"), folder.path().join("b.redb"));
    let at = store.to_str().ok_or("no text")?;
    succeed(&["add", "--store", at, "--model", path, &files[0], &files[1]])?;
    let (old, new) = (NoteId::of(TEXTS[0]).to_string(), NoteId::of(TEXTS[2]).to_string());
    let correct = ["add", "--store", at, "--model", path, "--supersede", &old];
    assert!(fail(&[&correct[..], &[&files[1], &files[2]]].concat())?.contains("several"));
    succeed(&[&correct[..], &[&files[2]]].concat())?;

    let listed = succeed(&["list", "--store", at])?;
    assert_eq!(listed.lines().count(), 3);
    let past = format!("{old} (superseded by {new}) {}", TEXTS[0]);
    assert!(listed.lines().any(|line| line == past), "{listed}");
    assert!(listed.contains("the dog sat about in the sun"), "on one line: {listed}");
    let listed = succeed(&["list", "--store", at, "--json"])?;
    let mut names: Vec<Value> = lines(&listed)?.iter().map(|it| it["id"].clone()).collect();
    names.sort_by_key(Value::to_string);
    let mut right: Vec<Value> = TEXTS.iter().map(|text| json!(NoteId::of(text))).collect();
    right.sort_by_key(Value::to_string);
    assert_eq!(names, right);

    let file = folder.path().join("notes.jsonl");
    fs::write(&file, &listed)?;
    let (file, to) = (file.to_str().ok_or("no text")?, other.to_str().ok_or("no text")?);
    succeed(&["import", "--store", to, "--model", path, "--embed=words", file])?;
    let carried = |text: &str| -> Result<Vec<Value>> {
        let mut notes = lines(text)?;
        notes.iter_mut().filter_map(Value::as_object_mut).for_each(|note| {
            note.remove("spans");
        });
        Ok(notes)
    };
    assert_eq!(carried(&succeed(&["list", "--store", to, "--json"])?)?, carried(&listed)?);

    let unknown = NoteId::of("x").to_string();
    assert!(fail(&["forget", "--store", at, &new, &unknown])?.contains(&unknown));
    assert_eq!(succeed(&["list", "--store", at])?.lines().count(), 3, "none was forgotten");
    succeed(&["forget", "--store", at, &old, &new])?;
    assert_eq!(lines(&succeed(&["list", "--store", at, "--json"])?)?[0]["text"], TEXTS[1]);
    Ok(())
}

#[test]
fn a_store_keeps_to_what_it_was_made_with() -> Result {
    let folder = checkpoint(1.0, true)?;
    let path = folder.path().to_str().ok_or("no text")?;
    let (files, store) = (files(folder.path())?, folder.path().join("notes.redb"));
    let at = store.to_str().ok_or("no text")?;
    let base = ["add", "--store", at, "--model", path];
    let how = ["--embed=main-point", "--salience=received", "--share=0.5"];
    let first = lines(&succeed(&[&base[..], &how, &[&files[0]]].concat())?)?;
    let second = lines(&succeed(&[&base[..], &[&files[1]]].concat())?)?;
    let model = load(folder.path())?;
    for (added, text) in [(&first, TEXTS[0]), (&second, TEXTS[1])] {
        let point = MainPoint::of(&model, text, &Salience::received().share(0.5))?;
        let right = point.spans().iter().map(|it| (it.bytes.start, it.bytes.end, it.score));
        let spans: Vec<(usize, usize, f32)> = serde_json::from_value(added[0]["spans"].clone())?;
        assert_eq!(spans, right.collect::<Vec<_>>(), "{text}");
    }
    let report: Value = serde_json::from_str(&succeed(&[
        "ask",
        "--store",
        at,
        "--model",
        path,
        "--json",
        "--max-tokens=1",
        TEXTS[0],
    ])?)?;
    assert_eq!(report["found"][0]["spans"], first[0]["spans"], "as the store says");
    for other in
        [&["--embed=whole"][..], &["--embed=main-point", "--salience=leverage", "--share=0.5"]]
    {
        let stderr = fail(&[&base[..], other, &[&files[2]]].concat())?;
        assert!(stderr.contains("its notes were embedded by {\"main_point\""), "{stderr}");
    }
    let embedding = Embedding::MainPoint(Salience::received().share(0.5));
    assert_eq!(Memory::over(Embedded::open(&store)?, &model, embedding)?.len()?, 2);
    Ok(())
}

#[test]
fn files_become_notes_as_they_are_told() -> Result {
    let folder = checkpoint(1.0, true)?;
    let path = folder.path().to_str().ok_or("no text")?;
    let file = folder.path().join("long.txt");
    let sentence = "The cat sat on the mat, and the dog sat about. ";
    fs::write(&file, format!("first  line\nsecond line\n \n\n{}\n", sentence.repeat(40)))?;
    let file = file.to_str().ok_or("no text")?;
    let texts = |name: &str, more: &[&str]| -> Result<Vec<String>> {
        let store = folder.path().join(name);
        let at = store.to_str().ok_or("no text")?;
        let added = succeed(&[&["add", "--store", at, "--model", path, file], more].concat())?;
        let texts = lines(&added)?.into_iter();
        Ok(texts.filter_map(|it| it["text"].as_str().map(str::to_owned)).collect())
    };
    let model = load(folder.path())?;
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    let long = sentence.repeat(40);
    assert!(tokenizer.encode(&long, true)?.len() > model.config().max_position_embeddings);
    // A file that is too long for the model is several notes, of at most half of its context.
    let whole = texts("whole", &[])?;
    assert!(whole.len() > 3 && whole[0].starts_with("first  line\nsecond line"), "{whole:?}");
    assert!(whole.iter().skip(1).all(|text| text.ends_with('.')), "{whole:?}");
    for text in &whole {
        assert!(tokenizer.encode(text, true)?.len() <= 128);
    }
    let paragraphs = texts("paragraphs", &["--split=paragraphs", "--tokens=200"])?;
    assert_eq!(paragraphs[0], "first  line\nsecond line");
    assert!(paragraphs.len() > 2 && paragraphs[1].starts_with("The cat"));
    let short = texts("lines", &["--split=lines", "--tokens=16"])?;
    assert_eq!(short[..2], ["first  line", "second line"]);
    for text in &short {
        assert!(tokenizer.encode(text, true)?.len() <= 16, "{text}");
    }
    Ok(())
}

#[test]
fn what_is_wrong_is_named_before_anything_is_written() -> Result {
    let folder = checkpoint(1.0, true)?;
    let path = folder.path().to_str().ok_or("no text")?;
    let files = files(folder.path())?;
    let (empty, store) = (folder.path().join("empty.txt"), folder.path().join("notes.redb"));
    fs::write(&empty, " \n\n")?;
    let (empty, at) = (empty.to_str().ok_or("no text")?, store.to_str().ok_or("no text")?);
    let (text, none) = (files[0].as_str(), "/no/such/folder/notes.redb");
    for (args, expected) in [
        (vec!["add", "--store", at, "--model", path, "no such.txt"], "no such.txt: "),
        (vec!["add", "--store", at, "--model", path, text, empty], "empty.txt: no text"),
        (vec!["add", "--store", none, "--model", path, text], "folder does not exist"),
        (vec!["add", "--store", at, "--model", path, "--tag=x", text], "like project=harbour"),
        (vec!["add", "--store", at, "--model", path, "--share=0.5", text], "--embed"),
        (
            vec!["add", "--store", at, "--model", path, "--embed=whole", "--share=0.5", text],
            "--share",
        ),
        (vec!["add", "--store", at, "--model", path, "--embed=words", "--share=2", text], "share"),
        (vec!["ask", "--store", at, "--model", path, "why?"], "notes.redb: no such file"),
        (vec!["list", "--store", at], "notes.redb: no such file"),
        (vec!["forget", "--store", at, "00"], "32 hexadecimal digits"),
        (vec!["import", "--store", at, "--model", path, "no such.jsonl"], "no such.jsonl"),
    ] {
        let stderr = fail(&args)?;
        assert!(stderr.contains(expected), "{args:?}: {stderr}");
        assert!(!store.exists(), "{args:?}");
    }
    fs::write(&store, "not a store")?;
    assert!(fail(&["list", "--store", at])?.contains("notes.redb"));
    Ok(())
}

#[test]
fn eval_prints_the_figures_of_the_library() -> Result {
    let folder = checkpoint(1.0, true)?;
    let path = folder.path().to_str().ok_or("no text")?;
    let texts = [
        "the cat sat on the mat about the dog, and the dog sat on the mat in the sun",
        "too short",
        "a boat is on the sea, about the old town in the rain, and no one sat in it at all",
        "in the town the old clock and the red door sat about in the rain on the dog",
    ];
    let file = folder.path().join("texts.txt");
    fs::write(&file, texts.join("\n"))?;
    let file = file.to_str().ok_or("no text")?;
    let base =
        ["eval", "--model", path, "--texts", file, "--tokens=8", "--shares=0.3", "--draws=2"];
    let report: Value = serde_json::from_str(&succeed(&[&base[..], &["--json"]].concat())?)?;
    let model = load(folder.path())?;
    let cut = |text: &&str| Passage::cut(&model, text, 8).transpose();
    let passages: Vec<Passage> =
        texts.iter().filter_map(cut).collect::<hybrid_attention::Result<_>>()?;
    let retrieval = Retrieval { shares: vec![0.3], draws: 2, ..Retrieval::default() };
    let rows = retrieval.run(&model, &passages, || ())?;
    assert_eq!((&report["passages"], &report["tokens"]), (&json!(3), &json!(8)));
    let reported = report["rows"].as_array().ok_or("no list")?;
    assert_eq!(reported.len(), rows.len());
    let table = succeed(&base)?;
    let cells: Vec<Vec<&str>> = table
        .lines()
        .filter(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| line.split('|').map(str::trim).collect())
        .collect();
    assert_eq!(cells.len(), rows.len(), "{table}");
    let whole = &rows[0].reciprocal_ranks;
    for ((reported, row), cells) in reported.iter().zip(&rows).zip(&cells) {
        assert_eq!(reported["name"], row.name);
        let ranks: Vec<f64> = serde_json::from_value(reported["reciprocal_ranks"].clone())?;
        assert_eq!(ranks, row.reciprocal_ranks);
        let mean = ranks.iter().sum::<f64>() / 3.0;
        assert!((reported["mrr"]["mean"].as_f64().ok_or("no number")? - mean).abs() < 1e-12);
        assert_eq!(cells[3], row.name, "{table}");
        assert!(cells[4].starts_with(&format!("{mean:.3} ± ")), "{table}");
        let less = mean - whole.iter().sum::<f64>() / 3.0;
        match row.name.as_str() {
            "whole" => assert_eq!(cells[5], ""),
            _ => {
                let less_whole = reported["less_whole"]["mean"].as_f64().ok_or("no number")?;
                assert!((less_whole - less).abs() < 1e-12);
                assert!(!cells[5].is_empty());
            }
        }
        let beside_chance = row.share.is_some() && row.name != "random";
        assert_eq!(reported["less_random"].is_null(), !beside_chance, "{}", row.name);
        assert_eq!(cells[6].is_empty(), !beside_chance);
    }
    let stderr = fail(&[&base[..], &["--passages=1"]].concat())?;
    assert!(stderr.contains("at least 2"), "{stderr}");
    Ok(())
}

/// The cells of a Markdown table, below its head.
fn cells(table: &str) -> Vec<Vec<&str>> {
    let lines = table.lines().filter(|line| line.starts_with('|')).skip(2);
    lines.map(|line| line.split('|').map(str::trim).collect()).collect()
}

#[test]
fn eval_of_continuations_prints_the_figures_of_the_library() -> Result {
    let folder = checkpoint(1.0, true)?;
    let path = folder.path().to_str().ok_or("no text")?;
    let texts = [
        "the cat sat on the mat about the dog, and the dog sat on the mat in the sun",
        "a boat is on the sea, about the old town in the rain, and no one sat in it at all",
    ];
    let file = folder.path().join("texts.txt");
    fs::write(&file, texts.join("\n"))?;
    let file = file.to_str().ok_or("no text")?;
    let base = ["eval", "--what=continuation", "--model", path, "--texts", file, "--tokens=8"];
    let base =
        [&base[..], &["--draws=2", "--shares=0.5", "--salience=received,last-queries"]].concat();
    let report: Value = serde_json::from_str(&succeed(&[&base[..], &["--json"]].concat())?)?;
    let model = load(folder.path())?;
    let cut = |text: &&str| Passage::cut(&model, text, 8).transpose();
    let passages: Vec<Passage> =
        texts.iter().filter_map(cut).collect::<hybrid_attention::Result<_>>()?;
    let ways = [("received", Salience::received()), ("last-queries", Salience::last_queries(8))];
    let ways = ways.map(|(name, salience)| (name.to_owned(), salience)).into();
    let continuation = Continuation { ways, shares: vec![0.5], draws: 2 };
    let rows = continuation.run(&model, &passages, || ())?;
    let table = succeed(&base)?;
    let (reported, cells) = (report["rows"].as_array().ok_or("no list")?, cells(&table));
    assert_eq!((reported.len(), cells.len()), (rows.len(), rows.len()), "{table}");
    let find = |name: &str| rows.iter().find(|row| row.name == name).ok_or("no row");
    let mean = |row: &Given| row.losses.iter().sum::<f64>() / row.losses.len() as f64;
    let (nothing, random) = (mean(find("nothing")?), mean(find("random")?));
    for ((reported, row), cells) in reported.iter().zip(&rows).zip(&cells) {
        let losses: Vec<f64> = serde_json::from_value(reported["losses"].clone())?;
        assert_eq!((&losses, reported["name"].as_str()), (&row.losses, Some(row.name.as_str())));
        assert_eq!(cells[2], row.name, "{table}");
        assert!(cells[4].starts_with(&format!("{:.3} ± ", mean(row))), "{table}");
        let less = |than: &Value| than["mean"].as_f64();
        let is = |found: Option<f64>, right: Option<f64>| match (found, right) {
            (Some(found), Some(right)) => (found - right).abs() < 1e-9,
            (found, right) => found == right,
        };
        let right = (row.name != "nothing").then(|| mean(row) - nothing);
        assert!(is(less(&reported["less_nothing"]), right), "{reported}");
        let right = (row.share.is_some() && row.name != "random").then(|| mean(row) - random);
        assert!(is(less(&reported["less_random"]), right), "{reported}");
    }
    Ok(())
}

#[test]
fn eval_of_generics_prints_the_figures_of_the_library() -> Result {
    let folder = checkpoint(1.0, true)?;
    let path = folder.path().to_str().ok_or("no text")?;
    let model = load(folder.path())?;
    let words = ["cat", "dog", "boat", "town", "door", "rain", "sun"];
    let text = |at: usize| {
        let word = |by: usize| words[(at * by + by) % words.len()];
        format!(
            "the {} sat on the {} about the {}, and the {} is in the {} on the sea",
            word(1),
            word(2),
            word(3),
            word(4),
            word(5)
        )
    };
    let write = |name: &str, texts: std::ops::Range<usize>| -> Result<(String, Vec<Passage>)> {
        let texts: Vec<String> = texts.map(text).collect();
        let file = folder.path().join(name);
        fs::write(&file, texts.join("\n\n"))?;
        let cut = texts.iter().filter_map(|text| Passage::cut(&model, text, 8).transpose());
        let passages = cut.collect::<hybrid_attention::Result<Vec<_>>>()?;
        Ok((file.to_str().ok_or("no text")?.to_owned(), passages))
    };
    let (texts, tested) = write("texts.txt", 0..4)?;
    let (others, rest) = write("others.txt", 4..19)?;
    let base = ["eval", "--what=generic", "--model", path, "--texts", &texts, "--others", &others];
    let base =
        [&base[..], &["--tokens=8", "--passages=4", "--layers=1", "--directions=1,2", "--draws=2"]]
            .concat();
    let report: Value = serde_json::from_str(&succeed(&[&base[..], &["--json"]].concat())?)?;
    let generics = Generics { layers: vec![Some(1), None], counts: vec![1, 2], draws: 2 };
    let tests = [&tested[..], &rest[8..12]];
    let right = generics.run(&model, [&rest[..4], &rest[4..8]], &tests, || ())?;
    let table = succeed(&base)?;
    let mut lines =
        table.lines().filter(|line| line.starts_with("| entering") || line.starts_with("| behind"));
    assert_eq!((&report["fit"], &report["choose"]), (&json!(4), &json!(4)));
    for (reported, right) in report["tests"].as_array().ok_or("no list")?.iter().zip(&right) {
        assert_eq!(reported["passages"], 4);
        let mean = |row: &[f64]| row.iter().sum::<f64>() / row.len() as f64;
        let default = mean(&right.layers[1].rows[0].reciprocal_ranks);
        for (reported, at) in
            reported["layers"].as_array().ok_or("no list")?.iter().zip(&right.layers)
        {
            assert_eq!((&reported["layer"], &reported["k"]), (&json!(at.layer), &json!(at.k)));
            assert_eq!(
                (&reported["chosen"], &reported["mean"]),
                (&json!(at.chosen), &json!(at.explained.mean))
            );
            let nothing = mean(&at.rows[0].reciprocal_ranks);
            for (reported, row) in
                reported["rows"].as_array().ok_or("no list")?.iter().zip(&at.rows)
            {
                assert_eq!(reported["reciprocal_ranks"], json!(row.reciprocal_ranks));
                let mrr = mean(&row.reciprocal_ranks);
                let less = |than: &str, other: f64| -> Result {
                    if let Some(less) = reported[than]["mean"].as_f64() {
                        assert!((less - (mrr - other)).abs() < 1e-12, "{than}: {reported}");
                    }
                    Ok(())
                };
                less("less_nothing", nothing)?;
                less("less_default", default)?;
                assert_eq!(reported["less_random"].is_null(), row.name != Generics::BOTH);
                assert_eq!(reported["less_nothing"].is_null(), row.name == Generics::NOTHING);
                let cells: Vec<&str> =
                    lines.next().ok_or("no line")?.split('|').map(str::trim).collect();
                assert_eq!(
                    (cells[1].ends_with("(*)"), cells[3]),
                    (at.chosen, row.name.as_str()),
                    "{table}"
                );
                assert!(cells[4].starts_with(&format!("{mrr:.3} ± ")), "{table}");
            }
        }
        // and a line of shares for each layer
        lines.by_ref().take(right.layers.len()).for_each(drop);
    }
    let stderr = fail(&base[..6])?;
    assert!(stderr.contains("--what generic needs --others"), "{stderr}");
    Ok(())
}

#[test]
fn eval_of_conversations_prints_the_figures_of_the_library() -> Result {
    let folder = checkpoint(1.0, true)?;
    let path = folder.path().to_str().ok_or("no text")?;
    let story = json!({
        "told": [
            {"text": "the cat sat on the mat", "days_ago": 2.0},
            {"text": "a boat is on the sea", "days_ago": 2.0},
            {"text": "the cat sat in the sun", "days_ago": 1.0, "corrects": 0},
        ],
        "asked": [
            {"question": "the cat?", "begins": "the cat sat in the", "by": 2, "answer": "sun", "old": "mat",
                "others": ["sea"]},
            {"question": "the boat?", "begins": "a boat is on the", "by": 1, "answer": "sea",
                "others": ["sun", "mat"]},
        ],
    });
    let file = folder.path().join("stories.jsonl");
    fs::write(&file, format!("{story}\n\n{story}\n"))?;
    let at = file.to_str().ok_or("no text")?;
    let base = ["eval", "--what=conversations", "--model", path, "--texts", at, "--best=2"];
    let report: Value = serde_json::from_str(&succeed(&[&base[..], &["--json"]].concat())?)?;
    let stories: [Story; 2] =
        [serde_json::from_value(story.clone())?, serde_json::from_value(story)?];
    let conversations = Conversations { best: 2, ..Conversations::default() };
    let rows = conversations.run(&load(folder.path())?, &stories, || ())?;
    assert_eq!((&report["stories"], &report["best"]), (&json!(2), &json!(2)));
    let table = succeed(&base)?;
    let (reported, cells) = (report["rows"].as_array().ok_or("no list")?, cells(&table));
    assert_eq!((reported.len(), cells.len()), (rows.len(), rows.len()), "{table}");
    let all = rows.iter().find(|row| row.name == Conversations::ALL).ok_or("no row")?;
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    for ((reported, row), cells) in reported.iter().zip(&rows).zip(&cells) {
        assert_eq!(reported["figures"], serde_json::to_value(row)?);
        assert_eq!(cells[1], row.name, "{table}");
        let share = |of: fn(&Held) -> &Vec<f64>| match of(row).as_slice() {
            [] => String::new(),
            values => format!("{:.3} ± ", mean(values)),
        };
        let figures: [fn(&Held) -> &Vec<f64>; 4] =
            [|it| &it.first, |it| &it.recalled, |it| &it.old_recalled, |it| &it.right];
        for (cell, of) in cells[2..].iter().zip(figures) {
            assert!(cell.starts_with(&share(of)), "{table}");
        }
        let less = (row.name != all.name).then(|| mean(&row.right) - mean(&all.right));
        assert_eq!(reported["less_all"]["mean"].as_f64(), less, "{reported}");
    }
    fs::write(&file, "{\"told\": []}\n")?;
    let stderr = fail(&base)?;
    assert!(stderr.contains("stories.jsonl: story 1: ") && stderr.contains("asked"), "{stderr}");
    Ok(())
}

#[test]
fn help_lists_every_option_and_is_short_where_it_is_asked_to_be() -> Result {
    let new = ["--store", "--embed", "--salience", "--share", "--model"];
    for (name, options) in [
        ("add", [&new[..], &["--split", "--tokens", "--tag", "--source", "--supersede"]].concat()),
        (
            "ask",
            vec![
                "--store",
                "--best",
                "--tag",
                "--min-score",
                "--diversity",
                "--context",
                "--chat",
                "--max-tokens",
                "--mark",
                "--json",
                "--model",
                "--passes",
                "--temperature",
            ],
        ),
        ("list", vec!["--store", "--json"]),
        ("forget", vec!["--store", "<ID>..."]),
        ("import", new.to_vec()),
        (
            "eval",
            vec![
                "--what",
                "--texts",
                "--passages",
                "--tokens",
                "--shares",
                "--draws",
                "--salience",
                "--best",
                "--json",
            ],
        ),
    ] {
        let help = succeed(&[name, "--help"])?;
        let words: Vec<&str> =
            help.split(|c: char| c.is_whitespace() || "[],".contains(c)).collect();
        for option in options {
            assert!(words.contains(&option), "{name} {option}: {help}");
        }
        let short = succeed(&[name, "-h"])?;
        assert!(short.lines().count() <= 40, "{name}: {short}");
    }
    Ok(())
}

#[test]
fn documents_are_read_once() -> Result<()> {
    let folder = checkpoint(1.0, true)?;
    let model = load(folder.path())?;
    let path = folder.path().to_str().ok_or("no text")?;
    let (files, store) = (files(folder.path())?, folder.path().join("notes.redb"));
    let at = store.to_str().ok_or("no text")?;
    let kept = |id: &Value| {
        folder
            .path()
            .join("notes.redb.kept")
            .join(format!("{}.safetensors", id.as_str().unwrap_or_default()))
    };
    let add = ["add", "--store", at, "--model", path];
    let thought = ["--keep", "--passes=2", "--hand-off=key-value"];
    let first = lines(&succeed(&[&add[..], &thought, &[&files[0]]].concat())?)?;
    assert_eq!((&first[0]["kept"], kept(&first[0]["id"]).is_file()), (&json!(true), true));
    // Once that is said, it need not be said again, and nothing else can be.
    let more = lines(&succeed(&[&add[..], &["--keep", &files[1]]].concat())?)?;
    assert_eq!(more[0]["kept"], json!(true));
    let other = fail(&[&add[..], &["--keep", "--passes=3", &files[2]]].concat())?;
    assert!(other.contains("notes.redb.kept") && other.contains("were read by"), "{other}");
    let without = lines(&succeed(&[&add[..], &[&files[2]]].concat())?)?;
    assert_eq!((without[0].get("kept"), kept(&without[0]["id"]).is_file()), (None, false));

    let question = "where is the cat?";
    let ask = ["ask", "--store", at, "--model", path, "--max-tokens=6", "--json", question];
    let asked = |more: &[&str]| -> Result<Value> {
        Ok(serde_json::from_str(&succeed(&[&ask[..], more].concat())?)?)
    };
    let report = asked(&["--recompute=2"])?;
    let found = report["found"].as_array().ok_or("no list")?;
    let are_kept: Vec<_> = found.iter().map(|it| it["kept"] == json!(true)).collect();
    let right: Vec<_> = found.iter().map(|it| it["id"] != without[0]["id"]).collect();
    assert_eq!(are_kept, right);
    let config = GenerationConfig::default().max_tokens(6);
    {
        let memory = Memory::open(&store, &model)?.keep(None)?;
        let prompt = memory.prompt(question, &Recall::best(3).recompute(2))?;
        assert_eq!(report["answer"]["ids"], json!(model.generate(prompt, &config)?.ids));
    }
    // Read now, as without.
    let now = asked(&["--reread", "--passes=2", "--hand-off=key-value"])?;
    assert_eq!(now["answer"]["prompt_ids"], report["answer"]["prompt_ids"]);
    assert!(now["found"][0].get("kept").is_none());
    let note = run(&[&ask[..], &["--passes=1"]].concat())?;
    assert!(String::from_utf8(note.stderr)?.contains("--reread"));

    let id = first[0]["id"].as_str().ok_or("no id")?;
    succeed(&["forget", "--store", at, id])?;
    assert!(!kept(&first[0]["id"]).exists() && kept(&more[0]["id"]).is_file());

    // Another store, of what the pass leaves that embeds.
    let embedded = folder.path().join("embedded.redb");
    let at = embedded.to_str().ok_or("no text")?;
    let add = ["add", "--store", at, "--model", path, "--keep=embedded", "--kv-cache=bf16"];
    succeed(&[&add[..], &[&files[0], &files[1]]].concat())?;
    let ask = ["ask", "--store", at, "--model", path, "--max-tokens=2", "--json", question];
    let report: Value = serde_json::from_str(&succeed(&ask)?)?;
    assert_eq!(report["found"][0]["kept"], json!(true));
    Ok(())
}

#[test]
fn what_documents_are_worth_is_measured() -> Result<()> {
    let folder = checkpoint(1.0, true)?;
    let (path, texts) = (folder.path(), folder.path().join("texts.txt"));
    let line =
        "the cat sat on the mat and the dog sat about in the sun while a boat was on the sea\n";
    fs::write(&texts, line.repeat(4))?;
    let arguments = [
        "documents",
        "--model",
        path.to_str().ok_or("no text")?,
        "--texts",
        texts.to_str().ok_or("no text")?,
        "--tokens=8",
        "--predicted=4",
        "--documents=1,3",
        "--recompute=2",
        "--lengths=12",
        "--rounds=1",
        "--passes=1",
        "--hand-off=key-value",
        "--weight=0",
    ];
    let table = succeed(&arguments)?;
    for row in ["| kept, first used |", "| 0 | none |", "| 3 | all together, thought about |"] {
        assert!(table.contains(row), "{table}");
    }
    let lines = lines(&succeed(&[&arguments[..], &["--json"]].concat())?)?;
    assert_eq!(lines.len(), 4 + 1 + 2 * 4);
    let nats = |documents: u64, read: &str| -> Result<f64> {
        let is = |it: &&Value| it["documents"] == json!(documents) && it["read"] == json!(read);
        let found = lines.iter().find(is).ok_or("no such line")?;
        Ok(found["nats"]["mean"].as_f64().ok_or("no number")?)
    };
    // One document by itself is what thinking about it now is.
    let (kept, now) = (nats(1, "each by itself, kept")?, nats(1, "all together, thought about")?);
    assert!((kept - now).abs() < 1e-5, "{kept}, not {now}");
    assert!(nats(3, "each by itself, kept")?.is_finite());
    Ok(())
}
