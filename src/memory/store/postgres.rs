//! A store in a PostgreSQL server, searched there by pgvector.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use pgvector::Vector;
use postgres::config::Host;
use postgres::{Client, Config, IsolationLevel, NoTls, Row, Transaction};

use super::{Hit, Record, Search, Store, check, check_width};
use crate::error::{Error, Result};
use crate::memory::note::NoteId;

/// Where nothing else is said, how long a server may take to answer a connection.
const PATIENCE: Duration = Duration::from_secs(10);

/// Notes that are sent in one statement.
const AT_ONCE: usize = 256;

/// The longest vectors of which pgvector's HNSW keeps the numbers; of longer ones it keeps the signs.
const LONGEST_INDEXED: usize = 2000;

/// How many are scored exactly for each that is to be found, of each vector of a query, where there is an index;
/// by signs more. And the least and the most that pgvector looks at.
const SCORED_PER_BEST: usize = 8;
const SCORED_PER_BEST_BY_SIGNS: usize = 64;
const LEAST_SCORED: usize = 100;
const MOST_SCORED: usize = 1000;

const MANIFEST: &str = "manifest";
const WIDTH: &str = "width";

/// Any number that others who lock by numbers are not likely to take.
const LOCK: i64 = 0x6879_6272_6964;

const TABLES: &str = "
    CREATE TABLE hybrid_attention_about (key text PRIMARY KEY, value text NOT NULL);
    CREATE TABLE hybrid_attention_notes (
        id bytea PRIMARY KEY,
        note text NOT NULL,
        time bigint NOT NULL,
        superseded boolean NOT NULL,
        tags jsonb NOT NULL
    );
    CREATE TABLE hybrid_attention_vectors (
        id bytea NOT NULL REFERENCES hybrid_attention_notes ON DELETE CASCADE,
        position integer NOT NULL,
        v vector NOT NULL,
        PRIMARY KEY (id, position)
    );
";

/// A [`Store`] in a PostgreSQL server with pgvector, which several processes may share.
///
/// Three tables, `hybrid_attention_about`, `_notes` and `_vectors`, are in the first schema of the connection's
/// search path: `options='-c search_path=diary,public'` keeps one memory apart from others of the database. Every
/// call is a transaction. A call goes to the server again if the connection was lost since the last one; if it is
/// lost during the call, that is an error, and nothing or, where it was lost at the very end, all of it is done.
///
/// Searches are exact until [`build_index`](Self::build_index). Calls of one store wait for each other: open
/// several for several at once.
///
/// Connections are not encrypted, and `sslmode=require` is refused: use a Unix socket, a network of your own or
/// a tunnel. Tested with PostgreSQL 18 and pgvector 0.8; what else speaks its protocol (YugabyteDB, Citus,
/// CockroachDB) was not tried.
pub struct Postgres {
    place: String,
    config: Config,
    client: Mutex<Option<Client>>,
}

impl fmt::Debug for Postgres {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Postgres").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        let client = self.client.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // As `run` does.
        thread::scope(|scope| scope.spawn(|| drop(client)).join().ok());
    }
}

/// What a search has to know first.
struct Stored {
    width: usize,
    indexed: bool,
}

impl Postgres {
    /// Connects to a server, and makes the tables if they are not there. `to` is a connection string as libpq
    /// reads it: `host=/run/postgresql user=me dbname=notes` or `postgresql://me:secret@host/notes`.
    ///
    /// # Errors
    /// [`Error::Store`] for what is no connection string, a server that is not there, refuses the user or has
    /// no pgvector. None of them says what the password is.
    pub fn connect(to: &str) -> Result<Self> {
        // What is wrong with it may be a part of a password.
        let unread = |_| Error::store("PostgreSQL", "what it is given is no connection string");
        let mut config: Config = to.parse().map_err(unread)?;
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(PATIENCE);
        }
        if config.get_tcp_user_timeout().is_none() {
            config.tcp_user_timeout(3 * PATIENCE);
        }
        let store = Self { place: place(&config), config, client: Mutex::new(None) };
        store.write(|it| {
            // Two that come first at the same time would both make them.
            it.transaction.query("SELECT pg_advisory_xact_lock($1)", &[&LOCK])?;
            let sql = "SELECT to_regtype('vector') IS NULL, to_regclass('hybrid_attention_notes') IS NULL";
            let row = it.transaction.query_one(sql, &[])?;
            if row.try_get(0)? {
                it.transaction.batch_execute("CREATE EXTENSION vector")?;
            }
            if row.try_get(1)? {
                it.transaction.batch_execute(TABLES)?;
            }
            Ok(())
        })?;
        Ok(store)
    }

    /// Builds an index (HNSW, Malkov and Yashunin 2016) of what is in the store and what will be. Searches then
    /// score exactly what it finds near each vector of the query, and may miss some notes; with too few that
    /// have the tags asked for among these, all are searched. Of vectors with more than 2000 numbers it holds
    /// the signs.
    ///
    /// # Errors
    /// [`Error::Store`], also for a store that has had no note yet: the index has to know how long vectors are.
    pub fn build_index(&self) -> Result<()> {
        self.write(|it| {
            let Some(Stored { width, .. }) = it.stored()? else {
                return Err(it
                    .store
                    .failed("an index is built of notes, and there is none yet")
                    .into());
            };
            let operators =
                if width > LONGEST_INDEXED { "bit_hamming_ops" } else { "vector_ip_ops" };
            let indexed = indexed("v", width);
            Ok(it.transaction.batch_execute(&format!(
                "CREATE INDEX IF NOT EXISTS hybrid_attention_nearest ON hybrid_attention_vectors \
                 USING hnsw (({indexed}) {operators})"
            ))?)
        })
    }

    /// Drops the index: searches are exact again.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn drop_index(&self) -> Result<()> {
        let sql = "DROP INDEX IF EXISTS hybrid_attention_nearest";
        self.write(|it| Ok(it.transaction.batch_execute(sql)?))
    }

    fn failed(&self, error: impl fmt::Display) -> Error {
        Error::store(&self.place, error)
    }

    fn write<T: Send>(
        &self,
        work: impl FnOnce(&mut Work<'_, '_>) -> Result<T, Failure> + Send,
    ) -> Result<T> {
        self.run(IsolationLevel::ReadCommitted, work)
    }

    /// As all of it was at one moment.
    fn read<T: Send>(
        &self,
        work: impl FnOnce(&mut Work<'_, '_>) -> Result<T, Failure> + Send,
    ) -> Result<T> {
        self.run(IsolationLevel::RepeatableRead, work)
    }

    /// Runs in one transaction, over the connection there is or a new one.
    fn run<T: Send>(
        &self,
        level: IsolationLevel,
        work: impl FnOnce(&mut Work<'_, '_>) -> Result<T, Failure> + Send,
    ) -> Result<T> {
        let run = || -> Result<T, Failure> {
            let mut held = self.client.lock().unwrap_or_else(PoisonError::into_inner);
            if held.as_mut().is_some_and(|client| client.is_valid(PATIENCE).is_err()) {
                *held = None;
            }
            let client = match held.take() {
                Some(client) => held.insert(client),
                None => held.insert(self.config.connect(NoTls)?),
            };
            let transaction = client.build_transaction().isolation_level(level).start()?;
            let mut inside = Work { store: self, transaction };
            let done = work(&mut inside)?;
            inside.transaction.commit()?;
            Ok(done)
        };
        // The client waits in a runtime of its own, which panics on a thread that is in another one.
        match thread::scope(|scope| scope.spawn(run).join()) {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(Failure::Ours(error))) => Err(error),
            Ok(Err(Failure::Theirs(error))) => Err(self.failed(said(&error))),
            Err(_) => Err(self.failed("an answer that is none of its protocol")),
        }
    }
}

/// What it is to be called in messages: host and database.
fn place(config: &Config) -> String {
    let host = match config.get_hosts().first() {
        Some(Host::Tcp(name)) => name.clone(),
        #[cfg(unix)]
        Some(Host::Unix(path)) => path.display().to_string(),
        None => config.get_hostaddrs().first().map_or_else(String::new, ToString::to_string),
    };
    let port = config.get_ports().first().copied().unwrap_or(5432);
    let database = config.get_dbname().or(config.get_user()).unwrap_or_default();
    format!("PostgreSQL at {host}:{port}/{database}")
}

/// What an error says, with what is behind it.
fn said(error: &postgres::Error) -> String {
    match (error.as_db_error(), std::error::Error::source(error)) {
        (Some(said), _) => said.message().to_owned(),
        (None, Some(source)) => format!("{error}: {source}"),
        (None, None) => error.to_string(),
    }
}

/// What is indexed of a column or a query of this width.
fn indexed(of: &str, width: usize) -> String {
    match width > LONGEST_INDEXED {
        true => format!("binary_quantize({of})::bit({width})"),
        false => format!("{of}::vector({width})"),
    }
}

enum Failure {
    Ours(Error),
    Theirs(postgres::Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Ours(error)
    }
}

impl From<postgres::Error> for Failure {
    fn from(error: postgres::Error) -> Self {
        Self::Theirs(error)
    }
}

/// A transaction.
struct Work<'s, 't> {
    store: &'s Postgres,
    transaction: Transaction<'t>,
}

impl Work<'_, '_> {
    fn about(&mut self, key: &str) -> Result<Option<String>, Failure> {
        let sql = "SELECT value FROM hybrid_attention_about WHERE key = $1";
        let row = self.transaction.query_opt(sql, &[&key])?;
        Ok(row.map(|row| row.try_get(0)).transpose()?)
    }

    /// Writes it if nothing is written yet, and returns what is written.
    fn claim(&mut self, key: &str, value: &str) -> Result<String, Failure> {
        let sql = "INSERT INTO hybrid_attention_about VALUES ($1, $2) ON CONFLICT DO NOTHING";
        self.transaction.execute(sql, &[&key, &value])?;
        Ok(self.about(key)?.ok_or_else(|| self.store.failed("what it has just kept is gone"))?)
    }

    fn stored(&mut self) -> Result<Option<Stored>, Failure> {
        let sql = "SELECT value, to_regclass('hybrid_attention_nearest') IS NOT NULL \
            FROM hybrid_attention_about WHERE key = $1";
        let Some(row) = self.transaction.query_opt(sql, &[&WIDTH])? else { return Ok(None) };
        let width = self.width(row.try_get(0)?)?;
        Ok(Some(Stored { width, indexed: row.try_get(1)? }))
    }

    fn width(&self, written: &str) -> Result<usize> {
        written.parse().map_err(|_| self.store.failed("its vectors have no width"))
    }

    fn put(&mut self, records: &[&Record]) -> Result<(), Failure> {
        let ids: Vec<_> = records.iter().map(|record| record.id.bytes().to_vec()).collect();
        let failed = |error| self.store.failed(error);
        let notes = records.iter().map(serde_json::to_string).collect::<Result<Vec<_>, _>>();
        let tags = records.iter().map(|it| serde_json::to_string(&it.note.tags));
        let tags = tags.collect::<Result<Vec<_>, _>>().map_err(failed)?;
        let notes = notes.map_err(failed)?;
        let times: Vec<_> = records.iter().map(|it| it.note.time.unwrap_or(0)).collect();
        let superseded: Vec<_> = records.iter().map(|it| it.superseded_by.is_some()).collect();
        self.transaction.execute(
            "INSERT INTO hybrid_attention_notes (id, note, time, superseded, tags) \
             SELECT id, note, time, superseded, tags::jsonb FROM \
             unnest($1::bytea[], $2::text[], $3::bigint[], $4::boolean[], $5::text[]) \
             AS new (id, note, time, superseded, tags) \
             ON CONFLICT (id) DO UPDATE SET note = excluded.note, time = excluded.time, \
             superseded = excluded.superseded, tags = excluded.tags",
            &[&ids, &notes, &times, &superseded, &tags],
        )?;
        let sql = "DELETE FROM hybrid_attention_vectors WHERE id = ANY($1)";
        self.transaction.execute(sql, &[&ids])?;
        let (mut of, mut positions, mut vectors) = (Vec::new(), Vec::new(), Vec::new());
        for record in records {
            for (position, vector) in record.vectors.iter().enumerate() {
                of.push(record.id.bytes().to_vec());
                positions.push(position as i32);
                vectors.push(Vector::from(vector.clone()));
            }
        }
        self.transaction.execute(
            "INSERT INTO hybrid_attention_vectors (id, position, v) \
             SELECT * FROM unnest($1::bytea[], $2::integer[], $3::vector[])",
            &[&of, &positions, &vectors],
        )?;
        Ok(())
    }

    /// Notes with their vectors, in the order of their names.
    fn records(&mut self, rows: &[Row]) -> Result<Vec<Record>, Failure> {
        let ids =
            rows.iter().map(|row| row.try_get::<_, Vec<u8>>(0)).collect::<Result<Vec<_>, _>>()?;
        let sql =
            "SELECT id, v FROM hybrid_attention_vectors WHERE id = ANY($1) ORDER BY id, position";
        let mut vectors: BTreeMap<Vec<u8>, Vec<Vec<f32>>> = BTreeMap::new();
        for row in self.transaction.query(sql, &[&ids])? {
            let vector: Vector = row.try_get(1)?;
            vectors.entry(row.try_get(0)?).or_default().push(vector.into());
        }
        rows.iter()
            .zip(ids)
            .map(|(row, id)| {
                let read = serde_json::from_str(row.try_get(1)?);
                let mut record: Record = read.map_err(|error| self.store.failed(error))?;
                let own = vectors.remove(&id);
                record.vectors = own.ok_or_else(|| self.store.failed("a note without vectors"))?;
                Ok(record)
            })
            .collect()
    }

    /// The best of all, or of these.
    fn best_of(
        &mut self,
        search: &Search,
        queries: &[Vector],
        among: Option<&[Vec<u8>]>,
    ) -> Result<Vec<Hit>, Failure> {
        let tags = serde_json::to_string(&search.tags).map_err(|error| self.store.failed(error))?;
        let (weight, half_life, now) =
            search.recency.map_or((0.0, 1.0, 0), |it| (f64::from(it.weight), it.half_life, it.now));
        let best = i64::try_from(search.best).unwrap_or(i64::MAX);
        // Powers of 2 end somewhere, and PostgreSQL takes what is beyond for an error.
        let rows = self.transaction.query(
            "WITH parts AS ( \
                 SELECT note.id, note.time, query.place, max(-(own.v <#> query.v)) AS best \
                 FROM hybrid_attention_notes note JOIN hybrid_attention_vectors own USING (id) \
                 CROSS JOIN unnest($1::vector[]) WITH ORDINALITY AS query (v, place) \
                 WHERE NOT note.superseded AND note.tags @> $2::text::jsonb \
                   AND ($3::bytea[] IS NULL OR note.id = ANY($3)) \
                 GROUP BY note.id, query.place), \
             scored AS ( \
                 SELECT id, ((1 - $4::float8) * avg(best) + $4 * power(2::float8, \
                     -least(greatest($5::bigint::float8 - time, 0) / $6::float8, 1000)))::real AS score \
                 FROM parts GROUP BY id, time) \
             SELECT id, score FROM scored ORDER BY score DESC, id LIMIT $7",
            &[&queries, &tags, &among, &weight, &now, &half_life, &best],
        )?;
        rows.iter()
            .map(|row| Ok(Hit { id: self.id(row.try_get(0)?)?, score: row.try_get(1)? }))
            .collect()
    }

    fn id(&self, bytes: &[u8]) -> Result<NoteId> {
        let bytes = bytes.try_into();
        bytes.map(NoteId::from_bytes).map_err(|_| self.store.failed("a note without a name"))
    }

    /// Notes of which a vector is near one of the query's, by the index.
    fn near(
        &mut self,
        queries: &[Vector],
        width: usize,
        most: usize,
    ) -> Result<Vec<Vec<u8>>, Failure> {
        let sql = "SELECT set_config('hnsw.ef_search', $1, true)";
        self.transaction.query(sql, &[&most.to_string()])?;
        let operator = if width > LONGEST_INDEXED { "<~>" } else { "<#>" };
        let (own, asked) = (indexed("v", width), indexed("query.v", width));
        let sql = format!(
            "SELECT DISTINCT near.id FROM unnest($1::vector[]) AS query (v) CROSS JOIN LATERAL \
             (SELECT id FROM hybrid_attention_vectors ORDER BY {own} {operator} {asked} LIMIT $2) near"
        );
        let rows = self.transaction.query(&sql, &[&queries, &(most as i64)])?;
        Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
    }
}

impl Store for Postgres {
    fn place(&self) -> String {
        self.place.clone()
    }

    fn manifest(&self) -> Result<Option<String>> {
        self.read(|it| it.about(MANIFEST))
    }

    fn claim(&self, manifest: &str) -> Result<String> {
        self.write(|it| it.claim(MANIFEST, manifest))
    }

    fn put(&self, records: &[Record]) -> Result<()> {
        check(records, None)?;
        let Some(width) = records.first().and_then(|it| it.vectors.first()).map(Vec::len) else {
            return Ok(());
        };
        // The last of one name; and all in one order, so that no two writers wait for each other.
        let sorted: BTreeMap<NoteId, &Record> = records.iter().map(|it| (it.id, it)).collect();
        let sorted: Vec<&Record> = sorted.into_values().collect();
        self.write(|it| {
            let written = it.claim(WIDTH, &width.to_string())?;
            check(records, Some(it.width(&written)?))?;
            sorted.chunks(AT_ONCE).try_for_each(|some| it.put(some))
        })
    }

    fn get(&self, id: NoteId) -> Result<Option<Record>> {
        Ok(self.get_many(&[id])?.pop())
    }

    fn get_many(&self, ids: &[NoteId]) -> Result<Vec<Record>> {
        self.read(|it| {
            let names: Vec<_> = ids.iter().map(|id| id.bytes().to_vec()).collect();
            let sql = "SELECT id, note FROM hybrid_attention_notes WHERE id = ANY($1)";
            let rows = it.transaction.query(sql, &[&names])?;
            let found = it.records(&rows)?.into_iter().map(|record| (record.id, record));
            let found: HashMap<NoteId, Record> = found.collect();
            Ok(ids.iter().filter_map(|id| found.get(id).cloned()).collect())
        })
    }

    fn remove(&self, id: NoteId) -> Result<bool> {
        let sql = "DELETE FROM hybrid_attention_notes WHERE id = $1";
        self.write(|it| Ok(it.transaction.execute(sql, &[&id.bytes().as_slice()])? > 0))
    }

    fn nearest(&self, search: &Search) -> Result<Vec<Hit>> {
        self.read(|it| {
            let Some(Stored { width, indexed }) = it.stored()? else { return Ok(Vec::new()) };
            for vector in &search.vectors {
                check_width("query", vector, width)?;
            }
            let queries: Vec<Vector> = search.vectors.iter().cloned().map(Vector::from).collect();
            let of_each =
                if width > LONGEST_INDEXED { SCORED_PER_BEST_BY_SIGNS } else { SCORED_PER_BEST };
            let most = search.best.saturating_mul(of_each).clamp(LEAST_SCORED, MOST_SCORED);
            let mut found = Vec::new();
            if indexed && search.best < most {
                let near = it.near(&queries, width, most)?;
                found = it.best_of(search, &queries, Some(&near))?;
            }
            if found.len() < search.best {
                found = it.best_of(search, &queries, None)?;
            }
            found.retain(|hit| search.min_score.is_none_or(|least| hit.score >= least));
            Ok(found)
        })
    }

    fn len(&self) -> Result<usize> {
        self.read(|it| {
            let sql = "SELECT count(*) FROM hybrid_attention_notes";
            let count: i64 = it.transaction.query_one(sql, &[])?.try_get(0)?;
            Ok(usize::try_from(count).map_err(|error| it.store.failed(error))?)
        })
    }

    fn page(&self, after: Option<NoteId>, most: usize) -> Result<Vec<Record>> {
        self.read(|it| {
            let sql = "SELECT id, note FROM hybrid_attention_notes \
                WHERE $1::bytea IS NULL OR id > $1 ORDER BY id LIMIT $2";
            let after = after.map(|id| id.bytes().to_vec());
            let most = i64::try_from(most).unwrap_or(i64::MAX);
            let rows = it.transaction.query(sql, &[&after, &most])?;
            it.records(&rows)
        })
    }
}
