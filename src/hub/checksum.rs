//! Whether what came is what was announced.

use std::fmt::Write;

use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

/// Adds up a file. What the hub calls an etag is the SHA-256 of a large file; a small one is kept by git,
/// which takes the SHA-1 of the file with a header before it. Mirrors have been seen to leave out the
/// header, so either will do.
#[derive(Clone)]
pub(super) struct Checksum {
    expected: String,
    sums: Vec<Context>,
}

impl Checksum {
    /// For a file of `size` bytes with this etag.
    pub(super) fn new(etag: &str, size: u64) -> Self {
        let is_hex = etag.bytes().all(|byte| byte.is_ascii_hexdigit());
        let sums = match etag.len() {
            64 if is_hex => vec![Context::new(&SHA256)],
            40 if is_hex => {
                let plain = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
                let mut blob = plain.clone();
                blob.update(format!("blob {size}\0").as_bytes());
                vec![blob, plain]
            }
            _ => Vec::new(),
        };
        Self { expected: etag.to_ascii_lowercase(), sums }
    }

    /// Whether the etag is a checksum at all.
    pub(super) fn is_known(&self) -> bool {
        !self.sums.is_empty()
    }

    /// Adds the next bytes.
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.sums.iter_mut().for_each(|sum| sum.update(bytes));
    }

    /// The checksum that came out, if it is another than that expected.
    pub(super) fn difference(self) -> Option<String> {
        let sums: Vec<_> = self.sums.into_iter().map(|sum| hex(sum.finish().as_ref())).collect();
        if sums.contains(&self.expected) { None } else { sums.into_iter().next() }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // writing to a String does not fail
        text
    })
}
