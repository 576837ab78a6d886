//! `hybrid`, run as a person would run it, on a checkpoint of random weights.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use hybrid_attention::adapter::{Adapter, AdapterConfig, AdapterScope};
use hybrid_attention::generate::PromptLookup;
use hybrid_attention::model::{Batch, Pass, Sight};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::statistics::{Fingerprint, Generic, Subspace};
use hybrid_attention::steps::{AttentionSteps, CosineSteps, SoftmaxSteps};
use hybrid_attention::thought::{Detail, EncodedBatch, HandOff};
use hybrid_attention::{
    Compute, Config, EmbedConfig, GenerationConfig, HybridModel, Message, Prompt, Thinking,
    WeightType,
};
use hybrid_attention_testing::{CONFIG, Result, smollm2};
use serde_json::Value;
use tempfile::TempDir;

/// A checkpoint of random weights.
fn checkpoint(with_tokenizer: bool) -> Result<TempDir> {
    hybrid_attention_testing::checkpoint(1.0, with_tokenizer)
}

fn hybrid() -> Command {
    Command::new(env!("CARGO_BIN_EXE_hybrid-under-test"))
}

fn run(name: &str, model: &Path, arguments: &[&str], stdin: &str) -> Result<Output> {
    let mut command = hybrid();
    command.arg(name).arg("--model").arg(model).args(arguments);
    hybrid_attention_testing::run(&mut command, stdin)
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
    let output = hybrid().args([name, "--help"]).output()?;
    assert!(output.status.success() && output.stderr.is_empty(), "{name}");
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn help_lists_every_option() -> Result {
    let model =
        ["--model", "--dtype", "--quantize", "--compute", "--device", "--adapter", "--adapter-for"];
    let thinking =
        ["--passes", "--span", "--weight", "--halt-drift", "--hand-off", "--rethink-every"];
    let shared = [&model[..], &thinking].concat();
    let sampling = ["--max-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--seed"];
    let prompt = ["--prompt", "--prompt-file", "--ids", "--chat", "--system", "--chat-template"];
    let candidates =
        ["--candidates", "--keep", "--every", "--score", "--noise", "--key", "--within"];
    let generate =
        ["--json", "--prompt-logprobs", "--kv-cache", "--prompts", "--stop", "--speculate"];
    let chat = ["--system", "--chat-template", "--context", "--kv-cache", "--speculate"];
    let embed = [
        "--file",
        "--pooling",
        "--causal",
        "--both-ways",
        "--instruction",
        "--truncate",
        "--json",
        "--cosine",
        "--out",
        "--batch-tokens",
        "--layer",
        "--generic",
        "--remove",
        "--keep-mean",
        "weighted-mean",
    ];
    let inspect =
        ["--plain", "--max-tokens", "--no-maps", "--attention", "--out", "inspect.html", "--json"];
    let measure = ["--text", "--passages", "--tokens", "--first", "--span", "--json"];
    for (name, options) in [
        ("generate", [&shared[..], &sampling, &prompt, &candidates, &generate].concat()),
        ("chat", [&shared[..], &sampling, &chat].concat()),
        ("embed", [&shared[..], &embed].concat()),
        ("inspect", [&shared[..], &prompt, &candidates, &inspect].concat()),
        ("generic", [&model[..], &["--texts", "--out", "--json", "--layer", "--pooling"]].concat()),
        ("measure", [&model[..], &measure].concat()),
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

#[test]
fn help_is_grouped_and_short_where_it_is_asked_to_be() -> Result {
    for (name, headings) in [
        ("generate", vec!["Model:", "Prompt:", "Thinking:", "Sampling:", "Candidates:", "Answer:"]),
        ("chat", vec!["Model:", "Chat:", "Thinking:", "Sampling:"]),
        ("embed", vec!["Model:", "Texts and vectors:", "Thinking:"]),
        ("inspect", vec!["Model:", "Prompt:", "Thinking:", "Candidates:", "Page:"]),
        ("generic", vec!["Model:", "Texts and vectors:"]),
        ("measure", vec!["Model:", "Passages:"]),
    ] {
        let long = help(name)?;
        for heading in headings {
            assert!(long.lines().any(|line| line == heading), "{name}, {heading} {long}");
        }
        // What is under no heading: how to get help.
        let rest = long.split_once("\nOptions:\n").map_or("", |(_, rest)| rest);
        let rest = rest.split("\n\n").next().unwrap_or_default();
        assert_eq!(rest.matches("--").count(), rest.matches("--help").count(), "{name}: {rest}");

        let output = hybrid().args([name, "-h"]).output()?;
        let short = String::from_utf8(output.stdout)?;
        assert!(output.status.success() && short.lines().count() <= 40, "{name}: {short}");
    }
    Ok(())
}

#[test]
fn the_toy_model_says_that_it_is_one() -> Result {
    let output = hybrid().args(["generate", "--prompt=hello", "--max-tokens=1"]).output()?;
    let stderr = String::from_utf8(output.stderr)?;
    assert!(output.status.success() && stderr.starts_with("note: without --model "), "{stderr}");
    let folder = checkpoint(true)?;
    let (_, stderr) = succeed("generate", folder.path(), &["--prompt=the", "--max-tokens=1"], "")?;
    assert!(!stderr.contains("note: "), "{stderr}");
    Ok(())
}

// ---- generate ----

#[test]
fn generate_reports_one_json_object_as_the_library_answers() -> Result {
    let folder = checkpoint(true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let thinking = Thinking::new(2).span(1..3).refine(Interpolate::new(0.3));
    let base = GenerationConfig::default().prompt_logprobs(true);
    for (args, config) in [
        (vec![], base.clone()),
        (
            vec!["--passes=2", "--span=1..3", "--weight=0.3", "--max-tokens=5"],
            base.clone().thinking(thinking.clone()).max_tokens(5),
        ),
        (
            vec![
                "--passes=2",
                "--span=1..3",
                "--weight=0.3",
                "--max-tokens=5",
                "--rethink-every=2",
            ],
            base.clone().thinking(thinking.rethink_every(2)).max_tokens(5),
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
        // Parsed from text as the report was: numbers may lose their last digit that way.
        let answer_json: Value = serde_json::from_str(&answer_json.to_string())?;
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

/// The answer is the one without guesses, and what is said beside it is how these fared.
#[test]
fn generate_guesses_ahead_as_the_library_does() -> Result {
    let folder = checkpoint(true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let (ids, base) = ([5, 6, 7, 5, 6, 7, 5, 6], GenerationConfig::default().max_tokens(60));
    let lookup = PromptLookup::default;
    for (option, lookup) in [
        ("--speculate", lookup()),
        ("--speculate=3", lookup().tokens(3)),
        ("--speculate=15", lookup().tokens(15)),
    ] {
        let args = ["--ids=5,6,7,5,6,7,5,6", "--max-tokens=60", option];
        let (plain, ahead) =
            (model.generate(ids, &base)?, model.generate(ids, &base.clone().speculate(lookup))?);
        let (stdout, _) =
            succeed("generate", folder.path(), &[&args[..], &["--json"]].concat(), "")?;
        let report: Value = serde_json::from_str(&stdout)?;
        assert_eq!(report["ids"], serde_json::json!(plain.ids));
        assert_eq!(report["speculated"], serde_json::json!(ahead.speculated));
        let (stdout, stderr) = succeed("generate", folder.path(), &args, "")?;
        assert_eq!(stdout, format!("{}\n", plain.text));
        let fared = ahead.speculated.ok_or("nothing was guessed")?;
        let fared = format!(", {} of {} guesses right, stopped by", fared.accepted, fared.drafted);
        assert!(stderr.contains(&fared), "{stderr}");
    }
    let input = "the cat sat on the cat sat on\nthe cat sat on\n";
    let (plain, _) = succeed("chat", folder.path(), &["--max-tokens=30"], input)?;
    let ahead = ["--max-tokens=30", "--speculate=4"];
    let (stdout, stderr) = succeed("chat", folder.path(), &ahead, input)?;
    assert_eq!((stdout, stderr.matches(" guesses right; ").count()), (plain, 2));

    for (args, expected) in [
        (["--ids=1", "--speculate=0"], "parameter speculate: tokens: expected 1 to 15, got 0"),
        (["--ids=1", "--speculate=16"], "parameter speculate: tokens: expected 1 to 15, got 16"),
        (["--ids=1", "--speculate=x"], "invalid value 'x' for '--speculate [<N>]'"),
        (["--prompts=file", "--speculate"], "cannot be used with '--speculate [<N>]'"),
    ] {
        let stderr = fail("generate", folder.path(), &args)?;
        assert!(stderr.contains(expected), "{stderr}");
    }
    Ok(())
}

/// A low-rank adapter that changes the output, as PEFT would have saved it.
fn adapter(folder: &Path) -> Result<Adapter> {
    let how = AdapterConfig::rank(2).target_modules(["q_proj", "v_proj", "down_proj"]);
    let adapter = Adapter::new(&Config::from_json(CONFIG)?, &how, 4, &Device::Cpu)?.trainable()?;
    for variable in adapter.variables()? {
        variable.set(&Tensor::full(0.3f32, variable.shape(), &Device::Cpu)?)?;
    }
    adapter.save(folder)?;
    Ok(Adapter::from_folder(folder, &Device::Cpu)?)
}

#[test]
fn generate_uses_an_adapter_in_the_mind_it_is_for() -> Result {
    let (folder, saved) = (checkpoint(true)?, tempfile::tempdir()?);
    let adapter = adapter(saved.path())?;
    let path = saved.path().to_str().ok_or("no text")?;
    let ids = |args: &[&str]| -> Result<Value> {
        let args = [&["--ids=1,2,3", "--json", "--passes=2", "--max-tokens=6"], args].concat();
        let (stdout, _) = succeed("generate", folder.path(), &args, "")?;
        let report: Value = serde_json::from_str(&stdout)?;
        Ok(serde_json::json!([report["ids"], report["drift"]]))
    };
    let config = GenerationConfig::default().thinking(Thinking::new(2)).max_tokens(6);
    let bare = ids(&[])?;
    for (more, mind) in [
        (None, AdapterScope::Both),
        (Some("--adapter-for=both"), AdapterScope::Both),
        (Some("--adapter-for=thinking"), AdapterScope::Thinking),
        (Some("--adapter-for=decoding"), AdapterScope::Decoding),
    ] {
        let args: Vec<&str> = ["--adapter", path].into_iter().chain(more).collect();
        let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
        let answer = model.with_adapter(&adapter, mind)?.generate([1, 2, 3], &config)?;
        let expected = serde_json::json!([answer.ids, answer.drift()]);
        assert_eq!(ids(&args)?, expected, "{mind:?}");
        assert_ne!(expected, bare, "{mind:?}");
    }
    let stderr = fail("generate", folder.path(), &["--ids=1", "--adapter=nowhere"])?;
    assert!(stderr.contains("nowhere"), "{stderr}");
    let stderr = fail("generate", folder.path(), &["--ids=1", "--adapter-for=thinking"])?;
    assert!(stderr.contains("--adapter <PATH>"), "{stderr}");
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
fn generate_says_what_weights_are_kept_as() -> Result {
    let folder = checkpoint(true)?;
    for (args, kept) in [
        (vec![], WeightType::Stored),
        (vec!["--dtype=auto"], WeightType::Stored),
        (vec!["--dtype=f32"], DType::F32.into()),
        (vec!["--dtype=bf16"], DType::BF16.into()),
        (vec!["--dtype=f16"], DType::F16.into()),
        (vec!["--quantize=q8_0"], GgmlDType::Q8_0.into()),
        (vec!["--quantize=q6_k"], GgmlDType::Q6K.into()),
        (vec!["--quantize=q5_k"], GgmlDType::Q5K.into()),
        (vec!["--quantize=q4_k"], GgmlDType::Q4K.into()),
        (vec!["--quantize=q3_k"], GgmlDType::Q3K.into()),
        (vec!["--quantize=q2_k"], GgmlDType::Q2K.into()),
        (vec!["--quantize=q5_1"], GgmlDType::Q5_1.into()),
        (vec!["--quantize=q5_0"], GgmlDType::Q5_0.into()),
        (vec!["--quantize=q4_1"], GgmlDType::Q4_1.into()),
        (vec!["--quantize=q4_0"], GgmlDType::Q4_0.into()),
    ] {
        let model = HybridModel::from_folder(folder.path(), kept, &Device::Cpu)?;
        let config = GenerationConfig::default().max_tokens(4);
        let expected = model.generate("the cat", &config)?.text;
        let all = [vec!["--prompt=the cat", "--max-tokens=4"], args.clone()].concat();
        let (stdout, stderr) = succeed("generate", folder.path(), &all, "")?;
        assert_eq!(stdout, format!("{expected}\n"), "{args:?}");
        for kept in model.transformer().weight_bytes().into_keys() {
            let said =
                stderr.contains(&format!("B {kept} +")) || stderr.contains(&format!("B {kept},"));
            assert!(said, "{args:?}: {kept} is not in {stderr}");
        }
    }
    let args = ["--prompt=hi", "--dtype=bf16", "--quantize=q8_0"];
    assert!(fail("generate", folder.path(), &args)?.contains("cannot be used with"));
    Ok(())
}

#[test]
fn generate_and_chat_keep_keys_and_values_as_they_are_told() -> Result {
    let folder = checkpoint(true)?;
    let config = GenerationConfig::default().max_tokens(8).prompt_logprobs(true);
    let mut seen = Vec::new();
    for (name, dtype) in [("f32", DType::F32), ("bf16", DType::BF16), ("f16", DType::F16)] {
        let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
        let model = model.with_cache_dtype(dtype)?;
        let answer = model.generate([1, 2, 3, 4, 5], &config)?;
        let option = format!("--kv-cache={name}");
        let args = ["--ids=1,2,3,4,5", "--max-tokens=8", "--json", "--prompt-logprobs", &option];
        let (stdout, _) = succeed("generate", folder.path(), &args, "")?;
        let report: Value = serde_json::from_str(&stdout)?;
        for (key, expected) in [
            ("ids", serde_json::json!(answer.ids)),
            ("logprobs", serde_json::json!(answer.logprobs)),
            ("prompt_logprobs", serde_json::json!(answer.prompt_logprobs)),
        ] {
            assert_eq!(report[key], expected, "{name}: {key}");
        }
        assert!(!seen.contains(&report["prompt_logprobs"]), "{name} changes nothing");
        seen.push(report["prompt_logprobs"].clone());

        let answer = model.chat(&[Message::user("the cat")], &config)?;
        let (stdout, _) =
            succeed("chat", folder.path(), &["--max-tokens=8", &option], "the cat\n")?;
        assert_eq!(stdout, format!("{}\n", answer.text.trim_start()), "{name}");
    }
    let args = ["--ids=1,2,3,4,5", "--max-tokens=8", "--json", "--prompt-logprobs"];
    let (stdout, _) = succeed("generate", folder.path(), &args, "")?;
    let report: Value = serde_json::from_str(&stdout)?;
    assert_eq!(Some(&report["prompt_logprobs"]), seen.first()); // f32 is the default
    for name in ["generate", "chat"] {
        let stderr = fail(name, folder.path(), &["--kv-cache=q8_0"])?;
        assert!(stderr.contains("possible values: f32, bf16, f16"), "{stderr}");
    }
    Ok(())
}

#[test]
fn generate_computes_as_exactly_as_it_is_told() -> Result {
    let folder = checkpoint(true)?;
    let config = GenerationConfig::default().max_tokens(2).prompt_logprobs(true);
    let ids: Vec<u32> = (0..30).map(|at| 1 + at % 7).collect(); // many rows
    let listed = ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    let exact = HybridModel::from_folder(folder.path(), DType::BF16, &Device::Cpu)?;
    for (args, compute) in [
        (vec![], Compute::Exact),
        (vec!["--compute=exact"], Compute::Exact),
        (vec!["--compute=fast"], Compute::Fast),
    ] {
        let answer = exact.with_compute(compute)?.generate(ids.as_slice(), &config)?;
        let all =
            ["--dtype=bf16", "--ids", &listed, "--max-tokens=2", "--json", "--prompt-logprobs"];
        let (stdout, _) = succeed("generate", folder.path(), &[&all[..], &args].concat(), "")?;
        let report: Value = serde_json::from_str(&stdout)?;
        for (key, expected) in [
            ("ids", serde_json::json!(answer.ids)),
            ("logprobs", serde_json::json!(answer.logprobs)),
            ("prompt_logprobs", serde_json::json!(answer.prompt_logprobs)),
        ] {
            assert_eq!(report[key], expected, "{args:?}: {key}");
        }
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

/// Without the timings.
fn untimed(line: &str) -> Result<Value> {
    let mut report: Value = serde_json::from_str(line)?;
    report["seconds"].take();
    Ok(report)
}

#[test]
fn generate_answers_each_line_of_a_file_as_it_would_alone() -> Result {
    let folder = checkpoint(true)?;
    let file = folder.path().join("prompts.txt");
    let lines = ["the cat", "the dog sat on the mat", "about"];
    fs::write(&file, format!("{}\n\n{}\r\n  \n{}\n", lines[0], lines[1], lines[2]))?;
    let file = format!("--prompts={}", file.display());
    for more in [
        vec!["--max-tokens=5"],
        vec!["--max-tokens=5", "--json", "--prompt-logprobs", "--passes=2", "--weight=0.3"],
        vec!["--max-tokens=5", "--temperature=1.3", "--seed=3"],
        vec!["--max-tokens=5", "--chat", "--system=the dog"],
    ] {
        let all = [&[file.as_str()], &more[..]].concat();
        let (stdout, _) = succeed("generate", folder.path(), &all, "")?;
        assert_eq!(stdout.lines().count(), lines.len(), "{stdout}");
        for (line, prompt) in stdout.lines().zip(lines) {
            let alone = [&more[..], &["--prompt", prompt]].concat();
            let json = ["--json"].into_iter().filter(|it| !more.contains(it));
            let alone: Vec<&str> = alone.into_iter().chain(json).collect();
            let (expected, _) = succeed("generate", folder.path(), &alone, "")?;
            assert_eq!(untimed(line)?, untimed(&expected)?, "{prompt}: {more:?}");
        }
    }
    let empty = folder.path().join("empty.txt");
    fs::write(&empty, " \n\n")?;
    let stderr = fail("generate", folder.path(), &[&format!("--prompts={}", empty.display())])?;
    assert_eq!(stderr, format!("error: {}: no prompts\n", empty.display()));
    let stderr = fail("generate", folder.path(), &[&file, "--prompt=the"])?;
    assert!(stderr.contains("cannot be used with"), "{stderr}");

    // A problem with one prompt shows on its line and does not affect the others.
    let long = folder.path().join("long.txt");
    fs::write(&long, format!("the cat\n\n{}\n", "the cat sat ".repeat(200)))?;
    let long = format!("--prompts={}", long.display());
    let output = run("generate", folder.path(), &[&long, "--max-tokens=2"], "")?;
    let stderr = String::from_utf8(output.stderr)?;
    assert!(
        !output.status.success() && stderr.starts_with("error: --prompts: line 3: "),
        "{stderr}"
    );
    let lines = String::from_utf8(output.stdout)?;
    let lines: Vec<Value> =
        lines.lines().map(serde_json::from_str).collect::<std::result::Result<_, _>>()?;
    let [answered, refused] = lines.as_slice() else { return Err(format!("{lines:?}").into()) };
    assert!(answered["text"].is_string(), "{answered}");
    let problem = refused["error"].as_str().ok_or("no error")?;
    assert_eq!(stderr, format!("error: --prompts: line 3: {problem}\n"));
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

/// These are for clap to refuse: the problem comes first, then the usage.
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

    // Through a pipe a line may be of any length, and what begins with a slash may be said.
    let long = "the cat sat on the mat ".repeat(200);
    let input = format!("{long}\n/etc/passwd\n/what\n//what\n");
    let (_, stderr) = succeed("chat", folder.path(), &["--max-tokens=1"], &input)?;
    assert!(long.len() > 4095 && stderr.contains("[/what is not a command: "), "{stderr}");
    let lengths = |messages: &[Message]| -> Result<usize> {
        Ok(model.tokenizer().ok_or("no tokenizer")?.encode_chat(messages, true)?.len())
    };
    let ignored = "[this message leaves no room for an answer in 256 tokens: ignored]";
    assert!(lengths(&[Message::user(long.trim())])? > 256 && stderr.contains(ignored), "{stderr}");
    let [(0, first), (_, _)] = known(&stderr)[..] else { return Err(stderr.into()) };
    assert_eq!(first, lengths(&[Message::user("/etc/passwd")])?);

    // The end of the input is the end of the chat, even within a line.
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
        .thinking(Thinking::new(2).refine(Interpolate::new(0.5)));
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
fn a_chat_template_can_be_given() -> Result {
    let folder = checkpoint(true)?;
    let file = folder.path().join("own.jinja");
    fs::write(&file, "the dog {{ messages[0].content }}")?;
    let path = file.to_string_lossy().into_owned();
    let model = HybridModel::from_folder(folder.path(), DType::F32, &Device::Cpu)?;
    let model = model.with_chat_template("the dog {{ messages[0].content }}")?;
    let config = model.generation_config().max_tokens(8);
    let expected = model.chat(&[Message::user("the cat")], &config)?.text;
    let args = ["--chat", "--prompt=the cat", "--max-tokens=8", "--chat-template", &path];
    assert_eq!(succeed("generate", folder.path(), &args, "")?.0, format!("{expected}\n"));
    let args = ["--max-tokens=8", "--chat-template", &path];
    let (said, _) = succeed("chat", folder.path(), &args, "the cat\n")?;
    assert_eq!(said, format!("{}\n", expected.trim_start()));
    let error = fail("chat", folder.path(), &["--chat-template", "/nowhere.jinja"])?;
    assert!(error.contains("/nowhere.jinja"), "{error}");
    Ok(())
}

#[test]
fn chat_needs_a_tokenizer_and_room() -> Result {
    let (with, without) = (checkpoint(true)?, checkpoint(false)?);
    assert_eq!(
        fail("chat", without.path(), &[])?,
        "error: the checkpoint has no chat template: give one with --chat-template\n"
    );
    assert_eq!(
        fail("chat", with.path(), &["--context", "0"])?,
        "error: parameter capacity: expected at least one position, got 0\n"
    );
    assert_eq!(
        fail("chat", with.path(), &["--context", "257"])?,
        "error: context full: the model has room for 256 positions, 257 requested\n"
    );
    Ok(())
}

// ---- embed ----

/// What `embed --json --cosine` prints: an object for each text, and one with the cosines.
struct Embedded {
    vectors: Vec<Vec<f32>>,
    cosine: Vec<Vec<f32>>,
}

impl Embedded {
    fn parse(stdout: &str) -> Result<Self> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct One {
            vector: Vec<f32>,
        }
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Last {
            cosine: Vec<Vec<f32>>,
        }
        let mut lines: Vec<&str> = stdout.lines().collect();
        let Last { cosine } = serde_json::from_str(lines.pop().ok_or("nothing")?)?;
        let vector = |line: &&str| Ok(serde_json::from_str::<One>(line)?.vector);
        Ok(Self { vectors: lines.iter().map(vector).collect::<Result<_>>()?, cosine })
    }
}

#[test]
fn embed_gives_the_librarys_vectors_and_their_cosines() -> Result {
    let folder = checkpoint(true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let texts = ["the cat", "the dog sat on the mat", "the cat", "about"];
    let file = folder.path().join("texts.txt");
    fs::write(&file, format!("{}\n\n{}\r\n", texts[2], texts[3]))?;
    let file = file.to_str().ok_or("a path that is no text")?;
    let plain = EmbedConfig::default();
    let bidirectional = EmbedConfig::default()
        .pooling(hybrid_attention::Pooling::WeightedMean)
        .sight(Sight::Bidirectional)
        .thinking(Thinking::new(1));
    let told = EmbedConfig::default().sight(Sight::Causal).instruction("about ").max_tokens(24);
    let last = EmbedConfig::default().pooling(hybrid_attention::Pooling::LastToken);
    for (args, config) in [
        (vec![], plain),
        (vec!["--pooling=weighted-mean", "--both-ways", "--passes=1"], bidirectional),
        (vec!["--causal", "--instruction=about ", "--truncate=24"], told),
        (vec!["--pooling=last"], last),
    ] {
        let args = [vec!["--json", "--file", file, texts[0], texts[1]], args].concat();
        let (lines, _) = succeed("embed", folder.path(), &args, "")?;
        let args = [&args[..], &["--cosine"]].concat();
        let (stdout, _) = succeed("embed", folder.path(), &args, "")?;
        assert!(stdout.starts_with(&lines), "vectors alone");
        let Embedded { vectors, cosine } = Embedded::parse(&stdout)?;
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

/// A file of vectors, read by candle.
fn read_vectors(path: &Path) -> Result<Tensor> {
    if path.extension().is_some_and(|it| it == "npy") {
        return Ok(Tensor::read_npy(path)?);
    }
    let mut tensors = candle_core::safetensors::load(path, &Device::Cpu)?;
    assert_eq!(tensors.len(), 1);
    Ok(tensors.remove("vectors").ok_or("no vectors")?)
}

#[test]
fn embed_writes_files_that_others_read() -> Result {
    let folder = checkpoint(true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let words = ["the cat ", "sat ", "on the mat "];
    for count in [1, 9, 113] {
        let text = |at: usize| (0..=at * 5 % 17).map(|it| words[(at + it) % 3]).collect();
        let texts: Vec<String> = (0..count).map(text).collect();
        let file = folder.path().join("texts.txt");
        fs::write(&file, texts.join("\n"))?;
        let expected = model.embed(&texts, &EmbedConfig::default())?;
        for name in ["out.safetensors", "out.npy"] {
            let out = folder.path().join(name);
            let (file, arg) = (file.display().to_string(), format!("--out={}", out.display()));
            let args = ["--file", &file, &arg, "--batch-tokens=100"];
            let (stdout, stderr) = succeed("embed", folder.path(), &args, "")?;
            assert_eq!((stdout.as_str(), stderr), ("", format!("[wrote {}]\n", out.display())));
            let got = read_vectors(&out)?;
            hybrid_attention_testing::assert_close(name, &got, &expected, 1e-5)?;
            let size = fs::metadata(&out)?.len() - count as u64 * 16 * 4;
            assert_eq!(size % 8, 0, "the numbers are aligned");
            assert!(!folder.path().join(format!("{name}.part")).exists());
        }
    }
    Ok(())
}

#[test]
fn embed_leaves_no_half_file() -> Result {
    let folder = checkpoint(true)?;
    let (out, other) = (folder.path().join("out.npy"), folder.path().join("out.txt"));
    fs::write(&out, "what was there")?;
    let long = "the cat ".repeat(300);
    let arg = |path: &Path| format!("--out={}", path.display());
    let stderr = fail("embed", folder.path(), &[&arg(&out), "the cat", &long])?;
    assert!(stderr.starts_with("error: text 2: context full"), "{stderr}");
    assert_eq!(fs::read_to_string(&out)?, "what was there");
    assert!(!folder.path().join("out.npy.part").exists());
    let stderr = fail("embed", folder.path(), &[&arg(&other), "the cat"])?;
    let expected = "expected a name that ends in .safetensors or .npy";
    assert_eq!(stderr, format!("error: {}: {expected}\n", other.display()));
    let nowhere = folder.path().join("absent").join("out.npy");
    let stderr = fail("embed", folder.path(), &[&arg(&nowhere), "the cat"])?;
    assert!(stderr.contains("its folder does not exist"), "{stderr}");
    let stderr = fail("embed", folder.path(), &[&arg(&out), "--json", "the cat"])?;
    assert!(stderr.contains("cannot be used with"), "{stderr}");
    Ok(())
}

#[test]
fn embed_prints_many_vectors_and_no_table_of_them() -> Result {
    let folder = checkpoint(true)?;
    let texts: Vec<String> = (0..65).map(|at| "the cat ".repeat(1 + at * 7 % 13)).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let (table, _) = succeed("embed", folder.path(), &texts[..64], "")?;
    assert_eq!(table.lines().count(), 65);
    let stderr = fail("embed", folder.path(), &texts)?;
    assert!(
        stderr.starts_with("error: a table of 65 texts would be too large: --json "),
        "{stderr}"
    );
    let args = [&["--json", "--cosine"], &texts[..]].concat();
    let Embedded { vectors, cosine } =
        Embedded::parse(&succeed("embed", folder.path(), &args, "")?.0)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    assert_eq!(vectors, model.embed(&texts, &EmbedConfig::default())?.to_vec2::<f32>()?);
    assert_eq!((cosine.len(), cosine[64].len()), (65, 65));
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

// ---- generic ----

#[test]
fn generic_writes_what_embed_takes_out() -> Result {
    let folder = checkpoint(true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let words = ["cat", "dog", "boat", "town", "rain"];
    let texts: Vec<String> = (0..12)
        .map(|at| {
            format!("the {} sat on the {}, {at} of all", words[at % 5], words[(3 * at + 1) % 4])
        })
        .collect();
    let (file, out) = (folder.path().join("texts.txt"), folder.path().join("generic.safetensors"));
    fs::write(&file, texts.join("\n\n"))?;
    let (file, at) = (format!("--texts={}", file.display()), format!("--out={}", out.display()));
    let fingerprint = Fingerprint::of(model.transformer())?;
    for layer in [None, Some(1)] {
        let own = layer.map(|layer| format!("--layer={layer}"));
        let own: Vec<&str> = own.iter().map(String::as_str).collect();
        let (stdout, stderr) = succeed(
            "generic",
            folder.path(),
            &[&[file.as_str(), &at, "--json"], &own[..]].concat(),
            "",
        )?;
        assert_eq!(stderr, format!("[wrote {}]\n", out.display()));
        let generic = Generic::load(&out, &fingerprint)?;
        let right = Generic::of(&model, &texts, layer)?;
        assert_eq!((generic.layer(), generic.texts(), generic.mean()), (layer, 12, right.mean()));
        assert_eq!(generic, right);

        // Every fifth is held out.
        let config =
            layer.into_iter().fold(EmbedConfig::default(), EmbedConfig::layer).normalize(false);
        let some = |held: bool| -> Result<Tensor> {
            let some = texts.iter().enumerate().filter(|(at, _)| (at % 5 == 4) == held);
            Ok(model.embed(&some.map(|(_, text)| text).collect::<Vec<_>>(), &config)?)
        };
        let (seen, held) = (Generic::fit(&some(false)?, layer, fingerprint.clone())?, some(true)?);
        let report: Value = serde_json::from_str(&stdout)?;
        assert_eq!((&report["texts"], &report["held_out"]), (&10.into(), &2.into()));
        let rows = report["rows"].as_array().ok_or("no rows")?;
        assert_eq!(rows.len(), 4); // 1, 2, 4, 8 of 9
        let (table, _) =
            succeed("generic", folder.path(), &[&[file.as_str()], &own[..]].concat(), "")?;
        for (row, k) in rows.iter().zip([1, 2, 4, 8]) {
            let own = seen.explained(&held, &seen.subspace(k)?)?;
            let width = generic.mean().len();
            let chance = seen.explained(&held, &Subspace::random(width, k, 0)?)?;
            let near = |got: &Value, right: f64| {
                got.as_f64().is_some_and(|got| (got - right).abs() < 1e-5)
            };
            assert!(
                near(&report["mean"], own.mean) && near(&row["variance"], own.directions),
                "{row}"
            );
            assert!(near(&row["by_chance"], chance.directions), "{row}");
            let [own, chance] = [own, chance].map(|it| 100.0 * it.directions);
            assert!(table.contains(&format!("| {k} | {own:.1} | {chance:.1} |")), "{table}");
        }

        let from = format!("--generic={}", out.display());
        let whole = EmbedConfig::default();
        for (args, remove) in [
            (vec![], generic.remove(0)?),
            (vec!["--remove=2"], generic.remove(2)?),
            (vec!["--remove=2", "--keep-mean"], generic.remove(2)?.keep_mean()),
        ] {
            let args = [vec!["--json", from.as_str(), "the cat", "a dog"], args].concat();
            let (stdout, _) = succeed("embed", folder.path(), &args, "")?;
            let expected = model.embed(&["the cat", "a dog"], &whole.clone().remove(remove))?;
            let vector = |line: &str| -> Result<Vec<f32>> {
                Ok(serde_json::from_value(serde_json::from_str::<Value>(line)?["vector"].take())?)
            };
            let vectors = stdout.lines().map(vector).collect::<Result<Vec<_>>>()?;
            assert_eq!(vectors, expected.to_vec2::<f32>()?);
        }
        let stderr = fail("embed", folder.path(), &[&from, "--remove=12", "the cat"])?;
        assert!(stderr.contains("parameter k: expected at most 11 directions, got 12"), "{stderr}");
    }
    let from = format!("--generic={}", out.display());
    let stderr = fail("embed", folder.path(), &[&from, "--layer=2", "the cat"])?;
    assert!(
        stderr.contains("expected vectors of layer 2 to remove something from, got layer 1"),
        "{stderr}"
    );
    let stderr = fail("embed", folder.path(), &["--remove=1", "the cat"])?;
    assert!(stderr.contains("--generic"), "{stderr}");
    let other = hybrid_attention_testing::checkpoint(0.5, true)?;
    let stderr = fail("embed", other.path(), &[&from, "the cat"])?;
    assert!(stderr.contains("parameter generic: expected one of this model"), "{stderr}");
    fs::write(&out, &fs::read(&out)?[..100])?;
    let stderr = fail("embed", folder.path(), &[&from, "the cat"])?;
    assert!(stderr.contains("generic.safetensors: "), "{stderr}");
    let few = folder.path().join("few.txt");
    fs::write(&few, "the cat\n".repeat(9))?;
    let stderr = fail("generic", folder.path(), &["--texts", few.to_str().ok_or("no text")?])?;
    assert!(stderr.contains("few.txt: expected at least 10 texts, got 9"), "{stderr}");
    let nowhere = folder.path().join("absent").join("out");
    let stderr =
        fail("generic", folder.path(), &[&file, "--out", nowhere.to_str().ok_or("no text")?])?;
    assert!(stderr.contains("its folder does not exist"), "{stderr}");
    Ok(())
}

// ---- inspect ----

/// What a run of `inspect` writes.
struct Inspected {
    page: String,
    json: Value,
}

fn inspect(model: &Path, args: &[&str]) -> Result<Inspected> {
    let folder = tempfile::tempdir()?;
    let path = |name| folder.path().join(name).display().to_string();
    let (out, json) = (path("page.html"), path("trace.json"));
    let files = ["--out", &out, "--json", &json];
    let (stdout, stderr) = succeed("inspect", model, &[args, &files].concat(), "")?;
    assert_eq!(stdout, "");
    assert_eq!(stderr.matches("[wrote ").count(), 2, "{stderr}");
    let json = serde_json::from_str(&fs::read_to_string(json)?)?;
    Ok(Inspected { page: fs::read_to_string(out)?, json })
}

/// The page is well-formed XML but for its first line.
fn parse(page: &str) -> Result<roxmltree::Document<'_>> {
    let page = page.strip_prefix("<!DOCTYPE html>\n").ok_or("no document type")?;
    Ok(roxmltree::Document::parse(page)?)
}

fn elements<'a>(
    node: roxmltree::Node<'a, 'a>,
    name: &'static str,
) -> impl Iterator<Item = roxmltree::Node<'a, 'a>> {
    node.descendants().filter(move |node| node.has_tag_name(name))
}

fn all_text(node: roxmltree::Node<'_, '_>) -> String {
    node.descendants().filter(roxmltree::Node::is_text).filter_map(|node| node.text()).collect()
}

/// The page fetches nothing and runs nothing.
fn assert_self_contained(page: &str) -> Result {
    for outside in ["http:", "https:", "url(", "@import", "srcset"] {
        assert!(!page.contains(outside), "{outside}");
    }
    let parsed = parse(page)?;
    for node in parsed.descendants() {
        let name = node.tag_name().name();
        let fetches = ["script", "link", "img", "image", "iframe", "object", "embed", "use", "a"];
        assert!(!fetches.contains(&name), "{name}");
        for attribute in node.attributes() {
            let name = attribute.name();
            assert!(!["src", "href"].contains(&name) && !name.starts_with("on"), "{name}");
        }
    }
    Ok(())
}

/// Without the timings.
fn timeless(mut trace: Value) -> Value {
    for pass in trace["passes"].as_array_mut().into_iter().flatten() {
        pass["seconds"] = Value::Null;
    }
    trace
}

#[test]
fn inspect_reports_the_librarys_trace() -> Result {
    let folder = checkpoint(true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let prompt = Prompt::default().context("the cat sat on the mat").plain(" the dog");
    let thinking = Thinking::new(2)
        .span(1..3)
        .refine(Interpolate::new(0.3))
        .hand_off(HandOff::KeyValue)
        .detail(Detail::Maps);
    let config = GenerationConfig::default().max_tokens(6);
    let plain = model.generate(prompt.clone(), &config)?;
    let thought = model.generate(prompt, &config.thinking(thinking.clone()))?;

    let args = [
        "--prompt=the cat sat on the mat",
        "--plain= the dog",
        "--passes=2",
        "--span=1..3",
        "--weight=0.3",
        "--hand-off=key-value",
        "--max-tokens=6",
    ];
    let Inspected { page, json } = inspect(folder.path(), &args)?;
    let trace: Value = serde_json::from_str(&serde_json::to_string(&thought.traces[0])?)?;
    assert_eq!(timeless(json["trace"].clone()), timeless(trace));
    assert_eq!(json["settings"], serde_json::to_value(&thinking)?);
    let ids = |tokens: &Value| -> Result<Vec<u64>> {
        let tokens = tokens.as_array().ok_or("no tokens")?;
        Ok(tokens.iter().filter_map(|token| token["id"].as_u64()).collect())
    };
    let wide = |ids: &[u32]| ids.iter().copied().map(u64::from).collect::<Vec<_>>();
    assert_eq!(ids(&json["tokens"])?, wide(&thought.prompt_ids));
    assert_eq!(ids(&json["thought"]["tokens"])?, wide(&thought.ids));
    assert_eq!(ids(&json["plain"]["tokens"])?, wide(&plain.ids));

    // The plain part, and no other token, keeps its thoughts.
    let cosines = json["trace"]["passes"][1]["tokens"]["cosine"][0].as_array().ok_or("none")?;
    for (token, cosine) in json["tokens"].as_array().into_iter().flatten().zip(cosines) {
        let moved = cosine.as_f64().is_some_and(|cosine| (cosine - 1.0).abs() > 1e-5);
        assert_eq!(token["thinks"].as_bool(), Some(moved), "{token}");
    }
    assert_self_contained(&page)
}

#[test]
fn inspect_draws_every_pass() -> Result {
    let folder = checkpoint(true)?;
    let args = ["--prompt=the cat sat on the mat", "--passes=2", "--span=1..3"];
    let Inspected { page, json } = inspect(folder.path(), &args)?;
    let parsed = parse(&page)?;
    let of = |id: &str| {
        let found = parsed.descendants().find(|node| node.attribute("id") == Some(id));
        found.ok_or_else(|| format!("no {id}"))
    };
    assert_eq!(elements(of("drift")?, "circle").count(), 2);
    let tokens = json["tokens"].as_array().ok_or("no tokens")?;
    let rows: Vec<_> = elements(of("tokens")?, "tr").skip(1).collect();
    assert_eq!(rows.len(), tokens.len());
    let mut shown = Vec::new();
    for (row, token) in rows.iter().zip(tokens) {
        let cells: Vec<String> = elements(*row, "td").map(all_text).collect();
        let text = token["text"].as_str().unwrap_or_default().replace(' ', "␣");
        assert_eq!(cells[1], text);
        shown.push(text);
        assert_eq!(cells[2] == "context", token["thinks"].as_bool() == Some(true), "{token}");
    }
    for pass in ["pass-1", "pass-2"] {
        let pass = of(pass)?;
        for class in ["similarity", "attention"] {
            let mut figures = pass.descendants();
            let figure = figures.find(|node| node.attribute("class") == Some(class));
            let figure = figure.ok_or("no figure")?;
            assert!(elements(figure, "rect").count() > tokens.len(), "{class}");
            let names = elements(figure, "text").map(all_text).map(|text| text.trim().to_owned());
            let named = names.filter(|name| shown.contains(name)).count();
            assert_eq!(named, 2 * tokens.len(), "{class}: along both sides");
        }
        let layers = elements(pass, "details").flat_map(|node| elements(node, "figcaption"));
        assert_eq!(layers.map(all_text).collect::<Vec<_>>(), ["layer 1", "layer 2"]);
    }
    Ok(())
}

/// The steps of one computation as the page must have them: name, numbers.
type Steps<'a> = Vec<(&'a str, &'a Tensor)>;

fn of_softmax(it: &SoftmaxSteps) -> Steps<'_> {
    let name = if it.maximum.is_some() { "scores" } else { "cosines" };
    let maximum = it.maximum.iter().map(|maximum| ("row maximum", maximum));
    let rest =
        [("exponentials", &it.exponentials), ("row sums", &it.sums), ("weights", &it.weights)];
    [(name, &it.scores)].into_iter().chain(maximum).chain(rest).collect()
}

fn of_head(it: &AttentionSteps) -> Steps<'_> {
    let first = vec![("queries q", &it.queries), ("keys k", &it.keys), ("values v", &it.values)];
    let last = vec![
        ("context", &it.context),
        ("share", &it.share),
        ("output projection", &it.projection),
        ("residual before", &it.before),
        ("residual after", &it.after),
    ];
    [first, of_softmax(&it.softmax), last].concat()
}

#[test]
fn inspect_works_through_heads_and_cosines() -> Result {
    let folder = checkpoint(true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let prompt = Prompt::default().context("the cat sat").plain(" the dog");
    let thinking = Thinking::new(1).span(1..3);
    let none = GenerationConfig::default().thinking(Thinking::none());
    let read = model.think(prompt.clone(), &none)?;
    let ids = read.origin.as_ref().ok_or("no origin")?.ids().to_vec();

    let args = [
        "--prompt=the cat sat",
        "--plain= the dog",
        "--passes=1",
        "--span=1..3",
        "--max-tokens=1",
        "--attention=1:2",
        "--attention=0:3",
        "--attention=cosine",
    ];
    let Inspected { page, json } = inspect(folder.path(), &args)?;
    assert_self_contained(&page)?;
    let context = json["tokens"].as_array().into_iter().flatten();
    let context = context.take_while(|token| token["thinks"].as_bool() == Some(true)).count();
    assert!(context > 1 && ids.len() <= 12, "{context} of {}", ids.len());
    let batch = Batch::one(ids.len())?.with_context(0, &[0..context])?;
    let text = EncodedBatch::new(model.transformer(), &ids, batch.clone())?;
    let mind = thinking.on(model.thought_model())?;
    let z = mind.encode(&text, Pass::Causal(&batch))?;
    let causal = model.attention_steps(prompt.clone(), Sight::Causal, 1, 2)?;
    let pass = mind.attention_steps(&z, &batch, 1, 2)?.remove(0);
    let below = model.attention_steps(prompt, Sight::Causal, 0, 3)?;
    let cosines = CosineSteps::of(&read.z)?;
    let mut of_cosines = vec![("embeddings x", &cosines.embeddings)];
    of_cosines.extend(of_softmax(&cosines.softmax));
    of_cosines.extend([("context", &cosines.context), ("residual after", &cosines.after)]);

    // A pass does not run layer 0.
    let expected = [
        (serde_json::json!({ "causal": { "layer": 1, "head": 2 } }), of_head(&causal)),
        (serde_json::json!({ "thought_pass": { "layer": 1, "head": 2 } }), of_head(&pass)),
        (serde_json::json!({ "causal": { "layer": 0, "head": 3 } }), of_head(&below)),
        (serde_json::json!("cosine"), of_cosines),
    ];
    let parsed = parse(&page)?;
    let sections: Vec<_> = elements(parsed.root(), "section")
        .filter(|node| node.attribute("id").is_some_and(|id| id.starts_with("steps-")))
        .collect();
    let worked = json["attention"].as_array().ok_or("nothing worked through")?;
    assert_eq!((worked.len(), sections.len()), (expected.len(), expected.len()));
    for ((worked, section), (what, steps)) in worked.iter().zip(sections).zip(expected) {
        assert_eq!(worked["what"], what);
        let shown = worked["steps"].as_array().ok_or("no steps")?;
        let figures: Vec<_> = elements(section, "figure").collect();
        assert_eq!((shown.len(), figures.len()), (steps.len(), steps.len()), "{what}");
        for ((shown, figure), (name, tensor)) in shown.iter().zip(figures).zip(steps) {
            assert_eq!(shown["name"], name);
            let rows: Vec<Vec<f32>> = tensor.to_vec2()?;
            let finite = |value: &f32| value.is_finite().then_some(*value);
            let with_null: Vec<Vec<Option<f32>>> =
                rows.iter().map(|row| row.iter().map(finite).collect()).collect();
            let values: Vec<Vec<Option<f32>>> = serde_json::from_value(shown["values"].clone())?;
            assert_eq!(values, with_null, "{what}, {name}");
            // 12 rows and columns are numbers; what is hidden wide is drawn.
            let cells = elements(figure, "td").filter(|cell| cell.attribute("class").is_none());
            let cells: Vec<String> = cells.map(all_text).collect();
            let drawn = elements(figure, "rect").count();
            if rows[0].len() > 12 {
                assert!(cells.is_empty() && drawn > rows.len(), "{what}, {name}");
                continue;
            }
            let number = |value: &f32| match value.is_finite() {
                true => format!("{value:.3}"),
                false => "−∞".to_owned(),
            };
            assert_eq!(cells, rows.iter().flatten().map(number).collect::<Vec<_>>());
            assert_eq!(drawn, 0, "{what}, {name}");
        }
    }
    Ok(())
}

/// Neither passes nor a tokenizer, and a prompt too long for numbers.
#[test]
fn inspect_works_through_a_model_that_does_not_think() -> Result {
    let folder = checkpoint(false)?;
    let ids: Vec<String> = (0..150).map(|id| id.to_string()).collect();
    let args = ["--ids", &ids.join(","), "--attention=2:0"];
    let Inspected { page, json } = inspect(folder.path(), &args)?;
    assert_self_contained(&page)?;
    let parsed = parse(&page)?;
    assert_eq!((&json["trace"], &json["plain"]), (&Value::Null, &Value::Null));
    let headings: Vec<String> = elements(parsed.root(), "h2").map(all_text).collect();
    assert_eq!(headings, ["Attention step by step"]);
    assert_eq!(elements(parsed.root(), "table").count(), 0);
    let scores = &json["attention"][0]["steps"][3];
    assert_eq!((&scores["name"], &scores["values"][0][1]), (&Value::from("scores"), &Value::Null));
    assert_eq!(scores["values"].as_array().map(Vec::len), Some(150));
    // Two tokens are one row and column, whose names stand on two sides; those of channels and sums, on one.
    let figure = elements(parsed.root(), "figure").nth(3).ok_or("no scores")?;
    let names = elements(figure, "text").map(all_text);
    assert_eq!(names.filter(|name| name.trim() == "#148").count(), 2);
    let sums = elements(parsed.root(), "figure").nth(6).ok_or("no sums")?;
    assert_eq!(elements(sums, "rect").count(), 75 + 64, "75 rows and a legend");
    // What is not seen stays blank: above the diagonal of 75 there is nothing to see.
    let colours = |at: usize| elements(figure, "rect").nth(at).and_then(|it| it.attribute("width"));
    assert_eq!(colours(0), Some("9"), "the first pair sees itself only");
    Ok(())
}

#[test]
fn inspect_refuses_heads_that_there_are_not() -> Result {
    let folder = checkpoint(false)?;
    for (arg, expected) in [
        ("--attention=3:0", "error: parameter layer: expected less than 3, got 3\n"),
        ("--attention=0:4", "error: parameter head: expected less than 4, got 4\n"),
    ] {
        assert_eq!(fail("inspect", folder.path(), &["--ids=1,2", arg])?, expected);
    }
    for arg in ["--attention=1", "--attention=a:1", "--attention=1:-1", "--attention=1:2:3"] {
        let stderr = fail("inspect", folder.path(), &["--ids=1,2", arg])?;
        assert!(stderr.contains("expected a layer and a head like 10:3, or cosine"), "{stderr}");
    }
    // Candidates are those of thinking.
    let args = ["--ids=1,2", "--attention=0:0", "--candidates=2"];
    let stderr = fail("inspect", folder.path(), &args)?;
    assert!(stderr.starts_with("error: nothing to look into without thinking"), "{stderr}");
    Ok(())
}

#[test]
fn inspect_says_why_thinking_ended() -> Result {
    let folder = checkpoint(false)?;
    for (args, passes, why) in [
        (vec!["--passes=3"], "3 of at most 3", "all passes were run"),
        (vec!["--passes=3", "--halt-drift=1e9"], "1 of at most 3", "drift fell below 1000000000"),
    ] {
        let args = [args, vec!["--ids=1,2,3", "--no-maps"]].concat();
        let Inspected { page, json } = inspect(folder.path(), &args)?;
        let parsed = parse(&page)?;
        let facts: Vec<String> = elements(parsed.root(), "dd").map(all_text).collect();
        assert!(facts.iter().any(|fact| fact == passes), "{facts:?}");
        assert!(facts.iter().any(|fact| fact == why), "{facts:?}");
        // Neither a tokenizer nor maps.
        assert_eq!(json["tokens"][1]["text"], "#2");
        assert_eq!(json["trace"]["passes"][0]["maps"], Value::Null);
        assert_eq!(elements(parsed.root(), "section").count(), 0);
    }
    Ok(())
}

#[test]
fn inspect_pools_long_prompts_in_the_drawings_only() -> Result {
    let folder = checkpoint(false)?;
    let ids: Vec<String> = (0..200).map(|id| id.to_string()).collect();
    let args = ["--ids", &ids.join(","), "--passes=1", "--max-tokens=1"];
    let Inspected { page, json } = inspect(folder.path(), &args)?;
    let parsed = parse(&page)?;
    let note = parsed.descendants().find(|node| node.attribute("id") == Some("pooled"));
    let note = all_text(note.ok_or("no note")?);
    assert!(note.starts_with("The prompt has 200 tokens. Here 2 neighbouring tokens "), "{note}");
    let names: Vec<String> =
        elements(parsed.root(), "text").map(all_text).map(|text| text.trim().to_owned()).collect();
    let count = |name: &str| names.iter().filter(|it| *it == name).count();
    assert_eq!((count("#198"), count("#199")), (4, 0), "two drawings with two sides");
    let map = &json["trace"]["passes"][0]["maps"]["similarity"][0];
    assert_eq!(map.as_array().map(Vec::len), Some(200));
    assert_eq!(elements(parsed.root(), "tr").count(), 201);
    Ok(())
}

#[test]
fn inspect_escapes_whatever_tokens_and_paths_spell() -> Result {
    let folder = checkpoint(true)?;
    let hostile =
        "</p><script>alert(\"x\")</script>&amp;' onload='\u{202e}\u{7}\u{200b}\n]]>--><!--";
    let name = "<script>&'\"";
    let model = folder.path().join(name);
    fs::create_dir(&model)?;
    for entry in fs::read_dir(folder.path())?.flatten().filter(|entry| entry.path().is_file()) {
        fs::copy(entry.path(), model.join(entry.file_name()))?;
    }
    let args = ["--passes=1", "--max-tokens=40", "--prompt", hostile];
    let Inspected { page, json } = inspect(&model, &args)?;
    assert_self_contained(&page)?;
    for c in page.chars() {
        let invisible = ['\u{202e}', '\u{200b}'].contains(&c) || (c.is_control() && c != '\n');
        assert!(!invisible, "{c:?}");
    }
    // Unescaping gives back the original.
    let text: String = json["tokens"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|token| token["text"].as_str())
        .collect();
    assert!(text.ends_with(hostile), "{text}");
    let parsed = parse(&page)?;
    let shown: String = elements(parsed.root(), "td")
        .filter(|cell| cell.attribute("class") == Some("text"))
        .step_by(2)
        .map(all_text)
        .collect();
    assert!(
        shown.replace('⋯', "").ends_with("&amp;'␣onload='\\u{202e}\\u{7}\\u{200b}⏎]]>--><!--"),
        "{shown}"
    );
    assert!(elements(parsed.root(), "dd").map(all_text).any(|fact| fact.ends_with(name)));
    Ok(())
}

/// `hybrid.json` applies until the command line says something else.
#[test]
fn inspect_and_generate_think_as_the_checkpoint_says() -> Result {
    let folder = checkpoint(false)?;
    let stderr = fail("inspect", folder.path(), &["--ids=1,2,3"])?;
    assert_eq!(
        stderr,
        "error: nothing to look into without thinking: give --passes or --attention\n"
    );

    let own = r#"{"passes": 2, "span": [1, 2], "refine": [{"op": "interpolate", "weight": 0.1}]}"#;
    fs::write(folder.path().join("hybrid.json"), own)?;
    let Inspected { page, json } = inspect(folder.path(), &["--ids=1,2,3"])?;
    assert_eq!(json["settings"]["span"], serde_json::json!([1, 2]));
    let parsed = parse(&page)?;
    let facts: Vec<String> = elements(parsed.root(), "dd").map(all_text).collect();
    for fact in ["2 of at most 2", "1..2 of 3", "z += 0.1 (h − z)"] {
        assert!(facts.iter().any(|it| it == fact), "{facts:?}");
    }
    for (args, passes) in [(vec![], 2), (vec!["--passes=0"], 0), (vec!["--passes=1"], 1)] {
        let args = [vec!["--ids=1,2,3", "--json", "--max-tokens=1"], args].concat();
        let report: Value =
            serde_json::from_str(&succeed("generate", folder.path(), &args, "")?.0)?;
        assert_eq!(report["drift"].as_array().map(Vec::len), Some(passes));
    }
    Ok(())
}

#[test]
fn inspect_names_the_problem_before_it_loads() -> Result {
    let folder = tempfile::tempdir()?;
    let nowhere = folder.path().join("absent").join("page.html");
    let nowhere = nowhere.to_str().ok_or("a path that is no text")?;
    for (args, expected) in [
        (vec!["--passes=0"], "nothing to look into without thinking: give --passes or --attention"),
        (vec!["--passes=1", "--out", nowhere], &format!("{nowhere}: its folder does not exist")),
        (vec!["--passes=1", "--json", nowhere], &format!("{nowhere}: its folder does not exist")),
        (
            vec!["--passes=1", "--hand-off=mixed:2"],
            "parameter hand_off weight: expected a share in [0, 1], got 2",
        ),
    ] {
        let args = [vec!["--ids=1,2"], args].concat();
        assert_eq!(fail("inspect", folder.path(), &args)?, format!("error: {expected}\n"));
    }
    Ok(())
}

// ---- measure ----

#[test]
fn measure_sets_every_way_to_think_beside_its_controls() -> Result {
    let folder = checkpoint(true)?;
    let model = HybridModel::from_folder(folder.path(), None, &Device::Cpu)?;
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    let lines = ["the cat sat on the mat about the dog", "the", "on the mat the dog sat about"];
    let (text, json) = (folder.path().join("text.txt"), folder.path().join("out.json"));
    fs::write(&text, lines.join("\n"))?;
    let arg = |name, path: &Path| format!("--{name}={}", path.display());
    let args = ["--passages=2", "--tokens=3", &arg("text", &text), &arg("json", &json)];
    let (table, _) = succeed("measure", folder.path(), &args, "")?;
    let (again, _) = succeed("measure", folder.path(), &args, "")?;
    assert_eq!(table, again);

    let report: Value = serde_json::from_str(&fs::read_to_string(json)?)?;
    let losses = |value: &Value| serde_json::from_value::<Vec<f64>>(value["losses"].clone());
    let config = GenerationConfig::default().prompt_logprobs(true).max_tokens(0);
    let loss = |prompt: Prompt, thinking: Thinking| -> Result<f64> {
        let answer = model.generate(prompt, &config.clone().thinking(thinking))?;
        let logprobs = answer.prompt_logprobs.ok_or("none")?;
        let second = logprobs.iter().rev().take(3).flatten();
        Ok(-second.map(|&logprob| f64::from(logprob)).sum::<f64>() / 3.0)
    };
    // The middle third, three passes, weight 0.2, causal, mixed.
    let setting = &report["thought"][70];
    assert_eq!(
        setting["setting"],
        serde_json::json!({
            "hand_off": { "mixed": { "weight": 0.5 } }, "span": { "start": 1, "end": 2 },
            "passes": 3, "sight": "causal", "weight": 0.2,
        })
    );
    let thinking = Thinking::new(3)
        .span(1..2)
        .sight(Sight::Causal)
        .refine(Interpolate::new(0.2).slerp().match_norm())
        .hand_off(HandOff::Mixed { weight: 0.5 });
    for (index, line) in [lines[0], lines[2]].iter().enumerate() {
        let ids = tokenizer.encode(line, true)?;
        let prompt = Prompt::default().plain_ids(&ids[..1]).context_ids(&ids[1..2]);
        let prompt = prompt.plain_ids(&ids[2..6]);
        let twice = [&ids[..3], &ids[1..3], &ids[3..6]].concat();
        for (reported, expected) in [
            (&report["plain"], loss(prompt.clone(), Thinking::none())?),
            (&report["repeated"], loss(twice.into(), Thinking::none())?),
            (setting, loss(prompt, thinking.clone())?),
        ] {
            assert!((losses(reported)?[index] - expected).abs() < 1e-9, "{reported} {expected}");
        }
    }
    let differences: Vec<f64> =
        losses(setting)?.iter().zip(losses(&report["plain"])?).map(|(a, b)| a - b).collect();
    let [a, b] = differences[..] else { return Err("not two passages".into()) };
    let cell = format!("{:+.3} ± {:.3}", (a + b) / 2.0, (a - b).abs() / 2.0);
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(rows.len(), 2 + 12, "{table}");
    let cells: Vec<&str> = rows[13].split('|').map(str::trim).collect();
    assert_eq!(cells[1..4], ["mixed, 0.5", "1..2", "3"], "{table}");
    assert_eq!(cells[8], cell, "{table}");
    Ok(())
}

#[test]
fn measure_needs_enough_text() -> Result {
    let folder = checkpoint(true)?;
    let text = folder.path().join("text.txt");
    fs::write(&text, "the cat sat on the mat\n")?;
    let text = format!("--text={}", text.display());
    for (args, expected) in [
        (["--passages=2", "--tokens=2"], "only 1 of 2 passages have 2 tokens twice"),
        (["--passages=1", "--tokens=2"], "expected at least 2 --passages and 2 --tokens"),
    ] {
        let stderr = fail("measure", folder.path(), &[&args[..], &[&text]].concat())?;
        assert_eq!(stderr, format!("error: {expected}\n"));
    }
    Ok(())
}

// ---- models by name ----

#[test]
fn models_of_the_cache_go_by_their_names() -> Result {
    let folder = checkpoint(true)?;
    let cache = tempfile::tempdir()?;
    let repo = cache.path().join("models--org--name");
    let snapshot = repo.join("snapshots/0123abc");
    fs::create_dir_all(&snapshot)?;
    fs::create_dir_all(repo.join("refs"))?;
    fs::write(repo.join("refs/main"), "0123abc")?;
    for entry in fs::read_dir(folder.path())? {
        let entry = entry?;
        fs::copy(entry.path(), snapshot.join(entry.file_name()))?;
    }
    let run = |model: &str| -> Result<Output> {
        let mut command = hybrid();
        command.env("HF_HUB_CACHE", cache.path()).env("HF_HUB_OFFLINE", "1");
        command.args([
            "generate",
            "--model",
            model,
            "--ids",
            "5,6,7",
            "--max-tokens",
            "6",
            "--json",
        ]);
        hybrid_attention_testing::run(&mut command, "")
    };
    let ids = |output: Output| -> Result<Value> {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice::<Value>(&output.stdout)?["ids"].clone())
    };
    let by_path = ids(run(folder.path().to_str().ok_or("a path that is no text")?)?)?;
    assert!(by_path.as_array().is_some_and(|ids| !ids.is_empty()), "{by_path}");
    assert_eq!(ids(run("org/name")?)?, by_path);
    assert_eq!(ids(run("org/name@main")?)?, by_path);

    for (model, expected) in [
        ("org/other", "org/other is neither a file or folder here nor in the cache, "),
        ("org/name:Q4_K_M", "a GGUF file for Q4_K_M is missing: `hf download org/name` fetches it"),
        ("org", "parameter model: expected a file or folder that exists, or org/name"),
        ("org/na..me", "parameter model: expected a file or folder that exists, or org/name"),
    ] {
        let output = run(model)?;
        let stderr = String::from_utf8(output.stderr)?;
        assert!(!output.status.success() && stderr.contains(expected), "{model}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
    Ok(())
}

// ---- a real model ----

#[test]
fn chat_and_embed_work_on_smollm2() -> Result {
    let Some(path) = smollm2() else { return Ok(()) };
    let input = "What is the capital of France?\nAnd of Italy?\n";
    let (stdout, stderr) = succeed("chat", &path, &["--max-tokens", "24"], input)?;
    assert!(stdout.contains("Paris") && stdout.contains("Rome"), "{stdout}");
    // Everything but what follows the last answer's end.
    let [(0, first), (second, all)] = known(&stderr)[..] else { return Err(stderr.into()) };
    assert!(second > first && second < all, "{stderr}");

    let texts = ["a cat sleeps", "a kitten is asleep", "the tax return is due in April"];
    let args = [&["--json", "--cosine"][..], &texts].concat();
    let (stdout, _) = succeed("embed", &path, &args, "")?;
    let Embedded { cosine, .. } = Embedded::parse(&stdout)?;
    assert!(cosine[0][1] > cosine[0][2], "{cosine:?}");
    Ok(())
}
