//! A store in a PostgreSQL server: what is particular to it. The contract of all stores is in `notes.rs`.

#![cfg(feature = "pgvector")]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicIsize, AtomicUsize, Ordering};
use std::thread;

use common::Result;
use common::server::Schema;
use hybrid_attention::Error;
use hybrid_attention::memory::store::Search;
use hybrid_attention::memory::{Note, NoteId, Postgres, Record, Store, Volatile};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn record(index: usize, width: usize, rng: &mut ChaCha8Rng) -> Record {
    let text = format!("text {index}");
    let mut vector = || {
        let vector: Vec<f32> = (0..width).map(|_| rng.random_range(-1f32..1.0)).collect();
        let length = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
        vector.into_iter().map(|value| value / length).collect::<Vec<f32>>()
    };
    Record {
        id: NoteId::of(&text),
        text,
        note: Note::default().time(index as i64).tag("half", (index % 2).to_string()),
        superseded_by: None,
        spans: Vec::new(),
        vectors: (0..1 + index % 2).map(|_| vector()).collect(),
    }
}

fn message<T>(result: hybrid_attention::Result<T>) -> Result<(String, String)> {
    match result {
        Err(Error::Store { place, message }) => Ok((place, message)),
        Err(other) => Err(other.into()),
        Ok(_) => Err("it was not refused".into()),
    }
}

/// By numbers, and above 2000 of them by signs.
#[test]
fn an_index_finds_a_note_by_itself_and_scores_as_without_one() -> Result {
    for (width, notes) in [(48, 1500), (2100, 300)] {
        let Some(schema) = Schema::empty()? else { return Ok(()) };
        let (store, plain) = (Postgres::connect(&schema.to())?, Volatile::default());
        message(store.build_index())?;
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let records: Vec<Record> = (0..notes).map(|index| record(index, width, &mut rng)).collect();
        // Built of some, and kept up to date with the rest.
        store.put(&records[..notes / 2])?;
        store.build_index()?;
        store.build_index()?;
        store.put(&records[notes / 2..])?;
        plain.put(&records)?;
        let (mut common, mut asked) = (0, 0);
        for record in records.iter().step_by(50) {
            let search = Search { vectors: record.vectors.clone(), best: 5, ..Search::default() };
            let (found, right) = (store.nearest(&search)?, plain.nearest(&search)?);
            assert_eq!(found.first().map(|hit| hit.id), Some(record.id), "{width}");
            assert_eq!(found.len(), 5);
            for hit in &found {
                let score = right.iter().find(|other| other.id == hit.id).map(|it| it.score);
                assert!(score.is_none_or(|score| (score - hit.score).abs() < 1e-5));
            }
            common += found.iter().filter(|hit| right.iter().any(|it| it.id == hit.id)).count();
            asked += 5;
            // Few of what is near has the tag: then all are searched.
            let mut rare = search.clone();
            rare.tags.insert("half".into(), "no".into());
            assert!(store.nearest(&rare)?.is_empty());
        }
        assert!(common * 10 >= asked * 8, "{width}: {common} of {asked}");
        // It is used: the plan of such a search names it.
        let mut client = schema.client()?;
        let path = schema.to().split_once("search_path=").map(|it| it.1.replace('\'', ""));
        client.batch_execute(&format!("SET search_path = {}", path.ok_or("no path")?))?;
        client.batch_execute("SET enable_seqscan = off")?;
        let (own, operator, asked) = match width {
            48 => (
                "v::vector(48)",
                "<#>",
                "(SELECT v FROM hybrid_attention_vectors LIMIT 1)::vector(48)",
            ),
            _ => (
                "binary_quantize(v)::bit(2100)",
                "<~>",
                "binary_quantize((SELECT v FROM hybrid_attention_vectors LIMIT 1))::bit(2100)",
            ),
        };
        let plan = client.query(
            &format!(
                "EXPLAIN SELECT id FROM hybrid_attention_vectors ORDER BY {own} {operator} {asked} LIMIT 5"
            ),
            &[],
        )?;
        let plan: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
        assert!(plan.join("\n").contains("hybrid_attention_nearest"), "{plan:?}");
        store.drop_index()?;
        let search = Search { vectors: records[7].vectors.clone(), best: 20, ..Search::default() };
        let names = |store: &dyn Store| -> Result<Vec<NoteId>> {
            Ok(store.nearest(&search)?.iter().map(|hit| hit.id).collect())
        };
        assert_eq!(names(&store)?, names(&plain)?);
    }
    Ok(())
}

/// A way to the server that breaks after some bytes were sent, and is not to be had again until it is mended.
struct Way {
    /// Bytes that still go through.
    left: AtomicIsize,
    /// Bytes that went through in all.
    sent: AtomicUsize,
}

impl Way {
    fn to(server: &str, folder: &Path) -> Result<(Arc<Self>, String)> {
        let host =
            server.split(' ').find_map(|word| word.strip_prefix("host=")).ok_or("no host")?;
        let real = Path::new(host).join(".s.PGSQL.5432");
        let listener = UnixListener::bind(folder.join(".s.PGSQL.5432"))?;
        let this = Arc::new(Self { left: AtomicIsize::new(isize::MAX), sent: AtomicUsize::new(0) });
        let way = this.clone();
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if way.left.load(Ordering::SeqCst) <= 0 {
                    continue;
                }
                let Ok(server) = UnixStream::connect(&real) else { continue };
                let (Ok(to_server), Ok(to_client)) = (server.try_clone(), client.try_clone())
                else {
                    continue;
                };
                let one = way.clone();
                thread::spawn(move || one.pass(client, to_server, true));
                let one = way.clone();
                thread::spawn(move || one.pass(server, to_client, false));
            }
        });
        let through = server.replace(host, folder.to_str().ok_or("no UTF-8")?);
        Ok((this, through))
    }

    fn pass(&self, mut from: UnixStream, mut to: UnixStream, counted: bool) {
        let mut bytes = [0; 512];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            let mut whole = true;
            if counted {
                self.sent.fetch_add(count, Ordering::SeqCst);
                whole = self.left.fetch_sub(count as isize, Ordering::SeqCst) > count as isize;
            }
            if !whole || to.write_all(&bytes[..count]).is_err() {
                break;
            }
        }
        from.shutdown(std::net::Shutdown::Both).ok();
        to.shutdown(std::net::Shutdown::Both).ok();
    }
}

#[test]
fn a_server_that_goes_away_in_the_middle_is_named_and_nothing_is_half_written() -> Result {
    let Some(schema) = Schema::empty()? else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let (way, server) = Way::to(&schema.server, folder.path())?;
    let direct = Postgres::connect(&schema.to())?;
    let store = Postgres::connect(&schema.through(&server))?;
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut records: Vec<Record> = (0..300).map(|index| record(index, 4, &mut rng)).collect();
    store.put(&records)?;
    let before = way.sent.load(Ordering::SeqCst);
    store.put(&records)?;
    let whole = way.sent.load(Ordering::SeqCst) - before;
    let (mut failed, mut done) = (0, 0);
    for round in 0..40usize {
        let source = format!("round {round}");
        let old = direct.page(None, 1000)?;
        records.iter_mut().for_each(|record| record.note.source = Some(source.clone()));
        way.left.store((whole * round / 26 + 1) as isize, Ordering::SeqCst);
        let put = store.put(&records);
        let now = direct.page(None, 1000)?;
        let new = now.iter().all(|record| record.note.source.as_ref() == Some(&source));
        assert!(now.len() == 300 && (new || now == old), "round {round}");
        match put {
            Ok(()) => {
                assert!(new);
                done += 1;
            }
            Err(error) => {
                let (place, _) = message(Err::<(), _>(error))?;
                assert!(place.contains(folder.path().to_str().unwrap_or("?")), "{place}");
                // While it is away that goes on.
                message(store.len())?;
                message(store.nearest(&Search::default()))?;
                failed += 1;
            }
        }
        // And when it is back, the store is, too.
        way.left.store(isize::MAX, Ordering::SeqCst);
        assert_eq!(store.len()?, 300);
    }
    assert!(failed > 20 && done > 0, "{failed} {done}");
    Ok(())
}

#[test]
fn a_connection_that_was_ended_since_is_made_again() -> Result {
    let Some(schema) = Schema::empty()? else { return Ok(()) };
    // Other tests have connections, too.
    let name = schema.to().split_once("search_path=").map(|it| it.1.replace([',', '\''], "_"));
    let name = name.ok_or("no name")?;
    let store = Postgres::connect(&format!("{} application_name={name}", schema.to()))?;
    store.claim("a manifest")?;
    let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1";
    assert_eq!(schema.client()?.query(sql, &[&name])?.len(), 1);
    assert_eq!(store.manifest()?.as_deref(), Some("a manifest"));
    Ok(())
}

#[test]
fn stores_of_one_place_share_it() -> Result {
    let Some(schema) = Schema::empty()? else { return Ok(()) };
    // All of them make the tables, or none has to.
    let stores = thread::scope(|scope| {
        let open = || Postgres::connect(&schema.to());
        let opening: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
        opening
            .into_iter()
            .filter_map(|it| it.join().ok())
            .collect::<hybrid_attention::Result<Vec<_>>>()
    })?;
    assert_eq!(stores.len(), 4);
    let errors: Vec<Error> = thread::scope(|scope| {
        let working: Vec<_> = (0u64..)
            .zip(&stores)
            .map(|(number, store)| {
                let own: Vec<Record> = (0..60)
                    .map(|index| record(index, 3, &mut ChaCha8Rng::seed_from_u64(number)))
                    .collect();
                scope.spawn(move || (0..10).try_for_each(|_| store.put(&own)))
            })
            .collect();
        working.into_iter().filter_map(|it| it.join().ok()?.err()).collect()
    });
    assert!(errors.is_empty(), "{errors:?}");
    let first = stores[0].page(None, 100)?;
    assert_eq!(first.len(), 60);
    assert_eq!(stores[3].page(None, 100)?, first);
    // Vectors of another width are refused wherever they come from.
    let other = record(1000, 5, &mut ChaCha8Rng::seed_from_u64(0));
    assert!(matches!(stores[1].put(&[other]), Err(Error::Parameter { .. })));
    Ok(())
}

#[test]
fn no_message_says_the_password() -> Result {
    for to in [
        "host=127.0.0.1 port=1 user=me password=geheim dbname=notes",
        "postgresql://me:geheim@127.0.0.1:1/notes",
        "postgresql://me:ge heim@127.0.0.1:1/notes",
        "host=127.0.0.1 password=x geheim",
        "password='geheim",
        "geheim",
        "",
        "host=127.0.0.1 port=1 sslmode=require password=geheim user=me",
    ] {
        let error = Postgres::connect(to).err().ok_or("it is there")?;
        let said = format!("{error} {error:?}");
        assert!(matches!(error, Error::Store { .. }), "{said}");
        assert!(!said.contains("geheim"), "{said}");
    }
    let Some(schema) = Schema::empty()? else { return Ok(()) };
    let with = format!("{} password=geheim", schema.to());
    let store = Postgres::connect(&with)?;
    assert!(!format!("{store:?} {}", store.place()).contains("geheim"));
    assert!(store.place().starts_with("PostgreSQL at "));
    let with = format!("{} user=nobody_there", with.replace("user=", "application_name="));
    let (_, message) = message(Postgres::connect(&with))?;
    assert!(message.contains("nobody_there") && !message.contains("geheim"), "{message}");
    Ok(())
}

/// A tag with a NUL is no text to PostgreSQL.
#[test]
fn what_it_cannot_keep_is_refused_whole() -> Result {
    let Some(schema) = Schema::empty()? else { return Ok(()) };
    let store = Postgres::connect(&schema.to())?;
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let (fine, mut odd) = (record(0, 2, &mut rng), record(1, 2, &mut rng));
    odd.note = odd.note.tag("a\0", "b");
    message(store.put(&[fine, odd]))?;
    assert!(store.is_empty()?);
    // Longer than any column.
    let long = Record { vectors: vec![vec![1.0; 20_000]], ..record(2, 2, &mut rng) };
    message(store.put(&[long]))?;
    assert!(store.is_empty()?);
    Ok(())
}
