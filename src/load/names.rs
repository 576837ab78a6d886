//! How the kinds of checkpoint spell a weight, and where in a tensor its rows are.

use std::borrow::Cow;

use crate::config::{Config, ROUTER, of_expert, split_expert};

/// Whose names, and whose order of rows, a checkpoint follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    /// `model.layers.0.self_attn.q_proj.weight`: `transformers`.
    HuggingFace,
    /// `layers.0.self_attn.q_proj.weight`: `transformers`, where the model was saved from its base class.
    HuggingFaceBase,
    /// The same, where this model is the text part of another: what stands in the place of `model.`, and
    /// before `lm_head`.
    Wrapped { model: &'static str, head: &'static str },
    /// `layers.0.attention.wq.weight`: `consolidated.safetensors`, as Mistral publishes it.
    Mistral,
    /// `blk.0.attn_q.weight`: llama.cpp.
    Gguf,
}

/// Hugging Face, Mistral, GGUF; each followed by `.weight`.
type Row = [&'static str; 3];

const HEAD: &str = "lm_head";

const TOP: [Row; 3] = [
    ["model.embed_tokens", "tok_embeddings", "token_embd"],
    ["model.norm", "norm", "output_norm"],
    [HEAD, "output", "output"],
];

/// What precedes the number of a layer.
const LAYERS: Row = ["model.layers", "layers", "blk"];

/// What precedes the weights for thought passes, in every kind of checkpoint.
const THOUGHT: &str = "thought";

const LAYER: [Row; 10] = [
    ["input_layernorm", "attention_norm", "attn_norm"],
    ["self_attn.q_proj", "attention.wq", "attn_q"],
    ["self_attn.k_proj", "attention.wk", "attn_k"],
    ["self_attn.v_proj", "attention.wv", "attn_v"],
    ["self_attn.o_proj", "attention.wo", "attn_output"],
    ["post_attention_layernorm", "ffn_norm", "ffn_norm"],
    ["mlp.gate_proj", "feed_forward.w1", "ffn_gate"],
    ["mlp.up_proj", "feed_forward.w3", "ffn_up"],
    ["mlp.down_proj", "feed_forward.w2", "ffn_down"],
    [ROUTER, "feed_forward.gate", "ffn_gate_inp"],
];

/// The matrices of an expert.
const EXPERT: [Row; 3] =
    [["w1", "w1", "ffn_gate"], ["w3", "w3", "ffn_up"], ["w2", "w2", "ffn_down"]];

/// A tensor with one matrix of all experts, or several side by side: its whole name within a layer,
/// which of them a matrix is, and how many there are.
type Pack = (&'static str, usize, usize);

/// The matrices of an expert where all experts are packed: by `transformers` from 5 on, by llama.cpp.
const PACKED: [(&str, Pack, Pack); 3] = [
    ("w1", ("mlp.experts.gate_up_proj", 0, 2), ("ffn_gate_exps.weight", 0, 1)),
    ("w3", ("mlp.experts.gate_up_proj", 1, 2), ("ffn_up_exps.weight", 0, 1)),
    ("w2", ("mlp.experts.down_proj", 0, 1), ("ffn_down_exps.weight", 0, 1)),
];

/// The router, where `transformers` packs the experts.
const PACKED_ROUTER: &str = "mlp.gate.weight";

impl Naming {
    /// As `transformers` has saved text parts: as published, as of the class of version 5, and from the
    /// base class.
    pub(super) const WRAPPED: [Self; 3] = [
        Self::Wrapped { model: "language_model.model.", head: "language_model." },
        Self::Wrapped { model: "model.language_model.", head: "" },
        Self::Wrapped { model: "language_model.", head: "" },
    ];

    fn column(self, row: Row) -> Cow<'static, str> {
        let [hugging_face, mistral, gguf] = row;
        let inner = hugging_face.strip_prefix("model.");
        match (self, inner) {
            (Self::HuggingFaceBase, Some(inner)) => inner.into(),
            (Self::Wrapped { model, .. }, Some(inner)) => format!("{model}{inner}").into(),
            (Self::Wrapped { head, .. }, None) if hugging_face == HEAD => {
                format!("{head}{HEAD}").into()
            }
            (Self::Mistral, _) => mistral.into(),
            (Self::Gguf, _) => gguf.into(),
            _ => hugging_face.into(),
        }
    }

    /// This checkpoint's spelling of a Hugging Face `name`; `name` itself if it is not one of the
    /// model's.
    pub(super) fn spell(self, name: &str) -> String {
        self.translate(name).unwrap_or_else(|| name.to_string())
    }

    fn translate(self, name: &str) -> Option<String> {
        let stem = name.strip_suffix(".weight")?;
        if let Some((layer, rest)) = Self::HuggingFace.split_layer(stem) {
            if let Some((index, matrix)) = split_expert(rest) {
                let row = EXPERT.into_iter().find(|[ours, ..]| *ours == matrix)?;
                let matrix = self.column(row);
                let within = match self {
                    Self::HuggingFace | Self::HuggingFaceBase | Self::Wrapped { .. } => {
                        of_expert(index, &matrix)
                    }
                    Self::Mistral => format!("feed_forward.experts.{index}.{matrix}"),
                    Self::Gguf => format!("{matrix}.{index}"),
                };
                return Some(format!("{}.{layer}.{within}.weight", self.column(LAYERS)));
            }
            let row = LAYER.into_iter().find(|[ours, ..]| *ours == rest)?;
            return Some(format!("{}.{layer}.{}.weight", self.column(LAYERS), self.column(row)));
        }
        let row = TOP.into_iter().find(|[ours, ..]| *ours == stem)?;
        Some(format!("{}.weight", self.column(row)))
    }

    /// The tensor that packs a matrix of all experts, if this kind of checkpoint has such tensors.
    fn pack(self, (_, hugging_face, gguf): (&str, Pack, Pack)) -> Option<Pack> {
        match self {
            Self::HuggingFace | Self::HuggingFaceBase | Self::Wrapped { .. } => Some(hugging_face),
            Self::Gguf => Some(gguf),
            Self::Mistral => None,
        }
    }

    /// Whether `name`, spelled as in this checkpoint, packs the experts of a layer.
    pub(super) fn is_packed(self, name: &str) -> bool {
        let within = self.split_layer(name).map(|(_, rest)| rest);
        let mut packs = PACKED.into_iter().filter_map(|row| self.pack(row));
        within.is_some_and(|within| packs.any(|(own, ..)| own == within))
    }

    /// Where a checkpoint packs its experts, its spelling of the tensor that a weight of a mixture, here
    /// by its Hugging Face name, is in, and the rows; `None` for any other weight.
    pub(super) fn packed(self, name: &str, config: &Config) -> Option<(String, Rows)> {
        let (layer, rest) = Self::HuggingFace.split_layer(name.strip_suffix(".weight")?)?;
        let spell = |within: &str| format!("{}.{layer}.{within}", self.column(LAYERS));
        if rest == ROUTER && self != Self::Gguf {
            return Some((spell(PACKED_ROUTER), Rows::InOrder));
        }
        let (index, matrix) = split_expert(rest)?;
        let row = PACKED.into_iter().find(|(ours, ..)| *ours == matrix)?;
        let (within, part, parts) = self.pack(row)?;
        let experts = config.experts.as_ref()?.num_local_experts;
        let (rows, _) = config.projection(rest);
        let rows =
            Rows::Packed { first: (index * parts + part) * rows, experts, rows: parts * rows };
        Some((spell(within), rows))
    }

    /// `model.layers.3.mlp.up_proj` is layer `3` and `mlp.up_proj`.
    fn split_layer(self, name: &str) -> Option<(&str, &str)> {
        let rest = name.strip_prefix(&*self.column(LAYERS))?.strip_prefix('.')?;
        rest.split_once('.').filter(|(layer, _)| layer.bytes().all(|byte| byte.is_ascii_digit()))
    }

    /// The layer that `name`, spelled as in this checkpoint, belongs to.
    pub(super) fn layer(self, name: &str) -> Option<usize> {
        self.split_layer(name)?.0.parse().ok()
    }

    /// Whether `name`, spelled as in this checkpoint, is in the place of the model's own weights.
    pub(super) fn is_ours(self, name: &str) -> bool {
        let under = |prefix: &str| name.strip_prefix(prefix).is_some_and(|n| n.starts_with('.'));
        under(THOUGHT)
            || match self {
                Self::HuggingFace => under("model") || under(HEAD),
                Self::Wrapped { model, head } => {
                    name.starts_with(model) || under(&format!("{head}{HEAD}"))
                }
                Self::HuggingFaceBase | Self::Mistral | Self::Gguf => {
                    under(&self.column(LAYERS))
                        || TOP.into_iter().any(|row| under(&self.column(row)))
                }
            }
    }

    /// How the rows of a weight, here by its Hugging Face name, are stored.
    pub(super) fn rows(self, name: &str, head_dim: usize) -> Rows {
        let rotated =
            name.ends_with("self_attn.q_proj.weight") || name.ends_with("self_attn.k_proj.weight");
        // What was learned for thought passes is nobody's format but ours.
        let interleaved = matches!(self, Self::Mistral | Self::Gguf);
        if rotated && !name.starts_with(THOUGHT) && interleaved {
            Rows::Interleaved { head_dim }
        } else {
            Rows::InOrder
        }
    }
}

/// How the rows of a stored matrix relate to those of the Hugging Face one.
///
/// RoPE rotates pairs of a head's rows. Hugging Face keeps the first of every pair in the head's first
/// half and the second in its second half; Mistral, and llama.cpp after it, keep the two side by side.
/// With a `head_dim` of 6, the pairs are a, b, c and the rows of each head are
///
/// ```text
/// stored (interleaved)    a0 a1 b0 b1 c0 c1
/// Hugging Face (halves)   a0 b0 c0 a1 b1 c1
/// taken from stored row    0  2  4  1  3  5
/// ```
///
/// Whole rows move, so this holds for quantised blocks too: no block spans two rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Rows {
    /// Row `i` is row `i`.
    #[default]
    InOrder,
    /// The two rows of a pair are neighbours.
    Interleaved {
        /// Rows of one head, even.
        head_dim: usize,
    },
    /// They are among the rows of a tensor with a matrix for each expert. Of 2 experts of 3 rows each in
    /// `gate_up_proj`, the `w3` of the second is rows 9 to 11 of 12:
    ///
    /// ```text
    /// expert 0: w1  0 1 2   w3  3 4 5       expert 1: w1  6 7 8   w3  9 10 11
    /// ```
    Packed {
        /// The row that becomes row 0.
        first: usize,
        /// The stored shape is `(experts, rows, ..)`.
        experts: usize,
        rows: usize,
    },
}

impl Rows {
    /// The shape that a weight of this shape is stored in.
    pub(super) fn stored_shape(self, shape: &[usize]) -> Vec<usize> {
        match (self, shape) {
            (Self::Packed { experts, rows, .. }, [_, row @ ..]) => [&[experts, rows], row].concat(),
            _ => shape.to_vec(),
        }
    }

    /// The stored row that becomes Hugging Face row `row`.
    pub(super) fn source(self, row: usize) -> usize {
        match self {
            Self::InOrder => row,
            Self::Packed { first, .. } => first + row,
            Self::Interleaved { head_dim } => {
                let (head, within) = (row / head_dim, row % head_dim);
                let (second, pair) = (within / (head_dim / 2), within % (head_dim / 2));
                head * head_dim + 2 * pair + second
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worked_example() {
        let rows = Rows::Interleaved { head_dim: 6 };
        let order: Vec<_> = (0..12).map(|row| rows.source(row)).collect();
        assert_eq!(order, [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]);
    }

    /// The worked example of packed rows.
    #[test]
    fn an_expert_is_a_run_of_rows() -> crate::Result<()> {
        let config = Config::from_json(
            r#"{"model_type": "mixtral", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 3,
                "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
                "num_local_experts": 2, "num_experts_per_tok": 1}"#,
        )?;
        let name = |matrix| format!("model.layers.0.{}.weight", of_expert(1, matrix));
        let place = |naming: Naming, matrix| {
            let (name, rows) =
                naming.packed(&name(matrix), &config).unwrap_or((String::new(), Rows::InOrder));
            assert!(naming.is_packed(&name) && !naming.is_packed(&format!("{name}.0")));
            (name, rows.source(0)..rows.source(3), rows.stored_shape(&[3, 4]))
        };
        let gate_up = "model.layers.0.mlp.experts.gate_up_proj".to_string();
        assert_eq!(place(Naming::HuggingFace, "w3"), (gate_up, 9..12, vec![2, 6, 4]));
        let up = "blk.0.ffn_up_exps.weight".to_string();
        assert_eq!(place(Naming::Gguf, "w3"), (up, 3..6, vec![2, 3, 4]));
        assert_eq!(Naming::Mistral.packed(&name("w3"), &config), None);
        Ok(())
    }

    #[test]
    fn names_are_translated() {
        let name = "model.layers.11.mlp.gate_proj.weight";
        assert_eq!(Naming::HuggingFace.spell(name), name);
        assert_eq!(Naming::HuggingFaceBase.spell(name), "layers.11.mlp.gate_proj.weight");
        assert_eq!(Naming::HuggingFaceBase.spell("model.norm.weight"), "norm.weight");
        assert_eq!(Naming::HuggingFaceBase.spell("lm_head.weight"), "lm_head.weight");
        let wrapped = Naming::WRAPPED.map(|naming| naming.spell(name));
        assert_eq!(wrapped[0], "language_model.model.layers.11.mlp.gate_proj.weight");
        let norm = Naming::WRAPPED.map(|it| it.spell("model.layers.1.input_layernorm.weight"));
        assert_eq!(norm[0], "language_model.model.layers.1.input_layernorm.weight");
        assert_eq!(wrapped[1], "model.language_model.layers.11.mlp.gate_proj.weight");
        let heads = Naming::WRAPPED.map(|naming| naming.spell("lm_head.weight"));
        assert_eq!(heads, ["language_model.lm_head.weight", "lm_head.weight", "lm_head.weight"]);
        assert!(Naming::WRAPPED[1].is_ours("model.language_model.norm.bias"));
        assert!(!Naming::WRAPPED[1].is_ours("model.vision_tower.norm.weight"));
        assert_eq!(Naming::Mistral.spell(name), "layers.11.feed_forward.w1.weight");
        assert_eq!(Naming::Gguf.spell(name), "blk.11.ffn_gate.weight");
        assert_eq!(Naming::Gguf.spell("lm_head.weight"), "output.weight");
        assert_eq!(Naming::Gguf.spell("score.weight"), "score.weight");
        let name = "model.layers.11.block_sparse_moe.experts.7.w3.weight";
        assert_eq!(Naming::HuggingFace.spell(name), name);
        assert_eq!(Naming::Mistral.spell(name), "layers.11.feed_forward.experts.7.w3.weight");
        assert_eq!(Naming::Gguf.spell(name), "blk.11.ffn_up.7.weight");
        assert_eq!(Naming::Gguf.layer("blk.11.ffn_gate.weight"), Some(11));
        assert!(Naming::Gguf.is_ours("output.bias") && !Naming::Gguf.is_ours("outputs.bias"));
    }
}
