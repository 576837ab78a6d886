//! Projections in every kind of weight against candle's own products.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor, Var};
use hybrid_attention::model::{Batch, Linear, Pass, Transformer};

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use common::tiny;
use common::{Result, assert_close, assert_identical};

/// Few rows, the last few, and more: each kernel and the border between them.
const ROWS: [usize; 8] = [1, 3, 4, 5, 16, 17, 70, 300];

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

/// The types of quantised weights that GGUF files have.
const BLOCKS: [GgmlDType; 10] = [
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

/// Blocks are multiplied as the numbers they stand for, and so is what candle alone can unpack.
#[test]
fn quantised_weights_are_those_they_stand_for() -> Result {
    for dtype in BLOCKS.into_iter().chain([GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16]) {
        for (out, width) in [(24, 256), (70, 1280)] {
            let weight = tiny::noise(1, &[out, width], 1.0)?;
            let weight = Arc::new(QTensor::quantize(&weight, dtype)?);
            let unpacked = weight.dequantize(&Device::Cpu)?;
            let linear = Linear::quantized(weight)?;
            for rows in ROWS {
                let name = format!("{rows} x {width} by {out} of {dtype:?}");
                let xs = tiny::noise(2, &[rows, width], 1.0)?;
                let ys = linear.forward(&xs)?;
                assert_close(&name, &ys, &xs.matmul(&unpacked.t()?)?, 1e-6)?;
            }
        }
    }
    Ok(())
}

/// A row gives the same bits whatever rows come with it, up to as many as are multiplied as the weight is
/// read: a sequence that is decoded beside others gets what it gets alone.
#[test]
fn a_row_gives_the_same_bits_beside_others() -> Result {
    for (out, width) in [(70, 1280), (27, 576), (24, 256), (50, 37), (1, 1)] {
        let weight = tiny::noise(1, &[out, width], 1.0)?;
        let dense = [DType::F32, DType::BF16, DType::F16].into_iter().map(|dtype| -> Result<_> {
            Ok((format!("{dtype:?}"), Linear::dense(&weight.to_dtype(dtype)?)?))
        });
        let blocks = BLOCKS.into_iter().filter(|dtype| width % dtype.block_size() == 0);
        let blocks = blocks.map(|dtype| -> Result<_> {
            let weight = Arc::new(QTensor::quantize(&weight, dtype)?);
            Ok((format!("{dtype:?}"), Linear::quantized(weight)?))
        });
        let xs = tiny::noise(2, &[16, width], 1.0)?;
        for linear in dense.chain(blocks) {
            let (name, linear) = linear?;
            let alone = (0..16).map(|row| Ok(linear.forward(&xs.narrow(0, row, 1)?)?));
            let alone = alone.collect::<Result<Vec<_>>>()?;
            for rows in 2..=16 {
                let name = format!("{rows} rows of {width} by {out} of {name}");
                let expected = Tensor::cat(&alone[16 - rows..], 0)?;
                let xs = xs.narrow(0, 16 - rows, rows)?;
                assert_identical(&name, &linear.forward(&xs)?, &expected)?;
            }
        }
    }
    Ok(())
}

/// A view may repeat itself until no memory could hold it.
#[test]
fn what_no_memory_holds_is_refused() -> Result {
    let endless =
        |width| Tensor::ones((1, 1), DType::F32, &Device::Cpu)?.expand((usize::MAX, width));
    for width in [1, 2] {
        let error = Linear::dense(&endless(width)?).err().map(|error| error.to_string());
        assert!(error.is_some_and(|it| it.starts_with("parameter matrix: expected")));
    }
    let linear = Linear::dense(&Tensor::ones((3, 2), DType::F32, &Device::Cpu)?)?;
    let error = linear.forward(&endless(2)?).err().map(|error| error.to_string());
    assert!(error.is_some_and(|it| it.starts_with("parameter matrix: expected")));
    Ok(())
}

/// Bits of every kind, not only those that a quantiser would choose: each weight of a block is read
/// out by a row of the identity, to the last bit as candle unpacks it.
#[test]
fn any_block_is_read_as_candle_reads_it() -> Result {
    /// Where a block has numbers in `f16`; the second byte of each must not make it infinite.
    fn halves(dtype: GgmlDType) -> Vec<usize> {
        match dtype {
            GgmlDType::Q4_1 | GgmlDType::Q5_1 | GgmlDType::Q4K | GgmlDType::Q5K => vec![0, 2],
            GgmlDType::Q2K => vec![80, 82],
            GgmlDType::Q3K => vec![108],
            GgmlDType::Q6K => vec![208],
            _ => vec![0],
        }
    }

    const LEN: usize = 256;
    let identity = Tensor::eye(LEN, DType::F32, &Device::Cpu)?;
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for dtype in BLOCKS {
        let mut bytes = vec![0u8; 4 * LEN / dtype.block_size() * dtype.type_size()];
        rng.fill_bytes(&mut bytes);
        for block in bytes.chunks_exact_mut(dtype.type_size()) {
            halves(dtype).into_iter().for_each(|at| block[at + 1] &= 0b1011_1111);
        }
        // Among them a scale that is no normal number, and none.
        bytes[halves(dtype)[0]..][..2].copy_from_slice(&[3, 0x80]);
        let second = dtype.type_size() + halves(dtype)[0];
        bytes[second..][..2].fill(0);
        let storage = QStorage::from_data(bytes.into(), &Device::Cpu, dtype)?;
        let weight = Arc::new(QTensor::new(storage, (4, LEN))?);
        let unpacked = weight.dequantize(&Device::Cpu)?;
        let linear = Linear::quantized(weight)?;
        for rows in [1, LEN] {
            let ys = linear.forward(&identity.narrow(0, 0, rows)?)?;
            let expected = unpacked.t()?.narrow(0, 0, rows)?;
            // Not bit for bit: a sum that begins at 0 has no -0.
            let differing = ys.ne(&expected)?.sum_all()?.to_scalar::<u8>()?;
            assert_eq!(differing, 0, "{dtype:?}, {rows} rows");
        }
    }
    Ok(())
}

/// Gradients come back through weights that have none themselves, in whatever type they are kept.
#[test]
fn gradients_come_back_through_narrow_weights() -> Result {
    let weight = tiny::noise(1, &[24, 256], 1.0)?;
    let quantized = BLOCKS.into_iter().map(|dtype| -> Result<_> {
        let weight = Arc::new(QTensor::quantize(&weight, dtype)?);
        Ok((Linear::quantized(Arc::clone(&weight))?, weight.dequantize(&Device::Cpu)?))
    });
    let half = [DType::BF16, DType::F16].into_iter().map(|dtype| -> Result<_> {
        let weight = weight.to_dtype(dtype)?;
        Ok((Linear::dense(&weight)?, weight.to_dtype(DType::F32)?))
    });
    for case in quantized.chain(half) {
        let (linear, wide) = case?;
        for rows in [1, 40] {
            let xs = Var::from_tensor(&tiny::noise(2, &[rows, 256], 1.0)?)?;
            let slope = tiny::noise(3, &[rows, 24], 1.0)?;
            let gradients = (linear.forward(xs.as_tensor())? * &slope)?.sum_all()?.backward()?;
            let gradient = gradients.get(xs.as_tensor()).ok_or("no gradient")?;
            assert_close("gradient", gradient, &slope.matmul(&wide)?, 1e-6)?;
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
                let batch = Batch::one(seq)?;
                let run = |model: &Transformer| {
                    tiny::logits(model, &tiny::embed(model, &ids)?, Pass::Bidirectional(&batch))
                };
                assert_close("logits", &run(&kept)?, &run(&rounded)?, 1e-5)?;
            }
        }
    }
    Ok(())
}

/// A matrix without rows gives nothing for any number of tokens, and stops nobody.
#[test]
fn a_weight_without_rows_gives_nothing() -> Result {
    for dtype in [DType::F32, DType::BF16] {
        let linear = Linear::dense(&Tensor::zeros((0, 5), dtype, &Device::Cpu)?)?;
        for tokens in [1, 20] {
            let xs = Tensor::ones((tokens, 5), DType::F32, &Device::Cpu)?;
            assert_eq!(linear.forward(&xs)?.dims(), [tokens, 0]);
        }
    }
    Ok(())
}
