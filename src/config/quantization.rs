//! What a checkpoint says about weights of eight bits.

use serde_json::Value;

use super::fields::{Fields, brief};
use crate::error::{Error, Result};

/// Matrices in FP8 (`F8_E4M3`), each with a scale that its values are multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fp8 {
    /// Rows and columns of the weights that share a scale, where a matrix has more than one for all and
    /// fewer than one a row.
    pub(crate) block: (usize, usize),
}

impl Default for Fp8 {
    fn default() -> Self {
        Self { block: Self::BLOCK }
    }
}

impl Fp8 {
    const BLOCK: (usize, usize) = (128, 128);

    /// Reads the `quantization_config` of a `config.json`; `None` if there is none.
    ///
    /// What it says about activations is passed over: these stay as wide as they are.
    pub(super) fn read(fields: &Fields) -> Result<Option<Self>> {
        let name = "quantization_config";
        let Some(quantization) = fields.object(name)? else { return Ok(None) };
        match quantization.text("quant_method")?.unwrap_or("no quant_method") {
            "fp8" => Ok(Some(Self { block: block(&quantization, "weight_block_size")? })),
            "compressed-tensors" => compressed_tensors(&quantization).map(Some),
            other => Err(Error::unsupported(name, other)),
        }
    }

    /// Reads the `quantization` of a `params.json`; `None` if there is none.
    pub(super) fn read_params(fields: &Fields) -> Result<Option<Self>> {
        let Some(value) = fields.get("quantization") else { return Ok(None) };
        let format = value.get("qformat_weight").and_then(Value::as_str);
        if format != Some("fp8_e4m3") {
            return Err(Error::unsupported("quantization", brief(value)));
        }
        Ok(Some(Self::default()))
    }

    /// Reads the text of a `config.json`, or of a `params.json`, that [`Config`](super::Config) has
    /// accepted.
    pub(crate) fn of(text: &str, is_params: bool) -> Result<Option<Self>> {
        let fields = Fields::parse(text, "config.json")?;
        if is_params {
            return Self::read_params(&fields);
        }
        let text_config = fields.object("text_config")?;
        Ok(match text_config.as_ref().map(Self::read).transpose()?.flatten() {
            Some(inside) => Some(inside),
            None => Self::read(&fields)?,
        })
    }
}

/// The one kind of compressed-tensors that is FP8 with scales: `float-quantized`.
fn compressed_tensors(quantization: &Fields) -> Result<Fp8> {
    let unsupported = |got: String| Error::unsupported("compressed-tensors", got);
    match quantization.text("format")? {
        Some("float-quantized") => {}
        other => return Err(unsupported(other.unwrap_or("no format").to_string())),
    }
    let mut found = Fp8::default();
    let groups = quantization.object("config_groups")?;
    for (group, value) in groups.iter().flat_map(Fields::iter) {
        let Some(weights) = value.get("weights").filter(|it| !it.is_null()) else { continue };
        let eight = weights.get("num_bits").and_then(Value::as_u64) == Some(8);
        let float = weights.get("type").and_then(Value::as_str) == Some("float");
        if !(eight && float) {
            return Err(unsupported(format!("{group}.weights: {}", brief(weights))));
        }
        if weights.get("symmetric").and_then(Value::as_bool) == Some(false) {
            return Err(unsupported(format!("{group}.weights: not symmetric")));
        }
        if weights.get("block_structure").is_some_and(Value::is_array) {
            found.block = pair(weights.get("block_structure"), "block_structure")?;
        }
    }
    Ok(found)
}

fn block(quantization: &Fields, field: &str) -> Result<(usize, usize)> {
    quantization.get(field).map_or(Ok(Fp8::BLOCK), |value| pair(Some(value), field))
}

/// Two sizes above 0.
fn pair(value: Option<&Value>, field: &str) -> Result<(usize, usize)> {
    let size = |value: &Value| value.as_u64()?.try_into().ok().filter(|size: &usize| *size > 0);
    let sizes: Option<Vec<usize>> =
        value.and_then(Value::as_array).and_then(|list| list.iter().map(size).collect());
    match sizes.as_deref() {
        Some([rows, columns]) => Ok((*rows, *columns)),
        _ => {
            let got = value.map_or_else(|| "nothing".to_string(), brief);
            Err(Error::config(field, "two sizes above 0", got))
        }
    }
}
