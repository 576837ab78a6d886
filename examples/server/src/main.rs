//! Answers over HTTP, as they are generated: `POST /generate` with `{"prompt": "...", "passes": 2}`
//! sends one JSON object per line and token. A client that disconnects cancels its answer.
//!
//! ```sh
//! cargo run --release -p hybrid-attention-server
//! curl -N localhost:3000/generate -d '{"prompt": "The coin is in the jar."}' -H 'content-type: application/json'
//! ```

use axum::body::Body;
use axum::extract::{Json, State};
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Router, response::IntoResponse};
use hybrid_attention::candle_core::Device;
use hybrid_attention::{Cancel, HybridModel};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

#[derive(Deserialize)]
struct Request {
    prompt: String,
    /// How many passes to think with; as the checkpoint says, if left out.
    passes: Option<usize>,
    max_tokens: Option<usize>,
}

/// The client that waits for an answer. If it disconnects, it cancels the answer, even in the middle of
/// thinking or of reading the prompt.
struct Client(Cancel);

impl Drop for Client {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// The model is a handle: every handler has its own, and all share the weights.
async fn generate(
    State(model): State<HybridModel>,
    Json(request): Json<Request>,
) -> impl IntoResponse {
    let mut config = model.generation_config().max_tokens(request.max_tokens.unwrap_or(128));
    if let Some(passes) = request.passes {
        config = config.thinking(model.thinking().clone().passes(passes));
    }
    // What can be checked is checked here; the model runs on a thread of its own.
    let stream = match model.stream(request.prompt, &config) {
        Ok(stream) => stream,
        Err(error) => return (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    };
    let (sender, receiver) = mpsc::channel(16);
    let cancel = Cancel::default();
    let stream = stream.cancel(cancel.clone());
    let client = Client(cancel);
    tokio::task::spawn_blocking(move || {
        for token in stream {
            let line = match token {
                Ok(token) => serde_json::json!(token),
                Err(error) => serde_json::json!({ "error": error.to_string() }),
            };
            if sender.blocking_send(Ok::<_, std::io::Error>(format!("{line}\n"))).is_err() {
                break;
            }
        }
    });
    let lines = ReceiverStream::new(receiver).map(move |line| {
        let _here = &client; // dropped with the body
        line
    });
    Body::from_stream(lines).into_response()
}

fn app(model: HybridModel) -> Router {
    Router::new().route("/generate", post(generate)).with_state(model)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = match std::env::args().nth(1) {
        Some(path) => HybridModel::open(path, None, &Device::Cpu)?,
        None => HybridModel::tiny(&Device::Cpu)?,
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    axum::serve(listener, app(model)).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http;
    use http_body_util::BodyExt;
    use hybrid_attention::GenerationConfig;
    use tower::ServiceExt;

    type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

    async fn ask(model: &HybridModel, body: &str) -> Result<(StatusCode, String)> {
        let request = http::Request::post("/generate")
            .header("content-type", "application/json")
            .body(Body::from(body.to_string()))?;
        let response = app(model.clone()).oneshot(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        Ok((status, String::from_utf8(body.to_vec())?))
    }

    #[tokio::test]
    async fn the_lines_are_the_answer() -> Result {
        let model = HybridModel::tiny(&Device::Cpu)?;
        let prompt = "The coin is in the jar. The jar is in the chest.";
        let body = serde_json::json!({ "prompt": prompt, "max_tokens": 4 }).to_string();
        let (status, lines) = ask(&model, &body).await?;
        let ids: Vec<u64> = lines
            .lines()
            .map(|line| {
                Ok(serde_json::from_str::<serde_json::Value>(line)?["id"].as_u64().unwrap_or(0))
            })
            .collect::<Result<_>>()?;
        let config = GenerationConfig::default().max_tokens(4);
        let answer = model.generate(prompt, &config)?;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(ids, answer.ids.iter().map(|id| u64::from(*id)).collect::<Vec<_>>());
        Ok(())
    }

    #[tokio::test]
    async fn what_is_wrong_is_said() -> Result {
        let model = HybridModel::tiny(&Device::Cpu)?;
        let (status, message) = ask(&model, r#"{"prompt": "The coin", "passes": 5000}"#).await?;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert!(message.contains("passes"), "{message}");
        Ok(())
    }
}
