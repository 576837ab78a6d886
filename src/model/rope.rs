//! Rotary position embeddings: tables that grow with the longest position asked for.

use std::sync::{Arc, PoisonError, RwLock};

use candle_core::{DType, Device, Tensor};

use crate::batch::Batch;
use crate::config::Config;
use crate::error::Result;
use crate::kernels;

/// Cosines and sines of `position · theta^(-2i / head_dim)`, shared by all layers.
#[derive(Debug)]
pub(super) struct Rope {
    /// `theta^(-2i / head_dim)` for `i` in `0..head_dim / 2`.
    inv_freq: Vec<f32>,
    dtype: DType,
    device: Device,
    /// Tables for the positions seen so far; replaced by longer ones for a longer text.
    tables: RwLock<Arc<Tables>>,
}

#[derive(Debug)]
struct Tables {
    positions: usize,
    /// `(positions, head_dim / 2)`
    cos: Tensor,
    /// `(positions, head_dim / 2)`
    sin: Tensor,
}

/// The rotation of one pass: the rows of the tables for its positions, `(tokens, head_dim / 2)` each.
#[derive(Debug)]
pub(super) struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Rotation {
    /// Cuts `(tokens, heads · head_dim)` into rotated heads, `(heads, tokens, head_dim)`.
    pub(super) fn split_heads(&self, xs: &Tensor, heads: usize) -> Result<Tensor> {
        kernels::split_heads(xs, heads, Some((&self.cos, &self.sin)))
    }
}

impl Rope {
    /// The first tables are this long, which is enough for most prompts.
    const FIRST: usize = 1024;

    /// Angles in the first tables, at most; heads of up to 16384 channels are allowed.
    const FIRST_ANGLES: usize = 1 << 18;

    pub(super) fn new(config: &Config, dtype: DType, device: &Device) -> Result<Self> {
        // In f32 throughout, as transformers computes it: distant positions then round the same way.
        let dim = config.head_dim as f32;
        let frequency = |i: usize| {
            let exponent = (2 * i) as f32 / dim;
            1.0 / (config.rope_theta.powf(f64::from(exponent)) as f32)
        };
        let inv_freq: Vec<f32> = (0..config.head_dim / 2).map(frequency).collect();
        let rows = Self::FIRST.min(Self::FIRST_ANGLES / inv_freq.len().max(1));
        let first = rows.min(config.max_position_embeddings).max(1);
        let tables = RwLock::new(Arc::new(Tables::new(&inv_freq, first, dtype, device)?));
        Ok(Self { inv_freq, dtype, device: device.clone(), tables })
    }

    /// The rotation of the tokens of `batch`, each at its position.
    pub(super) fn at(&self, batch: &Batch) -> Result<Rotation> {
        let ends = (0..batch.sequences()).map(|index| batch.first(index) + batch.rows(index).len());
        let tables = self.tables(ends.max().unwrap_or(0))?;
        if batch.sequences() == 1 {
            let rows = |table: &Tensor| table.narrow(0, batch.first(0), batch.tokens());
            return Ok(Rotation { cos: rows(&tables.cos)?, sin: rows(&tables.sin)? });
        }
        let positions: Vec<u32> = batch.positions().map(|position| position as u32).collect();
        let positions = Tensor::new(positions, &self.device)?;
        let rows = |table: &Tensor| table.index_select(&positions, 0);
        Ok(Rotation { cos: rows(&tables.cos)?, sin: rows(&tables.sin)? })
    }

    fn tables(&self, positions: usize) -> Result<Arc<Tables>> {
        // A poisoned lock only means that another thread panicked: the tables inside are whole.
        let current = self.tables.read().unwrap_or_else(PoisonError::into_inner).clone();
        if current.positions >= positions {
            return Ok(current);
        }
        let longer = positions.next_power_of_two();
        let grown = Arc::new(Tables::new(&self.inv_freq, longer, self.dtype, &self.device)?);
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        if tables.positions < longer {
            *tables = Arc::clone(&grown);
        }
        Ok(grown)
    }
}

impl Tables {
    fn new(inv_freq: &[f32], positions: usize, dtype: DType, device: &Device) -> Result<Self> {
        let angle = |position: usize| inv_freq.iter().map(move |freq| position as f32 * freq);
        let table = |function: fn(f32) -> f32| -> Result<Tensor> {
            let values: Vec<f32> = (0..positions).flat_map(angle).map(function).collect();
            let shape = (positions, inv_freq.len());
            Ok(Tensor::from_vec(values, shape, device)?.to_dtype(dtype)?)
        };
        Ok(Self { positions, cos: table(f32::cos)?, sin: table(f32::sin)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(positions: usize) -> Result<Rope> {
        let config = Config {
            vocab_size: 1,
            hidden_size: 8,
            intermediate_size: 1,
            num_hidden_layers: 1,
            num_attention_heads: 1,
            num_key_value_heads: 1,
            head_dim: 8,
            rms_norm_eps: 0.0,
            rope_theta: 1e6,
            sliding_window: None,
            max_position_embeddings: positions,
            tie_word_embeddings: true,
            rope_scaling: None,
            query_scaling: None,
            experts: None,
            attention_bias: false,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        };
        Rope::new(&config, DType::F32, &Device::Cpu)
    }

    #[test]
    fn tables_grow_with_the_text_not_with_the_model() -> Result<()> {
        let rope = rope(1_000_000_000)?;
        assert_eq!(rope.tables(1)?.positions, Rope::FIRST);
        let before = rope.at(&Batch::one(24)?.starting_at(0, 1000)?)?;
        assert_eq!(rope.tables(5000)?.positions, 8192);
        let after = rope.at(&Batch::one(24)?.starting_at(0, 1000)?)?;
        assert_eq!(before.cos.to_vec2::<f32>()?, after.cos.to_vec2::<f32>()?);
        Ok(())
    }

    #[test]
    fn a_position_turns_pair_i_by_theta_to_the_minus_2i_over_dim() -> Result<()> {
        let rotation = rope(4096)?.at(&Batch::one(4096)?)?;
        let (cos, sin) = (rotation.cos.to_vec2::<f32>()?, rotation.sin.to_vec2::<f32>()?);
        for position in [0, 1, 77, 4095] {
            for pair in 0..4 {
                let angle = position as f64 * 1e6f64.powf(-2.0 * pair as f64 / 8.0);
                // The angle is an f32, as in transformers: it may be off by half its last bit.
                let tolerance = angle * f64::from(f32::EPSILON) + 1e-6;
                assert!((f64::from(cos[position][pair]) - angle.cos()).abs() < tolerance);
                assert!((f64::from(sin[position][pair]) - angle.sin()).abs() < tolerance);
            }
        }
        Ok(())
    }

    #[test]
    fn each_sequence_counts_from_its_own_first_token() -> Result<()> {
        let rope = rope(64)?;
        let both = rope.at(&Batch::ragged(&[6, 4])?.starting_at(1, 7)?)?;
        let alone = rope.at(&Batch::one(4)?.starting_at(0, 7)?)?;
        let second = both.cos.narrow(0, 6, 4)?;
        assert_eq!(second.to_vec2::<f32>()?, alone.cos.to_vec2::<f32>()?);
        Ok(())
    }
}
