//! Documents that are read once.

use std::sync::Arc;

use candle_core::DType;

use super::{Detail, EncodedBatch, Thinking, ThoughtLoop};
use crate::error::{Error, Result};
use crate::model::{Batch, KeptTokens, Pass};

/// A document that was read once: its tokens, and the keys and values that reading them has left in every layer. As
/// a part of a [`Prompt`](crate::Prompt::document) it is not run again. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    ids: Arc<[u32]>,
    lead: usize,
    kept: KeptTokens,
}

impl Document {
    /// Its tokens, of which the first `lead` stood before the document, and what was kept of them.
    ///
    /// # Errors
    /// [`Error::Parameter`] where not as many were kept, or not from position 0 on, or none is behind the lead.
    pub fn new(ids: &[u32], lead: usize, kept: KeptTokens) -> Result<Self> {
        let got = (kept.first(), kept.tokens());
        if got != (0, ids.len()) {
            let expected = format!("{} tokens from position 0 on", ids.len());
            let got = format!("{} from position {} on", got.1, got.0);
            return Err(Error::parameter("kept tokens", expected, got));
        }
        check_lead(ids, lead)?;
        Ok(Self { ids: ids.into(), lead, kept })
    }

    /// Its tokens, those before it included.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// How many of the tokens stood before the document when it was read: that which begins every text, an
    /// instruction. In a prompt they stand once, before the first document.
    #[must_use]
    pub fn lead(&self) -> usize {
        self.lead
    }

    /// The keys and values.
    #[must_use]
    pub fn kept(&self) -> &KeptTokens {
        &self.kept
    }
}

impl ThoughtLoop {
    /// Reads a document by itself, as the context of a prompt that begins with it would be read and handed off, and
    /// keeps what is left in the cache, as `dtype`. The first `lead` tokens are plain: see [`Document::lead`].
    ///
    /// In a prompt it stands for that context: keys and values are the same to the last bit, as far as what a pass
    /// computes does not depend on how much runs in it (see [`Transformer`](crate::model::Transformer)). With a
    /// [`Halt`](super::Halt) the document alone decides when its passes end, and ops of a refinement see it alone.
    ///
    /// ```
    /// # use candle_core::{Device, DType};
    /// use hybrid_attention::{GenerationConfig, HandOff, HybridModel, Prompt, Thinking};
    ///
    /// # fn main() -> hybrid_attention::Result<()> {
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let mind = Thinking::new(2).hand_off(HandOff::KeyValue).on(model.thought_model())?;
    /// let ids = model.tokenizer().map_or(Ok(vec![5]), |it| it.encode("Leo gave everything to Ida.", true))?;
    /// let document = mind.read_document(&ids, 0, DType::F32)?;
    ///
    /// let prompt = Prompt::default().document(&document).plain("\nWho has what Leo had?\nIt is with");
    /// let answer = model.generate(prompt, &GenerationConfig::default().max_tokens(2))?;
    /// # let _ = answer;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for no tokens behind the lead; [`Error::Parameter`] for thinking that needs the whole
    /// prompt: [again](Thinking::rethink_every), or an [output nudge](Thinking::output_nudge); as
    /// [`think`](Self::think) and [`enter`](Self::enter).
    pub fn read_document(&self, ids: &[u32], lead: usize, dtype: DType) -> Result<Document> {
        self.thinking.as_of_documents()?;
        check_lead(ids, lead)?;
        let decoder = self.model.decoder();
        let batch = Batch::one(ids.len())?.with_context(0, &[lead..ids.len()])?;
        let text = EncodedBatch::new(decoder, ids, batch)?;
        let cache = decoder.new_pool(dtype, usize::MAX)?.new_cache(ids.len())?;
        let mut cache = cache.keeping_all();
        let first = self.encode(&text, Pass::Cached(&mut cache))?;
        let thoughts = self.think(&text, first, |_done, _passes| ())?;
        self.hand_off(&text, &thoughts, Pass::Cached(&mut cache))?;
        Document::new(ids, lead, cache.keep(0..ids.len())?)
    }
}

impl Thinking {
    /// These settings without those that leave keys and values alone.
    ///
    /// # Errors
    /// [`Error::Parameter`] for thinking that needs the whole prompt.
    pub(crate) fn as_of_documents(&self) -> Result<Self> {
        if self.rethink_every > 0 && !self.is_none() {
            let expected = "0 for documents that are read once";
            return Err(Error::parameter("rethink_every", expected, self.rethink_every));
        }
        if self.output_nudge.is_some() {
            let expected = "none for documents that are read once";
            return Err(Error::parameter(
                "output_nudge",
                expected,
                "one, fitted to all of a prompt",
            ));
        }
        Ok(Self { detail: Detail::default(), gradient_passes: None, ..self.clone() })
    }
}

fn check_lead(ids: &[u32], lead: usize) -> Result<()> {
    match lead < ids.len() {
        true => Ok(()),
        false => Err(Error::EmptyPrompt),
    }
}
