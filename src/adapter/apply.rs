//! Adapters on a model.

use candle_core::Tensor;

use super::{Adapter, Wrapped, projections};
use crate::error::{Error, Result};
use crate::model::{Linear, LowRank, Transformer};

impl Transformer {
    /// This model with an adapter. The weights are shared, not copied, and may be quantised; several
    /// adapters add up.
    ///
    /// Gradients reach a [trainable](Adapter::trainable) adapter; none are computed for the weights.
    ///
    /// # Errors
    /// [`Error::UnusedWeight`] for a projection or a layer that this model does not have;
    /// [`Error::WeightShape`]; [`Error::MissingWeight`] for a projection without an adapter where the
    /// configuration says that it has one.
    pub fn adapted(&self, adapter: &Adapter) -> Result<Self> {
        let (mut adapted, dtype) = (self.variant(), self.dtype());
        adapter.apply(&mut adapted, |projection, LowRank { a, b, scale }| {
            let (a, b) = (a.to_dtype(dtype)?, b.to_dtype(dtype)?);
            projection.adapt(LowRank { a, b, scale });
            Ok(())
        })?;
        Ok(adapted)
    }

    /// This model with an adapter multiplied out, `W + scale · B A`, computed in `f32` and rounded to
    /// the type of the weights. It runs as fast as the bare model, and shares the weights that have no
    /// adapter with it. No gradient reaches the adapter.
    ///
    /// # Errors
    /// As [`Transformer::adapted`]; [`Error::Unsupported`] for quantised weights.
    pub fn merged(&self, adapter: &Adapter) -> Result<Self> {
        let mut merged = self.variant();
        adapter.apply(&mut merged, |projection, change| {
            *projection = projection.merged(&change)?;
            Ok(())
        })?;
        Ok(merged)
    }
}

impl Adapter {
    /// Calls `change` for every projection that has an adapter, with the adapter's matrices in `f32` on
    /// the device of the model.
    fn apply(
        &self,
        transformer: &mut Transformer,
        change: impl Fn(&mut Linear, LowRank) -> Result<()>,
    ) -> Result<()> {
        self.check_complete(transformer)?;
        let device = transformer.device().clone();
        let layers = transformer.config().num_hidden_layers;
        for (module, pair) in &self.pairs {
            let Some(projection) = transformer.projection_mut(module) else {
                let name = self.wrapped.tensor(module, "A");
                let reason = format!("this model has no {module}; it has {layers} layers");
                return Err(Error::UnusedWeight { name, place: self.place.clone(), reason });
            };
            let (out, input) = projection.shape();
            let rank = pair.a.dim(0)?;
            for (half, tensor, expected) in
                [("A", &pair.a, [rank, input]), ("B", &pair.b, [out, rank])]
            {
                if tensor.dims() != expected {
                    let (name, place) = (self.wrapped.tensor(module, half), self.place.clone());
                    let (expected, got) = (expected.to_vec(), tensor.dims().to_vec());
                    return Err(Error::WeightShape { name, place, expected, got });
                }
            }
            let (a, b) = (pair.a.to_device(&device)?, pair.b.to_device(&device)?);
            change(projection, LowRank { a, b, scale: pair.scale })?;
        }
        Ok(())
    }

    /// The gate that it brings for thought passes of `model`, in the type of its stream.
    pub(crate) fn gate_for(&self, model: &Transformer) -> Result<Option<Tensor>> {
        let Some(gate) = &self.thought_gate else { return Ok(None) };
        let expected = vec![model.config().hidden_size];
        if gate.dims() != expected {
            let (name, place) = ("thought.gate".to_string(), self.place.clone());
            let got = gate.dims().to_vec();
            return Err(Error::WeightShape { name, place, expected, got });
        }
        Ok(Some(gate.to_device(model.device())?.to_dtype(model.dtype())?))
    }

    /// A file that lacks a layer has more likely been truncated than meant that way.
    fn check_complete(&self, transformer: &Transformer) -> Result<()> {
        let rules = self.config.rules()?;
        let wanted = projections(transformer.config())
            .filter(|(module, _)| self.wrapped == Wrapped::CausalLm || module != "lm_head")
            .find(|(module, _)| {
                rules.targets(self.wrapped.inner(module)) && !self.pairs.contains_key(module)
            });
        match wanted {
            Some((module, _)) => {
                let name = self.wrapped.tensor(&module, "A");
                Err(Error::MissingWeight { name, place: self.place.clone() })
            }
            None => Ok(()),
        }
    }
}
