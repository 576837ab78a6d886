//! Which files make up a model, by their names alone: the same for a snapshot on disk and for the list
//! that the hub gives of a repository.

use std::collections::{BTreeMap, BTreeSet};

use super::name::{Choice, Name, is_gguf};
use crate::error::{Error, Result};

/// The files that hold the weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Weights {
    /// `model.safetensors`, `consolidated.safetensors`, or those of an adapter.
    One(&'static str),
    /// What the index names.
    Shards,
    /// All parts of one GGUF model; most have one.
    Gguf(Vec<String>),
}

/// The index of shards.
pub(super) const INDEX: &str = "model.safetensors.index.json";

impl Weights {
    /// Those that `name` chooses among files of these names; `None` if there are none.
    ///
    /// Among safetensors the order is that of [`Checkpoint::open`](crate::load::Checkpoint::open); any of
    /// them comes before GGUF, unless that is asked for.
    ///
    /// # Errors
    /// [`Error::Parameter`] if several GGUF models could be meant.
    pub(super) fn among(names: &BTreeSet<String>, name: &Name) -> Result<Option<Self>> {
        if *name.choice() == Choice::Whole {
            let one = |file: &'static str| names.contains(file).then_some(Self::One(file));
            let found = one("model.safetensors")
                .or_else(|| names.contains(INDEX).then_some(Self::Shards))
                .or_else(|| one("consolidated.safetensors"))
                .or_else(|| one("adapter_model.safetensors"));
            if found.is_some() {
                return Ok(found);
            }
        }
        let mut models = BTreeMap::<&str, Vec<String>>::new();
        for file in names.iter().filter(|file| is_gguf(file)) {
            models.entry(stem(file)).or_default().push(file.clone());
        }
        match name.choice() {
            Choice::File(file) => models.retain(|model, _| *model == stem(file)),
            Choice::Tag(tag) => {
                models.retain(|model, _| ends_in(model, tag) && !is_projector(model));
            }
            Choice::Whole => models.retain(|model, _| !is_projector(model)),
        }
        if models.len() > 1 {
            let choices = models.values().filter_map(|parts| parts.first());
            let choices: Vec<_> = choices
                .map(|file| name.clone().choosing(Choice::File(file.clone())).to_string())
                .collect();
            let expected = format!("one of {}", choices.join(", "));
            return Err(Error::parameter("model", expected, name));
        }
        Ok(models.into_values().next().map(Self::Gguf))
    }

    /// The configuration that must be beside them: one of these.
    pub(super) fn configs(&self) -> &'static [&'static str] {
        match self {
            Self::One("adapter_model.safetensors") => &["adapter_config.json"],
            Self::One(_) | Self::Shards => &["config.json", "params.json"],
            Self::Gguf(_) => &[],
        }
    }
}

/// Files other than weights that this crate reads: of folders, of adapters, and of what lies beside GGUF.
#[cfg(feature = "hub")]
pub(super) fn is_beside(file: &str, weights: &Weights) -> bool {
    const ANYWAY: [&str; 2] = ["chat_template.jinja", "hybrid.json"];
    const IN_FOLDERS: [&str; 15] = [
        "config.json",
        "params.json",
        "generation_config.json",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "tekken.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.json",
        "modules.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
        INDEX,
    ];
    // `1_Pooling/config.json`, a module of sentence-transformers
    let of_module = |file: &str| {
        let folder = file.strip_suffix("/config.json").and_then(|it| it.split_once('_'));
        folder.is_some_and(|(number, module)| {
            number.bytes().all(|it| it.is_ascii_digit()) && !module.contains('/')
        })
    };
    match weights {
        _ if ANYWAY.contains(&file) => true,
        Weights::Gguf(parts) => {
            let template = file.strip_suffix(".jinja");
            template.is_some_and(|it| parts.iter().any(|part| stem(part) == it))
        }
        Weights::One(_) if file == INDEX => false,
        _ => IN_FOLDERS.contains(&file) || of_module(file),
    }
}

/// The first part of a split GGUF model that `parts` lacks. All of them say how many there are.
///
/// ```text
/// NAME-00001-of-00003.gguf, NAME-00003-of-00003.gguf      lack NAME-00002-of-00003.gguf
/// ```
pub(super) fn missing_part(parts: &[String]) -> Option<String> {
    let first = parts.first()?;
    let count = split(first)?;
    let kind = first.rsplit_once('.')?.1;
    let expected =
        (1..=count).map(|part| format!("{}-{part:05}-of-{count:05}.{kind}", stem(first)));
    expected.into_iter().find(|part| !parts.contains(part))
}

/// How many parts a split GGUF model has, if `file` is one of them.
fn split(file: &str) -> Option<usize> {
    let (rest, _) = file.rsplit_once('.')?;
    let (rest, count) = rest.rsplit_once("-of-")?;
    let (_, part) = rest.rsplit_once('-')?;
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|it| it.is_ascii_digit());
    if is_number(part) && is_number(count) { count.parse().ok() } else { None }
}

/// The name of a GGUF model: that of its file without its ending, and of which part it is.
fn stem(file: &str) -> &str {
    let whole = file.rsplit_once('.').map_or(file, |(stem, _)| stem);
    match split(file) {
        Some(_) => whole.get(..whole.len() - "-00001-of-00003".len()).unwrap_or(whole),
        None => whole,
    }
}

/// Whether `model` is called something and then, after a separator, `tag`.
fn ends_in(model: &str, tag: &str) -> bool {
    let Some((rest, end)) =
        model.len().checked_sub(tag.len()).and_then(|at| model.split_at_checked(at))
    else {
        return false;
    };
    end.eq_ignore_ascii_case(tag) && (rest.is_empty() || rest.ends_with(['-', '.', '_', '/']))
}

/// Whether this is the part of a model that sees, which is no language model.
fn is_projector(model: &str) -> bool {
    model.rsplit('/').next().is_some_and(|name| name.to_ascii_lowercase().starts_with("mmproj"))
}
