//! Rotary position embeddings: tables that grow with the longest position asked for.

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use candle_core::{DType, Device, Tensor};

use super::frequencies::Frequencies;
use crate::batch::Batch;
use crate::config::{Config, QueryScaling};
use crate::error::{Error, Result};
use crate::kernels;

/// Cosines and sines of `position · frequency`, shared by all layers.
#[derive(Debug)]
pub(super) struct Rope {
    frequencies: Frequencies,
    query_scaling: Option<QueryScaling>,
    dtype: DType,
    device: Device,
    /// Tables for the positions seen so far; replaced by longer ones for a longer text.
    tables: RwLock<Arc<Tables>>,
}

#[derive(Debug)]
struct Tables {
    positions: usize,
    rows: Rows,
}

/// The rotation of some positions.
#[derive(Clone, Debug)]
struct Rows {
    /// `(positions, head_dim / 2)`
    cos: Tensor,
    /// `(positions, head_dim / 2)`
    sin: Tensor,
}

/// The rotation of one pass: the rows of the tables for its tokens.
#[derive(Debug)]
pub(super) struct Rotation {
    of_keys: Rows,
    /// Where queries also grow with their position. To multiply cosines and sines, which a pass does once,
    /// is to multiply what they rotate.
    of_queries: Option<Rows>,
}

impl Rotation {
    /// Cuts keys `(tokens, heads · head_dim)` into rotated heads, `(heads, tokens, head_dim)`.
    pub(super) fn split_keys(&self, xs: &Tensor, heads: usize) -> Result<Tensor> {
        self.of_keys.split_heads(xs, heads)
    }

    /// The same for queries.
    pub(super) fn split_queries(&self, xs: &Tensor, heads: usize) -> Result<Tensor> {
        self.of_queries.as_ref().unwrap_or(&self.of_keys).split_heads(xs, heads)
    }
}

/// What takes keys from their positions to others: the rotation by the difference, which is the same for all.
#[derive(Debug)]
pub(super) struct Turn {
    /// `(1, head_dim / 2)` each; `None` where they stay.
    by: Option<Rows>,
}

impl Turn {
    /// Keys `(heads, tokens, head_dim)`, turned in `f32`, or as they were.
    pub(super) fn keys(&self, keys: Tensor) -> Result<Tensor> {
        let Some(by) = &self.by else { return Ok(keys) };
        let tokens = keys.dim(1)?;
        let all = by.map(|table| table.broadcast_as((tokens, table.dim(1)?)))?;
        kernels::rotate(&keys.to_dtype(DType::F32)?, &all.cos, &all.sin)
    }
}

impl Rope {
    /// The first tables are this long, which is enough for most prompts.
    const FIRST: usize = 1024;

    /// Angles in the first tables, at most; heads of up to 16384 channels are allowed.
    const FIRST_ANGLES: usize = 1 << 18;

    pub(super) fn new(config: &Config, dtype: DType, device: &Device) -> Result<Self> {
        let frequencies = Frequencies::new(config);
        let rows = Self::FIRST.min(Self::FIRST_ANGLES / frequencies.len().max(1));
        let first = rows.min(config.max_position_embeddings).max(1);
        let tables = Tables::new(&frequencies, first, dtype, device)?;
        Ok(Self {
            frequencies,
            query_scaling: config.query_scaling.clone(),
            dtype,
            device: device.clone(),
            tables: RwLock::new(Arc::new(tables)),
        })
    }

    /// The rotation of the tokens of `batch`, each at its position. `ends` are the positions that the
    /// sequences reach in the whole pass, of which `batch` may be a piece.
    pub(super) fn at(&self, batch: &Batch, ends: &[usize]) -> Result<Rotation> {
        let longest = ends.iter().copied().max().unwrap_or(0);
        let of_keys = if self.frequencies.grow_at(longest) {
            self.grown(batch, ends)?
        } else {
            self.tabled(batch)?
        };
        let of_queries =
            self.query_scales(batch)?.map(|scales| of_keys.times(&scales)).transpose()?;
        Ok(Rotation { of_keys, of_queries })
    }

    /// What takes keys from their positions to as many from `to` on.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where a pass at the other positions would compute other keys than turned ones.
    pub(super) fn turn(&self, from: &Range<usize>, to: usize) -> Result<Turn> {
        let longest = from.end.max(to.saturating_add(from.len()));
        if self.frequencies.grow_at(longest) {
            let what = "dynamic rope scaling of tokens that are not read anew";
            return Err(Error::unsupported(what, format!("a text of {longest} tokens")));
        }
        let scale = |position| self.query_scale(position);
        if let Some((from, to)) = from.clone().zip(to..).find(|(a, b)| scale(*a) != scale(*b)) {
            let got = format!("from position {from} to {to}");
            return Err(Error::unsupported("move of tokens whose queries grow in between", got));
        }
        if from.start == to {
            return Ok(Turn { by: None });
        }
        // Magnitude is in the keys already.
        let difference = to as f64 - from.start as f64;
        let frequencies = self.frequencies.at(0);
        let table = |function: fn(f64) -> f64| {
            let turned = frequencies.iter().map(|freq| function(difference * f64::from(*freq)));
            Tensor::from_vec(
                turned.map(|it| it as f32).collect(),
                (1, frequencies.len()),
                &self.device,
            )
        };
        Ok(Turn { by: Some(Rows { cos: table(f64::cos)?, sin: table(f64::sin)? }) })
    }

    fn tabled(&self, batch: &Batch) -> Result<Rows> {
        let ends = (0..batch.sequences()).map(|index| batch.first(index) + batch.rows(index).len());
        let tables = self.tables(ends.max().unwrap_or(0))?;
        if batch.sequences() == 1 {
            return tables.rows.map(|table| table.narrow(0, batch.first(0), batch.tokens()));
        }
        let positions: Vec<u32> = batch.positions().map(|position| position as u32).collect();
        let positions = Tensor::new(positions, &self.device)?;
        tables.rows.map(|table| table.index_select(&positions, 0))
    }

    /// Each sequence by the frequencies of its own length.
    fn grown(&self, batch: &Batch, ends: &[usize]) -> Result<Rows> {
        let rows = (0..batch.sequences()).zip(ends).map(|(sequence, end)| {
            let first = batch.first(sequence);
            let positions = first..first + batch.rows(sequence).len();
            Rows::new(&self.frequencies.at(*end), positions, &self.frequencies, self.place())
        });
        let rows: Vec<Rows> = rows.collect::<Result<_>>()?;
        let cat = |column: fn(&Rows) -> &Tensor| {
            Tensor::cat(&rows.iter().map(column).collect::<Vec<_>>(), 0)
        };
        Ok(Rows { cos: cat(|rows| &rows.cos)?, sin: cat(|rows| &rows.sin)? })
    }

    /// What queries are multiplied by, `(tokens, 1)`; `None` where that is 1 for all of them.
    fn query_scales(&self, batch: &Batch) -> Result<Option<Tensor>> {
        if self.query_scaling.is_none() {
            return Ok(None);
        }
        let scales: Vec<f32> = batch.positions().map(|it| self.query_scale(it)).collect();
        if scales.iter().all(|scale| *scale == 1.0) {
            return Ok(None);
        }
        let shape = (scales.len(), 1);
        Ok(Some(Tensor::from_vec(scales, shape, &self.device)?.to_dtype(self.dtype)?))
    }

    /// What the query at this position is multiplied by.
    fn query_scale(&self, position: usize) -> f32 {
        self.query_scaling.as_ref().map_or(1.0, |scaling| {
            let (beta, original) =
                (scaling.beta as f32, scaling.original_max_position_embeddings as f32);
            // In f32, as transformers computes it.
            1.0 + beta * (1.0 + (position as f32 / original).floor()).ln()
        })
    }

    fn tables(&self, positions: usize) -> Result<Arc<Tables>> {
        // A poisoned lock only means that another thread panicked: the tables inside are whole.
        let current = self.tables.read().unwrap_or_else(PoisonError::into_inner).clone();
        if current.positions >= positions {
            return Ok(current);
        }
        let longer = positions.next_power_of_two();
        let grown = Arc::new(Tables::new(&self.frequencies, longer, self.dtype, &self.device)?);
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        if tables.positions < longer {
            *tables = Arc::clone(&grown);
        }
        Ok(grown)
    }

    fn place(&self) -> (DType, &Device) {
        (self.dtype, &self.device)
    }
}

impl Tables {
    fn new(
        frequencies: &Frequencies,
        positions: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let rows = Rows::new(&frequencies.at(0), 0..positions, frequencies, (dtype, device))?;
        Ok(Self { positions, rows })
    }
}

impl Rows {
    fn new(
        inv_freq: &[f32],
        positions: Range<usize>,
        frequencies: &Frequencies,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        let angle = |position: usize| inv_freq.iter().map(move |freq| position as f32 * freq);
        let magnitude = frequencies.magnitude();
        let table = |function: fn(f32) -> f32| -> Result<Tensor> {
            let values = positions.clone().flat_map(angle).map(|it| function(it) * magnitude);
            let shape = (positions.len(), inv_freq.len());
            Ok(Tensor::from_vec(values.collect(), shape, device)?.to_dtype(dtype)?)
        };
        Ok(Self { cos: table(f32::cos)?, sin: table(f32::sin)? })
    }

    fn map(&self, change: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Result<Self> {
        Ok(Self { cos: change(&self.cos)?, sin: change(&self.sin)? })
    }

    /// Each row multiplied by one of `scales`, `(positions, 1)`.
    fn times(&self, scales: &Tensor) -> Result<Self> {
        self.map(|table| table.broadcast_mul(scales))
    }

    fn split_heads(&self, xs: &Tensor, heads: usize) -> Result<Tensor> {
        kernels::split_heads(xs, heads, Some((&self.cos, &self.sin)))
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
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        };
        Rope::new(&config, DType::F32, &Device::Cpu)
    }

    fn at(rope: &Rope, batch: &Batch) -> Result<Rows> {
        Ok(rope.at(batch, &batch.ends())?.of_keys)
    }

    #[test]
    fn tables_grow_with_the_text_not_with_the_model() -> Result<()> {
        let rope = rope(1_000_000_000)?;
        assert_eq!(rope.tables(1)?.positions, Rope::FIRST);
        let before = at(&rope, &Batch::one(24)?.starting_at(0, 1000)?)?;
        assert_eq!(rope.tables(5000)?.positions, 8192);
        let after = at(&rope, &Batch::one(24)?.starting_at(0, 1000)?)?;
        assert_eq!(before.cos.to_vec2::<f32>()?, after.cos.to_vec2::<f32>()?);
        Ok(())
    }

    #[test]
    fn a_position_turns_pair_i_by_theta_to_the_minus_2i_over_dim() -> Result<()> {
        let rotation = at(&rope(4096)?, &Batch::one(4096)?)?;
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
        let both = at(&rope, &Batch::ragged(&[6, 4])?.starting_at(1, 7)?)?;
        let alone = at(&rope, &Batch::one(4)?.starting_at(0, 7)?)?;
        let second = both.cos.narrow(0, 6, 4)?;
        assert_eq!(second.to_vec2::<f32>()?, alone.cos.to_vec2::<f32>()?);
        Ok(())
    }
}
