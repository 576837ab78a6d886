//! A cache by itself, given keys and values that no model computed.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};

use super::*;
use crate::config::Config;
use crate::kernels::{self, KeyValues};
use crate::model::{Batch, Mask, Sight, Transformer};

const HEADS: usize = 2;
const HEAD_DIM: usize = 20;

/// One layer, of which only the shape of its keys matters.
fn transformer(sliding_window: Option<usize>) -> Result<Transformer> {
    let config = Config {
        vocab_size: 1,
        hidden_size: 1,
        intermediate_size: 1,
        num_hidden_layers: 1,
        num_attention_heads: 2 * HEADS,
        num_key_value_heads: HEADS,
        head_dim: HEAD_DIM,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        sliding_window,
        max_position_embeddings: 1000,
        tie_word_embeddings: true,
        rope_scaling: None,
        query_scaling: None,
        experts: None,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    };
    let zeros =
        |(name, shape)| Ok((name, Tensor::zeros::<Vec<usize>>(shape, DType::F32, &Device::Cpu)?));
    let mut weights = config.weights().map(zeros).collect::<Result<HashMap<_, _>>>()?;
    Transformer::new(&config, &mut weights)
}

fn random(heads: usize, len: usize) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 1.0, (heads, len, HEAD_DIM), &Device::Cpu)?)
}

fn bits(xs: &Tensor) -> Result<Vec<u32>> {
    let values = xs.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f32::to_bits).collect())
}

/// Adds new tokens as a pass does: what their queries attend to, and what they gather from it.
fn pass(cache: &mut KvCache, q: &Tensor, new: (&Tensor, &Tensor)) -> Result<(Remembered, Tensor)> {
    let (window, count, which) = (cache.pool.shape().window, new.0.dim(1)?, 0..1);
    let batch = Batch::one(count)?.starting_at(0, cache.len())?;
    let mut caches = [cache];
    let mut open = Open::begin(&mut caches, &(0..1), &[(which.clone(), vec![count])])?;
    open.reserve(&which, &[count])?;
    let mask = Mask::with_past(&batch, Sight::Causal, window, &open.oldest(&which))?;
    let remembered = open.remember(0, &which, new, &mask)?;
    open.commit();
    let scale = 1.0 / (HEAD_DIM as f64).sqrt();
    let attend = |held: KeyValues<'_>| kernels::attend(q, &held, mask.spans(), scale);
    let gathered = match &remembered {
        Remembered::Packed(keys, values) => {
            attend(KeyValues::Packed { keys: &keys.detach(), values: &values.detach() })
        }
        Remembered::Blocks(blocks) => attend(KeyValues::Blocks(blocks)),
    };
    Ok((remembered, gathered?.into_tensor()))
}

/// A narrow cache beside a wide one that is given the rounded numbers: tokens in pieces, tracked and
/// not, while the window rolls. Both hold the same, and so attention over them is the same.
#[test]
fn a_narrow_cache_is_a_wide_one_of_rounded_numbers() -> Result<()> {
    for (dtype, window) in
        [DType::BF16, DType::F16].into_iter().flat_map(|it| [(it, None), (it, Some(9))])
    {
        let transformer = transformer(window)?;
        let cache = |dtype| transformer.new_pool(dtype, usize::MAX)?.new_cache(400);
        let (mut narrow, mut wide) = (cache(dtype)?, cache(DType::F32)?);
        let same = |narrow: &KvCache, wide: &KvCache| -> Result<()> {
            assert_eq!((narrow.oldest(), narrow.len()), (wide.oldest(), wide.len()));
            assert_eq!(narrow.bytes() * 2, wide.bytes());
            let held = narrow.oldest()..narrow.len();
            let got = narrow.keys_and_values(0, &held, DType::F32)?;
            let expected = wide.keys_and_values(0, &held, DType::F32)?;
            assert_eq!(bits(&got.0)?, bits(&expected.0)?, "{dtype:?} {window:?}");
            assert_eq!(bits(&got.1)?, bits(&expected.1)?, "{dtype:?} {window:?}");
            Ok(())
        };
        let round = |xs: &Tensor| xs.to_dtype(dtype)?.to_dtype(DType::F32);
        for (count, tracked) in [(200, false), (1, false), (7, true), (1, true), (150, false)] {
            let (keys, values) = (random(HEADS, count)?, random(HEADS, count)?);
            let q = random(2 * HEADS, count)?;
            let (a, b) = (round(&keys)?, round(&values)?);
            let (_, expected) = pass(&mut wide, &q, (&a, &b))?;
            let (remembered, got) = match tracked {
                true => {
                    let (keys, values) = (Var::from_tensor(&keys)?, Var::from_tensor(&values)?);
                    pass(&mut narrow, &q, (&keys, &values))?
                }
                false => pass(&mut narrow, &q, (&keys, &values))?,
            };
            assert_eq!(bits(&got)?, bits(&expected)?, "{dtype:?} {window:?}");
            // What carries a gradient is as wide as it was computed.
            match remembered {
                Remembered::Packed(keys, _) => assert!(tracked && keys.dtype() == DType::F32),
                Remembered::Blocks(_) => assert!(!tracked),
            }
            same(&narrow, &wide)?;
        }

        let (keys, values) = (random(HEADS, 120)?, random(HEADS, 120)?);
        for cache in [&mut narrow, &mut wide] {
            cache.reset();
        }
        narrow.extend(0, &keys, &values)?;
        wide.extend(0, &round(&keys)?, &round(&values)?)?;
        same(&narrow, &wide)?;
    }
    Ok(())
}
