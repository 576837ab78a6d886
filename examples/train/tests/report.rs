//! The program `flashback`, run as a person would run it, and the records that are published.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use hybrid_attention_testing::Result;
use serde_json::Value;

fn run(args: &[&str]) -> Result<Output> {
    Ok(Command::new(env!("CARGO_BIN_EXE_flashback")).args(args).output()?)
}

/// Standard output of a run that succeeds.
fn succeed(args: &[&str]) -> Result<String> {
    let output = run(args)?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn help_lists_every_command() -> Result {
    let help = succeed(&["--help"])?;
    for command in ["story", "test", "report"] {
        assert!(help.split_whitespace().any(|word| word == command), "{command}: {help}");
    }
    Ok(())
}

#[test]
fn the_readme_shows_what_the_recorded_runs_say() -> Result {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir()?;
    let figure = folder.path().join("figure.svg");
    let drawn = figure.to_str().ok_or("not UTF-8")?;
    let table = succeed(&["report", "--figure", drawn])?;
    assert!(fs::read_to_string(root.join("README.md"))?.contains(&table), "{table}");
    assert_eq!(fs::read(&figure)?, fs::read(root.join("accuracy.svg"))?);
    roxmltree::Document::parse(&fs::read_to_string(&figure)?)?;

    let readme = fs::read_to_string(root.join("README.md"))?;
    for run in fs::read_dir(root.join("runs/text"))? {
        let run: Value = serde_json::from_str(&fs::read_to_string(run?.path())?)?;
        let held_out = &run["held_out"];
        let trained = held_out["trained"].as_array().ok_or("nothing was trained")?;
        let passes = trained.iter().filter(|it| trained.len() == 1 || it["passes"] != 0);
        for losses in passes.chain([&held_out["repeated"]]) {
            let of = |what: &str, name: &str| losses[what][name].as_f64().ok_or("no number");
            let cells = format!(
                "| {:.3} ± {:.3} | {:+.3} ± {:.3} |",
                of("mean", "mean")?,
                of("mean", "standard_error")?,
                of("difference", "mean")?,
                of("difference", "standard_error")?
            );
            assert!(readme.contains(&cells), "{cells}");
        }
    }

    let test = folder.path().join("test.jsonl");
    succeed(&["test", "--out", test.to_str().ok_or("not UTF-8")?])?;
    let published = fs::read_to_string(root.join("../flashback/test.jsonl"))?;
    assert_eq!(fs::read_to_string(&test)?, published);
    for line in published.lines() {
        let line: Value = serde_json::from_str(line)?;
        assert!(line["hops"].as_u64().is_some_and(|hops| (1..=12).contains(&hops)), "{line}");
    }
    Ok(())
}

#[test]
fn flashback_names_the_problem() -> Result {
    let empty = tempfile::tempdir()?;
    let nothing = empty.path().to_str().ok_or("not UTF-8")?;
    for (args, message) in [
        (vec!["story", "--hops=13"], "expected 1 to 12"),
        (vec!["report", "--runs", nothing], "no records of runs"),
        (vec!["report", "--runs", "/nowhere/at/all"], "/nowhere/at/all: "),
        (vec!["test", "--out", "/nowhere/at/all"], "its folder does not exist"),
    ] {
        let output = run(&args)?;
        let stderr = String::from_utf8(output.stderr)?;
        assert!(!output.status.success() && output.stdout.is_empty(), "{args:?}");
        assert!(stderr.contains(message), "{args:?}: {stderr}");
    }
    Ok(())
}
