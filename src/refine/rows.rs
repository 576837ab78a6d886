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

/// Which rows think.
pub(super) struct Thinks<'a>(pub(super) &'a Layout);

impl Thinks<'_> {
    /// `xs` where a row thinks, `z` where it is plain or padding: both `(batch, seq, hidden)`, as
    /// the layout says. Put together run by run, which costs one copy; a choice element by element
    /// costs several.
    pub(super) fn or(&self, xs: &Tensor, z: &Tensor) -> Result<Tensor> {
        let layout = self.0;
        if layout.is_all_context() {
            return Ok(xs.clone());
        }
        let row = |row: usize| -> Result<Tensor> {
            let (xs, z) = (xs.narrow(0, row, 1)?, z.narrow(0, row, 1)?);
            let (mut runs, mut at) = (Vec::new(), 0);
            for run in layout.context(row) {
                runs.push(z.narrow(1, at, run.start - at)?);
                runs.push(xs.narrow(1, run.start, run.len())?);
                at = run.end;
            }
            runs.push(z.narrow(1, at, layout.seq() - at)?);
            Ok(Tensor::cat(&runs, 1)?)
        };
        let rows = (0..layout.batch()).map(row).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(&rows, 0)?)
    }
}
