//! One vector for each text.

mod config;
mod document;
mod sentence_transformers;

use std::collections::VecDeque;

use candle_core::{DType, Tensor};

pub use config::EmbedConfig;
pub(crate) use document::Readable;
pub(crate) use sentence_transformers::read as sentence_transformers;

use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::model::{Batch, KvCache, Pass, Sight, Transformer};
use crate::pooling::{Pooling, unit_length};
use crate::refine::Remove;
use crate::statistics::Fingerprint;
use crate::thought::{EncodedBatch, Thinking, ThoughtLoop, ThoughtModel};
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
    pub(crate) normalize: Option<bool>,
    pub(crate) thinking: Option<Thinking>,
}

impl EmbedDefaults {
    /// What the checkpoint says in its `hybrid.json` goes before what it says elsewhere.
    pub(crate) fn or_own(&mut self, own: EmbedConfig) {
        if own.pooling.is_some() {
            self.unsupported = None; // asked for in the files of sentence-transformers
        }
        self.pooling = own.pooling.or(self.pooling);
        self.sight = own.sight.or(self.sight);
        self.max_tokens = own.max_tokens.or(self.max_tokens);
        if own.instruction.is_some() {
            (self.prompt, self.leaves_prompt_out) = (own.instruction, true);
        }
        (self.normalize, self.thinking) = (own.normalize, own.thinking);
    }
}

/// Vectors of many texts, each as soon as it is computed: an iterator over the index of a text, from 0 on, and
/// its vector, `hidden` numbers.
///
/// Texts run in the order of their lengths, the longest first, packed to
/// [`batch_tokens`](EmbedConfig::batch_tokens): so batches of short texts are large, and what memory is needed
/// shows at once. The texts themselves have been turned into tokens before; memory holds these, and the vectors of
/// one batch. After an error the iterator ends.
///
/// ```
/// # use candle_core::Device;
/// use hybrid_attention::{EmbedConfig, HybridModel};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let (texts, config) = (["the cat", "the cat sat on the mat"], EmbedConfig::default());
/// let all = model.embed(&texts, &config)?.to_vec2::<f32>()?;
/// for vector in model.embed_many(&texts, &config)? {
///     let (index, vector) = vector?;
///     assert_eq!(all.get(index), Some(&vector));
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Vectors {
    mind: ThoughtLoop,
    sight: Sight,
    pooling: Pooling,
    normalize: bool,
    /// The layer whose entering states are pooled; of none, what leaves the final norm.
    layer: Option<usize>,
    remove: Remove,
    batch_tokens: usize,
    /// The longest first.
    waiting: VecDeque<(usize, Tokens)>,
    /// Those of the last batch that were not returned yet.
    ready: VecDeque<(usize, Vec<f32>)>,
}

/// The tokens of a text, of which the first few are seen but not pooled.
#[derive(Clone, Debug)]
struct Tokens {
    ids: Vec<u32>,
    left_out: usize,
    /// How many stand before those of the text.
    before: usize,
    /// Whether the last one is an EOS that the tokenizer adds.
    ends: bool,
    /// Whether it was cut.
    cut: bool,
}

impl Vectors {
    pub(crate) fn new<T: AsRef<str>>(
        model: &ThoughtModel,
        tokenizer: &Tokenizer,
        defaults: &EmbedDefaults,
        config: &EmbedConfig,
        texts: &[T],
    ) -> Result<Self> {
        config.validate()?;
        if let (Some((what, got)), None) = (&defaults.unsupported, config.pooling) {
            return Err(Error::unsupported(format!("sentence-transformers {what}"), got));
        }
        let sight = config.sight.or(defaults.sight).unwrap_or(Sight::Causal);
        let of_sight = match sight {
            Sight::Causal => Pooling::WeightedMean,
            Sight::Bidirectional => Pooling::Mean,
        };
        let none = Thinking::none();
        let thinking = config.thinking.as_ref().or(defaults.thinking.as_ref()).unwrap_or(&none);
        let layer = config.reads_to()?;
        let remove = config.remove.as_deref().cloned().unwrap_or_default();
        check_layer(model.decoder(), layer, thinking)?;
        check_remove(model.decoder(), &remove)?;
        let reader = Reader {
            transformer: model.decoder(),
            tokenizer,
            instruction: config.instruction.as_deref().or(defaults.prompt.as_deref()),
            leaves_out: config.instruction.is_some() || defaults.leaves_prompt_out,
            max_tokens: config.max_tokens.or(defaults.max_tokens),
        };
        let read = |(index, text): (usize, &T)| match reader.tokens(text.as_ref()) {
            Ok(tokens) => Ok((index, tokens)),
            Err(error) => Err(Error::in_text(index, error)),
        };
        let mut waiting = texts.iter().enumerate().map(read).collect::<Result<Vec<_>>>()?;
        waiting.sort_by_key(|(_, tokens)| std::cmp::Reverse(tokens.ids.len()));
        Ok(Self {
            mind: thinking.on(model)?,
            sight,
            pooling: config.pooling.or(defaults.pooling).unwrap_or(of_sight),
            normalize: config.normalize.or(defaults.normalize).unwrap_or(true),
            layer,
            remove,
            batch_tokens: config.batch_tokens,
            waiting: waiting.into(),
            ready: VecDeque::new(),
        })
    }

    /// The same vectors, which end with [`Error::Cancelled`] when this is cancelled.
    #[must_use]
    pub fn cancel(mut self, cancel: Cancel) -> Self {
        self.mind = self.mind.cancel(cancel);
        self
    }

    /// All of them, `(texts, hidden)`, in the order of the texts.
    pub(crate) fn collect_all(self) -> Result<Tensor> {
        let mut vectors = vec![Vec::new(); self.len()];
        let device = self.mind.model().decoder().device().clone();
        for next in self {
            let (index, vector) = next?;
            if let Some(place) = vectors.get_mut(index) {
                *place = vector;
            }
        }
        if vectors.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        Ok(Tensor::new(vectors, &device)?)
    }

    /// The next texts that run together.
    ///
    /// ```text
    /// lengths 9 5 4 3 3, at most 8 tokens  ->  9 | 5 | 4 3 | 3
    /// ```
    fn next_batch(&mut self) -> Vec<(usize, Tokens)> {
        let (mut batch, mut held) = (Vec::new(), 0);
        while let Some((_, tokens)) = self.waiting.front() {
            held += tokens.ids.len();
            if !batch.is_empty() && held > self.batch_tokens {
                break;
            }
            batch.extend(self.waiting.pop_front());
        }
        batch
    }

    /// Vectors of these texts, whose keys and values go into `caches`, if there are any.
    fn run(
        &self,
        texts: &[(usize, Tokens)],
        caches: Option<Vec<&mut KvCache>>,
    ) -> Result<VecDeque<(usize, Vec<f32>)>> {
        let (mind, transformer) = (&self.mind, self.mind.model().decoder());
        let lengths: Vec<usize> = texts.iter().map(|(_, it)| it.ids.len()).collect();
        let left_out: Vec<usize> = texts.iter().map(|(_, it)| it.left_out).collect();
        let ids: Vec<u32> = texts.iter().flat_map(|(_, it)| it.ids.iter().copied()).collect();
        let text = EncodedBatch::new(transformer, &ids, Batch::ragged(&lengths)?)?;
        let batch = text.batch();

        let pass = match caches {
            None => Pass::uncached(batch, self.sight),
            Some(caches) => Pass::Remembered { batch, sight: self.sight, caches },
        };
        let h = match self.layer {
            Some(layer) => mind.read(&text, layer, pass)?,
            None => {
                let z = mind.encode(&text, Pass::Causal(batch))?;
                let thoughts = mind.think(&text, z, |_, _| ())?;
                transformer.norm(&mind.hand_off(&text, &thoughts, pass)?)?
            }
        };
        let vectors = self.pooling.pool_after(&h.to_dtype(DType::F32)?, batch, &left_out)?;
        let vectors = self.remove.apply(&vectors)?;
        let vectors = if self.normalize { unit_length(&vectors)? } else { vectors };

        let named = texts.iter().map(|(index, _)| *index).zip(vectors.to_vec2::<f32>()?);
        let finite =
            |(index, vector): (usize, Vec<f32>)| match vector.iter().all(|value| value.is_finite())
            {
                true => Ok((index, vector)),
                false => Err(Error::NotFinite { what: "vectors", position: index }),
            };
        named.map(finite).collect()
    }
}

impl Iterator for Vectors {
    type Item = Result<(usize, Vec<f32>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ready.is_empty() {
            let batch = self.next_batch();
            match batch.is_empty() {
                true => return None,
                false => match self.run(&batch, None) {
                    Ok(ready) => self.ready = ready,
                    Err(error) => {
                        self.waiting.clear();
                        return Some(Err(error));
                    }
                },
            }
        }
        self.ready.pop_front().map(Ok)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = self.ready.len() + self.waiting.len();
        (left, Some(left))
    }
}

impl ExactSizeIterator for Vectors {}

/// Refuses a layer that is not there, and one of a text that is thought about.
fn check_layer(model: &Transformer, layer: Option<usize>, thinking: &Thinking) -> Result<()> {
    let layers = model.all_layers().end;
    match layer {
        Some(layer) if layer > layers => {
            Err(Error::parameter("layer", format!("0 to {layers}"), layer))
        }
        Some(layer) if !thinking.is_none() => {
            Err(Error::parameter("layer", "none where embedding thinks", layer))
        }
        _ => Ok(()),
    }
}

/// Refuses what was found in another model.
fn check_remove(model: &Transformer, remove: &Remove) -> Result<()> {
    let hidden = model.config().hidden_size;
    if let Some(width) = remove.width().filter(|width| *width != hidden) {
        return Err(Error::parameter("remove", format!("rows of {hidden} numbers"), width));
    }
    match remove.fingerprint() {
        Some(own) => {
            let own = Fingerprint::from_numbers(own.to_vec());
            Fingerprint::of(model)?.check("remove", &own)
        }
        None => Ok(()),
    }
}

/// What turns texts into tokens.
struct Reader<'a> {
    transformer: &'a Transformer,
    tokenizer: &'a Tokenizer,
    instruction: Option<&'a str>,
    /// Whether the instruction, and BOS, are left out of the pooling.
    leaves_out: bool,
    max_tokens: Option<usize>,
}

impl Reader<'_> {
    fn tokens(&self, text: &str) -> Result<Tokens> {
        let (tokenizer, instruction) = (self.tokenizer, self.instruction.unwrap_or_default());
        let all = format!("{instruction}{text}");
        let (mut ids, before) = tokenizer.encode_after(&all, instruction.len())?;
        let left_out = if self.leaves_out { before } else { 0 };
        let eos = ids.last().copied();
        let eos = eos.filter(|id| tokenizer.adds_eos() && Some(*id) == tokenizer.eos_token_id());
        let most = self.max_tokens.filter(|most| *most < ids.len());
        if let Some(most) = most {
            ids.truncate(most - usize::from(eos.is_some()));
            ids.extend(eos);
        }
        let (ends, cut) = (eos.is_some(), most.is_some());
        self.transformer.check_context(ids.len())?;
        self.transformer.check_ids(&ids)?;
        match left_out < ids.len() {
            true => Ok(Tokens { ids, left_out, before, ends, cut }),
            false => Err(Error::EmptyPrompt),
        }
    }
}
