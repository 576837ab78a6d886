#![no_main]

use hybrid_attention_testing::hostile;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = hostile::tekken(data);
});
