//! `Generic::of`: the vectors of texts, as a model makes them, and what these have in common. What is found in vectors,
//! and taken out of others, is in `statistics`, which embeds no texts.

use crate::embed::EmbedConfig;
use crate::error::{Error, Result};
use crate::hybrid::HybridModel;
use crate::statistics::{Fingerprint, Generic};

impl Generic {
    /// That of the states of some texts which enter `layer`, `0` to as many layers as there are, each text read alone
    /// and pooled as [`embed`](HybridModel::embed) does it; of what leaves the final norm for `None`. See
    /// [`Generic::fit`] for another pooling, or texts of which not all vectors are wanted in memory at once.
    ///
    /// # Errors
    /// As [`HybridModel::embed`] and [`Generic::fit`].
    pub fn of<T: AsRef<str>>(
        model: &HybridModel,
        texts: &[T],
        layer: impl Into<Option<usize>>,
    ) -> Result<Self> {
        if texts.len() < 2 {
            return Err(Error::parameter("texts", "at least 2", texts.len()));
        }
        let layer = layer.into();
        let config = layer.into_iter().fold(EmbedConfig::default(), EmbedConfig::layer);
        let vectors = model.embed(texts, &config.normalize(false))?;
        Self::fit(&vectors, layer, Fingerprint::of(model.transformer())?)
    }
}
