//! How what was fitted is written: tensors, and beside them what they are.

use std::collections::HashMap;
use std::path::Path;

use candle_core::Tensor;
use serde::Serialize;

use crate::adapter::{Values, serialize};
use crate::error::{Error, Result};
use crate::replace::replace;

/// Writes a safetensors file, which appears whole or not at all. `about` is its metadata under `name`.
pub(super) fn save(
    path: &Path,
    (name, about): (&str, &impl Serialize),
    tensors: &[(&str, Tensor)],
) -> Result<()> {
    let named = tensors.iter().map(|(name, it)| Ok((name.to_string(), Values::of(it)?)));
    let about = serde_json::to_string(about).map_err(|it| Error::malformed(path, it))?;
    let metadata = HashMap::from([(name.to_string(), about)]);
    replace(path, &serialize(named.collect::<Result<Vec<_>>>()?, metadata, path)?)
}
