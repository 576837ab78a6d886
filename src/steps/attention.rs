//! What one head of one layer computes.

use std::ops::Range;

use candle_core::Tensor;

use super::{SoftmaxSteps, copied};
use crate::error::{Error, Result};
use crate::model::{Attended, ForwardContext, Pass, Site, Tap, Transformer};

/// What one head of one layer computes over one sequence of a pass, step by step.
///
/// ```text
/// q = R W_q x̂     k = R W_k x̂     v = W_v x̂       x̂ the normed residual, R the rotation by position
/// s = q kᵀ / √d                                   d = head_dim; minus infinity where a key is not seen
/// m = max s       e = exp(s - m)  Z = Σ e         w = e / Z
/// c = w v         share = c W_oᵀ                  with the columns of W_o that read this head
/// projection = Σ share                            over all heads
/// after = before + projection
/// ```
///
/// Queries, keys, values, context, projection and both residuals are what the pass computed; on the CPU to the last
/// bit. The steps from scores to weights, which its kernel never has in memory at once, are worked out from those queries
/// and keys, and their product with the values is that context within 10⁻⁶ of the largest value. The share goes
/// through the layer's own projection, with all other heads at 0.
///
/// Weights may be of any type: on the CPU, products with `bf16` or quantised weights are computed in `f32` too, and the
/// shares of all heads add up to the projection, but for the rounding of `f32`. On other devices all this is as coarse as
/// the type of the stream.
///
/// Memory grows with the square of the text. Made by a [`HeadTap`], or by
/// [`HybridModel::attention_steps`](crate::HybridModel::attention_steps) and
/// [`ThoughtLoop::attention_steps`](crate::thought::ThoughtLoop::attention_steps).
#[derive(Clone, Debug)]
pub struct AttentionSteps {
    /// The rows of the pass, or of the chunk of it, that are this sequence's.
    pub rows: Range<usize>,
    /// Where in its sequence each query stands.
    pub positions: Range<usize>,
    /// Where in its sequence each key stands.
    pub key_positions: Range<usize>,
    /// `q_i = R_i W_q x̂_i`, `(queries, head_dim)`: the queries of this head, rotated by their positions; longer at late
    /// positions, where a model [scales](crate::QueryScaling) them.
    pub queries: Tensor,
    /// `k_j = R_j W_k x̂_j`, `(keys, head_dim)`: the keys of the head's group, rotated by their positions.
    pub keys: Tensor,
    /// `v_j = W_v x̂_j`, `(keys, head_dim)`: the values of the head's group.
    pub values: Tensor,
    /// From `s_ij = q_i · k_j / √head_dim`, `(queries, keys)`, to weights.
    pub softmax: SoftmaxSteps,
    /// `c_i = Σ_j w_ij v_j`, `(queries, head_dim)`.
    pub context: Tensor,
    /// `c W_oᵀ` with the columns of `W_o` that read this head, `(queries, hidden)`: what the head adds to the
    /// residual stream.
    pub share: Tensor,
    /// `[c_0 ; c_1 ; ..] W_oᵀ`, `(queries, hidden)`: what all heads add.
    pub projection: Tensor,
    /// The residual stream that enters the layer, before its norm: `(queries, hidden)`.
    pub before: Tensor,
    /// `before + projection`, `(queries, hidden)`: the residual stream behind attention, which the MLP reads.
    pub after: Tensor,
}

/// Writes down what one head of one layer computes in a pass: of any [`Pass`], with what its caches hold.
///
/// ```
/// use candle_core::Device;
/// use hybrid_attention::HybridModel;
/// use hybrid_attention::model::{Batch, ForwardContext, Pass};
/// use hybrid_attention::steps::HeadTap;
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let (transformer, batch) = (model.transformer(), Batch::one(3)?);
/// let xs = transformer.embed_ids(&[11, 150, 12])?;
/// let mut tap = HeadTap::new(1, 0);
/// transformer.forward(&xs, 0..2, ForwardContext::from(Pass::Causal(&batch)).tap(&mut tap))?;
/// let steps = tap.into_steps()?.remove(0);
/// assert_eq!(steps.softmax.weights.to_vec2::<f32>()?[0], [1.0, 0.0, 0.0]); // the first sees only itself
/// assert_eq!((steps.before + steps.projection)?.to_vec2::<f32>()?, steps.after.to_vec2::<f32>()?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct HeadTap {
    layer: usize,
    head: usize,
    /// The layers that ran.
    ran: Option<Range<usize>>,
    /// What entered the layer that runs now.
    input: Option<Tensor>,
    /// Those whose residual after attention is still to be shown.
    open: Vec<AttentionSteps>,
    steps: Vec<AttentionSteps>,
}

impl HeadTap {
    /// Of this query head of this layer, both counted from 0.
    #[must_use]
    pub fn new(layer: usize, head: usize) -> Self {
        Self { layer, head, ran: None, input: None, open: Vec::new(), steps: Vec::new() }
    }

    /// What it has seen: one for each sequence that has tokens, in the order of the pass. A causal pass over caches
    /// runs in chunks of 512 tokens, and has one for each sequence in each chunk.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a layer that did not run.
    pub fn into_steps(self) -> Result<Vec<AttentionSteps>> {
        if self.steps.is_empty() {
            let expected = match self.ran {
                Some(ran) => format!("one of those that ran, {ran:?}"),
                None => "a pass that has run".to_string(),
            };
            return Err(Error::parameter("layer", expected, self.layer));
        }
        Ok(self.steps)
    }

    /// Of one sequence, but for the residual after.
    fn begin(
        &self,
        attended: &Attended<'_>,
        sequence: usize,
        (share, projection, before): (&Tensor, &Tensor, &Tensor),
    ) -> Result<AttentionSteps> {
        let (rows, key_positions) = (attended.rows(sequence), attended.mask().keys(sequence));
        let head = |of: &Tensor, head| copied(&of.get(head)?);
        let own = |of: &Tensor| copied(&of.narrow(0, rows.start, rows.len())?);
        let (keys, values) = attended.keys_and_values(sequence)?; // (kv_heads, keys, head_dim)
        let group = self.head * keys.dim(0)? / attended.heads();
        let queries = attended.queries().narrow(1, rows.start, rows.len())?;
        let of_head = self.columns(attended);
        let before = own(before)?;
        Ok(AttentionSteps {
            positions: key_positions.end - rows.len()..key_positions.end,
            key_positions,
            queries: head(&queries, self.head)?,
            keys: head(&keys, group)?,
            values: head(&values, group)?,
            softmax: SoftmaxSteps::of(&attended.scores(sequence, self.head, 0..rows.len())?)?,
            context: own(&attended.context().narrow(1, of_head.start, of_head.len())?)?,
            share: own(share)?,
            projection: own(projection)?,
            after: before.clone(), // until it is shown
            before,
            rows,
        })
    }

    /// Which numbers of a context are this head's.
    fn columns(&self, attended: &Attended<'_>) -> Range<usize> {
        let width = attended.queries().dims().last().copied().unwrap_or(0); // head_dim
        self.head * width..(self.head + 1) * width
    }
}

impl Tap for HeadTap {
    fn residual(&mut self, layer: usize, site: Site, xs: &Tensor) -> Result<()> {
        if site == Site::Input {
            let ran = self.ran.get_or_insert(layer..layer);
            ran.end = ran.end.max(layer + 1);
        }
        if layer != self.layer {
            return Ok(());
        }
        match site {
            Site::Input => self.input = Some(xs.detach()),
            Site::AfterAttention => {
                for steps in self.open.drain(..) {
                    let after = copied(&xs.narrow(0, steps.rows.start, steps.rows.len())?)?;
                    self.steps.push(AttentionSteps { after, ..steps });
                }
            }
            Site::Output => (),
        }
        Ok(())
    }

    fn attention(&mut self, layer: usize, attended: &Attended<'_>) -> Result<()> {
        let Some(before) = self.input.take().filter(|_| layer == self.layer) else {
            return Ok(());
        };
        check_below("head", attended.heads(), self.head)?;
        let (context, own) = (attended.context().detach(), self.columns(attended));
        let behind = context.dim(1)? - own.end;
        let alone = context.narrow(1, own.start, own.len())?;
        let alone = alone.pad_with_zeros(1, own.start, behind)?; // (tokens, heads · head_dim)
        let share = attended.output_projection(&alone)?;
        let projection = attended.output_projection(&context)?;
        for sequence in 0..attended.mask().sequences() {
            if !attended.rows(sequence).is_empty() {
                let steps = self.begin(attended, sequence, (&share, &projection, &before))?;
                self.open.push(steps);
            }
        }
        Ok(())
    }
}

/// What a head of a layer computes when `xs` enters the layer `first` of `transformer`; one for each sequence.
pub(crate) fn of_pass(
    transformer: &Transformer,
    xs: &Tensor,
    first: usize,
    pass: Pass<'_>,
    (layer, head): (usize, usize),
) -> Result<Vec<AttentionSteps>> {
    check_below("layer", transformer.config().num_hidden_layers, layer)?;
    check_below("head", transformer.config().num_attention_heads, head)?;
    let mut tap = HeadTap::new(layer, head);
    transformer.forward(xs, first..layer + 1, ForwardContext::from(pass).tap(&mut tap))?;
    tap.into_steps()
}

fn check_below(name: &'static str, limit: usize, got: usize) -> Result<()> {
    match got < limit {
        true => Ok(()),
        false => Err(Error::parameter(name, format!("less than {limit}"), got)),
    }
}
