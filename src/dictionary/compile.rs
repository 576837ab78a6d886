//! Entries into vectors, each read by itself.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::{DType, Tensor};

use super::config::{DictionaryConfig, Pooled};
use super::entries::Entries;
use super::file::{About, Head, Word};
use super::forms::{Forms, borders};
use crate::error::{Error, Result};
use crate::hybrid::HybridModel;
use crate::kernels::FEW_ROWS;
use crate::model::{Batch, ForwardContext, Pass, Sight, Site, Tap, Transformer};
use crate::statistics::Fingerprint;
use crate::tokenizer::Tokenizer;

/// Tokens that run side by side.
const BATCH_TOKENS: usize = 1024;

/// Makes the vectors of a dictionary.
pub(super) struct Compiler<'a> {
    reader: &'a Transformer,
    tokenizer: &'a Tokenizer,
    entries: &'a Entries,
    config: &'a DictionaryConfig,
}

/// An entry as the model reads it.
struct Reading {
    ids: Vec<u32>,
    pooled: Range<usize>,
}

/// What reads the entries of a dictionary.
pub(super) fn reader<'a>(model: &'a HybridModel, config: &DictionaryConfig) -> &'a Transformer {
    match config.chosen_sight() {
        Sight::Bidirectional => model.thought_model().thinker(),
        Sight::Causal => model.thought_model().decoder(),
    }
}

impl<'a> Compiler<'a> {
    pub(super) fn new(
        model: &'a HybridModel,
        entries: &'a Entries,
        config: &'a DictionaryConfig,
    ) -> Result<Self> {
        config.check(model.config())?;
        let reader = reader(model, config);
        if reader.has_side_source() {
            let expected = "one that reads without a dictionary";
            return Err(Error::parameter("model", expected, "one with a dictionary"));
        }
        let needed_for = "the entries of a dictionary";
        let tokenizer = model.tokenizer().ok_or(Error::NoTokenizer { needed_for })?;
        Ok(Self { reader, tokenizer, entries, config })
    }

    /// What stands in the file before the vectors. Here it shows what is wrong with an entry.
    pub(super) fn head(&self) -> Result<Head> {
        let mut words = Vec::new();
        let (mut spelled, mut capital) = (HashMap::new(), HashMap::new());
        for (index, entry) in (0..self.entries.len()).zip(0u32..) {
            self.reading(index)?;
            let Some((headword, _)) = self.entries.get(index) else { break };
            let forms = Forms::of(headword, self.tokenizer)?;
            if forms.spelled.is_empty() && forms.capital.is_empty() {
                let message = format!("the tokenizer has no tokens for the headword {headword:?}");
                return Err(self.entries.wrong_at(index, message));
            }
            for (forms, known) in [(forms.spelled, &mut spelled), (forms.capital, &mut capital)] {
                for form in forms {
                    known.entry(form).or_insert(entry);
                }
            }
        }
        // A headword that is spelled so comes before one that is only capitalised so.
        capital.retain(|form, _| !spelled.contains_key(form));
        words.extend(spelled.into_iter().chain(capital).map(|(form, entry)| Word { form, entry }));
        words.sort_unstable_by(|a, b| (a.entry, &a.form).cmp(&(b.entry, &b.form)));

        let model = self.reader.config();
        let headwords = self.entries.iter().map(|(headword, _)| headword.to_string()).collect();
        let (config, sha256) = (self.config.clone(), self.entries.sha256());
        let about = About::new(config, headwords, sha256);
        let borders = borders(self.tokenizer, model.vocab_size);
        Head::new(&about, &Fingerprint::of(self.reader)?, &words, &borders, model.hidden_size)
    }

    /// The vectors of as many entries from `index` on as run side by side: for each of them those of all layers, as
    /// the file has them.
    pub(super) fn next(&self, index: usize) -> Result<Vec<Vec<u8>>> {
        let (mut readings, mut tokens) = (Vec::new(), 0);
        while index + readings.len() < self.entries.len() {
            let reading = self.reading(index + readings.len())?;
            tokens += reading.ids.len();
            if !readings.is_empty() && tokens > BATCH_TOKENS {
                break;
            }
            readings.push(reading);
        }
        let vectors = self.run(&readings)?; // (entries, layers, hidden)
        let dtype = self.config.chosen_dtype();
        let entry = |(at, vectors): (usize, Vec<f32>)| {
            if vectors.iter().any(|value| !value.is_finite()) {
                return Err(Error::NotFinite { what: "vectors", position: index + at });
            }
            Ok(super::file::encode(&vectors, dtype))
        };
        vectors.into_iter().enumerate().map(entry).collect()
    }

    /// The vectors of some entries, those of all layers one after the other. Few rows would round differently from many:
    /// so no pass has as few, and an entry does not show what ran beside it.
    fn run(&self, readings: &[Reading]) -> Result<Vec<Vec<f32>>> {
        let own: usize = readings.iter().map(|it| it.ids.len()).sum();
        let times = (FEW_ROWS + 1).div_ceil(own.max(1));
        let all = || (0..times).flat_map(|_| readings);
        let lengths: Vec<usize> = all().map(|it| it.ids.len()).collect();
        let ids: Vec<u32> = all().flat_map(|it| it.ids.iter().copied()).collect();
        let batch = Batch::ragged(&lengths)?;
        let rows = readings.iter().zip(batch.all_rows());
        let rows = rows.map(|(it, rows)| rows.start + it.pooled.start..rows.start + it.pooled.end);
        let (reader, config) = (self.reader, self.config);
        let mut states = States { reader, config, rows: rows.collect(), vectors: Vec::new() };
        let last = config.chosen_layers().last().copied().unwrap_or(0);
        let pass = Pass::uncached(&batch, config.chosen_sight());
        let context = ForwardContext::from(pass).tap(&mut states);
        reader.forward(&reader.embed_ids(&ids)?, 0..last + 1, context)?;
        let vectors = Tensor::stack(&states.vectors, 1)?; // (entries, layers, hidden)
        Ok(vectors.flatten_from(1)?.to_vec2()?)
    }

    fn reading(&self, index: usize) -> Result<Reading> {
        let Some((headword, definition)) = self.entries.get(index) else {
            return Err(Error::EmptyPrompt);
        };
        let (text, of_headword) = self.config.text(headword, definition)?;
        let (mut ids, bytes) = self.tokenizer.encode_spans(&text, true)?;
        let position = |is: &dyn Fn(&Range<usize>) -> bool| bytes.iter().position(is);
        let from = position(&|it| it.end > of_headword.start).unwrap_or(ids.len());
        let to = position(&|it| !it.is_empty() && it.start >= of_headword.end).unwrap_or(ids.len());
        let context = self.reader.config().max_position_embeddings;
        let most = self.config.most_tokens().unwrap_or(usize::MAX).min(context);
        if to > most || from >= to {
            let got =
                format!("the headword {headword:?} ends after {to} tokens, of {most} at most");
            return Err(self.entries.wrong_at(index, got));
        }
        if self.config.most_tokens().is_some() {
            ids.truncate(most);
        }
        if ids.len() > context {
            let got = format!(
                "{} tokens of {headword:?} and its definition, where the model has room for {context}: see \
                 max_tokens",
                ids.len()
            );
            return Err(self.entries.wrong_at(index, got));
        }
        self.reader.check_ids(&ids)?;
        let to = match self.config.chosen_rows() {
            Pooled::Headword => to,
            // What the tokenizer adds behind a text stands for none of it.
            Pooled::Entry => bytes
                .iter()
                .take(ids.len())
                .rposition(|it| !it.is_empty())
                .map_or(to, |last| last + 1),
        };
        Ok(Reading { ids, pooled: from..to })
    }
}

/// Pools what the MLPs of some layers read.
struct States<'a> {
    reader: &'a Transformer,
    config: &'a DictionaryConfig,
    /// Of each entry, among all rows.
    rows: Vec<Range<usize>>,
    /// For each layer so far: `(entries, hidden)`
    vectors: Vec<Tensor>,
}

impl Tap for States<'_> {
    fn residual(&mut self, layer: usize, site: Site, xs: &Tensor) -> Result<()> {
        if site != Site::AfterAttention || !self.config.chosen_layers().contains(&layer) {
            return Ok(());
        }
        let states = self.reader.feed_forward_input(layer, xs)?.to_dtype(DType::F32)?;
        let rows = self.rows.iter().map(|rows| states.narrow(0, rows.start, rows.len()));
        let rows = Tensor::cat(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)?;
        let lengths: Vec<usize> = self.rows.iter().map(ExactSizeIterator::len).collect();
        self.vectors.push(self.config.chosen_pooling().pool(&rows, &Batch::ragged(&lengths)?)?);
        Ok(())
    }
}
