//! Whether two models are one, by what they make of something fixed.

/// The most that what two machines make of it differs by: 1 minus the cosine.
const ROUNDING: f64 = 1e-5;

/// Whether `theirs` and `ours` were made by the same weights, and if not, why. `made` says what they are.
pub(crate) fn check(theirs: &[f32], ours: &[f32], made: &str) -> Result<(), String> {
    if theirs.len() != ours.len() {
        let (theirs, ours) = (theirs.len(), ours.len());
        return Err(format!("its {made} have {theirs} numbers, and those of this model {ours}"));
    }
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let cosine = dot(theirs, ours) / (dot(theirs, theirs) * dot(ours, ours)).sqrt();
    match 1.0 - cosine <= ROUNDING {
        true => Ok(()),
        false => Err(format!(
            "its {made} were made by another model, or by this one in another weight type or with another \
             adapter: something fixed comes out with a cosine of {cosine}"
        )),
    }
}
