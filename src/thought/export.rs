//! Thoughts as a prompt for another engine.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::json;

use super::{EncodedBatch, HandOff, Thinking, ThoughtLoop, Thoughts};
use crate::adapter::{Values, serialize};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::model::flat;
use crate::replace::replace;

/// How thoughts came about: whether they are a prompt, and of what.
#[derive(Clone, Debug)]
pub struct Origin {
    ids: Vec<u32>,
    sequences: usize,
    thinking: Thinking,
    span: Range<usize>,
    config: Config,
    /// Whether the decoder looks something up by tokens.
    looks_up: bool,
}

impl Origin {
    pub(super) fn new(mind: &ThoughtLoop, text: &EncodedBatch) -> Self {
        Self {
            ids: text.ids().to_vec(),
            sequences: text.batch().sequences(),
            thinking: mind.thinking.clone(),
            span: mind.span(),
            config: mind.model.decoder().config().clone(),
            looks_up: mind.model.decoder().has_side_source(),
        }
    }

    /// The tokens that were thought about.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// What else than the embeddings of one prompt the decoder would have to be given.
    fn check(&self) -> Result<()> {
        let not = |name, expected: &str, got: String| {
            Err(Error::parameter(name, format!("{expected}, for a prompt in embeddings"), got))
        };
        if self.sequences != 1 {
            return not("sequences", "one", self.sequences.to_string());
        }
        if !self.thinking.is_none() {
            if self.span.start > 0 {
                let Range { start, end } = self.span;
                let got = format!("{start}..{end}: these thoughts enter layer {start}");
                return not("span", "one that begins at layer 0", got);
            }
            if self.thinking.hand_off != HandOff::Refined {
                let got = format!("{:?}, which hands over keys and values", self.thinking.hand_off);
                return not("hand_off", "Refined", got);
            }
            if self.thinking.rethink_every > 0 {
                let got =
                    format!("{}: the answer is thought about, too", self.thinking.rethink_every);
                return not("rethink_every", "0", got);
            }
        }
        if self.looks_up {
            let got = "one with a dictionary, which embeddings do not bring".to_string();
            return not("model", "one that decodes without a dictionary", got);
        }
        if self.thinking.output_nudge.is_some() {
            return not("output_nudge", "none", "one, which is added before the head".to_string());
        }
        Ok(())
    }

    /// What a file says of the prompt in it, and of the model that it is for.
    fn metadata(&self, passes: usize) -> HashMap<String, String> {
        let Config { vocab_size, hidden_size, num_hidden_layers, rope_theta, .. } = self.config;
        let model = json!({
            "vocab_size": vocab_size, "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers, "rope_theta": rope_theta,
        });
        let ids = json!(self.ids);
        let all = [("prompt_ids", ids), ("passes", json!(passes)), ("model", model)];
        all.into_iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
    }
}

impl Thoughts {
    /// The thoughts as a prompt in embeddings, `(tokens, hidden)`, in `f32`: read causally from layer 0 on, by any
    /// engine that has the model's weights and takes embeddings in the place of tokens, they give the answer that
    /// this crate gives. Positions are 0, 1, 2, …, as those of the tokens were.
    ///
    /// That is so for thoughts of a span from layer 0 on that are handed off as [`HandOff::Refined`]. The rows of
    /// context are thoughts; those of plain tokens, and of the last token of the prompt, are still their embeddings.
    /// Without passes, all are. An [adapter](crate::Adapter) that the decoder has must be merged into the other
    /// engine's weights; one for thinking alone has done its work. So has a [dictionary](crate::dictionary) that is for
    /// thinking alone; with any other they are no prompt.
    ///
    /// # Errors
    /// [`Error::Parameter`], naming what makes them something else than a prompt: the span, the hand-off, thinking
    /// again, a nudge of the output, a dictionary, several sequences, or thoughts that were put together by hand.
    pub fn prompt_embeddings(&self) -> Result<Tensor> {
        self.origin()?.check()?;
        Ok(flat(&self.z)?.detach().to_dtype(DType::F32)?)
    }

    /// Writes [these embeddings](Self::prompt_embeddings) as the tensor `prompt_embeds` of a safetensors file, which
    /// appears whole or not at all. Its metadata, JSON each, are `prompt_ids`, the number of `passes` that were run,
    /// and `model`: the sizes that a model must have for which it is a prompt. `examples/thoughts` hands such files
    /// to transformers and vLLM.
    ///
    /// ```
    /// # use candle_core::Device;
    /// use hybrid_attention::{GenerationConfig, HybridModel, Thinking};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let config = GenerationConfig::default().thinking(Thinking::new(2)); // all layers
    /// let path = std::env::temp_dir().join("hybrid-attention-thoughts.safetensors");
    /// model.think("The coin is in the jar.", &config)?.save(&path)?;
    ///
    /// let middle = config.thinking(Thinking::new(2).span(1..3));
    /// let refused = model.think("The coin is in the jar.", &middle)?.save(&path);
    /// assert!(refused.is_err_and(|error| error.to_string().contains("span: expected one that begins at layer 0")));
    /// # std::fs::remove_file(&path)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`prompt_embeddings`](Self::prompt_embeddings); [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let (path, embeddings) = (path.as_ref(), self.prompt_embeddings()?);
        let metadata = self.origin()?.metadata(self.trace.passes.len());
        let tensors = vec![("prompt_embeds".to_string(), Values::of(&embeddings)?)];
        replace(path, &serialize(tensors, metadata, path)?)
    }

    fn origin(&self) -> Result<&Origin> {
        let by_hand =
            || Error::parameter("thoughts", "those of a thought loop", "some made by hand");
        self.origin.as_ref().ok_or_else(by_hand)
    }
}
