//! A ragged batch as one sequence of its tokens, so that padding costs nothing.

use candle_core::{Device, Tensor};

use super::View;
use super::mask::{Mask, Sight};
use super::rope::Rope;
use crate::error::Result;
use crate::layout::Layout;

/// How the tokens of a padded batch are laid out row behind row, and back.
///
/// ```text
/// lengths [2, 4]  ->  slots           0 1 2 3
///                     row 0:          · · A B
///                     row 1:          C D E F
///
/// of all 8 slots, the tokens first:   A B C D E F · ·     order  2 3 4 5 6 7 0 1
///              what runs, at once:    A B C D E F         positions  0 1 0 1 2 3
///               and back in place:    · · A B C D E F     back   6 7 0 1 2 3 4 5
/// ```
pub(super) struct Packing {
    tokens: usize,
    padding: usize,
    /// Slots of the batch, the tokens before the padding.
    order: Tensor,
    /// Where in `order` each slot is.
    back: Tensor,
}

impl Packing {
    /// `None` where there is no padding to leave out.
    pub(super) fn new(layout: &Layout, device: &Device) -> Result<Option<Self>> {
        let (seq, starts) = (layout.seq(), layout.starts());
        let padding: usize = starts.iter().sum();
        if padding == 0 {
            return Ok(None);
        }
        let slots = |from: usize, to: usize| (from as u32)..(to as u32);
        let rows = || starts.iter().enumerate();
        let tokens = rows().flat_map(|(row, start)| slots(row * seq + start, (row + 1) * seq));
        let skipped = rows().flat_map(|(row, start)| slots(row * seq, row * seq + start));
        let order: Vec<u32> = tokens.chain(skipped).collect();
        let tokens = order.len() - padding;
        // What of each has gone before a row: in row 1 of the example, 2 tokens and 2 of padding.
        let (mut token, mut skipped) = (0, tokens);
        let mut back = Vec::with_capacity(order.len());
        for start in starts {
            back.extend(slots(skipped, skipped + start));
            back.extend(slots(token, token + seq - start));
            (skipped, token) = (skipped + start, token + seq - start);
        }
        let (order, back) = (Tensor::new(order, device)?, Tensor::new(back, device)?);
        Ok(Some(Self { tokens, padding, order, back }))
    }

    /// Runs what keeps the shape of a stream over the tokens of `xs`, `(batch, seq, hidden)`, as
    /// `(1, tokens, hidden)`. In the result padding is as it came in.
    ///
    /// All in operations that carry a gradient, each of one pass over the batch: put together row
    /// by row, the gradient of every row would be as large as the batch.
    pub(super) fn run(
        &self,
        xs: &Tensor,
        blocks: impl FnOnce(Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let sorted = xs.flatten_to(1)?.index_select(&self.order, 0)?; // (batch · seq, hidden)
        let padding = sorted.narrow(0, self.tokens, self.padding)?;
        let tokens = sorted.narrow(0, 0, self.tokens)?.unsqueeze(0)?; // (1, tokens, hidden)
        let sorted = Tensor::cat(&[blocks(tokens)?.squeeze(0)?, padding], 0)?;
        Ok(sorted.index_select(&self.back, 0)?.reshape(xs.shape())?)
    }

    /// What the blocks share: each row begins at position 0 and sees itself alone.
    pub(super) fn view(
        layout: &Layout,
        sight: Sight,
        window: Option<usize>,
        rope: &Rope,
    ) -> Result<View> {
        let positions = layout.starts().into_iter().flat_map(|start| 0..layout.seq() - start);
        Ok(View { rotation: rope.of(positions)?, mask: Mask::packed(layout, sight, window).into() })
    }
}
