//! What ops share about rows of thoughts: how long they are, where they point, which of them think.

use candle_core::{D, DType, Tensor};

use crate::error::{Error, Result};
use crate::layout::Layout;

/// Rows of a `(.., hidden)` tensor as their directions, of length 1, and their lengths, `(.., 1)`. A
/// row of zeros has neither, and both are zero. Neither overflows where a sum of squares would.
pub(crate) fn directions(rows: &Tensor) -> Result<(Tensor, Tensor)> {
    let nonzero = |xs: &Tensor| -> Result<Tensor> { Ok((xs + xs.eq(0.0)?.to_dtype(xs.dtype())?)?) };
    // The unit of length cancels out, so its gradient may be left out.
    let unit = nonzero(&rows.detach().abs()?.max_keepdim(D::Minus1)?)?;
    let scaled = rows.broadcast_div(&unit)?;
    let square = scaled.sqr()?.sum_keepdim(D::Minus1)?;
    let (length, real) = (nonzero(&square)?.sqrt()?, square.ne(0.0)?.to_dtype(rows.dtype())?);
    Ok((scaled.broadcast_div(&length)?, ((length * real)? * unit)?))
}

/// Refuses thoughts that are not laid out as `layout` says.
pub(super) fn check_fits(thoughts: &Tensor, layout: &Layout) -> Result<()> {
    let (batch, seq, _) = thoughts.dims3()?;
    if (batch, seq) == (layout.batch(), layout.seq()) {
        return Ok(());
    }
    let expected = format!("{} rows of {} slots", layout.batch(), layout.seq());
    Err(Error::parameter("thoughts", expected, format!("{:?}", thoughts.dims())))
}

/// In a type that sums over many rows and channels lose nothing in: half precision as `f32`.
pub(crate) fn wide(xs: &Tensor) -> Result<Tensor> {
    let dtype = if xs.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    Ok(xs.to_dtype(dtype)?)
}

/// Which rows think: `None` when all do.
pub(super) struct Thinks(Option<Tensor>);

impl Thinks {
    pub(super) fn new(layout: &Layout, z: &Tensor) -> Result<Self> {
        if layout.is_all_context() {
            return Ok(Self(None));
        }
        let thinks = Tensor::new(layout.thinks(), z.device())?.unsqueeze(D::Minus1)?; // (batch, seq, 1)
        Ok(Self(Some(thinks)))
    }

    /// `xs` where a row thinks, `z` where it is plain or padding.
    pub(super) fn or(&self, xs: &Tensor, z: &Tensor) -> Result<Tensor> {
        match &self.0 {
            Some(thinks) => Ok(thinks.broadcast_as(z.shape())?.where_cond(xs, z)?),
            None => Ok(xs.clone()),
        }
    }
}
