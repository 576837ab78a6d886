//! Random blocks of every type, for tests.

use candle_core::quantized::GgmlDType;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::blocks::{
    Iq4Nl, Iq4Xs, Mxfp4, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, QuantBlock,
};
use super::codebook::Codebook;

/// What is to be done with rows of blocks.
pub(super) trait OnBlocks {
    /// With some rows of `len` weights and, from their plain twin, what these are.
    fn run<B: QuantBlock>(&self, name: &str, w: &[B], wide: &[f32], len: usize);
}

/// Does it with `rows` rows of each type, of each of these lengths that are whole blocks.
pub(super) fn every_block(rows: usize, lens: &[usize], task: &impl OnBlocks) {
    fn of_candle<const SIZE: usize>(
        dtype: GgmlDType,
        (rows, lens): (usize, &[usize]),
        task: &impl OnBlocks,
    ) where
        [u8; SIZE]: QuantBlock,
    {
        let blocks = |bytes: &[u8]| bytes.as_chunks::<SIZE>().0.to_vec();
        each(&format!("{dtype:?}"), (rows, lens), task, blocks, |bytes, out| {
            let values = dtype.from_data(bytes.into()).dequantize(out.len());
            let values = values.and_then(|it| Ok(it.as_slice::<f32>()?.to_vec()));
            out.copy_from_slice(&values.unwrap_or_default());
        });
    }

    fn each<B: QuantBlock>(
        name: &str,
        (rows, lens): (usize, &[usize]),
        task: &impl OnBlocks,
        blocks: impl Fn(&[u8]) -> Vec<B>,
        dequantize: impl Fn(&[u8], &mut [f32]),
    ) {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        for len in lens.iter().copied().filter(|len| len % B::LEN == 0) {
            let mut w = vec![0u8; rows * len / B::LEN * size_of::<B>()];
            random.fill_bytes(&mut w);
            // Scales, wherever they are, that are neither infinite nor NaN.
            w.iter_mut().for_each(|byte| *byte &= 0xbf);
            let mut wide = vec![f32::NAN; rows * len];
            dequantize(&w, &mut wide);
            task.run(name, &blocks(&w), &wide, len);
        }
    }

    let of = (rows, lens);
    of_candle::<{ size_of::<Q4_0>() }>(GgmlDType::Q4_0, of, task);
    of_candle::<{ size_of::<Q4_1>() }>(GgmlDType::Q4_1, of, task);
    of_candle::<{ size_of::<Q5_0>() }>(GgmlDType::Q5_0, of, task);
    of_candle::<{ size_of::<Q5_1>() }>(GgmlDType::Q5_1, of, task);
    of_candle::<{ size_of::<Q8_0>() }>(GgmlDType::Q8_0, of, task);
    of_candle::<{ size_of::<Q2K>() }>(GgmlDType::Q2K, of, task);
    of_candle::<{ size_of::<Q3K>() }>(GgmlDType::Q3K, of, task);
    of_candle::<{ size_of::<Q4K>() }>(GgmlDType::Q4K, of, task);
    of_candle::<{ size_of::<Q5K>() }>(GgmlDType::Q5K, of, task);
    of_candle::<{ size_of::<Q6K>() }>(GgmlDType::Q6K, of, task);
    let nl = |bytes: &[u8]| -> Vec<Iq4Nl> { bytes.as_chunks::<2>().0.as_chunks::<9>().0.to_vec() };
    let xs = |bytes: &[u8]| -> Vec<Iq4Xs> { bytes.as_chunks::<136>().0.to_vec() };
    let fp4 = |bytes: &[u8]| -> Vec<Mxfp4> { bytes.as_chunks::<17>().0.to_vec() };
    each("IQ4_NL", of, task, nl, |bytes, out| Codebook::Iq4Nl.dequantize(bytes, out));
    each("IQ4_XS", of, task, xs, |bytes, out| Codebook::Iq4Xs.dequantize(bytes, out));
    each("MXFP4", of, task, fp4, |bytes, out| Codebook::Mxfp4.dequantize(bytes, out));
}
