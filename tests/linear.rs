//! Projections in every kind of weight against candle's own products.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{DType, Module};
use hybrid_attention::model::{Layout, Linear, Pass, Transformer};

use common::tiny;
use common::{Result, assert_close, assert_identical};

/// Few rows, the last few, and more: each kernel and the border between them.
const ROWS: [usize; 5] = [1, 3, 4, 5, 40];

/// Widths that fill vector registers and ones that leave a tail.
const WIDTHS: [(usize, usize); 4] = [(64, 96), (33, 7), (100, 1037), (1, 1)];

#[test]
fn dense_weights_give_candles_product() -> Result {
    for (out, width) in WIDTHS {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let weight = tiny::noise(1, &[out, width], 1.0)?.to_dtype(dtype)?;
            let linear = Linear::dense(&weight)?;
            let wide = weight.to_dtype(DType::F32)?;
            for rows in ROWS {
                let name = format!("{rows} x {width} by {out} of {dtype:?}");
                let xs = tiny::noise(2, &[rows, width], 1.0)?;
                let expected = xs.matmul(&wide.t()?)?;
                assert_close(&name, &linear.forward(&xs)?, &expected, 1e-6)?;
                let batched = linear.forward(&xs.unsqueeze(0)?)?;
                assert_close(&name, &batched, &expected.unsqueeze(0)?, 1e-6)?;
            }
        }
    }
    Ok(())
}

#[test]
fn inputs_need_not_lie_in_one_piece() -> Result {
    let linear = Linear::dense(&tiny::noise(1, &[9, 6], 1.0)?)?;
    for rows in ROWS {
        let xs = tiny::noise(2, &[6, rows], 1.0)?.t()?;
        assert_identical("transposed", &linear.forward(&xs)?, &linear.forward(&xs.contiguous()?)?)?;
    }
    Ok(())
}

#[test]
fn quantised_weights_give_candles_product() -> Result {
    for dtype in [GgmlDType::Q4_0, GgmlDType::Q8_0, GgmlDType::Q4K, GgmlDType::Q6K] {
        let weight = Arc::new(QTensor::quantize(&tiny::noise(1, &[24, 256], 1.0)?, dtype)?);
        let theirs = QMatMul::from_arc(Arc::clone(&weight))?;
        let ours = Linear::quantized(weight)?;
        for rows in ROWS {
            let xs = tiny::noise(2, &[rows, 256], 1.0)?;
            assert_identical("quantised", &ours.forward(&xs)?, &theirs.forward(&xs)?)?;
        }
    }
    Ok(())
}

/// A model whose weights stay in half precision is the one whose weights were rounded to it.
#[test]
fn a_half_precision_model_is_the_rounded_one_in_f32() -> Result {
    for tied in [false, true] {
        let config = hybrid_attention::Config { tie_word_embeddings: tied, ..tiny::config() };
        for dtype in [DType::BF16, DType::F16] {
            let mut kept = HashMap::new();
            let mut rounded = HashMap::new();
            for (name, weight) in tiny::weights(&config, 3)? {
                let half = weight.to_dtype(dtype)?;
                rounded.insert(name.clone(), half.to_dtype(DType::F32)?);
                kept.insert(name, half);
            }
            let kept = Transformer::new(&config, &mut kept)?;
            let rounded = Transformer::new(&config, &mut rounded)?;
            assert_eq!(kept.dtype(), DType::F32);
            for seq in [1, 20] {
                let ids = tiny::tokens(&config, 3, seq);
                let layout = Layout::dense(1, seq);
                let run = |model: &Transformer| {
                    tiny::logits(model, &tiny::embed(model, &ids)?, Pass::Bidirectional(&layout))
                };
                assert_close("logits", &run(&kept)?, &run(&rounded)?, 1e-5)?;
            }
        }
    }
    Ok(())
}
