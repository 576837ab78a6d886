//! What the user of a chat says: edited in a terminal, or a line at a time from anything else.

use std::io::{BufRead, ErrorKind, IsTerminal, Write, stderr, stdin, stdout};

use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use rustyline::{Behavior, Config, Editor};

use crate::terminal::{Result, say};

/// What is shown in front of what the user types.
const PROMPT: &str = "> ";

/// A line of this many bytes has reached the end of what a terminal's own line mode holds.
const LINE_MODE: usize = 4095;

/// Terminals that a line editor cannot draw on, by the names in `TERM`: their own line mode has to do.
const NO_EDITOR: [&str; 3] = ["dumb", "cons25", "emacs"];

/// What was said.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Said {
    Message(String),
    Reset,
    Quit,
    /// What looks like a command and is none.
    Unknown(String),
    Nothing,
}

impl Said {
    /// A command is a word of letters with a slash in front of it, and nothing else: what only begins like
    /// one (`/etc/passwd is what?`), or has several lines, is a message. One more slash makes a message of
    /// any such word.
    ///
    /// ```text
    /// /quit -> a command    //quit -> the message /quit    ///quit -> the message //quit
    /// ```
    pub(crate) fn new(text: &str) -> Self {
        let text = match text.trim() {
            line if !line.contains(['\n', '\r']) => line,
            _ => text.trim_end().trim_start_matches(['\n', '\r']), // the first line may be indented
        };
        let word = text.trim_start_matches('/');
        let slashes = text.len() - word.len();
        let is_word = !word.is_empty() && word.chars().all(|c| c.is_ascii_alphabetic());
        match (slashes, word) {
            (_, "") if slashes == 0 => Self::Nothing,
            (1, "reset") => Self::Reset,
            (1, "quit") => Self::Quit,
            (1, _) if is_word => Self::Unknown(text.to_owned()),
            (2.., _) if is_word => Self::Message(text.chars().skip(1).collect()),
            _ => Self::Message(text.to_owned()),
        }
    }
}

/// Where it comes from.
pub(crate) enum Input {
    /// With keys to edit it and to call back what was said before. Of a pasted text the terminal tells where it
    /// begins and ends, and it stays one message.
    Editor(Box<Editor<(), MemHistory>>),
    /// By lines, of any length; with a prompt, where they come from a terminal all the same.
    Lines { prompt: bool },
}

impl Input {
    pub(crate) fn new() -> Result<Self> {
        let prompt = stdin().is_terminal();
        let terminal = std::env::var("TERM").unwrap_or_default();
        if !prompt || NO_EDITOR.iter().any(|name| name.eq_ignore_ascii_case(&terminal)) {
            return Ok(Self::Lines { prompt });
        }
        // What is typed is shown in the terminal, also where the answers go to a file.
        let behavior = if stdout().is_terminal() { Behavior::Stdio } else { Behavior::PreferTerm };
        let config = Config::builder().auto_add_history(true).behavior(behavior).build();
        let history = MemHistory::with_config(&config);
        let editor = Editor::with_history(config, history)?;
        Ok(Self::Editor(Box::new(editor)))
    }

    /// Whether a terminal is on the other side.
    pub(crate) fn is_terminal(&self) -> bool {
        !matches!(self, Self::Lines { prompt: false })
    }

    /// The next that is said; the end of the input quits.
    pub(crate) fn next(&mut self) -> Result<Said> {
        let text = match self {
            Self::Editor(editor) => match editor.readline(PROMPT) {
                Ok(text) => text,
                Err(ReadlineError::Eof) => return Ok(Said::Quit),
                Err(ReadlineError::Interrupted) => {
                    say("[/quit leaves, and so does Ctrl-D]");
                    return Ok(Said::Nothing);
                }
                Err(ReadlineError::Io(error)) if error.kind() == ErrorKind::InvalidData => {
                    return Ok(not_utf8());
                }
                Err(error) => return Err(error.into()),
            },
            Self::Lines { prompt } => {
                if *prompt {
                    write!(stderr(), "{PROMPT}")?;
                }
                let mut line = Vec::new();
                if stdin().lock().read_until(b'\n', &mut line)? == 0 {
                    return Ok(Said::Quit);
                }
                if *prompt && line.len() > LINE_MODE {
                    say("[as long as this terminal lets a line become: its end may be missing]");
                }
                let Ok(line) = String::from_utf8(line) else { return Ok(not_utf8()) };
                line
            }
        };
        Ok(Said::new(&text))
    }
}

fn not_utf8() -> Said {
    say("[not UTF-8: ignored]");
    Said::Nothing
}

#[cfg(test)]
mod tests {
    use super::Said;

    #[test]
    fn only_a_word_after_one_slash_is_a_command() {
        let message = |text: &str| Said::Message(text.to_owned());
        for (text, said) in [
            ("", Said::Nothing),
            (" \r\n", Said::Nothing),
            ("/reset\n", Said::Reset),
            (" /quit \r\n", Said::Quit),
            ("/help", Said::Unknown("/help".into())),
            ("/quit now", message("/quit now")),
            ("/etc/passwd is what?", message("/etc/passwd is what?")),
            ("/etc", Said::Unknown("/etc".into())),
            ("//etc", message("/etc")),
            ("///etc", message("//etc")),
            ("// a comment", message("// a comment")),
            ("/", message("/")),
            ("/quit\n/reset", message("/quit\n/reset")),
            ("\n  a\n b \n", message("  a\n b")),
            ("  sat on \n", message("sat on")),
        ] {
            assert_eq!(Said::new(text), said, "{text:?}");
        }
    }
}
