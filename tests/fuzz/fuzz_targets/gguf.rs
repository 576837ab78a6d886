#![no_main]

#[path = "../../common/hostile.rs"]
mod hostile;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = hostile::gguf(data);
});
