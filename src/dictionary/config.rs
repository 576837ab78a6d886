//! How entries become vectors.

use candle_core::DType;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::model::Sight;
use crate::pooling::Pooling;

/// Where a template has the headword, and where the definition.
const HEADWORD: &str = "{headword}";
const DEFINITION: &str = "{definition}";

/// More layers than any model has.
const MOST_LAYERS: usize = 4096;

/// How the entries of a [`Dictionary`](super::Dictionary) become vectors, and for which layers.
///
/// ```
/// use hybrid_attention::Pooling;
/// use hybrid_attention::dictionary::{DictionaryConfig, Pooled};
///
/// let config = DictionaryConfig::layers(3..9).pooled(Pooled::Headword).pooling(Pooling::LastToken);
/// config.validate()?;
/// # Ok::<_, hybrid_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DictionaryConfig {
    /// Ascending.
    layers: Vec<usize>,
    pooled: Pooled,
    pooling: Pooling,
    sight: Sight,
    template: String,
    max_tokens: Option<usize>,
    /// Shows in the file by itself, and does not matter to an adapter.
    #[serde(skip, default = "f32_type")]
    dtype: DType,
}

/// Which tokens of an entry make its vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooled {
    /// All of them from the headword on.
    #[default]
    Entry,
    /// Those of the headword, which see the definition where an entry is read in both directions.
    Headword,
}

fn f32_type() -> DType {
    DType::F32
}

impl DictionaryConfig {
    /// For the MLPs of these layers, counted from 0: at least one.
    #[must_use]
    pub fn layers(layers: impl IntoIterator<Item = usize>) -> Self {
        let mut layers: Vec<usize> = layers.into_iter().take(MOST_LAYERS + 1).collect();
        layers.sort_unstable();
        layers.dedup();
        Self {
            layers,
            pooled: Pooled::default(),
            pooling: Pooling::default(),
            sight: Sight::default(),
            template: format!("- {HEADWORD}: {DEFINITION}"),
            max_tokens: None,
            dtype: DType::F32,
        }
    }

    /// Which tokens of an entry are pooled. Default [`Pooled::Entry`].
    #[must_use]
    pub fn pooled(mut self, pooled: Pooled) -> Self {
        self.pooled = pooled;
        self
    }

    /// How their states become one vector. Default [`Pooling::Mean`].
    #[must_use]
    pub fn pooling(mut self, pooling: Pooling) -> Self {
        self.pooling = pooling;
        self
    }

    /// Whether the tokens of an entry see what comes after them. In both directions an entry is read by the model's
    /// [thinker](crate::thought::ThoughtModel::thinker), and causally by its
    /// [decoder](crate::thought::ThoughtModel::decoder). Default [`Sight::Bidirectional`].
    ///
    /// A model that was never trained to see what comes next is better read causally, with
    /// [`Pooling::WeightedMean`]. Of 40 invented words that mean 20 things in two wordings each, the vectors that
    /// SmolLM2-135M makes (layers 2 to 29, every fourth, less their mean) are nearest to that of the other wording for
    /// 65 to 85 % of them when it reads so, for 25 to 50 % in both directions, and for 5 to 17 % where of these only the
    /// headword's tokens are pooled; by chance it would be 3 %.
    #[must_use]
    pub fn sight(mut self, sight: Sight) -> Self {
        self.sight = sight;
        self
    }

    /// The text of an entry, in which `{headword}` stands once, and `{definition}` once behind it. Default
    /// `- {headword}: {definition}`: something stands before the headword, because the state of the very first token
    /// of a text says little of that token.
    #[must_use]
    pub fn template(mut self, template: impl Into<String>) -> Self {
        self.template = template.into();
        self
    }

    /// Cuts the text of each entry to this many tokens, at least 1; a headword must fit whole. Default: none is cut,
    /// and one that is longer than the model's context is an error.
    #[must_use]
    pub fn max_tokens(mut self, max_tokens: usize) -> Self {
        self.max_tokens = Some(max_tokens);
        self
    }

    /// What vectors are kept as: `F32`, the default, or `BF16`, which takes half the room and rounds each number by at
    /// most 2⁻⁸ of it.
    #[must_use]
    pub fn dtype(mut self, dtype: DType) -> Self {
        self.dtype = dtype;
        self
    }

    /// Checks what does not depend on the model.
    ///
    /// # Errors
    /// [`Error::Parameter`] for no layers, a template without its two places, no tokens, or another type.
    pub fn validate(&self) -> Result<()> {
        if self.layers.is_empty() || !self.layers.is_sorted_by(|a, b| a < b) {
            let got = format!("{:?}", self.layers);
            return Err(Error::parameter("layers", "at least one, ascending", got));
        }
        if self.layers.len() > MOST_LAYERS {
            return Err(Error::parameter("layers", format!("at most {MOST_LAYERS}"), "more"));
        }
        self.parts()?;
        if self.max_tokens == Some(0) {
            return Err(Error::parameter("max_tokens", "at least 1", 0));
        }
        match self.dtype {
            DType::F32 | DType::BF16 => Ok(()),
            other => Err(Error::parameter("dtype", "F32 or BF16", format!("{other:?}"))),
        }
    }

    /// Checks that the model has these layers, and MLPs in them.
    pub(super) fn check(&self, model: &Config) -> Result<()> {
        self.validate()?;
        let layers = model.num_hidden_layers;
        if let Some(layer) = self.layers.iter().find(|layer| **layer >= layers) {
            return Err(Error::parameter("layers", format!("less than {layers}"), layer));
        }
        match model.experts {
            None => Ok(()),
            Some(_) => Err(Error::unsupported("dictionary", "for a mixture of experts")),
        }
    }

    /// What stands before the headword, between it and the definition, and after that.
    fn parts(&self) -> Result<[&str; 3]> {
        let parts = self.template.split_once(HEADWORD).and_then(|(before, rest)| {
            let (between, after) = rest.split_once(DEFINITION)?;
            Some([before, between, after])
        });
        let once = |part: &&str| !part.contains(HEADWORD) && !part.contains(DEFINITION);
        parts.filter(|parts| parts.iter().all(once)).ok_or_else(|| {
            let expected = format!("{HEADWORD} once, and {DEFINITION} once behind it");
            Error::parameter("template", expected, &self.template)
        })
    }

    /// The text of an entry, and which bytes of it are the headword.
    pub(super) fn text(
        &self,
        headword: &str,
        definition: &str,
    ) -> Result<(String, std::ops::Range<usize>)> {
        let [before, between, after] = self.parts()?;
        let text = format!("{before}{headword}{between}{definition}{after}");
        Ok((text, before.len()..before.len() + headword.len()))
    }

    /// Refuses vectors that were made in another way, or that some of these layers have none of.
    pub(super) fn check_reads(&self, made: &Self) -> Result<()> {
        let plain = |it: &Self| Self {
            layers: Vec::new(),
            dtype: DType::F32,
            max_tokens: None,
            ..it.clone()
        };
        let way = |it: &Self| serde_json::to_string(&plain(it)).unwrap_or_default();
        if plain(self) != plain(made) {
            let expected =
                format!("vectors made as those that the adapter was made for: {}", way(self));
            return Err(Error::parameter("dictionary", expected, way(made)));
        }
        match self.layers.iter().all(|layer| made.layers.contains(layer)) {
            true => Ok(()),
            false => {
                let expected = format!("vectors for the layers {:?}", self.layers);
                Err(Error::parameter("dictionary", expected, format!("{:?}", made.layers)))
            }
        }
    }

    pub(super) fn chosen_layers(&self) -> &[usize] {
        &self.layers
    }

    pub(super) fn chosen_pooling(&self) -> Pooling {
        self.pooling
    }

    pub(super) fn chosen_rows(&self) -> Pooled {
        self.pooled
    }

    pub(super) fn chosen_sight(&self) -> Sight {
        self.sight
    }

    pub(super) fn most_tokens(&self) -> Option<usize> {
        self.max_tokens
    }

    pub(super) fn chosen_dtype(&self) -> DType {
        self.dtype
    }
}
