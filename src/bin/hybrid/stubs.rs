//! Candidates as they are written: a table that is redrawn in a terminal, and a line for each that goes elsewhere.

use std::io::{IsTerminal, stderr};

use hybrid_attention::generate::{Reason, Stub};
use hybrid_attention::{GenerationConfig, HybridModel, Prompt, TokenStream};
use indicatif::{ProgressBar, ProgressStyle};
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
    if !stderr().is_terminal() {
        let mut said = 0;
        return stream.on_candidates(move |stubs| {
            let mut gone: Vec<&Stub> =
                stubs.iter().filter(|stub| stub.reason != Reason::Running).collect();
            gone.sort_by_key(|stub| (stub.dropped_at.unwrap_or(usize::MAX), stub.index));
            gone.iter().skip(said).for_each(|stub| say(&format!("[{}]", row(stub))));
            said = gone.len();
        });
    }
    let style = ProgressStyle::with_template("{msg}");
    let bar = ProgressBar::new_spinner()
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    stream.on_candidates(move |stubs| {
        bar.set_message(table(stubs));
        bar.tick();
        if !stubs.iter().any(|stub| stub.reason == Reason::Running) {
            bar.abandon(); // it stays where it is
        }
    })
}

fn table(stubs: &[Stub]) -> String {
    let rows = ranked(stubs);
    let more = rows.len().saturating_sub(ROWS);
    let mut lines: Vec<String> = rows.into_iter().take(ROWS).map(row).collect();
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    lines.join("\n")
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
