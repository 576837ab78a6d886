//! An empty place in a real PostgreSQL server, where one is given.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, process};

use postgres::{Client, NoTls};

use super::Result;

/// How to connect to the server.
const SERVER: &str = "HYBRID_ATTENTION_POSTGRES";

/// A schema of its own, which is dropped behind it.
pub(crate) struct Schema {
    pub(crate) server: String,
    name: String,
}

impl Schema {
    /// `None` where no server is given, and so says.
    #[allow(clippy::print_stderr, reason = "says that it is skipped")]
    pub(crate) fn empty() -> Result<Option<Self>> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let Ok(server) = env::var(SERVER) else {
            eprintln!("skipped: {SERVER} names no server");
            return Ok(None);
        };
        let name = format!("test_{}_{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let this = Self { server, name };
        // In the schema of all, and by one at a time.
        this.client()?.batch_execute(&format!(
            "BEGIN; SELECT pg_advisory_xact_lock(1); \
             CREATE EXTENSION IF NOT EXISTS vector SCHEMA public; COMMIT; CREATE SCHEMA {}",
            this.name
        ))?;
        Ok(Some(this))
    }

    pub(crate) fn client(&self) -> Result<Client> {
        Ok(Client::connect(&self.server, NoTls)?)
    }

    /// What the store connects with, to the server or to another host.
    pub(crate) fn to(&self) -> String {
        self.through(&self.server)
    }

    pub(crate) fn through(&self, server: &str) -> String {
        format!("{server} options='-c search_path={},public'", self.name)
    }
}

impl Drop for Schema {
    fn drop(&mut self) {
        if let Ok(mut client) = self.client() {
            client.batch_execute(&format!("DROP SCHEMA {} CASCADE", self.name)).ok();
        }
    }
}
