//! Chat templates: Jinja, rendered as transformers renders them.

use std::fmt;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde};
use minijinja::{AutoEscape, Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter};

use crate::error::{Error, Result};

/// The name of the one template in its environment.
const NAME: &str = "chat_template";

/// The most instructions that one rendering may run. A message costs a few dozen.
const FUEL: u64 = 10_000_000;

/// Bytes of the longest template that is compiled; the longest published ones have about 20,000.
const LONGEST: usize = 1 << 17;

/// The stack that a template is compiled on. The compiler recurses for every operator, so a long enough
/// sum would overflow the caller's stack. The longest accepted one takes about 30 MB; whatever is not
/// used takes no memory.
const STACK: usize = 256 << 20;

/// Roles whose messages a template may treat as it likes: move, shorten or omit them.
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

/// A compiled chat template, or why it does not compile: the model is usable without one.
#[derive(Debug)]
pub(super) struct ChatTemplate(Result<Environment<'static>, String>);

impl ChatTemplate {
    /// Compiles `source`; `tokens` are variables of the template, where they have a value.
    pub(super) fn new(source: &str, tokens: [(&'static str, Option<String>); 4]) -> Self {
        if source.len() > LONGEST {
            let message = format!("{} bytes long: at most {LONGEST} are compiled", source.len());
            return Self(Err(message));
        }
        Self(std::thread::scope(|scope| {
            let compile = || compile(source, tokens).map_err(|error| error.to_string());
            let thread = std::thread::Builder::new().stack_size(STACK);
            let thread = thread.spawn_scoped(scope, compile).map_err(|error| error.to_string())?;
            thread.join().unwrap_or_else(|_| Err("the compiler gave up on it".to_owned()))
        }))
    }

    pub(super) fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let env =
            self.0.as_ref().map_err(|message| Error::Template { message: message.clone() })?;
        if messages.is_empty() {
            return Err(Error::parameter("messages", "at least one", "none"));
        }
        let values = Value::from(Serde(messages));
        let variables =
            context! { messages => values, add_generation_prompt, tools => (), documents => () };
        let text = env
            .get_template(NAME)
            .and_then(|template| template.render(variables))
            .map_err(|error| Error::Template { message: describe(&error) })?;
        // Many templates silently skip a role that they do not know.
        let passed_over = |message: &&Message| {
            !ROLES.contains(&message.role.as_str()) && !text.contains(message.content.trim())
        };
        match messages.iter().find(passed_over) {
            Some(Message { role, .. }) => {
                let message = format!("it passes over a message of the role {role:?}");
                Err(Error::Template { message })
            }
            None => Ok(text),
        }
    }
}

fn compile(
    source: &str,
    tokens: [(&'static str, Option<String>); 4],
) -> Result<Environment<'static>, minijinja::Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_fuel(Some(FUEL));
    env.add_filter("tojson", to_json);
    env.add_function("strftime_now", strftime_now);
    env.add_function("raise_exception", raise_exception);
    for (name, token) in tokens {
        if let Some(token) = token {
            env.add_global(name, token);
        }
    }
    env.add_template_owned(NAME, without_generation_tags(source))?;
    Ok(env)
}

/// The exception that a template raised, in its own words, or else the engine's message.
fn describe(error: &minijinja::Error) -> String {
    if error.kind() == ErrorKind::OutOfFuel {
        return format!("not finished after {FUEL} steps");
    }
    let causes = std::iter::successors(Some(error as &dyn std::error::Error), |e| e.source());
    let raised = causes.into_iter().find_map(|e| e.downcast_ref::<Raised>());
    raised.map_or_else(|| error.to_string(), |Raised(message)| message.clone())
}

/// Marks an error as raised by the template itself.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: &Value) -> Result<Value, minijinja::Error> {
    let raised = Raised(message.to_string());
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raised").with_source(raised))
}

/// Local time, in a format of the C library.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    jiff::fmt::strtime::format(format, &jiff::Zoned::now()).map_err(|error| {
        let message = format!("strftime_now cannot write {format:?}: {error}");
        minijinja::Error::new(ErrorKind::InvalidOperation, message)
    })
}

/// JSON as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it. minijinja's own
/// filter escapes what is special in HTML.
fn to_json(
    value: &Value,
    positional: Rest<Value>,
    options: Kwargs,
) -> Result<Value, minijinja::Error> {
    let ensure_ascii = positional.first().cloned().or(options.get("ensure_ascii")?);
    let indent = positional.get(1).cloned().or(options.get("indent")?).filter(|v| !v.is_none());
    options.assert_all_used()?;
    if positional.len() > 2 || ensure_ascii.is_some_and(|v| v.is_true()) {
        let message = "tojson takes ensure_ascii=false and indent only";
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, message));
    }
    let json = match indent {
        None => write_json(value, Spaced),
        Some(indent) => {
            // At most the width of a page, so that a template cannot ask for gigabytes.
            let indent = " ".repeat(usize::try_from(indent)?.min(80));
            write_json(value, PrettyFormatter::with_indent(indent.as_bytes()))
        }
    };
    let bad =
        |error| minijinja::Error::new(ErrorKind::BadSerialization, "tojson").with_source(error);
    json.map(Value::from).map_err(bad)
}

fn write_json(value: &Value, formatter: impl Formatter) -> serde_json::Result<String> {
    let mut json = Vec::new();
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, formatter))?;
    Ok(String::from_utf8_lossy(&json).into_owned())
}

/// JSON on one line with a space after each comma and colon: `{"a": [1, 2]}`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        CompactFormatter.begin_object_value(w)?;
        w.write_all(b" ")
    }
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
