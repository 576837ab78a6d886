//! Where the cache is, where the hub is, and who asks.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::name::Name;

/// The Hugging Face hub and its cache, as the variables of the environment say. They are those of
/// `huggingface_hub`:
///
/// | variable | what it says |
/// |---|---|
/// | `HF_HUB_CACHE`, formerly `HUGGINGFACE_HUB_CACHE` | the cache [default: `hub` in `HF_HOME`] |
/// | `HF_HOME` | where all of this lies [default: `huggingface` in `XDG_CACHE_HOME`, else in `~/.cache`] |
/// | `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE` | 1, on, yes or true: no request is made |
/// | `HF_ENDPOINT` | a mirror [default: `https://huggingface.co`] |
/// | `HF_TOKEN`, formerly `HUGGING_FACE_HUB_TOKEN` | the token; otherwise it is read from the next file |
/// | `HF_TOKEN_PATH` | the file that `hf auth login` writes [default: `token` in `HF_HOME`] |
/// | `HF_HUB_DOWNLOAD_TIMEOUT` | seconds of silence after which a connection counts as broken [default: 10] |
/// | `HF_HUB_DISABLE_IMPLICIT_TOKEN` | 1, on, yes or true: no token is sent that is not set [here](Hub::token) |
///
/// A variable that is empty counts as not set, and `~/` at the beginning of a path is the home folder. Only
/// with the feature `hub` is any request made, and so are the last six looked at.
#[derive(Clone)]
pub struct Hub {
    cache: PathBuf,
    offline: bool,
    endpoint: String,
    token: Token,
    timeout: Duration,
}

/// Who asks. Its value is never shown.
#[derive(Clone)]
#[cfg_attr(not(feature = "hub"), expect(dead_code, reason = "only downloads read it"))]
enum Token {
    None,
    Value(String),
    File(PathBuf),
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = match &self.token {
            Token::None => "none".to_string(),
            Token::Value(_) => "set".to_string(),
            Token::File(path) => format!("in {}", path.display()),
        };
        f.debug_struct("Hub")
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .field("endpoint", &self.endpoint)
            .field("token", &token)
            .field("timeout", &self.timeout)
            .finish()
    }
}

impl Default for Hub {
    fn default() -> Self {
        Self::from_env()
    }
}

impl Hub {
    /// As the environment of this process says.
    #[must_use]
    pub fn from_env() -> Self {
        Self::from_vars(|name| std::env::var_os(name))
    }

    /// As `var` says, which is asked for each variable.
    ///
    /// ```
    /// use std::path::Path;
    /// use hybrid_attention::hub::Hub;
    ///
    /// let hub = Hub::from_vars(|name| (name == "HF_HOME").then(|| "/data/hf".into()));
    /// assert_eq!(hub.cache_folder(), Path::new("/data/hf/hub"));
    /// ```
    #[must_use]
    pub fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Self {
        let var = |name: &str| var(name).filter(|value| !value.is_empty());
        let text = |name: &str| var(name).map(|value| value.to_string_lossy().into_owned());
        let is_on = |name: &str| {
            let value = text(name).unwrap_or_default().to_ascii_lowercase();
            matches!(value.as_str(), "1" | "on" | "yes" | "true")
        };
        let home = var(if cfg!(windows) { "USERPROFILE" } else { "HOME" }).map(PathBuf::from);
        let home = home.or_else(std::env::home_dir).unwrap_or_default();
        let path = |name: &str| {
            let path = PathBuf::from(var(name)?);
            Some(match path.strip_prefix("~") {
                Ok(in_home) => home.join(in_home),
                Err(_) => path,
            })
        };

        let hf_home = path("HF_HOME").unwrap_or_else(|| {
            path("XDG_CACHE_HOME").unwrap_or_else(|| home.join(".cache")).join("huggingface")
        });
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
        let seconds = text("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|it| it.parse().ok());
        let token = if is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            Token::None
        } else if let Some(token) = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")) {
            Token::Value(token)
        } else {
            Token::File(path("HF_TOKEN_PATH").unwrap_or_else(|| hf_home.join("token")))
        };
        Self {
            cache: cache.unwrap_or_else(|| hf_home.join("hub")),
            // The second counts only where the first says nothing.
            offline: match var("HF_HUB_OFFLINE") {
                Some(_) => is_on("HF_HUB_OFFLINE"),
                None => is_on("TRANSFORMERS_OFFLINE"),
            },
            endpoint: String::new(),
            token,
            timeout: Duration::from_secs(seconds.filter(|it| *it > 0).unwrap_or(10)),
        }
        .endpoint(endpoint)
    }

    /// Another cache.
    #[must_use]
    pub fn cache(mut self, folder: impl Into<PathBuf>) -> Self {
        self.cache = folder.into();
        self
    }

    /// Whether to make no request.
    #[must_use]
    pub fn offline(mut self, offline: bool) -> Self {
        self.offline = offline;
        self
    }

    /// Another hub or mirror, by its URL.
    #[must_use]
    pub fn endpoint(mut self, url: impl Into<String>) -> Self {
        self.endpoint = url.into();
        self.endpoint.truncate(self.endpoint.trim_end_matches('/').len());
        self
    }

    /// Another token, or none. It is sent to the [endpoint](Self::endpoint) only, not where that redirects to.
    #[must_use]
    pub fn token(mut self, token: Option<impl Into<String>>) -> Self {
        self.token = token.map_or(Token::None, |token| Token::Value(token.into()));
        self
    }

    /// Another time of silence after which a connection counts as broken.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The folder of the cache, which need not exist.
    #[must_use]
    pub fn cache_folder(&self) -> &Path {
        &self.cache
    }

    /// Whether no request is made.
    #[must_use]
    pub fn is_offline(&self) -> bool {
        self.offline
    }

    /// Whether what is not here can be downloaded.
    pub(super) fn downloads(&self) -> bool {
        cfg!(feature = "hub") && !self.offline
    }

    /// The folder of a model in the cache.
    pub(super) fn folder(&self, name: &Name) -> PathBuf {
        self.cache.join(name.folder())
    }
}

#[cfg(feature = "hub")]
impl Hub {
    pub(super) fn url(&self) -> &str {
        &self.endpoint
    }

    pub(super) fn silence(&self) -> Duration {
        self.timeout
    }

    /// What says who asks; `None` where nobody is logged in.
    ///
    /// # Errors
    /// Of a token that is no token, without showing it, or of a file that cannot be read.
    pub(super) fn bearer(&self) -> crate::error::Result<Option<String>> {
        use crate::error::Error;
        let token = match &self.token {
            Token::None => return Ok(None),
            Token::Value(token) => token.clone(),
            Token::File(path) if path.is_file() => {
                let bytes = crate::load::read_bytes(path, 1 << 16)?;
                String::from_utf8_lossy(&bytes).into_owned()
            }
            Token::File(_) => return Ok(None),
        };
        let token = token.trim();
        if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            let expected = "printable ASCII without spaces";
            return Err(Error::parameter("token", expected, "another character in it"));
        }
        Ok(Some(token.to_string()).filter(|token| !token.is_empty()))
    }
}
