//! Gradients against finite differences.

use candle_core::{Tensor, Var};

use super::{Result, assert_close, tiny};

/// Half the distance between the two points of a finite difference.
const STEP: f64 = 1e-2;

/// The sum of all elements.
pub(crate) fn scalar(xs: &Tensor) -> Result<f64> {
    Ok(f64::from(xs.flatten_all()?.sum(0)?.to_scalar::<f32>()?))
}

/// A scalar of `ys` that weighs every element differently.
pub(crate) fn loss(ys: &Tensor) -> Result<Tensor> {
    Ok((ys * tiny::noise(7, ys.dims(), 0.3)?)?.sum_all()?)
}

/// Fails unless the gradient of `loss(f(x))` is the slope of that function, along itself and along
/// random directions, and `f` gives the same for an input that tracks no gradient.
pub(crate) fn check(name: &str, x: &Tensor, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result {
    let var = Var::from_tensor(x)?;
    let ys = f(var.as_tensor())?;
    assert_close(name, &ys.detach(), &f(x)?, 1e-5)?;
    let gradients = loss(&ys)?.backward()?;
    let gradient = gradients.get(&var).ok_or_else(|| format!("{name}: no gradient"))?;

    let norm = scalar(&gradient.sqr()?)?.sqrt();
    assert!(norm > 1e-3, "{name}: the gradient vanishes, {norm}");
    let along_itself = (gradient / norm)?;
    let random = |seed| tiny::noise(seed, x.dims(), 1.0 / (x.elem_count() as f32).sqrt());
    for (index, direction) in [along_itself, random(1)?, random(2)?].iter().enumerate() {
        let at = |step: f64| scalar(&loss(&f(&(x + (direction * step)?)?)?)?);
        let slope = (at(STEP)? - at(-STEP)?) / (2.0 * STEP);
        let expected = scalar(&(gradient * direction)?)?;
        let off = (slope - expected).abs() / norm;
        assert!(off < 0.01, "{name}, direction {index}: slope {slope}, gradient {expected}");
    }
    Ok(())
}
