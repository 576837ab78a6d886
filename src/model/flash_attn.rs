//! candle's flash attention (Dao 2023), for CUDA devices and behind the feature `flash-attn`: no score
//! ever stands in memory. It is taken where it computes just what the mask says, and nowhere else.

use candle_core::{DType, Tensor};

#[cfg(feature = "flash-attn")]
use super::mask::Mask;
#[cfg(feature = "flash-attn")]
use crate::error::Result;

/// [`attend`](super::attend) of tensors that fit each other and the mask; `None` where the kernel
/// cannot express it.
#[cfg(feature = "flash-attn")]
pub(super) fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &Mask,
    scale: f32,
) -> Result<Option<Tensor>> {
    let inputs = [q, k, v];
    let fit = |xs: &Tensor| xs.device().is_cuda() && xs.dtype() == q.dtype() && reads(xs);
    if !inputs.into_iter().all(fit) {
        return Ok(None);
    }
    let Some(band) = mask.band() else { return Ok(None) };
    let (batch, heads, queries, head_dim) = q.dims4()?;
    // It reads (batch, seq, heads, head_dim), in any order in memory.
    let [q, k, v] = inputs.map(|xs| xs.transpose(1, 2));
    let (behind, ahead) = (band.behind, band.ahead);
    let ys = candle_flash_attn::flash_attn_windowed(&q?, &k?, &v?, scale, behind, ahead)?;
    Ok(Some(ys.reshape((batch, queries, heads * head_dim))?))
}

/// Numbers that the kernel loads at once, in 16 bytes.
const AT_ONCE: usize = 8;

/// The longest heads that the kernel has a form for.
const LONGEST_HEAD: usize = 512;

/// Whether the kernel can read `xs`, `(batch, heads, seq, head_dim)`, which it neither checks in full
/// nor gives a gradient for: heads of 16-bit numbers, each in one piece that begins at a multiple of 16
/// bytes.
fn reads(xs: &Tensor) -> bool {
    let layout = xs.layout();
    let (Some(head_dim), Some((step, strides))) =
        (layout.dims().last(), layout.stride().split_last())
    else {
        return false;
    };
    let aligned = |offset: &usize| offset.is_multiple_of(AT_ONCE);
    matches!(xs.dtype(), DType::F16 | DType::BF16)
        && !xs.track_op()
        && (1..=LONGEST_HEAD).contains(head_dim)
        && *step == 1
        && strides.iter().chain([head_dim, &layout.start_offset()]).all(aligned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Result;
    use candle_core::{Device, Var};

    #[test]
    fn the_kernel_is_given_what_it_can_read() -> Result<()> {
        let zeros = |dtype, dims: [usize; 4]| Tensor::zeros(&dims, dtype, &Device::Cpu);
        let heads = zeros(DType::BF16, [2, 3, 40, 24])?;
        for readable in [
            heads.clone(),
            zeros(DType::F16, [1, 1, 1, 512])?,
            heads.narrow(2, 5, 7)?,                         // of a cache
            heads.transpose(1, 2)?,                         // not yet heads by heads
            heads.narrow(3, 8, 16)?, // a part that begins at a multiple of 16 bytes
            heads.narrow(1, 0, 1)?.expand((2, 4, 40, 24))?, // one for many
        ] {
            assert!(reads(&readable), "{:?}", readable.layout());
        }
        for unreadable in [
            zeros(DType::F32, [2, 3, 40, 24])?,
            zeros(DType::F16, [1, 1, 4, 20])?,
            zeros(DType::F16, [1, 1, 4, 520])?,
            zeros(DType::F16, [1, 1, 4, 0])?,
            heads.transpose(2, 3)?,
            heads.narrow(3, 4, 8)?,
            zeros(DType::F16, [1, 2, 4, 20])?.narrow(3, 0, 16)?,
            Var::from_tensor(&heads)?.as_tensor().clone(),
        ] {
            assert!(!reads(&unreadable), "{:?}", unreadable.layout());
        }
        Ok(())
    }
}
