//! `hybrid chat` in a terminal: keys and pasted bytes go in, and what comes out is drawn as a terminal would.
#![cfg(unix)]

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use candle_core::Device;
use hybrid_attention::{Answer, GenerationConfig, HybridModel, Message};
use hybrid_attention_testing::{CONFIG, Result, checkpoint};
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

const UP: &str = "\x1b[A";
const LEFT: &str = "\x1b[D";
const ENTER: &str = "\r";

/// As a terminal sends a pasted text: line breaks are those of the key, between marks.
fn pasted(text: &str) -> String {
    format!("\x1b[200~{}\x1b[201~", text.replace('\n', "\r"))
}

/// A running chat, and the screen of its terminal.
struct Terminal {
    child: Child,
    keys: File,
    output: Receiver<Vec<u8>>,
    screen: vt100::Parser,
    /// All that was written so far.
    written: String,
}

impl Terminal {
    fn chat(model: &Path, args: &[&str], term: &str) -> Result<Self> {
        let (rows, cols) = (200, 120);
        let size = Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None)?;
        let end = || -> Result<Stdio> { Ok(pty.slave.try_clone()?.into()) };
        let child = Command::new(env!("CARGO_BIN_EXE_hybrid-under-test"))
            .arg("chat")
            .arg("--model")
            .arg(model)
            .args(args)
            .env("TERM", term)
            .stdin(end()?)
            .stdout(end()?)
            .stderr(end()?)
            .spawn()?;
        drop(pty.slave); // or its end would never be seen
        let keys = File::from(pty.master);
        let (mut reader, (sender, output)) = (keys.try_clone()?, channel());
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            loop {
                match reader.read(&mut bytes) {
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    // The end, which Linux reports as an error.
                    Ok(0) | Err(_) => return,
                    Ok(count) => {
                        if sender.send(bytes[..count].to_vec()).is_err() {
                            return;
                        }
                    }
                }
            }
        });
        let screen = vt100::Parser::new(rows, cols, 0);
        let mut this = Self { child, keys, output, screen, written: String::new() };
        this.wait_for_prompt()?;
        Ok(this)
    }

    fn send(&mut self, keys: &str) -> Result {
        // In pieces: a terminal's buffer is small, and its other end may be busy drawing.
        for piece in keys.as_bytes().chunks(256) {
            self.keys.write_all(piece)?;
            self.keys.flush()?;
        }
        Ok(())
    }

    /// Reads what is written until the screen is as expected.
    fn wait(&mut self, what: &str, mut seen: impl FnMut(&Self) -> bool) -> Result {
        let start = Instant::now();
        while !seen(self) {
            match self.output.recv_timeout(PATIENCE.saturating_sub(start.elapsed())) {
                Ok(bytes) => self.take(&bytes),
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("no {what} on\n{}", self.shown()).into());
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(format!("ended without {what}:\n{}", self.shown()).into());
                }
            }
        }
        Ok(())
    }

    fn take(&mut self, bytes: &[u8]) {
        self.screen.process(bytes);
        self.written.push_str(&String::from_utf8_lossy(bytes));
    }

    fn shown(&self) -> String {
        self.screen.screen().contents()
    }

    /// Whether the cursor is behind an empty prompt on a line of its own.
    fn is_asked(&self) -> bool {
        let lines = self.shown();
        lines.lines().next_back().map(str::trim_end) == Some(">")
            && self.screen.screen().cursor_position().1 == 2
    }

    fn wait_for_prompt(&mut self) -> Result {
        self.wait("prompt", Self::is_asked)
    }

    /// Says something that is answered, and waits for the answer.
    fn say(&mut self, keys: &str) -> Result {
        let answered = self.answers().len();
        self.send(keys)?;
        self.wait("answer", |this| this.answers().len() > answered && this.is_asked())
    }

    /// The numbers of prompt tokens, answer by answer.
    fn answers(&self) -> Vec<usize> {
        let count = |line: &str| {
            let (counts, _) = line.split_once(" prompt tokens known")?;
            counts.rsplit_once(" of ")?.1.parse().ok()
        };
        // The screen breaks long lines, so this is of what was written.
        self.written.lines().filter_map(count).collect()
    }

    /// Leaves by Ctrl-D, and gives what is on the screen then.
    fn leave(mut self) -> Result<String> {
        self.send("\x04")?;
        let start = Instant::now();
        loop {
            match self.output.recv_timeout(PATIENCE.saturating_sub(start.elapsed())) {
                Ok(bytes) => self.take(&bytes),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => return Err("it does not end".into()),
            }
        }
        let status = self.child.wait()?;
        assert!(status.success(), "{status}: {}", self.shown());
        Ok(self.shown())
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A model with room for long messages.
fn model() -> Result<(TempDir, HybridModel)> {
    let folder = checkpoint(1.0, true)?;
    let config =
        CONFIG.replace(r#""max_position_embeddings": 256"#, r#""max_position_embeddings": 16384"#);
    assert_ne!(config, CONFIG);
    fs::write(folder.path().join("config.json"), config)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    Ok((folder, model))
}

const ARGS: [&str; 2] = ["--max-tokens=8", "--context=16384"];

/// The library's answers to these messages, turn by turn.
fn expected(model: &HybridModel, messages: &[&str]) -> Result<Vec<Answer>> {
    let config = GenerationConfig::default().max_tokens(8);
    let (mut turns, mut answers) = (Vec::new(), Vec::new());
    for message in messages {
        turns.push(Message::user(*message));
        let answer = model.chat(&turns, &config)?;
        turns.push(Message::assistant(answer.text.trim()));
        answers.push(answer);
    }
    Ok(answers)
}

/// That the chat has answered these messages, and only these, as the library does.
fn assert_said(terminal: &Terminal, model: &HybridModel, messages: &[&str]) -> Result {
    let answers = expected(model, messages)?;
    let lengths: Vec<usize> = answers.iter().map(|answer| answer.prompt_ids.len()).collect();
    assert_eq!(terminal.answers(), lengths, "{}", terminal.shown());
    for answer in answers {
        let line = answer.text.trim_start().lines().next().unwrap_or_default().to_owned();
        assert!(terminal.written.contains(&line), "{line:?} is not in {}", terminal.shown());
    }
    Ok(())
}

#[test]
fn a_long_pasted_line_is_whole() -> Result {
    let (folder, model) = model()?;
    let long = "the cat sat on the mat. ".repeat(420);
    let long = long.trim_end();
    assert!(long.len() > 10_000);
    // Marked as pasted, and not: then it is typed, very fast.
    for keys in [pasted(long), long.to_owned()] {
        let mut terminal = Terminal::chat(folder.path(), &ARGS, "xterm")?;
        terminal.say(&(keys + ENTER))?;
        assert_said(&terminal, &model, &[long])?;
        terminal.leave()?;
    }
    Ok(())
}

#[test]
fn pasted_lines_are_one_message() -> Result {
    let (folder, model) = model()?;
    let mut terminal = Terminal::chat(folder.path(), &ARGS, "xterm")?;
    let lines = "/etc/passwd\nsat on\n\nthe mat";
    terminal.say(&(pasted(lines) + ENTER))?;
    let more = "the dog:\n/quit";
    terminal.say(&format!("{}{}{ENTER}", "the dog:", pasted("\n/quit\n")))?;
    assert_said(&terminal, &model, &[lines, more])?;
    let screen = terminal.leave()?;
    assert!(!screen.contains("reading") && !screen.contains("thinking"), "{screen}");
    Ok(())
}

/// Lines that come too fast, or without marks, are turns of their own, and none is lost.
#[test]
fn what_is_typed_ahead_is_not_lost() -> Result {
    let (folder, model) = model()?;
    let mut terminal = Terminal::chat(folder.path(), &ARGS, "xterm")?;
    terminal.send("the cat\rsat on\rthe mat\r")?;
    terminal.wait("three answers", |this| this.answers().len() == 3 && this.is_asked())?;
    assert_said(&terminal, &model, &["the cat", "sat on", "the mat"])?;
    let screen = terminal.leave()?;
    assert!(!screen.contains("reading"), "{screen}");
    Ok(())
}

#[test]
fn keys_edit_and_call_back() -> Result {
    let (folder, model) = model()?;
    let mut terminal = Terminal::chat(folder.path(), &ARGS, "xterm")?;
    terminal.say(&format!("the dg{LEFT}o{ENTER}"))?;
    terminal.say(&format!("{UP}s{ENTER}"))?;
    terminal.say(&format!("{UP}{UP}\x01so \x05!{ENTER}"))?;
    assert_said(&terminal, &model, &["the dog", "the dogs", "so the dog!"])?;
    terminal.leave()?;
    Ok(())
}

#[test]
fn a_slash_may_begin_a_message() -> Result {
    let (folder, model) = model()?;
    let mut terminal = Terminal::chat(folder.path(), &ARGS, "xterm")?;
    terminal.say("/etc/passwd is what?\r")?;
    terminal.send("/help\r")?;
    let hint = "[/help is not a command: there are /reset and /quit; to say it, write //help]";
    terminal.wait("hint", |this| this.shown().contains(hint) && this.is_asked())?;
    terminal.say("//help\r")?;
    assert_said(&terminal, &model, &["/etc/passwd is what?", "/help"])?;
    terminal.send("/quit\r")?;
    terminal.wait("end", |_| false).err().ok_or("it goes on")?;
    assert!(terminal.child.wait()?.success());
    Ok(())
}

/// The answer that was stopped stays in the chat, and the next one is read after it.
#[test]
fn an_interrupt_stops_the_answer_and_not_the_chat() -> Result {
    let (folder, model) = model()?;
    // An end-of-sequence token that does not come, so that there is an answer to be stopped.
    let config = GenerationConfig::default().max_tokens(6000).eos_ids([]);
    let long = model.chat(&[Message::user("the cat")], &config)?.ids;
    let absent = (0..371).find(|id| !long.contains(id)).ok_or("every token comes")?;
    let config = fs::read_to_string(folder.path().join("config.json"))?;
    let config = config.replacen('{', &format!("{{\"eos_token_id\": {absent}, "), 1);
    fs::write(folder.path().join("config.json"), config)?;
    let args = ["--max-tokens=6000", "--context=16384"];
    let mut terminal = Terminal::chat(folder.path(), &args, "xterm")?;
    let before = terminal.written.len();
    terminal.send("the cat\r")?;
    // Some words of the answer have been written behind the message.
    terminal.wait("words", |this| this.written.len() > before + 2000)?;
    kill(Pid::from_raw(i32::try_from(terminal.child.id())?), Signal::SIGINT)?;
    terminal.wait("stop", |this| {
        this.shown().contains("[stopped: what was said so far is the answer]") && this.is_asked()
    })?;
    let [first] = terminal.answers()[..] else { return Err(terminal.shown().into()) };
    assert_eq!(first, expected(&model, &["the cat"])?[0].prompt_ids.len());
    // At the prompt it drops what was typed, as a key.
    terminal.send("never\x03")?;
    terminal.wait("hint", |this| {
        this.shown().contains("[/quit leaves, and so does Ctrl-D]") && this.is_asked()
    })?;
    terminal.send("/reset\r")?;
    terminal.wait("forgetting", |this| this.shown().contains("[forgotten]") && this.is_asked())?;
    terminal.leave()?;
    Ok(())
}

/// A terminal on which nothing can be drawn has its own line mode, which cuts lines: not in silence.
#[test]
fn a_line_cut_by_the_terminal_is_said_to_be() -> Result {
    let (folder, _) = model()?;
    let mut terminal = Terminal::chat(folder.path(), &ARGS, "dumb")?;
    terminal.send("the cat\n")?;
    terminal.wait("an answer", |this| this.answers().len() == 1 && this.is_asked())?;
    assert!(!terminal.shown().contains("its end may be missing"), "{}", terminal.shown());
    terminal.send(&("the cat ".repeat(600) + "\n"))?;
    terminal.wait("note", |this| this.shown().contains("its end may be missing"))?;
    Ok(())
}
