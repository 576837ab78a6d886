//! The name of a model on the hub, and what of it a path may be made of.

use std::fmt;

use crate::error::{Error, Result};

/// The branch that is meant where none is named.
pub(super) const MAIN: &str = "main";

/// A repository, a revision of it, and what is wanted of it. All three are safe to make paths of: nothing
/// in them leads out of the folder that it is appended to.
#[derive(Clone, Debug)]
pub(super) struct Name {
    /// `org/name`.
    repo: String,
    revision: String,
    choice: Choice,
}

/// What of a repository is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// Its safetensors; without any, its only GGUF file.
    Whole,
    /// This GGUF file.
    File(String),
    /// The GGUF file whose name ends so, as `Q4_K_M`.
    Tag(String),
}

impl Name {
    /// `org/name`, `org/name@revision`, and either with `/FILE.gguf` or `:TAG` behind it.
    ///
    /// A revision ends at the next slash, as in the URIs of `huggingface_hub`, except for those of the
    /// form `refs/pr/1` and `refs/convert/parquet`.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let refused = || {
            let expected = "a file or folder that exists, or org/name as on the Hugging Face hub, \
                            with @REVISION, /FILE.gguf or :TAG behind it if wanted";
            Error::parameter("model", expected, format!("{text:?}"))
        };
        let (org, rest) = text.split_once('/').ok_or_else(refused)?;
        let (name, mut rest) = rest.split_at(rest.find(['@', '/', ':']).unwrap_or(rest.len()));
        if !is_label(org) || !is_label(name) || name.ends_with(".git") {
            return Err(refused());
        }
        let mut revision = MAIN;
        if let Some(after) = rest.strip_prefix('@') {
            let slashes = ["refs/pr/", "refs/convert/"].iter().find(|it| after.starts_with(**it));
            let from = slashes.map_or(0, |it| it.len());
            let tail = after.get(from..).unwrap_or_default();
            let end = from + tail.find(['/', ':']).unwrap_or(tail.len());
            (revision, rest) = after.split_at(end);
        }
        let choice = match (rest.strip_prefix('/'), rest.strip_prefix(':')) {
            (Some(file), _) => Choice::file(file)?,
            (_, Some(file)) if is_gguf(file) => Choice::file(file)?,
            (_, Some(tag)) if is_path(tag) && !tag.contains('/') => Choice::Tag(tag.to_string()),
            (None, None) => Choice::Whole,
            _ => return Err(refused()),
        };
        Self { repo: format!("{org}/{name}"), revision: MAIN.to_string(), choice }.at(revision)
    }

    /// The same at another revision.
    pub(super) fn at(mut self, revision: &str) -> Result<Self> {
        if !is_path(revision) {
            let expected = "a branch, a tag or a commit";
            return Err(Error::parameter("revision", expected, format!("{revision:?}")));
        }
        self.revision = revision.to_string();
        Ok(self)
    }

    /// Something else of the same repository.
    pub(super) fn choosing(mut self, choice: Choice) -> Self {
        self.choice = choice;
        self
    }

    pub(super) fn repo(&self) -> &str {
        &self.repo
    }

    pub(super) fn revision(&self) -> &str {
        &self.revision
    }

    pub(super) fn choice(&self) -> &Choice {
        &self.choice
    }

    /// The folder in the cache: `models--org--name`.
    pub(super) fn folder(&self) -> String {
        format!("models--{}", self.repo.replace('/', "--"))
    }
}

impl Choice {
    pub(super) fn file(file: &str) -> Result<Self> {
        if !is_path(file) || !is_gguf(file) {
            let expected = "the name of a .gguf file in the repository";
            return Err(Error::parameter("file", expected, format!("{file:?}")));
        }
        Ok(Self::File(file.to_string()))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        if self.revision != MAIN {
            write!(f, "@{}", self.revision)?;
        }
        match &self.choice {
            Choice::Whole => Ok(()),
            Choice::File(file) => write!(f, "/{file}"),
            Choice::Tag(tag) => write!(f, ":{tag}"),
        }
    }
}

/// Half of the name of a repository, by the rules of the hub: 1 to 96 of letters, digits, `-`, `_` and `.`,
/// without `-` or `.` at either end, and without `--` and `..`. The cache writes `/` as `--`.
fn is_label(text: &str) -> bool {
    let ends = |c: char| c.is_ascii_alphanumeric() || c == '_';
    (1..=96).contains(&text.len())
        && text.chars().all(|c| ends(c) || c == '-' || c == '.')
        && text.starts_with(ends)
        && text.ends_with(ends)
        && !text.contains("--")
        && !text.contains("..")
}

/// Whether `text` is names with `/` between them, none of which leads anywhere else on any system.
pub(super) fn is_path(text: &str) -> bool {
    text.len() <= 1024
        && text.split('/').all(|name| {
            !matches!(name, "" | "." | "..")
                && name.len() <= 255
                && !name.contains(|c: char| c.is_control() || c == '\\' || c == ':')
        })
}

/// Whether `text` is the whole name of a commit.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

pub(super) fn is_gguf(text: &str) -> bool {
    text.rsplit_once('.').is_some_and(|(_, kind)| kind.eq_ignore_ascii_case("gguf"))
}
