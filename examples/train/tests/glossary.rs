//! Learning to read a dictionary, with the program `train`, and comparing it with other ways, with `glossary`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use candle_core::Device;
use hybrid_attention::dictionary::DictionaryAdapter;
use hybrid_attention_testing::{Result, checkpoint};
use serde_json::Value;
use tempfile::TempDir;

const TRAIN: &str = env!("CARGO_BIN_EXE_train");

const GLOSSARY: &str = env!("CARGO_BIN_EXE_glossary");

/// All projections.
const ALL: &str = "--target=q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj";

fn run(program: &str, args: &[&str]) -> Result<(bool, String, String)> {
    let Output { status, stdout, stderr } = Command::new(program).args(args).output()?;
    Ok((status.success(), String::from_utf8(stdout)?, String::from_utf8(stderr)?))
}

fn succeed(program: &str, args: &[&str]) -> Result<String> {
    let (success, stdout, stderr) = run(program, args)?;
    assert!(success, "{args:?}: {stderr}");
    Ok(stdout)
}

fn fail(program: &str, args: &[&str], expected: &str) -> Result {
    let (success, stdout, stderr) = run(program, args)?;
    assert!(!success && stdout.is_empty(), "{args:?}");
    assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{args:?}: {stderr}");
    Ok(())
}

fn json(path: &Path) -> Result<Value> {
    Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
}

/// Runs of the suite: a model, what reads its dictionary, and an adapter.
struct Runs {
    folder: TempDir,
}

impl Runs {
    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn train(&self, out: &str, more: &[&str]) -> Result {
        let suite = ["--suite=glossary", "--arm=no-passes", "--batch=2", "--stories=3", "--out"];
        succeed(TRAIN, &[&suite[..], &[&self.path(out)], more].concat()).map(|_| ())
    }

    fn new() -> Result<Self> {
        let runs = Self { folder: tempfile::tempdir()? };
        runs.train("base", &["--steps=6"])?;
        let base = runs.path("base");
        runs.train("adapter", &["--model", &base, "--rank=3", "--span=0..4", ALL, "--steps=2"])?;
        Ok(runs)
    }

    /// The table of the arms, and its figures.
    fn arms(&self, dictionary: &str, sizes: &str) -> Result<(String, Value)> {
        let [base, dictionary, adapter, out] =
            ["base", dictionary, "adapter", "arms.json"].map(|name| self.path(name));
        let table = succeed(
            GLOSSARY,
            &[
                "arms",
                "--base",
                &base,
                "--dictionary",
                &dictionary,
                "--adapter",
                &adapter,
                "--tales=4",
                "--sizes",
                sizes,
                "--out",
                &out,
            ],
        )?;
        Ok((table, json(self.folder.path().join("arms.json").as_path())?))
    }
}

/// The figure of a way with a glossary of this size.
fn right<'a>(report: &'a Value, entries: usize, way: &str) -> &'a Value {
    let rows = report["rows"].as_array().map(Vec::as_slice).unwrap_or_default();
    let row = rows.iter().find(|row| row["entries"] == entries && row["way"] == way);
    row.map_or(&Value::Null, |row| &row["told"])
}

#[test]
fn what_explains_words_is_compared() -> Result {
    let runs = Runs::new()?;
    let base = runs.path("base");
    for sees in ["both-ways", "causal"] {
        let more = ["--model", &base, "--dictionary=2", "--sees", sees, "--steps=4"];
        runs.train(sees, &more)?;
        runs.train("again", &more)?;
        let adapter =
            |run: &str| fs::read(format!("{}/dictionary_adapter.safetensors", runs.path(run)));
        assert!(adapter(sees)? == adapter("again")?, "the same settings end alike");
        fs::remove_dir_all(runs.path("again"))?;

        let (table, report) = runs.arms(sees, "6,1000")?;
        // A comparison that is recorded, alone, and twice.
        let recorded = tempfile::tempdir()?;
        let runs_of = ["--runs", recorded.path().to_str().unwrap_or_default()];
        fail(GLOSSARY, &[&["report"], &runs_of[..]].concat(), "no records of runs")?;
        for (copy, spread) in [("1.json", "error"), ("2.json", "deviation")] {
            fs::copy(runs.path("arms.json"), recorded.path().join(copy))?;
            let again = succeed(GLOSSARY, &[&["report"], &runs_of[..]].concat())?;
            assert_eq!(again == table, spread == "error", "{again}");
            assert!(again.contains(&format!("mean ± standard {spread}")), "{again}");
        }
        for way in ["nothing", "dictionary", "dictionary, shuffled", "low-rank adapter"] {
            assert!(table.contains(&format!("| 6 | {way} | ")), "{table}");
            assert_eq!(right(&report, 1000, way).as_array().map(Vec::len), Some(4));
        }
        // All of six are those of the tale; more than the context is refused, not cut.
        let (all, defined) =
            ("all definitions in the prompt", "the right definitions in the prompt");
        assert_eq!(right(&report, 6, all), right(&report, 6, defined));
        assert!(right(&report, 1000, all).is_null());
        assert!(table.contains(&format!("| 1000 | {all} | does not fit | ")), "{table}");

        let path = format!("{}/dictionary_adapter.safetensors", runs.path(sees));
        let reading = DictionaryAdapter::open(path, &Device::Cpu)?;
        let elements = reading.tensors().map(|(_, tensor)| tensor.elem_count()).sum::<usize>();
        assert_eq!(report["parameters"][0], elements);
    }
    Ok(())
}

#[test]
fn what_has_learned_nothing_answers_as_the_model_does() -> Result {
    let runs = Runs::new()?;
    let base = runs.path("base");
    runs.train("idle", &["--model", &base, "--dictionary=2", "--lr=1e-30", "--steps=1"])?;
    let (_, report) = runs.arms("idle", "30")?;
    let nothing = right(&report, 30, "nothing");
    assert_eq!(right(&report, 30, "dictionary"), nothing);
    assert_eq!(right(&report, 30, "dictionary, shuffled"), nothing);
    let nats = |name: &str| -> Result<Vec<f64>> {
        Ok(serde_json::from_value(report["without_words"][0][name].clone())?)
    };
    for (with, without) in nats("with")?.into_iter().zip(nats("without")?) {
        assert!((with - without).abs() < 1e-5, "{report}");
    }
    Ok(())
}

#[test]
fn the_entries_of_a_file_are_learned_and_others_examined() -> Result {
    // A model whose tokens are whole names: what it makes of the words around them does not matter.
    let (runs, folder) = (Runs::new()?, tempfile::tempdir()?);
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (model, entries) = (runs.path("base"), path("entries.tsv"));
    let names =
        ["coin", "jar", "bell", "book", "boot", "bowl", "box", "cap", "card", "cart", "hat"];
    let lines = names.iter().zip(names.iter().cycle().skip(1));
    let lines = lines.map(|(headword, definition)| format!("{headword}\t{definition}\n"));
    fs::write(&entries, lines.collect::<String>())?;
    let way = |record: &Value, name: &str| -> Result<Vec<f64>> {
        let ways = record["ways"].as_array().map(Vec::as_slice).unwrap_or_default();
        let way = ways.iter().find(|way| way["name"] == name).ok_or("no such way")?;
        Ok(serde_json::from_value(way["losses"].clone())?)
    };
    let common =
        ["--arm=no-passes", "--batch=2", "--stories=2", "--model", &model, "--entries", &entries];
    let recorded = tempfile::tempdir()?;
    for (sees, lr) in [("both-ways", "1e-30"), ("causal", "1e-1")] {
        let out = path(sees);
        let more = ["--dictionary=2", "--sees", sees, "--steps=3", "--lr", lr, "--out", &out];
        let table = succeed(TRAIN, &[&common[..], &more].concat())?;
        assert!(table.contains(&format!("| dictionary, read {sees}, shuffled | ")), "{table}");
        let record_path = folder.path().join(sees).join("record.json");
        fs::copy(record_path, recorded.path().join(format!("{sees}.json")))?;
        let record = json(&folder.path().join(sees).join("record.json"))?;
        let (nothing, dictionary) =
            (way(&record, "nothing")?, way(&record, &format!("dictionary, read {sees}"))?);
        assert_eq!(nothing.len(), 2);
        // What can be trained takes other kernels, which round in another way.
        let apart = nothing.iter().zip(&dictionary).map(|(a, b)| (a - b).abs());
        let apart = apart.fold(0.0, f64::max);
        assert_eq!(apart < 1e-5, lr == "1e-30", "{nothing:?} {dictionary:?}");
        assert!(way(&record, "the definition in the prompt")? != nothing);
    }
    let out = path("adapter");
    let table =
        succeed(TRAIN, &[&common[..], &["--rank=2", ALL, "--steps=2", "--out", &out]].concat())?;
    assert!(table.contains("| low-rank adapter | ") && !table.contains("shuffled"), "{table}");
    let runs_of = recorded.path().to_str().unwrap_or_default();
    let report = succeed(GLOSSARY, &["entries", "--runs", runs_of])?;
    for row in ["| nothing | 2 | ", "| dictionary, read causal | 1 | "] {
        assert!(report.contains(row), "{report}");
    }
    Ok(())
}

#[test]
fn a_story_is_told_after_its_definitions() -> Result {
    let story = succeed(GLOSSARY, &["story", "--seed=3"])?;
    assert!(story.starts_with("Here ") && story.matches(" means ").count() == 6, "{story}");
    assert_ne!(story, succeed(GLOSSARY, &["story", "--seed=4"])?);
    Ok(())
}

#[test]
fn what_cannot_be_learned_is_refused() -> Result {
    let (base, folder) = (checkpoint(0.5, true)?, tempfile::tempdir()?);
    let (model, out) = (base.path().display().to_string(), folder.path().join("out"));
    let tsv = folder.path().join("entries.tsv").display().to_string();
    fs::write(&tsv, "cat\tthe cat\ndog\t\n")?;
    let few = folder.path().join("few.tsv").display().to_string();
    fs::write(&few, "cat\tthe cat\ndog\tthe dog\n")?;
    let (glossary, none) = ("--suite=glossary", "--arm=no-passes");
    for (args, expected) in [
        (vec![glossary], "without passes, for --arm no-passes"),
        (vec![glossary, none, "--model", &model], "not the tokenizer of the suite"),
        (
            vec!["--dictionary=2", "--model", &model],
            "--dictionary: for --entries or --suite glossary",
        ),
        (vec!["--dictionary=2"], "--model <PATH>"),
        (vec!["--dictionary=2", "--rank=2", "--model", &model], "cannot be used with"),
        (vec!["--sees=causal"], "--dictionary <R>"),
        (vec!["--entries", &tsv], "--model <PATH>"),
        (
            vec![none, "--entries", &tsv, "--model", &model, "--dictionary=2"],
            "line 2: an empty definition",
        ),
        (
            vec![none, "--entries", &few, "--model", &model, "--dictionary=2"],
            "--entries: expected at least 10, got 2",
        ),
        (vec!["--entries", &few, "--model", &model, glossary], "cannot be used with"),
        (vec!["--entries", &few, "--model", &model, "--rank=2"], "--entries: without passes"),
    ] {
        let all = [vec!["--out", out.to_str().unwrap_or_default()], args].concat();
        fail(TRAIN, &all, expected)?;
    }
    assert!(!out.exists(), "nothing is left of what was refused");
    let arms = ["arms", "--base", &model, "--dictionary", &model, "--adapter", &model];
    fail(GLOSSARY, &arms, "not the tokenizer of the suite")?;
    for sizes in ["5", "10001", ""] {
        fail(GLOSSARY, &[&arms[..], &["--sizes", sizes]].concat(), "'--sizes")?;
    }
    Ok(())
}
