//! The experts of a mixture, as files spell and pack them, by code that shares nothing with the loader.

use std::collections::BTreeMap;

use candle_core::Tensor;
use hybrid_attention::Config;

use super::Result;

/// By name.
pub(crate) type Tensors = BTreeMap<String, Tensor>;

const PARTS: [(&str, &str); 3] = [("w1", "gate"), ("w3", "up"), ("w2", "down")];

/// `model.layers.0.block_sparse_moe.experts.3.w1.weight`
fn single(layer: usize, expert: usize, matrix: &str) -> String {
    format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight")
}

/// Whether a matrix is the router's, which nobody keeps in blocks.
pub(crate) fn is_router(name: &str) -> bool {
    name.ends_with(".block_sparse_moe.gate.weight")
}

/// From a tensor for each matrix of each expert to those that `transformers` 5 keeps.
pub(crate) fn pack(config: &Config, tensors: &Tensors) -> Result<Tensors> {
    let mut packed = tensors.clone();
    let experts = config.experts.as_ref().map_or(0, |of| of.num_local_experts);
    for layer in 0..config.num_hidden_layers {
        let mut all = |matrix: &str| -> Result<Tensor> {
            let mut each = Vec::new();
            for expert in 0..experts {
                each.push(packed.remove(&single(layer, expert, matrix)).ok_or("no such expert")?);
            }
            Ok(Tensor::stack(&each, 0)?)
        };
        let [gate, up, down] = [all("w1")?, all("w3")?, all("w2")?];
        let name = |of: &str| format!("model.layers.{layer}.mlp.{of}");
        let router = format!("model.layers.{layer}.block_sparse_moe.gate.weight");
        let router = packed.remove(&router).ok_or("no router")?;
        packed.insert(name("gate.weight"), router);
        packed.insert(name("experts.gate_up_proj"), Tensor::cat(&[gate, up], 1)?);
        packed.insert(name("experts.down_proj"), down);
    }
    Ok(packed)
}

/// The other way round; anything else stays as it is.
pub(crate) fn unpack(tensors: &Tensors) -> Result<Tensors> {
    let mut unpacked = BTreeMap::new();
    for (name, tensor) in tensors {
        let number =
            |layer: &str| -> Result<usize> { Ok(layer.rsplit('.').next().unwrap_or("").parse()?) };
        if let Some(layer) = name.strip_suffix(".mlp.gate.weight") {
            unpacked.insert(format!("{layer}.block_sparse_moe.gate.weight"), tensor.clone());
        } else if let Some(layer) = name.strip_suffix(".mlp.experts.gate_up_proj") {
            for expert in 0..tensor.dim(0)? {
                let halves = tensor.get(expert)?.chunk(2, 0)?;
                for (half, matrix) in halves.iter().zip(["w1", "w3"]) {
                    unpacked
                        .insert(single(number(layer)?, expert, matrix), half.force_contiguous()?);
                }
            }
        } else if let Some(layer) = name.strip_suffix(".mlp.experts.down_proj") {
            for expert in 0..tensor.dim(0)? {
                unpacked.insert(
                    single(number(layer)?, expert, "w2"),
                    tensor.get(expert)?.force_contiguous()?,
                );
            }
        } else {
            unpacked.insert(name.clone(), tensor.clone());
        }
    }
    Ok(unpacked)
}

/// As llama.cpp calls them: all experts of a layer in one tensor, or before 2024 `each` in its own.
pub(crate) fn for_gguf(config: &Config, tensors: &Tensors, each: bool) -> Result<Tensors> {
    let Some(of) = &config.experts else { return Ok(tensors.clone()) };
    let mut spelled = tensors.clone();
    for layer in 0..config.num_hidden_layers {
        let router = format!("model.layers.{layer}.block_sparse_moe.gate.weight");
        let router = spelled.remove(&router).ok_or("no router")?;
        spelled.insert(format!("blk.{layer}.ffn_gate_inp.weight"), router);
        for (matrix, theirs) in PARTS {
            let mut all = Vec::new();
            for expert in 0..of.num_local_experts {
                all.push(spelled.remove(&single(layer, expert, matrix)).ok_or("no such expert")?);
            }
            if each {
                for (expert, tensor) in all.into_iter().enumerate() {
                    spelled.insert(format!("blk.{layer}.ffn_{theirs}.{expert}.weight"), tensor);
                }
            } else {
                let name = format!("blk.{layer}.ffn_{theirs}_exps.weight");
                spelled.insert(name, Tensor::stack(&all, 0)?);
            }
        }
    }
    Ok(spelled)
}
