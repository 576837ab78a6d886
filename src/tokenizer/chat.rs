//! Chat templates: Jinja, rendered as transformers renders them.
//!
//! A template is a program that comes with a checkpoint, from anyone. It is run with a budget: `rewrite` puts
//! questions to it into the template, `operators` and `filters` ask it for what they make and read.

mod budget;
mod filters;
mod json;
mod operators;
mod rewrite;

use std::sync::Arc;

use minijinja::machinery::{self, CodeGenerator, Instructions};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

use budget::{Budget, Raised, raised};

/// The name of the template in what the engine says about it.
const NAME: &str = "chat_template";

/// Instructions that any rendering may take, and the most that one may.
const FUEL: std::ops::RangeInclusive<u64> = 100_000..=20_000_000;

/// Instructions that a message may take, besides one for each byte of the template. It costs some tens of them.
const FUEL_OF_MESSAGE: u64 = 1000;

/// Bytes of the longest template that is compiled; the longest published ones have about 20,000.
const LONGEST: usize = 1 << 17;

/// The stack that a template is compiled and rendered on. The compiler calls itself for every operator, so a long
/// enough sum would overflow the stack of whoever loads the checkpoint. The longest one takes some
/// 60 MB; what is not used takes no memory.
const STACK: usize = 256 << 20;

/// Characters of the longest exception that is passed on.
const LONGEST_ERROR: usize = 2000;

/// Roles that a template may treat as it likes: write what they say elsewhere, or in part, or not at all.
const ROLES: [&str; 4] = ["system", "user", "assistant", "tool"];

/// One turn of a conversation.
///
/// ```
/// use hybrid_attention::Message;
///
/// let messages = [Message::system("Be brief."), Message::user("Why is the sky blue?")];
/// assert_eq!(messages[0].role, "system");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks. Which roles exist is up to the template; most know `system`, `user` and `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// An instruction about the conversation as a whole.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// Something the user says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// Something the model said.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.to_owned(), content: content.into() }
    }
}

/// What stands for the special tokens in a template.
pub(super) type NamedTokens = [(&'static str, Option<String>); 4];

/// A chat template, or why it does not compile: the model is of use without it.
#[derive(Debug)]
pub(super) struct ChatTemplate {
    source: Result<String, String>,
    /// Variables of the template, where they have a value.
    tokens: NamedTokens,
}

impl ChatTemplate {
    /// Looks whether `source` compiles.
    pub(super) fn new(source: &str, tokens: NamedTokens) -> Self {
        if source.len() > LONGEST {
            let message = format!("{} bytes long: at most {LONGEST} are compiled", source.len());
            return Self { source: Err(message), tokens };
        }
        let source = with_raw_lines(&without_generation_tags(source));
        let compiled = apart(|| compile(&source, |_, _| ()).map_err(|error| error.to_string()));
        Self { source: compiled.map(|()| source), tokens }
    }

    /// What is compiled; nothing, if it does not compile.
    pub(super) fn source(&self) -> &str {
        self.source.as_deref().unwrap_or_default()
    }

    pub(super) fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let template = |message| Error::Template { message };
        let source = self.source.as_ref().map_err(|message| template(message.clone()))?;
        if messages.is_empty() {
            return Err(Error::parameter("messages", "at least one", "none"));
        }
        let text = apart(|| self.run(source, messages, add_generation_prompt)).map_err(template)?;
        // Many templates pass over a role that they do not know, without a word.
        let passed_over = |message: &&Message| {
            !ROLES.contains(&message.role.as_str()) && !text.contains(message.content.trim())
        };
        match messages.iter().find(passed_over) {
            Some(Message { role, .. }) => {
                Err(template(format!("it passes over a message of the role {role:?}")))
            }
            None => Ok(text),
        }
    }

    fn run(
        &self,
        source: &str,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, String> {
        let bytes = messages.iter().map(|message| message.role.len() + message.content.len() + 64);
        let budget = Arc::new(Budget::new(bytes.sum()));
        let fuel = (messages.len() as u64).saturating_mul(source.len() as u64 + FUEL_OF_MESSAGE);
        let fuel = fuel.clamp(*FUEL.start(), *FUEL.end());

        let mut env = Environment::new();
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_fuel(Some(fuel));
        operators::add_to(&mut env, &budget);
        filters::add_to(&mut env, &budget);
        env.add_function("strftime_now", strftime_now);
        env.add_function("raise_exception", move |message: &Value| {
            let message = budget.text(format_args!("{message}"))?;
            Err::<Value, _>(raised(message))
        });
        for (name, token) in &self.tokens {
            if let Some(token) = token {
                env.add_global(*name, token.clone());
            }
        }
        let values = Value::from(Serde(messages));
        let root =
            context! { messages => values, add_generation_prompt, tools => (), documents => () };
        let rendered = compile(source, |instructions, blocks| {
            let mut text = String::new();
            let mut out = machinery::make_string_output(&mut text);
            // The state that comes back holds all values: it is dropped here, on this stack.
            machinery::eval(&env, &instructions, root, &blocks, &mut out, AutoEscape::None)?;
            Ok(text)
        });
        rendered.and_then(|text| text).map_err(|error| describe(&error, fuel))
    }
}

/// Runs `work` on a stack of its own, and takes a panic for a failure: minijinja cuts texts in the middle of a
/// character, and divides by how many arguments there are.
fn apart<T: Send>(work: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat template".to_owned());
        let thread = thread.stack_size(STACK).spawn_scoped(scope, work);
        let thread = thread.map_err(|error| error.to_string())?;
        thread.join().unwrap_or_else(|_| Err("the template engine gave up on it".to_owned()))
    })
}

type Blocks<'a> = std::collections::BTreeMap<&'a str, Instructions<'a>>;

/// Compiles `source`, asking its budget, for `then`.
fn compile<T>(
    source: &str,
    then: impl FnOnce(Instructions<'_>, Blocks<'_>) -> T,
) -> Result<T, minijinja::Error> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
    let parsed = machinery::parse(source, NAME, syntax)?;
    let mut generator = CodeGenerator::new(NAME, source);
    generator.compile_stmt(&rewrite::rewrite(&parsed));
    let (instructions, blocks) = generator.finish();
    Ok(then(instructions, blocks))
}

/// The exception that a template raised, in its own words, or else what the engine says.
fn describe(error: &minijinja::Error, fuel: u64) -> String {
    if error.kind() == ErrorKind::OutOfFuel {
        return format!("not finished after {fuel} steps");
    }
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |e| e.source());
    let raised = causes.into_iter().find_map(|e| e.downcast_ref::<Raised>());
    let message = raised.map_or_else(|| error.to_string(), |Raised(message)| message.clone());
    match message.char_indices().nth(LONGEST_ERROR) {
        Some((end, _)) => format!("{}…", message.get(..end).unwrap_or_default()),
        None => message,
    }
}

/// Local time, in a format of the C library.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let failed = |message| minijinja::Error::new(ErrorKind::InvalidOperation, message);
    if format.len() > 1000 {
        return Err(failed("strftime_now takes a format of at most 1000 bytes".to_owned()));
    }
    jiff::fmt::strtime::format(format, &jiff::Zoned::now())
        .map_err(|error| failed(format!("strftime_now cannot write {format:?}: {error}")))
}

/// Jinja keeps a line break behind `{% raw %}`, where minijinja drops it as it does behind other tags: one more
/// is put there for it to drop.
fn with_raw_lines(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        out.extend([before, "{%"]);
        let name = tag.trim_start_matches(['-', '+']).trim_start();
        let content = name.strip_prefix("raw").and_then(|end| end.trim_start().strip_prefix("%}"));
        rest = content.unwrap_or(tag);
        out.push_str(&tag[..tag.len() - rest.len()]);
        if content.is_some_and(|content| content.starts_with(['\n', '\r'])) {
            out.push('\n');
        }
    }
    out.push_str(rest);
    out
}

/// `{% generation %}` marks an answer for training. Jinja gives its body a scope of its own, as
/// `{% with %}` does, so `with` replaces it here.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, tag)) = rest.split_once("{%") {
        out.push_str(before);
        out.push_str("{%");
        rest = tag;
        let name = tag.trim_start_matches(['-', '+']).trim_start();
        let with = [("generation", "with"), ("endgeneration", "endwith")];
        for (generation, with) in with {
            let Some(after) = name.strip_prefix(generation) else { continue };
            if after.trim_start().trim_start_matches(['-', '+']).starts_with("%}") {
                out.extend([&tag[..tag.len() - name.len()], with]);
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}
