//! Downloads, from a server on loopback that speaks the hub's protocol and breaks it in all the ways it
//! can. What a cache must look like is what `huggingface_hub` made of the same repository.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use candle_core::{DType, Device};
use common::hub::{Golden, content, describe, write_reference};
use common::{Result, fixture, logged};
use hybrid_attention::hub::{Fetched, Hub, Pretrained};
use hybrid_attention::{Error, GenerationConfig, HybridModel};
use serde_json::{Value, json};

const TOKEN: &str = "hf_of_the_tests";
const SHARD: &str = "model-00004-of-00009.safetensors";

/// What the server was asked.
#[derive(Clone, Debug)]
struct Request {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
}

impl Request {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    /// The file, if this asks for its content.
    fn content(&self) -> Option<&str> {
        self.path.strip_prefix("/cdn/").filter(|_| self.method == "GET")
    }
}

/// What it answers.
#[derive(Clone, Debug, Default)]
struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Bytes of the body after which the connection is closed.
    cut: Option<usize>,
    /// How long it is held open before.
    stall: Duration,
}

impl Reply {
    fn new(status: u16) -> Self {
        Self { status, ..Self::default() }
    }

    fn header(mut self, name: &'static str, value: impl ToString) -> Self {
        self.headers.retain(|(other, _)| *other != name);
        self.headers.push((name, value.to_string()));
        self
    }

    fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    fn cut(mut self, bytes: usize) -> Self {
        self.cut = Some(bytes);
        self
    }
}

/// A repository as the hub serves it.
#[derive(Clone)]
struct Site {
    repo: String,
    /// The commit of each revision.
    revisions: BTreeMap<String, String>,
    siblings: Vec<String>,
    /// Contents and etags.
    files: BTreeMap<String, (Vec<u8>, String)>,
}

impl Site {
    fn golden() -> Result<Self> {
        let golden = Golden::read()?;
        let mut files = BTreeMap::new();
        for (file, etag) in golden.files()? {
            files.insert(file.clone(), (content(&file)?, etag));
        }
        let decoys = golden.0.get("decoys").and_then(Value::as_array).ok_or("no decoys")?;
        let decoys = decoys.iter().filter_map(Value::as_str).map(str::to_string);
        Ok(Self {
            repo: golden.text("repo")?.to_string(),
            revisions: [("main".to_string(), golden.text("commit")?.to_string())].into(),
            siblings: files.keys().cloned().chain(decoys).collect(),
            files,
        })
    }

    /// A repository of files whose contents do not matter.
    fn of(files: &[&str]) -> Result<Self> {
        let content = |file: &&str| {
            (file.to_string(), (file.as_bytes().to_vec(), file.replace(['/', '.'], "-")))
        };
        let files: BTreeMap<_, _> = files.iter().map(content).collect();
        Ok(Self { siblings: files.keys().cloned().collect(), files, ..Self::golden()? })
    }

    /// What the hub answers. Contents of weights are elsewhere, as its delivery network is.
    fn reply(&self, request: &Request) -> Reply {
        let not_found = |code: &str| Reply::new(404).header("X-Error-Code", code);
        let api = format!("/api/models/{}/revision/", self.repo);
        if let Some(revision) = request.path.strip_prefix(&api) {
            let Some(commit) = self.revisions.get(&revision.replace("%2F", "/")) else {
                return not_found("RevisionNotFound");
            };
            let siblings: Vec<_> =
                self.siblings.iter().map(|it| json!({ "rfilename": it })).collect();
            let info = json!({ "id": self.repo, "sha": commit, "siblings": siblings });
            return Reply::new(200).body(info.to_string());
        }
        if let Some(file) = request.path.strip_prefix("/cdn/") {
            let Some((content, _)) = self.files.get(file) else {
                return not_found("EntryNotFound");
            };
            let etag = Reply::new(200).header("ETag", "\"of-the-network\"");
            let start = request.header("range").and_then(|it| it.strip_prefix("bytes="));
            let start = start.and_then(|it| it.strip_suffix('-')?.parse::<usize>().ok());
            return match start.map(|start| (start, content.get(start..))) {
                None => etag.body(content.clone()),
                Some((start, Some(rest))) if !rest.is_empty() => {
                    let range = format!("bytes {start}-{}/{}", content.len() - 1, content.len());
                    Reply { status: 206, ..etag }.header("Content-Range", range).body(rest)
                }
                Some(_) => Reply::new(416),
            };
        }
        let asked = request.path.strip_prefix(&format!("/{}/resolve/", self.repo));
        let Some((commit, file)) = asked.and_then(|it| it.split_once('/')) else {
            return not_found("RepoNotFound");
        };
        match self.files.get(file) {
            Some((content, etag)) => {
                let host =
                    request.header("host").unwrap_or_default().replace("127.0.0.1", "localhost");
                let reply = Reply::new(302)
                    .header("X-Repo-Commit", commit)
                    .header("X-Linked-Size", content.len())
                    .header("X-Linked-Etag", format!("\"{etag}\""))
                    .header("Location", format!("http://{host}/cdn/{file}"));
                if file.ends_with(".json") {
                    // Small files: the hub itself has them, by way of another address.
                    let etag = format!("W/\"{etag}\"");
                    return Reply::new(307)
                        .header("X-Repo-Commit", commit)
                        .header("X-Linked-Etag", etag)
                        .header("X-Linked-Size", content.len())
                        .header("Location", format!("/cdn/{file}"));
                }
                reply
            }
            None => not_found("EntryNotFound"),
        }
    }
}

type Handler = Box<dyn Fn(&Request) -> Reply + Send + Sync>;

/// A server on loopback, until the process ends.
struct Server {
    url: String,
    asked: Arc<Mutex<Vec<Request>>>,
    cache: tempfile::TempDir,
}

impl Server {
    fn new(reply: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let url = format!("http://{}", listener.local_addr()?);
        let (asked, reply) =
            (Arc::new(Mutex::new(Vec::new())), Arc::new(Box::new(reply) as Handler));
        let log = Arc::clone(&asked);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, reply) = (Arc::clone(&log), Arc::clone(&reply));
                std::thread::spawn(move || answer(stream, &log, &reply));
            }
        });
        Ok(Self { url, asked, cache: tempfile::tempdir()? })
    }

    fn hub(&self) -> Hub {
        Hub::from_vars(|_| None).cache(self.cache.path()).endpoint(&self.url).token(Some(TOKEN))
    }

    fn fetch(&self, model: impl Into<Pretrained>) -> hybrid_attention::Result<PathBuf> {
        model.into().hub(self.hub()).fetch(|_| ())
    }

    /// What was asked since the last time.
    fn asked(&self) -> Result<Vec<Request>> {
        Ok(std::mem::take(&mut *self.asked.lock().map_err(|_| "poisoned")?))
    }

    /// The files whose contents were asked for since the last time, with the range.
    fn contents(&self) -> Result<Vec<(String, Option<String>)>> {
        let asked = self.asked()?.into_iter();
        let content =
            |it: Request| Some((it.content()?.to_string(), it.header("range").map(str::to_string)));
        Ok(asked.filter_map(content).collect())
    }

    /// The ranges in which this content was asked for since the last time.
    fn ranges(&self, file: &str) -> Result<Vec<Option<String>>> {
        let contents = self.contents()?.into_iter();
        Ok(contents.filter(|(it, _)| it == file).map(|(_, range)| range).collect())
    }
}

fn answer(mut stream: TcpStream, log: &Mutex<Vec<Request>>, reply: &Handler) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ').map(str::to_string);
    let (method, path) = (words.next()?, words.next()?);
    let headers = lines.map_while(|line| line.ok().filter(|it| !it.is_empty()));
    let headers = headers.filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_ascii_lowercase(), value.trim().to_string()))
    });
    let request = Request { method, path, headers: headers.collect() };
    let reply = reply(&request);
    log.lock().ok()?.push(request.clone());

    let mut head = format!("HTTP/1.1 {} x\r\nConnection: close\r\n", reply.status);
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    head += &format!("Content-Length: {}\r\n\r\n", reply.body.len());
    stream.write_all(head.as_bytes()).ok()?;
    if request.method != "HEAD" {
        let end = reply.cut.unwrap_or(reply.body.len()).min(reply.body.len());
        stream.write_all(reply.body.get(..end)?).ok()?;
    }
    std::thread::sleep(reply.stall);
    Some(())
}

/// A server that answers like the site, except where `fault` does.
fn faulty(
    fault: impl Fn(&Request, Reply) -> Reply + Send + Sync + 'static,
) -> Result<(Site, Server)> {
    let site = Site::golden()?;
    let right = site.clone();
    Ok((site, Server::new(move |request| fault(request, right.reply(request)))?))
}

/// The cache without its locks, which stay behind empty, and without the reference.
fn cache(server: &Server) -> Result<BTreeMap<String, String>> {
    let mut found = describe(server.cache.path())?;
    found.retain(|path, _| !path.starts_with(".locks/") && !path.contains("/refs/"));
    Ok(found)
}

fn answer_of(model: &HybridModel) -> Result<(Vec<u32>, Vec<f32>)> {
    let answer = model.generate([1, 2, 3], &GenerationConfig::default().max_tokens(8))?;
    Ok((answer.ids, answer.logprobs))
}

#[test]
fn a_download_is_what_huggingface_hub_makes_of_it() -> Result {
    let (site, server) = faulty(|_, reply| reply)?;
    let golden = Golden::read()?;
    let (mut seen, mut total) = (Vec::new(), 0);
    let progress = |Fetched { file, done, total: all, .. }: Fetched<'_>| {
        seen.push((file.to_string(), done));
        assert!(done <= all, "{done} of {all}");
        total = all;
    };
    let path = Pretrained::new(site.repo.as_str()).hub(server.hub()).fetch(progress)?;
    assert_eq!(path, golden.snapshot(server.cache.path())?);
    if cfg!(unix) {
        assert_eq!(cache(&server)?, golden.cache()?);
    }
    let reference = golden.folder(server.cache.path())?.join("refs/main");
    assert_eq!(fs::read_to_string(reference)?, golden.text("commit")?);

    // All bytes of all files, each once, and nothing that is not read.
    assert!(seen.windows(2).all(|pair| pair[0].1 <= pair[1].1), "{seen:?}");
    let bytes: usize = site.files.values().map(|(content, _)| content.len()).sum();
    assert_eq!((seen.last().map(|it| it.1), total), (Some(bytes as u64), bytes as u64));
    let asked = server.asked()?;
    let mut contents: Vec<_> = asked.iter().filter_map(Request::content).collect();
    assert!(
        contents.last().is_some_and(|file| file.ends_with(".safetensors")),
        "weights come last"
    );
    contents.sort_unstable();
    assert_eq!(contents, site.files.keys().collect::<Vec<_>>());
    for request in &asked {
        let of_hub = request.header("host").is_some_and(|host| host.starts_with("127.0.0.1"));
        let token = format!("Bearer {TOKEN}");
        assert_eq!(
            request.header("authorization"),
            of_hub.then_some(token.as_str()),
            "{request:?}"
        );
    }
    assert!(asked.iter().any(|request| request.header("authorization").is_none()));

    // It is there now: nobody is asked.
    let model = Pretrained::new(site.repo.as_str()).hub(server.hub());
    let model = HybridModel::from_pretrained(model, DType::F32, &Device::Cpu)?;
    assert!(server.asked()?.is_empty());
    let here = HybridModel::from_folder(fixture("tied_sharded"), DType::F32, &Device::Cpu)?;
    assert_eq!(answer_of(&model)?, answer_of(&here)?);
    Ok(())
}

#[test]
fn nothing_is_asked_offline() -> Result {
    let (site, server) = faulty(|_, reply| reply)?;
    let model = Pretrained::new(site.repo.as_str()).update(true);
    let error = model.clone().hub(server.hub().offline(true)).fetch(|_| ());
    assert!(
        matches!(&error, Err(Error::NotCached { hint, .. }) if hint.contains("HF_HUB_OFFLINE")),
        "{error:?}"
    );
    assert!(server.asked()?.is_empty());
    server.fetch(site.repo.as_str())?;
    server.asked()?;
    model.hub(server.hub().offline(true)).fetch(|_| ())?;
    assert!(server.asked()?.is_empty());
    Ok(())
}

#[test]
fn a_broken_connection_is_taken_up_where_it_ended() -> Result {
    let times = AtomicUsize::new(0);
    let (site, server) = faulty(move |request, reply| match request.content() {
        Some(SHARD) => match times.fetch_add(1, Ordering::SeqCst) {
            0 => reply.cut(1000),
            1 => reply.cut(0), // brings nothing
            2 => Reply::new(503),
            3 => Reply { stall: Duration::from_secs(5), ..reply.cut(500) },
            _ => reply,
        },
        _ => reply,
    })?;
    let model = Pretrained::new(site.repo.as_str());
    model.hub(server.hub().timeout(Duration::from_millis(400))).fetch(|_| ())?;
    let ranges = server.ranges(SHARD)?;
    let expected = [None, Some("1000"), Some("1000"), Some("1000"), Some("1500")];
    assert_eq!(ranges, expected.map(|start| start.map(|start| format!("bytes={start}-"))));
    if cfg!(unix) {
        assert_eq!(cache(&server)?, Golden::read()?.cache()?);
    }
    Ok(())
}

#[test]
fn what_came_is_kept_for_the_next_try() -> Result {
    let times = AtomicUsize::new(0);
    let (site, server) = faulty(move |request, reply| match request.content() {
        Some(SHARD) => match times.fetch_add(1, Ordering::SeqCst) {
            0 => reply.cut(1000),
            1..5 => reply.cut(0),
            _ => reply,
        },
        _ => reply,
    })?;
    let golden = Golden::read()?;
    let error = server.fetch(site.repo.as_str());
    assert!(
        matches!(&error, Err(Error::Unreachable { url, .. }) if url.ends_with(SHARD)),
        "{error:?}"
    );
    let (_, etag) = site.files.get(SHARD).ok_or("no shard")?;
    let blob = golden.folder(server.cache.path())?.join("blobs").join(etag);
    assert_eq!(fs::metadata(blob.with_extension("incomplete"))?.len(), 1000);
    // Without the hub, it is an incomplete download.
    let offline = Pretrained::new(site.repo.as_str()).hub(server.hub().offline(true)).fetch(|_| ());
    assert!(
        matches!(&offline, Err(Error::IncompleteDownload { missing, .. }) if missing == SHARD),
        "{offline:?}"
    );
    server.asked()?;
    // Another process goes on, and asks for nothing that is here.
    server.fetch(site.repo.as_str())?;
    let contents = server.contents()?;
    assert_eq!(contents.first(), Some(&(SHARD.to_string(), Some("bytes=1000-".to_string()))));
    assert_eq!(contents.len(), 6); // and the five shards after it
    if cfg!(unix) {
        assert_eq!(cache(&server)?, golden.cache()?);
    }
    Ok(())
}

#[test]
fn a_server_without_ranges_will_do() -> Result {
    let times = AtomicUsize::new(0);
    let (site, server) = faulty(move |request, reply| match request.content() {
        Some(SHARD) if times.fetch_add(1, Ordering::SeqCst) == 0 => reply.cut(1000),
        Some(SHARD) => {
            let whole = Site::golden().map(|site| site.files.get(SHARD).cloned());
            Reply::new(200).body(whole.ok().flatten().unwrap_or_default().0)
        }
        _ => reply,
    })?;
    server.fetch(site.repo.as_str())?;
    assert_eq!(server.ranges(SHARD)?, [None, Some("bytes=1000-".to_string())]);
    if cfg!(unix) {
        assert_eq!(cache(&server)?, Golden::read()?.cache()?);
    }
    Ok(())
}

#[test]
fn what_has_another_checksum_is_thrown_away() -> Result {
    for spoiled in [SHARD, "config.json"] {
        let times = AtomicUsize::new(0);
        let (site, server) = faulty(move |request, mut reply| {
            if request.content() == Some(spoiled) && times.fetch_add(1, Ordering::SeqCst) == 0 {
                reply.body[100] ^= 1;
            }
            reply
        })?;
        let (_, etag) = site.files.get(spoiled).ok_or("no file")?;
        match server.fetch(site.repo.as_str()) {
            Err(Error::Checksum { expected, got, url }) => {
                assert_eq!(&expected, etag);
                assert_eq!(got.len(), expected.len());
                assert_ne!(got, expected);
                assert!(url.ends_with(spoiled), "{url}");
            }
            other => return Err(format!("{other:?}").into()),
        }
        let left = describe(server.cache.path())?;
        let of_it = |path: &&String| path.contains(etag.as_str()) && !path.starts_with(".locks");
        assert_eq!(left.keys().find(of_it), None);
        let pointer = Golden::read()?.snapshot(server.cache.path())?.join(spoiled);
        assert!(!pointer.is_symlink() && !pointer.exists());
        // The next try begins anew.
        server.asked()?;
        server.fetch(site.repo.as_str())?;
        assert_eq!(server.ranges(spoiled)?, [None]);
    }
    Ok(())
}

#[test]
fn a_part_of_something_else_is_found_out() -> Result {
    let (site, server) = faulty(|_, reply| reply)?;
    let (content, etag) = site.files.get(SHARD).ok_or("no shard")?;
    let blobs = Golden::read()?.folder(server.cache.path())?.join("blobs");
    fs::create_dir_all(&blobs)?;
    let partial = blobs.join(etag).with_extension("incomplete");
    // As long as the whole, so that nothing would be asked for.
    fs::write(&partial, vec![0; content.len()])?;
    let error = server.fetch(site.repo.as_str());
    assert!(matches!(error, Err(Error::Checksum { .. })), "{error:?}");
    assert!(!partial.exists());
    // Longer than the whole: not a part of it.
    fs::write(&partial, vec![0; content.len() + 1])?;
    server.fetch(site.repo.as_str())?;
    // What was cut short after it got its name is no model, either.
    let pointer = Golden::read()?.snapshot(server.cache.path())?.join(SHARD);
    fs::remove_file(&pointer)?;
    fs::write(blobs.join(etag), &content[..100])?;
    server.asked()?;
    server.fetch(site.repo.as_str())?;
    assert_eq!(server.contents()?, [(SHARD.to_string(), None)]);
    assert_eq!(&fs::read(pointer)?, content);
    Ok(())
}

#[test]
fn sizes_are_kept_to() -> Result {
    for (more, in_vain) in [(10_i64, true), (-10, false)] {
        let (site, server) = faulty(move |request, reply| {
            let size = reply.headers.iter().find(|(name, _)| *name == "X-Linked-Size");
            match size.and_then(|(_, size)| size.parse::<i64>().ok()) {
                Some(size) if request.path.ends_with(SHARD) => {
                    reply.header("X-Linked-Size", size + more)
                }
                _ => reply,
            }
        })?;
        match server.fetch(site.repo.as_str()) {
            Err(Error::Unreachable { .. }) if in_vain => {}
            Err(Error::BadAnswer { message, .. }) if !in_vain => {
                assert!(message.contains("goes on"), "{message}");
            }
            other => return Err(format!("{more}: {other:?}").into()),
        }
    }
    Ok(())
}

#[test]
fn a_refusal_says_what_to_do() -> Result {
    let cases: [(u16, &str, bool, &str); 8] = [
        (401, "", true, "the token is not accepted"),
        (401, "RepoNotFound", false, "does not exist, or it is private: set HF_TOKEN"),
        (401, "GatedRepo", false, "access to org/tied-sharded must be asked for on http"),
        (403, "GatedRepo", true, "access to org/tied-sharded must be asked for on http"),
        (403, "", true, "access to org/tied-sharded must be asked for on http"),
        (404, "RepoNotFound", true, "does not exist, or it is private"),
        (404, "RevisionNotFound", true, "has no revision main"),
        (418, "", true, "not what the hub should answer"),
    ];
    for (status, code, with_token, expected) in cases {
        // Of the list, and of a file alone.
        for part in ["/api/", "/resolve/"] {
            let (site, server) = faulty(move |request, reply| match request.path.contains(part) {
                true => Reply::new(status).header("X-Error-Code", code),
                false => reply,
            })?;
            let hub = server.hub().token(with_token.then_some(TOKEN));
            match Pretrained::new(site.repo.as_str()).hub(hub).fetch(|_| ()) {
                Err(Error::Refused { status: got, message, url }) => {
                    assert_eq!(got, status);
                    assert!(message.contains(expected), "{status} {code}: {message}");
                    assert!(url.contains(part) && url.starts_with(&server.url), "{url}");
                }
                other => return Err(format!("{status} {code}: {other:?}").into()),
            }
            assert_eq!(server.asked()?.iter().filter(|it| it.path.contains(part)).count(), 1);
        }
    }
    Ok(())
}

#[test]
fn tokens_come_from_the_variable_or_the_file() -> Result {
    let home = tempfile::tempdir()?;
    fs::write(home.path().join("token"), "hf_of_the_file\n")?;
    let asks_as = |vars: &[(&str, &str)]| -> Result<Option<String>> {
        let (site, server) = faulty(|_, _| Reply::new(404))?;
        let hub = Hub::from_vars(|name| match name {
            "HF_HOME" => Some(home.path().into()),
            "HF_ENDPOINT" => Some(format!("{}/", server.url).into()),
            _ => vars.iter().find(|(it, _)| *it == name).map(|(_, value)| value.into()),
        });
        let refused = Pretrained::new(site.repo.as_str()).hub(hub).fetch(|_| ());
        assert!(matches!(refused, Err(Error::Refused { status: 404, .. })), "{refused:?}");
        let asked = server.asked()?;
        Ok(asked.first().ok_or("not asked")?.header("authorization").map(str::to_string))
    };
    let bearer = |token: &str| Some(format!("Bearer {token}"));
    assert_eq!(asks_as(&[])?, bearer("hf_of_the_file"));
    assert_eq!(asks_as(&[("HF_TOKEN", " hf_a\n")])?, bearer("hf_a"));
    assert_eq!(asks_as(&[("HUGGING_FACE_HUB_TOKEN", "hf_b")])?, bearer("hf_b"));
    assert_eq!(
        asks_as(&[("HF_TOKEN", "hf_a"), ("HUGGING_FACE_HUB_TOKEN", "hf_b")])?,
        bearer("hf_a")
    );
    assert_eq!(asks_as(&[("HF_TOKEN_PATH", "/nowhere")])?, None);
    assert_eq!(asks_as(&[("HF_TOKEN", "hf_a"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")])?, None);

    let (site, server) = faulty(|_, reply| reply)?;
    for token in ["two words", "line\r\nX-Injected: 1", "naïve"] {
        let hub = server.hub().token(Some(token));
        let error = Pretrained::new(site.repo.as_str()).hub(hub).fetch(|_| ());
        assert!(matches!(error, Err(Error::Parameter { name: "token", .. })), "{error:?}");
        assert!(!error.map_err(|error| error.to_string()).is_err_and(|text| text.contains(token)));
    }
    for endpoint in ["", "ftp://x", "localhost", "http://"] {
        let hub = server.hub().endpoint(endpoint);
        let error = Pretrained::new(site.repo.as_str()).hub(hub).fetch(|_| ());
        assert!(matches!(error, Err(Error::Parameter { name: "endpoint", .. })), "{error:?}");
    }
    for endpoint in ["http://a b", "http://[::"] {
        let hub = server.hub().endpoint(endpoint).timeout(Duration::from_millis(10));
        let error = Pretrained::new(site.repo.as_str()).hub(hub).fetch(|_| ());
        assert!(
            matches!(error, Err(Error::BadAnswer { .. } | Error::Unreachable { .. })),
            "{error:?}"
        );
    }
    assert!(server.asked()?.is_empty());
    Ok(())
}

#[test]
fn other_revisions_are_fetched_and_followed() -> Result {
    let mut site = Site::golden()?;
    let commit = site.revisions.get("main").cloned().ok_or("no main")?;
    let newer = "f".repeat(40);
    site.revisions.insert("refs/pr/1".to_string(), newer.clone());
    site.revisions.insert(commit.clone(), commit.clone());
    let moved = Arc::new(AtomicUsize::new(0));
    let (has_moved, right) = (Arc::clone(&moved), site.clone());
    let server = Server::new(move |request| {
        let mut site = right.clone();
        if has_moved.load(Ordering::SeqCst) > 0 {
            site.revisions.insert("main".to_string(), "e".repeat(40));
        }
        site.reply(request)
    })?;
    let golden = Golden::read()?;
    let folder = golden.folder(server.cache.path())?;
    let snapshot = |commit: &str| folder.join("snapshots").join(commit);

    let path = server.fetch(format!("{}@refs/pr/1", site.repo))?;
    assert_eq!(path, snapshot(&newer));
    assert_eq!(fs::read_to_string(folder.join("refs/refs/pr/1"))?, newer);
    // The same contents at a commit named by itself: linked, not downloaded again.
    server.asked()?;
    assert_eq!(
        server.fetch(Pretrained::new(site.repo.as_str()).revision(&commit))?,
        snapshot(&commit)
    );
    assert_eq!(server.contents()?, []);
    assert!(!folder.join("refs").join(&commit).exists() && !folder.join("refs/main").exists());

    assert_eq!(server.fetch(site.repo.as_str())?, snapshot(&commit));
    moved.store(1, Ordering::SeqCst);
    assert_eq!(server.fetch(site.repo.as_str())?, snapshot(&commit));
    let update = Pretrained::new(site.repo.as_str()).update(true);
    assert_eq!(server.fetch(update)?, snapshot(&"e".repeat(40)));
    assert_eq!(server.fetch(site.repo.as_str())?, snapshot(&"e".repeat(40)));

    let error = server.fetch(format!("{}@v9", site.repo));
    assert!(matches!(error, Err(Error::Refused { status: 404, .. })), "{error:?}");
    Ok(())
}

#[test]
fn a_hub_that_is_away_does_not_take_the_model_along() -> Result {
    let (site, server) = faulty(|_, reply| reply)?;
    let path = server.fetch(site.repo.as_str())?;
    // A port that nobody listens to any more.
    let nobody = format!("http://{}", TcpListener::bind("127.0.0.1:0")?.local_addr()?);
    let model =
        Pretrained::new(site.repo.as_str()).update(true).hub(server.hub().endpoint(&nobody));
    let log = logged(|| {
        assert_eq!(model.fetch(|_| ())?, path);
        Ok(())
    })?;
    assert!(log.iter().any(|line| line.contains("not updated")), "{log:?}");
    let other = Pretrained::new("org/other").hub(server.hub().endpoint(&nobody)).fetch(|_| ());
    assert!(
        matches!(&other, Err(Error::Unreachable { url, .. }) if url.starts_with(&nobody)),
        "{other:?}"
    );
    Ok(())
}

#[test]
fn an_interrupted_update_leaves_the_old_one() -> Result {
    let moved = Arc::new(AtomicUsize::new(0));
    let (has_moved, right) = (Arc::clone(&moved), Site::golden()?);
    let repo = right.repo.clone();
    let server = Server::new(move |request| {
        let mut site = right.clone();
        if has_moved.load(Ordering::SeqCst) > 0 {
            site.revisions.insert("main".to_string(), "e".repeat(40));
            if let Some((content, etag)) = site.files.get_mut(SHARD) {
                (content[9], *etag) = (0, "0".repeat(64)); // whose checksum is another
            }
        }
        site.reply(request)
    })?;
    let path = server.fetch(repo.as_str())?;
    moved.store(1, Ordering::SeqCst);
    let error = server.fetch(Pretrained::new(repo.as_str()).update(true));
    assert!(matches!(error, Err(Error::Checksum { .. })), "{error:?}");
    assert_eq!(server.fetch(repo.as_str())?, path);
    Ok(())
}

#[test]
fn a_hub_cannot_write_elsewhere() -> Result {
    let outside = |server: &Server| -> Result {
        // Nothing but the repository and its locks, and nothing beside the cache.
        for entry in fs::read_dir(server.cache.path())? {
            let name = entry?.file_name();
            assert!(name == ".locks" || name == "models--org--tied-sharded", "{name:?}");
        }
        Ok(())
    };
    for file in [
        "../../x.gguf",
        "/x.gguf",
        "a/../../x.gguf",
        "a\\..\\x.gguf",
        "C:x.gguf",
        "",
        "a\nb",
        "a//b",
    ] {
        let mut site = Site::golden()?;
        site.siblings.push(file.to_string());
        let repo = site.repo.clone();
        let server = Server::new(move |request| site.reply(request))?;
        let error = server.fetch(repo.as_str());
        assert!(matches!(error, Err(Error::BadAnswer { .. })), "{file:?}: {error:?}");
        outside(&server)?;
        assert_eq!(server.asked()?.len(), 1);
    }
    for sha in ["../../../x", "", "main", "0123", "/x"] {
        let mut site = Site::golden()?;
        site.revisions.insert("main".to_string(), sha.to_string());
        let repo = site.repo.clone();
        let server = Server::new(move |request| site.reply(request))?;
        let error = server.fetch(repo.as_str());
        assert!(matches!(error, Err(Error::BadAnswer { .. })), "{sha:?}: {error:?}");
        outside(&server)?;
    }
    for etag in ["../../x", "", "/x", ".", "..", "a.incomplete", "a b"] {
        let mut site = Site::golden()?;
        site.files.get_mut(SHARD).ok_or("no shard")?.1 = etag.to_string();
        let repo = site.repo.clone();
        let server = Server::new(move |request| site.reply(request))?;
        let error = server.fetch(repo.as_str());
        assert!(matches!(error, Err(Error::BadAnswer { .. })), "{etag:?}: {error:?}");
        outside(&server)?;
    }
    // One name for two contents.
    let mut site = Site::golden()?;
    for file in [SHARD, "model-00009-of-00009.safetensors"] {
        site.files.get_mut(file).ok_or("no shard")?.1 = "one".to_string();
    }
    let repo = site.repo.clone();
    let server = Server::new(move |request| site.reply(request))?;
    let error = server.fetch(repo.as_str());
    assert!(matches!(error, Err(Error::BadAnswer { .. })), "{error:?}");

    let index = r#"{"weight_map": {"model.norm.weight": "../../../../x.safetensors"}}"#;
    let mut site = Site::golden()?;
    site.files.insert("model.safetensors.index.json".into(), (index.into(), "index".into()));
    let repo = site.repo.clone();
    let server = Server::new(move |request| site.reply(request))?;
    let error = server.fetch(repo.as_str());
    assert!(matches!(error, Err(Error::Malformed { .. })), "{error:?}");
    outside(&server)
}

#[test]
fn answers_that_are_none() -> Result {
    type Fault = fn(&Request, Reply) -> Reply;
    let cases: [(&str, Fault); 7] = [
        ("no description", |request, reply| match request.path.starts_with("/api/") {
            true => Reply::new(200).body("<html>"),
            false => reply,
        }),
        ("redirected more", |request, _| Reply::new(302).header("Location", request.path.clone())),
        ("not asked", |_, _| Reply::new(302).header("Location", "no:such scheme")),
        ("another commit", |request, reply| match request.path.contains("/resolve/") {
            true => reply.header("X-Repo-Commit", "f".repeat(40)),
            false => reply,
        }),
        ("no etag", |_, mut reply| {
            reply.headers.retain(|(name, _)| !name.to_ascii_lowercase().contains("etag"));
            reply
        }),
        ("how large", |request, reply| match request.path.contains("/resolve/") {
            true => reply.header("X-Linked-Size", "-1"),
            false => reply,
        }),
        ("got the range", |request, reply| match request.content() {
            Some(SHARD) if reply.status == 206 => reply.header("Content-Range", "bytes 7-8/9"),
            Some(SHARD) => reply.cut(1000),
            _ => reply,
        }),
    ];
    for (expected, fault) in cases {
        let (site, server) = faulty(fault)?;
        match server.fetch(site.repo.as_str()) {
            Err(Error::BadAnswer { message, .. }) => {
                assert!(message.contains(expected), "{expected}: {message}");
            }
            other => return Err(format!("{expected}: {other:?}").into()),
        }
    }
    Ok(())
}

#[test]
fn two_at_once_download_once() -> Result {
    let (site, server) = faulty(|request, reply| match request.content() {
        Some(_) => Reply { stall: Duration::from_millis(20), ..reply },
        None => reply,
    })?;
    std::thread::scope(|scope| {
        let fetch = || server.fetch(site.repo.as_str()).map_err(|error| error.to_string());
        let threads = [scope.spawn(fetch), scope.spawn(fetch)];
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err("panicked".to_string()),
        })
    })?;
    let mut contents: Vec<_> = server.contents()?.into_iter().map(|(file, _)| file).collect();
    contents.sort_unstable();
    assert_eq!(contents, site.files.keys().cloned().collect::<Vec<_>>());
    if cfg!(unix) {
        assert_eq!(cache(&server)?, Golden::read()?.cache()?);
    }
    Ok(())
}

#[test]
fn of_other_repositories_only_what_is_read_is_fetched() -> Result {
    let cases: [(&[&str], &str, &[&str], &str); 5] = [
        (
            &[
                "m.Q4_0.gguf",
                "m.Q8_0.gguf",
                "m.Q4_0.jinja",
                "m.Q8_0.jinja",
                "hybrid.json",
                "config.json",
            ],
            ":Q4_0",
            &["hybrid.json", "m.Q4_0.gguf", "m.Q4_0.jinja"],
            "m.Q4_0.gguf",
        ),
        (
            &["Q8/m-00001-of-00002.gguf", "Q8/m-00002-of-00002.gguf", "m.Q4_0.gguf", "README.md"],
            "/Q8/m-00002-of-00002.gguf",
            &["Q8/m-00001-of-00002.gguf", "Q8/m-00002-of-00002.gguf"],
            "Q8/m-00001-of-00002.gguf",
        ),
        (
            &[
                "config.json",
                "model.safetensors",
                "model.safetensors.index.json",
                "model.fp16.safetensors",
                "tf_model.h5",
            ],
            "",
            &["config.json", "model.safetensors"],
            "",
        ),
        (
            &[
                "params.json",
                "consolidated.safetensors",
                "tekken.json",
                "tokenizer.model.v3",
                "x/params.json",
            ],
            "",
            &["consolidated.safetensors", "params.json", "tekken.json"],
            "",
        ),
        (
            &[
                "adapter_config.json",
                "adapter_model.safetensors",
                "adapter_model.bin",
                "1_Dense/model.safetensors",
            ],
            "",
            &["adapter_config.json", "adapter_model.safetensors"],
            "",
        ),
    ];
    for (files, behind, expected, found) in cases {
        let site = Site::of(files)?;
        let repo = site.repo.clone();
        let server = Server::new(move |request| site.reply(request))?;
        let path = server.fetch(format!("{repo}{behind}"))?;
        let snapshot = Golden::read()?.snapshot(server.cache.path())?;
        assert_eq!(path.strip_prefix(snapshot)?, Path::new(found));
        let mut contents: Vec<_> = server.contents()?.into_iter().map(|(file, _)| file).collect();
        contents.sort_unstable();
        assert_eq!(contents, expected);
    }
    // The hub is asked for what the snapshot in the cache lacks, by its own list.
    let site = Site::of(&["m.Q4_0.gguf", "m.Q8_0.gguf"])?;
    let repo = site.repo.clone();
    let server = Server::new(move |request| site.reply(request))?;
    server.fetch(format!("{repo}:Q4_0"))?;
    let both = server.fetch(format!("{repo}:Q8_0"))?;
    assert!(both.ends_with("m.Q8_0.gguf"));
    for (files, is_refused) in [
        (&["config.json", "pytorch_model.bin"][..], |error: &Error| {
            matches!(error, Error::Unsupported { .. })
        }),
        (&["README.md"], |error: &Error| matches!(error, Error::BadAnswer { .. })),
        (&["a.gguf", "b.gguf"], |error: &Error| {
            matches!(error, Error::Parameter { name: "model", .. })
        }),
        (&["model.safetensors"], |error: &Error| matches!(error, Error::BadAnswer { .. })),
    ] as [(&[&str], fn(&Error) -> bool); 4]
    {
        let site = Site::of(files)?;
        let server = Server::new(move |request| site.reply(request))?;
        let error = server.fetch(repo.as_str()).err().ok_or("no error")?;
        assert!(is_refused(&error), "{files:?}: {error:?}");
    }
    Ok(())
}

#[test]
fn a_snapshot_of_another_program_is_completed() -> Result {
    let (site, server) = faulty(|_, reply| reply)?;
    let golden = Golden::read()?;
    // As after `AutoTokenizer.from_pretrained`, say: a commit with one file of it, here itself, not a link.
    let snapshot = golden.snapshot(server.cache.path())?;
    fs::create_dir_all(&snapshot)?;
    fs::write(snapshot.join("config.json"), content("config.json")?)?;
    write_reference(&golden, server.cache.path(), "main")?;
    server.fetch(site.repo.as_str())?;
    assert!(!server.contents()?.iter().any(|(file, _)| file == "config.json"));
    assert!(snapshot.join(SHARD).is_file());
    Ok(())
}
