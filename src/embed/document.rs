//! A text embedded, and kept as a document, in one run.

use candle_core::DType;

use super::{Tokens, Vectors};
use crate::error::{Error, Result};
use crate::model::{KvCache, Sight};
use crate::thought::Document;
use crate::tokenizer::Tokenizer;

/// A text that is about to be embedded and kept.
#[derive(Debug)]
pub(crate) struct Readable {
    vectors: Vectors,
    /// As it is embedded.
    tokens: Tokens,
    /// As it is kept, where that is something else.
    said: Option<Tokens>,
}

impl Readable {
    /// The only text of `vectors`. Where it spells control tokens, which are pooled as such, it is kept as the
    /// letters that they are.
    ///
    /// # Errors
    /// [`Error::Parameter`] for embedding that thinks or stops at a layer, and for a text that it would cut;
    /// [`Error::Tokenizer`].
    pub(crate) fn new(mut vectors: Vectors, tokenizer: &Tokenizer, text: &str) -> Result<Self> {
        if !vectors.mind.thinking().is_none() {
            let expected = "none where the pass that embeds is kept";
            return Err(Error::parameter("thinking of the embedding", expected, "passes"));
        }
        if let Some(layer) = vectors.layer {
            let expected = "none where the pass that embeds is kept";
            return Err(Error::parameter("layer", expected, layer));
        }
        let Some((_, tokens)) = vectors.waiting.pop_front() else { return Err(Error::EmptyPrompt) };
        if tokens.cut {
            let expected = format!("a text within the {} that are embedded", tokens.ids.len());
            return Err(Error::parameter("tokens of a kept text", expected, "more"));
        }
        let (lead, own) = tokens.ids.split_at(tokens.before);
        let own = own.get(..own.len() - usize::from(tokens.ends)).unwrap_or(&[]);
        let said = match own.iter().any(|id| tokenizer.is_special(*id)) {
            true => {
                let ids = [lead, &tokenizer.encode_said(text)?].concat();
                Some(Tokens { ids, ends: false, ..tokens.clone() })
            }
            false => None,
        };
        Ok(Self { vectors, tokens, said })
    }

    /// The tokens that are kept, and how many of them stand before the text.
    pub(crate) fn ids(&self) -> (&[u32], usize) {
        let tokens = self.said.as_ref().unwrap_or(&self.tokens);
        let kept = tokens.ids.len() - usize::from(tokens.ends);
        (tokens.ids.get(..kept).unwrap_or(&[]), tokens.before)
    }

    /// The vector of the text, and what the pass over it has left, rounded to `dtype`.
    pub(crate) fn read(&self, dtype: DType) -> Result<(Vec<f32>, Document)> {
        let model = self.vectors.mind.model();
        // The pass reads its own keys and values, which are not to be rounded yet: the vector is that of `embed`.
        let reader = match self.vectors.sight {
            Sight::Causal => model.decoder(),
            Sight::Bidirectional => model.thinker(),
        };
        let run = self.said.as_ref().unwrap_or(&self.tokens);
        let mut cache = reader.new_cache(run.ids.len())?.keeping_all();
        let vector = self.vector(run, Some(vec![&mut cache]))?;
        let vector = if self.said.is_some() { self.vector(&self.tokens, None)? } else { vector };
        let (ids, lead) = self.ids();
        let kept = cache.keep(0..ids.len())?.handed_to(model.decoder(), dtype)?;
        Ok((vector, Document::new(ids, lead, kept)?))
    }

    fn vector(&self, tokens: &Tokens, cache: Option<Vec<&mut KvCache>>) -> Result<Vec<f32>> {
        let mut vectors = self.vectors.run(&[(0, tokens.clone())], cache)?;
        vectors.pop_front().map(|(_, vector)| vector).ok_or(Error::EmptyPrompt)
    }
}
