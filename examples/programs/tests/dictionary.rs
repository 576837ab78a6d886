//! `hybrid dictionary`, run as a person would run it, beside the library.

use std::fs;
use std::process::{Command, Output};

use candle_core::{DType, Device};
use hybrid_attention::dictionary::{
    Dictionary, DictionaryAdapter, DictionaryConfig, Entries, Pooled,
};
use hybrid_attention::{AdapterScope, GenerationConfig, HybridModel, Pooling, Sight};
use hybrid_attention_testing::{Result, tiny};
use serde_json::Value;

const ENTRIES: &str = "urn\ta vase with a lid\nsled\ta wagon without wheels\nurn\tof stone\n";
const PROMPT: &str = "The urn is in the sled. The sled is in the tent.\nWhere is the urn?\nIn the";

fn run(args: &[&str]) -> Result<Output> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hybrid-under-test"));
    hybrid_attention_testing::run(command.args(args), "")
}

/// Standard output and error of a run that succeeds.
fn succeed(args: &[&str]) -> Result<(String, String)> {
    let output = run(args)?;
    let (out, error) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    assert!(output.status.success(), "{args:?}: {error}");
    Ok((out, error))
}

/// Standard error of a run that fails, having printed nothing.
fn fail(args: &[&str]) -> Result<String> {
    let output = run(args)?;
    assert!(!output.status.success() && output.stdout.is_empty(), "{args:?}");
    Ok(String::from_utf8(output.stderr)?)
}

#[test]
fn what_is_compiled_is_read_as_the_library_reads_it() -> Result {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (entries, out) = (at("entries.tsv"), at("d.safetensors"));
    fs::write(&entries, ENTRIES)?;
    let model = HybridModel::tiny(&Device::Cpu)?;
    let compile = ["dictionary", "compile", "--entries", &entries, "--out", &out];

    let (printed, said) = succeed(&compile)?;
    assert!(printed.is_empty() && said.contains("2 entries"), "{said}");
    let dictionary = Dictionary::open(&out)?;
    let config = DictionaryConfig::layers(1..3);
    let expected = Dictionary::compile(&model, &Entries::from_tsv(&entries)?, &config)?;
    assert_eq!((dictionary.config(), dictionary.headwords()), (&config, expected.headwords()));
    assert_eq!(dictionary.vector(1, 2)?, expected.vector(1, 2)?);

    let settings =
        "--layers 0..2 --tokens headword --pooling last --causal --truncate 9 --bf16 --template";
    let settings: Vec<&str> = settings.split(' ').chain(["{headword} {definition}"]).collect();
    let other = at("other.safetensors");
    succeed(&[&compile[..5], &[&other], &settings].concat())?;
    let all = DictionaryConfig::layers(0..2).pooled(Pooled::Headword).pooling(Pooling::LastToken);
    let all = all.sight(Sight::Causal).max_tokens(9).dtype(DType::BF16);
    let all = all.template("{headword} {definition}");
    assert_eq!(Dictionary::open(&other)?.config(), &all);

    // Untrained it says so, and nothing changes; trained it lies beside the dictionary, or elsewhere.
    let generate = ["generate", "--passes=1", "--max-tokens=2", "--json", "--prompt", PROMPT];
    let answer = |more: &[&str]| -> Result<(Vec<f32>, String)> {
        let (printed, said) = succeed(&[&generate, more].concat())?;
        let answer: Value = serde_json::from_str(&printed)?;
        Ok((serde_json::from_value(answer["logprobs"].clone())?, said))
    };
    let (plain, _) = answer(&[])?;
    let (untrained, said) = answer(&["--dictionary", &out])?;
    assert!(untrained == plain && said.contains("--dictionary-adapter"), "{said}");

    let adapter =
        DictionaryAdapter::new(model.config(), &config, 4, 1, &Device::Cpu)?.trainable()?;
    for (seed, variable) in (0..).zip(adapter.variables()?) {
        variable.set(&tiny::noise(seed, variable.dims(), 0.5)?)?;
    }
    let (elsewhere, beside) = (at("a.safetensors"), at("dictionary_adapter.safetensors"));
    adapter.save(&elsewhere)?;
    let adapter = DictionaryAdapter::open(&elsewhere, &Device::Cpu)?;
    let config = GenerationConfig::default().max_tokens(2);
    let config = config.thinking(hybrid_attention::Thinking::new(1));
    let of = |scope| -> Result<Vec<f32>> {
        let reading = model.with_dictionary(&dictionary, &adapter, scope)?;
        Ok(reading.generate(PROMPT, &config)?.logprobs)
    };
    let given = ["--dictionary", &out, "--dictionary-adapter", &elsewhere];
    assert_eq!(answer(&given)?.0, of(AdapterScope::Both)?);
    let thinking = [&given[..], &["--dictionary-for", "thinking"]].concat();
    assert_eq!(answer(&thinking)?.0, of(AdapterScope::Thinking)?);
    fs::copy(&elsewhere, &beside)?;
    let (found, said) = answer(&["--dictionary", &out])?;
    assert!(found == of(AdapterScope::Both)? && found != plain && !said.contains("--dictionary"));
    Ok(())
}

#[test]
fn what_is_wrong_is_said() -> Result {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (entries, out) = (at("entries.tsv"), at("d.safetensors"));
    let compile = ["dictionary", "compile", "--entries", &entries, "--out", &out];
    fs::write(&entries, "urn\ta vase\nsled\t\n")?;
    assert!(fail(&compile)?.contains("line 2: an empty definition of \"sled\""));
    fs::write(&entries, "urn\ta vase\nblorp\tan unknown word\n")?;
    assert!(fail(&compile)?.contains("line 2: the tokenizer has no tokens for the headword"));
    fs::write(&entries, ENTRIES)?;
    assert!(fail(&[&compile[..], &["--layers", "3..5"]].concat())?.contains("layers"));
    succeed(&compile)?;
    let whole = fs::read(&out)?;
    fs::write(&out, &whole[..whole.len() / 2])?;
    let error = fail(&["generate", "--prompt", PROMPT, "--dictionary", &out])?;
    assert!(error.contains("d.safetensors"), "{error}");
    assert!(
        fail(&["generate", "--prompt", PROMPT, "--dictionary-for", "both"])?
            .contains("--dictionary")
    );
    Ok(())
}
