//! Rows of numbers, taken from a tensor.

use candle_core::{DType, Device, Tensor};

use crate::batch::flat;
use crate::error::{Error, Result};

/// At least so many rows, finite and all of one width: that of the first, where none is known.
pub(super) fn rows_of(
    rows: &Tensor,
    width: &mut Option<usize>,
    least: usize,
) -> Result<Vec<Vec<f32>>> {
    let rows = flat(&rows.detach())?;
    let (count, hidden) = rows
        .dims2()
        .map_err(|_| Error::parameter("rows", "(tokens, hidden)", format!("{:?}", rows.dims())))?;
    let expected = *width.get_or_insert(hidden);
    if hidden != expected {
        return Err(Error::parameter("rows", format!("{expected} channels"), hidden));
    }
    if count < least {
        return Err(Error::parameter("rows", format!("at least {least}"), count));
    }
    let rows = rows.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    match rows.iter().position(|row| row.iter().any(|it| !it.is_finite())) {
        Some(position) => Err(Error::NotFinite { what: "states", position }),
        None => Ok(rows),
    }
}
