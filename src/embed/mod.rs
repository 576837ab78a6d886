//! One vector for each text.

mod config;
mod sentence_transformers;

use candle_core::{DType, Tensor};

pub use config::EmbedConfig;
pub(crate) use sentence_transformers::read as sentence_transformers;

use crate::error::{Error, Result};
use crate::model::{Batch, Pass, Sight, Transformer};
use crate::pooling::{Pooling, unit_length};
use crate::thought::{EncodedBatch, Thinking, ThoughtModel};
use crate::tokenizer::Tokenizer;

/// What a checkpoint says about embedding.
#[derive(Clone, Debug, Default)]
pub(crate) struct EmbedDefaults {
    pub(crate) pooling: Option<Pooling>,
    pub(crate) sight: Option<Sight>,
    pub(crate) max_tokens: Option<usize>,
    /// What is put in front of each text, and whether its vectors are left out of the pooling.
    pub(crate) prompt: Option<String>,
    pub(crate) leaves_prompt_out: bool,
    /// What of it this crate does not compute: an error where nothing else was asked for.
    pub(crate) unsupported: Option<(&'static str, String)>,
}

/// A model with its tokenizer, embedding as the checkpoint and the caller say.
pub(crate) struct Embedder<'a> {
    model: &'a ThoughtModel,
    tokenizer: &'a Tokenizer,
    thinking: &'a Thinking,
    sight: Sight,
    pooling: Pooling,
    normalize: bool,
    batch_size: usize,
    instruction: Option<&'a str>,
    /// Whether the instruction, and BOS, are left out of the pooling.
    leaves_out: bool,
    max_tokens: Option<usize>,
}

/// The tokens of a text, of which the first few are seen but not pooled.
struct Tokens {
    ids: Vec<u32>,
    left_out: usize,
}

impl<'a> Embedder<'a> {
    pub(crate) fn new(
        model: &'a ThoughtModel,
        tokenizer: &'a Tokenizer,
        defaults: &'a EmbedDefaults,
        config: &'a EmbedConfig,
    ) -> Result<Self> {
        for (name, value) in
            [("batch_size", Some(config.batch_size)), ("max_tokens", config.max_tokens)]
        {
            if value == Some(0) {
                return Err(Error::parameter(name, "at least 1", 0));
            }
        }
        if let (Some((what, got)), None) = (&defaults.unsupported, config.pooling) {
            return Err(Error::unsupported(format!("sentence-transformers {what}"), got));
        }
        let sight = config.sight.or(defaults.sight).unwrap_or(Sight::Causal);
        let of_sight = match sight {
            Sight::Causal => Pooling::WeightedMean,
            Sight::Bidirectional => Pooling::Mean,
        };
        Ok(Self {
            model,
            tokenizer,
            thinking: &config.thinking,
            sight,
            pooling: config.pooling.or(defaults.pooling).unwrap_or(of_sight),
            normalize: config.normalize,
            batch_size: config.batch_size,
            instruction: config.instruction.as_deref().or(defaults.prompt.as_deref()),
            leaves_out: config.instruction.is_some() || defaults.leaves_prompt_out,
            max_tokens: config.max_tokens.or(defaults.max_tokens),
        })
    }

    /// `(texts, hidden)`, in `f32`
    pub(crate) fn embed<T: AsRef<str>>(&self, texts: &[T]) -> Result<Tensor> {
        let tokens = texts.iter().enumerate().map(|(text, content)| {
            self.tokens(content.as_ref()).map_err(|error| Error::in_text(text, error))
        });
        let tokens = tokens.collect::<Result<Vec<_>>>()?;
        // With texts of similar length side by side, all batches take about the same memory.
        let mut order: Vec<usize> = (0..tokens.len()).collect();
        order.sort_by_key(|&text| tokens.get(text).map_or(0, |it| it.ids.len()));
        let mut vectors = vec![Vec::new(); tokens.len()];
        for batch in order.chunks(self.batch_size) {
            let some: Vec<_> = batch.iter().filter_map(|&text| tokens.get(text)).collect();
            let rows = self.embed_batch(&some)?.to_vec2::<f32>()?;
            for (&text, row) in batch.iter().zip(rows) {
                if row.iter().any(|value| !value.is_finite()) {
                    return Err(Error::NotFinite { what: "vectors", position: text });
                }
                if let Some(vector) = vectors.get_mut(text) {
                    *vector = row;
                }
            }
        }
        if vectors.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        Ok(Tensor::new(vectors, self.transformer().device())?)
    }

    fn transformer(&self) -> &Transformer {
        self.model.decoder()
    }

    fn tokens(&self, text: &str) -> Result<Tokens> {
        let (tokenizer, instruction) = (self.tokenizer, self.instruction.unwrap_or_default());
        let all = format!("{instruction}{text}");
        let (mut ids, before) = tokenizer.encode_after(&all, instruction.len())?;
        let left_out = if self.leaves_out { before } else { 0 };
        if let Some(most) = self.max_tokens.filter(|most| *most < ids.len()) {
            let eos = ids
                .last()
                .copied()
                .filter(|id| tokenizer.adds_eos() && Some(*id) == tokenizer.eos_token_id());
            ids.truncate(most - usize::from(eos.is_some()));
            ids.extend(eos);
        }
        self.transformer().check_context(ids.len())?;
        self.transformer().check_ids(&ids)?;
        match left_out < ids.len() {
            true => Ok(Tokens { ids, left_out }),
            false => Err(Error::EmptyPrompt),
        }
    }

    fn embed_batch(&self, texts: &[&Tokens]) -> Result<Tensor> {
        let transformer = self.transformer();
        let lengths: Vec<usize> = texts.iter().map(|it| it.ids.len()).collect();
        let left_out: Vec<usize> = texts.iter().map(|it| it.left_out).collect();
        let ids: Vec<u32> = texts.iter().flat_map(|it| it.ids.iter().copied()).collect();
        let batch = Batch::ragged(&lengths)?;
        let text = EncodedBatch::new(transformer, &ids, batch.clone())?;

        let mind = self.thinking.on(self.model)?;
        let z = mind.encode(&text, Pass::Causal(&batch))?;
        let thoughts = mind.think(&text, z, |_, _| ())?;
        let pass = Pass::uncached(&batch, self.sight);
        let h = transformer.norm(&mind.hand_off(&text, &thoughts, pass)?)?;
        let vectors = self.pooling.pool_after(&h.to_dtype(DType::F32)?, &batch, &left_out)?;
        if self.normalize { unit_length(&vectors) } else { Ok(vectors) }
    }
}
