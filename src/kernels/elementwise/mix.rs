//! Sums of some rows each, with shares.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape};
use rayon::prelude::*;

use super::super::storage::f32s;

/// Numbers of the result that one task computes, at least.
const RUN: usize = 1 << 14;

/// `ys[t] = Σ shares[t, s] · rows[places[t, s]]`, in the order of `s`: `rows` is `(.., width)`, `shares`
/// `(count, several)`, both contiguous in `f32`, and so many `places` are rows that there are. The
/// plain twin is a sum of `index_select`s.
#[derive(Debug)]
pub(in crate::kernels) struct Mix<'a> {
    pub(in crate::kernels) places: &'a [u32],
}

impl CustomOp2 for Mix<'_> {
    fn name(&self) -> &'static str {
        "mix"
    }

    fn cpu_fwd(
        &self,
        rows: &CpuStorage,
        rows_layout: &Layout,
        shares: &CpuStorage,
        shares_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let ((_, width), (count, several)) =
            (rows_layout.shape().dims2()?, shares_layout.shape().dims2()?);
        let (rows, shares) = (f32s(rows, rows_layout)?, f32s(shares, shares_layout)?);
        let fit = self.places.len() == shares.len()
            && self.places.iter().all(|place| rows.len() >= (*place as usize + 1) * width);
        if !fit {
            candle_core::bail!("mix: {rows_layout:?} for {} places", self.places.len());
        }
        let mut ys = vec![0f32; count * width];
        let wanted = self.places.par_chunks(several.max(1)).zip(shares.par_chunks(several.max(1)));
        let of_task = RUN.div_ceil(width.max(1));
        ys.par_chunks_mut(width.max(1)).zip(wanted).with_min_len(of_task).for_each(
            |(ys, (places, shares))| {
                for (place, share) in places.iter().zip(shares) {
                    let row = rows.get(*place as usize * width..).unwrap_or_default();
                    ys.iter_mut().zip(row).for_each(|(y, x)| *y += share * x);
                }
            },
        );
        Ok((CpuStorage::F32(ys), (count, width).into()))
    }
}
