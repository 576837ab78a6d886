//! The shape of a model: what `config.json`, `params.json` and GGUF metadata have in common.

mod experts;
mod fields;
mod gguf;
mod hugging_face;
mod params;
mod quantization;
mod rope;
mod rope_parameters;

pub use experts::Experts;
pub(crate) use experts::{EXPERT, ROUTER, of_expert, split_expert};
pub(crate) use fields::{Fields, brief};
pub(crate) use gguf::{integer, is_integer};
pub(crate) use quantization::Fp8;
pub use rope::{QueryScaling, RopeScaling};

use std::borrow::Cow;

use crate::error::{Error, Result};

/// The largest size that any field may have. Real models stay far below it, and products of two
/// sizes fit in 64 bits.
const MAX_SIZE: usize = i32::MAX as usize;

/// The widest head. Real ones have a quarter of a thousand channels or two; a table of rotations has as
/// many columns, which no weight has to pay for.
const MAX_HEAD_DIM: usize = 1 << 14;

/// The shape of a Mistral or a Mixtral, under the names that Hugging Face gives its fields.
///
/// Read from a checkpoint with [`Config::from_json`], [`Config::from_params_json`] or
/// [`Config::from_gguf`], which refuse what this crate does not compute; or written by hand and
/// checked with [`Config::validate`].
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Rows of the embedding table: token ids are below it.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Number of query heads.
    pub num_attention_heads: usize,
    /// Number of key and value heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Width of one head, even, at most 16384. Not always `hidden_size / num_attention_heads` (Mistral Nemo).
    pub head_dim: usize,
    /// Added to the mean square inside every RMS norm; in `[0, 1)`.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies; above 0.
    pub rope_theta: f64,
    /// A query sees this many keys, itself included; `None` is no limit.
    pub sliding_window: Option<usize>,
    /// Positions that the model was trained for.
    pub max_position_embeddings: usize,
    /// Whether the vocabulary head is the embedding table.
    pub tie_word_embeddings: bool,
    /// How rotary frequencies are changed for long texts; `None` is not at all.
    pub rope_scaling: Option<RopeScaling>,
    /// How queries grow with their position (Ministral 3); `None` is not at all.
    pub query_scaling: Option<QueryScaling>,
    /// The experts that each MLP is made of (Mixtral); `None` is a single MLP.
    pub experts: Option<Experts>,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
    /// The tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

impl Config {
    /// Checks that a model of this shape is possible.
    ///
    /// Sizes lie in `1..=2147483647`, heads divide, `head_dim` is even (rotation turns pairs) and at most
    /// 16384, real numbers and scaling lie in the ranges given at their fields, a token chooses at least one
    /// expert and at most all, token ids are below `vocab_size`, and no weight, nor those of all experts, is
    /// larger than memory can address.
    ///
    /// # Errors
    /// [`Error::Config`] naming the first field that is wrong.
    pub fn validate(&self) -> Result<()> {
        let experts = self.experts.as_ref().map_or(1, |experts| experts.num_local_experts);
        for (field, size) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
            // no window constrains nothing, nor do no experts
            ("sliding_window", self.sliding_window.unwrap_or(1)),
            ("num_local_experts", experts),
        ] {
            if !(1..=MAX_SIZE).contains(&size) {
                return Err(Error::config(field, format!("1 to {MAX_SIZE}"), size));
            }
        }
        if self.head_dim > MAX_HEAD_DIM {
            return Err(Error::config("head_dim", format!("1 to {MAX_HEAD_DIM}"), self.head_dim));
        }
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a multiple of the {kv_heads} key and value heads");
            return Err(Error::config("num_attention_heads", expected, heads));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::config("head_dim", "an even number", self.head_dim));
        }
        if !(0.0..1.0).contains(&self.rms_norm_eps) {
            return Err(Error::config("rms_norm_eps", "0 or more, below 1", self.rms_norm_eps));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 0.0) {
            return Err(Error::config("rope_theta", "a finite number above 0", self.rope_theta));
        }
        if let Some(scaling) = &self.rope_scaling {
            scaling.validate(self.head_dim, self.rope_theta)?;
        }
        if let Some(scaling) = &self.query_scaling {
            scaling.validate()?;
        }
        if let Some(Experts { num_local_experts: all, num_experts_per_tok: chosen }) = self.experts
            && !(1..=all).contains(&chosen)
        {
            let expected = format!("1 to {all}, the experts that there are");
            return Err(Error::config("num_experts_per_tok", expected, chosen));
        }
        let ids = self.eos_token_ids.iter().map(|id| ("eos_token_id", *id));
        for (field, id) in self.bos_token_id.map(|id| ("bos_token_id", id)).into_iter().chain(ids) {
            if id as usize >= self.vocab_size {
                let expected = format!("less than the vocabulary of {}", self.vocab_size);
                return Err(Error::config(field, expected, id));
            }
        }
        for (field, shape) in [
            ("vocab_size", [self.vocab_size, 1, self.hidden_size]),
            ("intermediate_size", [self.intermediate_size, 1, self.hidden_size]),
            ("num_attention_heads", [heads, self.head_dim, self.hidden_size]),
            ("num_local_experts", [experts, self.intermediate_size, self.hidden_size]),
        ] {
            let bytes = shape.iter().try_fold(size_of::<f32>(), |n, size| n.checked_mul(*size));
            if bytes.is_none_or(|bytes| bytes > isize::MAX as usize) {
                let [a, b, c] = shape;
                let got = format!("{a} x {b} x {c} elements");
                return Err(Error::config(field, "weights that memory can address", got));
            }
        }
        Ok(())
    }

    /// Every weight that a model of this shape is made of: Hugging Face name and shape.
    ///
    /// `lm_head.weight` is among them unless `tie_word_embeddings`.
    pub fn weights(&self) -> impl Iterator<Item = (String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let blocks = (0..self.num_hidden_layers).flat_map(move |layer| {
            self.block_weights()
                .map(move |(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape))
        });
        let table = vec![self.vocab_size, hidden];
        let head = (!self.tie_word_embeddings).then(|| ("lm_head.weight".into(), table.clone()));
        std::iter::once(("model.embed_tokens.weight".into(), table))
            .chain(blocks)
            .chain(std::iter::once(("model.norm.weight".into(), vec![hidden])))
            .chain(head)
    }

    /// The weights of one block, without the `.weight` of their names.
    fn block_weights(&self) -> impl Iterator<Item = (Cow<'static, str>, Vec<usize>)> {
        let hidden = self.hidden_size;
        let queries = self.num_attention_heads.saturating_mul(self.head_dim);
        let keys = self.num_key_value_heads.saturating_mul(self.head_dim);
        [
            ("input_layernorm", vec![hidden]),
            ("self_attn.q_proj", vec![queries, hidden]),
            ("self_attn.k_proj", vec![keys, hidden]),
            ("self_attn.v_proj", vec![keys, hidden]),
            ("self_attn.o_proj", vec![hidden, queries]),
            ("post_attention_layernorm", vec![hidden]),
        ]
        .map(|(name, shape)| (Cow::from(name), shape))
        .into_iter()
        .chain(self.mlp_weights())
    }

    /// Those of its MLP, or of the router and the experts in the place of one.
    fn mlp_weights(&self) -> impl Iterator<Item = (Cow<'static, str>, Vec<usize>)> {
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        let shapes = move || {
            [vec![intermediate, hidden], vec![intermediate, hidden], vec![hidden, intermediate]]
        };
        let single = self.experts.is_none().then(|| {
            ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
                .map(Cow::from)
                .into_iter()
                .zip(shapes())
        });
        let router = self
            .experts
            .iter()
            .map(move |of| (Cow::from(ROUTER), vec![of.num_local_experts, hidden]));
        let experts = self.experts.iter().flat_map(|of| 0..of.num_local_experts);
        let experts = experts.flat_map(move |index| {
            EXPERT.map(|it| Cow::from(of_expert(index, it))).into_iter().zip(shapes())
        });
        single.into_iter().flatten().chain(router).chain(experts)
    }

    /// `(out_features, in_features)` of the projection of a block that is called `self_attn.q_proj` or
    /// similar; zeros for a name that is not a projection's.
    pub(crate) fn projection(&self, name: &str) -> (usize, usize) {
        // All experts have one shape.
        let first = match split_expert(name) {
            Some((index, matrix))
                if self.experts.as_ref().is_some_and(|of| index < of.num_local_experts) =>
            {
                Cow::from(of_expert(0, matrix))
            }
            _ => Cow::from(name),
        };
        let shape = self.block_weights().find(|(own, _)| *own == first);
        match shape.as_ref().map(|(_, shape)| shape.as_slice()) {
            Some([out, input]) => (*out, *input),
            _ => (0, 0),
        }
    }
}

impl Config {
    /// Without the special tokens that are not among the model's, each named by a warning: no text has
    /// them, and no answer ends with them.
    fn without_foreign_tokens(mut self) -> Self {
        let vocab_size = self.vocab_size;
        let known = |field: &str, id: u32| {
            let known = (id as usize) < vocab_size;
            if !known {
                tracing::warn!(
                    field,
                    id,
                    vocab_size,
                    "no token of the model has this id: not used"
                );
            }
            known
        };
        self.bos_token_id = self.bos_token_id.filter(|&id| known("bos_token_id", id));
        self.eos_token_ids.retain(|&id| known("eos_token_id", id));
        self
    }
}

/// `hidden / heads`, which must be whole: what `head_dim` is where a file does not say.
fn head_dim(hidden: (&str, usize), heads: (&str, usize)) -> Result<usize> {
    match hidden.1.checked_rem(heads.1) {
        Some(0) => Ok(hidden.1 / heads.1),
        Some(_) => {
            let expected = format!("a multiple of the {} heads, as head_dim is not given", heads.1);
            Err(Error::config(hidden.0, expected, hidden.1))
        }
        None => Err(Error::config(heads.0, format!("1 to {MAX_SIZE}"), heads.1)),
    }
}

/// [`Config::validate`] for a file that names its fields differently: `names` pairs the Hugging Face
/// name with the file's.
fn validate_as(config: Config, names: &[(&str, &str)]) -> Result<Config> {
    let config = config.without_foreign_tokens();
    match config.validate() {
        Ok(()) => Ok(config),
        Err(Error::Config { field, expected, got }) => {
            let spelled = names.iter().find(|(ours, _)| *ours == field);
            Err(Error::config(spelled.map_or(field.as_str(), |(_, file)| file), expected, got))
        }
        Err(other) => Err(other),
    }
}
