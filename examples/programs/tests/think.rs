//! `hybrid think`, and `examples/thoughts`, which hands its files to other engines.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write, stderr};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use candle_core::{Device, Tensor};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::{GenerationConfig, HybridModel, Prompt, Thinking};
use hybrid_attention_testing::{Result, assert_close, checkpoint, fixture, root};
use serde_json::Value;

fn hybrid() -> Command {
    Command::new(env!("CARGO_BIN_EXE_hybrid-under-test"))
}

/// Standard output and standard error of a run that succeeds.
fn succeed(command: &mut Command) -> Result<(String, String)> {
    let output = command.output()?;
    let stderr = String::from_utf8(output.stderr)?;
    assert!(output.status.success(), "{command:?}: {stderr}");
    Ok((String::from_utf8(output.stdout)?, stderr))
}

fn think(model: &Path, out: &Path, args: &[&str]) -> Result<String> {
    let mut command = hybrid();
    command.args(["think", "--model"]).arg(model).arg("--out").arg(out).args(args);
    let (stdout, stderr) = succeed(&mut command)?;
    assert_eq!(stdout, "");
    Ok(stderr)
}

fn read(path: &Path) -> Result<Tensor> {
    let mut tensors = candle_core::safetensors::load(path, &Device::Cpu)?;
    assert_eq!(tensors.len(), 1);
    Ok(tensors.remove("prompt_embeds").ok_or("no prompt_embeds")?)
}

#[test]
fn think_writes_the_librarys_thoughts() -> Result {
    let (folder, out) = (checkpoint(1.0, true)?, tempfile::tempdir()?);
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let out = out.path().join("thoughts.safetensors");
    let thinking = Thinking::new(2).refine(Interpolate::new(0.3));
    let both = Prompt::default().context("the cat sat on the mat").plain(" the dog");
    for (args, prompt, thinking) in [
        (
            vec![
                "--prompt=the cat sat on the mat",
                "--plain= the dog",
                "--passes=2",
                "--weight=0.3",
            ],
            both,
            thinking.clone(),
        ),
        (vec!["--ids=1,2,3", "--passes=2", "--weight=0.3"], [1, 2, 3].into(), thinking),
        (
            vec!["--prompt=the cat", "--passes=1", "--span=0..2"],
            "the cat".into(),
            Thinking::new(1).span(0..2),
        ),
        (vec!["--prompt=the cat"], "the cat".into(), Thinking::none()),
    ] {
        let said = think(folder.path(), &out, &args)?;
        let config = GenerationConfig::default().thinking(thinking.clone());
        let thoughts = model.think(prompt, &config)?;
        let expected = thoughts.prompt_embeddings()?;
        assert_close(&format!("{args:?}"), &read(&out)?, &expected, 1e-6)?;
        let (tokens, passes) = (expected.dim(0)?, thoughts.trace.passes.len());
        let count = format!("[{tokens} tokens of 16 numbers; {passes} passes, drift ");
        assert!(said.contains(&count), "{said}");
        let note = "note: without --passes these are the plain embeddings";
        assert_eq!(said.contains(note), thinking.is_none(), "{said}");
    }
    Ok(())
}

#[test]
fn think_says_what_it_cannot_write() -> Result {
    let (folder, out) = (checkpoint(1.0, false)?, tempfile::tempdir()?);
    let path = |name: &str| out.path().join(name).display().to_string();
    for (out, more, expected) in [
        (path("a.npy"), vec![], format!("{}: expected a name that ends in .safetensors or .pt", path("a.npy"))),
        (path("no/a.pt"), vec![], format!("{}: its folder does not exist", path("no/a.pt"))),
        (
            path("a.pt"),
            vec!["--span=1..3"],
            "parameter span: expected one that begins at layer 0, for a prompt in embeddings, got 1..3: \
             these thoughts enter layer 1"
                .to_string(),
        ),
        (
            path("a.safetensors"),
            vec!["--hand-off=key-value"],
            "parameter hand_off: expected Refined, for a prompt in embeddings, got KeyValue, which hands \
             over keys and values"
                .to_string(),
        ),
    ] {
        let mut command = hybrid();
        command.args(["think", "--ids=1,2,3", "--passes=2", "--out", &out, "--model"]);
        let output = command.arg(folder.path()).args(more).output()?;
        assert!(!output.status.success() && output.stdout.is_empty(), "{out}");
        assert_eq!(String::from_utf8(output.stderr)?, format!("error: {expected}\n"));
    }
    assert_eq!(fs::read_dir(out.path())?.count(), 0);
    Ok(())
}

/// The parts of a file that `torch.load` reads, checksums and all.
fn parts(file: impl Read + std::io::Seek) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut zip = zip::ZipArchive::new(file)?;
    let mut parts = BTreeMap::new();
    for index in 0..zip.len() {
        let mut part = zip.by_index(index)?;
        let mut content = Vec::new();
        part.read_to_end(&mut content)?;
        assert_eq!(part.data_start().ok_or("nowhere")? % 64, 0);
        parts.insert(part.name()?.into_owned(), content);
    }
    Ok(parts)
}

/// The numbers of such a file.
fn numbers(parts: &BTreeMap<String, Vec<u8>>) -> Result<Vec<f32>> {
    let bytes = parts.get("thoughts/data/0").ok_or("no numbers")?.chunks_exact(4);
    bytes.map(|bytes| Ok(f32::from_le_bytes(bytes.try_into()?))).collect()
}

/// The file that torch has read (`tests/fixtures/thoughts/make.py`) is the one that is written now, up to the
/// rounding of the numbers.
#[test]
fn think_writes_what_torch_has_read() -> Result {
    let fixtures = fixture("thoughts");
    let golden: Value = serde_json::from_str(&fs::read_to_string(fixtures.join("golden.json"))?)?;
    let how = &golden["head_dim"];
    let out = tempfile::tempdir()?;
    let out = out.path().join("thoughts.pt");
    let ids = how["ids"].to_string();
    let args = [
        format!("--ids={}", ids.trim_matches(['[', ']'])),
        format!("--passes={}", how["passes"]),
        format!("--weight={}", how["weight"]),
    ];
    think(&fixture("head_dim"), &out, &args.each_ref().map(String::as_str))?;
    let [mut written, mut read_by_torch] =
        [parts(File::open(out)?)?, parts(File::open(fixtures.join("head_dim.pt"))?)?];
    let expected = read(&fixtures.join("head_dim.safetensors"))?.flatten_all()?;
    for parts in [&written, &read_by_torch] {
        let numbers = Tensor::new(numbers(parts)?, &Device::Cpu)?;
        assert_close("numbers", &numbers, &expected, 1e-6)?;
    }
    for parts in [&mut written, &mut read_by_torch] {
        parts.remove("thoughts/data/0");
    }
    assert_eq!(written, read_by_torch);
    Ok(())
}

/// A Python that can do this, or a message that there is none.
fn python(can: &str) -> Option<PathBuf> {
    const VARIABLE: &str = "HYBRID_ATTENTION_PYTHON";
    let python = std::env::var_os(VARIABLE).map_or_else(|| "python3".into(), PathBuf::from);
    let tried = Command::new(&python).args(["-c", can]).output();
    if tried.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("a test");
    let _ = writeln!(
        stderr(),
        "skipped: {name}: {} cannot '{can}'; {VARIABLE} says where one is that can",
        python.display()
    );
    None
}

fn hand_over(python: &Path, args: &[&str]) -> Result<Value> {
    let mut command = Command::new(python);
    command.arg(root().join("examples/thoughts/hand_over.py")).args(args);
    Ok(serde_json::from_str(&succeed(&mut command)?.0)?)
}

/// A server that answers once, and gives what it was asked: vLLM as its documentation describes it.
fn stand_in(listener: &TcpListener) -> Result<Value> {
    let (stream, _) = listener.accept()?;
    let mut reader = BufReader::new(&stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse()?;
        }
        if line.trim().is_empty() {
            break;
        }
        head.push_str(&line);
    }
    assert!(head.starts_with("POST /v1/completions HTTP/1.1\r\n"), "{head}");
    assert!(head.to_ascii_lowercase().contains("content-type: application/json\r\n"), "{head}");
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let answer = r#"{"choices": [{"index": 0, "text": " blue", "logprobs": {"tokens": [" blue"], "token_logprobs": [-0.5]}, "finish_reason": "length"}]}"#;
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n";
    write!(&stream, "{head}Content-Length: {}\r\n\r\n{answer}", answer.len())?;
    Ok(serde_json::from_slice(&body)?)
}

fn base64(text: &str) -> Result<Vec<u8>> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    assert_eq!(text.len() % 4, 0);
    let mut bytes = Vec::new();
    for four in text.as_bytes().chunks(4) {
        let padding = four.iter().filter(|digit| **digit == b'=').count();
        let mut bits = 0u32;
        for digit in &four[..4 - padding] {
            let value = DIGITS.iter().position(|it| it == digit).ok_or("no digit")?;
            bits = bits << 6 | u32::try_from(value)?;
        }
        bits <<= 6 * padding;
        bytes.extend_from_slice(&bits.to_be_bytes()[1..4 - padding]);
    }
    Ok(bytes)
}

#[test]
fn the_servers_api_gets_what_torch_would_have_saved() -> Result {
    let Some(python) = python("import json, base64, urllib.request") else { return Ok(()) };
    let (folder, out) = (checkpoint(1.0, false)?, tempfile::tempdir()?);
    let path = out.path().join("thoughts.pt");
    think(folder.path(), &path, &["--ids=1,2,3", "--passes=2"])?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/", listener.local_addr()?);
    let server = std::thread::spawn(move || stand_in(&listener).map_err(|error| error.to_string()));
    let path = path.display().to_string();
    let args = ["http", "a/model", &path, "--max-tokens=5", "--url", &url];
    let answer = hand_over(&python, &args)?;
    assert_eq!(answer, serde_json::json!({ "text": " blue", "logprobs": [-0.5] }));
    let asked = server.join().map_err(|_| "the server died")??;
    for (key, value) in [
        ("model", "a/model".into()),
        ("prompt", "".into()),
        ("max_tokens", 5.into()),
        ("temperature", 0.into()),
        ("logprobs", Value::from(0)),
    ] {
        assert_eq!(asked[key], value, "{key}");
    }
    assert_eq!(asked.as_object().map(serde_json::Map::len), Some(6), "{asked}");
    let sent = base64(asked["prompt_embeds"].as_str().ok_or("no embeddings")?)?;
    assert_eq!(sent, fs::read(&path)?);
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let config = GenerationConfig::default().thinking(Thinking::new(2));
    let expected = model.think([1, 2, 3], &config)?.prompt_embeddings()?.flatten_all()?;
    let numbers = numbers(&parts(std::io::Cursor::new(sent))?)?;
    assert_close("sent", &Tensor::new(numbers, &Device::Cpu)?, &expected, 1e-6)
}

/// The same as with the recorded answers, live.
#[test]
fn transformers_takes_over() -> Result {
    let Some(python) = python("import torch, transformers, safetensors") else { return Ok(()) };
    let (model, out) = (fixture("window"), tempfile::tempdir()?);
    let args = ["--ids=1,9,77,30,4,100,64,2,51,8,23", "--passes=2", "--weight=0.4"];
    let mut command = hybrid();
    command.args(["generate", "--json", "--max-tokens=8", "--model"]).arg(&model).args(args);
    let ours: Value = serde_json::from_str(&succeed(&mut command)?.0)?;
    for name in ["thoughts.safetensors", "thoughts.pt"] {
        let path = out.path().join(name);
        think(&model, &path, &args)?;
        let (folder, path) = (model.display().to_string(), path.display().to_string());
        let theirs = hand_over(&python, &["transformers", &folder, &path, "--max-tokens=8"])?;
        assert_eq!(theirs["ids"], ours["ids"], "{name}");
        let logprobs = |of: &Value| serde_json::from_value::<Vec<f32>>(of["logprobs"].clone());
        for (a, b) in logprobs(&theirs)?.into_iter().zip(logprobs(&ours)?) {
            assert!((a - b).abs() < 1e-4, "{name}: {a} {b}");
        }
    }
    Ok(())
}
