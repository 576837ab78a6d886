//! The examples, run as a person would run them: as programs, on a tiny checkpoint.
//!
//! `cargo test` builds them; `cargo test --test examples` alone does not, so that it needs
//! `cargo build --examples` before it.

use std::error::Error;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use candle_core::{Device, Tensor};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::{Config, EmbedConfig, GenerationConfig, HybridModel, Message, Thinking};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const TOKENIZER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer/llama");

const CONFIG: &str = r#"{
    "model_type": "mistral", "vocab_size": 371, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256
}"#;

/// A checkpoint of random weights.
fn checkpoint(with_tokenizer: bool) -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut weights = std::collections::HashMap::new();
    for (name, shape) in Config::from_json(CONFIG)?.weights() {
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
        weights.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
    }
    candle_core::safetensors::save(&weights, folder.path().join("model.safetensors"))?;
    fs::write(folder.path().join("config.json"), CONFIG)?;
    if with_tokenizer {
        for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
            fs::copy(format!("{TOKENIZER}/{file}"), folder.path().join(file))?;
        }
    }
    Ok(folder)
}

/// `cargo test` builds the examples into `examples/`, beside the `deps/` that this test is in.
fn example(name: &str) -> Result<PathBuf> {
    let test = std::env::current_exe()?;
    let profile = test.parent().and_then(Path::parent).ok_or("no folder of the profile")?;
    let path = profile.join("examples").join(name).with_extension(std::env::consts::EXE_EXTENSION);
    match path.is_file() {
        true => Ok(path),
        false => Err(format!("{} is missing: cargo build --examples", path.display()).into()),
    }
}

fn run(name: &str, model: &Path, arguments: &[&str], stdin: &str) -> Result<Output> {
    let mut child = Command::new(example(name)?)
        .arg("--model")
        .arg(model)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    // One that ends early does not read.
    child.stdin.take().map(|mut pipe| pipe.write_all(stdin.as_bytes())).transpose().ok();
    Ok(child.wait_with_output()?)
}

/// Standard output and standard error of a run that succeeds.
fn succeed(name: &str, model: &Path, args: &[&str], stdin: &str) -> Result<(String, String)> {
    let output = run(name, model, args, stdin)?;
    let stderr = String::from_utf8(output.stderr)?;
    assert!(output.status.success(), "{stderr}");
    Ok((String::from_utf8(output.stdout)?, stderr))
}

/// Standard error of a run that fails, having printed nothing.
fn fail(name: &str, model: &Path, args: &[&str]) -> Result<String> {
    let output = run(name, model, args, "")?;
    let stderr = String::from_utf8(output.stderr)?;
    assert!(!output.status.success(), "{args:?}");
    assert!(output.stdout.is_empty(), "{args:?}");
    Ok(stderr)
}

fn help(name: &str) -> Result<String> {
    let output = Command::new(example(name)?).arg("--help").output()?;
    assert!(output.status.success() && output.stderr.is_empty(), "{name}");
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn help_lists_every_option() -> Result {
    let shared = ["--model", "--dtype", "--device", "--passes", "--span", "--weight"];
    let sampling = ["--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--seed"];
    let generate = ["--prompt", "--prompt-file", "--ids", "--chat", "--json", "--prompt-logprobs"];
    let chat = ["--system", "--context"];
    let embed = ["--file", "--pooling", "--causal", "--json", "weighted-mean"];
    for (name, options) in [
        ("generate", [&shared[..], &sampling, &generate].concat()),
        ("chat", [&shared[..], &sampling, &chat].concat()),
        ("embed", [&shared[..], &embed].concat()),
    ] {
        let help = help(name)?;
        let words: Vec<&str> =
            help.split(|c: char| c.is_whitespace() || "[],".contains(c)).collect();
        for option in options {
            assert!(words.contains(&option), "{name} {option}: {help}");
        }
    }
    Ok(())
}

// ---- generate ----

#[test]
fn generate_reports_one_json_object_as_the_library_answers() -> Result {
    let folder = checkpoint(true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let thinking = Thinking::passes(2).span(1..3).refine(Interpolate::new(0.3));
    let base = GenerationConfig::default().prompt_logprobs(true);
    for (args, config) in [
        (vec![], base.clone()),
        (
            vec!["--passes=2", "--span=1..3", "--weight=0.3", "--max-tokens=5"],
            base.clone().thinking(thinking).max_tokens(5),
        ),
        (
            vec![
                "--temperature=1.2",
                "--top-k=40",
                "--top-p=0.9",
                "--min-p=0.01",
                "--seed=7",
                "--repetition-penalty=1.1",
                "--stop=zzz",
                "--dtype=f32",
                "--max-tokens=20",
            ],
            base.temperature(1.2)
                .top_k(40)
                .top_p(0.9)
                .min_p(0.01)
                .seed(7)
                .repetition_penalty(1.1)
                .stop("zzz")
                .max_tokens(20),
        ),
    ] {
        let args = [vec!["--ids", "1,2,3", "--json", "--prompt-logprobs"], args].concat();
        let (stdout, _) = succeed("generate", folder.path(), &args, "")?;
        let report: Value = serde_json::from_str(&stdout)?;
        let keys: Vec<&str> =
            report.as_object().ok_or("no object")?.keys().map(String::as_str).collect();
        let mut expected = vec![
            "prompt_ids",
            "ids",
            "text",
            "logprobs",
            "prompt_logprobs",
            "stop",
            "drift",
            "seconds",
        ];
        expected.sort_unstable();
        let mut sorted = keys.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, expected);

        let answer = model.generate([1, 2, 3], &config)?;
        let answer_json = serde_json::json!({
            "prompt_ids": [1, 2, 3], "ids": answer.ids, "text": answer.text,
            "stop": answer.stop, "drift": answer.drift(),
        });
        for (key, value) in answer_json.as_object().ok_or("no object")? {
            assert_eq!(&report[key], value, "{key}");
        }
        let numbers = |key: &str| serde_json::from_value::<Vec<Option<f32>>>(report[key].clone());
        assert_eq!(
            numbers("logprobs")?,
            answer.logprobs.iter().copied().map(Some).collect::<Vec<_>>()
        );
        assert_eq!(Some(numbers("prompt_logprobs")?), answer.prompt_logprobs);
        assert_eq!(report["prompt_logprobs"][0], Value::Null);
        for key in ["load", "think", "prefill", "decode"] {
            assert!(report["seconds"][key].as_f64().is_some_and(|s| s >= 0.0), "{key}");
        }
    }
    Ok(())
}

#[test]
fn generate_prints_the_text_and_nothing_else() -> Result {
    let folder = checkpoint(true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let config = GenerationConfig::default().max_tokens(12);
    let file = folder.path().join("prompt.txt");
    fs::write(&file, "the cat\n")?;
    let path = file.to_str().ok_or("a path that is no text")?;
    let chat = [Message::system("the dog"), Message::user("the cat")];
    for (args, expected) in [
        (vec!["--prompt", "the cat"], model.generate("the cat", &config)?),
        (vec!["--prompt", "--x"], model.generate("--x", &config)?),
        (vec!["--prompt-file", path], model.generate("the cat\n", &config)?),
        (vec!["--chat", "--prompt", "the cat"], model.chat(&chat[1..], &config)?),
        (vec!["--chat", "--system", "the dog", "--prompt", "the cat"], model.chat(&chat, &config)?),
    ] {
        let args = [args, vec!["--max-tokens", "12"]].concat();
        let (stdout, stderr) = succeed("generate", folder.path(), &args, "")?;
        assert_eq!(stdout, format!("{}\n", expected.text), "{args:?}");
        let count = format!("[{} tokens, ", expected.ids.len());
        assert!(stderr.starts_with(&count), "{stderr}");
    }
    Ok(())
}

#[test]
fn generate_works_without_a_tokenizer() -> Result {
    let folder = checkpoint(false)?;
    let args = ["--ids", "1,2,3", "--json", "--max-tokens", "2"];
    let report: Value = serde_json::from_str(&succeed("generate", folder.path(), &args, "")?.0)?;
    assert_eq!(report["text"], Value::Null);
    assert_eq!(report["ids"].as_array().map(Vec::len), Some(2));
    assert_eq!(report["logprobs"].as_array().map(Vec::len), Some(2));
    assert_eq!(report.get("prompt_logprobs"), None, "nobody asked");
    Ok(())
}

#[test]
fn generate_names_the_problem_on_one_line() -> Result {
    let folder = checkpoint(true)?;
    let file = folder.path().join("latin1.txt");
    fs::write(&file, b"caf\xe9")?;
    let file = file.to_str().ok_or("a path that is no text")?;
    let absent = folder.path().join("absent");
    let nowhere = absent.to_str().ok_or("a path that is no text")?;
    let not_utf8 = format!("{file}: not UTF-8 at byte 3");
    let no_file = format!("{nowhere}: No such file or directory");
    for (model, args, expected) in [
        (folder.path(), vec!["--prompt-file", file], not_utf8.as_str()),
        (folder.path(), vec!["--prompt-file", nowhere], &no_file),
        (&absent, vec!["--prompt", "hi"], &no_file),
        (
            folder.path(),
            vec!["--ids", "5,371", "--json"],
            "token id 371 at position 1: expected less than the vocabulary of 371",
        ),
        (
            folder.path(),
            vec!["--ids", "5", "--passes", "1", "--span", "5..2"],
            "parameter span: expected a non-empty range within 0..3, got 5..2",
        ),
        (
            folder.path(),
            vec!["--ids", "5", "--temperature=-1"],
            "parameter temperature: expected at least 0, got -1",
        ),
    ] {
        let stderr = fail("generate", model, &args)?;
        assert!(stderr.starts_with(&format!("error: {expected}")), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
    Ok(())
}

/// These are clap's to refuse: the problem comes first, then how it is used.
#[test]
fn generate_refuses_arguments_that_make_no_sense() -> Result {
    let folder = checkpoint(false)?;
    for (args, expected) in [
        (vec![], "error: the following required arguments were not provided:\n  <--prompt "),
        (
            vec!["--prompt", "a", "--ids", "1"],
            "error: the argument '--prompt <TEXT>' cannot be used with '--ids <1,2,3>'\n",
        ),
        (
            vec!["--prompt", "a", "--prompt", "b"],
            "error: the argument '--prompt <TEXT>' cannot be used multiple times\n",
        ),
        (
            vec!["--ids", "1,x"],
            "error: invalid value 'x' for '--ids <1,2,3>': expected token ids like 1,2,3\n",
        ),
        (
            vec!["--ids", "1", "--span", "5"],
            "error: invalid value '5' for '--span <A..B>': expected two layer numbers like 14..18\n",
        ),
        (
            vec!["--ids", "1", "--prompt-logprobs"],
            "error: the following required arguments were not provided:\n  --json\n",
        ),
    ] {
        let stderr = fail("generate", folder.path(), &args)?;
        assert!(stderr.starts_with(expected), "{stderr}");
    }
    Ok(())
}

// ---- chat ----

/// What the chat knows of a prompt: `[... 12 of 30 prompt tokens known, ...]`.
fn known(stderr: &str) -> Vec<(usize, usize)> {
    let pair = |line: &str| {
        let (counts, _) = line.split_once(" prompt tokens known")?;
        let (known, all) = counts.rsplit_once("; ")?.1.split_once(" of ")?;
        Some((known.parse().ok()?, all.parse().ok()?))
    };
    stderr.lines().filter_map(pair).collect()
}

#[test]
fn chat_answers_each_line_and_reads_only_what_is_new() -> Result {
    let folder = checkpoint(true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let config = GenerationConfig::default().max_tokens(8);
    let mut messages = vec![Message::system("the dog")];
    let mut answers = Vec::new();
    for text in ["the cat", "sat on"] {
        messages.push(Message::user(text));
        let answer = model.chat(&messages, &config)?.text;
        answers.push(answer.trim_start().to_owned());
        messages.push(Message::assistant(answer.trim()));
    }

    let args = ["--system", "the dog", "--max-tokens", "8"];
    let input = "the cat\n\n  sat on \n/reset\nthe cat\n/quit\nnever\n";
    let (stdout, stderr) = succeed("chat", folder.path(), &args, input)?;
    assert_eq!(stdout, format!("{0}\n{1}\n{0}\n", answers[0], answers[1]));
    assert!(stderr.contains("[forgotten]\n"), "{stderr}");
    let [first, second, third] = known(&stderr)[..] else { return Err(stderr.into()) };
    assert_eq!((first.0, third), (0, first));
    assert!(second.0 >= first.1, "the first prompt is known in the second turn: {stderr}");

    // The end of the input is the end of the chat, also within a line.
    let (again, _) = succeed("chat", folder.path(), &args, "the cat\nsat on")?;
    assert_eq!(again, format!("{}\n{}\n", answers[0], answers[1]));
    Ok(())
}

#[test]
fn chat_thinks_and_samples_as_it_is_told() -> Result {
    let folder = checkpoint(true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let config = GenerationConfig::default()
        .max_tokens(8)
        .temperature(1.0)
        .seed(4)
        .thinking(Thinking::passes(2).refine(Interpolate::new(0.5)));
    let expected = model.chat(&[Message::user("the cat")], &config)?.text;
    let args = ["--passes=2", "--weight=0.5", "--temperature=1", "--seed=4", "--max-tokens=8"];
    let (stdout, stderr) = succeed("chat", folder.path(), &args, "the cat\nthe dog\n")?;
    assert_eq!(stdout.lines().next(), Some(expected.trim_start()));
    assert!(known(&stderr).iter().all(|(known, _)| *known == 0), "{stderr}");
    Ok(())
}

#[test]
fn chat_forgets_the_oldest_turns_when_the_context_is_full() -> Result {
    let folder = checkpoint(true)?;
    let args = ["--context", "60", "--max-tokens", "10"];
    let (stdout, stderr) = succeed("chat", folder.path(), &args, &"the cat\n".repeat(5))?;
    assert_eq!(known(&stderr).len(), 5, "{stderr}");
    assert!(!stdout.is_empty());
    assert!(stderr.contains("[the context is full: forgot the oldest "), "{stderr}");
    assert!(known(&stderr).iter().all(|(_, length)| *length <= 50), "{stderr}");

    // A message that is too long by itself changes nothing.
    let long = "the cat sat on the mat ".repeat(30);
    let input = format!("the cat\n{long}\nthe cat\n");
    let (_, stderr) = succeed("chat", folder.path(), &args, &input)?;
    assert!(stderr.contains("leaves no room for an answer in 60 tokens: ignored]"), "{stderr}");
    let [(0, first), (second, _)] = known(&stderr)[..] else { return Err(stderr.into()) };
    assert!(second >= first, "{stderr}");
    Ok(())
}

#[test]
fn chat_needs_a_tokenizer_and_room() -> Result {
    let (with, without) = (checkpoint(true)?, checkpoint(false)?);
    assert_eq!(fail("chat", without.path(), &[])?, "error: the checkpoint has no chat template\n");
    assert_eq!(
        fail("chat", with.path(), &["--context", "0"])?,
        "error: parameter capacity: expected at least one position, got 0\n"
    );
    assert_eq!(
        fail("chat", with.path(), &["--context", "257"])?,
        "error: context full: room for 256 positions, 257 requested\n"
    );
    Ok(())
}

// ---- embed ----

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Embedded {
    vectors: Vec<Vec<f32>>,
    cosine: Vec<Vec<f32>>,
}

#[test]
fn embed_gives_the_librarys_vectors_and_their_cosines() -> Result {
    let folder = checkpoint(true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let texts = ["the cat", "the dog sat on the mat", "the cat", "about"];
    let file = folder.path().join("texts.txt");
    fs::write(&file, format!("{}\n\n{}\r\n", texts[2], texts[3]))?;
    let file = file.to_str().ok_or("a path that is no text")?;
    let bidirectional = EmbedConfig::default();
    let causal = EmbedConfig::default()
        .pooling(hybrid_attention::Pooling::WeightedMean)
        .sight(hybrid_attention::model::Sight::Causal)
        .thinking(Thinking::passes(1));
    let last = EmbedConfig::default().pooling(hybrid_attention::Pooling::LastToken);
    for (args, config) in [
        (vec![], bidirectional),
        (vec!["--pooling=weighted-mean", "--causal", "--passes=1"], causal),
        (vec!["--pooling=last"], last),
    ] {
        let args = [vec!["--json", "--file", file, texts[0], texts[1]], args].concat();
        let (stdout, _) = succeed("embed", folder.path(), &args, "")?;
        let Embedded { vectors, cosine } = serde_json::from_str(&stdout)?;
        assert_eq!(vectors, model.embed(&texts, &config)?.to_vec2::<f32>()?);
        for (a, cosine) in vectors.iter().zip(&cosine) {
            let dot = |b: &Vec<f32>| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
            assert!((dot(a) - 1.0).abs() < 1e-5, "unit length");
            assert_eq!(cosine.len(), texts.len());
            for (b, cosine) in vectors.iter().zip(cosine) {
                assert!((dot(b) - cosine).abs() < 1e-5, "{cosine}");
            }
        }
        assert!((cosine[0][2] - 1.0).abs() < 1e-5, "a text and itself");
        assert!(cosine[0][1] < 0.999, "a text and another");
    }
    Ok(())
}

#[test]
fn embed_prints_an_aligned_table() -> Result {
    let folder = checkpoint(true)?;
    let long = "the dog\nsat on the mat and thought about the café";
    let (stdout, _) = succeed("embed", folder.path(), &["the cat", long], "")?;
    let lines: Vec<&str> = stdout.lines().collect();
    let [head, cat, dog] = lines[..] else { return Err(stdout.into()) };
    assert_eq!(head.split_whitespace().collect::<Vec<_>>(), ["1", "2"]);
    assert!(cat.starts_with("1 the cat  ") && cat.contains(" 1.000 "), "{cat}");
    assert!(dog.starts_with("2 the dog sat on the mat and thou…  "), "{dog}");
    assert!(dog.ends_with(" 1.000"), "{dog}");
    assert!([cat, dog].iter().all(|line| line.chars().count() == head.chars().count()));
    Ok(())
}

#[test]
fn embed_needs_texts_and_a_tokenizer() -> Result {
    let (with, without) = (checkpoint(true)?, checkpoint(false)?);
    let no_texts = "error: no texts: give them as arguments or with --file\n";
    assert_eq!(fail("embed", with.path(), &[])?, no_texts);
    let empty = with.path().join("empty.txt");
    fs::write(&empty, "\n \n")?;
    let empty = empty.to_str().ok_or("a path that is no text")?;
    assert_eq!(fail("embed", with.path(), &["--file", empty])?, no_texts);
    assert_eq!(
        fail("embed", without.path(), &["the cat"])?,
        "error: no tokenizer in this checkpoint: a text prompt needs one; hand in token ids instead\n"
    );
    Ok(())
}

// ---- a real model ----

#[test]
#[allow(clippy::print_stderr, reason = "a skipped test says so")]
fn chat_and_embed_work_on_smollm2() -> Result {
    let Ok(path) = std::env::var("HYBRID_ATTENTION_SMOLLM2") else {
        eprintln!("skipped: HYBRID_ATTENTION_SMOLLM2 is not the path of a .gguf file");
        return Ok(());
    };
    let path = Path::new(&path);
    let input = "What is the capital of France?\nAnd of Italy?\n";
    let (stdout, stderr) = succeed("chat", path, &["--max-tokens", "24"], input)?;
    assert!(stdout.contains("Paris") && stdout.contains("Rome"), "{stdout}");
    // Everything but what follows the last answer's end.
    let [(0, first), (second, all)] = known(&stderr)[..] else { return Err(stderr.into()) };
    assert!(second > first && second < all, "{stderr}");

    let texts = ["a cat sleeps", "a kitten is asleep", "the tax return is due in April"];
    let (stdout, _) = succeed("embed", path, &[&["--json"][..], &texts].concat(), "")?;
    let Embedded { cosine, .. } = serde_json::from_str(&stdout)?;
    assert!(cosine[0][1] > cosine[0][2], "{cosine:?}");
    Ok(())
}
