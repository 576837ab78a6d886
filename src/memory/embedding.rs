//! What of a text is made into vectors.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::main_point::MainPoint;
use super::salience::Salience;
use crate::embed::EmbedConfig;
use crate::error::{Error, Result};
use crate::hybrid::HybridModel;
use crate::pooling::unit_length;

/// What of a text a memory finds it by. A query is embedded the same way.
///
/// The default is the whole text. On SmolLM2-135M a main point of a quarter of the tokens finds texts better than as many
/// by chance do, and as well as the whole text does, but not better than that, and needs a second pass over the text. A
/// vector for each token finds them better than either. Measure on your own with `hybrid memory eval`; figures are
/// in `benches/README.md`.
///
/// A store keeps it as JSON, `{"main_point": {"scorer": "received", ..}}`; one with a closure can be written and not
/// be read.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Embedding {
    /// One vector of all of it, as [`HybridModel::embed`] makes it.
    Whole(EmbedConfig),
    /// One vector of its [`MainPoint`].
    MainPoint(Salience),
    /// A vector for each token of its [`MainPoint`], compared one by one (MaxSim), which needs as many
    /// times the memory.
    Words(Salience),
}

/// The text that tells models apart.
pub(super) const PROBE: &str = "Was it the old clock that stopped, or the time?";

impl Default for Embedding {
    fn default() -> Self {
        Self::Whole(EmbedConfig::default())
    }
}

/// The vectors of a text, and where the words are that they were made of: from byte, to byte, score.
pub(super) type Embedded = (Vec<Vec<f32>>, Vec<(usize, usize, f32)>);

impl Embedding {
    pub(super) fn embed(&self, model: &HybridModel, text: &str) -> Result<Embedded> {
        let point = |salience| {
            let point = MainPoint::of(model, text, salience)?;
            let spans = point.spans().iter().map(|it| (it.bytes.start, it.bytes.end, it.score));
            let spans = spans.collect();
            Ok::<_, Error>((point, spans))
        };
        match self {
            Self::Whole(config) => {
                let vectors = model.embed(&[text], config).map_err(|error| match error {
                    Error::InText { source, .. } => *source,
                    other => other,
                })?;
                Ok((rows(&vectors)?, Vec::new()))
            }
            Self::MainPoint(salience) => {
                let (point, spans) = point(salience)?;
                Ok((rows(&point.vector()?.unsqueeze(0)?)?, spans))
            }
            Self::Words(salience) => {
                let (point, spans) = point(salience)?;
                Ok((rows(&unit_length(point.states())?)?, spans))
            }
        }
    }

    /// Many texts side by side, where that is faster; `None` for those that are better embedded one by one.
    pub(super) fn embed_all(
        &self,
        model: &HybridModel,
        texts: &[&str],
    ) -> Result<Vec<Option<Embedded>>> {
        let mut all = vec![None; texts.len()];
        if let Self::Whole(config) = self {
            for next in model.embed_many(texts, config)? {
                let (index, vector) = next?;
                if let Some(place) = all.get_mut(index) {
                    *place = Some((vec![vector], Vec::new()));
                }
            }
        }
        Ok(all)
    }

    /// What a model makes of a fixed text: a fingerprint of its weights and of everything else that vectors
    /// depend on.
    pub(super) fn probe(&self, model: &HybridModel) -> Result<Vec<f32>> {
        let (vectors, _) = self.embed(model, PROBE)?;
        vectors.into_iter().next().ok_or(Error::EmptyPrompt)
    }

    /// As settings, for the store: those that the vectors depend on.
    pub(super) fn settings(&self) -> Result<Value> {
        let own = match self {
            Self::Whole(config) => {
                Self::Whole(config.clone().batch_tokens(EmbedConfig::BATCH_TOKENS))
            }
            other => other.clone(),
        };
        let refused = |error| Error::parameter("embedding", "settings that JSON can hold", error);
        serde_json::to_value(&own).map_err(refused)
    }

    /// What a store says of itself, which may be a stranger's: no more thinking than a checkpoint may ask for.
    pub(super) fn from_settings(settings: Value) -> Result<Self> {
        let unknown = |error| Error::parameter("embedding", "settings that can be read", error);
        let own: Self = serde_json::from_value(settings).map_err(unknown)?;
        own.validate()?;
        if let Self::Whole(EmbedConfig { thinking: Some(thinking), .. }) = &own {
            thinking.check_as_default()?;
        }
        Ok(own)
    }

    /// Checks what does not depend on the model.
    ///
    /// # Errors
    /// As [`EmbedConfig::validate`] and [`Salience::validate`].
    pub fn validate(&self) -> Result<()> {
        match self {
            Self::Whole(config) => config.validate(),
            Self::MainPoint(salience) | Self::Words(salience) => salience.validate(),
        }
    }
}

fn rows(vectors: &Tensor) -> Result<Vec<Vec<f32>>> {
    let rows = vectors.to_vec2::<f32>()?;
    match rows.iter().flatten().position(|value| !value.is_finite()) {
        Some(position) => Err(Error::NotFinite { what: "vectors", position }),
        None => Ok(rows),
    }
}
