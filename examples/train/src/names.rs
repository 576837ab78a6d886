//! The embedding table for the flashback suite.

use candle_core::{Device, Tensor};
use rand::Rng;

use flashback_suite::Vocabulary;

/// An embedding table that is not trained. Names get new vectors in every step, so there is nothing to
/// be learned about any of them, and a name that no training story has works as well as any other.
pub(crate) struct Embeddings {
    /// `(vocab, hidden)`, row by row.
    rows: Vec<f32>,
    hidden: usize,
    /// Whether each token is a name.
    is_name: Vec<bool>,
}

/// Its name in a checkpoint.
pub(crate) const EMBEDDINGS: &str = "model.embed_tokens.weight";

/// Channels that are the same in all names, or in all other tokens. Attention can find a position,
/// rather than a particular token, only through something that many tokens share.
const KIND_CHANNELS: usize = 16;

/// How much longer the row of the token is that ends an answer. It is predicted after a name, whose own
/// row is in the stream there and scores high by itself, since the head is the embedding table.
const LOUD: f32 = 4.0;

impl Embeddings {
    pub(crate) fn new(vocabulary: &Vocabulary, hidden: usize, rng: &mut impl Rng) -> Self {
        let mut rows = normals(vocabulary.pieces().len() * hidden, 1.0, rng);
        let kinds = [normals(KIND_CHANNELS, 2.0, rng), normals(KIND_CHANNELS, 2.0, rng)];
        let is_name = are_names(vocabulary);
        for (row, &is_name) in rows.chunks_mut(hidden).zip(&is_name) {
            row[..KIND_CHANNELS].copy_from_slice(&kinds[usize::from(is_name)]);
        }
        let end = vocabulary.end() as usize * hidden;
        rows[end..end + hidden].iter_mut().for_each(|value| *value *= LOUD);
        Self { rows, hidden, is_name }
    }

    /// The table of a checkpoint that was trained here.
    pub(crate) fn of(table: &Tensor, vocabulary: &Vocabulary) -> candle_core::Result<Self> {
        let (_, hidden) = table.dims2()?;
        if hidden <= KIND_CHANNELS {
            candle_core::bail!("expected embeddings of more than {KIND_CHANNELS} channels");
        }
        let rows = table.flatten_all()?.to_vec1()?;
        Ok(Self { rows, hidden, is_name: are_names(vocabulary) })
    }

    /// The table with new names.
    pub(crate) fn draw(&self, rng: &mut impl Rng) -> candle_core::Result<Tensor> {
        let mut rows = self.rows.clone();
        for (row, _) in rows.chunks_mut(self.hidden).zip(&self.is_name).filter(|(_, name)| **name) {
            let own = &mut row[KIND_CHANNELS..];
            own.copy_from_slice(&normals(own.len(), 1.0, rng));
        }
        Tensor::from_vec(rows, (self.is_name.len(), self.hidden), &Device::Cpu)
    }
}

fn are_names(vocabulary: &Vocabulary) -> Vec<bool> {
    (0..vocabulary.pieces().len() as u32).map(|id| vocabulary.is_name(id)).collect()
}

/// Normally distributed numbers (Box & Muller 1958).
pub(crate) fn normals(count: usize, deviation: f32, rng: &mut impl Rng) -> Vec<f32> {
    let normal = |_| {
        let (a, b) = (1.0 - rng.random::<f32>(), rng.random::<f32>()); // a is not 0
        (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos() * deviation
    };
    (0..count).map(normal).collect()
}
