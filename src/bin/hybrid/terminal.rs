//! What the user sees: progress, notes, and errors with all their causes.

use std::error::Error;
use std::io::{ErrorKind, Write, stderr};
use std::process::ExitCode;
use std::time::Duration;

use hybrid_attention::generate::Progress;
use hybrid_attention::{GenerationConfig, HybridModel, Prompt, StopReason, TokenStream};
use indicatif::{ProgressBar, ProgressStyle};

/// Any error: all of them end on the terminal.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Prints a line on standard error, ignoring failures. It may contain text from a file, so control
/// characters are escaped.
pub(crate) fn say(line: &str) {
    let plain: String = line.chars().flat_map(plain).collect();
    let _ = writeln!(stderr(), "{plain}");
}

/// Why an answer ended, for display.
pub(crate) fn stopped_by(stop: Option<StopReason>) -> &'static str {
    match stop {
        Some(StopReason::Eos) => "the model",
        Some(StopReason::StopId | StopReason::StopString) => "a stop text",
        Some(StopReason::MaxTokens) => "--max-tokens",
        Some(StopReason::Context) => "the end of its context",
        Some(StopReason::Intended) => "--within",
        _ => "an error",
    }
}

/// A character, made safe to show on a terminal.
pub(crate) fn plain(c: char) -> impl Iterator<Item = char> {
    let spelled = c.is_control().then(|| c.escape_default());
    let itself = spelled.is_none().then_some(c);
    spelled.into_iter().flatten().chain(itself)
}

/// A bar on standard error; silent when that is not a terminal. It shows with its first update.
pub(crate) fn bar(length: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template);
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length).with_style(style)
}

/// A spinner on standard error while there is nothing to count.
pub(crate) fn spinner(message: &'static str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(message);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// A bar for the work before the first token, and what keeps it up to date.
pub(crate) fn reading_bar() -> (ProgressBar, impl Fn(Progress) + Send + Sync + 'static) {
    let bar = bar(0, "{msg} [{bar:30}] {pos}/{len}");
    let shown = bar.clone();
    let update = move |progress| {
        let (message, done, total) = match progress {
            Progress::Think { done, total } => ("thinking", done, total),
            Progress::Prefill { done, total } => ("reading", done, total),
            _ => return,
        };
        shown.set_length(total as u64);
        shown.set_message(message);
        shown.set_position(done as u64);
    };
    (bar, update)
}

/// An answer whose prompt has been read, behind a progress bar.
pub(crate) fn begin(
    model: &HybridModel,
    prompt: Prompt,
    config: &GenerationConfig,
) -> Result<TokenStream<'static>> {
    read(model.stream(prompt, config)?)
}

/// The same of a stream.
pub(crate) fn read(stream: TokenStream<'static>) -> Result<TokenStream<'static>> {
    let (bar, update) = reading_bar();
    let mut stream = stream.on_progress(update);
    stream.read_prompt()?;
    bar.finish_and_clear();
    Ok(stream)
}

/// Runs a program's body; an error goes to standard error with all its causes, and the process
/// fails.
pub(crate) fn main(body: impl FnOnce() -> Result<()>) -> ExitCode {
    let closed = |error: &std::io::Error| error.kind() == ErrorKind::BrokenPipe;
    match body() {
        Ok(()) => ExitCode::SUCCESS,
        // The reader has gone: `hybrid generate … | head`.
        Err(error) if error.downcast_ref().is_some_and(closed) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                let more = error.to_string();
                if !text.contains(&more) {
                    text = format!("{text}: {more}");
                }
                cause = error.source();
            }
            say(&format!("error: {text}"));
            ExitCode::FAILURE
        }
    }
}
