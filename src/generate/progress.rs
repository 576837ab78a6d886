//! How far the work before the first token has come.

/// How far the work before the first token has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Progress {
    /// This many of the thought passes are done.
    Think {
        /// Passes done.
        done: usize,
        /// Passes in all.
        total: usize,
    },
    /// This many of the prompt's tokens are in the cache.
    Prefill {
        /// Tokens done.
        done: usize,
        /// Tokens in all.
        total: usize,
    },
}
