//! What the hub is asked, and what it answers.

use std::collections::BTreeSet;
use std::io::Read;
use std::time::Duration;

use serde::Deserialize;
use ureq::http::{HeaderMap, Response};
use ureq::{Agent, Body};

use super::name::{Name, is_commit, is_path};
use super::settings::Hub;
use crate::error::{Error, Result};

/// Tries in a row that bring nothing new, before it is given up.
const TRIES: u32 = 5;
/// The wait after the first of them, which doubles with each.
const FIRST_WAIT: Duration = Duration::from_millis(200);

/// Asks one hub.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    /// The header that says who asks.
    authorization: Option<String>,
}

/// A repository at one commit.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) commit: String,
    /// Its files; all of these are names that [`is_path`] has passed.
    pub(super) files: BTreeSet<String>,
}

/// What is known of a file before it is downloaded.
#[derive(Clone, Debug)]
pub(super) struct Remote {
    /// Where the hub has it.
    pub(super) url: String,
    /// Where its content is, which may be elsewhere, and for some minutes only.
    location: String,
    /// Its name among the blobs, and most often its checksum.
    pub(super) etag: String,
    pub(super) size: u64,
}

/// Why a request failed.
#[derive(Debug)]
pub(super) enum Trouble {
    /// It may go better the next time.
    Passing(String),
    Lasting(Error),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Lasting(error)
    }
}

impl Client {
    pub(super) fn new(hub: &Hub) -> Result<Self> {
        let endpoint = hub.url().to_string();
        let refused = |got: &str| Error::parameter("endpoint", "an http or https URL", got);
        if !(endpoint.starts_with("https://") || endpoint.starts_with("http://")) {
            return Err(refused(&format!("{endpoint:?}")));
        }
        let wait = Some(hub.silence());
        let config = Agent::config_builder()
            .user_agent(concat!("hybrid-attention/", env!("CARGO_PKG_VERSION")))
            .https_only(endpoint.starts_with("https://"))
            .http_status_as_error(false)
            .max_redirects(0) // followed here, because the token must not go everywhere
            .timeout_resolve(wait)
            .timeout_connect(wait)
            .timeout_send_request(wait)
            .timeout_recv_response(wait)
            .timeout_per_read(wait);
        let authorization = hub.bearer()?.map(|token| format!("Bearer {token}"));
        Ok(Self { agent: config.build().into(), endpoint, authorization })
    }

    /// The files of a repository at its revision.
    pub(super) fn list(&self, name: &Name) -> Result<Listing> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        const MOST: u64 = 64 << 20;

        let (repo, revision) = (name.repo(), escape(name.revision(), ""));
        let url = format!("{}/api/models/{repo}/revision/{revision}", self.endpoint);
        let bad = |message: String| Error::BadAnswer { url: url.clone(), message };
        let body = retry(&url, || {
            let (_, response) = self.ask(false, &url, name, None)?;
            let mut bytes = Vec::new();
            let mut reader = response.into_body().into_reader().take(MOST + 1);
            reader.read_to_end(&mut bytes).map_err(|error| Trouble::Passing(error.to_string()))?;
            Ok(bytes)
        })?;
        if body.len() as u64 > MOST {
            return Err(bad(format!("a list of files of more than {MOST} bytes")));
        }
        let info: Info = serde_json::from_slice(&body)
            .map_err(|error| bad(format!("no description of a repository: {error}")))?;
        if !is_commit(&info.sha) {
            return Err(bad(format!("sha: expected 40 hexadecimal digits, got {:?}", info.sha)));
        }
        let files: BTreeSet<_> = info.siblings.into_iter().map(|it| it.rfilename).collect();
        if let Some(file) = files.iter().find(|file| !is_path(file)) {
            return Err(bad(format!("a file called {file:?}, which may lead out of the cache")));
        }
        Ok(Listing { commit: info.sha, files })
    }

    /// What there is to know of a file.
    pub(super) fn head(&self, name: &Name, commit: &str, file: &str) -> Result<Remote, Trouble> {
        let (repo, path) = (name.repo(), escape(file, "/"));
        let url = format!("{}/{repo}/resolve/{commit}/{path}", self.endpoint);
        let bad =
            |message: &str| Error::BadAnswer { url: url.clone(), message: message.to_string() };
        let mut first = HeaderMap::new();
        let (location, response) = self.ask(true, &url, name, Some(&mut first))?;

        // A redirection says of its target what that does not know.
        let last = response.headers();
        let header = |headers: &HeaderMap, name: &str| {
            headers.get(name).and_then(|it| it.to_str().ok()).map(str::to_string)
        };
        let etag = header(&first, "x-linked-etag").or_else(|| header(last, "x-linked-etag"));
        let etag = etag.or_else(|| header(last, "etag")).ok_or_else(|| bad("no etag"))?;
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        if !(1..=128).contains(&etag.len()) || !etag.chars().all(is_name) {
            return Err(bad("the etag could not be the name of a file").into());
        }
        let said = header(&first, "x-repo-commit").or_else(|| header(last, "x-repo-commit"));
        if said.is_some_and(|said| said != commit) {
            return Err(bad("it is of another commit than was asked for").into());
        }
        let length = || header(last, "content-length").filter(|_| response.status().is_success());
        let size = header(&first, "x-linked-size").or_else(|| header(last, "x-linked-size"));
        let size = size.or_else(length).and_then(|size| size.parse().ok());
        let size = size.ok_or_else(|| bad("it is not said how large the file is"))?;
        Ok(Remote { url, location, etag, size })
    }

    /// The content of a file from byte `start` on, and whether it begins there or, as servers may choose,
    /// at its beginning.
    pub(super) fn content(
        &self,
        remote: &Remote,
        name: &Name,
        start: u64,
    ) -> Result<(bool, Body), Trouble> {
        let mut url = remote.location.clone();
        for _ in 0..REDIRECTS {
            let mut request = self.agent.get(&url).header("Accept-Encoding", "identity");
            if let Some(it) = self.authorization.as_ref().filter(|_| self.is_hub(&url)) {
                request = request.header("Authorization", it);
            }
            if start > 0 {
                request = request.header("Range", format!("bytes={start}-"));
            }
            let response = request.call().map_err(|error| self.failed(&remote.url, error))?;
            match response.status().as_u16() {
                200 => return Ok((false, response.into_body())),
                206 => {
                    let range =
                        response.headers().get("content-range").and_then(|it| it.to_str().ok());
                    let expected = format!("bytes {start}-");
                    if range.is_none_or(|range| !range.starts_with(&expected)) {
                        let message = format!("expected {expected}, got the range {range:?}");
                        return Err(Error::BadAnswer { url: remote.url.clone(), message }.into());
                    }
                    return Ok((true, response.into_body()));
                }
                // Addresses of contents expire; a new one is asked for.
                403 | 410 if !self.is_hub(&url) => {
                    return Err(Trouble::Passing(format!("HTTP {}", response.status())));
                }
                _ => match target(&url, &response) {
                    Some(to) => url = to,
                    None => return Err(self.refused(&remote.url, name, &response)),
                },
            }
        }
        Err(self.astray(&remote.url))
    }

    /// Asks the hub itself, and returns the last address and its answer. A redirection to elsewhere is an
    /// answer if `head` and not followed, because the hub alone knows what is asked for; the headers of
    /// the first answer are put into `first`.
    fn ask(
        &self,
        head: bool,
        asked: &str,
        name: &Name,
        mut first: Option<&mut HeaderMap>,
    ) -> Result<(String, Response<Body>), Trouble> {
        let mut url = asked.to_string();
        for _ in 0..REDIRECTS {
            let mut request = if head { self.agent.head(&url) } else { self.agent.get(&url) };
            request = request.header("Accept-Encoding", "identity");
            if let Some(it) = self.authorization.as_ref().filter(|_| self.is_hub(&url)) {
                request = request.header("Authorization", it);
            }
            let response = request.call().map_err(|error| self.failed(asked, error))?;
            if let Some(headers) = first.take() {
                headers.clone_from(response.headers());
            }
            if response.status().is_success() {
                return Ok((url, response));
            }
            let Some(to) = target(&url, &response) else {
                return Err(self.refused(asked, name, &response));
            };
            if head && !self.is_hub(&to) {
                return Ok((to, response));
            }
            url = to;
        }
        Err(self.astray(asked))
    }

    /// Whether a URL is of the hub, which may see the token.
    fn is_hub(&self, url: &str) -> bool {
        origin(url).eq_ignore_ascii_case(origin(&self.endpoint))
    }

    fn failed(&self, url: &str, error: ureq::Error) -> Trouble {
        match error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::RequireHttpsOnly(_) => {
                let message = format!("not asked: {error}");
                Error::BadAnswer { url: url.to_string(), message }.into()
            }
            other => Trouble::Passing(other.to_string()),
        }
    }

    fn astray(&self, url: &str) -> Trouble {
        let message = format!("redirected more than {REDIRECTS} times");
        Error::BadAnswer { url: url.to_string(), message }.into()
    }

    /// What an answer means that is none.
    fn refused(&self, url: &str, name: &Name, response: &Response<Body>) -> Trouble {
        let status = response.status().as_u16();
        if matches!(status, 408 | 416 | 429 | 500..=599) {
            return Trouble::Passing(format!("HTTP {}", response.status()));
        }
        let code = response.headers().get("x-error-code").and_then(|code| code.to_str().ok());
        let (repo, page) = (name.repo(), format!("{}/{}", self.endpoint, name.repo()));
        let who = "set HF_TOKEN to a token that may read it, or run `hf auth login`";
        let message = match (status, code) {
            (_, Some("GatedRepo")) | (403, _) => {
                format!("access to {repo} must be asked for on {page}; then {who}")
            }
            (404, Some("RevisionNotFound")) => {
                format!("{repo} has no revision {}", name.revision())
            }
            (404, Some("EntryNotFound")) => format!("{repo} has no such file"),
            (401, _) if self.authorization.is_some() => {
                format!("the token is not accepted, or {repo} does not exist: {who}")
            }
            (401 | 404, _) => format!("{repo} does not exist, or it is private: {who}"),
            _ => "not what the hub should answer".to_string(),
        };
        Error::Refused { url: url.to_string(), status, message }.into()
    }
}

/// Redirections that are followed.
const REDIRECTS: u32 = 10;

/// Tries until there is an answer, or none to be hoped for.
pub(super) fn retry<T>(url: &str, mut ask: impl FnMut() -> Result<T, Trouble>) -> Result<T> {
    let mut patience = Patience::default();
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(trouble) => patience.wait(url, trouble)?,
        }
    }
}

/// Counts tries in a row.
#[derive(Debug, Default)]
pub(super) struct Patience {
    tried: u32,
}

impl Patience {
    /// Something new came: the count begins anew.
    pub(super) fn renew(&mut self) {
        self.tried = 0;
    }

    /// Waits before the next try, or fails if there is none.
    pub(super) fn wait(&mut self, url: &str, trouble: Trouble) -> Result<()> {
        let message = match trouble {
            Trouble::Passing(message) => message,
            Trouble::Lasting(error) => return Err(error),
        };
        self.tried += 1;
        if self.tried >= TRIES {
            let message = format!("given up after {TRIES} tries: {message}");
            return Err(Error::Unreachable { url: url.to_string(), message });
        }
        tracing::debug!(url, message, "tried again");
        std::thread::sleep(FIRST_WAIT * 2_u32.pow(self.tried - 1));
        Ok(())
    }
}

/// Where a redirection leads.
fn target(from: &str, response: &Response<Body>) -> Option<String> {
    if !response.status().is_redirection() {
        return None;
    }
    let to = response.headers().get("location")?.to_str().ok()?;
    Some(if to.starts_with("//") {
        format!("{}:{to}", from.split_once(':')?.0)
    } else if to.starts_with('/') {
        format!("{}{to}", origin(from))
    } else {
        to.to_string()
    })
}

/// Scheme, host and port of a URL.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url.get(host..).and_then(|rest| rest.find(['/', '?', '#']));
    url.get(..end.map_or(url.len(), |end| host + end)).unwrap_or(url)
}

/// `text` as a part of a URL, with these characters left as they are beside letters, digits and `-_.~`.
fn escape(text: &str, left: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        let c = char::from(byte);
        if c.is_ascii_alphanumeric() || "-_.~".contains(c) || left.contains(c) {
            escaped.push(c);
        } else {
            escaped += &format!("%{byte:02X}");
        }
    }
    escaped
}
