//! Candidates as they are written: a table that is redrawn in a terminal, and a line for each that goes elsewhere.

use std::collections::HashSet;
use std::io::{IsTerminal, Write, stderr};

use hybrid_attention::generate::{Reason, Stub};
use hybrid_attention::{GenerationConfig, HybridModel, Prompt, TokenStream};
use serde_json::{Value, json};

use crate::options::CandidateArgs;
use crate::terminal::{self, Result, plain, say};

/// The most rows of the table.
const ROWS: usize = 24;

/// How much of each text there is room for, in characters.
const WIDTH: usize = 48;

/// An answer whose prompt has been read, and whose candidates are shown on standard error.
pub(crate) fn begin(
    model: &HybridModel,
    prompt: Prompt,
    config: &GenerationConfig,
    options: &CandidateArgs,
) -> Result<TokenStream<'static>> {
    let stream = options.hold_to_key(model, model.stream(prompt, config)?)?;
    Ok(watch(terminal::read(stream)?))
}

fn watch(stream: TokenStream<'static>) -> TokenStream<'static> {
    let draws = stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|it| it != "dumb");
    if draws {
        let mut drawn = 0;
        return stream.on_candidates(move |stubs| drawn = draw(&table(stubs), drawn));
    }
    let mut told = HashSet::new();
    stream.on_candidates(move |stubs| {
        for stub in stubs.iter().filter(|stub| stub.reason != Reason::Running) {
            if told.insert(stub.index) {
                say(&format!("[{}]", row(stub)));
            }
        }
    })
}

/// Draws lines over as many as were drawn before, and returns how many there are. They are cut at the right edge, so that
/// each takes one line whatever its characters are; failures are ignored.
fn draw(lines: &[String], before: usize) -> usize {
    let mut drawing = match before {
        0 => String::new(),
        _ => format!("\x1b[{before}A"), // up
    };
    drawing += "\x1b[?7l"; // no wrapping
    lines.iter().for_each(|line| drawing += &format!("\r\x1b[2K{line}\n"));
    drawing += "\x1b[?7h";
    let _ = stderr().write_all(drawing.as_bytes());
    lines.len()
}

/// A line for each, and one for those there is no room for.
fn table(stubs: &[Stub]) -> Vec<String> {
    let rows = ranked(stubs);
    let more = rows.len().saturating_sub(ROWS);
    let mut lines: Vec<String> = rows.into_iter().take(ROWS).map(row).collect();
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    lines
}

/// Those that are still there, or were to the end, the best first; then the others, from the last that went.
pub(crate) fn ranked(stubs: &[Stub]) -> Vec<&Stub> {
    let mut ranked: Vec<&Stub> = stubs.iter().collect();
    let won =
        |stub: &Stub| (stub.reason == Reason::Won, stub.dropped_at.is_none(), stub.dropped_at);
    ranked.sort_by(|a, b| {
        let by_place = won(b).cmp(&won(a)).then(number(b).total_cmp(&number(a)));
        by_place.then(a.index.cmp(&b.index))
    });
    ranked
}

fn number(stub: &Stub) -> f64 {
    stub.score().unwrap_or(f64::NEG_INFINITY)
}

/// `  3  outscored at 16    -1.234  …and the jar is in`
fn row(stub: &Stub) -> String {
    let what = match (stub.dropped_at, stub.stop) {
        (Some(at), _) => format!("{} at {at}", name(stub.reason)),
        (None, Some(_)) if stub.reason == Reason::Running => "ended".to_owned(),
        (None, _) => name(stub.reason).to_owned(),
    };
    let score = stub.score().map_or_else(String::new, |score| format!("{score:.3}"));
    let text: Vec<char> = stub.text.chars().flat_map(plain).collect();
    let skipped = text.len().saturating_sub(WIDTH);
    let cut = if skipped > 0 { "…" } else { "" };
    let text: String = text.into_iter().skip(skipped).collect();
    format!("{:>4}  {what:<18} {score:>8}  {cut}{text}", stub.index)
}

/// Why it is where it is, for display.
pub(crate) fn name(reason: Reason) -> &'static str {
    match reason {
        Reason::Running => "running",
        Reason::Won => "won",
        Reason::Outscored => "outscored",
        Reason::Bound => "no chance",
        Reason::NotFinite => "not finite",
        _ => "gone",
    }
}

/// All of them as JSON.
pub(crate) fn report(stubs: &[Stub]) -> Value {
    let stub = |stub: &Stub| {
        json!({
            "text": stub.text,
            "ids": stub.ids,
            "scores": stub.scores,
            "dropped_at": stub.dropped_at,
            "reason": stub.reason,
        })
    };
    stubs.iter().map(stub).collect()
}
