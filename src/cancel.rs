//! Stopping work in progress.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};

/// A flag, or a point in time, at which work stops with [`Error::Cancelled`]: checked before every layer
/// of every chunk of a pass. A clone is the same flag. The default never stops anything by itself.
///
/// ```
/// use hybrid_attention::{Cancel, Error};
///
/// let cancel = Cancel::default();
/// let elsewhere = cancel.clone(); // another thread's
/// elsewhere.cancel();
/// assert!(matches!(cancel.check(), Err(Error::Cancelled)));
/// ```
#[derive(Clone, Debug, Default)]
pub struct Cancel {
    flag: Arc<AtomicBool>,
    deadline: Option<Instant>,
}

impl Cancel {
    /// A flag that stops by itself once `time` has passed from now; a time too long to be represented
    /// never passes.
    #[must_use]
    pub fn after(time: Duration) -> Self {
        Self { deadline: Instant::now().checked_add(time), ..Self::default() }
    }

    /// The same flag with a deadline.
    #[must_use]
    pub fn by(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// Stops whatever checks this flag.
    pub fn cancel(&self) {
        self.flag.store(true, Ordering::Relaxed);
    }

    /// Whether it has been stopped, or its time is up.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
            || self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// An error if [it is](Self::is_cancelled).
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }
}
