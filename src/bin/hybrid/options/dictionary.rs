//! A dictionary beside the texts of a model.

use std::path::PathBuf;

use candle_core::Device;
use clap::Args;
use hybrid_attention::HybridModel;
use hybrid_attention::dictionary::{Dictionary, DictionaryAdapter};

use super::model::AdapterFor;
use crate::terminal::{self, Result};

/// Which dictionary a model reads, and how.
#[derive(Args, Debug)]
#[command(next_help_heading = "Model")]
pub(crate) struct DictionaryArgs {
    /// A dictionary that `hybrid dictionary compile` made with the same model and adapter: words of texts are looked
    /// up in it
    #[arg(long, value_name = "PATH", hide_short_help = true)]
    dictionary: Option<PathBuf>,

    /// What was trained to read it [default: dictionary_adapter.safetensors beside it; without one, nothing of it
    /// is read]
    #[arg(long, value_name = "PATH", requires = "dictionary", hide_short_help = true)]
    dictionary_adapter: Option<PathBuf>,

    /// When the dictionary is read
    #[arg(long, value_enum, default_value_t = AdapterFor::Both, requires = "dictionary", hide_short_help = true)]
    dictionary_for: AdapterFor,
}

/// A dictionary, and what reads it, if anything does.
pub(super) struct Opened {
    dictionary: Dictionary,
    adapter: Option<DictionaryAdapter>,
}

impl DictionaryArgs {
    /// Opens the files, if any were given.
    pub(super) fn open(&self, device: &Device) -> Result<Option<Opened>> {
        let Some(path) = &self.dictionary else { return Ok(None) };
        let beside = path.with_file_name(DictionaryAdapter::FILE);
        let adapter = self.dictionary_adapter.clone().or(beside.is_file().then_some(beside));
        let adapter = adapter.map(|path| DictionaryAdapter::open(path, device)).transpose()?;
        Ok(Some(Opened { dictionary: Dictionary::open(path)?, adapter }))
    }

    /// `model` with what was opened.
    pub(super) fn apply(&self, model: HybridModel, opened: Opened) -> Result<HybridModel> {
        let Opened { dictionary, adapter } = opened;
        let adapter = match adapter {
            Some(adapter) => adapter,
            None => {
                terminal::say(
                    "note: without --dictionary-adapter nothing of the dictionary is read",
                );
                let (config, device) = (model.config(), model.transformer().device());
                DictionaryAdapter::new(config, dictionary.config(), 1, 0, device)?
            }
        };
        Ok(model.with_dictionary(&dictionary, &adapter, self.dictionary_for.into())?)
    }
}
