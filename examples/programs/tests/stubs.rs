//! `hybrid generate` and `inspect` with several candidates: what the library does, and what is shown of it.

use std::path::Path;
use std::process::{Command, Output};

use candle_core::Device;
use hybrid_attention::generate::{Candidates, Extract, Reason, Score};
use hybrid_attention::refine::Noise;
use hybrid_attention::statistics::{Example, Fingerprint, Key, KeyConfig, Pairs, states};
use hybrid_attention::{Answer, GenerationConfig, HybridModel, Thinking};
use hybrid_attention_testing::{Result, checkpoint};
use serde_json::Value;

fn hybrid(name: &str, model: &Path, args: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hybrid-under-test"));
    command.arg(name).arg("--model").arg(model).args(args);
    hybrid_attention_testing::run(&mut command, "")
}

/// Standard output and standard error of a run that succeeds.
fn succeed(name: &str, model: &Path, args: &[&str]) -> Result<(String, String)> {
    let Output { status, stdout, stderr } = hybrid(name, model, args)?;
    let stderr = String::from_utf8(stderr)?;
    assert!(status.success(), "{stderr}");
    Ok((String::from_utf8(stdout)?, stderr))
}

/// What the JSON says of the candidates is what the library says.
fn assert_reported(report: &Value, answer: &Answer) -> Result {
    let said = report["candidates"].as_array().ok_or("no candidates")?;
    assert_eq!(said.len(), answer.candidates.len());
    for (said, stub) in said.iter().zip(&answer.candidates) {
        let mut keys: Vec<&String> = said.as_object().ok_or("no object")?.keys().collect();
        keys.sort_unstable();
        assert_eq!(keys, ["dropped_at", "ids", "reason", "scores", "text"]);
        // Written and read, as the report was.
        let stub: Value = serde_json::from_str(&serde_json::to_string(stub)?)?;
        for key in keys {
            assert_eq!(said[key], stub[key], "{key}");
        }
    }
    assert_eq!(report["text"], answer.text.as_str());
    Ok(())
}

const ARGS: [&str; 5] = ["--ids=1,2,3", "--candidates=6", "--max-tokens=10", "--seed=7", "--json"];

#[test]
fn generate_reports_candidates_as_the_library_has_them() -> Result {
    let folder = checkpoint(1.0, true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let six = || Candidates::samples(6);
    let thinking = Thinking::new(1).noise(Noise::relative(0.5).seed(7));
    let base = GenerationConfig::default().max_tokens(10).seed(7);
    let drawn = || base.clone().temperature(1.0);
    for (args, config) in [
        (vec![], drawn().candidates(six())),
        (
            vec!["--keep=0.3", "--every=2", "--score=entropy", "--temperature=1.5"],
            drawn().temperature(1.5).candidates(six().keep(0.3).every(2).score(Score::Entropy)),
        ),
        (
            vec!["--keep=all", "--score=sum"],
            drawn().candidates(six().keep_all().score(Score::SumLogprob)),
        ),
        (vec!["--score=certainty"], drawn().candidates(six().score(Score::SelfCertainty))),
        (
            vec!["--score=agreement"],
            drawn().candidates(six().score(Score::Agreement(Extract::Words))),
        ),
        (
            vec!["--score=agreement:word"],
            drawn().candidates(six().score(Score::Agreement(Extract::FirstWord))),
        ),
        (
            vec!["--score=agreement:number"],
            drawn().candidates(six().score(Score::Agreement(Extract::LastNumber))),
        ),
        (
            vec!["--score=random", "--every=1"],
            drawn().candidates(six().every(1).score(Score::Random)),
        ),
        (
            vec!["--noise=0.5", "--passes=1", "--score=logprob"],
            base.clone().thinking(thinking).candidates(Candidates::thoughts(6)),
        ),
    ] {
        let (stdout, stderr) = succeed("generate", folder.path(), &[&ARGS, &args[..]].concat())?;
        let answer = model.generate([1, 2, 3], &config)?;
        assert_reported(&serde_json::from_str(&stdout)?, &answer)?;
        // Where there is no terminal, a line for each, as it goes.
        let lines: Vec<&str> = stderr.lines().filter(|line| line.starts_with("[  ")).collect();
        assert_eq!(lines.len(), 6, "{stderr}");
        let last = lines.iter().filter(|line| line.contains(" won ")).count();
        assert_eq!(last, 1, "{stderr}");
        for stub in &answer.candidates {
            let row = format!("[{:>4}  ", stub.index);
            let line = lines.iter().find(|line| line.starts_with(&row)).ok_or("no line")?;
            let at = stub.dropped_at.map_or_else(String::new, |at| format!(" at {at} "));
            assert!(line.contains(&at), "{line}");
        }
    }
    // As text: the winner's.
    let args: Vec<&str> = ARGS.into_iter().filter(|it| *it != "--json").collect();
    let (stdout, _) = succeed("generate", folder.path(), &args)?;
    assert_eq!(
        stdout,
        format!("{}\n", model.generate([1, 2, 3], &drawn().candidates(six()))?.text)
    );
    Ok(())
}

#[test]
fn generate_holds_candidates_to_a_key() -> Result {
    let folder = checkpoint(1.0, true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let of = |ids: &[u32]| states(model.transformer(), ids, 0);
    let example = |n: u32| Ok(Example { input: of(&[n, n + 9, 2])?, output: of(&[n + 9, n])? });
    let examples = (3..60).map(example).collect::<hybrid_attention::Result<Vec<_>>>()?;
    let config = KeyConfig { pairs: vec![Pairs::Full], ..KeyConfig::default() };
    let key = Key::fit(&examples, &config, Fingerprint::of(model.transformer())?)?;
    assert!(!key.declines(), "outputs are made of inputs");
    let file = folder.path().join("key.safetensors");
    key.save(&file)?;
    let file = file.to_str().ok_or("no text")?;

    let config = GenerationConfig::default().temperature(1.0).max_tokens(10).seed(7);
    let candidates = Candidates::samples(6).every(3).score(Score::Key);
    for (within, candidates) in
        [(None, candidates.clone()), (Some("--within=1000"), candidates.within(1000.0))]
    {
        let args = ["--score=key", "--every=3", "--key", file];
        let args: Vec<&str> = ARGS.into_iter().chain(args).chain(within).collect();
        let (stdout, _) = succeed("generate", folder.path(), &args)?;
        let stream = model.stream([1, 2, 3], &config.clone().candidates(candidates))?;
        let answer = stream.key(&key)?.collect_answer()?;
        assert_reported(&serde_json::from_str(&stdout)?, &answer)?;
        assert_eq!(answer.ids.len() == 3, within.is_some(), "it ends with the first round");
    }
    let args = [&ARGS[..], &["--score=key"]].concat();
    let stderr = String::from_utf8(hybrid("generate", folder.path(), &args)?.stderr)?;
    assert!(stderr.contains("parameter key: expected one"), "{stderr}");
    Ok(())
}

#[test]
fn what_is_wrong_with_them_is_said_before_the_model_is_loaded() -> Result {
    let nowhere = Path::new("no such folder");
    for (args, said) in [
        (vec!["--candidates=0"], "error: parameter candidates: expected 1 to 1024, got 0\n"),
        (vec!["--candidates=1000000000"], "error: parameter candidates: expected 1 to 1024"),
        (
            vec!["--candidates=4", "--keep=1"],
            "error: parameter keep: expected a share within (0, 1)",
        ),
        (vec!["--candidates=4", "--keep=some"], "expected a share like 0.5, or all"),
        (vec!["--candidates=4", "--every=0"], "error: parameter every: expected at least 1 token"),
        (vec!["--candidates=4", "--score=best"], "expected logprob, sum, entropy"),
        (
            vec!["--candidates=4", "--temperature=0"],
            "error: parameter temperature: expected above 0",
        ),
        (
            vec!["--candidates=4", "--noise=-1", "--passes=1"],
            "expected a number in [0, 1e6], got -1",
        ),
        (vec!["--candidates=4", "--noise=1"], "--passes"),
        (vec!["--keep=0.5"], "--candidates"),
        (vec!["--score=random"], "--candidates"),
        (vec!["--candidates=4", "--within=1"], "--key"),
    ] {
        let Output { status, stdout, stderr } =
            hybrid("generate", nowhere, &[&["--prompt=x"], &args[..]].concat())?;
        let stderr = String::from_utf8(stderr)?;
        assert!(
            !status.success() && stdout.is_empty() && stderr.contains(said),
            "{args:?}: {stderr}"
        );
    }
    let both = hybrid("generate", nowhere, &["--prompts=f", "--candidates=2"])?;
    assert!(String::from_utf8(both.stderr)?.contains("cannot be used with"));
    Ok(())
}

#[test]
fn inspect_draws_who_was_dropped_when() -> Result {
    let folder = checkpoint(1.0, true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let files = tempfile::tempdir()?;
    let path = |name: &str| files.path().join(name).display().to_string();
    let (out, json) = (path("page.html"), path("trace.json"));
    let args = [
        "--ids=1,2,3,4,5,6",
        "--passes=2",
        "--no-maps",
        "--max-tokens=12",
        "--out",
        &out,
        "--json",
        &json,
    ];
    let inspect = |more: &[&str]| -> Result<(String, Value)> {
        succeed("inspect", folder.path(), &[&args, more].concat())?;
        let json = serde_json::from_str(&std::fs::read_to_string(&json)?)?;
        Ok((std::fs::read_to_string(&out)?, json))
    };
    let (page, json) = inspect(&["--candidates=5", "--every=3"])?;
    let config = GenerationConfig::default().temperature(1.0).seed(0).max_tokens(12);
    let config = config.thinking(Thinking::new(2)).candidates(Candidates::samples(5).every(3));
    let answer = model.generate([1, 2, 3, 4, 5, 6], &config)?;
    let stubs: Value = serde_json::from_str(&serde_json::to_string(&answer.candidates)?)?;
    assert_eq!(json["candidates"], stubs);
    let parsed = roxmltree::Document::parse(
        page.strip_prefix("<!DOCTYPE html>\n").ok_or("no document type")?,
    )?;
    let figure = parsed.descendants().find(|node| node.attribute("id") == Some("candidates"));
    let figure = figure.ok_or("no figure")?;
    let texts: Vec<&str> = figure
        .descendants()
        .filter(roxmltree::Node::is_text)
        .filter_map(|node| node.text())
        .map(str::trim)
        .collect();
    assert_eq!(texts.iter().filter(|text| **text == "won").count(), 1, "{texts:?}");
    let gone = answer.candidates.iter().filter(|stub| stub.reason != Reason::Won).count();
    let shown = |text: &&&str| ["outscored", "no chance"].contains(*text);
    assert_eq!(texts.iter().filter(shown).count(), gone, "{texts:?}");
    // A bar for each, in one piece for each time that it was judged, and a frame around it.
    let bars: usize = answer.candidates.iter().map(|stub| stub.scores.len() + 1).sum();
    let rects = figure.descendants().filter(|node| node.has_tag_name("rect")).count();
    assert_eq!(rects, bars + 64, "and the legend's");

    let (page, json) = inspect(&["--candidates=3", "--noise=0.4"])?;
    assert_eq!(json["settings"]["noise"]["sd"], 0.4);
    assert!(page.contains("<dt>Noise</dt><dd>gaussian, 0.4 of each vector"), "{page}");
    assert!(page.contains("id=\"candidates\""));
    let (page, json) = inspect(&[])?;
    assert!(json.get("candidates").is_none() && !page.contains("id=\"candidates\""));
    Ok(())
}

/// In a terminal they are a table, redrawn in place.
#[cfg(unix)]
#[test]
fn a_terminal_shows_them_as_a_table() -> Result {
    use std::io::{ErrorKind, Read};

    let folder = checkpoint(1.0, true)?;
    let size = nix::pty::Winsize { ws_row: 50, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 };
    let pty = nix::pty::openpty(&size, None)?;
    let mut command = Command::new(env!("CARGO_BIN_EXE_hybrid-under-test"));
    command
        .arg("generate")
        .arg("--model")
        .arg(folder.path())
        .args(ARGS)
        .arg("--every=2")
        .env("TERM", "xterm");
    command.stderr(pty.slave.try_clone()?);
    let mut child = command.stdout(std::process::Stdio::piped()).spawn()?;
    drop((command, pty.slave)); // or the end would never be seen
    let (mut reader, mut bytes) = (std::fs::File::from(pty.master), Vec::new());
    let mut some = [0; 4096];
    loop {
        match reader.read(&mut some) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => break,
            Ok(count) => bytes.extend_from_slice(&some[..count]),
        }
    }
    let mut stdout = String::new();
    child.stdout.take().ok_or("no output")?.read_to_string(&mut stdout)?;
    assert!(child.wait()?.success());
    let report: Value = serde_json::from_str(&stdout)?;
    let mut screen = vt100::Parser::new(50, 120, 0);
    screen.process(&bytes);
    let shown: Vec<String> = screen.screen().rows(0, 120).collect();
    // What is left of it: a row for each, the winner's first.
    let rows: Vec<&String> = shown.iter().filter(|line| line.starts_with("   ")).collect();
    assert_eq!(rows.len(), 6, "{shown:?}");
    assert!(rows[0].contains("  won  "), "{shown:?}");
    for (index, stub) in report["candidates"].as_array().into_iter().flatten().enumerate() {
        let row = rows.iter().find(|row| row.starts_with(&format!("{index:>4}  ")));
        let at = stub["dropped_at"].as_u64().map_or_else(String::new, |at| format!(" at {at} "));
        assert!(row.ok_or("no row")?.contains(&at), "{shown:?}");
    }
    Ok(())
}
