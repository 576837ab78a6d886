//! The optimiser. It is candle-nn's AdamW with one difference: a run that was killed can be resumed with
//! its moments, which candle-nn does not expose.

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

/// AdamW (Loshchilov & Hutter 2019) over named variables.
#[derive(Debug)]
pub struct AdamW {
    parameters: Vec<Parameter>,
    beta1: f64,
    beta2: f64,
    eps: f64,
    weight_decay: f64,
    steps: i32,
}

#[derive(Debug)]
struct Parameter {
    name: String,
    var: Var,
    /// Running means of the gradient and of its square.
    moments: [Tensor; 2],
    /// Its learning rate, relative to the common one.
    rate: f64,
}

impl AdamW {
    /// For these variables; `beta2` forgets old squares of the gradient, `weight_decay` shrinks weights.
    ///
    /// # Errors
    /// When candle fails.
    pub fn new(vars: &[(String, Var)], beta2: f64, weight_decay: f64) -> Result<Self> {
        let parameter = |(name, var): &(String, Var)| {
            let zeros = var.as_detached_tensor().zeros_like()?;
            let moments = [zeros.clone(), zeros];
            Ok(Parameter { name: name.clone(), var: var.clone(), moments, rate: 1.0 })
        };
        let parameters = vars.iter().map(parameter).collect::<Result<_>>()?;
        Ok(Self { parameters, beta1: 0.9, beta2, eps: 1e-8, weight_decay, steps: 0 })
    }

    /// Lets one variable learn `rate` times as fast as the others.
    #[must_use]
    pub fn with_rate(mut self, name: &str, rate: f64) -> Self {
        let of_name = self.parameters.iter_mut().filter(|it| it.name == name);
        of_name.for_each(|parameter| parameter.rate = rate);
        self
    }

    /// One step down `grads`, which are first scaled down if their total length is more than `longest`.
    /// Returns their length before that.
    ///
    /// # Errors
    /// When a gradient is not finite.
    pub fn step(&mut self, grads: &GradStore, lr: f64, longest: f64) -> Result<f64> {
        let mut square = 0.0;
        for parameter in &self.parameters {
            if let Some(grad) = grads.get(&parameter.var) {
                square += f64::from(grad.detach().sqr()?.sum_all()?.to_scalar::<f32>()?);
            }
        }
        let length = square.sqrt();
        if !length.is_finite() {
            candle_core::bail!("a gradient of length {length}; try a lower --lr");
        }
        let scale = if length > longest { longest / length } else { 1.0 };
        self.steps += 1;
        let correct = [self.beta1, self.beta2].map(|beta| 1.0 / (1.0 - beta.powi(self.steps)));
        for Parameter { var, moments: [m, v], rate, .. } in &mut self.parameters {
            let Some(grad) = grads.get(var) else { continue };
            let lr = lr * *rate;
            let grad = (grad.detach() * scale)?;
            *m = ((&*m * self.beta1)? + (&grad * (1.0 - self.beta1))?)?;
            *v = ((&*v * self.beta2)? + (grad.sqr()? * (1.0 - self.beta2))?)?;
            let step = ((&*m * correct[0])? / ((&*v * correct[1])?.sqrt()? + self.eps)?)?;
            let kept = (var.as_detached_tensor() * (1.0 - lr * self.weight_decay))?;
            var.set(&(kept - (step * lr)?)?)?;
        }
        Ok(length)
    }

    /// The variables and their moments by name, for [`AdamW::restore`].
    #[must_use]
    pub fn state(&self) -> HashMap<String, Tensor> {
        let entries =
            self.parameters.iter().flat_map(|Parameter { name, var, moments: [m, v], .. }| {
                let named =
                    |kind: &str, tensor: &Tensor| (format!("{kind}/{name}"), tensor.clone());
                [named("weight", &var.as_detached_tensor()), named("mean", m), named("square", v)]
            });
        entries.collect()
    }

    /// Continues after `steps` steps from a [`AdamW::state`].
    ///
    /// # Errors
    /// When a variable is missing from it, or has another shape.
    pub fn restore(&mut self, steps: i32, state: &HashMap<String, Tensor>) -> Result<()> {
        for Parameter { name, var, moments, .. } in &mut self.parameters {
            let find = |kind: &str| match state.get(&format!("{kind}/{name}")) {
                Some(tensor) if tensor.shape() == var.shape() => Ok(tensor.clone()),
                _ => candle_core::bail!("the saved run has no {kind} for {name}"),
            };
            var.set(&find("weight")?)?;
            *moments = [find("mean")?, find("square")?];
        }
        self.steps = steps;
        Ok(())
    }
}
