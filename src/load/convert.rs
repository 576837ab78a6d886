//! From stored bytes to a tensor of the wanted type, or to GGUF blocks, in one parallel pass.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{CpuStorage, DType, Device, Tensor, WithDType};
use half::slice::HalfFloatSliceExt;
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use memmap2::MmapMut;
use rayon::prelude::*;

use super::block_type::BlockType;
use super::names::Rows;
use super::scales::{E4M3, Scales};
use crate::error::{Error, Result};
use crate::model::{Codebook, CodebookMatrix};

/// What a weight is stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    F64,
    F32,
    F16,
    BF16,
    /// `F8_E4M3`; multiplied by [`Scales`], if there are any.
    F8,
    /// Quantised; the scales are part of the blocks.
    Blocks(BlockType),
}

impl Stored {
    /// The type that holds these values unchanged: that of the file where candle's models compute in it,
    /// otherwise f32. FP8 times a scale is rounded to bf16, which has the range of f32 and 16 times as many
    /// steps.
    pub(super) fn dtype(self) -> DType {
        match self {
            Self::F64 | Self::F32 | Self::Blocks(_) => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 | Self::F8 => DType::BF16,
        }
    }

    /// Elements that are stored together.
    pub(super) fn block_size(self) -> usize {
        match self {
            Self::F64 | Self::F32 | Self::F16 | Self::BF16 | Self::F8 => 1,
            Self::Blocks(blocks) => blocks.block_size(),
        }
    }

    /// Bytes of so many elements.
    pub(super) fn type_size(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::F8 => 1,
            Self::Blocks(blocks) => blocks.type_size(),
        }
    }

    /// As errors name it.
    pub(super) fn name(self) -> String {
        match self {
            Self::Blocks(blocks) => blocks.name(),
            number => format!("{number:?}"),
        }
    }

    /// Bytes of one row of `len` elements. Blocks do not span rows: the parser has checked that.
    fn row_bytes(self, len: usize) -> usize {
        len / self.block_size() * self.type_size()
    }
}

/// A weight in a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source<'a> {
    /// Exactly the bytes of the weight. For blocks they are aligned to 4 bytes.
    pub(super) bytes: &'a [u8],
    pub(super) stored: Stored,
    pub(super) shape: &'a [usize],
    pub(super) rows: Rows,
    /// What FP8 is multiplied by.
    pub(super) scales: Option<&'a Scales>,
}

/// A row of a weight in a file.
#[derive(Clone, Copy)]
struct Row<'a> {
    stored: Stored,
    bytes: &'a [u8],
    /// Of FP8, one for each run of `width` elements.
    scales: &'a [f32],
    width: usize,
}

/// Why a weight was not converted.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The element at `index`, in the order of the file, is not finite; `stored` says whether it was so
    /// before the conversion.
    NotFinite {
        index: usize,
        got: f32,
        stored: bool,
    },
    Other(Error),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

impl From<candle_core::Error> for Refusal {
    fn from(error: candle_core::Error) -> Self {
        Self::Other(error.into())
    }
}

/// The fewest elements that one task converts: enough to hide the cost of starting it.
const TASK: usize = 1 << 15;

impl Source<'_> {
    /// The tensor in Hugging Face order, as `dtype`: f32, f16 or bf16.
    pub(super) fn convert(&self, dtype: DType, device: &Device) -> Result<Tensor, Refusal> {
        match dtype {
            DType::F32 => self.fill::<f32>(device),
            DType::F16 => self.fill::<f16>(device),
            DType::BF16 => self.fill::<bf16>(device),
            other => Err(Error::parameter("dtype", "f32, f16 or bf16", other.as_str()).into()),
        }
    }

    fn fill<T: Float>(&self, device: &Device) -> Result<Tensor, Refusal> {
        let row_len = self.row_len();
        let rows_per_task = TASK.div_ceil(row_len);
        let mut data = T::zeros(self.shape.iter().product());
        let bad_row = data
            .par_chunks_mut(rows_per_task * row_len)
            .enumerate()
            .filter_map(|(task, rows)| {
                let rows = rows.chunks_exact_mut(row_len).enumerate();
                let bad_rows = rows.filter_map(|(i, out)| {
                    let row = self.rows.source(task * rows_per_task + i);
                    (!T::read(self.row(row), out)).then_some(row)
                });
                bad_rows.min()
            })
            .min();
        match bad_row {
            Some(row) => Err(self.not_finite::<T>(row)),
            None => Ok(Tensor::from_vec(data, self.shape, device)?),
        }
    }

    /// The matrix in Hugging Face order in blocks of `to`, of which its rows are a multiple: its own
    /// blocks unchanged, anything else rounded.
    pub(super) fn blocks(&self, to: GgmlDType, device: &Device) -> Result<QTensor, Refusal> {
        if self.stored == Stored::Blocks(to.into()) && self.rows == Rows::InOrder {
            let rows = self.shape.first().copied().unwrap_or_default();
            let rows_per_task = TASK.div_ceil(self.row_len());
            let tasks = (0..rows).into_par_iter().step_by(rows_per_task);
            tasks.try_for_each(|start| {
                (start..rows.min(start + rows_per_task)).try_for_each(|row| self.check_finite(row))
            })?;
            let storage = QStorage::from_data(Cow::Borrowed(self.bytes), device, to)?;
            return Ok(QTensor::new(storage, self.shape)?);
        }
        // A mapping, because candle asserts that blocks are aligned.
        let map = MmapMut::map_anon(self.packed_len(to.into()));
        let mut packed = map.map_err(|error| Error::io("memory")(error))?;
        self.pack_all(to.into(), &mut packed)?;
        let storage = QStorage::from_data(Cow::Borrowed(&packed), device, to)?;
        Ok(QTensor::new(storage, self.shape)?)
    }

    /// The matrix in Hugging Face order in its own blocks.
    pub(super) fn codebook(&self, codebook: Codebook) -> Result<CodebookMatrix, Refusal> {
        let to = codebook.into();
        let mut packed = vec![0; self.packed_len(to)];
        self.pack_all(to, &mut packed)?;
        let rows = self.shape.first().copied().unwrap_or_default();
        Ok(CodebookMatrix::new(codebook, packed, (rows, self.row_len()))?)
    }

    /// Bytes of all rows in blocks of `to`.
    fn packed_len(&self, to: BlockType) -> usize {
        let rows = self.shape.first().copied().unwrap_or_default();
        rows * Stored::Blocks(to).row_bytes(self.row_len())
    }

    /// Writes all rows, in Hugging Face order, as the bytes of their blocks.
    fn pack_all(&self, to: BlockType, packed: &mut [u8]) -> Result<(), Refusal> {
        let row_len = self.row_len();
        let row_bytes = Stored::Blocks(to).row_bytes(row_len).max(1);
        let rows_per_task = TASK.div_ceil(row_len);
        packed.par_chunks_mut(rows_per_task * row_bytes).enumerate().try_for_each(
            |(task, packed)| {
                let rows = task * rows_per_task..task * rows_per_task + packed.len() / row_bytes;
                self.pack(rows, to, packed)
            },
        )
    }

    /// Writes some of the rows.
    fn pack(&self, rows: Range<usize>, to: BlockType, packed: &mut [u8]) -> Result<(), Refusal> {
        let row_len = self.row_len();
        let row_bytes = Stored::Blocks(to).row_bytes(row_len);
        if self.stored == Stored::Blocks(to) {
            for (row, packed) in rows.zip(packed.chunks_exact_mut(row_bytes)) {
                let row = self.rows.source(row);
                self.check_finite(row)?;
                packed.copy_from_slice(self.row(row).bytes);
            }
            return Ok(());
        }
        let mut wide = vec![0f32; rows.len() * row_len];
        for (row, wide) in rows.clone().zip(wide.chunks_exact_mut(row_len)) {
            let row = self.rows.source(row);
            if !f32::read(self.row(row), wide) {
                return Err(self.not_finite::<f32>(row));
            }
        }
        let BlockType::Candle(blocks) = to else {
            return Err(Error::unsupported("rounding", format!("to {}", to.name())).into());
        };
        let wide = Tensor::from_vec(wide, (rows.len(), row_len), &Device::Cpu)?;
        packed.copy_from_slice(&QTensor::quantize(&wide, blocks)?.data()?);
        // The scales of blocks are f16: a large value may have become infinite.
        let mut rounded = vec![0f32; row_len];
        for (row, packed) in rows.zip(packed.chunks_exact(row_bytes)) {
            if !f32::read(Row::unscaled(Stored::Blocks(to), packed), &mut rounded) {
                let column = rounded.iter().position(|value| !value.is_finite()).unwrap_or(0);
                let index = self.rows.source(row) * row_len + column;
                let got = rounded.get(column).copied().unwrap_or(f32::NAN);
                return Err(Refusal::NotFinite { index, got, stored: false });
            }
        }
        Ok(())
    }

    /// Refuses a stored row of blocks with a weight that is not finite.
    fn check_finite(&self, row: usize) -> Result<(), Refusal> {
        if let Stored::Blocks(blocks) = self.stored
            && blocks.are_surely_finite(self.row(row).bytes)
        {
            return Ok(());
        }
        match f32::read(self.row(row), &mut vec![0.0; self.row_len()]) {
            true => Ok(()),
            false => Err(self.not_finite::<f32>(row)),
        }
    }

    /// A vector is one row; in anything else, the first dimension counts the rows.
    fn row_len(&self) -> usize {
        let row = match self.shape {
            [_, row @ ..] if !row.is_empty() => row,
            vector => vector,
        };
        row.iter().product::<usize>().max(1)
    }

    /// A stored row.
    fn row(&self, row: usize) -> Row<'_> {
        let len = self.stored.row_bytes(self.row_len());
        let bytes =
            self.bytes.get(row * len..).and_then(|rest| rest.get(..len)).unwrap_or_default();
        let unscaled = Row::unscaled(self.stored, bytes);
        match self.scales {
            Some(scales) => Row { scales: scales.of_row(row), width: scales.width(), ..unscaled },
            None => unscaled,
        }
    }

    /// Reads again a row that `T::read` rejected, to find which value it was and where.
    fn not_finite<T: Float>(&self, row: usize) -> Refusal {
        let mut converted = T::zeros(self.row_len());
        T::read(self.row(row), &mut converted);
        let mut stored = vec![0.0; self.row_len()];
        self.row(row).read_f64(&mut stored);
        let converted = converted.into_iter().map(T::to_f64);
        let mut elements = converted.zip(stored).enumerate();
        let (column, (got, stored)) = elements
            .find(|(_, (value, _))| !value.is_finite())
            .unwrap_or((0, (f64::NAN, f64::NAN)));
        let index = row * self.row_len() + column;
        Refusal::NotFinite { index, got: got as f32, stored: !stored.is_finite() }
    }
}

/// The element types of a tensor that weights are kept in.
trait Float: WithDType + Send + Sync {
    /// Memory that the system zeroes when it is first touched, so that filling it takes a single pass.
    fn zeros(len: usize) -> Vec<Self>;
    /// Converts one row; false if a value of `out` is not finite.
    fn read(row: Row<'_>, out: &mut [Self]) -> bool;
}

impl Float for f32 {
    fn zeros(len: usize) -> Vec<Self> {
        vec![0.0; len]
    }

    fn read(row: Row<'_>, out: &mut [Self]) -> bool {
        row.read_f32(0, out);
        out.iter().fold(true, |finite, value| finite & value.is_finite())
    }
}

/// Both half types are read the same way: their own bits copied, everything else converted through f32.
macro_rules! half_float {
    ($half:ty, $same:pat) => {
        impl Float for $half {
            fn zeros(len: usize) -> Vec<Self> {
                vec![0u16; len].reinterpret_into()
            }

            fn read(row: Row<'_>, out: &mut [Self]) -> bool {
                if let $same = row.stored {
                    copy(row.bytes, out, |bits| Self::from_bits(u16::from_le_bytes(bits)));
                } else {
                    row.through_f32(out, |from, to| to.convert_from_f32_slice(from));
                }
                out.iter().fold(true, |finite, value| finite & value.is_finite())
            }
        }
    };
}

half_float!(f16, Stored::F16);
half_float!(bf16, Stored::BF16);

/// Elements of the buffers between two conversions; small enough for the stack and the first-level
/// cache, and a multiple of every block.
const BUFFER: usize = 1024;

impl<'a> Row<'a> {
    fn unscaled(stored: Stored, bytes: &'a [u8]) -> Self {
        Self { stored, bytes, scales: &[], width: usize::MAX }
    }

    fn through_f32<T>(&self, out: &mut [T], convert: impl Fn(&[f32], &mut [T])) {
        let mut buffer = [0f32; BUFFER];
        for (start, out) in (0..).step_by(BUFFER).zip(out.chunks_mut(BUFFER)) {
            let Some(buffer) = buffer.get_mut(..out.len()) else { return };
            self.read_f32(start, buffer);
            convert(buffer, out);
        }
    }

    /// The elements from `start`, a multiple of every block, as many as `out` has room for.
    fn read_f32(&self, start: usize, out: &mut [f32]) {
        let len = self.stored.row_bytes(out.len());
        let from = self.bytes.get(self.stored.row_bytes(start)..).unwrap_or_default();
        let bytes = from.get(..len).unwrap_or_default();
        match self.stored {
            Stored::F32 => copy(bytes, out, f32::from_le_bytes),
            Stored::F64 => copy(bytes, out, |bytes| f64::from_le_bytes(bytes) as f32),
            Stored::BF16 => {
                copy(bytes, out, |bytes| bf16::from_bits(u16::from_le_bytes(bytes)).into());
            }
            Stored::F16 => {
                // half converts slices with the processor's own instruction, but single values without it
                let mut buffer = [f16::ZERO; BUFFER];
                for (bytes, out) in bytes.chunks(2 * BUFFER).zip(out.chunks_mut(BUFFER)) {
                    let Some(buffer) = buffer.get_mut(..out.len()) else { return };
                    copy(bytes, buffer, |bits| f16::from_bits(u16::from_le_bytes(bits)));
                    buffer.convert_to_f32_slice(out);
                }
            }
            Stored::F8 => {
                copy(bytes, out, |[byte]| E4M3[usize::from(byte)]);
                self.scale(start, out);
            }
            Stored::Blocks(BlockType::Codebook(codebook)) => codebook.dequantize(bytes, out),
            Stored::Blocks(BlockType::Candle(blocks)) => {
                // candle asserts that `bytes` are whole blocks and aligned to them: the GGUF parser makes
                // rows whole blocks and aligns tensors to 8, and a block is a multiple of its own
                // alignment, at most 4
                let blocks = blocks.from_data(Cow::Borrowed(bytes));
                match blocks.dequantize(out.len()) {
                    Ok(CpuStorage::F32(values)) => out.copy_from_slice(&values),
                    // candle does not get here today; if it ever does, the caller refuses NaN
                    _ => out.fill(f32::NAN),
                }
            }
        }
    }

    /// Multiplies the elements from `start` on by their scales.
    fn scale(&self, start: usize, mut out: &mut [f32]) {
        let mut at = start;
        while let Some(scale) = self.scales.get(at / self.width) {
            let run = (self.width - at % self.width).min(out.len());
            let (scaled, rest) = out.split_at_mut(run);
            scaled.iter_mut().for_each(|value| *value *= scale);
            if rest.is_empty() {
                return;
            }
            (at, out) = (at + run, rest);
        }
    }

    /// The whole row, as [`read_f32`](Self::read_f32) but without overflowing f64 values to f32.
    fn read_f64(&self, out: &mut [f64]) {
        if self.stored == Stored::F64 {
            return copy(self.bytes, out, f64::from_le_bytes);
        }
        let mut values = vec![0f32; out.len()];
        self.read_f32(0, &mut values);
        out.iter_mut().zip(values).for_each(|(out, value)| *out = value.into());
    }
}

/// `out[i] = read(bytes of element i)`. The bytes need no alignment: safetensors promises none.
fn copy<T, const N: usize>(bytes: &[u8], out: &mut [T], read: impl Fn([u8; N]) -> T) {
    let (elements, _) = bytes.as_chunks::<N>();
    out.iter_mut().zip(elements).for_each(|(out, bytes)| *out = read(*bytes));
}
