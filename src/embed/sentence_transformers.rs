//! The files that sentence-transformers puts beside a checkpoint.

use std::ffi::OsStr;
use std::path::Path;

use serde_json::Value;

use super::EmbedDefaults;
use crate::config::Fields;
use crate::error::{Error, Result};
use crate::load::read_text;
use crate::pooling::Pooling;

/// What they say of embedding; nothing where there is no `modules.json`.
///
/// # Errors
/// [`Error::Io`] and [`Error::Malformed`], naming the file, and [`Error::Config`], naming the field.
pub(crate) fn read(folder: &Path) -> Result<EmbedDefaults> {
    let mut defaults = EmbedDefaults::default();
    let Some(modules) = text(&folder.join("modules.json"))? else { return Ok(defaults) };
    let path = folder.join("modules.json");
    let modules: Vec<Value> =
        serde_json::from_str(&modules).map_err(|error| Error::malformed(&path, error))?;
    for module in &modules {
        let field = |name: &str| module.get(name).and_then(Value::as_str).unwrap_or_default();
        match field("type").rsplit('.').next() {
            Some("Transformer" | "Normalize") => {}
            // A path that is more than a name could reach outside the folder.
            Some("Pooling")
                if Path::new(field("path")).file_name() == Some(OsStr::new(field("path"))) =>
            {
                pooling(&folder.join(field("path")), &mut defaults)?;
            }
            _ => defaults.unsupported = Some(("module", field("type").to_owned())),
        }
    }
    if let Some(fields) = fields(&folder.join("sentence_bert_config.json"))? {
        defaults.max_tokens = fields.size("max_seq_length")?.filter(|most| *most > 0);
    }
    if let Some(fields) = fields(&folder.join("config_sentence_transformers.json"))?
        && let (Some(name), Some(prompts)) =
            (fields.text("default_prompt_name")?, fields.object("prompts")?)
    {
        defaults.prompt = prompts.text(name)?.map(str::to_owned);
    }
    Ok(defaults)
}

/// The pooling module's own configuration.
fn pooling(folder: &Path, defaults: &mut EmbedDefaults) -> Result<()> {
    let Some(fields) = fields(&folder.join("config.json"))? else { return Ok(()) };
    for (name, value) in fields.iter() {
        let Some(mode) = name.strip_prefix("pooling_mode_") else { continue };
        if value.as_bool() != Some(true) {
            continue;
        }
        let kind = match mode {
            "mean_tokens" => Pooling::Mean,
            "weightedmean_tokens" => Pooling::WeightedMean,
            "lasttoken" => Pooling::LastToken,
            _ => {
                defaults.unsupported = Some(("pooling", name.to_owned()));
                continue;
            }
        };
        if defaults.pooling.replace(kind).is_some() {
            // Side by side, they would make a longer vector.
            defaults.unsupported = Some(("pooling", "several modes at once".to_owned()));
        }
    }
    defaults.leaves_prompt_out = fields.flag("include_prompt")? == Some(false);
    Ok(())
}

fn fields(path: &Path) -> Result<Option<Fields>> {
    let Some(text) = text(path)? else { return Ok(None) };
    Fields::parse(&text, &path.display().to_string()).map(Some)
}

fn text(path: &Path) -> Result<Option<String>> {
    match path.is_file() {
        true => read_text(path).map(Some),
        false => Ok(None),
    }
}
