//! The program `train`, run as a person would run it, and its optimiser.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use candle_core::{Device, Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW};
use hybrid_attention::adapter::AdapterScope;
use hybrid_attention::model::Sight;
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::HandOff;
use hybrid_attention::{
    Adapter, EmbedConfig, GenerationConfig, HybridModel, Pooling, Prompt, Thinking,
};
use hybrid_attention_testing::Result;
use hybrid_attention_train::AdamW;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};
use tempfile::TempDir;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../src/tiny");

/// Tokens of each half of a passage.
const TOKENS: usize = 6;

/// A checkpoint of random weights, and beside it `text.txt` of twelve passages and a short line.
fn checkpoint() -> Result<TempDir> {
    let folder = hybrid_attention_testing::checkpoint(0.5, true)?;
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let words = ["the", "cat", "sat", "on", "mat", "about", "dog"];
    let mut text = String::from("the cat\n");
    for _ in 0..12 {
        let line: Vec<&str> = (0..16).map(|_| words[rng.random_range(0..words.len())]).collect();
        text += &format!("{}\n", line.join(" "));
    }
    fs::write(folder.path().join("text.txt"), text)?;
    Ok(folder)
}

/// A run of the program.
struct Run {
    args: Vec<String>,
}

impl Run {
    fn new(args: &[&str]) -> Self {
        Self { args: args.iter().map(ToString::to_string).collect() }
    }

    /// On the text beside a checkpoint.
    fn on_text(model: &Path, args: &[&str]) -> Self {
        let mut run = Self::new(args).with("--model", model);
        run = run.with("--text", &model.join("text.txt"));
        run.args.push(format!("--tokens={TOKENS}"));
        run
    }

    fn with(mut self, option: &str, path: &Path) -> Self {
        self.args.push(format!("{option}={}", path.display()));
        self
    }

    fn command(&self, out: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_train"));
        command.arg("--out").arg(out).args(&self.args).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn output(&self, out: &Path) -> Result<Output> {
        Ok(self.command(out).output()?)
    }

    /// Runs to its end; returns what it printed.
    fn succeed(&self, out: &Path) -> Result<(String, String)> {
        let Output { status, stdout, stderr } = self.output(out)?;
        let (stdout, stderr) = (String::from_utf8(stdout)?, String::from_utf8(stderr)?);
        assert!(status.success(), "{:?}: {stderr}", self.args);
        Ok((stdout, stderr))
    }

    fn fail(&self, out: &Path) -> Result<String> {
        let Output { status, stdout, stderr } = self.output(out)?;
        assert!(!status.success() && stdout.is_empty(), "{:?}", self.args);
        Ok(String::from_utf8(stderr)?)
    }

    /// Kills it as soon as there is a state to resume from, and resumes it; returns the step after which
    /// it did.
    fn killed_and_resumed(&self, out: &Path) -> Result<usize> {
        let mut child = self.command(out).spawn()?;
        let since = Instant::now();
        while !out.join("state.safetensors").exists() {
            assert!(since.elapsed() < Duration::from_secs(300), "no state is saved");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill()?;
        assert!(!child.wait()?.success(), "it ended before it was killed");
        assert!(!out.join("record.json").exists());
        let (_, stderr) = self.succeed(out)?;
        let step =
            stderr.split_once("[going on after step ").and_then(|(_, it)| it.split_once(']'));
        Ok(step.ok_or(stderr.clone())?.0.parse()?)
    }
}

fn assert_same(a: &Path, b: &Path, files: &[&str]) -> Result {
    for file in files {
        assert!(fs::read(a.join(file))? == fs::read(b.join(file))?, "{file} differs");
    }
    Ok(())
}

/// The record without its timings.
fn record(out: &Path) -> Result<Value> {
    let mut record: Value = serde_json::from_str(&fs::read_to_string(out.join("record.json"))?)?;
    assert!(record["seconds"].as_f64().is_some_and(|seconds| seconds > 0.0));
    record["seconds"] = Value::Null;
    Ok(record)
}

fn numbers(value: &Value) -> Result<Vec<f64>> {
    Ok(serde_json::from_value(value.clone())?)
}

// ---- the flashback suite ----

const SMALL: [&str; 3] = ["--steps=12", "--batch=2", "--stories=1"];

#[test]
fn a_run_that_is_killed_ends_as_if_it_had_not_been() -> Result {
    let folder = tempfile::tempdir()?;
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let run = Run::new(&[&SMALL[..], &["--save-every=3"]].concat());
    run.succeed(&whole)?;
    let step = run.killed_and_resumed(&killed)?;
    assert!((3..12).contains(&step), "{step}");
    let files = ["model.safetensors", "config.json", "tokenizer.json", "hybrid.json", "curve.svg"];
    assert_same(&whole, &killed, &files)?;
    assert_eq!(record(&whole)?, record(&killed)?);

    // What is not set is left out of the record: older records have the same form.
    let settings = record(&whole)?["settings"].clone();
    let expected = json!({
        "arm": "both-ways", "seed": 1, "steps": 12, "batch": 2, "lr": 2e-3, "warm_up": 100,
        "span": [1, 3], "gradient_passes": 4,
    });
    assert_eq!(settings, expected);
    HybridModel::from_folder(&whole, None, &Device::Cpu)?;

    let state = killed.join("state.safetensors").display().to_string();
    for other in ["--seed=2", "--arm=causal", "--lr=1e-3", "--span=1..2"] {
        let run = Run::new(&[&SMALL[..], &[other]].concat());
        let stderr = run.fail(&killed)?;
        let said = format!(
            "error: {state}: a run of other settings is saved here; take another --out, or these: "
        );
        assert!(stderr.starts_with(&said), "{stderr}");
    }
    assert_same(&whole, &killed, &files)?;

    // Weights that a disk has lost are not gone on from.
    let mut bytes = fs::read(&state)?;
    let zeroed = bytes.len() - 64..;
    bytes[zeroed].fill(0);
    fs::write(&state, bytes)?;
    assert!(run.fail(&killed)?.starts_with(&format!("error: {state}: damaged")));
    // What cannot be written is named.
    let full = folder.path().join("full");
    fs::create_dir_all(full.join("state.new"))?;
    let state = full.join("state.safetensors").display().to_string();
    assert!(run.fail(&full)?.contains(&format!("error: {state}: ")));
    Ok(())
}

#[test]
fn every_arm_starts() -> Result {
    let folder = tempfile::tempdir()?;
    for arm in ["causal", "one-pass", "prefix", "no-passes", "deep"] {
        let out = folder.path().join(arm);
        Run::new(&["--steps=1", "--batch=1", "--stories=1", "--arm", arm]).succeed(&out)?;
        let thinks = !["no-passes", "deep"].contains(&arm);
        assert_eq!(out.join("hybrid.json").exists(), thinks, "{arm}");
        let scored = record(&out)?["test"]["passes"].as_array().map(Vec::len);
        assert_eq!(scored, Some(if thinks { 7 } else { 1 }), "{arm}");
    }
    Ok(())
}

#[test]
fn an_adapter_learns_the_suite_on_a_checkpoint_of_its_own() -> Result {
    let folder = tempfile::tempdir()?;
    let (out, all) = (folder.path().join("adapter"), folder.path().join("all"));
    let run = Run::new(&[&SMALL[..], &["--rank=2"]].concat()).with("--model", Path::new(TINY));
    run.succeed(&out)?;
    let settings = &record(&out)?["settings"];
    assert_eq!(settings["model"], "tiny");
    assert_eq!(settings["adapter"]["rank"], 2);
    let adapter = Adapter::from_folder(&out, &Device::Cpu)?;
    // Adapters are where the thoughts are, and start from the gate that is there.
    assert!(adapter.tensors().all(|(name, _)| name.contains("layers.1.") || name.contains(".2.")));
    let model = HybridModel::tiny(&Device::Cpu)?;
    let gates = (adapter.thought_gate().ok_or("no gate")?, model.thought_model().thought_gate());
    let moved = (gates.0 - gates.1.ok_or("no gate")?)?.abs()?.max_all()?.to_scalar::<f32>()?;
    assert!(moved > 0.0 && moved < 0.2, "{moved}");

    Run::new(&SMALL).with("--model", Path::new(TINY)).succeed(&all)?;
    HybridModel::from_folder(&all, None, &Device::Cpu)?;
    Ok(())
}

// ---- a text ----

/// The losses that a record should hold: for passages 5 and 10 of the text, with the first `TOKENS`
/// tokens of each thought about, except the first and the last, and as many predicted.
fn losses(model: &HybridModel, text: &Path, thinking: &Thinking, twice: bool) -> Result<Vec<f64>> {
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    let config = GenerationConfig::default().prompt_logprobs(true).max_tokens(0);
    let config = config.thinking(thinking.clone());
    let text = fs::read_to_string(text)?;
    let mut losses = Vec::new();
    for line in [5, 10].map(|line| text.lines().nth(line)) {
        let ids = tokenizer.encode(line.ok_or("too little text")?, true)?;
        let (first, rest) = ids.split_at(TOKENS);
        let second = &rest[..TOKENS];
        let last = TOKENS - 1;
        let prompt = match twice {
            true => Prompt::default().plain_ids(first).plain_ids(&first[1..]), // one BOS
            false => Prompt::default()
                .plain_ids(&first[..1])
                .context_ids(&first[1..last])
                .plain_ids(&first[last..]),
        };
        let answer = model.generate(prompt.plain_ids(second), &config)?;
        let logprobs = answer.prompt_logprobs.ok_or("none")?;
        let second = logprobs.iter().rev().take(TOKENS).flatten();
        losses.push(-second.map(|&it| f64::from(it)).sum::<f64>() / TOKENS as f64);
    }
    Ok(losses)
}

fn assert_losses(what: &str, recorded: &Value, model: &[f64], plain: &[f64]) -> Result {
    let got = numbers(&recorded["losses"])?;
    for (got, expected) in got.iter().zip(model) {
        assert!((got - expected).abs() < 1e-5, "{what}: {got} {expected}");
    }
    let [a, b] = [0, 1].map(|index| got[index] - plain[index]);
    let difference = &recorded["difference"];
    for (name, expected) in [("mean", (a + b) / 2.0), ("standard_error", (a - b).abs() / 2.0)] {
        let got = difference[name].as_f64().ok_or("no number")?;
        assert!((got - expected).abs() < 1e-5, "{what}, {name}: {got} {expected}");
    }
    Ok(())
}

/// Checks the record of a run against the library, with `model` being what was trained.
fn assert_record(out: &Path, base: &Path, model: &HybridModel, thinking: &Thinking) -> Result {
    let text = base.join("text.txt");
    let base = HybridModel::from_folder(base, None, &Device::Cpu)?;
    let record = record(out)?;
    assert_eq!(record["trained_on"], 10);
    let held_out = &record["held_out"];
    assert_eq!(held_out["passages"], 2);
    assert_eq!(held_out["tokens"], TOKENS);
    let plain = losses(&base, &text, &Thinking::none(), false)?;
    let twice = losses(&base, &text, &Thinking::none(), true)?;
    assert_losses("plain", &held_out["plain"], &plain, &plain)?;
    assert_losses("repeated", &held_out["repeated"], &twice, &plain)?;
    for (passes, recorded) in held_out["trained"].as_array().into_iter().flatten().enumerate() {
        assert_eq!(recorded["passes"], passes);
        let thinking = thinking.clone().passes(passes);
        let trained = losses(model, &text, &thinking, false)?;
        assert_losses(&format!("{passes} passes"), recorded, &trained, &plain)?;
    }
    Ok(())
}

#[test]
fn an_adapter_learns_a_text() -> Result {
    let (base, folder) = (checkpoint()?, tempfile::tempdir()?);
    let before = fs::read(base.path().join("model.safetensors"))?;
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let args = ["--rank=2", "--alpha=4", "--target=q_proj,down_proj", "--steps=60", "--lr=0.02"];
    let run = Run::on_text(base.path(), &[&args[..], &["--save-every=4"]].concat());
    let (table, _) = run.succeed(&whole)?;
    assert_eq!(table.lines().filter(|line| line.starts_with("| ")).count(), 1 + 2 + 3, "{table}");
    let step = run.killed_and_resumed(&killed)?;
    assert!((4..60).contains(&step), "{step}");
    let files = ["adapter_model.safetensors", "adapter_config.json", "thought.safetensors"];
    assert_same(&whole, &killed, &[&files[..], &["hybrid.json", "curve.svg"]].concat())?;
    assert_eq!(record(&whole)?, record(&killed)?);

    assert!(fs::read(base.path().join("model.safetensors"))? == before, "the checkpoint changed");
    assert!(!whole.join("model.safetensors").exists());
    let curve: Vec<f64> = record(&whole)?["curve"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|point| point["loss"].as_f64())
        .collect();
    assert_eq!(curve.len(), 6);
    assert!(curve[5] < curve[0], "{curve:?}");

    let model = HybridModel::from_folder(base.path(), None, &Device::Cpu)?;
    let adapter = Adapter::from_folder(&whole, &Device::Cpu)?;
    let names: Vec<String> = adapter.tensors().map(|(name, _)| name).collect();
    assert_eq!(names.len(), 4, "two projections of the middle layer: {names:?}");
    let parameters = 2 * (16 + 16) + 2 * (24 + 16) + 16;
    assert_eq!(record(&whole)?["parameters"], parameters);
    let thinking = Thinking::from_json(&fs::read_to_string(whole.join("hybrid.json"))?)?;
    assert_eq!(serde_json::to_value(&thinking)?["span"], json!([1, 2]));
    assert_record(
        &whole,
        base.path(),
        &model.with_adapter(&adapter, AdapterScope::Thinking)?,
        &thinking,
    )?;

    // Without a pass an adapter for thinking changes nothing.
    let held_out = &record(&whole)?["held_out"];
    assert_eq!(held_out["trained"][0]["losses"], held_out["plain"]["losses"]);
    assert_ne!(held_out["trained"][1]["losses"], held_out["plain"]["losses"]);

    let name = |settings: &Value| settings["text"]["file"].clone();
    assert_eq!(name(&record(&whole)?["settings"]), "text.txt");
    fs::write(
        base.path().join("text.txt"),
        fs::read_to_string(base.path().join("text.txt"))? + "\n",
    )?;
    run.succeed(&whole)?;
    let text = fs::read_to_string(base.path().join("text.txt"))?.replace("cat sat", "sat cat");
    fs::write(base.path().join("text.txt"), text)?;
    assert!(run.fail(&whole)?.contains("a run of other settings is saved here"));
    Ok(())
}

#[test]
fn every_arm_learns_a_text() -> Result {
    let (base, folder) = (checkpoint()?, tempfile::tempdir()?);
    let load = || HybridModel::from_folder(base.path(), None, &Device::Cpu);
    for (arm, mind, passes, sight) in [
        ("causal", AdapterScope::Thinking, 3, Sight::Causal),
        ("one-pass", AdapterScope::Thinking, 1, Sight::Bidirectional),
        ("prefix", AdapterScope::Thinking, 1, Sight::Bidirectional),
        ("no-passes", AdapterScope::Decoding, 0, Sight::Bidirectional),
    ] {
        let out = folder.path().join(arm);
        let args = ["--rank=2", "--steps=6", "--lr=0.02", "--passes=3", "--arm", arm];
        Run::on_text(base.path(), &args).succeed(&out)?;
        let adapter = Adapter::from_folder(&out, &Device::Cpu)?;
        assert_eq!(adapter.thought_gate().is_some(), passes > 0 && arm != "prefix", "{arm}");
        let mut thinking = Thinking::new(passes).sight(sight).span(1..2);
        if arm == "prefix" {
            thinking = thinking.refine(Interpolate::new(0.0)).hand_off(HandOff::KeyValue);
        }
        assert_record(&out, base.path(), &load()?.with_adapter(&adapter, mind)?, &thinking)?;
        let trained = record(&out)?["held_out"]["trained"].as_array().map(Vec::len);
        assert_eq!(trained, Some(passes + 1), "{arm}");
    }
    Ok(())
}

#[test]
fn a_whole_checkpoint_learns_a_text() -> Result {
    let (base, folder) = (checkpoint()?, tempfile::tempdir()?);
    let out = folder.path().join("all");
    let run = Run::on_text(base.path(), &["--steps=6", "--lr=0.01", "--span=0..3"]);
    run.succeed(&out)?;
    let model = HybridModel::from_folder(&out, None, &Device::Cpu)?;
    let thinking = model.thinking().clone();
    assert!(!thinking.is_none());
    assert_record(&out, base.path(), &model, &thinking)
}

// ---- lost words ----

/// What a record says of a way.
fn way<'r>(record: &'r Value, name: &str) -> Result<&'r Value> {
    let ways = record["ways"].as_array().ok_or("no ways")?;
    Ok(ways.iter().find(|way| way["name"] == name).ok_or("no such way")?)
}

#[test]
fn every_arm_learns_to_fill_lost_words() -> Result {
    let (base, folder) = (checkpoint()?, tempfile::tempdir()?);
    let plain = ["checkpoint, causal", "checkpoint, the text read twice"];
    let plain = [plain[0], plain[1], "checkpoint, writing it out again"];
    let mut untrained = None;
    for (arm, same) in [
        ("both-ways", None),
        ("causal", None),
        ("whole", None),
        ("no-passes", Some(plain[0])),
        ("twice", Some(plain[1])),
        ("rewrite", Some(plain[2])),
    ] {
        for (lr, at) in [("1e-30", "before"), ("0.02", "blank")] {
            let out = folder.path().join(format!("{arm}-{lr}"));
            let args = ["--lost=0.4", "--blank=the", "--rank=2", "--adapter-layers=0..3"];
            let more = ["--steps=3", "--arm", arm, "--lr", lr, "--asked-at", at];
            let run = Run::on_text(base.path(), &[&args[..], &more].concat());
            let (table, _) = run.succeed(&out)?;
            let record = record(&out)?;
            let adapter = Adapter::from_folder(&out, &Device::Cpu)?;
            let layers = (0..3).map(|layer| format!("layers.{layer}."));
            for layer in layers {
                assert!(adapter.tensors().any(|(name, _)| name.contains(&layer)), "{layer}");
            }
            let losses = |name: &str| numbers(&way(&record, name)?["losses"]);
            let trained: Vec<String> = match arm {
                "both-ways" | "causal" => {
                    [1, 2].map(|passes| format!("trained, {arm}, {passes} passes")).into()
                }
                _ => vec![format!("trained, {arm}")],
            };
            for name in &trained {
                assert!(table.contains(&format!("| {name} | ")), "{table}");
                assert!(losses(name)?.iter().all(|loss| loss.is_finite()));
            }
            // What is lost is the same in all runs, and so is what the checkpoint makes of it.
            if at == "before" {
                let known = plain.map(losses);
                let [Ok(a), Ok(b), Ok(c)] = known else { return Err("no losses".into()) };
                assert_eq!(
                    untrained.get_or_insert_with(|| [a.clone(), b.clone(), c.clone()]),
                    &[a, b, c]
                );
            }
            if let Some(same) = same {
                let pairs = losses(&trained[0])?.into_iter().zip(losses(same)?);
                let apart = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                // What can be trained takes other kernels, which round in another way.
                assert_eq!(apart < 1e-4, lr == "1e-30", "{arm}: {apart}");
            }
        }
    }
    Ok(())
}

#[test]
fn passages_of_their_own_are_held_out() -> Result {
    let (base, folder) = (checkpoint()?, tempfile::tempdir()?);
    let other = folder.path().join("other.txt");
    fs::write(&other, "the dog sat on the mat about the cat\n".repeat(3))?;
    let args = ["--lost=0.5", "--blank=the", "--rank=2", "--steps=1", "--arm=whole"];
    let out = folder.path().join("out");
    Run::on_text(base.path(), &args).with("--held-out", &other).succeed(&out)?;
    let record = record(&out)?;
    assert_eq!(numbers(&way(&record, "trained, whole")?["losses"])?.len(), 3);
    assert_eq!(record["settings"]["text"]["lost"]["held_out"], "other.txt");
    Ok(())
}

#[test]
fn words_that_cannot_be_lost_are_refused() -> Result {
    let (base, folder) = (checkpoint()?, tempfile::tempdir()?);
    let out = folder.path().join("out");
    for (args, expected) in [
        (vec!["--lost=0"], "--lost: expected a share between 0 and 1, got 0"),
        (vec!["--lost=1"], "--lost: expected a share between 0 and 1, got 1"),
        (vec!["--lost=nan"], "--lost: expected a share between 0 and 1, got NaN"),
        (vec!["--lost=0.1", "--blank=the cat sat"], "--blank: expected the text of one token, got"),
        (vec!["--lost=0.1", "--tokens=1"], "--tokens: expected 2 to "),
        (vec!["--lost=0.1", "--tokens=1000000000"], "--tokens: expected 2 to "),
        (vec!["--lost=0.1", "--tokens=99"], "too few passages of 50 tokens or more"),
        (vec!["--lost=0.1", "--passages=1"], "--passages: expected at least 2, or 0"),
        (
            vec!["--lost=0.1", "--adapter-layers=1..9"],
            "--adapter-layers: expected A..B with A < B <= 3",
        ),
        (vec!["--lost=0.1", "--held-out=/nowhere"], "/nowhere: "),
        (vec!["--arm=twice"], "--arm twice: for --text with --lost, or --pairs"),
        (vec!["--asked-at=blank"], "--lost <SHARE>"),
        (vec!["--held-out=/nowhere"], "--held-out: for --lost or --pairs"),
    ] {
        let given = |option: &str| args.iter().any(|arg| arg.starts_with(option));
        let mut more = vec!["--rank=1"];
        if given("--lost") && !given("--blank") {
            more.push("--blank=the");
        }
        if !given("--tokens") {
            more.push("--tokens=6");
        }
        let run = Run::new(&[&more[..], &args].concat()).with("--model", base.path());
        let run = run.with("--text", &base.path().join("text.txt"));
        let stderr = run.fail(&out)?;
        assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{args:?}: {stderr}");
    }
    assert!(!out.exists(), "nothing is left of what was refused");
    Ok(())
}

// ---- pairs ----

/// Queries and passages to learn from and to be examined on, `train.tsv` and `test.tsv`: a query is some words of its
/// passage.
fn pairs(folder: &Path) -> Result<[PathBuf; 2]> {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let words = ["the", "cat", "sat", "on", "mat", "about", "dog", "and", "was", "with"];
    let mut pair = || {
        let passage: Vec<&str> = (0..8).map(|_| words[rng.random_range(0..words.len())]).collect();
        format!("{}\t{}\n", passage[2..5].join(" "), passage.join(" "))
    };
    let mut files = ["train.tsv", "test.tsv"].map(|name| folder.join(name));
    for (file, count) in files.iter_mut().zip([30, 6]) {
        fs::write(file, (0..count).map(|_| pair()).collect::<String>())?;
    }
    Ok(files)
}

/// For each query of `test`, 1 over the place of its passage among all of both files, by the library's own vectors.
fn places(model: &HybridModel, files: &[PathBuf; 2], pooling: Pooling) -> Result<Vec<f64>> {
    let [train, test] = [fs::read_to_string(&files[0])?, fs::read_to_string(&files[1])?];
    fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
        text.lines().filter_map(|line| line.split_once('\t'))
    }
    let mut passages: Vec<&str> = Vec::new();
    for (_, passage) in lines(&train).chain(lines(&test)) {
        if !passages.contains(&passage) {
            passages.push(passage);
        }
    }
    let config = EmbedConfig::default().pooling(pooling).sight(Sight::Causal);
    let of_passages = model.embed(&passages, &config)?;
    let queries: Vec<&str> = lines(&test).map(|(query, _)| query).collect();
    let scores: Vec<Vec<f32>> =
        model.embed(&queries, &config)?.matmul(&of_passages.t()?)?.to_vec2()?;
    let place = |(scores, (_, own)): (Vec<f32>, (&str, &str))| {
        let own = scores[passages.iter().position(|it| *it == own).unwrap_or(usize::MAX)];
        1.0 / scores.iter().filter(|score| **score >= own).count() as f64
    };
    Ok(scores.into_iter().zip(lines(&test)).map(place).collect())
}

#[test]
fn every_arm_learns_vectors_of_pairs() -> Result {
    let (base, folder) = (checkpoint()?, tempfile::tempdir()?);
    let files = pairs(folder.path())?;
    let model = HybridModel::from_folder(base.path(), None, &Device::Cpu)?;
    for (arm, same) in [
        ("both-ways", None),
        ("causal", None),
        ("whole", None),
        ("no-passes", Some("checkpoint, causal, weighted-mean")),
        ("twice", Some("checkpoint, the text read twice")),
    ] {
        for (lr, steps) in [("1e-30", 2), ("0.02", 40)] {
            let out = folder.path().join(format!("{arm}-{lr}"));
            let args =
                ["--rank=2", "--adapter-layers=0..3", "--batch=6", "--tokens=32", "--arm", arm];
            let how = ["--lr", lr, "--passes=1", "--steps", &steps.to_string()];
            let run = Run::new(&[&args[..], &how].concat()).with("--model", base.path());
            let run = run.with("--pairs", &files[0]).with("--held-out", &files[1]);
            let (table, _) = run.succeed(&out)?;
            assert!(table.starts_with("6 queries among "), "{table}");
            let record = record(&out)?;
            let found = record["found"].as_array().ok_or("nothing found")?;
            let of = |name: &str| -> Result<Vec<f64>> {
                let found = found.iter().find(|it| it["name"] == name).ok_or(name.to_string())?;
                numbers(&found["reciprocal"])
            };
            assert_eq!(of("checkpoint, causal, mean")?, places(&model, &files, Pooling::Mean)?);
            let weighted = places(&model, &files, Pooling::WeightedMean)?;
            assert_eq!(of("checkpoint, causal, weighted-mean")?, weighted);
            let last = places(&model, &files, Pooling::LastToken)?;
            assert_eq!(of("checkpoint, causal, last-token")?, last);
            let trained = found.last().and_then(|it| it["name"].as_str()).ok_or("no name")?;
            assert!(trained.starts_with(&format!("trained, {arm}, ")), "{trained}");
            if let (Some(same), "1e-30") = (same, lr) {
                assert_eq!(of(trained)?, of(same)?);
            }
            let curve = record["curve"].as_array().ok_or("no curve")?;
            if let [first, .., last] = curve.as_slice() {
                let losses = [first, last].map(|point| point["loss"].as_f64());
                assert!(losses[1] < losses[0], "{arm}: {losses:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn pairs_that_cannot_be_learned_are_refused() -> Result {
    let (base, folder) = (checkpoint()?, tempfile::tempdir()?);
    let [train, test] = pairs(folder.path())?;
    let (out, bad) = (folder.path().join("out"), folder.path().join("bad.tsv"));
    for (content, args, expected) in [
        ("the cat\n", vec![], "bad.tsv: line 1: expected a query, a tab and a passage"),
        ("the\tcat\n\tcat\n", vec![], "bad.tsv: line 2: an empty query or passage"),
        ("the\tcat\na\tcat\n", vec![], "bad.tsv: expected at least 2 of each, got 1 passages"),
        ("", vec!["--temperature=0"], "--temperature: expected a number above 0, got 0"),
        ("", vec!["--temperature=nan"], "--temperature: expected a number above 0, got NaN"),
        ("", vec!["--tokens=1"], "--tokens: expected 2 to 128"),
        ("", vec!["--tokens=1000000000"], "--tokens: expected 2 to 128"),
        ("", vec!["--passages=1"], "--passages: expected at least 2, or 0"),
        ("", vec!["--passes=0"], "--passes: expected at least one"),
        ("", vec!["--arm=rewrite"], "--arm rewrite: for --text with --lost"),
    ] {
        fs::write(&bad, content)?;
        let pairs = if content.is_empty() { &train } else { &bad };
        let run = Run::new(&[&["--rank=1"], &args[..]].concat()).with("--model", base.path());
        let run = run.with("--pairs", pairs).with("--held-out", &test);
        let stderr = run.fail(&out)?;
        assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{args:?}: {stderr}");
    }
    let run = Run::new(&["--rank=1"]).with("--model", base.path()).with("--pairs", &train);
    assert!(run.fail(&out)?.contains("--held-out <F>"));
    assert!(!out.exists(), "nothing is left of what was refused");
    Ok(())
}

// ---- what it says ----

#[test]
fn help_lists_every_option() -> Result {
    let output = Command::new(env!("CARGO_BIN_EXE_train")).arg("--help").output()?;
    assert!(output.status.success() && output.stderr.is_empty());
    let help = String::from_utf8(output.stdout)?;
    let words: Vec<&str> = help.split(|c: char| c.is_whitespace() || "[],".contains(c)).collect();
    let run = ["--out", "--arm", "--model", "--seed", "--steps", "--batch", "--lr", "--span"];
    let more = ["--gradient-passes", "--save-every", "--stories", "both-ways"];
    let adapter = ["--rank", "--alpha", "--target"];
    let text = ["--text", "--tokens", "--passes", "--passages"];
    let lost = ["--lost", "--blank", "--asked-at", "--held-out", "--pairs", "--temperature"];
    let minds = ["--adapter-layers", "--adapter-for"];
    for option in [&run[..], &more, &adapter, &text, &lost, &minds].concat() {
        assert!(words.contains(&option), "{option}: {help}");
    }
    Ok(())
}

#[test]
fn what_cannot_be_trained_is_refused() -> Result {
    let (base, folder) = (checkpoint()?, tempfile::tempdir()?);
    let out = folder.path().join("out");
    let text = base.path().join("text.txt").display().to_string();
    let model = base.path().display().to_string();
    let only = format!(
        "{text}: too little text: 0 passages, one a line, have 170 tokens (twice --tokens) or more; \
         at least 10 have to"
    );
    for (args, expected) in [
        (vec!["--rank=0"], "--rank: expected at least 1".to_string()),
        (vec!["--rank=99"], "expected at most 16, the larger side of".into()),
        (vec!["--rank=1", "--alpha=nan"], "--alpha: expected a number above 0, got NaN".into()),
        (vec!["--rank=1", "--target=r_proj"], "got r_proj".into()),
        (vec!["--rank=1", "--arm=deep"], "--arm deep: it has layers of its own".into()),
        (vec!["--rank=1", "--span=2..4"], "--span: expected A..B with 0 <= A < B <= 3".into()),
        (vec!["--rank=1", "--passes=0"], "--passes: expected at least one".into()),
        (vec!["--rank=1", "--passages=1"], "--passages: expected at least 2, or 0".into()),
        (vec!["--rank=1", "--batch=0"], "--batch: expected 1 to 4096, got 0".into()),
        (vec!["--rank=1", "--batch=1000000000"], "--batch: expected 1 to 4096".into()),
        (vec!["--rank=1", "--lr=0"], "--lr: expected a number above 0, got 0".into()),
        (vec!["--rank=1", "--tokens=85"], only),
        (vec!["--rank=1", "--tokens=86"], "--tokens: expected at most 85, for three times".into()),
        (vec!["--rank=1", "--tokens=2"], "--tokens: expected at least 3".into()),
        (vec!["--rank=1", "--save-every=0"], "invalid value '0' for '--save-every <N>'".into()),
        (vec!["--rank=1", "--stories=3"], "'--stories <N>' cannot be used with".into()),
    ] {
        let mut more = [args, vec!["--model", &model, "--text", &text]].concat();
        if !more.iter().any(|arg| arg.starts_with("--tokens")) {
            more.push("--tokens=6");
        }
        let stderr = Run::new(&more).fail(&out)?;
        assert!(stderr.starts_with("error: ") && stderr.contains(&expected), "{more:?}: {stderr}");
    }
    let absent = folder.path().join("absent").display().to_string();
    let not_suite = format!("error: {model}: not the tokenizer of the suite");
    for (args, expected) in [
        (vec!["--rank=2"], "--model <PATH>"),
        (vec!["--text", &text], "--model <PATH>"),
        (vec!["--alpha=2", "--model", &model], "--rank <R>"),
        (vec!["--target=q_proj", "--model", &model], "--rank <R>"),
        (vec!["--passes=2", "--model", &model], "--text <F>"),
        (vec!["--tokens=2", "--model", &model], "--text <F>"),
        (vec!["--model", &model], &not_suite),
        (vec!["--model", &absent], &format!("error: {absent}: No such file")),
        (vec!["--model", &model, "--text", &absent], &format!("error: {absent}: No such file")),
    ] {
        let stderr = Run::new(&args).fail(&out)?;
        assert!(stderr.starts_with("error: ") && stderr.contains(expected), "{args:?}: {stderr}");
    }
    assert!(!out.exists(), "nothing is left of what was refused");
    let stderr = Run::on_text(base.path(), &["--rank=1"]).fail(base.path())?;
    assert!(
        stderr.starts_with("error: --out: ") && stderr.contains("is the folder of"),
        "{stderr}"
    );
    Ok(())
}

#[test]
fn a_run_that_diverges_says_so() -> Result {
    let out = tempfile::tempdir()?;
    let args = ["--steps=6", "--stories=0", "--batch=2", "--lr=1e30", "--arm=no-passes"];
    let output = Run::new(&args).output(out.path())?;
    let stderr = String::from_utf8(output.stderr)?;
    assert!(!output.status.success() && stderr.contains("try a lower --lr"), "{stderr}");
    assert!(!out.path().join("model.safetensors").exists());
    Ok(())
}

// ---- the optimiser ----

/// Ours and candle's, on the same gradients.
#[test]
fn adamw_is_candles() -> Result {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut noise = |shape: &[usize]| -> Result<Tensor> {
        let values = (0..shape.iter().product()).map(|_| rng.random_range(-1f32..1.0)).collect();
        Ok(Tensor::from_vec::<_, f32>(values, shape, &Device::Cpu)?)
    };
    let shapes: [&[usize]; 3] = [&[4, 3], &[5], &[2, 2, 2]];
    // Without clipping and with it, the third time with a learning rate of its own.
    for (longest, rate) in [(f64::INFINITY, 1.0), (0.5, 1.0), (f64::INFINITY, 8.0)] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for (index, shape) in shapes.iter().enumerate() {
            let start = noise(shape)?;
            ours.push((index.to_string(), Var::from_tensor(&start)?));
            theirs.push(Var::from_tensor(&start)?);
        }
        let candle = |vars: &[Var], lr| {
            let (beta1, beta2, eps, weight_decay) = (0.9, 0.98, 1e-8, 0.01);
            let params = ParamsAdamW { lr, beta1, beta2, eps, weight_decay };
            candle_nn::AdamW::new(vars.to_vec(), params)
        };
        let (mut first, mut last) = (candle(&theirs[..2], 0.0)?, candle(&theirs[2..], 0.0)?);
        let mut optimizer = AdamW::new(&ours, 0.98, 0.01)?.with_rate("2", rate);
        for step in 0..20 {
            let lr = 0.1 / (1.0 + step as f64);
            let wanted = shapes.iter().map(|shape| noise(shape)).collect::<Result<Vec<_>>>()?;
            let grads = |vars: &[Var], scale: f64| -> Result<_> {
                let mut loss = Tensor::zeros((), candle_core::DType::F32, &Device::Cpu)?;
                for (var, grad) in vars.iter().zip(&wanted) {
                    loss = (loss + (var.as_tensor() * (grad * scale)?)?.sum_all()?)?;
                }
                Ok(loss.backward()?)
            };
            let mut length = 0.0;
            for grad in &wanted {
                length += f64::from(grad.sqr()?.sum_all()?.to_scalar::<f32>()?);
            }
            let length = length.sqrt();
            let own: Vec<Var> = ours.iter().map(|(_, var)| var.clone()).collect();
            let said = optimizer.step(&grads(&own, 1.0)?, lr, longest)?;
            assert!((said - length).abs() < 1e-6, "{said} {length}");
            let grads = grads(&theirs, if length > longest { longest / length } else { 1.0 })?;
            first.set_learning_rate(lr);
            last.set_learning_rate(lr * rate);
            first.step(&grads)?;
            last.step(&grads)?;
            for ((name, a), b) in ours.iter().zip(&theirs) {
                let off = (a.as_tensor() - b.as_tensor())?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(off < 1e-6, "step {step}, variable {name}: {off}");
            }
        }
    }
    Ok(())
}
